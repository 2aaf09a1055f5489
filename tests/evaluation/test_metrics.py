"""Scores of answers against values worked out in plain Python."""

import functools
import math

import numpy as np
import pytest
import torch

from hf_adaptive.evaluation.metrics import accuracy, answers_of, default_metric, metric_name, pearson, score

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
NAN = math.nan


def correlation(first, second):
    means = [math.fsum(values) / len(values) for values in (first, second)]
    a, b = ([value - mean for value in values] for values, mean in zip((first, second), means))
    products = math.fsum(x * y for x, y in zip(a, b))
    return products / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def test_accuracy_is_the_share_of_right_answers():
    assert accuracy(np.array([0, 2, 1, 1]), np.array([0, 1, 1, 2])) == 0.5
    assert accuracy(np.array([2]), np.array([2])) == 1.0
    # Several labels at once: all of them.
    assert accuracy(np.array([[1, 0], [1, 1], [0, 0]]), np.array([[1, 0], [1, 0], [1, 1]])) == pytest.approx(1 / 3)


def test_pearson_s_correlation():
    first, second = [1.0, 2.5, -3.0, 0.5, 4.0], [0.5, 3.0, -1.0, -2.0, 2.0]
    assert pearson(np.array(first), np.array(second)) == pytest.approx(correlation(first, second))
    assert pearson(np.array(first), -np.array(first)) == pytest.approx(-1)
    columns = np.array(first)[:, None], np.array(second)[:, None]
    assert pearson(*columns) == pytest.approx(correlation(first, second))


@pytest.mark.parametrize(("first", "second"), [([1.0, 1.0], [0.0, 2.0]), ([0.0, 2.0], [3.0, 3.0])])
def test_what_is_constant_has_no_correlation(first, second):
    assert math.isnan(pearson(np.array(first), np.array(second)))


def test_each_problem_has_its_metric():
    assert [default_metric(problem) for problem in (SINGLE, MULTI, REGRESSION)] == [accuracy, accuracy, pearson]


def test_answers_are_what_the_scores_say():
    scores = torch.tensor([[0.1, -2.0, 3.0], [0.0, -0.5, -1.0]])
    assert answers_of(scores, SINGLE).tolist() == [2, 0]
    assert answers_of(scores, MULTI).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert answers_of(torch.tensor([[0.5], [-2.0]]), REGRESSION).tolist() == [0.5, -2.0]


@pytest.mark.parametrize(
    ("problem", "scores", "labels", "expected"),
    [
        (SINGLE, [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [2.0, 0.0]], [0, 0, 1, 0], 0.75),
        # A row of no number is wrong, whatever is right.
        (SINGLE, [[NAN, 0.0], [0.0, NAN], [0.0, 1.0], [2.0, 0.0]], [0, 1, 1, 0], 0.5),
        (MULTI, [[1.0, -1.0], [1.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]], 0.5),
        (MULTI, [[NAN, -1.0], [1.0, -1.0], [NAN, NAN]], [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], 1 / 3),
        (REGRESSION, [[1.0], [2.0], [4.0]], [1.0, 2.0, 3.0], correlation([1, 2, 4], [1, 2, 3])),
    ],
)
def test_score(problem, scores, labels, expected):
    found = score(default_metric(problem), torch.tensor(scores), torch.tensor(labels), problem)
    assert found == pytest.approx(expected)


def test_numbers_that_are_none_have_no_score():
    assert math.isnan(score(pearson, torch.tensor([[NAN], [1.0]]), torch.tensor([0.0, 1.0]), REGRESSION))


def test_a_metric_of_the_user_s_gives_a_number_or_a_dictionary_whose_first_value_counts():
    def wrong(predictions, references):
        return {"wrong": float((predictions != references).mean()), "other": 7.0}

    scores, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0, 0, 1])
    assert score(wrong, scores, labels, SINGLE) == 0.5
    assert score(functools.partial(wrong), scores, labels, SINGLE) == 0.5
    assert score(lambda predictions, references: len(references), scores, labels, SINGLE) == 4.0


def test_names_of_metrics():
    class Macro:
        name = "macro_f1"

        def compute(self, predictions, references):
            return 0.0

    class Plain:
        def __call__(self, predictions, references):
            return 0.0

    assert metric_name(accuracy) == "accuracy"
    assert metric_name(functools.partial(functools.partial(accuracy))) == "accuracy"
    assert metric_name(Macro().compute) == "macro_f1"
    assert metric_name(Plain()) == "Plain"
