"""Models as graphs: exported, traced, compiled. They answer as the model does, or are refused."""

import pytest
import torch

from tests import tiny
from tests.modeling import architectures

BATCH, LENGTH = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=40)
# One shared module; a list of layers that return tensors; a convolution between them, and tuples; pooling at the end.
KINDS = ("albert", "bert", "deberta-v2", "gpt2")


class Fixed(torch.nn.Module):
    """A model with some arguments given."""

    def __init__(self, model, **arguments):
        super().__init__()
        self.model = model
        self.arguments = arguments

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask, **self.arguments).to_tuple()


def batch(rows: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(3, 20, (rows, length), generator=generator), "attention_mask": mask}


def export(model, **fixed):
    shapes = {**{name: {0: BATCH, 1: LENGTH} for name in batch()}, **dict.fromkeys(fixed)}
    return torch.export.export(model, (), kwargs={**batch(), **fixed}, dynamic_shapes=shapes, strict=False).module()


def small():
    return architectures.model("bert", num_hidden_layers=2, exit_layers=[1, 2])


def cascade(depths=(1, 2)):
    return tiny.cascade(depths=depths)


def assert_same(got, expected) -> None:
    torch.testing.assert_close(got["exit_logits"], expected.exit_logits, equal_nan=True)
    torch.testing.assert_close(got["logits"], expected.logits)
    assert torch.equal(got["exit_index"], expected.exit_index)


@pytest.mark.parametrize("name", KINDS)
def test_an_exported_exit_takes_any_batch_and_runs_its_layers_only(name):
    model = architectures.model(name)
    runs = []
    layers = model.get_submodule(f"{model.base_model_prefix}.{model.architecture.layers}")
    for layer in layers.children():
        layer.register_forward_hook(lambda *_: runs.append(1))
    exported = export(model, exit_at=2)
    assert len(runs) == 2
    other = batch(5, 14)
    assert_same(exported(**other, exit_at=2), model(**other, exit_at=2))


@pytest.mark.parametrize("make", [small, cascade])
def test_exported_exits_take_any_batch(make):
    model, other = make(), batch(5, 14)
    assert_same(export(model)(**other), model(**other))


def test_an_exported_member_takes_any_batch():
    model, other = cascade((1, 2, 3)), batch(5, 14)
    assert_same(export(model, exit_at=2)(**other, exit_at=2), model(**other, exit_at=2))


def traced(model, **fixed):
    return torch.jit.trace(Fixed(model, **fixed), tuple(batch().values()))


def test_a_traced_exit_takes_any_batch():
    model, other = architectures.model("bert"), batch(5, 14)
    logits, exit_logits, exit_index = traced(model, exit_at=2)(*other.values())
    assert_same({"logits": logits, "exit_logits": exit_logits, "exit_index": exit_index}, model(**other, exit_at=2))


@pytest.mark.parametrize("make", [small, cascade])
@pytest.mark.parametrize("as_graph", [traced, export])
def test_rows_that_leave_on_their_own_are_no_graph(make, as_graph):
    model = make()
    model.config.exit_thresholds = [0.5]
    with pytest.raises(ValueError, match=r"exit_at=.*exit_thresholds = None"):
        as_graph(model)


def test_compiled_as_one_graph_where_nothing_leaves():
    model = small()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for exit_at in (None, 1):
        assert_same(compiled(**batch(), exit_at=exit_at), model(**batch(), exit_at=exit_at))


# Inputs share their axes, of which the exporter says that one name is enough.
@pytest.mark.filterwarnings("ignore:# The axis name")
def test_an_onnx_graph_of_one_exit(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = architectures.model("bert", num_hidden_layers=3, exit_layers=[1, 2, 3])
    shapes = {name: {0: "batch", 1: "length"} for name in batch()}
    path = tmp_path / "exit.onnx"
    torch.onnx.export(
        Fixed(model, exit_at=2).eval(), (), path, kwargs=batch(), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    session = onnxruntime.InferenceSession(path)
    other = batch(5, 14)
    logits, _, exit_index = session.run(None, {name: tensor.numpy() for name, tensor in other.items()})
    torch.testing.assert_close(torch.tensor(logits), model(**other, exit_at=2).logits, atol=1e-4, rtol=1e-4)
    assert set(exit_index) == {1}
