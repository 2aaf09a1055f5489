"""Speed–accuracy curves of several seeds and methods on common costs.

A curve is measured at some settings of the thresholds; between two of them it is a straight line, because choosing
between both settings at random gives every cost and score on that line. No setting is chosen by its score: that would
be a choice on the data that the score is measured on.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Points between which an area is a sum of trapezoids.
_AREA_POINTS = 2001


@dataclass(frozen=True)
class Band:
    """A mean over seeds and where it lies with some confidence.

    Args:
        mean, lower, upper (`np.ndarray` of any one shape): `lower` and `upper` are NaN with a single seed.
    """

    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True)
class BestInterval:
    """A range of costs in which one method has the highest score.

    Args:
        start, end (`float`): First and last cost of the grid in the range.
        method (`str`): The method.
    """

    start: float
    end: float
    method: str


def interpolate(costs: Sequence[float], scores: Sequence[float], grid: Sequence[float] | np.ndarray) -> np.ndarray:
    """A curve's score at other costs.

    Settings of the same cost count as their mean. Below the cheapest setting there is no score; above the dearest one,
    its score: nobody has to spend more.

    Args:
        costs (`Sequence[float]` of length `points`): Measured costs, in any order.
        scores (`Sequence[float]` of length `points`): Their scores.
        grid (`Sequence[float]` or `np.ndarray`): Where the score is wanted.

    Returns:
        `np.ndarray` of shape `(grid,)`: NaN below the cheapest setting.

    Raises:
        ValueError: No points, lists of different lengths, or a number that is not finite.
    """
    if len(costs) != len(scores) or len(costs) == 0:
        raise ValueError(f"a curve needs as many costs as scores, at least one, got {len(costs)} and {len(scores)}.")
    if not (np.isfinite(costs).all() and np.isfinite(scores).all()):
        raise ValueError("costs and scores must be finite: leave out the points that could not be measured.")
    distinct, places = np.unique(np.asarray(costs, dtype=float), return_inverse=True)
    means = np.bincount(places, weights=np.asarray(scores, dtype=float)) / np.bincount(places)
    return np.interp(np.asarray(grid, dtype=float), distinct, means, left=math.nan)


def mean_band(values: Sequence[Sequence[float]] | np.ndarray, confidence: float = 0.95) -> Band:
    """The mean over seeds with its interval by Student's t: mean ± t · s / √seeds, with seeds − 1 degrees of freedom.

    Seeds are taken as independent draws with normal errors. For a difference between two methods give the differences,
    seed by seed (a paired interval).

    Args:
        values (`np.ndarray` of shape `(seeds, ...)`): One row a seed.
        confidence (`float`): Share of such intervals that hold the true mean, between 0 and 1.

    Raises:
        ValueError: No seeds, or a confidence that is not between 0 and 1.
    """
    values = np.asarray(values, dtype=float)
    if values.shape[0] == 0:
        raise ValueError("there are no seeds: give at least one row of values.")
    seeds = values.shape[0]
    mean = values.mean(axis=0)
    if seeds == 1:
        nothing_known = np.full_like(mean, math.nan)
        return Band(mean, nothing_known, nothing_known)
    half = t_quantile(confidence, seeds - 1) * values.std(axis=0, ddof=1) / math.sqrt(seeds)
    return Band(mean, mean - half, mean + half)


def t_quantile(confidence: float, freedom: int) -> float:
    """The t for which a value of Student's distribution lies within ±t with this probability.

    Args:
        confidence (`float`): Between 0 and 1.
        freedom (`int`): Degrees of freedom, at least 1.

    Raises:
        ValueError: A value outside these bounds.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}. Use 0.95 for 95 %.")
    if freedom < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {freedom!r}: give two seeds or more.")
    # Bisection over the angle of Abramowitz and Stegun's formulas.
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if _t_probability(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _t_probability(angle: float, freedom: int) -> float:
    """Probability of |t| ≤ √freedom · tan(angle) (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom % 2:
        term, total = cosine, 0.0
        for k in range(1, freedom - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        return 2 / math.pi * (angle + sine * total)
    term, total = 1.0, 0.0
    for k in range(0, freedom, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return sine * total


def area_over_costs(costs: Sequence[float], scores: Sequence[float], low: float, high: float) -> float:
    """Mean score of a curve over a range of costs, all costs counting alike (the area divided by the range).

    Args:
        costs, scores: As for [`interpolate`].
        low, high (`float`): The range.

    Returns:
        `float`: NaN if the curve does not reach down to `low`.

    Raises:
        ValueError: An empty range.
    """
    return _area(costs, scores, _range(low, high))


def area_over_speeds(costs: Sequence[float], scores: Sequence[float], slow: float, fast: float) -> float:
    """Mean score of a curve over a range of speeds (1 / cost: how many times as fast), all speeds counting alike.

    Args:
        costs, scores: As for [`interpolate`].
        slow, fast (`float`): The range, above 0.

    Returns:
        `float`: NaN if the curve does not reach `fast`.

    Raises:
        ValueError: An empty range, or speeds of 0 or less.
    """
    if not slow > 0:
        raise ValueError(f"speeds must be above 0, got slow={slow!r}.")
    return _area(costs, scores, 1 / _range(slow, fast))


def _range(low: float, high: float) -> np.ndarray:
    if not low < high:
        raise ValueError(f"the range must go from a smaller to a larger number, got {low!r} to {high!r}.")
    return np.linspace(low, high, _AREA_POINTS)


def _area(costs: Sequence[float], scores: Sequence[float], grid: np.ndarray) -> float:
    values = interpolate(costs, scores, grid)
    return float((values[1:] + values[:-1]).mean() / 2)


def best_intervals(grid: Sequence[float], scores: Mapping[str, Sequence[float]]) -> list[BestInterval]:
    """Which method has the highest score at which costs.

    Args:
        grid (`Sequence[float]`): Costs, ascending.
        scores (`Mapping[str, Sequence[float]]`): Every method's score at them; NaN where it has none. Of several alike
            the first one named is taken.

    Returns:
        `list[BestInterval]`: Ascending; costs at which no method has a score are left out.

    Raises:
        ValueError: A method with another number of scores.
    """
    for method, values in scores.items():
        if len(values) != len(grid):
            raise ValueError(f"scores of {method!r} must be {len(grid)}, one a cost of the grid, got {len(values)}.")
    winners = [(cost, _best(scores, place)) for place, cost in enumerate(grid)]
    intervals = []
    for method, group in itertools.groupby(winners, key=lambda winner: winner[1]):
        costs = [cost for cost, _ in group]
        if method is not None:
            intervals.append(BestInterval(costs[0], costs[-1], method))
    return intervals


def _best(scores: Mapping[str, Sequence[float]], place: int) -> str | None:
    there = [method for method, values in scores.items() if not math.isnan(values[place])]
    return max(there, key=lambda method: scores[method][place], default=None)
