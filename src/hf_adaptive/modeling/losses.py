"""The loss of a classifier with exits."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from .labels import has_label, problem_type_of

# Mean loss of one exit's answers: from the exit's place, its scores, the labels and the model's configuration.
MeanLoss = Callable[[int, torch.Tensor, torch.Tensor, Any], torch.Tensor]


def answer_loss(logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Mean loss of one answer a row, as every `…ForSequenceClassification` computes it, without rows of no label.

    Args:
        logits (`torch.Tensor` of shape `(batch, labels)`): Scores.
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, labels)`): From [`read_labels`].
        config: The model's configuration; its problem type is set from the labels if it has none.

    Returns:
        `torch.Tensor`: A scalar.
    """
    if problem_type_of(labels, config) != "multi_label_classification":
        return ForSequenceClassificationLoss(labels, logits, config)
    labels = labels.to(logits.device)
    counts = has_label(labels, "multi_label_classification").unsqueeze(-1).expand_as(logits)
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return torch.where(counts, losses, 0).sum() / counts.sum().clamp(min=1)


def model_loss(index: int, logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """[`answer_loss`] of any exit: what a model is trained with unless its user says otherwise."""
    return answer_loss(logits, labels, config)


def exits_loss(
    exit_logits: torch.Tensor,
    certainty: torch.Tensor | None,
    labels: torch.Tensor,
    config: Any,
    mean_loss: MeanLoss = model_loss,
    certainty_weight: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Sum over the exits of weight times mean loss (SWEET, section 3: all weights 1).

    Args:
        exit_logits (`torch.Tensor` of shape `(batch, exits, labels)`): Scores of every exit.
        certainty (`torch.Tensor` of shape `(batch, exits)`, *optional*): Of the exits' learned units.
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, labels)`): From [`read_labels`].
        config: The model's configuration.
        mean_loss (`Callable`): Of one exit, as `model_loss`.
        certainty_weight (`float`): Of the learned units' loss, beside `mean_loss`.

    Returns:
        `torch.Tensor`: A scalar.

    Raises:
        ValueError: Labels that cannot be used.
    """
    certainties = [None] * exit_logits.shape[1] if certainty is None else certainty.unbind(dim=1)
    losses = [
        exit_loss(index, logits, certainties[index], labels, config, mean_loss, certainty_weight)
        for index, logits in enumerate(exit_logits.unbind(dim=1))
    ]
    return torch.stack(losses).sum()


def exit_loss(
    index: int,
    logits: torch.Tensor,
    certainty: torch.Tensor | None,
    labels: torch.Tensor,
    config: Any,
    mean_loss: MeanLoss = model_loss,
    certainty_weight: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Weight times mean loss of one exit, with that of its learned unit if it has one.

    Args:
        index (`int`): Which exit.
        logits (`torch.Tensor` of shape `(batch, labels)`): Its scores.
        certainty (`torch.Tensor` of shape `(batch,)`, *optional*): Of its learned unit.
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, labels)`): From [`read_labels`].
        config: The model's configuration.
        mean_loss (`Callable`): As `model_loss`.
        certainty_weight (`float`): Of the learned unit's loss, beside `mean_loss`.

    Returns:
        `torch.Tensor`: A scalar.
    """
    loss = mean_loss(index, logits, labels, config)
    if certainty is not None:
        loss = loss + certainty_weight * certainty_loss(logits, certainty, labels, config)
    return loss if config.exit_loss_weights is None else config.exit_loss_weights[index] * loss


def certainty_loss(logits: torch.Tensor, certainty: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Mean squared error between an exit's certainty and its being right (BERxiT, section 4).

    Args:
        logits (`torch.Tensor` of shape `(batch, labels)`): The exit's scores.
        certainty (`torch.Tensor` of shape `(batch,)`): Of its learned unit.
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, labels)`): From [`read_labels`].
        config: The model's configuration.

    Returns:
        `torch.Tensor`: A scalar.
    """
    labels = labels.to(logits.device)
    kind = problem_type_of(labels, config)
    if kind == "multi_label_classification":
        is_right = ((logits > 0) == (labels > 0.5)).all(dim=-1)
    else:
        is_right = logits.argmax(dim=-1) == labels
    counts = has_label(labels, kind)
    error = (certainty - is_right.to(certainty.dtype)) ** 2
    return torch.where(counts, error, 0).sum() / counts.sum().clamp(min=1)
