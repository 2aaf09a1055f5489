"""What only an exit needs of its stage is run where the exit is asked: the `If` of a graph, after it was exported."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .folder import IS_ASKED, NEXT_STATE, Stage
from .onnx_graphs import needed


def make_exit_optional(folder: Path, stage: Stage) -> Stage:
    """Gives a graph the input `is_asked`: where it is false, only the next state is computed.

    A branch is layers that the trunk does not need. (A session runs its whole graph, whatever outputs are fetched.)

    Args:
        folder (`Path`): Where the graph is; it is replaced.
        stage (`Stage`): What it is.

    Returns:
        `Stage`: What it is then. What the exit says has no rows where it was not asked.
    """
    onnx = needed("onnx")
    path = folder / stage.file
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    trunk, own = _parted(graph.node, NEXT_STATE)
    answers = [output for output in graph.output if output.name != NEXT_STATE]
    choice = onnx.helper.make_node(
        "If",
        [IS_ASKED],
        [answer.name for answer in answers],
        then_branch=_asked(onnx, own, answers),
        else_branch=_not_asked(onnx, answers),
    )
    del graph.node[:]
    graph.node.extend([*trunk, choice])
    # Of values that are now the choice's own.
    kept = {name for node in trunk for name in node.output}
    shapes = [each for each in graph.value_info if each.name in kept]
    del graph.value_info[:]
    graph.value_info.extend(shapes)
    graph.input.append(onnx.helper.make_tensor_value_info(IS_ASKED, onnx.TensorProto.BOOL, []))
    onnx.save(model, path)
    return replace(stage, inputs=[*stage.inputs, IS_ASKED])


def _parted(nodes: Iterable[Any], output: str) -> tuple[list[Any], list[Any]]:
    """The nodes that an output needs, and the others, in their order."""
    wanted, needs, others = {output}, [], []
    for node in reversed(list(nodes)):
        if wanted.isdisjoint(node.output):
            others.append(node)
        else:
            needs.append(node)
            wanted.update(node.input)
    return needs[::-1], others[::-1]


def _asked(onnx: Any, nodes: Sequence[Any], answers: Sequence[Any]) -> Any:
    """The exit's own nodes; weights and what the trunk computes are seen from inside."""
    inner = {answer.name: f"{answer.name}_if_asked" for answer in answers}
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [inner.get(name, name) for name in names]
    return onnx.helper.make_graph(
        nodes, "asked", [], [_renamed(onnx, answer, inner[answer.name]) for answer in answers]
    )


def _not_asked(onnx: Any, answers: Sequence[Any]) -> Any:
    """Answers to no rows."""
    nodes, outputs = [], []
    for answer in answers:
        name, kind = f"{answer.name}_if_not", answer.type.tensor_type
        shape = [0, *(size.dim_value for size in kind.shape.dim[1:])]
        nodes.append(
            onnx.helper.make_node("Constant", [], [name], value=onnx.helper.make_tensor("", kind.elem_type, shape, []))
        )
        outputs.append(onnx.helper.make_tensor_value_info(name, kind.elem_type, shape))
    return onnx.helper.make_graph(nodes, "not_asked", [], outputs)


def _renamed(onnx: Any, value: Any, name: str) -> Any:
    copied = onnx.ValueInfoProto()
    copied.CopyFrom(value)
    copied.name = name
    return copied
