"""Losses of the three kinds of problem at every exit, and labels that cannot be used."""

import math

import pytest
import torch
from torch.nn import functional

from tests import tiny

ROWS = 6
WEIGHTS = [0.25, 0.0, 3.0]
SINGLE = {"problem_type": "single_label_classification"}
MULTI = {"problem_type": "multi_label_classification"}
REGRESSION = {"problem_type": "regression"}


def multi_labels():
    return torch.randint(0, 2, (ROWS, tiny.LABELS)).float()


CASES = {
    "single": ({}, tiny.labels, functional.cross_entropy),
    "single, declared": (SINGLE, tiny.labels, functional.cross_entropy),
    "multi": ({}, multi_labels, functional.binary_cross_entropy_with_logits),
    "multi, declared": (MULTI, multi_labels, functional.binary_cross_entropy_with_logits),
    "one number": ({"num_labels": 1}, lambda: torch.randn(ROWS), lambda x, y: functional.mse_loss(x[:, 0], y)),
    "one number, column": ({"num_labels": 1}, lambda: torch.randn(ROWS, 1), functional.mse_loss),
    "three numbers": (REGRESSION, lambda: torch.randn(ROWS, tiny.LABELS), functional.mse_loss),
}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("case", CASES)
def test_loss_is_the_weighted_sum_of_the_exits_losses(case, weights):
    fields, make_labels, loss = CASES[case]
    model, labels = tiny.without_dropout(exit_loss_weights=weights, **fields), make_labels()
    for mode in (model.train, model.eval):
        mode()
        outputs = model(**tiny.batch(ROWS), labels=labels)
        each = [loss(outputs.exit_logits[:, index], labels) for index in range(3)]
        expected = sum(weight * exit_loss for weight, exit_loss in zip(weights or [1, 1, 1], each))
        torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("case", CASES)
def test_loss_of_rows_that_left_early_is_that_of_their_answers(case):
    fields, make_labels, loss = CASES[case]
    model, labels = tiny.model(**fields), make_labels()
    outputs = model(**tiny.batch(ROWS), labels=labels, exit_at=2)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
    torch.testing.assert_close(outputs.logits, outputs.exit_logits[:, 1])


def yes(score):
    return 1 / (1 + math.exp(-score))


def cross_entropy(scores, label):
    return math.log(math.fsum(map(math.exp, scores))) - scores[label]


def binary_cross_entropy(scores, labels):
    pairs = zip(map(yes, scores), labels)
    return -math.fsum(label * math.log(p) + (1 - label) * math.log(1 - p) for p, label in pairs) / len(scores)


def squared_error(scores, labels):
    return math.fsum((score - label) ** 2 for score, label in zip(scores, labels)) / len(scores)


def is_right_class(scores, label):
    return scores.index(max(scores)) == label


def are_right_labels(scores, labels):
    return all((score > 0) == (label > 0.5) for score, label in zip(scores, labels))


NONE = [-100.0] * 3
SEVERAL = [[1.0, 0, 0], [0.0, 0, 0], NONE, [1.0, 1, 1], [0.4, 0.9, 0.5], NONE]
NUMBERS = [[0.5, -1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, -1.0]] * 2
BY_HAND = {
    "single": (SINGLE, [2, 0, -100, 1, 1, -100], cross_entropy, is_right_class),
    "multi": (MULTI, SEVERAL, binary_cross_entropy, are_right_labels),
    "three numbers": (REGRESSION, NUMBERS, squared_error, None),
}


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("case", BY_HAND)
def test_loss_by_hand(case):
    fields, labels, loss, _ = BY_HAND[case]
    model = tiny.model(exit_loss_weights=WEIGHTS, **fields)
    outputs = model(**tiny.batch(), labels=torch.tensor(labels))
    rows = [(exits, label) for exits, label in zip(outputs.exit_logits.tolist(), labels) if label not in (-100, NONE)]
    each = [mean(loss(exits[index], label) for exits, label in rows) for index in range(3)]
    expected = math.fsum(weight * own for weight, own in zip(WEIGHTS, each))
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["single", "multi"])
def test_loss_of_learned_units_by_hand(case):
    """The squared distance of a unit's certainty to 1 where its exit is right, and to 0 where it is wrong."""
    fields, labels, loss, is_right = BY_HAND[case]
    model = tiny.without_dropout(exit_criterion="learned", exit_loss_weights=WEIGHTS, **fields).train()
    with torch.no_grad():  # an exit that is right on some rows and wrong on others, also of several labels
        model.exits[2].classifier.weight.zero_()
        model.exits[2].classifier.bias.copy_(torch.tensor([-1.0, 2.0, -0.5]))
    outputs = model(**tiny.batch(), labels=torch.tensor(labels))
    counted = [index for index, label in enumerate(labels) if label not in (-100, NONE)]
    rights, expected = [], 0.0
    for exit_index, weight in enumerate(WEIGHTS):
        own = []
        for row in counted:
            scores = outputs.exit_logits[row, exit_index].tolist()
            rights.append(is_right(scores, labels[row]))
            certainty = outputs.exit_certainty[row, exit_index].item()
            own.append(loss(scores, labels[row]) + (certainty - rights[-1]) ** 2)
        expected += weight * mean(own)
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)
    assert {True, False} == set(rights[-len(counted) :])


def test_loss_of_learned_units_without_any_label_is_nothing():
    model = tiny.without_dropout(exit_criterion="learned", **MULTI).train()
    assert model(**tiny.batch(), labels=torch.full((ROWS, 3), -100.0)).loss.item() == 0


def test_one_row_of_one_number():
    model = tiny.model(num_labels=1)
    outputs = model(**tiny.batch(1), labels=torch.tensor([0.5]))
    expected = ((outputs.exit_logits[0, :, 0] - 0.5) ** 2).sum()
    torch.testing.assert_close(outputs.loss, expected)


def test_label_minus_100_is_left_out():
    model, labels = tiny.model(), tiny.labels()
    inputs = tiny.batch()
    marked = labels.clone()
    marked[3:] = -100
    first_half = model(**{name: tensor[:3] for name, tensor in inputs.items()}, labels=labels[:3]).loss
    torch.testing.assert_close(model(**inputs, labels=marked).loss, first_half)


def test_temperatures_divide_the_logits_before_the_loss():
    cold = tiny.without_dropout(exit_temperatures=[0.5, 1.0, 4.0])
    plain = tiny.without_dropout()
    labels = tiny.labels()
    expected = plain(**tiny.batch()).exit_logits / torch.tensor([0.5, 1.0, 4.0])[:, None]
    outputs = cold(**tiny.batch(), labels=labels)
    torch.testing.assert_close(outputs.exit_logits, expected)
    each = [functional.cross_entropy(expected[:, index], labels) for index in range(3)]
    torch.testing.assert_close(outputs.loss, sum(each))


def test_in_bfloat16_and_float16_the_loss_is_finite_and_trains():
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny.model().to(dtype).train()
        loss = model(**tiny.batch(), labels=tiny.labels()).loss
        loss.backward()
        assert loss.isfinite()
        assert model.exits[0].classifier.weight.grad.abs().sum() > 0


BAD_LABELS = [
    ({}, torch.tensor([0, 1, 2, 3, 0, 1]), r"between 0 and 2 \(num_labels=3.*got \[3\]"),
    ({}, torch.tensor([0, -1, 2, 1, 0, 1]), r"got \[-1\]"),
    (SINGLE, torch.randn(ROWS), "whole numbers.*float32"),
    ({}, torch.tensor([0, 1, 2]), r"one entry a row \(6\).*\(3,\)"),
    ({}, torch.zeros(ROWS, 3).long(), "one entry a row"),
    (SINGLE, torch.zeros(ROWS, 3).long(), "one entry a row"),
    ({}, torch.randn(ROWS), r"shape \(6, 3\)"),
    (MULTI, torch.zeros(ROWS, 3).long(), "must be floats.*int64"),
    (MULTI, torch.zeros(ROWS, 2), r"shape \(6, 3\)"),
    (MULTI, torch.zeros(3, ROWS), r"shape \(6, 3\)"),
    (MULTI, torch.full((ROWS, 3), 2.0), r"between 0 and 1.*got \[2.0\]"),
    (MULTI, torch.full((ROWS, 3), torch.nan), "between 0 and 1.*nan"),
    ({"num_labels": 1}, torch.zeros(ROWS).long(), "must be floats for regression"),
    ({"num_labels": 1}, torch.zeros(ROWS, 2), r"shape \(6, 1\)"),
    (REGRESSION, torch.full((ROWS, 3), torch.inf), "finite"),
]


@pytest.mark.parametrize(("fields", "labels", "says"), BAD_LABELS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_labels_that_cannot_be_used_are_refused(fields, labels, says, mode):
    model = getattr(tiny.model(**fields), mode)()
    with pytest.raises(ValueError, match=says) as error:
        model(**tiny.batch(ROWS), labels=labels)
    assert "labels" in str(error.value)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_unknown_or_unfitting_problem_type(problem):
    model = tiny.model()
    model.config.problem_type = "ranking"
    with pytest.raises(ValueError, match=r"problem_type must be one of .*'ranking'"):
        model(**tiny.batch(ROWS), labels=tiny.labels())
    model.config.problem_type = problem
    with pytest.raises(ValueError, match="floats"):
        model(**tiny.batch(ROWS), labels=tiny.labels())


def test_confidence_means_nothing_for_numbers():
    with pytest.raises(ValueError, match=r"exit_criterion='confidence' means nothing for problem_type='regression'"):
        tiny.model(num_labels=1)(**tiny.batch(), exit_thresholds=0.9)


def test_confidence_of_several_labels_is_that_of_the_least_sure():
    model = tiny.model(problem_type="multi_label_classification")
    inputs = tiny.batch(32)
    probabilities = model(**inputs).exit_logits.sigmoid()
    confidence = torch.maximum(probabilities, 1 - probabilities).amin(dim=-1)[:, :2]
    threshold = confidence.median().item() + 1e-4
    first = (confidence >= threshold).int()
    expected = torch.where(first.any(dim=1), first.argmax(dim=1), 2)
    exits = model(**inputs, exit_thresholds=threshold).exit_index
    assert exits.tolist() == expected.tolist()
    assert len(exits.unique()) > 1
