"""The promise of risk control: exact p-values, and by simulation that the bound is kept as often as promised."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive.calibration import risk_control
from hf_adaptive.calibration.exit_table import ExitTable
from hf_adaptive.calibration.p_values import (
    accuracy_drop_p_value,
    binomial_cdf,
    binomial_upper_limit,
    critical_disagreements,
    disagreement_p_value,
    passes_accuracy_drop,
)
from hf_adaptive.calibration.risk_control import (
    candidate_settings,
    examples_needed,
    find_guaranteed_thresholds,
    split_examples,
)
from hf_adaptive.calibration.threshold_search import find_thresholds
from hf_adaptive.calibration.wishes import make_wish
from tests.calibration.simulated import golden_cascade, simulated_exits

CONFIDENCE = 0.95
DELTA = 1 - CONFIDENCE
DROP = make_wish(max_accuracy_drop=0.01)
DISAGREEMENT = make_wish(max_disagreement=0.02)


def binomial(trials, successes, probability):
    return math.comb(trials, successes) * probability**successes * (1 - probability) ** (trials - successes)


def trinomial(trials, losses, gains, loss_rate, gain_rate):
    ways = math.comb(trials, losses) * math.comb(trials - losses, gains)
    rest = max(0.0, 1 - loss_rate - gain_rate)
    return ways * loss_rate**losses * gain_rate**gains * rest ** (trials - losses - gains)


@settings(deadline=None)
@given(trials=st.integers(1, 60), probability=st.floats(0.001, 0.999), data=st.data())
def test_binomial_tail(trials, probability, data):
    successes = data.draw(st.integers(0, trials))
    expected = sum(binomial(trials, k, probability) for k in range(successes + 1))
    assert binomial_cdf(successes, trials, probability) == pytest.approx(expected, rel=1e-9, abs=1e-14)


@settings(deadline=None)
@given(trials=st.integers(1, 3000), gamma=st.sampled_from([0.001, 0.005, 0.1]), data=st.data())
def test_upper_limit_is_exact_and_never_too_low(trials, gamma, data):
    successes = data.draw(st.integers(0, trials - 1))
    limit = binomial_upper_limit(successes, trials, gamma)
    assert binomial_cdf(successes, trials, limit) == pytest.approx(gamma, rel=1e-8)


def test_critical_count_is_the_last_that_passes():
    for num_examples, bound in ((149, 0.02), (500, 0.02), (3000, 0.1), (10_000, 0.005)):
        critical = critical_disagreements(num_examples, bound, DELTA)
        assert disagreement_p_value(critical, num_examples, bound) <= DELTA
        assert disagreement_p_value(critical + 1, num_examples, bound) > DELTA


@settings(deadline=None, max_examples=30)
@given(num_examples=st.sampled_from([300, 2000, 30_000]), bound=st.sampled_from([0.005, 0.02, 0.1]), data=st.data())
def test_many_accuracy_tests_at_once_equal_single_ones(num_examples, bound, data):
    counts = st.lists(st.integers(0, num_examples // 4), min_size=5, max_size=5)
    losses, gains = data.draw(counts), data.draw(counts)
    at_once = passes_accuracy_drop(torch.tensor(losses), torch.tensor(gains), num_examples, bound, DELTA)
    single = [
        accuracy_drop_p_value(loss, gain, num_examples, bound, DELTA) <= DELTA
        for loss, gain in zip(losses, gains, strict=True)
    ]
    assert at_once.tolist() == single


@pytest.mark.parametrize("bound", [0.1, 0.2])
def test_accuracy_test_errs_at_most_as_often_as_allowed_by_complete_enumeration(bound):
    num_examples = 60
    counts = [(a, b) for a in range(num_examples + 1) for b in range(num_examples + 1 - a)]
    passing = [pair for pair in counts if accuracy_drop_p_value(*pair, num_examples, bound, DELTA) <= DELTA]
    assert passing
    for changed, excess in itertools.product([bound, 0.15, 0.25, 0.4, 0.5, 0.8, 1.0], [0.0, 0.02]):
        drop = bound + excess
        if changed < drop:
            continue
        loss_rate, gain_rate = (changed + drop) / 2, (changed - drop) / 2
        error = sum(trinomial(num_examples, a, b, loss_rate, gain_rate) for a, b in passing)
        assert error <= DELTA + 1e-12


def test_accuracy_test_uses_gains():
    # Clipping gains to 0 would have to show a loss rate below 1 %; 80 losses in 5,000 are 1.6 %.
    assert accuracy_drop_p_value(80, 75, 5000, 0.01, DELTA) <= DELTA
    assert disagreement_p_value(80, 5000, 0.01) > 0.99


@pytest.mark.parametrize("wish", [DROP, DISAGREEMENT], ids=str)
def test_too_few_examples_are_refused_with_the_number_needed(wish):
    needed = examples_needed(wish, CONFIDENCE)
    agreeing = ExitTable.from_predictions(
        torch.rand(needed, 2), torch.zeros(needed, 2), [0.5, 1.0], torch.zeros(needed), lowest_score=0.0
    )
    choice = find_guaranteed_thresholds(agreeing, wish, CONFIDENCE)
    assert choice.thresholds == (0.0,)
    assert choice.guarantee.p_value <= DELTA
    with pytest.raises(ValueError, match=f"at least {needed} examples .* got {needed - 1}"):
        find_guaranteed_thresholds(agreeing.select(torch.arange(needed - 1)), wish, CONFIDENCE)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("wish", [DROP, DISAGREEMENT], ids=str)
def test_number_needed_has_a_closed_form(wish, confidence):
    assert examples_needed(wish, confidence) == math.ceil(math.log(1 - confidence) / math.log(1 - wish.bound))


@pytest.mark.parametrize("wish", [DROP, DISAGREEMENT], ids=str)
def test_answers_that_never_change_pass_with_any_larger_number(wish):
    needed = examples_needed(wish, CONFIDENCE)
    for num_examples in range(needed, 5 * needed, 17):
        table = ExitTable.from_predictions(
            torch.rand(num_examples, 2), torch.zeros(num_examples, 2), [0.5, 1.0], torch.zeros(num_examples)
        )
        assert find_guaranteed_thresholds(table, wish, CONFIDENCE).found


def test_nothing_passes_where_early_exits_never_agree():
    table = ExitTable.from_predictions(torch.rand(2000, 3), torch.tensor([[0, 0, 1]] * 2000), [0.3, 0.6, 1.0])
    wish = make_wish(max_disagreement=0.002)
    for candidates in (None, [(0.5, 0.5), (0.1, 0.1)]):
        choice = find_guaranteed_thresholds(table, wish, CONFIDENCE, candidates)
        assert not choice.found
        assert choice.thresholds == (None, None)
        assert choice.measured.mean_cost == 1.0


def test_testing_stops_at_the_first_candidate_that_fails():
    predictions = torch.tensor([[0, 0]] * 900 + [[1, 0]] * 100)
    scores = torch.cat([torch.linspace(0.6, 0.9, 900), torch.full((100,), 0.5)])[:, None].expand(1000, 2)
    table = ExitTable.from_predictions(scores, predictions, [0.5, 1.0])
    choice = find_guaranteed_thresholds(table, DISAGREEMENT, CONFIDENCE, [(0.8,), (0.4,), (0.6,)])
    assert choice.thresholds == (0.8,)
    assert choice.per_exit


def test_result_is_plain_data():
    choice = find_guaranteed_thresholds(simulated_exits(1000), DROP, CONFIDENCE)
    data = json.loads(json.dumps(choice.to_dict()))
    assert data["guarantee"]["confidence"] == 0.95
    assert data["guarantee"]["num_testing"] == 1000
    assert data["guarantee"]["p_value"] <= DELTA


def test_the_promise_costs_something():
    table = simulated_exits(2000)
    for wish in (DROP, DISAGREEMENT):
        promised = find_guaranteed_thresholds(table, wish, CONFIDENCE).measured.mean_cost
        assert find_thresholds(table, wish).measured.mean_cost <= promised < 0.6


def test_split_is_a_partition_and_does_not_follow_the_order():
    tuning, testing = split_examples(900)
    assert torch.cat([tuning, testing]).sort().values.equal(torch.arange(900))
    assert len(testing) == 600
    assert 350 < testing.double().mean() < 550
    assert split_examples(900)[0].equal(tuning)


@pytest.mark.parametrize(
    ("wish", "arguments", "message"),
    [
        (make_wish(target_cost=0.5), {"confidence": 0.95}, "got target_cost=0.5"),
        (make_wish(max_disagreement=0.0), {"confidence": 0.95}, "above 0, got max_disagreement=0"),
        (DISAGREEMENT, {"confidence": 1.0}, "confidence must lie between 0 and 1"),
        (DISAGREEMENT, {"confidence": 95}, r"Did you mean 0\.95"),
    ],
)
def test_bad_requests_are_refused(wish, arguments, message):
    with pytest.raises(ValueError, match=message):
        find_guaranteed_thresholds(simulated_exits(1000), wish, **arguments)


def test_labels_are_required_where_accuracy_counts():
    table = ExitTable.from_predictions(torch.rand(1000, 2), torch.zeros(1000, 2), [0.5, 1.0])
    with pytest.raises(ValueError, match="needs labels"):
        find_guaranteed_thresholds(table, DROP, CONFIDENCE)


def test_splitting_needs_examples_on_both_sides():
    with pytest.raises(ValueError, match="testing_share=0"):
        split_examples(100, testing_share=0)


# Simulation. The pool is the whole population: calibration sets are drawn from it with replacement, so the risk on the
# pool is exactly the risk on new data that the promise is about, without the noise of a finite test set.

DRAWS = 1000


@pytest.fixture
def decides_only(monkeypatch):
    """How many examples would do takes longest to say, and plays no part in what is decided."""
    monkeypatch.setattr(risk_control._Test, "examples_wanted", lambda self: None)


# 5 % and three binomial standard errors of 1,000 draws.
MOST_VIOLATIONS = 0.05 + 3 * math.sqrt(0.05 * 0.95 / DRAWS)


def draw(pool, num_examples, generator):
    return pool.select(torch.randint(pool.num_examples, (num_examples,), generator=generator))


def summary(pool, wish, choices):
    """Share of the choices that violate the bound on the pool, and the mean saving against running everything."""
    points = [pool.measure(choice.thresholds) for choice in choices]
    risks = [point.disagreement if wish.name == "max_disagreement" else point.accuracy_drop for point in points]
    violations = sum(risk > wish.bound + 1e-12 for risk in risks) / len(risks)
    return violations, 1 - sum(point.mean_cost for point in points) / len(points) / pool.costs[-1].item()


@pytest.mark.parametrize("wish", [DROP, DISAGREEMENT], ids=str)
def test_promise_is_kept_with_a_shared_threshold(wish, decides_only):
    pool, generator = simulated_exits(4000), torch.Generator().manual_seed(1)
    calibrations = (draw(pool, 1000, generator) for _ in range(DRAWS))
    choices = [find_guaranteed_thresholds(testing, wish, CONFIDENCE) for testing in calibrations]
    violations, saving = summary(pool, wish, choices)
    assert violations <= MOST_VIOLATIONS
    assert saving > 0.5


@pytest.mark.parametrize("wish", [DROP, DISAGREEMENT], ids=str)
def test_promise_is_kept_with_one_threshold_per_exit(wish, decides_only):
    # It holds for every outcome of the tuning, so five of them serve two hundred draws each.
    pool, generator = simulated_exits(4000), torch.Generator().manual_seed(2)
    choices = []
    for _ in range(5):
        candidates = candidate_settings(draw(pool, 500, generator), wish)
        calibrations = (draw(pool, 1000, generator) for _ in range(DRAWS // 5))
        choices += [find_guaranteed_thresholds(testing, wish, CONFIDENCE, candidates) for testing in calibrations]
    violations, saving = summary(pool, wish, choices)
    assert violations <= MOST_VIOLATIONS
    assert saving > 0.45


@pytest.mark.parametrize("wish", [make_wish(max_accuracy_drop=0.05), make_wish(max_disagreement=0.1)], ids=str)
def test_promise_is_kept_with_the_golden_cascade(wish, decides_only):
    pool, generator = golden_cascade(), torch.Generator().manual_seed(3)
    calibrations = (draw(pool, 300, generator) for _ in range(DRAWS))
    choices = [find_guaranteed_thresholds(testing, wish, CONFIDENCE) for testing in calibrations]
    violations, saving = summary(pool, wish, choices)
    assert violations <= MOST_VIOLATIONS
    assert saving > 0.04


def test_without_the_promise_the_bound_is_missed_often():
    pool, generator = simulated_exits(4000), torch.Generator().manual_seed(1)
    choices = [find_thresholds(draw(pool, 1000, generator), DISAGREEMENT) for _ in range(200)]
    violations, _ = summary(pool, DISAGREEMENT, choices)
    assert violations > 0.3


def surest_is_wrong(num_examples):
    """Two exits that agree but for one answer in 400, the surest one among them."""
    scores = torch.rand(num_examples, 2, generator=torch.Generator().manual_seed(0))
    agrees = torch.ones(num_examples, 2, dtype=torch.bool)
    agrees[scores[:, 0].topk(num_examples // 400).indices[-1], 0] = False
    agrees[: num_examples // 400 - 1, 0] = False
    return ExitTable(scores, agrees, torch.tensor([0.5, 1.0]), lowest_score=0.0)


def test_says_how_many_examples_would_do_where_nothing_passes():
    wish = make_wish(max_disagreement=0.01)
    choice = find_guaranteed_thresholds(surest_is_wrong(400), wish, CONFIDENCE)
    assert not choice.found
    # The smallest n on which one disagreement in 400 passes the exact test.
    enough = choice.examples_wanted
    assert binomial_cdf(math.ceil(enough / 400), enough, 0.01) <= DELTA
    assert binomial_cdf(math.ceil((enough - 1) / 400), enough - 1, 0.01) > DELTA
    more = find_guaranteed_thresholds(surest_is_wrong(2000), wish, CONFIDENCE)
    assert more.found
    assert more.examples_wanted is None


@pytest.mark.parametrize("losses", [32, 36])
def test_never_says_that_as_many_would_do_as_did_not(losses):
    """The surest answers lose, all at one threshold, and the least sure ones gain: it fails before it passes."""
    scores = torch.linspace(1, 0, 4000).repeat(2, 1).T.contiguous()
    scores[:losses] = 1
    correct = torch.ones(4000, 2, dtype=torch.bool)
    correct[:losses, 0] = False
    correct[-losses:, 1] = False
    agrees = correct[:, :1] == correct
    table = ExitTable(scores, agrees, torch.tensor([0.5, 1.0]), correct, lowest_score=0.0)
    choice = find_guaranteed_thresholds(table, make_wish(max_accuracy_drop=0.01), CONFIDENCE)
    assert not choice.found
    assert choice.examples_wanted > 4000


def test_more_examples_do_not_help_where_every_saving_costs_too_much():
    table = simulated_exits(2000, seed=1)
    hopeless = ExitTable(torch.zeros_like(table.scores), table.agrees, table.costs, table.correct, lowest_score=0.0)
    choice = find_guaranteed_thresholds(hopeless, make_wish(max_disagreement=0.01), CONFIDENCE)
    assert not choice.found
    assert choice.examples_wanted is None


# A model that was changed (quantised) after its training, against the model that it was made from.


def quantised_exits(num_examples, noise, seed=0):
    """As `simulated_exits`, with noise on every margin; the bound is about the last exit without it."""
    plain = simulated_exits(num_examples, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    labels = plain.correct[:, -1]  # in units of "is the reference right", two classes
    margin = torch.logit(plain.scores.clamp(max=1 - 1e-9)) * (2 * plain.agrees.double() - 1)
    noisy = margin + noise * torch.randn(margin.shape, generator=generator, dtype=margin.dtype)
    agrees = noisy > 0
    return ExitTable(
        torch.sigmoid(noisy.abs()),
        agrees,
        plain.costs,
        correct=agrees == labels.unsqueeze(1),
        lowest_score=0.0,
        reference_correct=labels,
    )


@pytest.mark.parametrize("wish", [DROP, DISAGREEMENT], ids=str)
@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_promise_against_a_reference_covers_the_change(wish, noise, decides_only):
    """With the larger noise the changed model alone loses about as much as the wish allows, or more."""
    pool, generator = quantised_exits(4000, noise), torch.Generator().manual_seed(4)
    calibrations = (draw(pool, 1000, generator) for _ in range(DRAWS))
    choices = [find_guaranteed_thresholds(testing, wish, CONFIDENCE) for testing in calibrations]
    promised = [choice for choice in choices if choice.full_model_keeps]
    points = [pool.measure(choice.thresholds) for choice in promised]
    risks = [point.disagreement if wish.name == "max_disagreement" else point.accuracy_drop for point in points]
    broken = sum(risk > wish.bound + 1e-12 for risk in risks)
    assert broken <= MOST_VIOLATIONS * DRAWS
    assert all(not choice.found for choice in choices if not choice.full_model_keeps)
    if noise == 0.05:
        assert sum(choice.found for choice in choices) > 0.9 * DRAWS


def test_a_change_that_breaks_the_wish_alone_is_reported():
    pool = quantised_exits(3000, noise=2.0)
    for wish in (DROP, DISAGREEMENT):
        for choice in (
            find_guaranteed_thresholds(pool, wish, CONFIDENCE),
            find_guaranteed_thresholds(pool, wish, CONFIDENCE, [(0.9, 0.9, 0.9)]),
        ):
            assert not choice.full_model_keeps
            assert not choice.found
            assert choice.thresholds == (None, None, None)
            assert choice.measured.disagreement > 0.02
    assert not find_thresholds(pool, make_wish(max_disagreement=0.001)).full_model_keeps
