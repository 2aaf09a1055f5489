"""The loss of a classifier with exits, and the checks of its labels."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.loss.loss_utils import ForSequenceClassificationLoss

# Mean loss of one answer a row, from its scores, the labels and the model's configuration.
MeanLoss = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def problem_type(config) -> str:
    """The configuration's problem type; where it does not say: regression for one label, else one label of many."""
    if config.problem_type is not None:
        return config.problem_type
    return "regression" if config.num_labels == 1 else "single_label_classification"


def problem_type_of(labels: torch.Tensor, config: Any) -> str:
    """As [`problem_type`]; where the configuration does not say and there are several labels, by the labels' type."""
    if config.problem_type is None and config.num_labels > 1 and labels.is_floating_point():
        return "multi_label_classification"
    return problem_type(config)


def answer_loss(logits: torch.Tensor, labels: torch.Tensor, config) -> torch.Tensor:
    """Mean loss of one answer a row, as every `…ForSequenceClassification` computes it.

    Args:
        logits (`torch.Tensor` of shape `(batch, labels)`): Scores.
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, labels)`): By problem type.
        config: The model's configuration; its problem type is set from the labels if it has none.

    Returns:
        `torch.Tensor`: A scalar.
    """
    return ForSequenceClassificationLoss(labels, logits, config)


def exits_loss(
    exit_logits: torch.Tensor,
    certainty: torch.Tensor | None,
    labels: torch.Tensor,
    config: Any,
    mean_loss: MeanLoss = answer_loss,
) -> torch.Tensor:
    """Sum over the exits of weight times mean loss (SWEET, section 3: all weights 1).

    Args:
        exit_logits (`torch.Tensor` of shape `(batch, exits, labels)`): Scores of every exit.
        certainty (`torch.Tensor` of shape `(batch, exits)`, *optional*): Of the exits' learned units.
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, labels)`): By problem type.
        config: The model's configuration.
        mean_loss (`Callable`): Of one exit, as `answer_loss`.

    Returns:
        `torch.Tensor`: A scalar.

    Raises:
        ValueError: Labels that cannot be used.
    """
    certainties = [None] * exit_logits.shape[1] if certainty is None else certainty.unbind(dim=1)
    losses = [
        exit_loss(index, logits, certainties[index], labels, config, mean_loss)
        for index, logits in enumerate(exit_logits.unbind(dim=1))
    ]
    return torch.stack(losses).sum()


def exit_loss(
    index: int,
    logits: torch.Tensor,
    certainty: torch.Tensor | None,
    labels: torch.Tensor,
    config: Any,
    mean_loss: MeanLoss = answer_loss,
) -> torch.Tensor:
    """Weight times mean loss of one exit, with that of its learned unit if it has one.

    Args:
        index (`int`): Which exit.
        logits (`torch.Tensor` of shape `(batch, labels)`): Its scores.
        certainty (`torch.Tensor` of shape `(batch,)`, *optional*): Of its learned unit.
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, labels)`): By problem type.
        config: The model's configuration.
        mean_loss (`Callable`): As `answer_loss`.

    Returns:
        `torch.Tensor`: A scalar.
    """
    loss = mean_loss(logits, labels, config)
    if certainty is not None:
        loss = loss + certainty_loss(logits, certainty, labels, config)
    return loss if config.exit_loss_weights is None else config.exit_loss_weights[index] * loss


def certainty_loss(logits: torch.Tensor, certainty: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Mean squared error between an exit's certainty and its being right (BERxiT, section 4).

    Args:
        logits (`torch.Tensor` of shape `(batch, labels)`): The exit's scores.
        certainty (`torch.Tensor` of shape `(batch,)`): Of its learned unit.
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, labels)`): By problem type.
        config: The model's configuration.

    Returns:
        `torch.Tensor`: A scalar.
    """
    labels = labels.to(logits.device)
    if problem_type(config) == "multi_label_classification":
        is_right = ((logits > 0) == labels.bool()).all(dim=-1)
        counts = torch.ones(len(logits), device=logits.device)
    else:
        is_right = logits.argmax(dim=-1) == labels.view(-1)
        counts = (labels.view(-1) != -100).to(certainty.dtype)
    error = (certainty - is_right.to(certainty.dtype)) ** 2
    return (error * counts).sum() / counts.sum().clamp(min=1)


def check_labels(labels: torch.Tensor, rows: int, config) -> None:
    """Raises `ValueError` for labels of the wrong type, number or range for the problem."""
    is_whole = not labels.is_floating_point()
    kind = problem_type_of(labels, config)
    if kind not in PROBLEM_TYPES:
        raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {kind!r}.")
    if kind == "single_label_classification":
        _check_class_indexes(labels, rows, config.num_labels, is_whole)
    else:
        _check_numbers(labels, rows, config.num_labels, is_whole, kind)


def _check_class_indexes(labels: torch.Tensor, rows: int, num_labels: int, is_whole: bool) -> None:
    if not is_whole:
        raise ValueError(
            f"labels must be whole numbers for single_label_classification, got {labels.dtype}. For several labels "
            "at once set problem_type='multi_label_classification'; for numbers, num_labels=1."
        )
    if labels.numel() != rows:
        raise ValueError(f"labels must have one entry a row ({rows}), got shape {tuple(labels.shape)}.")
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= num_labels))]
    if len(wrong):
        raise ValueError(
            f"labels must lie between 0 and {num_labels - 1} (num_labels={num_labels}; -100 is left out of the loss), "
            f"got {wrong.unique().tolist()[:5]}. Load the model with the right num_labels, or mend the data."
        )


def _check_numbers(labels: torch.Tensor, rows: int, num_labels: int, is_whole: bool, kind: str) -> None:
    if is_whole:
        raise ValueError(f"labels must be floats for {kind}, got {labels.dtype}. Cast them with labels.float().")
    shapes = [(rows, num_labels)] if num_labels > 1 else [(rows,), (rows, 1)]
    if labels.shape not in shapes:
        raise ValueError(
            f"labels must have shape ({rows}, {num_labels}) for {kind} with num_labels={num_labels}, "
            f"got {tuple(labels.shape)}."
        )
    is_usable = labels.isfinite() if kind == "regression" else (labels >= 0) & (labels <= 1)
    if not is_usable.all():
        allowed = "finite numbers" if kind == "regression" else "numbers between 0 and 1, one a label,"
        raise ValueError(
            f"labels must be {allowed} for {kind}, got {labels[~is_usable].unique().tolist()[:5]}. Mend the data."
        )
