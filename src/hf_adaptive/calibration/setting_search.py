"""Searching the settings of the thresholds: one for all exits (exactly), or one per exit."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .exit_table import ExitTable, Thresholds
from .wishes import Objective

Cuts = tuple[int, ...]
"""For every exit but the last, how many examples, those with its highest scores, may leave there."""


class SharedPath:
    """Every operating point that one threshold for all exits can reach, from "run everything" to the cheapest.

    An example has left at exit e or before if the largest of its first e scores reaches the threshold. So with
    M the running maxima of the scores and v any value per example and exit, the sum of v over the exits taken is
    Σ v[:, last] + Σ over all (example, exit) with M ≥ threshold of v[exit] − v[next exit]: one sort gives all points.
    Point 0 is "run everything"; point k is the k-th largest distinct running maximum.
    """

    def __init__(self, table: ExitTable) -> None:
        maxima = _nan_lowest(table.scores[:, :-1]).cummax(dim=1).values
        self._levels = _Levels(maxima.flatten(), table.lowest_score)
        self._num_exits = table.num_exits

    def setting(self, point: int) -> Thresholds:
        return (self._levels.thresholds[point],) * (self._num_exits - 1)

    def spread(self, count: int) -> list[Thresholds]:
        """At most `count` of the settings, evenly over the path and in its order, its first and last among them."""
        last = len(self._levels.thresholds) - 1
        return [self.setting(point) for point in sorted({round(step * last / (count - 1)) for step in range(count)})]

    def total(self, values: Tensor) -> Tensor:
        """`(points,)` sum over the examples of `values (examples, exits)` at the exit each takes."""
        changes = (values[:, :-1] - values[:, 1:]).flatten()
        return values[:, -1].sum() + self._levels.sums_above(changes)

    def mean(self, values: Tensor) -> Tensor:
        return self.total(values) / len(values)


class PerExitSearch:
    """Settings whose thresholds may differ between exits.

    A setting is improved one exit at a time: with the other thresholds fixed, the effect of all values of one
    threshold is a running sum over the examples that get to that exit, so the best value is found exactly in one pass.
    Going from the last exit to the first until nothing improves never makes a setting worse. Starts are the best
    shared threshold, and the settings that maximise reward − price · cost for a range of prices: those lie on the
    convex hull of the trade-off, where the exits do not have to be balanced against each other.

    Args:
        table: the calibration examples.
        reward: `(examples, exits)` what each exit's answer is worth, between 0 and 1.
    """

    # In units of reward per unit of cost: from "hardly matters" to "running all layers is worth ten times the reward".
    PRICES = (0.0, *torch.logspace(-3, 1, 25, dtype=torch.float64).tolist())
    STARTS = 3

    def __init__(self, table: ExitTable, reward: Tensor) -> None:
        self._reward, self._costs = reward, table.costs
        self._scores = table.scores[:, :-1]
        self._levels = [_Levels(column, table.lowest_score) for column in self._scores.unbind(1)]
        self._ranks = torch.stack([levels.ranks for levels in self._levels], dim=1)
        self._shared = SharedPath(table)
        self._shared_points = self._shared.mean(reward), self._shared.mean(table.costs.expand_as(reward))
        self._on_hull = self._maximise_for_all_prices()

    def best(self, objective: Objective) -> Thresholds | None:
        """Best setting found; at least as good as the best shared threshold. None if nothing is allowed."""
        allowed = [cuts for cuts in self._on_hull if self._value(cuts, objective) > -math.inf]
        starts = sorted(allowed, key=lambda cuts: self._value(cuts, objective))[-self.STARTS :]
        shared = self._best_shared(objective)
        if self._value(shared, objective) > -math.inf:
            starts.append(shared)
        if not starts:
            return None
        ends = [self._climb(cuts, objective) for cuts in starts]
        return self._thresholds(max(ends, key=lambda cuts: self._value(cuts, objective)))

    def front(self, objectives: Iterable[Objective]) -> list[Thresholds]:
        """Settings of which none is both cheaper and better than another, the most rewarding (and dearest) first.

        They are taken from the hull and from the best settings for these objectives.
        """
        settings = {self._thresholds(cuts): self._point(cuts) for cuts in self._on_hull}
        for objective in objectives:
            thresholds = self.best(objective)
            if thresholds is not None:
                settings[thresholds] = self._point(self._cuts(thresholds))
        return _undominated(settings)

    def _maximise_for_all_prices(self) -> list[Cuts]:
        found: list[Cuts] = []
        for price in self.PRICES:
            objective = _net_of_price(price / self._costs[-1].item())
            # The setting for the price before is often a better start than the shared threshold, and the reverse.
            starts = {self._best_shared(objective), *found[-1:]}
            ends = [self._climb(cuts, objective) for cuts in starts]
            found.append(max(ends, key=lambda cuts: self._value(cuts, objective)))
        return list(dict.fromkeys(found))

    def _best_shared(self, objective: Objective) -> Cuts:
        return self._cuts(self._shared.setting(int(objective(*self._shared_points).argmax())))

    def _climb(self, cuts: Cuts, objective: Objective) -> Cuts:
        value, improved = self._value(cuts, objective), True
        while improved:
            improved = False
            for exit_index in reversed(range(len(cuts))):
                values = objective(*self._points_along(cuts, exit_index))
                best = int(values.argmax())
                if values[best] > value + 1e-12:
                    value, improved = values[best].item(), True
                    cuts = (*cuts[:exit_index], self._levels[exit_index].cuts[best], *cuts[exit_index + 1 :])
        return cuts

    def _points_along(self, cuts: Cuts, exit_index: int) -> tuple[Tensor, Tensor]:
        """Mean reward and mean cost for every cut of one exit, `(cuts,)` each, the other exits' cuts fixed."""
        without = self._taken((*cuts[:exit_index], 0, *cuts[exit_index + 1 :]))
        gets_here = without > exit_index
        reward = self._reward.gather(1, without[:, None]).squeeze(1)
        cost = self._costs[without]
        reward_change = torch.where(gets_here, self._reward[:, exit_index] - reward, 0.0)
        cost_change = torch.where(gets_here, self._costs[exit_index] - cost, 0.0)
        levels = self._levels[exit_index]
        total_reward = reward.sum() + levels.sums_above(reward_change)
        total_cost = cost.sum() + levels.sums_above(cost_change)
        return total_reward / len(cost), total_cost / len(cost)

    def _point(self, cuts: Cuts) -> tuple[Tensor, Tensor]:
        taken = self._taken(cuts)
        return self._reward.gather(1, taken[:, None]).mean(), self._costs[taken].mean()

    def _value(self, cuts: Cuts, objective: Objective) -> float:
        return objective(*self._point(cuts)).item()

    def _taken(self, cuts: Cuts) -> Tensor:
        leaves = self._ranks < torch.tensor(cuts)
        return torch.cat([leaves, torch.ones(len(leaves), 1, dtype=torch.bool)], dim=1).int().argmax(1)

    def _cuts(self, thresholds: Thresholds) -> Cuts:
        return tuple(
            0 if threshold is None else int((column >= threshold).sum())
            for column, threshold in zip(self._scores.unbind(1), thresholds, strict=True)
        )

    def _thresholds(self, cuts: Cuts) -> Thresholds:
        return tuple(levels.threshold_of_cut(cut) for levels, cut in zip(self._levels, cuts, strict=True))


class _Levels:
    """The distinct values of some scores, highest first, with a threshold below each; level 0 is above them all.

    Attributes:
        thresholds: one per level; None for level 0.
        cuts: how many scores reach each level's threshold.
        ranks: `(scores,)` position of each score in descending order; NaN comes last, behind every cut.
    """

    def __init__(self, scores: Tensor, lowest_score: float | None) -> None:
        ordered, order = _nan_lowest(scores).sort(descending=True, stable=True)
        finite = int(ordered.isfinite().sum())
        self.ranks = torch.empty_like(order)
        self.ranks[order] = torch.arange(len(order))
        ordered, self._order = ordered[:finite], order[:finite]
        last_of_ties = torch.ones(finite, dtype=torch.bool)
        last_of_ties[:-1] = ordered[:-1] > ordered[1:]
        self._ends = last_of_ties.nonzero().squeeze(1)
        self.cuts: list[int] = [0, *(self._ends + 1).tolist()]
        self.thresholds: list[float | None] = [None, *_between(ordered[self._ends], lowest_score)]
        self._threshold_of_cut = dict(zip(self.cuts, self.thresholds, strict=True))

    def threshold_of_cut(self, cut: int) -> float | None:
        return self._threshold_of_cut[cut]

    def sums_above(self, values: Tensor) -> Tensor:
        """`(levels,)` sum of the values of all scores that reach each level's threshold."""
        sums = values[self._order].cumsum(0)[self._ends]
        return torch.cat([sums.new_zeros(1), sums])


def _nan_lowest(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores.isnan(), -math.inf)


def _between(levels: Tensor, lowest_score: float | None) -> list[float]:
    """Thresholds that let each level and those above it leave: midway to the next level where one fits in between."""
    if len(levels) == 0:
        return []
    middles = (levels[:-1] + levels[1:]) / 2
    # A model compares in float32, where the middle of two neighbouring numbers may be rounded onto the lower one.
    middles = torch.where(middles.float().double() > levels[1:], middles, levels[:-1])
    bottom = levels[-1].item() if lowest_score is None else lowest_score
    return [*middles.tolist(), bottom]


def _net_of_price(price: float) -> Objective:
    return lambda reward, cost: reward - price * cost


def _undominated(settings: dict[Thresholds, tuple[Tensor, Tensor]]) -> list[Thresholds]:
    front: list[Thresholds] = []
    best_reward = -math.inf
    for thresholds, (reward, _) in sorted(settings.items(), key=lambda item: (item[1][1].item(), -item[1][0].item())):
        if reward > best_reward:
            front.append(thresholds)
            best_reward = reward.item()
    return front[::-1]
