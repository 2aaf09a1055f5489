"""What each exit is worth: the report, its files, and bad calls."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification

from hf_adaptive import ExitReport, evaluate_exits
from hf_adaptive.evaluation import CurvePoint
from hf_adaptive.evaluation.plain import plain_logits
from hf_adaptive.evaluation.report import spread_by_cost
from tests import tiny

LENGTHS = [3, 9, 5, 12, 7, 4, 8, 6, 10, 2, 11, 5]


def dataset(labels=None):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    labels = tiny.labels(len(rows)).tolist() if labels is None else labels
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], "label": labels})


@pytest.fixture(scope="module")
def model():
    return tiny.model("roberta")


@pytest.fixture(scope="module")
def report(model):
    return evaluate_exits(model, dataset(), batch_size=4, show_progress=False)


def run_alone(model, **arguments):
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row]), **arguments) for row in dataset()["input_ids"]]


def test_accuracy_of_every_exit(model, report):
    labels = np.array(dataset()["label"])
    for layer, cost, accuracy in zip(report.exit_layers, report.costs, report.accuracy):
        answers = np.array([out.logits.argmax().item() for out in run_alone(model, exit_at=layer)])
        assert accuracy == pytest.approx((answers == labels).mean())
        assert cost == layer / tiny.LAYERS


def test_every_point_of_the_curve_is_a_real_early_exit_run(model, report):
    labels = np.array(dataset()["label"])
    costs = set()
    for point in report.curve[::5]:
        outputs = run_alone(model, exit_thresholds=point.threshold)
        answers = np.array([out.logits.argmax().item() for out in outputs])
        taken = np.array([out.exit_index.item() for out in outputs])
        assert point.accuracy == pytest.approx((answers == labels).mean())
        assert point.cost == pytest.approx(np.array(model.config.exit_costs)[taken].mean())
        assert point.exit_distribution == pytest.approx(np.bincount(taken, minlength=3) / len(taken))
        costs.add(point.cost)
    assert len(costs) > 1


def test_a_few_points_from_the_cheapest_to_the_dearest_are_timed(report):
    timed = [point for point in report.curve if point.seconds is not None]
    costs = {point.cost for point in report.curve}
    assert 1 < len(timed) <= 5
    assert {min(costs), max(costs)} <= {point.cost for point in timed}
    for point in timed:
        least, largest = point.speed_range
        assert 0 < least <= largest
        assert report.speed(point) > 0


def test_the_stored_thresholds_and_a_plain_model_stand_beside_the_curve(tmp_path):
    model = tiny.model("bert", exit_thresholds=[0.4, 0.4])
    torch.manual_seed(0)
    plain = BertForSequenceClassification(model.config.to_plain()).eval()
    report = evaluate_exits(model, dataset(), batch_size=4, show_progress=False, plain=plain)
    with torch.no_grad():
        answers = [plain(torch.tensor([row])).logits.argmax().item() for row in dataset()["input_ids"]]
    assert report.plain.accuracy == np.mean(np.array(answers) == np.array(dataset()["label"]))
    assert report.plain.seconds > 0
    outputs = run_alone(model)
    cost = np.mean([model.config.exit_costs[out.exit_index.item()] for out in outputs])
    assert report.chosen.threshold == [0.4, 0.4]
    assert report.chosen.cost == pytest.approx(cost)
    assert report.chosen.seconds > 0
    last = f"chosen thresholds: accuracy {report.chosen.accuracy:.4f}, cost {report.chosen.cost:.2f}"
    assert str(report).splitlines()[-1] == last
    report.to_json(tmp_path / "report.json")
    assert ExitReport.from_json(tmp_path / "report.json") == report
    report.plot(tmp_path / "exits.svg")
    picture = (tmp_path / "exits.svg").read_text()
    for words in (
        "What leaving early costs in accuracy",
        "model without exits",
        "one threshold for all exits (confid",
    ):
        assert words in picture


@torch.no_grad()
def test_scores_of_a_plain_model_come_in_the_order_of_the_examples():
    plain, rows = tiny.plain_model(), dataset()
    alone = torch.cat([plain(torch.tensor([row])).logits for row in rows["input_ids"]])
    torch.testing.assert_close(plain_logits(plain, rows, batch_size=4), alone, atol=1e-5, rtol=1e-5)


def test_speed_is_how_many_times_as_fast_as_everything(report):
    point = dataclasses.replace(report.curve[0], seconds=1.5)
    assert dataclasses.replace(report, full_seconds=3.0).speed(point) == 2.0


def test_of_points_of_one_cost_the_first_is_timed():
    points = [CurvePoint(threshold, cost, 0.5, [1.0]) for threshold, cost in ((0.1, 0.2), (0.2, 0.2), (0.3, 0.6))]
    assert spread_by_cost(points, 5) == [points[0], points[2]]


def test_intervals_of_an_accuracy_hold_it_and_narrow_with_the_examples(report):
    low, high = report.interval(0.75)
    assert 0 < low < 0.75 < high < 1
    wider = dataclasses.replace(report, num_examples=4 * report.num_examples).interval(0.75)
    assert low < wider[0] < wider[1] < high
    assert dataclasses.replace(report, metric_name="f1").interval(0.75) is None


@pytest.mark.parametrize("accuracy", [0.0, 0.25, 0.75, 1.0])
def test_ends_of_an_interval_are_where_the_accuracy_lies_1_96_standard_errors_away(report, accuracy):
    """Wilson's: the standard error is that at the end, not at the accuracy seen."""
    for end in report.interval(accuracy):
        allowed = 1.959964**2 * end * (1 - end) / report.num_examples
        assert (accuracy - end) ** 2 == pytest.approx(allowed, abs=1e-12)
    assert dataclasses.replace(report, num_examples=100).interval(0.5) == pytest.approx((0.403832, 0.596168), abs=1e-6)


def test_a_plain_model_in_training_mode_is_refused(model):
    plain = BertForSequenceClassification(tiny.model("bert").config.to_plain()).train()
    with pytest.raises(ValueError, match=r"call plain.eval\(\) first"):
        evaluate_exits(model, dataset(), timed_examples=0, show_progress=False, plain=plain)


def test_files(report, tmp_path):
    report.to_json(tmp_path / "new" / "report.json")
    assert ExitReport.from_json(tmp_path / "new" / "report.json") == report
    assert json.loads((tmp_path / "new" / "report.json").read_text())["metric_name"] == "accuracy"
    report.plot(tmp_path / "exits.png")
    assert (tmp_path / "exits.png").read_bytes().startswith(b"\x89PNG")
    report.plot(tmp_path / "exits.svg")
    assert "<svg" in (tmp_path / "exits.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exits.png", "exits.svg", "new"]


def test_a_metric_of_the_users(model):
    def macro(predictions, references):
        return {"macro_recall": np.mean([(predictions[references == c] == c).mean() for c in set(references)])}

    own = evaluate_exits(model, dataset(), metric=macro, thresholds=[0.5], timed_examples=0, show_progress=False)
    assert own.metric_name == "macro"
    assert own.full_seconds is None
    assert len(own.curve) == 1


def test_regression_has_exits_but_no_curve_by_confidence():
    model = tiny.model("bert", num_labels=1)
    numbers = evaluate_exits(model, dataset(labels=[i / 3 for i in range(12)]), timed_examples=4, show_progress=False)
    assert numbers.metric_name == "pearson"
    assert numbers.curve == []
    assert all(-1 <= score <= 1 for score in numbers.accuracy)


def test_several_labels_at_once():
    model = tiny.model("bert", problem_type="multi_label_classification")
    labels = torch.randint(0, 2, (12, tiny.LABELS), generator=torch.Generator().manual_seed(0)).float().tolist()
    report = evaluate_exits(model, dataset(labels=labels), timed_examples=0, show_progress=False)
    assert len(report.curve) == 21
    assert len(report.accuracy) == len(tiny.EXIT_LAYERS)


def test_the_mode_of_the_model_is_left_as_it_was(model):
    evaluate_exits(model.train(), dataset(), timed_examples=0, show_progress=False)
    assert model.training
    model.eval()


def test_point_at_cost(report):
    cheapest = min(point.cost for point in report.curve)
    best = report.point_at_cost(0.6)
    assert best.cost <= 0.6
    assert best.accuracy == max(point.accuracy for point in report.curve if point.cost <= 0.6)
    assert report.point_at_cost(cheapest / 2) is None


def test_the_cheaper_of_two_points_alike_and_one_of_just_this_cost(report):
    points = [CurvePoint(cost, cost, accuracy, [1.0]) for cost, accuracy in ((0.2, 0.7), (0.3, 0.9), (0.5, 0.9))]
    own = dataclasses.replace(report, curve=points)
    assert own.point_at_cost(0.6) is points[1]
    assert own.point_at_cost(0.3) is points[1]
    assert own.point_at_cost(0.29) is points[0]


def test_bad_calls(model):
    with pytest.raises(ValueError, match="empty"):
        evaluate_exits(model, dataset().select([]))
    with pytest.raises(ValueError, match="no labels"):
        evaluate_exits(model, dataset().remove_columns("label"))
