"""Labels are the same to a pass with a loss, an evaluation, a calibration, a trainer, a cascade and PAPA."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

import hf_adaptive
from hf_adaptive import ExitReport, calibrate_exits, evaluate_exits
from tests import tiny

ROWS = 12
IDS = torch.randint(3, tiny.VOCABULARY, (ROWS, 5), generator=torch.Generator().manual_seed(0))
CLASSES = tiny.labels(ROWS).tolist()
SEVERAL = torch.randint(0, 2, (ROWS, tiny.LABELS), generator=torch.Generator().manual_seed(1)).float().tolist()
NUMBERS = torch.randn(ROWS, generator=torch.Generator().manual_seed(2)).tolist()
QUIETLY = {"show_progress": False}
MULTI = "multi_label_classification"


def cascade(**fields):
    return tiny.cascade(depths=(1, 2), **fields)


def papa(**fields):
    torch.manual_seed(0)
    config = hf_adaptive.PapaBertConfig(**tiny.plain_config(**fields).to_dict(), constant_length=16)
    return hf_adaptive.PapaBertForSequenceClassification(config).eval()


def examples(labels, column="label"):
    return [{"input_ids": ids, column: label} for ids, label in zip(IDS.tolist(), labels)]


def loss(model, labels):
    return model(input_ids=IDS, labels=torch.tensor(labels)).loss.item()


def accuracies(model, labels):
    return evaluate_exits(model, examples(labels), timed_examples=0, **QUIETLY).accuracy


def chosen(model, labels):
    wish = {"max_accuracy_drop": 0.1, "temperatures": False}
    return calibrate_exits(model, examples(labels), **wish, **QUIETLY).choice.measured


def in_training(model, labels):
    return loss(model.train(), labels)


DOORS = {
    "forward": (tiny.model, loss),
    "training": (tiny.without_dropout, in_training),
    "evaluation": (tiny.model, accuracies),
    "calibration": (tiny.model, chosen),
    "cascade": (cascade, loss),
    "cascade in evaluation": (cascade, accuracies),
    "cascade in calibration": (cascade, chosen),
    "papa": (papa, loss),
}
SECOND_ROW_IS = {
    "above": ([1, 3] + [0] * 10, {}, r"between 0 and 2 \(num_labels=3.*got \[3\] \(first in row 1\)"),
    "below": ([1, -1] + [0] * 10, {}, r"got \[-1\] \(first in row 1\)"),
    "far above": ([1, 2**40] + [0] * 10, {}, r"got \[1099511627776\]"),
    "half": (
        [1.0, 0.5] + [0.0] * 10,
        {},
        r"shape \(12, 3\).*got \(12,\).*whole numbers, but there is \[0.5\] .*row 1",
    ),
    "no number": ([1.0, np.nan] + [0.0] * 10, {}, r"whole numbers, but there is \[nan\] \(first in row 1\)"),
    "a set": ([[0, 1, 1], [1, 0, 0]] * 6, {}, r"one entry a row \(12\), got shape \(12, 3\)"),
    "2 of several": ([[0.0, 1, 1], [2.0, 0, 0]] * 6, {}, r"between 0 and 1.*got \[2.0\] \(first in row 1\)"),
    "not all -100": ([[0.0, 1, 1], [-100.0, 0, 0]] * 6, {}, r"between 0 and 1.*got \[-100.0\]"),
    "several as integers": ([[0, 1, 1]] * 12, {"problem_type": MULTI}, "must be floats for multi.*int64"),
    "two of three": ([[0.0, 1.0]] * 12, {}, r"must have shape \(12, 3\).*got \(12, 2\)"),
    "infinite": ([0.5, np.inf] + [0.0] * 10, {"num_labels": 1}, r"finite numbers.*got \[inf\] \(first in row 1\)"),
    "whole number": ([1, 2] * 6, {"num_labels": 1}, "must be floats for regression"),
}


@pytest.mark.parametrize("label", SECOND_ROW_IS)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_label_is_named(door, label):
    (make, enter), (labels, fields, says) = DOORS[door], SECOND_ROW_IS[label]
    with pytest.raises(ValueError, match=says) as error:
        enter(make(**fields), labels)
    assert "labels" in str(error.value)


ONLY_IN_DATA = {
    "missing": (None, r"labels must be numbers, got None in row 1"),
    "a name": ("positive", r"labels must be numbers, got 'positive' in row 1.*label2id"),
    "ragged": ([1, [2]], r"labels must be numbers, got \[1, \[2\]\] in row 1"),
    "a pair": ([1, 2], r"same shape in every row, got \(\) in row 0 and \(2,\) in row 1"),
    "beyond int64": (2**70, "labels must be numbers, got 1180591620717411303424 in row 1"),
}


@pytest.mark.parametrize("enter", [accuracies, chosen])
@pytest.mark.parametrize("label", ONLY_IN_DATA)
def test_what_is_no_label_in_a_data_set_is_named(label, enter):
    wrong, says = ONLY_IN_DATA[label]
    with pytest.raises(ValueError, match=says):
        enter(tiny.model(), [CLASSES[0], wrong, *CLASSES[2:]])


def test_a_row_without_the_column_is_named():
    rows = [*examples(CLASSES)[:3], {"input_ids": [4, 5]}]
    with pytest.raises(ValueError, match=r"examples\[3\] has no 'label'"):
        evaluate_exits(tiny.model(), rows, **QUIETLY)
    with pytest.raises(ValueError, match="have no labels: expected a column labels or label or label_ids"):
        evaluate_exits(tiny.model(), rows[3:], **QUIETLY)


ALIKE = {
    "columns of one": (CLASSES, [[label] for label in CLASSES], {}),
    "truth values": ([label > 0 for label in CLASSES], [int(label > 0) for label in CLASSES], {}),
    "one number of a list": (NUMBERS, [[number] for number in NUMBERS], {"num_labels": 1}),
}


# A number is not right or wrong, so that nothing is calibrated on it.
@pytest.mark.parametrize(
    ("door", "case"),
    [(d, c) for d in DOORS for c in ALIKE if not ("calibration" in d and "number" in c)],
)
def test_labels_of_another_form_are_the_same(door, case):
    (make, enter), (first, second, fields) = DOORS[door], ALIKE[case]
    assert enter(make(**fields), first) == enter(make(**fields), second)


@pytest.mark.parametrize("door", DOORS)
def test_floats_say_that_there_are_several_labels(door):
    """As in the stock classifiers, where the configuration does not say: the answer is a set, all of which counts."""
    make, enter = DOORS[door]
    open_, declared = make(), make(problem_type=MULTI)
    assert enter(open_, SEVERAL) == enter(declared, SEVERAL)
    assert open_.config.problem_type == MULTI


@pytest.mark.parametrize("column", ["label", "labels", "label_ids"])
def test_columns(column):
    rows = examples(CLASSES, column)
    expected = accuracies(tiny.model(), CLASSES)
    holders = [rows, Dataset.from_list(rows), {name: [row[name] for row in rows] for name in rows[0]}]
    for holder in [*holders, Dataset.from_list(rows).with_format("torch")]:
        assert evaluate_exits(tiny.model(), holder, timed_examples=2, **QUIETLY).accuracy == expected


@pytest.mark.parametrize(("labels", "none"), [(CLASSES, -100), (SEVERAL, [-100.0] * tiny.LABELS)])
@pytest.mark.parametrize("door", ["forward", "training", "cascade", "papa"])
def test_a_row_without_a_label_is_left_out_of_the_loss(door, labels, none):
    make, enter = DOORS[door]
    model = make()
    marked = [none if row % 3 == 0 else label for row, label in enumerate(labels)]
    kept = [row for row in range(ROWS) if row % 3]
    expected = model.train(door == "training")(input_ids=IDS[kept], labels=torch.tensor([labels[row] for row in kept]))
    assert enter(model, marked) == pytest.approx(expected.loss.item())


@pytest.mark.parametrize(("labels", "none"), [(CLASSES, -100), (SEVERAL, [-100.0] * tiny.LABELS)])
@tiny.on_few_rows
def test_a_row_without_a_label_is_left_out_of_reports_and_counted(labels, none, tmp_path):
    model = tiny.model()
    marked = [none if row % 3 == 0 else label for row, label in enumerate(labels)]
    kept = [row for row in range(ROWS) if row % 3]
    report, expected = (
        evaluate_exits(model, rows, timed_examples=0, **QUIETLY)
        for rows in (examples(marked), [examples(labels)[row] for row in kept])
    )
    assert report.num_unlabelled == 4
    assert expected.num_unlabelled == 0
    assert report.num_examples == 8
    assert report.accuracy == expected.accuracy
    assert report.curve == expected.curve
    assert "4 examples without a label" in str(report)
    report.to_json(tmp_path / "report.json")
    assert ExitReport.from_json(tmp_path / "report.json") == report
    values = json.loads((tmp_path / "report.json").read_text())
    del values["num_unlabelled"]
    assert ExitReport.from_dict(values).num_unlabelled == 0  # of an earlier version

    wish = {"max_accuracy_drop": 0.2}
    found = calibrate_exits(tiny.model(), examples(marked), **wish, **QUIETLY)
    of_kept = calibrate_exits(tiny.model(), [examples(labels)[row] for row in kept], **wish, **QUIETLY)
    assert (found.num_unlabelled, found.num_examples) == (4, 8)
    assert found.choice.measured == of_kept.choice.measured
    for own, of_kept_alone in zip(found.temperatures, of_kept.temperatures, strict=True):
        assert dataclasses.asdict(own) == pytest.approx(dataclasses.asdict(of_kept_alone), rel=1e-6)
    assert found.to_dict()["num_unlabelled"] == 4


def test_no_promise_without_labels():
    for enter in (accuracies, chosen):
        with pytest.raises(ValueError, match="no example has a label"):
            enter(tiny.model(), [-100] * ROWS)


def test_minus_100_is_a_number_like_another():
    report = evaluate_exits(tiny.model(num_labels=1), examples([-100.0, *NUMBERS[1:]]), timed_examples=0, **QUIETLY)
    assert report.num_unlabelled == 0


def test_a_trainers_own_scores(tmp_path):
    marked = [-100 if row % 3 == 0 else label for row, label in enumerate(CLASSES)]
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = hf_adaptive.ExitsTrainer(tiny.model(), arguments, eval_dataset=Dataset.from_list(examples(marked)))
    scores = trainer.evaluate()
    found = [scores["eval_layer_1_accuracy"], scores["eval_layer_2_accuracy"], scores["eval_accuracy"]]
    assert found == pytest.approx(accuracies(tiny.model(), marked))


def test_probabilities_train_and_count_as_the_likelier_answer():
    soft = [[0.9 if one else 0.2 for one in row] for row in SEVERAL]
    model = tiny.model(problem_type=MULTI)
    assert accuracies(model, soft) == accuracies(model, SEVERAL)
    assert loss(model, soft) != loss(model, SEVERAL)
    # As likely as not is no.
    assert accuracies(model, [[0.51 if one else 0.5 for one in row] for row in SEVERAL]) == accuracies(model, SEVERAL)


def test_labels_of_tokens():
    torch.manual_seed(0)
    config = hf_adaptive.PapaBertConfig(**tiny.plain_config().to_dict(), constant_length=16)
    model = hf_adaptive.PapaBertForTokenClassification(config).eval()
    labels = torch.randint(0, 3, IDS.shape)
    expected = model(input_ids=IDS, labels=labels).loss
    torch.testing.assert_close(model(input_ids=IDS, labels=labels.to(torch.int32)).loss, expected)
    for wrong, says in [
        (labels.float(), r"whole numbers of shape \(12, 5\).*float32"),
        (labels[:, 1:], r"got torch.int64 of \(12, 4\)"),
        (labels.tolist(), r"one a token, got \[\["),
        (labels - 1, r"between 0 and 2.*got \[-1\]"),
    ]:
        with pytest.raises(ValueError, match=says):
            model(input_ids=IDS, labels=wrong)


@pytest.mark.parametrize(("labels", "fields"), [([0] * ROWS, {}), ([[0.0] * 3] * ROWS, {"problem_type": MULTI})])
@tiny.on_few_rows
@tiny.on_rows_used_before
def test_an_exit_that_gives_nan_is_wrong(labels, fields):
    """NaN is not class 0, nor is it "none of the labels"."""
    model = tiny.model(**fields)
    model.exits[0].classifier.weight.data.fill_(torch.nan)
    model.exits[2].classifier.weight.data.fill_(torch.nan)
    found = evaluate_exits(model, examples(labels), timed_examples=0, **QUIETLY)
    expected = evaluate_exits(tiny.model(**fields), examples(labels), timed_examples=0, **QUIETLY)
    assert found.accuracy == [0.0, expected.accuracy[1], 0.0]
    report = calibrate_exits(model, examples(labels), target_cost=1, temperatures=False, **QUIETLY)
    assert report.choice.measured.accuracy <= expected.accuracy[1]


def test_a_metric_of_ones_own_knows_the_answer_of_an_exit_that_gives_nan():
    seen = []

    def metric(predictions, references):
        seen.append(set(predictions.tolist()))
        return float((predictions == references).mean())

    model = tiny.model()
    model.exits[0].classifier.weight.data.fill_(torch.nan)
    report = evaluate_exits(model, examples(CLASSES), metric, thresholds=[], timed_examples=0, **QUIETLY)
    assert report.accuracy[0] == 0
    assert set().union(*seen) <= {0, 1, 2}
