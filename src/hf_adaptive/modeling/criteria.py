"""What says "confident enough to leave" (`exit_criterion`).

A criterion turns what the exits know about a row into a signal and compares it with the exit's threshold. A new one is
one class and one line in `CRITERIA`. The same lines decide for torch's tensors, on any device, and for numpy arrays
(runtimes without torch): they are written in the functions that `Evidence.functions` gives, under torch's names.
"""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .checks import check_choice, is_whole_number
from .numpy_functions import NumpyFunctions

# A `torch.Tensor` or an `np.ndarray`.
Array = Any

CLASSIFICATION = ("single_label_classification", "multi_label_classification")


@dataclass
class Evidence:
    """What is known about some rows at one exit; all tensors or all numpy arrays.

    Args:
        logits (`torch.Tensor` or `np.ndarray` of shape `(rows, exits so far, labels)`): Divided by the temperatures;
            this exit last.
        problem_type (`str`): `single_label_classification`, `multi_label_classification` or `regression`.
        certainty (`torch.Tensor` or `np.ndarray` of shape `(rows,)`, *optional*): What the exit's learned unit says, 0
            to 1.
        tolerance (`float`, *optional*): Numbers this close are the same answer (regression).
    """

    logits: Array
    problem_type: str
    certainty: Array | None = None
    tolerance: float | None = None

    @property
    def functions(self) -> Any:
        """What computes with these: torch, or functions of the same names for numpy arrays."""
        return NumpyFunctions if isinstance(self.logits, np.ndarray) else importlib.import_module("torch")

    @property
    def scores(self) -> Array:
        """This exit's logits in float32, `(rows, labels)`."""
        logits = self.logits[:, -1]
        return logits.astype(np.float32, copy=False) if isinstance(logits, np.ndarray) else logits.float()

    @cached_property
    def is_nan(self) -> Array:
        """For which rows this exit gave NaN, booleans of shape `(rows,)`."""
        return self.functions.any(self.functions.isnan(self.logits[:, -1]), dim=-1)

    @property
    def nobody(self) -> Array:
        """False for every row, `(rows,)`."""
        return self.functions.zeros_like(self.logits[:, 0, 0], dtype=self.functions.bool)


class Criterion(ABC):
    """Says which rows leave at an exit.

    Args:
        name (`str`): As in `exit_criterion`.
        problem_types (`tuple[str, ...]`): Where it means something.
        threshold_range (`str`): What a threshold can be, for messages.
        leaves_above (`bool`): Whether a row leaves at or above the threshold; else at or below it.
        compares_exits (`bool`): Whether an exit's signal depends on what the exits before it said.
        counts_exits (`bool`): Whether the signal is a whole number of exits, and no measure of doubt.
        loosest_threshold (`float`): Where every row leaves, whatever the signal.
        example_threshold (`float`): What is shown where none is stored.
    """

    name: str
    problem_types: tuple[str, ...] = CLASSIFICATION
    threshold_range: str
    leaves_above: bool = True
    compares_exits: bool = False
    counts_exits: bool = False
    loosest_threshold: float
    example_threshold: float = 0.9

    @abstractmethod
    def allows(self, threshold: float) -> bool:
        """Whether this number can be a threshold of this criterion."""

    @abstractmethod
    def useful_thresholds(self, num_labels: int, exits: int) -> list[float]:
        """Thresholds that show the whole trade-off, from leaving at once to hardly leaving."""

    @abstractmethod
    def signal(self, evidence: Evidence) -> Array:
        """The number that is compared with the threshold, of shape `(rows,)`."""

    def leaves(self, signal: Array, threshold: float) -> Array:
        """Which rows leave, booleans of shape `(rows,)`. A signal of NaN never leaves."""
        return signal >= threshold if self.leaves_above else signal <= threshold

    def tightened(self, threshold: float) -> float:
        """A threshold at which fewer rows leave: half of the way to where nothing leaves."""
        return (threshold + 1) / 2 if self.leaves_above else threshold / 2

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
    """Largest softmax probability (SWEET, section 2), from 1 / labels to 1.

    Several labels at once: the least sure of the yes/no answers counts, each with the larger of its two probabilities.
    """

    name = "confidence"
    threshold_range = "a probability from 0 to 1"
    loosest_threshold = 0.0

    def allows(self, threshold: float) -> bool:
        return 0 <= threshold <= 1

    def useful_thresholds(self, num_labels: int, exits: int) -> list[float]:
        # The papers' grid: equally spaced from the least possible value to the largest.
        return _grid(1 / max(2, num_labels), 1)

    def signal(self, evidence: Evidence) -> Array:
        functions = evidence.functions
        if evidence.problem_type == "multi_label_classification":
            return functions.amin(functions.sigmoid(abs(evidence.scores)), dim=-1)
        return functions.amax(functions.softmax(evidence.scores, dim=-1), dim=-1)


class Entropy(Criterion):
    """Entropy of the softmax divided by its largest value, the logarithm of the number of labels (DeeBERT, Xin et al.,
    ACL 2020, section 2.3): 0 is sure, 1 knows nothing, whatever the number of labels.

    Several labels at once: the largest entropy of the yes/no answers, each divided by log 2.
    """

    name = "entropy"
    threshold_range = "a normalised entropy from 0 (sure) to 1"
    leaves_above = False
    loosest_threshold = 1.0
    example_threshold = 0.3

    def allows(self, threshold: float) -> bool:
        return 0 <= threshold <= 1

    def useful_thresholds(self, num_labels: int, exits: int) -> list[float]:
        return _grid(1, 0)

    def signal(self, evidence: Evidence) -> Array:
        functions, scores = evidence.functions, evidence.scores
        if evidence.problem_type == "multi_label_classification":
            yes_or_no = functions.stack((scores, functions.zeros_like(scores)), dim=-1)
            return functions.amax(_normalised_entropy(functions, yes_or_no), dim=-1)
        return _normalised_entropy(functions, scores)


class Patience(Criterion):
    """How many exits in a row, this one included, gave the same answer (PABEE, Zhou et al., NeurIPS 2020).

    1 leaves at the first exit, 2 asks for the exit before to agree, and so on. Numbers (regression) are the same if
    they differ by no more than `exit_tolerance`.
    """

    name = "patience"
    compares_exits = True
    counts_exits = True
    loosest_threshold = 1.0
    example_threshold = 2
    problem_types = (*CLASSIFICATION, "regression")
    threshold_range = "a whole number of exits from 1 on"

    def allows(self, threshold: float) -> bool:
        return threshold >= 1 and float(threshold).is_integer()

    def tightened(self, threshold: float) -> float:
        return threshold + 1  # one exit more that has to agree

    def useful_thresholds(self, num_labels: int, exits: int) -> list[float]:
        return [float(count) for count in range(1, exits + 1)]

    def signal(self, evidence: Evidence) -> Array:
        functions = evidence.functions
        agrees = _agrees_with_exit_before(evidence)
        # Products over ever more of the latest exits: 1 as long as all of them agree.
        in_a_row = functions.sum(functions.cumprod(functions.flip(agrees, dims=(1,)), dim=1), dim=1)
        return 1.0 + in_a_row


class Learned(Criterion):
    """What a linear unit on the pooled vector has learned of whether this exit is right ("learning to exit", BERxiT,
    Xin et al., EACL 2021, section 4; SWEET, section 2), calibrated to 0–1 by its range over a calibration set.
    """

    name = "learned"
    threshold_range = "a calibrated certainty from 0 to 1"
    loosest_threshold = 0.0

    def allows(self, threshold: float) -> bool:
        return 0 <= threshold <= 1

    def useful_thresholds(self, num_labels: int, exits: int) -> list[float]:
        return _grid(0, 1)

    def signal(self, evidence: Evidence) -> Array:
        if evidence.certainty is None:
            raise ValueError(
                "exit_criterion='learned' needs the units that are made, and trained, with a model of this criterion; "
                "this model was made without. Load it with exit_criterion='learned' and fine-tune it, or use another."
            )
        return evidence.certainty


def _grid(first: float, last: float, count: int = 21) -> list[float]:
    return [first + (last - first) * step / (count - 1) for step in range(count)]


def _normalised_entropy(functions: Any, logits: Array) -> Array:
    """Entropy of the softmax over the last dimension, divided by its largest value."""
    log_probabilities = functions.log_softmax(logits, dim=-1)
    entropy = -functions.sum(functions.exp(log_probabilities) * log_probabilities, dim=-1)
    return functions.clamp(entropy / math.log(logits.shape[-1]), 0, 1)


def _agrees_with_exit_before(evidence: Evidence) -> Array:
    """Whether each exit but the first agrees with the one before it: `(rows, exits so far - 1)`, 0 or 1."""
    functions, logits = evidence.functions, evidence.logits
    if evidence.problem_type == "single_label_classification":
        answers = functions.argmax(logits, dim=-1)
        return 1 * (answers[:, 1:] == answers[:, :-1])
    if evidence.problem_type == "multi_label_classification":
        answers = logits > 0
        return 1 * functions.all(answers[:, 1:] == answers[:, :-1], dim=-1)
    if evidence.tolerance is None:
        raise ValueError(
            "exit_criterion='patience' in regression needs exit_tolerance, the distance up to which two numbers are "
            "the same answer, got None. Set model.config.exit_tolerance, in the unit of the labels."
        )
    distance = functions.amax(abs(logits[:, 1:] - logits[:, :-1]), dim=-1)
    return 1 * (distance <= evidence.tolerance)


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion for criterion in (Confidence(), Entropy(), Patience(), Learned())
}


def problem_type(config: Any) -> str:
    """The configuration's problem type; where it does not say: regression for one label, else one label of many."""
    if config.problem_type is not None:
        return config.problem_type
    return "regression" if config.num_labels == 1 else "single_label_classification"


def checked_thresholds(thresholds: Any, exit_layers: Sequence[int], criterion: str) -> list[float | None]:
    """Thresholds as one number (or None) for each exit but the last.

    Args:
        thresholds: A list, or a number for all of them.
        exit_layers (`Sequence[int]`): The exits.
        criterion (`str`): Name of what is compared with them.

    Raises:
        ValueError: Wrong number of thresholds, or one outside the criterion's range.
    """
    check_choice("exit_criterion", criterion, tuple(CRITERIA))
    expected = len(exit_layers) - 1
    if isinstance(thresholds, (int, float)) and not isinstance(thresholds, bool):
        thresholds = [thresholds] * expected
    if not isinstance(thresholds, (list, tuple)):
        raise ValueError(
            f"exit_thresholds must be a list of {expected} entries or a single number for all of them, "
            f"got {thresholds!r}."
        )
    if len(thresholds) != expected:
        raise ValueError(
            f"exit_thresholds must have {expected} entries, one for each exit but the last (exit_layers="
            f"{exit_layers}), or be a single number for all of them, got {len(thresholds)}: {thresholds}."
        )
    for position, threshold in enumerate(thresholds):
        CRITERIA[criterion].check_threshold(threshold, position)
    return list(thresholds)


def exit_position(exit_at: Any, exit_layers: Sequence[int]) -> int:
    """Place in `exit_layers` of the exit after so many layers; a `ValueError` if there is none."""
    if not is_whole_number(exit_at) or exit_at not in exit_layers:
        raise ValueError(f"exit_at must be one of exit_layers={exit_layers} (layers run), got {exit_at!r}.")
    return exit_layers.index(exit_at)


@dataclass(frozen=True)
class ThresholdPolicy:
    """A row leaves where the criterion reaches that exit's threshold.

    Args:
        criterion (`Criterion`): What is compared.
        thresholds (`list[float | None]`): One for each exit but the last; None: nothing leaves there.
    """

    criterion: Criterion
    thresholds: list[float | None]

    def asks(self, exit_index: int) -> bool:
        """Whether what this exit says can decide where a row leaves."""
        later = self.thresholds[exit_index + 1 :] if self.criterion.compares_exits else []
        return any(threshold is not None for threshold in (self.thresholds[exit_index], *later))

    def leaves(self, exit_index: int, evidence: Evidence) -> Array:
        """Which rows leave at this exit, booleans of shape `(rows,)`."""
        threshold = self.thresholds[exit_index]
        if threshold is None:
            return evidence.nobody
        return self.criterion.leaves(self.criterion.signal(evidence), threshold) & ~evidence.is_nan


@dataclass(frozen=True)
class ForcedPolicy:
    """Every row leaves at one exit, whatever it says.

    Args:
        exit_index (`int`): That exit.
    """

    exit_index: int

    def asks(self, exit_index: int) -> bool:
        """Whether this is the exit."""
        return exit_index == self.exit_index

    def leaves(self, exit_index: int, evidence: Evidence) -> Array:
        """Which rows leave at this exit, booleans of shape `(rows,)`."""
        return evidence.nobody | (exit_index == self.exit_index)


Policy = ThresholdPolicy | ForcedPolicy
