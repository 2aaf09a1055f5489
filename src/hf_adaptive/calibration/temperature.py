"""Temperatures: one number per exit that makes its probabilities honest (Guo et al. 2017, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..warning import warn_caller

MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 100.0
ECE_BINS = 15


@dataclass(frozen=True)
class TemperatureFit:
    """What one exit's temperature did to its probabilities on the calibration data.

    Attributes:
        temperature: the logits are divided by it.
        nll_before, nll_after: mean negative log-likelihood in nats, at temperature 1 and at `temperature`.
        ece_before, ece_after: expected calibration error with 15 bins, between 0 and 1.
        at_limit: the likelihood has no optimum inside [`MIN_TEMPERATURE`, `MAX_TEMPERATURE`], and `temperature` is 1.
        num_examples: how many examples it was fitted on.
    """

    temperature: float
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    at_limit: bool
    num_examples: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the smallest mean negative log-likelihood.

    The likelihood is convex in 1/T, so the root of its derivative is the exact minimiser; it is found by Newton steps
    inside a shrinking bracket, in float64. Where there is no minimiser between 0.01 and 100 (every answer right: the
    likelihood improves for ever towards 0; answers worse than chance: towards infinity) it stays 1, with a warning: an
    end of the range would make everything look certain, or nothing. Where the temperature makes no difference (all
    logits of a row equal, in every row) it is 1, too.

    Args:
        logits: `(examples, labels)`, of one exit, not yet divided by any temperature.
        labels: `(examples,)` integer classes (softmax, cross-entropy), or `(examples, labels)` zeros and ones for a
            multi-label problem (sigmoid, binary cross-entropy).

    Raises:
        ValueError: shapes that do not fit, no examples, logits that are not finite, labels out of range.
    """
    return _fitted(*_checked(logits, labels))[0]


def fit_temperatures(exit_logits: Tensor, labels: Tensor) -> list[TemperatureFit]:
    """[`fit_temperature`] for every exit, with the quality of the probabilities before and after.

    Args:
        exit_logits: `(examples, exits, labels)`, not yet divided by any temperature.
        labels: as in [`fit_temperature`].
    """
    if exit_logits.ndim != 3:
        raise ValueError(
            f"exit_logits must have the shape (examples, exits, labels), got {tuple(exit_logits.shape)}. For a single "
            "exit use fit_temperature."
        )
    return [_fit_one(logits, labels) for logits in exit_logits.unbind(1)]


def negative_log_likelihood(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood in nats, computed in float64; shapes as in [`fit_temperature`].

    For a multi-label problem the mean goes over examples and labels, as in `BCEWithLogitsLoss`.
    """
    logits, labels = _checked(logits, labels)
    return _nll(logits / temperature, labels)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error: Σ over bins of share · |mean confidence − accuracy| (Guo et al. 2017, equation 3).

    The bins have equal width on (0, 1], open below and closed above. For a multi-label problem every label of every
    example is one binary decision with confidence max(p, 1 − p).

    Args:
        probabilities: `(examples, labels)`, between 0 and 1.
        labels: `(examples,)` integer classes, or `(examples, labels)` zeros and ones.
        bins: number of bins.

    Raises:
        ValueError: as in [`fit_temperature`], or probabilities that are not between 0 and 1.
    """
    probabilities, labels = _checked(probabilities, labels)
    if probabilities.min() < 0 or probabilities.max() > 1 + 1e-6:
        raise ValueError(
            f"probabilities must lie between 0 and 1, got values from {probabilities.min():.4g} to "
            f"{probabilities.max():.4g}. Did you pass logits? Apply softmax or sigmoid first."
        )
    confidence, correct = _decisions(probabilities, labels)
    # Boundaries in float32, because that is the precision of the probabilities that fall exactly on one.
    boundaries = torch.linspace(0, 1, bins + 1)[1:-1].to(confidence.dtype)
    bin_index = torch.bucketize(confidence, boundaries)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_index, confidence - correct)
    return (gaps.abs().sum() / len(confidence)).item()


def _fit_one(logits: Tensor, labels: Tensor) -> TemperatureFit:
    temperature, at_limit = _fitted(*_checked(logits, labels))
    return TemperatureFit(
        temperature=temperature,
        nll_before=negative_log_likelihood(logits, labels),
        nll_after=negative_log_likelihood(logits, labels, temperature),
        ece_before=expected_calibration_error(_probabilities(logits, labels), labels),
        ece_after=expected_calibration_error(_probabilities(logits / temperature, labels), labels),
        at_limit=at_limit,
        num_examples=len(logits),
    )


def _fitted(logits: Tensor, labels: Tensor) -> tuple[float, bool]:
    """The temperature, and whether it stayed 1 for want of an optimum."""
    temperature = 1 / _minimise_over_inverse_temperature(logits, labels)
    if MIN_TEMPERATURE < temperature < MAX_TEMPERATURE:
        return temperature, False
    cause = "every answer is right" if temperature <= MIN_TEMPERATURE else "the exit is worse than chance"
    warn_caller(
        f"No temperature between {MIN_TEMPERATURE} and {MAX_TEMPERATURE} is optimal for these {len(logits)} examples, "
        f"usually because {cause}: it stays 1. Calibrate on more, or harder, examples."
    )
    return 1.0, True


def _minimise_over_inverse_temperature(logits: Tensor, labels: Tensor) -> float:
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    slope, curvature = _derivatives(logits, labels, 1.0)
    # Without curvature the likelihood is linear in 1/T; logits that do not vary at all say nothing about T.
    if slope == 0 and curvature == 0:
        return 1.0
    if _derivatives(logits, labels, high)[0] <= 0:
        return high
    if _derivatives(logits, labels, low)[0] >= 0:
        return low
    inverse = 1.0
    for _ in range(200):
        slope, curvature = _derivatives(logits, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        proposal = inverse - slope / curvature if curvature > 0 else math.inf
        if not low < proposal < high:
            proposal = math.sqrt(low * high)
        if abs(proposal - inverse) <= 1e-12 * inverse:
            break
        inverse = proposal
    return inverse


def _derivatives(logits: Tensor, labels: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean negative log-likelihood with respect to 1/T."""
    if labels.ndim == 2:
        probabilities = torch.sigmoid(inverse * logits)
        slopes = (probabilities - labels) * logits
        curvatures = probabilities * (1 - probabilities) * logits**2
    else:
        probabilities = torch.softmax(inverse * logits, dim=-1)
        means = (probabilities * logits).sum(-1, keepdim=True)
        slopes = means - logits.gather(1, labels[:, None])
        curvatures = (probabilities * (logits - means) ** 2).sum(-1)
    return slopes.mean().item(), curvatures.mean().item()


def _nll(logits: Tensor, labels: Tensor) -> float:
    if labels.ndim == 2:
        return functional.binary_cross_entropy_with_logits(logits, labels).item()
    return functional.cross_entropy(logits, labels).item()


def _probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.sigmoid(logits) if labels.ndim == 2 else torch.softmax(logits, dim=-1)


def _decisions(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and correctness (as 0.0 or 1.0) of every decision."""
    if labels.ndim == 2:
        confidence = torch.maximum(probabilities, 1 - probabilities)
        correct = (probabilities > 0.5) == (labels > 0.5)
    else:
        confidence, answers = probabilities.max(-1)
        correct = answers == labels
    return confidence.flatten(), correct.flatten().to(confidence.dtype)


def _checked(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU, the values in float64, after checking that they belong together."""
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(
            f"logits must have the shape (examples, labels) with at least one example, got {tuple(values.shape)}."
        )
    if labels.shape not in (values.shape[:1], values.shape):
        raise ValueError(
            f"labels must have the shape {_shapes(values.shape[:1], values.shape)} to go with logits of shape "
            f"{tuple(values.shape)}, got {tuple(labels.shape)}."
        )
    values, labels = values.detach().to("cpu", torch.float64), labels.detach().to("cpu")
    _check_finite(values)
    return values, _checked_classes(labels, values.shape[1]) if labels.ndim == 1 else _checked_indicators(labels)


def _shapes(*shapes: Sequence[int]) -> str:
    return " or ".join(str(tuple(shape)) for shape in shapes)


def _check_finite(values: Tensor) -> None:
    bad = ~values.isfinite().all(-1)
    if bad.any():
        raise ValueError(
            f"logits must be finite, but {int(bad.sum())} of {len(values)} rows are not (first: row "
            f"{int(bad.nonzero()[0])}). NaN marks an exit that was not reached: run all exits to calibrate."
        )


def _checked_classes(labels: Tensor, num_labels: int) -> Tensor:
    if labels.is_floating_point():
        raise ValueError(f"labels of shape (examples,) must be integer classes, got {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= num_labels:
        raise ValueError(
            f"labels must lie between 0 and {num_labels - 1}, got values from {int(labels.min())} to "
            f"{int(labels.max())}. Leave out examples without a label."
        )
    return labels.long()


def _checked_indicators(labels: Tensor) -> Tensor:
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels of a multi-label problem must be 0 or 1; got other values.")
    return labels.to(torch.float64)
