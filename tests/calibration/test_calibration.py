"""From held-out data to the thresholds that a model keeps."""

import json
import warnings

import pytest
import torch
from datasets import Dataset

import hf_adaptive
from hf_adaptive import ExitCalibrator, calibrate_exits, evaluate_exits
from hf_adaptive.modeling.exit_profile import exit_shares
from tests import tiny

COUNT = 400


def dataset(seed=0, count=COUNT, labels=True):
    """Random sentences; the class is that of a model's last exit for most, so that exits differ in accuracy."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (count,), generator=generator).tolist()
    rows = [torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    data = Dataset.from_dict({"input_ids": rows})
    if not labels:
        return data
    answers = tiny.model("bert").predict(data, show_progress=False).logits.argmax(dim=-1)
    noise = torch.rand(count, generator=generator) < 0.2
    return data.add_column("label", torch.where(noise, (answers + 1) % 3, answers).tolist())


@pytest.fixture(scope="module")
def data():
    return dataset()


@pytest.fixture(scope="module")
def calibrator(data):
    return ExitCalibrator(tiny.model("bert"), data, show_progress=False)


def measured(model, data):
    """Cost, accuracy and disagreement of a real run with what the configuration says."""
    outputs = model.predict(data, show_progress=False)
    everything = model.predict(data, exit_thresholds=[None, None], show_progress=False)
    answers = outputs.logits.argmax(dim=-1)
    cost = torch.tensor(model.config.exit_costs)[outputs.exit_index].mean().item()
    accuracy = (answers == torch.tensor(data["label"])).float().mean().item()
    return cost, accuracy, (answers != everything.logits.argmax(dim=-1)).float().mean().item()


@pytest.mark.parametrize("per_exit", [False, True])
@pytest.mark.parametrize(
    "wish", [{"target_cost": 0.6}, {"max_accuracy_drop": 0.02}, {"max_disagreement": 0.1}], ids=lambda w: next(iter(w))
)
def test_a_reloaded_model_does_what_the_report_says(calibrator, data, wish, per_exit, tmp_path):
    report = calibrator.calibrate(**wish, per_exit=per_exit)
    calibrator.store(report)
    calibrator.model.save_pretrained(tmp_path)
    model = hf_adaptive.AutoModelForSequenceClassificationWithExits.from_pretrained(tmp_path)
    cost, accuracy, disagreement = measured(model, data)
    promised = report.choice.measured
    assert report.found
    assert cost == pytest.approx(promised.mean_cost, abs=1e-6)
    assert accuracy == pytest.approx(promised.accuracy, abs=1e-6)
    assert disagreement == pytest.approx(promised.disagreement, abs=1e-6)
    assert cost < 1
    if "target_cost" in wish:
        assert cost <= 0.6 + 1e-9
    if "max_accuracy_drop" in wish:
        assert promised.accuracy_drop <= 0.02 + 1e-9
    if "max_disagreement" in wish:
        assert promised.disagreement <= 0.1 + 1e-9


def test_one_pass_over_the_data_for_any_number_of_wishes(data):
    model = tiny.model("bert")
    rows = []
    model.bert.embeddings.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    own = ExitCalibrator(model, data, batch_size=COUNT, show_progress=False)
    for bound in (0.01, 0.05, 0.1):
        own.calibrate(max_disagreement=bound)
    assert sum(rows) == COUNT


def test_temperatures_lower_the_likelihood_loss_and_are_stored(data):
    model = tiny.model("bert", exit_temperatures=[3.0, 1.0, 0.5])
    report = calibrate_exits(model, data, target_cost=0.7, show_progress=False)
    assert model.config.exit_temperatures == [fit.temperature for fit in report.temperatures]
    assert all(fit.nll_after <= fit.nll_before + 1e-9 for fit in report.temperatures)
    # What was configured before plays no part: temperatures are of the bare logits.
    fresh = calibrate_exits(tiny.model("bert"), data, target_cost=0.7, show_progress=False)
    for one, other in zip(report.temperatures, fresh.temperatures):
        assert one.temperature == pytest.approx(other.temperature, rel=1e-4)


def test_temperatures_alone(data):
    model = tiny.model("bert", exit_thresholds=[0.5, 0.5])
    report = calibrate_exits(model, data, show_progress=False)
    assert report.choice is None
    assert model.config.exit_thresholds == [0.5, 0.5]
    assert len(model.config.exit_temperatures) == 3


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "patience", "learned"])
@tiny.on_few_rows
def test_every_criterion(data, criterion, tmp_path):
    model = tiny.model("bert", exit_criterion=criterion)
    report = calibrate_exits(model, data, target_cost=0.8, show_progress=False)
    assert report.found
    cost, accuracy, _ = measured(model, data)
    assert cost == pytest.approx(report.choice.measured.mean_cost, abs=1e-6)
    assert accuracy == pytest.approx(report.choice.measured.accuracy, abs=1e-6)
    assert cost <= 0.8
    model.save_pretrained(tmp_path)
    again = hf_adaptive.AutoModelForSequenceClassificationWithExits.from_pretrained(tmp_path)
    assert measured(again, data) == pytest.approx((cost, accuracy, measured(model, data)[2]))
    if criterion == "patience":
        assert all(float(threshold).is_integer() for threshold in report.thresholds if threshold is not None)
    if criterion == "learned":
        certainty = again.predict(data, exit_thresholds=[None, None], show_progress=False).exit_certainty
        torch.testing.assert_close(certainty.amin(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(certainty.amax(dim=0), torch.ones(3), atol=1e-5, rtol=0)


def test_disagreement_needs_no_labels():
    model = tiny.model("bert")
    data = dataset(labels=False)
    report = calibrate_exits(model, data, max_disagreement=0.1, show_progress=False)
    assert report.found
    assert report.temperatures is None
    assert report.choice.measured.accuracy is None
    with pytest.raises(ValueError, match="needs labels"):
        calibrate_exits(tiny.model("bert"), data, max_accuracy_drop=0.1, show_progress=False)
    with pytest.raises(ValueError, match="temperatures=True needs labels"):
        calibrate_exits(tiny.model("bert"), data, temperatures=True, target_cost=0.5, show_progress=False)


@tiny.on_few_rows
def test_several_labels_at_once():
    model = tiny.model("bert", problem_type="multi_label_classification")
    data = dataset(labels=False, count=60)
    labels = (model.predict(data, show_progress=False).logits > 0).float().tolist()
    report = calibrate_exits(model, data.add_column("labels", labels), max_accuracy_drop=0.3, show_progress=False)
    assert report.choice.measured.accuracy >= 0.7


def test_numbers_by_patience():
    data = dataset(labels=False, count=60)
    model = tiny.model("bert", num_labels=1, exit_criterion="patience", exit_tolerance=0.5)
    report = calibrate_exits(model, data, max_disagreement=0.2, show_progress=False)
    assert report.choice.measured.disagreement <= 0.2
    with pytest.raises(ValueError, match="means nothing for problem_type='regression'"):
        calibrate_exits(tiny.model("bert", num_labels=1), data, max_disagreement=0.2, show_progress=False)


def test_with_confidence_fits_on_one_part_and_tests_on_the_other(calibrator):
    report = calibrator.calibrate(max_disagreement=0.25, confidence=0.9)
    assert report.choice.guarantee.num_testing == pytest.approx(COUNT * 2 / 3, abs=1)
    assert report.temperatures[0].num_examples == COUNT - report.choice.guarantee.num_testing
    assert "confidence 0.9" in str(report) or not report.found


@pytest.mark.parametrize(("criterion", "testing"), [("learned", round(COUNT * 2 / 3)), ("confidence", COUNT)])
def test_what_shapes_the_scores_is_found_on_other_examples_than_the_promise(data, criterion, testing):
    """The range of a learned unit's certainty; a confidence without temperatures is tested on all of them."""
    model = tiny.model("bert", exit_criterion=criterion)
    own = ExitCalibrator(model, data, temperatures=False, show_progress=False)
    assert own.calibrate(max_disagreement=0.25, confidence=0.9).choice.guarantee.num_testing == testing


def test_too_few_examples_for_a_promise_says_how_many(calibrator):
    tested = round(COUNT * 2 / 3)
    with pytest.raises(ValueError, match=rf"needs at least \d+ examples .*, got {tested} of your {COUNT}: the"):
        calibrator.calibrate(max_disagreement=0.005, confidence=0.99)


def test_nothing_found_runs_all_layers_and_says_so(data, caplog):
    model = tiny.model("bert", exit_thresholds=[0.5, 0.5])
    report = calibrate_exits(model, data, target_cost=0.1, show_progress=False)
    assert not report.found
    assert model.config.exit_thresholds is None
    assert "nothing found" in str(report)
    assert model.predict(data.select(range(4)), show_progress=False).exit_index.tolist() == [2] * 4


def test_wishes_that_contradict_each_other(calibrator):
    with pytest.raises(ValueError, match="exactly one"):
        calibrator.calibrate(target_cost=0.5, max_accuracy_drop=0.01)
    with pytest.raises(ValueError, match="below 1"):
        calibrator.calibrate(max_accuracy_drop=3)
    with pytest.raises(ValueError, match="confidence can be given"):
        calibrator.calibrate(target_cost=0.5, confidence=0.9)


def test_the_same_data_for_both_purposes_warns(data):
    model = tiny.model("bert")
    calibrate_exits(model, data, target_cost=0.7, show_progress=False)
    with pytest.warns(UserWarning, match="used for evaluation, but this model used them for calibration") as warned:
        evaluate_exits(model, data, timed_examples=0, show_progress=False)
    model = tiny.model("bert")
    evaluate_exits(model, data, timed_examples=0, show_progress=False)
    with pytest.warns(UserWarning, match="used for calibration, but this model used them for evaluation") as again:
        calibrate_exits(model, data, target_cost=0.7, show_progress=False)
    assert {warning.filename for warning in [*warned, *again]} == {__file__}


def test_other_data_does_not_warn(data):
    model = tiny.model("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calibrate_exits(model, data, target_cost=0.7, show_progress=False)
        evaluate_exits(model, dataset(seed=1), timed_examples=0, show_progress=False)


def test_report_as_json(calibrator, tmp_path):
    report = calibrator.calibrate(max_accuracy_drop=0.02)
    report.to_json(tmp_path / "calibration.json")
    read = json.loads((tmp_path / "calibration.json").read_text())
    assert read["choice"]["wish"] == {"name": "max_accuracy_drop", "bound": 0.02}
    assert read["thresholds"] == report.thresholds
    assert len(read["temperatures"]) == 3


def test_the_model_keeps_what_was_promised_until_its_thresholds_change(data, tmp_path):
    model = tiny.model("bert")
    report = calibrate_exits(model, data, max_disagreement=0.3, confidence=0.9, show_progress=False)
    model.save_pretrained(tmp_path)
    config = hf_adaptive.AutoModelForSequenceClassificationWithExits.from_pretrained(tmp_path).config
    record = config.calibration_in_force
    assert record["wish"] == {"name": "max_disagreement", "bound": 0.3}
    assert record["guarantee"]["confidence"] == 0.9
    assert record["num_examples"] == COUNT
    assert exit_shares(record["profile"]) == pytest.approx(record["measured"]["exit_shares"], abs=0.1)
    assert sum(map(sum, record["profile"])) == COUNT
    assert record["thresholds"] == report.thresholds
    config.exit_thresholds = [0.5, 0.5]
    assert config.calibration_in_force is None


def test_a_record_of_something_else_is_refused():
    with pytest.raises(ValueError, match="exit_calibration must be None or a dict with the keys"):
        tiny.model("bert").config_class(exit_layers=[12], exit_calibration={"wish": "fast"})
