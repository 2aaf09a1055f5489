"""Weights in 8 bits."""

import os
from collections.abc import Sequence
from pathlib import Path

from .folder import Stage
from .onnx_graphs import needed


def quantize_int8(folder: Path, stages: Sequence[Stage]) -> None:
    """Quantises the layers' weights in a folder of graphs; activations are quantised as they come.

    The exits' heads stay as they are: they cost next to nothing, and what decides is computed in them.

    Args:
        folder (`Path`): Where the graphs are; they are replaced.
        stages (`Sequence[Stage]`): What they are.
    """
    quantization = needed("onnxruntime.quantization")
    for stage in stages:
        graph, draft = folder / stage.file, folder / f"draft-{stage.file}"
        quantization.quantize_dynamic(
            graph,
            draft,
            per_channel=True,
            # 7 bits: on CPUs without VNNI sums of 8-bit products overflow.
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_heads(graph),
        )
        Path(f"{graph}.data").unlink(missing_ok=True)
        os.replace(draft, graph)


def _heads(graph: Path) -> list[str]:
    """Names of the nodes that work on one vector a row, as the exporter and as the quantiser call them."""
    names = [
        node.name for node in needed("onnx").load(graph, load_external_data=False).graph.node if node.op_type == "Gemm"
    ]
    return [*names, *(f"{name}_MatMul" for name in names)]
