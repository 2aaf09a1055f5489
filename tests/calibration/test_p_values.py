"""The exact test of the accuracy drop, step by step in plain Python."""

import math

import pytest
import torch

from hf_adaptive.calibration.p_values import accuracy_drop_p_value, binomial_upper_limit, passes_accuracy_drop

DELTA = 0.05
GAMMA = DELTA / 10


def log_binomial(trials, successes, probability):
    ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
    return ways + successes * math.log(probability) + (trials - successes) * math.log1p(-probability)


def upper_limit(successes, trials):
    """Clopper–Pearson by bisection."""
    low, high = successes / trials, 1 - 1e-12
    for _ in range(100):
        middle = (low + high) / 2
        tail = math.fsum(math.exp(log_binomial(trials, k, middle)) for k in range(successes + 1))
        low, high = (middle, high) if tail > GAMMA else (low, middle)
    return high


def tail_of_net_losses(net, trials, rate, mean):
    """P(losses − gains ≤ net), by how many examples change and, of those, how many are losses."""
    share = (rate + mean) / 2 / rate
    total = 0.0
    for changed in range(trials + 1):
        # losses − (changed − losses) ≤ net
        most = min(changed, (net + changed) // 2)
        log_changed = log_binomial(trials, changed, rate)
        if most < 0 or log_changed < -60:
            continue
        total += math.exp(log_changed) * math.fsum(math.exp(log_binomial(changed, k, share)) for k in range(most + 1))
    return total


def by_hand(losses, gains, trials, bound, counted):
    """With the number of changed examples that bounds the rate."""
    return GAMMA + tail_of_net_losses(losses - gains, trials, upper_limit(counted, trials), bound)


@pytest.mark.parametrize(
    ("losses", "gains", "counted"),
    [
        (60, 50, 110),
        (105, 95, 200),
        # Above 200, up to the next of 200 · 1.01ᵏ: that is a bound on the rate, too, and few tests are computed.
        (105, 96, 202),
        (106, 96, 202),
        (106, 97, 205),
        (105, 100, 207),
    ],
)
def test_p_value_is_the_tail_at_the_limit_of_the_rate(losses, gains, counted):
    trials, bound = 800, 0.03
    expected = by_hand(losses, gains, trials, bound, counted)
    assert GAMMA < expected < 1
    assert accuracy_drop_p_value(losses, gains, trials, bound, DELTA) == pytest.approx(expected, rel=1e-6)


def test_many_changes_prove_nothing_and_need_no_limit():
    assert accuracy_drop_p_value(500, 500, 1000, 0.1, DELTA) == 1.0
    assert not passes_accuracy_drop(torch.tensor([500]), torch.tensor([500]), 1000, 0.1, DELTA).any()


def test_nothing_is_proven_from_one_below_the_mean_on():
    """Up to there the tail is known to rise with the rate of changed answers: (800 - 1) · 0.03 = 23.97."""
    assert accuracy_drop_p_value(60, 38, 800, 0.03, DELTA) < 1
    assert accuracy_drop_p_value(61, 38, 800, 0.03, DELTA) == 1.0


@pytest.mark.parametrize("gamma", [1e-17, 1e-19])
def test_a_limit_that_lies_closer_to_one_than_numbers_can_say(gamma):
    assert 1 - 1.1e-12 <= binomial_upper_limit(99, 100, gamma) < 1
