"""A changed model, calibrated against the one that it was made from."""

import copy
import json

import numpy as np
import pytest
import torch

from hf_adaptive import ExitCalibrator, OnnxClassifierWithExits, calibrate_exits, export_onnx
from hf_adaptive.calibration import reference as references
from tests import tiny

ROWS = 400


@pytest.fixture(scope="module")
def own():
    return tiny.model("bert", num_hidden_layers=2, exit_layers=[1, 2])


@pytest.fixture(scope="module")
def data(own):
    """Labels are mostly what the last exit says."""
    inputs = tiny.batch(ROWS, 9, seed=5)
    with torch.no_grad():
        labels = own(**inputs).logits.argmax(-1)
    labels[::7] = (labels[::7] + 1) % 3
    rows = [tiny.row(inputs, index) for index in range(ROWS)]
    return [
        {**{key: values[0].tolist() for key, values in row.items()}, "label": int(label)}
        for row, label in zip(rows, labels)
    ]


def changed(own, size):
    """A copy with noise on its weights, as quantisation has."""
    other = copy.deepcopy(own)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.base_model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


@tiny.on_few_rows
def test_the_bound_is_measured_against_the_reference_s_last_exit(own, data):
    other = changed(own, 0.02)
    calibrator = ExitCalibrator(other, data, show_progress=False, reference=own)
    report = calibrator.calibrate(max_disagreement=0.3, confidence=0.9)
    tested = report.choice.guarantee.num_testing
    taken = other.predict(data, exit_thresholds=report.thresholds or [None], show_progress=False)
    calibrator.store(report)
    stored = other.predict(data, show_progress=False)
    trusted = own.predict(data, exit_thresholds=[None], show_progress=False)
    assert tested < ROWS
    assert report.found
    assert (stored.logits.argmax(-1) != trusted.logits.argmax(-1)).float().mean() <= 0.3
    assert len(taken.logits) == ROWS
    drop = ExitCalibrator(other, data, show_progress=False, reference=own).calibrate(max_accuracy_drop=0.2)
    labels = torch.tensor([row["label"] for row in data])
    measured = drop.choice.measured
    last = (trusted.logits.argmax(-1) == labels).double().mean().item()
    assert measured.accuracy + measured.accuracy_drop == pytest.approx(last)


@tiny.on_few_rows
def test_a_model_that_lost_too_much_by_the_change_alone_says_how_much(own, data):
    other = changed(own, 0.5)
    for confidence in (None, 0.9):
        report = calibrate_exits(
            other, data, max_accuracy_drop=0.02, confidence=confidence, reference=own, show_progress=False
        )
        assert not report.found
        assert other.config.exit_thresholds is None
        assert f"with all layers run, has lost {report.choice.measured.accuracy_drop:.4f} of accuracy" in str(report)
        assert report.choice.measured.accuracy_drop > 0.02
    report = calibrate_exits(other, data, max_disagreement=0.02, reference=own, show_progress=False)
    assert f"has lost {report.choice.measured.disagreement:.2%} other answers" in str(report)


@tiny.on_few_rows
def test_the_model_as_its_own_reference_changes_nothing(own, data):
    plain, same = (
        ExitCalibrator(own, data, show_progress=False, reference=reference).calibrate(max_accuracy_drop=0.05)
        for reference in (None, own)
    )
    assert plain.thresholds == same.thresholds
    assert plain.choice.measured == same.choice.measured


def test_references_that_cannot_be_compared_are_refused(own, data):
    def calibrate(reference):
        ExitCalibrator(own, data, show_progress=False, reference=reference)

    with pytest.raises(ValueError, match=r"reference must be a classifier with exits .* got a BertForSequence"):
        calibrate(tiny.plain_model())
    with pytest.raises(ValueError, match="must have the same labels, but id2label is"):
        calibrate(tiny.model("bert", num_labels=2))
    with pytest.raises(ValueError, match="made for one tokenizer, but vocab_size is 64 and 60"):
        calibrate(tiny.model("bert", vocab_size=60))
    with pytest.raises(ValueError, match="made for one tokenizer, but pad_token_id is 1 and 0"):
        calibrate(tiny.model("bert", pad_token_id=0))


@tiny.on_few_rows
def test_an_exported_model_is_calibrated_against_the_float_one(own, data, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export_onnx(own, tmp_path, quantize="int8")
    onnx = OnnxClassifierWithExits.from_pretrained(tmp_path, threads=1)
    report = calibrate_exits(onnx, data, max_disagreement=0.3, confidence=0.9, reference=own, show_progress=False)
    assert report.found
    assert onnx.config.exit_thresholds == report.thresholds
    assert onnx.config.exit_temperatures == [fit.temperature for fit in report.temperatures]
    trusted = own.predict(data, exit_thresholds=[None], show_progress=False).logits.argmax(-1).numpy()
    answers = onnx.predict(data)
    assert len(set(answers.exit_index.tolist())) == 2
    assert np.mean(answers.logits.argmax(-1) != trusted) <= 0.3
    onnx.save_pretrained(tmp_path)
    again = OnnxClassifierWithExits.from_pretrained(tmp_path, threads=1)
    assert again.config.exit_calibration["wish"] == {"name": "max_disagreement", "bound": 0.3}
    assert np.array_equal(again.predict(data).exit_index, answers.exit_index)
    assert json.loads((tmp_path / "config.json").read_text())["exit_thresholds"] == report.thresholds


def test_training_mode_is_given_back(own, data):
    other = copy.deepcopy(own).train()
    references.run_all_exits(other, data[:8], 4, show_progress=False)
    assert other.training
