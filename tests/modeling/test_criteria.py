"""Every criterion against values worked out in plain Python, in torch and in numpy; and models that leave by them."""

import math

import numpy as np
import pytest
import torch

from hf_adaptive.modeling.criteria import CRITERIA, Evidence, ThresholdPolicy
from hf_adaptive.modeling.exit_profile import DOUBTS, cells
from tests import tiny

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
THREE = [[0.0, 1.0, -2.0], [3.0, 3.0, 3.0], [-5.0, 0.5, 20.0]]
MAKERS = {"torch": torch.tensor, "numpy": lambda values: np.array(values, dtype=np.float32)}


@pytest.fixture(params=MAKERS)
def make(request):
    """Makes an array of nested lists of one of the two kinds that decide."""
    return MAKERS[request.param]


def evidence(make, rows, problem=SINGLE, **fields):
    """Of rows of one exit's scores, or of several exits' in turn."""
    by_exit = rows if isinstance(rows[0][0], list) else [[row] for row in rows]
    return Evidence(make(by_exit), problem, **fields)


def signals(name, evidence):
    return CRITERIA[name].signal(evidence).tolist()


def probabilities(scores):
    total = math.fsum(map(math.exp, scores))
    return [math.exp(score) / total for score in scores]


def yes(score):
    return 1 / (1 + math.exp(-score))


def entropy(shares):
    return -math.fsum(share * math.log(share) for share in shares if share > 0)


def test_confidence_is_the_largest_probability(make):
    expected = [max(probabilities(scores)) for scores in THREE]
    assert signals("confidence", evidence(make, THREE)) == pytest.approx(expected, rel=1e-6)
    assert expected[1] == pytest.approx(1 / 3)


def test_confidence_of_several_labels_is_that_of_the_least_sure_answer(make):
    expected = [min(max(yes(score), 1 - yes(score)) for score in scores) for scores in THREE]
    assert signals("confidence", evidence(make, THREE, MULTI)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("labels", [2, 3])
def test_entropy_is_divided_by_the_logarithm_of_the_number_of_labels(make, labels):
    rows = [scores[:labels] for scores in THREE]
    expected = [entropy(probabilities(scores)) / math.log(labels) for scores in rows]
    assert signals("entropy", evidence(make, rows)) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert expected[1] == pytest.approx(1)


def test_entropy_of_several_labels_is_that_of_the_least_sure_answer(make):
    expected = [max(entropy([yes(score), 1 - yes(score)]) / math.log(2) for score in scores) for scores in THREE]
    assert signals("entropy", evidence(make, THREE, MULTI)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_patience_counts_the_latest_exits_that_agree(make):
    answers = [[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1], [2, 2, 2]]
    rows = [[[float(label == answer) for label in range(3)] for answer in row] for row in answers]
    assert signals("patience", evidence(make, rows)) == [3, 2, 1, 1, 3]


def test_patience_of_several_labels_asks_for_all_of_them_to_agree(make):
    rows = [
        [[0.5, -1.0], [2.0, -0.1]],
        [[0.5, -1.0], [0.5, 1.0]],
        # 0 is no.
        [[0.0, -1.0], [-3.0, 0.0]],
    ]
    assert signals("patience", evidence(make, rows, MULTI)) == [2, 1, 2]


def test_patience_of_numbers_has_a_tolerance(make):
    rows = [[[1.0], [1.5], [1.75]], [[1.0], [1.75], [1.5]], [[1.0], [1.5], [0.75]]]
    assert signals("patience", evidence(make, rows, REGRESSION, tolerance=0.5)) == [3, 2, 1]
    assert signals("patience", evidence(make, rows, REGRESSION, tolerance=0.25)) == [2, 2, 1]


def test_learned_is_what_the_unit_says(make):
    certain = make([0.0, 0.25, 1.0])
    assert signals("learned", evidence(make, THREE, certainty=certain)) == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("name", "threshold", "leaves"),
    [
        ("confidence", 0.5, [True, False, True]),
        ("entropy", 0.75, [True, False, True]),
        ("patience", 2, [True, True, False]),
        ("learned", 0.25, [False, True, True]),
    ],
)
def test_rows_leave_on_the_right_side_of_the_threshold_and_at_it(make, name, threshold, leaves):
    rows = [[[2.0, 0.0, 0.0]] * 2, [[1.0, 1.0, 1.0]] * 2, [[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]]]
    known = evidence(make, rows, certainty=make([0.2, 0.25, 0.9]))
    assert ThresholdPolicy(CRITERIA[name], [None, threshold]).leaves(1, known).tolist() == leaves
    assert ThresholdPolicy(CRITERIA[name], [None, None]).leaves(1, known).tolist() == [False] * 3


@pytest.mark.parametrize("name", CRITERIA)
def test_a_threshold_that_is_a_row_s_own_signal_lets_it_leave(make, name):
    rows = [[[2.0, 0.5, 0.0]] * 2, [[1.0, 0.75, 0.9]] * 2, [[0.0, 9.0, 0.25]] * 2]
    known = evidence(make, rows, certainty=make([0.2, 0.3, 0.9]))
    for row, own in enumerate(signals(name, known)):
        assert ThresholdPolicy(CRITERIA[name], [None, own]).leaves(1, known).tolist()[row]


@pytest.mark.parametrize("name", CRITERIA)
def test_a_row_whose_answer_is_no_number_stays(make, name):
    known = evidence(make, [[math.nan, 0.0], [9.0, 0.0]], certainty=make([1.0, 1.0]))
    easiest = 1.0 if CRITERIA[name].leaves_above and name == "patience" else float(not CRITERIA[name].leaves_above)
    assert ThresholdPolicy(CRITERIA[name], [easiest]).leaves(0, known).tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("confidence", [0, 0.5, 1], [-0.01, 1.01, math.nan]),
        ("entropy", [0, 0.5, 1], [-0.01, 1.01, math.nan]),
        ("learned", [0, 0.5, 1], [-0.01, 1.01, math.nan]),
        ("patience", [1, 2.0, 7], [0, -1, 0.5, 1.5, math.nan]),
    ],
)
def test_thresholds_that_can_be_and_cannot(name, good, bad):
    model = tiny.model(exit_criterion=name)
    for threshold in good:
        assert len(model(**tiny.batch(), exit_thresholds=threshold).exit_index) == 6
    for threshold in [*bad, True, "0.5"]:
        with pytest.raises(ValueError, match=r"exit_thresholds.* must be"):
            model(**tiny.batch(), exit_thresholds=[threshold, None])


@pytest.mark.parametrize("name", ["confidence", "entropy", "learned"])
def test_rows_of_little_doubt_are_counted_before_those_of_much(name):
    logits, certainty = np.array([[[9.0, 0.0, 0.0]], [[0.1, 0.0, 0.0]]], dtype=np.float32), np.array([[0.99], [0.1]])
    sure, unsure = cells(logits, np.array([0, 0]), certainty, tiny.config(exit_criterion=name)).tolist()
    assert 0 <= sure < unsure < DOUBTS


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("confidence", 4, [0.25 + 0.75 * step / 20 for step in range(21)]),
        ("confidence", 1, [0.5 + 0.5 * step / 20 for step in range(21)]),
        ("entropy", 4, [1 - step / 20 for step in range(21)]),
        ("learned", 4, [step / 20 for step in range(21)]),
        ("patience", 4, [1, 2, 3]),
    ],
)
def test_thresholds_of_a_curve_go_from_leaving_at_once_to_hardly_leaving(name, labels, expected):
    assert CRITERIA[name].useful_thresholds(labels, 3) == pytest.approx(expected)


def signal_of(name, exits):
    """Of the last of some exits' scores, in plain Python."""
    if name == "confidence":
        return max(probabilities(exits[-1]))
    if name == "entropy":
        return entropy(probabilities(exits[-1])) / math.log(len(exits[-1]))
    answers = [scores.index(max(scores)) for scores in exits][::-1]
    return next((count for count, answer in enumerate(answers) if answer != answers[0]), len(answers))


@pytest.mark.parametrize(("name", "threshold"), [("confidence", 0.5), ("entropy", 0.9), ("patience", 2)])
def test_a_model_s_rows_leave_at_the_first_exit_that_is_sure_enough(name, threshold):
    model, inputs = tiny.model(exit_criterion=name), tiny.batch(32)
    expected = []
    for row in model(**inputs).exit_logits.tolist():
        found = [signal_of(name, row[: index + 1]) for index in range(2)]
        leaves = [signal <= threshold if name == "entropy" else signal >= threshold for signal in found]
        expected.append([*leaves, True].index(True))
    assert model(**inputs, exit_thresholds=threshold).exit_index.tolist() == expected
    assert len(set(expected)) > 1


@torch.no_grad()
def test_a_learned_unit_s_certainty_is_stretched_to_its_range_and_decides():
    model, inputs = tiny.without_dropout(exit_criterion="learned"), tiny.batch(32)
    plain = model(**inputs).exit_certainty.tolist()
    column = sorted(row[0] for row in plain)
    least, largest = column[4], column[-5]
    model.exits[0].certainty.least.fill_(least)
    model.exits[0].certainty.largest.fill_(largest)
    stretched = [min(1.0, max(0.0, (row[0] - least) / (largest - least))) for row in plain]
    assert model(**inputs).exit_certainty[:, 0].tolist() == pytest.approx(stretched, abs=1e-4)
    ordered = sorted(stretched)
    threshold = (ordered[15] + ordered[16]) / 2
    taken = model(**inputs, exit_thresholds=[threshold, None]).exit_index
    assert taken.tolist() == [0 if certainty >= threshold else 2 for certainty in stretched]
    # In training it learns what it is, without a range.
    trained = model.train()(**inputs).exit_certainty[:, 0].tolist()
    assert trained == pytest.approx([row[0] for row in plain], abs=1e-6)
