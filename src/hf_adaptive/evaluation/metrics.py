"""Scores of answers, by problem type or by a metric of the user's."""

import functools
import inspect
from collections.abc import Callable, Mapping

import numpy as np
import torch

Metric = Callable[..., float | Mapping[str, float]]


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Share of the examples answered right; with several labels at once, all of them."""
    right = predictions == references
    return float(right.reshape(len(right), -1).all(axis=1).mean())


def pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    """Pearson's correlation; NaN if either side is constant."""
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return float("nan")
    return float(np.corrcoef(predictions.ravel(), references.ravel())[0, 1])


def default_metric(problem_type: str) -> Metric:
    """Accuracy; Pearson's correlation for regression."""
    return pearson if problem_type == "regression" else accuracy


def metric_name(metric: Metric) -> str:
    """The function's name, also of a `partial` of it; the class's for an object, such as a bound `evaluate` metric."""
    if isinstance(metric, functools.partial):
        return metric_name(metric.func)
    if inspect.isfunction(metric):
        return metric.__name__
    owner = getattr(metric, "__self__", metric)
    return str(getattr(owner, "name", type(owner).__name__))


def answers_of(logits: torch.Tensor, problem_type: str) -> np.ndarray:
    """What the scores say.

    Args:
        logits (`torch.Tensor` of shape `(examples, labels)`): Scores.
        problem_type (`str`): As in the configuration.

    Returns:
        `np.ndarray`: Class indexes `(examples,)`; 0/1 `(examples, labels)`; or numbers `(examples,)`.
    """
    if problem_type == "single_label_classification":
        return logits.argmax(dim=-1).numpy()
    if problem_type == "multi_label_classification":
        return (logits > 0).long().numpy()
    return logits.float().squeeze(-1).numpy()


def score(metric: Metric, logits: torch.Tensor, labels: torch.Tensor, problem_type: str) -> float:
    """A metric of the answers that some scores give; a dict's first value counts.

    Args:
        metric (`Callable`): Called with `predictions` and `references`.
        logits (`torch.Tensor` of shape `(examples, labels)`): Scores; a row with NaN has no answer, which is wrong
            (for regression the answer is NaN).
        labels (`torch.Tensor`): What is right, a label in every row.
        problem_type (`str`): As in the configuration.
    """
    references, predictions = labels.numpy(), answers_of(logits, problem_type)
    if problem_type != "regression":
        is_answered = ~logits.isnan().any(dim=-1).numpy()
        # An answer that a metric of the user's knows, and that is not the right one.
        predictions[~is_answered] = references[~is_answered] == 0
    value = metric(predictions=predictions, references=references)
    return float(next(iter(value.values())) if isinstance(value, Mapping) else value)
