"""Exact tests of "the risk on new data is above the bound", from counts alone.

Both are super-uniform for every number of independent examples: if the risk is at least the bound, the probability of
a p-value of at most δ is at most δ. No approximation by a normal distribution is involved.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# The share of δ that the accuracy test spends on bounding the unknown rate of changed answers.
NUISANCE_SHARE = 0.1
# Up to this multiple of the smallest sufficient number of examples, gains are too few to be worth that share.
CLIPPING_RANGE = 2.7


def disagreement_p_value(disagreements: int, num_examples: int, bound: float) -> float:
    """Exact binomial test of "the rate of disagreements is at least the bound": P(Binomial(n, bound) ≤ observed)."""
    return binomial_cdf(disagreements, num_examples, bound)


def accuracy_drop_p_value(losses: int, gains: int, num_examples: int, bound: float, delta: float) -> float:
    """Exact unconditional test of "the accuracy drop is at least the bound".

    The loss of an example is 1 (only the last exit is right), −1 (only the exit taken is) or 0. Its variance is the
    rate q of changed examples, which is small; a test for losses on an interval (Hoeffding, Bentkus) does not know it,
    and clipping gains to 0 throws them away, which makes the bound hard to reach when gains nearly balance losses.
    The distribution under the hypothesis depends on q as the only nuisance, handled as in Berger and Boos (1994):
    q is at most its Clopper–Pearson limit with probability 1 − γ, and the p-value is γ plus the largest tail
    probability of the sum of losses over all q up to that limit. That is the tail at the limit itself: raising q at a
    fixed mean changes P(S ≤ s) by n/2 · (P(S' = s + 1) − P(S' = s)), S' the sum of n − 1 losses; for q ≤ 1/2 the
    generating function of a loss has real roots only, so S' + n − 1 is a sum of independent 0/1 variables, whose
    probabilities rise up to the integer part of the mean (Darroch 1964). A mean above the bound lowers the tail.

    With few examples (n · bound < 2.7 · log(1/delta), a rule that looks at no answers) losses alone are tested, which
    is conservative, as gains only lower the risk, but then saves more.

    Args:
        losses, gains: numbers of examples with loss 1 and −1.
        num_examples: n.
        bound: above 0.
        delta: the level at which the p-value will be compared; γ is a tenth of it. (Not data: fix it beforehand.)
    """
    if _ignores_gains(num_examples, bound, delta):
        return disagreement_p_value(losses, num_examples, bound)
    changed = _rounded_up(losses + gains, num_examples)
    gamma = NUISANCE_SHARE * delta
    rate = binomial_upper_limit(changed, num_examples, gamma)
    net = losses - gains
    if net > _largest_provable(num_examples, bound) or rate > 0.5:
        return 1.0
    if rate <= bound:
        return gamma
    first, cumulative = _net_loss_cdf(num_examples, rate, bound)
    return gamma + (cumulative[net - first].item() if net >= first else 0.0)


@lru_cache(maxsize=100_000)
def _critical_net_loss(changed: int, num_examples: int, bound: float, delta: float) -> float:
    """The largest losses − gains that pass when losses + gains = `changed`; −inf if none.

    Falls as `changed` rises, so that rounding `changed` up, which saves time, is on the safe side.
    """
    gamma = NUISANCE_SHARE * delta
    rate = binomial_upper_limit(changed, num_examples, gamma)
    largest = _largest_provable(num_examples, bound)
    if rate > 0.5:
        return -math.inf
    if rate <= bound:
        return largest
    first, cumulative = _net_loss_cdf(num_examples, rate, bound)
    passing = first + int(torch.searchsorted(cumulative, delta - gamma, right=True)) - 1
    return min(passing, largest) if passing >= first else -math.inf


def critical_disagreements(num_examples: int, bound: float, delta: float) -> int:
    """The largest number of disagreements with [`disagreement_p_value`] ≤ delta; −1 if none."""
    return int((_binomial_cdf_table(num_examples, bound) <= delta).sum()) - 1


def passes_accuracy_drop(losses: Tensor, gains: Tensor, num_examples: int, bound: float, delta: float) -> Tensor:
    """Whether [`accuracy_drop_p_value`] ≤ delta, for many pairs of counts at once: `(k,)` each, integers."""
    if _ignores_gains(num_examples, bound, delta):
        return losses <= critical_disagreements(num_examples, bound, delta)
    distinct, index = (losses + gains).unique(return_inverse=True)
    limits = [
        _critical_net_loss(_rounded_up(changed, num_examples), num_examples, bound, delta)
        for changed in distinct.tolist()
    ]
    return losses - gains <= torch.tensor(limits, dtype=torch.float64)[index]


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """P(Binomial(trials, probability) ≤ successes)."""
    if successes >= trials:
        return 1.0
    return min(1.0, _binomial_pmf(successes, trials, probability).sum().item())


def binomial_upper_limit(successes: int, trials: int, gamma: float) -> float:
    """Clopper–Pearson: the probability p with P(Binomial(trials, p) ≤ successes) = gamma, approached from above.

    The logarithm of that tail is concave and falls in p, so Newton steps from above the root stay above it.
    """
    if successes >= trials:
        return 1.0
    limit = _chernoff_upper_limit(successes / trials, trials, gamma)
    for _ in range(50):
        pmf = _binomial_pmf(successes, trials, limit)
        tail = pmf.sum().item()
        slope = -(trials - successes) * pmf[-1].item() / (1 - limit) / tail
        step = (math.log(tail) - math.log(gamma)) / slope
        if step <= 1e-13 * limit:
            break
        limit -= step
    return limit


def _chernoff_upper_limit(share: float, trials: int, gamma: float) -> float:
    """A p above `share` at which the Chernoff bound on the tail, exp(−trials · KL(share, p)), is gamma or less."""
    low, high = share, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if trials * _kl(share, middle) < -math.log(gamma):
            low = middle
        else:
            high = middle
    return min(high, 1 - 1e-12)


def _kl(share: float, probability: float) -> float:
    """Kullback–Leibler divergence between two coins."""
    if probability >= 1:
        return math.inf
    heads = share * math.log(share / probability) if share > 0 else 0.0
    return heads + (1 - share) * math.log((1 - share) / (1 - probability))


def _binomial_pmf(successes: int, trials: int, probability: float) -> Tensor:
    """`(successes + 1,)` P(Binomial = k) for k = 0 … successes."""
    k = torch.arange(successes + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return torch.exp(ways + k * math.log(probability) + (n - k) * math.log1p(-probability))


@lru_cache(maxsize=64)
def _binomial_cdf_table(trials: int, probability: float) -> Tensor:
    return _binomial_pmf(math.ceil(trials * probability), trials, probability).cumsum(0)


@lru_cache(maxsize=2_000)
def _net_loss_cdf(num_examples: int, rate: float, mean: float) -> tuple[int, Tensor]:
    """The first value and the cumulative probabilities of the sum of n losses in {−1, 0, 1}.

    P(±1) = (rate ± mean) / 2. By Fourier transform, on a window of twelve standard deviations and sixty more on either
    side: what lies outside, and would be counted at the wrong place, is below 1e-30 (Bernstein).
    """
    centre = round(num_examples * mean)
    half = min(math.ceil(12 * math.sqrt(num_examples * rate)) + 60, 2 * num_examples + 1)
    size = 2 * half + 1
    angles = 2 * math.pi * torch.arange(size, dtype=torch.float64) / size
    characteristic = torch.complex(1 - rate + rate * angles.cos(), mean * angles.sin())
    probabilities = torch.fft.fft(characteristic**num_examples).real / size
    first = centre - half
    return first, probabilities.roll(-first).clamp_min(0).cumsum(0)


def _ignores_gains(num_examples: int, bound: float, delta: float) -> bool:
    return num_examples * bound < -CLIPPING_RANGE * math.log(delta)


def _largest_provable(num_examples: int, bound: float) -> int:
    """The largest sum of losses up to which the tail is known to rise with the rate of changed examples."""
    # The small number keeps a mean that is a whole number from being rounded below it.
    return math.floor((num_examples - 1) * bound + 1e-9) - 1


def _rounded_up(changed: int, num_examples: int) -> int:
    """Up to the next of a series that is exact to 200 and then grows by 1 %, so that few tests have to be computed."""
    if changed <= 200:
        return changed
    step = math.ceil(math.log(changed / 200) / math.log(1.01) - 1e-9)
    return min(num_examples, max(changed, math.ceil(200 * 1.01**step)))
