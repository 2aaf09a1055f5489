"""Thresholds with a promise about new data: Learn then Test (Angelopoulos et al. 2021) with fixed-sequence testing.

Used for early exit by CALM (Schuster et al. 2022, section 4) and Jazbec et al. (2024). Candidate settings are put in
an order before the testing examples are looked at, from the dearest to the cheapest, and tested one after another at
the full level δ = 1 − confidence until the first one fails; the last that passed is taken. A setting whose risk is
above the bound is returned only if the first such setting in the order passed its test, which has probability ≤ δ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..modeling.checks import is_number
from .exit_table import ExitTable, Thresholds, take_exits
from .p_values import (
    accuracy_drop_p_value,
    critical_disagreements,
    disagreement_p_value,
    passes_accuracy_drop,
)
from .setting_search import PerExitSearch, SharedPath
from .wishes import Guarantee, ThresholdChoice, Wish, cheapest_above, reward_of, reward_to_match

# Risks, in fractions of the bound, at which the candidates with one threshold per exit are aimed.
NUM_SHARED = 50
LADDER = tuple(step / 10 for step in range(21))
# What is worth more examples: a setting of at most this share of the full cost; and where a search for them ends.
WORTHWHILE = 0.9
MOST_EXAMPLES = 10_000_000


def find_guaranteed_thresholds(
    testing: ExitTable, wish: Wish, confidence: float, candidates: Sequence[Thresholds] | None = None
) -> ThresholdChoice:
    """The cheapest setting for which the wish holds on new data of the same distribution with this confidence.

    Without `candidates` it has one threshold for all exits, and the candidates are *all* thresholds, from the highest
    to the lowest. That order needs no data, so every example serves for testing. It is a continuum, but between two
    neighbouring scores nothing changes, so testing at each operating point tests them all (the argument of Bates et
    al. 2021, theorem 1, without its monotone risk, because every higher threshold has to pass as well).

    The testing examples must be drawn like the new data and must have had no influence on anything that shapes the
    scores or the candidates: fit temperatures (and a learned criterion's range) on other data, see [`split_examples`].

    Args:
        testing: the examples that decide.
        wish: `max_accuracy_drop` or `max_disagreement`, with a bound above 0.
        confidence: above 0, below 1; 0.95 promises that at most one calibration in twenty misses the bound.
        candidates: settings to test in this order, from [`candidate_settings`].

    Returns:
        ThresholdChoice: measured on `testing`; `found=False` with all thresholds None if no setting passed.

    Raises:
        ValueError: a wish that cannot be guaranteed, a confidence out of range, too few examples for any setting to
            pass (says how many are needed), missing labels.
    """
    rule = _Rule(wish, _delta(confidence))
    check_size(testing.num_examples, wish, confidence)
    test = _Test(testing, rule)
    thresholds = test.last_passing_shared() if candidates is None else test.last_passing_of(candidates)
    full_model_keeps = thresholds is not None
    found = thresholds is not None and testing.saves(thresholds)
    if thresholds is None or not found:
        thresholds = testing.run_everything
    guarantee = Guarantee(confidence, test.p_value(thresholds), rule.name, testing.num_examples)
    return ThresholdChoice(
        wish=wish,
        found=found,
        thresholds=thresholds,
        per_exit=candidates is not None,
        measured=testing.measure(thresholds),
        guarantee=guarantee,
        examples_wanted=None if found else test.examples_wanted(),
        full_model_keeps=full_model_keeps,
    )


def candidate_settings(tuning: ExitTable, wish: Wish) -> list[Thresholds]:
    """Settings with one threshold per exit, dearest first, for [`find_guaranteed_thresholds`].

    There is no natural order of such settings, so it is learned on examples of its own (split fixed-sequence testing):
    the trade-off found by the per-exit search, mixed with shared thresholds. Those are cautious settings that change
    few answers and begin the sequence well; the most accurate settings of a search, picked from many, can disappoint
    on new data and would end it at once. The examples spent here are missing for testing: with few of them one
    threshold for all exits often saves more.

    Args:
        tuning: examples that will not be used for testing.
        wish: as in [`find_guaranteed_thresholds`].
    """
    reward = reward_of(tuning, wish)
    full = reward_to_match(tuning, wish).mean().item()
    front = PerExitSearch(tuning, reward).front(cheapest_above(full - step * wish.bound) for step in LADDER)
    settings = {*front, *SharedPath(tuning).spread(NUM_SHARED)}
    return sorted(settings, key=lambda setting: -tuning.measure(setting).mean_cost)


@lru_cache(maxsize=256)
def examples_needed(wish: Wish, confidence: float) -> int:
    """The smallest number of testing examples on which any setting, even one without a single changed answer, passes.

    To leave early on a fair share of the examples takes several times as many.

    Raises:
        ValueError: as [`find_guaranteed_thresholds`] for the wish and the confidence.
    """
    rule = _Rule(wish, _delta(confidence))
    return rule.examples_needed(0.0, 0.0)


def split_examples(num_examples: int, testing_share: float = 2 / 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indexes `(k,)` of tuning and of testing examples, drawn at random (data files are often sorted).

    Raises:
        ValueError: a share that leaves one of the two empty.
    """
    num_testing = round(testing_share * num_examples)
    if not 0 < num_testing < num_examples:
        raise ValueError(
            f"testing_share must leave examples on both sides, got testing_share={testing_share} of {num_examples} "
            "examples."
        )
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    return order[num_testing:], order[:num_testing]


@dataclass(frozen=True)
class _Rule:
    """From counts on n examples to a verdict; a risk above the bound passes with probability at most delta."""

    wish: Wish
    delta: float

    def __post_init__(self) -> None:
        if not self.wish.allows_loss or self.wish.bound == 0:
            raise ValueError(
                f"A confidence can be given for max_accuracy_drop or max_disagreement above 0, got {self.wish}. "
                "Leave confidence out, or ask for such a bound."
            )

    @property
    def name(self) -> str:
        return "exact binomial" if self.wish.name == "max_disagreement" else "exact unconditional, paired answers"

    def p_value(self, worse: int, better: int, num_examples: int) -> float:
        if self.wish.name == "max_disagreement":
            return disagreement_p_value(worse, num_examples, self.wish.bound)
        return accuracy_drop_p_value(worse, better, num_examples, self.wish.bound, self.delta)

    def examples_needed(self, worse: float, better: float, at_least: int = 1) -> int:
        """The smallest number of examples on which these rates of changed answers pass; `MOST_EXAMPLES` if none do."""

        def fails(num_examples: int) -> bool:
            counts = math.ceil(worse * num_examples), math.floor(better * num_examples)
            return self.p_value(*counts, num_examples) > self.delta

        too_few, enough = at_least - 1, at_least
        while fails(enough):
            if enough >= MOST_EXAMPLES:
                return MOST_EXAMPLES
            too_few, enough = enough, min(2 * enough, MOST_EXAMPLES)
        while enough - too_few > 1:
            middle = (enough + too_few) // 2
            too_few, enough = (middle, enough) if fails(middle) else (too_few, middle)
        return enough

    def passes(self, worse: Tensor, better: Tensor, num_examples: int) -> Tensor:
        """The same as p-value ≤ delta, for many counts `(k,)` at once."""
        if self.wish.name == "max_disagreement":
            return worse <= critical_disagreements(num_examples, self.wish.bound, self.delta)
        return passes_accuracy_drop(worse, better, num_examples, self.wish.bound, self.delta)


class _Test:
    """A rule applied to settings of one table."""

    def __init__(self, table: ExitTable, rule: _Rule) -> None:
        reward = reward_of(table, rule.wish)
        change = reward - reward_to_match(table, rule.wish).unsqueeze(1)
        self._table, self._rule = table, rule
        # (examples, exits), 0.0 or 1.0: the answer there is worse, better than the last exit's or the reference's.
        self._worse, self._better = change.clamp_max(0).neg(), change.clamp_min(0)

    def p_value(self, thresholds: Thresholds) -> float:
        return self._rule.p_value(*self._counts(thresholds), self._table.num_examples)

    def last_passing_shared(self) -> Thresholds | None:
        """The cheapest setting before the first that fails; None if that is the first of all, "run everything"."""
        path = SharedPath(self._table)
        worse, better = (path.total(changes).round().long() for changes in (self._worse, self._better))
        failures = (~self._rule.passes(worse, better, self._table.num_examples)).nonzero()
        # Without a reference that one passes: the size was checked.
        passing = int(failures[0]) if len(failures) else len(worse)
        return path.setting(passing - 1) if passing else None

    def last_passing_of(self, candidates: Sequence[Thresholds]) -> Thresholds | None:
        """As [`last_passing_shared`], of settings in this order, after "run everything"."""
        last = None
        for thresholds in (self._table.run_everything, *candidates):
            worse, better = (torch.tensor([count]) for count in self._counts(thresholds))
            if not self._rule.passes(worse, better, self._table.num_examples):
                break
            last = thresholds
        return last

    def examples_wanted(self) -> int | None:
        """About how many examples would let a setting worth having pass, at the rates of changed answers seen here.

        Settings are tested from the dearest on until one fails, so that all before it have to pass, too. None where
        one of them changes more than the bound allows, so that more examples would not help; and where all that are
        looked at here would have passed: one between them did not, and nothing can be said.
        """
        count, dearest = self._table.num_examples, WORTHWHILE * self._table.costs[-1].item()
        wanted = count
        for thresholds in SharedPath(self._table).spread(NUM_SHARED):
            worse, better = self._counts(thresholds)
            risk = worse if self._rule.wish.name == "max_disagreement" else worse - better
            if risk >= self._rule.wish.bound * count:
                return None
            wanted = self._rule.examples_needed(worse / count, better / count, at_least=wanted)
            if self._table.measure(thresholds).mean_cost <= dearest:
                return wanted if wanted > count else None
        return None

    def _counts(self, thresholds: Thresholds) -> tuple[int, int]:
        taken = take_exits(self._table.scores, thresholds)[:, None]
        return int(self._worse.gather(1, taken).sum()), int(self._better.gather(1, taken).sum())


def _delta(confidence: float) -> float:
    if not is_number(confidence) or not 0 < confidence < 1:
        hint = f" Did you mean {confidence / 100:g}?" if is_number(confidence) and 1 < confidence < 100 else ""
        raise ValueError(f"confidence must lie between 0 and 1, both not included, got {confidence!r}.{hint}")
    return 1 - confidence


def check_size(num_testing: int, wish: Wish, confidence: float, num_examples: int | None = None) -> None:
    """Refuses fewer testing examples than [`examples_needed`].

    Args:
        num_examples: of all that the user gave, where the rest shaped temperatures or candidates.
    """
    needed = examples_needed(wish, confidence)
    if num_testing >= needed:
        return
    got = f"got {num_testing}"
    if num_examples is not None and num_examples > num_testing:
        got += f" of your {num_examples}: the rest fits temperatures and suggests thresholds"
    raise ValueError(
        f"{wish} with confidence={confidence:g} needs at least {needed} examples to test on (several times as many to "
        f"save much), {got}. Use more calibration data, a larger bound or a lower confidence."
    )
