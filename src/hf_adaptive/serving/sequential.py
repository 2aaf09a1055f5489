"""Tests that may be looked at after every row, all day: the false-alarm rate stated holds for all looks together.

Each is a bet against "nothing has changed": capital starts at 1 and, while nothing has, cannot be expected to grow
(a test martingale). The probability that it ever reaches 1 / rate is at most the rate (Ville 1939; Shafer and Vovk,
Game-Theoretic Foundations for Probability and Finance, 2019; Ramdas et al., Statistical Science 2023).
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

# Parts of [0, 1] on which the drift test bets.
_BINS = 10
# A new bet is opened every so many rows: it learns quickly what has changed since.
_REOPENED = 500
# Bets that are kept; the poorest one is given up for a new one, which only lowers the capital.
_BETS = 16
# Rates, as multiples of the bound, on which the test of a bound bets.
_MULTIPLES = (1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)


class BoundTest:
    """Whether a rate is above a bound: the mean capital of bets on some larger rates, each a likelihood ratio.

    Args:
        bound (`float`): The rate promised, from 0 on, below 1.
        false_alarm_rate (`float`): Probability that the test ever speaks up though the rate is at most the bound.
    """

    def __init__(self, bound: float, false_alarm_rate: float):
        self.bound = max(bound, 1e-6)
        self.false_alarm_rate = false_alarm_rate
        rates = np.array([self.bound * multiple for multiple in _MULTIPLES if self.bound * multiple < 1] or [0.999])
        self._gains = np.log(rates / self.bound), np.log((1 - rates) / (1 - self.bound))
        self._capital = np.zeros(len(rates))
        self.is_broken = False

    def note(self, happened: bool) -> None:
        """One more row."""
        self._capital += self._gains[0] if happened else self._gains[1]
        self.is_broken = self.is_broken or self.log_capital >= -math.log(self.false_alarm_rate)

    @property
    def log_capital(self) -> float:
        """Logarithm of the evidence against the bound."""
        return float(np.logaddexp.reduce(self._capital)) - math.log(len(self._capital))


class DriftTest:
    """Whether rows are still like those that were seen before (at calibration).

    A row's place among all rows seen so far, ties broken by chance, is uniform and independent of the places before it
    as long as all are exchangeable, however few rows there were at calibration (conformal test martingales: Vovk,
    Nouretdinov and Gammerman, ICML 2003). The test bets on a histogram of the places, learned as it goes, and opens
    such bets again and again, so that a change after a million quiet rows is found as soon as one at the start.

    Args:
        counts (`Sequence[int]`): Rows seen before, in cells of some order.
        false_alarm_rate (`float`): Probability that the test ever speaks up though nothing changes.
        seed (`int`): Of the ties.
    """

    def __init__(self, counts: Sequence[int], false_alarm_rate: float, seed: int = 0):
        self.false_alarm_rate = false_alarm_rate
        self.rows = 0
        self.found_after: int | None = None
        self._counts = np.array(counts, dtype=np.int64)
        self._total = int(self._counts.sum())
        self._random = np.random.default_rng(seed)
        self._capital = np.full(_BETS, -np.inf)
        self._seen = np.full((_BETS, _BINS), 0.5)
        self._opened = 0

    def note(self, cells: Iterable[int]) -> None:
        """Some more rows, by their cells."""
        for cell in cells:
            if self.rows % _REOPENED == 0:
                self._open()
            self._bet(min(int(self._place(cell) * _BINS), _BINS - 1))
            self.rows += 1
        if self.found_after is None and self.log_capital >= -math.log(self.false_alarm_rate):
            self.found_after = self.rows

    @property
    def log_capital(self) -> float:
        """Logarithm of the evidence that rows have changed."""
        return float(np.logaddexp.reduce(self._capital))

    def _place(self, cell: int) -> float:
        """The share of rows that are harder, this one counted in."""
        self._counts[cell] += 1
        self._total += 1
        harder = int(self._counts[cell + 1 :].sum())
        return (harder + self._random.random() * int(self._counts[cell])) / self._total

    def _bet(self, place: int) -> None:
        self._capital += np.log(_BINS * self._seen[:, place] / self._seen.sum(axis=1))
        self._seen[:, place] += 1

    def _open(self) -> None:
        """A new bet, with the share of the capital that is set aside for it: 6 / π² · 1 / n² in all is 1."""
        poorest = int(self._capital.argmin())
        self._opened += 1
        self._capital[poorest] = math.log(6) - 2 * math.log(math.pi * self._opened)
        self._seen[poorest] = 0.5


def exact_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper–Pearson interval of a rate.

    Args:
        successes, trials (`int`): Counts.
        confidence (`float`): Probability with which it covers the rate, at least; for one look.
    """
    if trials == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else 1 - _upper_limit(trials - successes, trials, tail)
    return low, 1.0 if successes == trials else _upper_limit(successes, trials, tail)


def _upper_limit(successes: int, trials: int, tail: float) -> float:
    """The rate at which so few successes have the probability `tail`."""
    low, high = successes / trials, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _binomial_cdf(successes, trials, middle) > tail else (low, middle)
    return high


def _binomial_cdf(successes: int, trials: int, rate: float) -> float:
    counts = np.arange(1, successes + 1)
    ratios = np.log((trials - counts + 1) / counts) + math.log(rate) - math.log1p(-rate)
    logs = np.concatenate([[0.0], ratios.cumsum()]) + trials * math.log1p(-rate)
    return float(np.exp(np.logaddexp.reduce(logs)))
