"""What a user may ask of the thresholds, and the answer that comes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..modeling.checks import is_number
from .exit_table import ExitTable, OperatingPoint, Thresholds

# Means over examples are compared with this tolerance: far below one example, far above rounding.
TOLERANCE = 1e-9

Objective = Callable[[Tensor, Tensor], Tensor]
"""Value of settings from their mean reward and mean cost, tensors of one shape; −inf where not allowed."""


@dataclass(frozen=True)
class Wish:
    """What the user asked for; made by [`make_wish`].

    Attributes:
        name: `target_cost` (best accuracy at this mean cost), `max_accuracy_drop` (cheapest setting that loses at most
            this much accuracy against the last exit) or `max_disagreement` (cheapest setting with at most this share
            of answers that differ from the last exit's).
        bound: the number asked for, as a fraction.
    """

    name: Literal["target_cost", "max_accuracy_drop", "max_disagreement"]
    bound: float

    @property
    def needs_labels(self) -> bool:
        return self.name != "max_disagreement"

    @property
    def allows_loss(self) -> bool:
        """Whether it bounds what may be lost against the last exit, so that it can be promised; else the cost."""
        return self.name != "target_cost"

    @property
    def in_words(self) -> str:
        """For a reader who knows no names of arguments."""
        bound = f"{100 * self.bound:.3g}"
        if self.name == "target_cost":
            return f"the best accuracy at {bound} % of the layers"
        if self.name == "max_accuracy_drop":
            return f"at most {bound} point{'' if bound == '1' else 's'} of accuracy lost against the last exit"
        if self.name == "max_disagreement":
            return f"at most {bound} % answers other than the last exit's"
        return str(self)  # of a model that another version calibrated

    def __str__(self) -> str:
        return f"{self.name}={self.bound:g}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Guarantee:
    """The promise that comes with a setting found by risk control.

    Attributes:
        confidence: over repeated calibrations, the share in which the bound holds on new data, at least.
        p_value: of "the bound does not hold" for the setting returned; at most 1 − `confidence`.
        test: name of the test that gave it.
        num_testing: examples it was tested on.
    """

    confidence: float
    p_value: float
    test: str
    num_testing: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ThresholdChoice:
    """The answer to a wish.

    Attributes:
        wish: what was asked.
        found: False if nothing grants the wish (or, for a bound on the quality, nothing cheaper than the last exit
            alone does); then every threshold is None and the model runs everything.
        thresholds: one for every exit but the last, on the scale of the scores; None = nobody leaves there.
        per_exit: whether the thresholds were allowed to differ.
        measured: what the setting does on the examples it was chosen (with a guarantee: tested) on.
        guarantee: None if none was asked for.
        full_model_keeps: False where not even all layers run grant the wish: a model that was changed (quantised, say)
            has lost too much against its reference by that alone.
        examples_wanted: where a guarantee was asked for and nothing passed, about how many testing examples would do,
            at the rates of changed answers seen; None if more would not help.
    """

    wish: Wish
    found: bool
    thresholds: Thresholds
    per_exit: bool
    measured: OperatingPoint
    guarantee: Guarantee | None = None
    examples_wanted: int | None = None
    full_model_keeps: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_wish(
    *,
    target_cost: float | None = None,
    max_accuracy_drop: float | None = None,
    max_disagreement: float | None = None,
) -> Wish:
    """Exactly one of the three, checked.

    Args:
        target_cost: above 0; 1 is the cost of all layers of one model (a cascade, or exits with branches, may cost
            more).
        max_accuracy_drop: from 0 up to, not including, 1; half a point is 0.005.
        max_disagreement: from 0 up to, not including, 1.

    Raises:
        ValueError: none or several given, or a value out of its range.
    """
    if target_cost is not None and max_accuracy_drop is None and max_disagreement is None:
        return Wish("target_cost", _checked_cost(target_cost))
    if max_accuracy_drop is not None and target_cost is None and max_disagreement is None:
        return Wish("max_accuracy_drop", _checked_bound("max_accuracy_drop", max_accuracy_drop))
    if max_disagreement is not None and target_cost is None and max_accuracy_drop is None:
        return Wish("max_disagreement", _checked_bound("max_disagreement", max_disagreement))
    raise ValueError(
        f"Give exactly one of target_cost, max_accuracy_drop and max_disagreement, got target_cost={target_cost}, "
        f"max_accuracy_drop={max_accuracy_drop}, max_disagreement={max_disagreement}. For several wishes calibrate "
        "once for each."
    )


def reward_of(table: ExitTable, wish: Wish) -> Tensor:
    """`(examples, exits)` 1.0 where the answer is what the wish cares about (right, or the last exit's), else 0.0.

    Raises:
        ValueError: the wish is about accuracy and there are no labels.
    """
    if not wish.needs_labels:
        return table.agrees.double()
    if table.correct is None:
        raise ValueError(
            f"{wish} is about accuracy and needs labels, which the data does not have. Add labels, or use "
            "max_disagreement, which needs none."
        )
    return table.correct.double()


def reward_to_match(table: ExitTable, wish: Wish) -> Tensor:
    """`(examples,)` the reward of that against which something may be lost: the last exit, or the reference."""
    if not wish.needs_labels or table.correct_to_match is None:
        return torch.ones(table.num_examples, dtype=torch.float64)
    return table.correct_to_match.double()


def objective_of(wish: Wish, table: ExitTable) -> Objective:
    """What a search has to maximise to grant the wish."""
    if not wish.allows_loss:
        return best_below(wish.bound)
    return cheapest_above(reward_to_match(table, wish).mean().item() - wish.bound)


def best_below(cost_limit: float) -> Objective:
    """Highest mean reward at no more than this mean cost; the cost decides between equal rewards."""
    return lambda reward, cost: (reward - TOLERANCE * cost).masked_fill(cost > cost_limit + TOLERANCE, -math.inf)


def cheapest_above(floor: float) -> Objective:
    """Lowest mean cost with no less than this mean reward; the reward decides between equal costs."""
    return lambda reward, cost: (TOLERANCE * reward - cost).masked_fill(reward < floor - TOLERANCE, -math.inf)


def _checked_cost(value: float) -> float:
    if not is_number(value) or value <= 0:
        raise ValueError(f"target_cost must be a positive number (0.4 = 40 % of the layers), got {value!r}.")
    return float(value)


def _checked_bound(name: str, value: float) -> float:
    if not is_number(value) or not 0 <= value < 1:
        hint = f" Did you mean {value / 100:g} ({value:g} %)?" if is_number(value) and 1 <= value < 100 else ""
        raise ValueError(f"{name} must be a fraction, at least 0 and below 1 (0.01 = one point), got {value!r}.{hint}")
    return float(value)
