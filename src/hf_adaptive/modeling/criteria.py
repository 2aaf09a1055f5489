"""What says "confident enough to leave" (`exit_criterion`).

A criterion turns what the exits know about a row into a signal and compares it with the exit's threshold. A new one is
one class and one line in `CRITERIA`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass
class Evidence:
    """What is known about some rows at one exit.

    Args:
        logits (`torch.Tensor` of shape `(rows, exits so far, labels)`): Divided by the temperatures; this exit last.
        problem_type (`str`): `single_label_classification`, `multi_label_classification` or `regression`.
    """

    logits: torch.Tensor
    problem_type: str


class Criterion(ABC):
    """Says which rows leave at an exit."""

    name: str
    problem_types: tuple[str, ...]
    threshold_range: str

    @abstractmethod
    def allows(self, threshold: float) -> bool:
        """Whether this number can be a threshold of this criterion."""

    @abstractmethod
    def signal(self, evidence: Evidence) -> torch.Tensor:
        """The number that is compared with the threshold, `torch.Tensor` of shape `(rows,)`."""

    @abstractmethod
    def leaves(self, signal: torch.Tensor, threshold: float) -> torch.Tensor:
        """Which rows leave, `torch.BoolTensor` of shape `(rows,)`. A signal of NaN never leaves."""

    def check_threshold(self, threshold: float | None, position: int) -> None:
        """Raises `ValueError` for a threshold that cannot be one; None means: nothing leaves at this exit."""
        if threshold is None:
            return
        is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not is_number or not self.allows(threshold):
            raise ValueError(
                f"exit_thresholds[{position}] must be {self.threshold_range} for exit_criterion={self.name!r}, "
                f"or None (nothing leaves there), got {threshold!r}."
            )

    def check_problem_type(self, problem_type: str) -> None:
        """Raises `ValueError` for a problem in which this criterion means nothing."""
        if problem_type not in self.problem_types:
            raise ValueError(
                f"exit_criterion={self.name!r} means nothing for problem_type={problem_type!r}, only for "
                f"{', '.join(self.problem_types)}. Use exit_at, another exit_criterion, or exit_thresholds=None."
            )


class Confidence(Criterion):
    """Largest softmax probability (SWEET, section 2); a row leaves at or above the threshold.

    Several labels at once: the least sure of the yes/no answers counts, each with the larger of its two probabilities.
    """

    name = "confidence"
    problem_types = ("single_label_classification", "multi_label_classification")
    threshold_range = "a probability from 0 to 1"

    def allows(self, threshold: float) -> bool:
        return 0 <= threshold <= 1

    def signal(self, evidence: Evidence) -> torch.Tensor:
        logits = evidence.logits[:, -1].float()
        if evidence.problem_type == "multi_label_classification":
            return torch.sigmoid(logits.abs()).amin(dim=-1)
        return logits.softmax(dim=-1).amax(dim=-1)

    def leaves(self, signal: torch.Tensor, threshold: float) -> torch.Tensor:
        return signal >= threshold


CRITERIA: dict[str, Criterion] = {criterion.name: criterion for criterion in (Confidence(),)}


@dataclass(frozen=True)
class ThresholdPolicy:
    """A row leaves where the criterion reaches that exit's threshold.

    Args:
        criterion (`Criterion`): What is compared.
        thresholds (`list[float | None]`): One for each exit but the last; None: nothing leaves there.
    """

    criterion: Criterion
    thresholds: list[float | None]

    def leaves(self, exit_index: int, evidence: Evidence) -> torch.Tensor:
        """Which rows leave at this exit, `torch.BoolTensor` of shape `(rows,)`."""
        threshold = self.thresholds[exit_index]
        if threshold is None:
            return torch.zeros(len(evidence.logits), dtype=torch.bool, device=evidence.logits.device)
        answer_is_number = ~evidence.logits[:, -1].isnan().any(dim=-1)
        return self.criterion.leaves(self.criterion.signal(evidence), threshold) & answer_is_number


@dataclass(frozen=True)
class ForcedPolicy:
    """Every row leaves at one exit, whatever it says.

    Args:
        exit_index (`int`): That exit.
    """

    exit_index: int

    def leaves(self, exit_index: int, evidence: Evidence) -> torch.Tensor:
        """Which rows leave at this exit, `torch.BoolTensor` of shape `(rows,)`."""
        forced = exit_index == self.exit_index
        return torch.full((len(evidence.logits),), forced, dtype=torch.bool, device=evidence.logits.device)


Policy = ThresholdPolicy | ForcedPolicy
