"""Export by stages: one ONNX graph from each exit to the next, and all that is needed to run them elsewhere."""

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..modeling.checks import check_path
from ..modeling.switch import replaced_files
from ..tokenizing import check_tokenizer
from .folder import (
    CONFIG_FILE,
    NEXT_STATE,
    QUANTIZATIONS,
    STAGES_FILE,
    STATE,
    TOKENIZER_FILE,
    Stage,
    Stages,
    graph_file,
    is_graph,
)
from .onnx_graphs import StageGraphs, needed
from .optional_exits import make_exit_optional
from .quantization import quantize_int8
from .stage_modules import stage_modules

OPSET = 20
OLDEST_OPSET = 18
# Rows and tokens of the batches on which graphs are compared with torch; the last is longer than usual windows.
_SHAPES = ((1, 2), (4, 7), (2, 160))
_EXAMPLE_SHAPE = (3, 10)
TOLERANCE = 1e-5


def export_onnx(
    model: Any,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    quantize: str | None = None,
    *,
    opset: int = OPSET,
) -> None:
    """Writes a model as ONNX graphs, one a stage, with what [`OnnxClassifierWithExits`] needs to run them.

    The graphs (float32; number and length of the rows are free) are checked by ONNX and compared with torch on batches
    of several shapes. Configuration, thresholds and criterion are written beside them, whole or not at all.

    Args:
        model: A classifier with exits, or a cascade.
        folder (`str` or `os.PathLike`): Made if it does not exist; an earlier export in it is replaced.
        tokenizer (`PreTrainedTokenizerFast`, *optional*): Written as well, so that texts can be classified without
            `transformers`.
        quantize (`str`, *optional*): `"int8"`: weights of the layers in 8 bits, activations quantised as they come.
            This changes answers: calibrate the exported model again, with `calibrate_exits(..., reference=model)`.
        opset (`int`): Version of ONNX's operators.

    Raises:
        ValueError: A model without exits or one that is quantised already, another kind of quantisation, an opset that
            is too old, a tokenizer that has no file of its own, a folder that holds something else; graphs that do not
            answer as the model does.
        ImportError: Packages that are missing; it names the extra.
        OSError: The folder cannot be written; it is then as it was.
    """
    onnx = needed("onnx")
    needed("onnxscript")
    _check_request(model, quantize, opset)
    check_path("folder", folder)
    check_tokenizer(tokenizer)
    target = Path(folder)
    _check_folder(target)
    plain = _plain_copy(model)
    with replaced_files(target, STAGES_FILE, is_stale=is_graph) as new:
        stages = _write_graphs(plain, new, opset)
        if quantize is not None:
            _compare(plain, StageGraphs(new, stages))
            quantize_int8(new, stages)
        stages = [
            make_exit_optional(new, stage) if branch_cost > 0 else stage
            for stage, branch_cost in zip(stages, model.config.exit_branch_costs)
        ]
        for stage in stages:
            onnx.checker.check_model(new / stage.file, full_check=True)
        graphs = StageGraphs(new, stages)
        if quantize is None:
            _compare(plain, graphs)
        (new / CONFIG_FILE).write_text(model.config.to_json_string(use_diff=False))
        _described(model, stages, quantize, opset).write(new)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, new)


def _check_request(model: Any, quantize: str | None, opset: int) -> None:
    if getattr(getattr(model, "config", None), "exit_layers", None) is None:
        raise ValueError(
            f"export_onnx takes a classifier with exits or a cascade, got a {type(model).__name__}. A plain model is "
            "exported with torch.onnx.export(model, ..., dynamo=True)."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            "the model is quantised already, in torch's way, which ONNX does not have. Export the float model, with "
            "quantize='int8' if you like."
        )
    if quantize is not None and (not isinstance(quantize, str) or quantize not in QUANTIZATIONS):
        raise ValueError(f"quantize must be None or one of {', '.join(map(repr, QUANTIZATIONS))}, got {quantize!r}.")
    if isinstance(opset, bool) or not isinstance(opset, int) or opset < OLDEST_OPSET:
        raise ValueError(f"opset must be a whole number of at least {OLDEST_OPSET}, got {opset!r}: use opset={OPSET}.")


def _check_folder(folder: Path) -> None:
    """Raises `ValueError` for a folder that is another model's."""
    if (folder / CONFIG_FILE).exists() and not (folder / STAGES_FILE).exists():
        raise ValueError(
            f"{folder} holds another model ({CONFIG_FILE}, but no {STAGES_FILE}), whose configuration would be lost. "
            "Give a folder of its own."
        )


def _plain_copy(model: Any) -> Any:
    """A copy that says what the graphs are to say: in float32, without what is applied to their outputs later."""
    plain = copy.deepcopy(model).cpu().float().eval()
    plain.config.exit_temperatures = None
    plain.config.exit_thresholds = None
    for head in getattr(plain, "exits", []):
        if head.certainty is not None:
            head.certainty.train()  # not yet stretched to its range
    return plain


@torch.no_grad()
def _write_graphs(model: Any, folder: Path, opset: int) -> list[Stage]:
    stages = []
    tensors = _batch(model, *_EXAMPLE_SHAPE)
    for index, module in enumerate(stage_modules(model)):
        given = {name: tensors[name] for name in module.inputs}
        # Before it is traced: what it hands on is the next one's example.
        outputs = dict(zip(module.outputs, module(given)))
        stages.append(Stage(graph_file(index), module.inputs, module.outputs))
        _write_graph(module, given, folder / graph_file(index), opset)
        if NEXT_STATE in outputs:
            tensors[STATE] = outputs[NEXT_STATE]
    return stages


def _write_graph(module: Any, given: dict[str, torch.Tensor], path: Path, opset: int) -> None:
    free = {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        # Of the exporter to its own developers.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            kwargs={"tensors": given},
            dynamo=True,
            opset_version=opset,
            input_names=module.inputs,
            output_names=module.outputs,
            dynamic_shapes={"tensors": dict.fromkeys(given, free)},
            verbose=False,
        )
    assert program is not None, "with dynamo=True there is a program"
    program.save(str(path))


def _batch(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens; every second row has padding."""
    length = min(length, _longest(model.config))
    generator = torch.Generator().manual_seed(rows)
    limits = model.input_limits
    lengths = torch.where(torch.arange(rows) % 2 == 1, max(1, length // 2), length)
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    tokens = torch.randint(limits["input_ids"], (rows, length), generator=generator)
    segments = torch.randint(limits.get("token_type_ids", 1), (rows, length), generator=generator)
    pad = model.config.pad_token_id or 0
    return {"input_ids": tokens.where(mask == 1, pad), "attention_mask": mask, "token_type_ids": segments}


def _longest(config: Any) -> int:
    """How many tokens a model of this configuration can surely take."""
    if config.model_type == "cascade":
        return min(_longest(member) for member in config.member_configs())
    # RoBERTa counts positions from one past its padding token's number on.
    positions = (getattr(config, "max_position_embeddings", None) or _SHAPES[-1][1] + 2) - 2
    return min(positions, getattr(config, "constant_length", None) or positions)


@torch.no_grad()
def _compare(model: Any, graphs: StageGraphs) -> None:
    """Raises `ValueError` where a graph does not say what the model says."""
    for shape in _SHAPES:
        tensors = _batch(model, *shape)
        known = set(graphs.inputs)
        outputs = model(**{name: tensor for name, tensor in tensors.items() if name in known})
        expected = {"logits": outputs.exit_logits, "certainty": outputs.exit_certainty}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        for index in range(len(graphs)):
            found = graphs.run(index, arrays)
            for name in found.keys() & expected.keys():
                _check_close(name, index, found[name], expected[name][:, index].numpy())
            if NEXT_STATE in found:
                arrays[STATE] = found[NEXT_STATE]


def _check_close(name: str, index: int, found: np.ndarray, expected: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE * scale:
        raise ValueError(
            f"the graph of stage {index + 1} does not answer as the model: {name} of {expected.shape} differ by "
            f"{difference:.2g}, more than {TOLERANCE:g} of {scale:.3g}. Nothing was written. If the backbone is a new "
            "one, its code does something that depends on the batch it is traced with."
        )


def _described(model: Any, stages: list[Stage], quantize: str | None, opset: int) -> Stages:
    ranges = [] if model.config.model_type == "cascade" else model.certainty_ranges
    return Stages(
        stages=stages,
        costs=list(model.config.exit_costs),
        branch_costs=list(model.config.exit_branch_costs),
        limits=model.input_limits,
        certainty_ranges=[list(each) for each in ranges] or None,
        quantize=quantize,
        opset=opset,
    )


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    if not (folder / TOKENIZER_FILE).exists():
        raise ValueError(
            f"{type(tokenizer).__name__} writes no {TOKENIZER_FILE}, which is what reads texts without transformers. "
            "Load it with AutoTokenizer.from_pretrained(..., use_fast=True), or leave it out."
        )
