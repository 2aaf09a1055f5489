"""Weights in 8 bits by torchao: models with exits are quantised, saved and loaded as stock ones are."""

import pytest
import torch
from transformers import TorchAoConfig

from hf_adaptive import AutoModelForSequenceClassificationWithExits, export_onnx
from tests import tiny
from tests.modeling.test_prediction import examples

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")

ROWS = examples([3, 9, 5, 12, 7, 2, 11, 4])
KINDS = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")


@pytest.fixture(params=KINDS)
def kind(request):
    return getattr(quantization, request.param)()


@pytest.fixture
def own():
    return tiny.model("bert", exit_temperatures=[0.5, 2.0, 1.5])


def all_scores(model):
    return model.predict(ROWS, batch_size=3, exit_thresholds=[None, None], show_progress=False).exit_logits


def median_thresholds(model):
    """Far from every row's confidence: half of the rows leave."""
    sure = all_scores(model).softmax(-1).amax(-1)[:, :-1].sort(dim=0).values
    middle = len(ROWS) // 2
    return ((sure[middle - 1] + sure[middle]) / 2).tolist()


def is_quantised(model):
    return "Int8" in type(model.base_model.encoder.layer[0].intermediate.dense.weight).__name__


def assert_same(found, expected):
    assert torch.equal(found.exit_index, expected.exit_index)
    tiny.assert_alike(found.exit_logits, expected.exit_logits)


def check_against_float(model, own):
    """Its scores are near the float model's, and `predict` says what each row alone is told."""
    found, expected = all_scores(model), all_scores(own)
    assert is_quantised(model)
    assert not torch.equal(found, expected)
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.98
    thresholds = median_thresholds(model)
    predicted = model.predict(ROWS, batch_size=3, exit_thresholds=thresholds, show_progress=False)
    assert len(predicted.exit_index.unique()) > 1
    with torch.no_grad():
        alone = [model(torch.tensor([row["input_ids"]]), exit_thresholds=thresholds) for row in ROWS]
    assert predicted.exit_index.tolist() == [one.exit_index.item() for one in alone]
    torch.testing.assert_close(predicted.logits, torch.cat([one.logits for one in alone]), atol=1e-5, rtol=1e-4)


def test_quantised_in_place(own, kind):
    other = tiny.model("bert", exit_temperatures=[0.5, 2.0, 1.5])
    quantization.quantize_(other, kind)
    check_against_float(other, own)


def test_quantised_as_it_is_loaded_and_saved_and_loaded_again(own, kind, tmp_path):
    load = AutoModelForSequenceClassificationWithExits.from_pretrained
    own.save_pretrained(tmp_path / "float")
    other = load(tmp_path / "float", quantization_config=TorchAoConfig(kind)).eval()
    check_against_float(other, own)
    thresholds = median_thresholds(other)
    other.config.exit_thresholds = thresholds
    other.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8").eval()
    assert is_quantised(again)
    assert again.config.exit_thresholds == thresholds
    assert_same(again.predict(ROWS, show_progress=False), other.predict(ROWS, show_progress=False))
    with pytest.raises(ValueError, match="the model is quantised already, in torch's way"):
        export_onnx(again, tmp_path / "onnx")
