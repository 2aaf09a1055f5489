"""The promise watched: tests that may be looked at all the time, the audit, and the drift of rows."""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive import calibrate_exits
from hf_adaptive.modeling.exit_profile import DOUBTS
from hf_adaptive.serving import ExitsEngine
from hf_adaptive.serving.sequential import BoundTest, DriftTest, exact_interval
from tests import tiny
from tests.serving.test_engine import rows


def binomial_tail(successes, trials, rate):
    """P(at least so many)."""
    return sum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(successes, trials + 1))


@given(trials=st.integers(1, 60), share=st.floats(0, 1))
def test_the_interval_is_clopper_pearsons(trials, share):
    successes = round(share * trials)
    low, high = exact_interval(successes, trials)
    assert low <= successes / trials <= high
    if successes:
        assert binomial_tail(successes, trials, low) == pytest.approx(0.025, abs=1e-9)
    if successes < trials:
        assert 1 - binomial_tail(successes + 1, trials, high) == pytest.approx(0.025, abs=1e-9)
    assert exact_interval(0, 0) == (0.0, 1.0)


RATE, STREAMS = 0.1, 150
# Of 150 streams 15 may speak up on average; 28 or more do with a probability below 0.001.
MOST = 28


def test_a_bound_that_holds_is_rarely_called_broken_and_one_that_does_not_is_found():
    random = np.random.default_rng(0)
    broken = 0
    for _ in range(STREAMS):
        test = BoundTest(0.05, RATE)
        for happened in random.random(400) < 0.05:
            test.note(bool(happened))
        broken += test.is_broken
    assert broken < MOST
    test = BoundTest(0.05, RATE)
    for happened in random.random(300) < 0.15:
        test.note(bool(happened))
    assert test.is_broken


def reviews(random, count):
    """Cells of rows of one kind."""
    return random.binomial(29, 0.3, count)


def test_no_drift_is_rarely_reported_however_few_rows_were_seen_before():
    random = np.random.default_rng(1)
    alarms = 0
    for seed in range(STREAMS):
        test = DriftTest(np.bincount(reviews(random, 60), minlength=30), RATE, seed)
        for _ in range(12):
            test.note(reviews(random, 50))
        alarms += test.found_after is not None
    assert alarms < MOST


@pytest.mark.parametrize("quiet", [0, 3000])
def test_drift_is_found_soon_early_or_late(quiet):
    random = np.random.default_rng(2)
    test = DriftTest(np.bincount(reviews(random, 1000), minlength=30), 0.01, seed=0)
    test.note(reviews(random, quiet))
    assert test.found_after is None
    for _ in range(10):
        test.note(random.binomial(29, 0.4, 50))
    assert test.found_after <= quiet + 500


@pytest.fixture(scope="module")
def calibrated():
    """A model whose calibration promises that at most a tenth of the answers differ."""
    model = tiny.model("bert")
    calibrate_exits(model, examples(400), max_disagreement=0.2, temperatures=False, show_progress=False)
    return model


def examples(count, seed=0, lengths=(4, 12)):
    generator = np.random.default_rng(seed)
    return rows(generator.integers(*lengths, size=count).tolist(), seed=seed)


def run_all(model, data, **settings):
    with ExitsEngine(model, **settings) as engine:
        for future in [engine.submit(row) for row in data]:
            future.result(30)
        wait_until(lambda: engine.statistics().audit["rows"] == settings.get("audit_share", 0) * len(data))
    return engine.statistics()


def wait_until(is_so):
    while not is_so():
        time.sleep(0.02)


def test_the_audit_counts_answers_that_the_last_exit_would_not_give(calibrated):
    data = examples(200, seed=1)
    done = run_all(calibrated, data, audit_share=1.0)
    early = calibrated.predict(data, show_progress=False).logits.argmax(dim=-1)
    last = calibrated.predict(data, exit_at=tiny.LAYERS, show_progress=False).logits.argmax(dim=-1)
    assert done.audit["rows"] == 200
    assert done.audit["other_answers"] == int((early != last).sum())
    assert done.audit["interval"][0] <= done.audit["rate"] <= done.audit["interval"][1]
    assert done.audit["bound"] == 0.2
    assert not done.audit["is_broken"]
    assert done.answered == 200


@pytest.mark.parametrize("when_broken", ["warn", "tighten", "run_everything"])
def test_a_broken_bound_is_acted_upon(calibrated, when_broken):
    model = tiny.model("bert")
    model.config.exit_thresholds, record = [0.0, 0.0], calibrated.config.exit_calibration
    model.config.exit_calibration = {
        **record,
        "thresholds": [0.0, 0.0],
        "wish": {"name": "max_disagreement", "bound": 0.01},
    }
    data = examples(120, seed=2)
    with ExitsEngine(model, audit_share=1.0, when_broken=when_broken) as engine:
        for row in data:
            engine.submit(row)
        wait_until(lambda: engine.statistics().audit["action"] != "none")
        done = engine.statistics()
        answers = [engine.submit(row).result(30) for row in data]
    exits = {answer.exit_index for answer in answers}
    assert (
        done.audit["action"]
        == {
            "warn": "warned",
            "tighten": "tightened",
            "run_everything": "runs everything",
        }[when_broken]
    )
    assert exits == {"warn": {0}, "tighten": exits, "run_everything": {2}}[when_broken]
    if when_broken == "tighten":
        assert len(exits) > 1


def test_drift_of_rows_is_reported(calibrated):
    same = run_all(calibrated, examples(400, seed=3), audit_share=0)
    assert same.drift["is_watched"]
    assert not same.drift["is_drifting"]
    assert same.drift["rows"] == 400
    assert same.drift["exit_shares"] == pytest.approx(same.drift["expected_shares"], abs=0.1)
    others = [{"input_ids": [number % 2 + 5] * 14} for number in range(400)]
    changed = run_all(calibrated, others, audit_share=0)
    assert changed.drift["found_after"] <= 400


def test_without_a_calibration_it_says_so(calibrated):
    done = run_all(tiny.model("bert"), examples(5), exit_thresholds=0.5, audit_share=1.0)
    assert done.drift["why_not"] == done.audit["bound_from"] == "nothing was calibrated for these thresholds"
    assert done.audit["bound"] is None
    # Other thresholds than the calibrated ones cannot be compared either.
    assert not run_all(calibrated, examples(5), exit_thresholds=0.5, audit_share=0).drift["is_watched"]


def test_settings():
    for name, value in {"audit_share": 2, "when_broken": "panic", "false_alarm_rate": 0}.items():
        with pytest.raises(ValueError, match=name):
            ExitsEngine(tiny.model("bert"), **{name: value})


def test_a_profile_is_checked(calibrated):
    record = calibrated.config.exit_calibration
    for wrong in ([[1]], [[0] * DOUBTS] * 3, [[-1] * DOUBTS] * 3, "many"):
        with pytest.raises(ValueError, match="'profile'"):
            tiny.config("bert", exit_calibration={**record, "profile": wrong})
