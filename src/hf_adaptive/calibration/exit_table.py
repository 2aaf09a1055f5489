"""Which exit every example would take, worked out on stored outputs of all exits instead of by running the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

Thresholds = tuple[float | None, ...]


@dataclass(frozen=True)
class OperatingPoint:
    """What one setting of the thresholds does to a set of examples.

    Attributes:
        mean_cost: mean over the examples of the cost of the exit taken.
        disagreement: share of examples whose answer differs from the last exit's (from the reference's, where there is
            one), between 0 and 1.
        exit_shares: share of the examples that leave at each exit.
        num_examples: how many examples it was measured on.
        accuracy: share of right answers; None without labels.
        accuracy_drop: accuracy of the last exit (or the reference) minus `accuracy`; negative if leaving early helps.
    """

    mean_cost: float
    disagreement: float
    exit_shares: tuple[float, ...]
    num_examples: int
    accuracy: float | None = None
    accuracy_drop: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class ExitTable:
    """All that calibration needs to know about a data set that was run through every exit.

    Attributes:
        scores: `(examples, exits)`, higher = readier to leave (a criterion whose signal works the other way round is
            mapped before). NaN never leaves. The last column is not used.
        agrees: `(examples, exits)` bool: same answer as the last exit, whose column is all true; or, of a model that
            was changed after the training, as the last exit of its reference.
        costs: `(exits,)` cost of an example that leaves at each exit, ascending: the fraction of the layers run, and
            for a cascade the sum over the members run, which may exceed 1, as it may with branches.
        correct: `(examples, exits)` bool: right answer; None when there are no labels.
        lowest_score: the lowest score possible, if there is one: a threshold there makes everything leave.
        branch_costs: `(exits,)` the part of the costs after each exit that is saved where its threshold is None: its
            branch. `measure` leaves it out; a search does not know of it, so that what it finds costs no more than it
            says.
        reference_correct: `(examples,)` bool: where the reference is right; None where it is the own last exit.

    Raises:
        ValueError: shapes that do not fit, infinite scores, costs that do not ascend.
    """

    scores: Tensor
    agrees: Tensor
    costs: Tensor
    correct: Tensor | None = None
    lowest_score: float | None = None
    branch_costs: Tensor | None = None
    reference_correct: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", self.scores.detach().to("cpu", torch.float64))
        object.__setattr__(self, "costs", self.costs.detach().to("cpu", torch.float64))
        self._check_scores()
        self._check_costs()
        for name in ("agrees", "correct"):
            self._check_answers(name)

    @classmethod
    def from_predictions(
        cls,
        scores: Tensor,
        predictions: Tensor,
        costs: Sequence[float],
        labels: Tensor | None = None,
        lowest_score: float | None = None,
    ) -> ExitTable:
        """From the answers of all exits.

        Args:
            scores: `(examples, exits)`, see [`ExitTable`].
            predictions: `(examples, exits)` classes, or `(examples, exits, labels)` zeros and ones for a multi-label
                problem, where an answer is the whole set of labels.
            costs: one per exit, ascending.
            labels: `(examples,)`, or `(examples, labels)`; None when there are none.
            lowest_score: see [`ExitTable`].
        """
        expected = predictions.shape[:1] + predictions.shape[2:]
        if labels is not None and labels.shape != expected:
            raise ValueError(
                f"labels must have the shape {tuple(expected)} to go with predictions of shape "
                f"{tuple(predictions.shape)}, got {tuple(labels.shape)}."
            )
        return cls(
            scores=scores,
            agrees=_same_answer(predictions, predictions[:, -1]),
            costs=torch.as_tensor(costs, dtype=torch.float64),
            correct=None if labels is None else _same_answer(predictions, labels),
            lowest_score=lowest_score,
        )

    @property
    def num_examples(self) -> int:
        return self.scores.shape[0]

    @property
    def num_exits(self) -> int:
        return self.scores.shape[1]

    @property
    def correct_to_match(self) -> Tensor | None:
        """`(examples,)` bool: where that is right against which accuracy is lost; None without labels."""
        if self.correct is None or self.reference_correct is not None:
            return self.reference_correct
        return self.correct[:, -1]

    @property
    def run_everything(self) -> Thresholds:
        """The setting in which every example goes to the last exit."""
        return (None,) * (self.num_exits - 1)

    def select(self, examples: Tensor) -> ExitTable:
        """The rows with these indexes `(k,)`, in this order."""
        names = ("scores", "agrees", "correct", "reference_correct")
        rows: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[examples] for name in names
        }
        return replace(self, **rows)

    def measure(self, thresholds: Sequence[float | None]) -> OperatingPoint:
        """Cost and quality of a setting, one threshold for every exit but the last (see [`take_exits`])."""
        taken = take_exits(self.scores, thresholds)
        accuracy = accuracy_drop = None
        if self.correct is not None and self.correct_to_match is not None:
            accuracy = _share_at(self.correct, taken)
            accuracy_drop = self.correct_to_match.double().mean().item() - accuracy
        return OperatingPoint(
            mean_cost=self._costs_under(thresholds)[taken].mean().item(),
            disagreement=1 - _share_at(self.agrees, taken),
            exit_shares=tuple((torch.bincount(taken, minlength=self.num_exits).double() / self.num_examples).tolist()),
            num_examples=self.num_examples,
            accuracy=accuracy,
            accuracy_drop=accuracy_drop,
        )

    def saves(self, thresholds: Sequence[float | None]) -> bool:
        """Whether rows may leave early, and it costs no more than the last exit alone, without any branch."""
        passed = 0.0 if self.branch_costs is None else self.branch_costs.sum().item()
        limit = self.costs[-1].item() - passed + 1e-9
        return tuple(thresholds) != self.run_everything and self.measure(thresholds).mean_cost <= limit

    def _costs_under(self, thresholds: Sequence[float | None]) -> Tensor:
        if self.branch_costs is None or tuple(thresholds) == self.run_everything:
            return self.costs
        saved = torch.tensor([*(threshold is None for threshold in thresholds), False]) * self.branch_costs
        return self.costs - (saved.cumsum(0) - saved)

    def _check_scores(self) -> None:
        if self.scores.ndim != 2 or self.scores.shape[0] < 1 or self.scores.shape[1] < 2:
            raise ValueError(
                "scores must have the shape (examples, exits) with at least one example and two exits, got "
                f"{tuple(self.scores.shape)}."
            )
        if self.scores[:, :-1].isinf().any():
            raise ValueError("scores must be finite or NaN (which never leaves), got an infinite one.")

    def _check_costs(self) -> None:
        costs = self.costs.tolist()
        if self.costs.shape != (self.num_exits,) or not costs[0] >= 0 or (self.costs.diff() <= 0).any():
            raise ValueError(
                f"costs must be {self.num_exits} ascending numbers, one per exit, none of them negative, got {costs}."
            )

    def _check_answers(self, name: str) -> None:
        answers = getattr(self, name)
        if answers is None:
            return
        if answers.shape != self.scores.shape or answers.dtype != torch.bool:
            raise ValueError(
                f"{name} must be a bool tensor of the shape {tuple(self.scores.shape)} of the scores, got "
                f"{answers.dtype} {tuple(answers.shape)}."
            )
        object.__setattr__(self, name, answers.detach().cpu())


def take_exits(scores: Tensor, thresholds: Sequence[float | None]) -> Tensor:
    """The exit that every example takes: the first whose score reaches its threshold, else the last.

    Args:
        scores: `(examples, exits)`, higher = readier to leave; NaN never leaves; the last column is not used.
        thresholds: one for every exit but the last; None = nobody leaves there.

    Returns:
        Tensor: `(examples,)` int64, indexes of exits.
    """
    if len(thresholds) != scores.shape[1] - 1:
        raise ValueError(
            f"thresholds must be {scores.shape[1] - 1} numbers or None, one for every exit but the last, got "
            f"{len(thresholds)}."
        )
    leaves = torch.ones(scores.shape, dtype=torch.bool)
    for exit_index, threshold in enumerate(thresholds):
        # In float64, so that a threshold between two scores is not rounded onto one of them.
        leaves[:, exit_index] = False if threshold is None else scores[:, exit_index].double() >= threshold
    return leaves.int().argmax(dim=1)


def _share_at(answers: Tensor, taken: Tensor) -> float:
    return answers.gather(1, taken[:, None]).double().mean().item()


def _same_answer(predictions: Tensor, reference: Tensor) -> Tensor:
    same = predictions == reference.unsqueeze(1)
    return same.flatten(2).all(-1) if same.ndim > 2 else same
