"""Temperatures and calibration error: parity with the exact minima in the golden numbers, and the edge cases."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_adaptive.calibration.temperature import (
    expected_calibration_error,
    fit_temperature,
    fit_temperatures,
    negative_log_likelihood,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "sweet"


@pytest.fixture(scope="module")
def golden():
    tensors = load_file(GOLDEN / "temperature_scaling.safetensors")
    per_exit = json.loads((GOLDEN / "temperature_scaling.json").read_text())["per_exit"]
    return tensors["logits"], tensors["labels"], per_exit


def test_golden_minimum(golden):
    exit_logits, labels, per_exit = golden
    fits = fit_temperatures(exit_logits.transpose(0, 1), labels)
    assert len(fits) == len(per_exit)
    for fit, expected in zip(fits, per_exit, strict=True):
        assert fit.nll_before == pytest.approx(expected["nll_before"], abs=1e-6)
        assert fit.nll_after == pytest.approx(expected["nll_exact_minimum"], abs=1e-6)
        assert fit.nll_after <= expected["nll_after"] + 1e-6
        assert fit.temperature == pytest.approx(expected["temperature_exact_minimum_float64"], rel=1e-3)
        assert not fit.at_limit
        assert fit.num_examples == 256


def test_golden_calibration_error(golden):
    exit_logits, labels, per_exit = golden
    fits = fit_temperatures(exit_logits.transpose(0, 1), labels)
    for logits, fit, expected in zip(exit_logits, fits, per_exit, strict=True):
        assert fit.ece_before == pytest.approx(expected["ece_before"], abs=1e-6)
        assert fit.ece_after == pytest.approx(expected["ece_exact_minimum"], abs=1e-6)
        adam = torch.softmax(logits / expected["temperature_adam_as_shipped"], dim=-1)
        assert expected_calibration_error(adam, labels) == pytest.approx(expected["ece_after"], abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    num_labels=st.integers(2, 6),
    scale=st.sampled_from([0.05, 1.0, 20.0]),
    multi_label=st.booleans(),
)
@example(seed=537, num_labels=6, scale=20.0, multi_label=True)
def test_no_temperature_nearby_or_far_away_is_better(seed, num_labels, scale, multi_label):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(200, num_labels, generator=generator)
    if multi_label:
        labels = torch.bernoulli(torch.sigmoid(logits / 3 / scale), generator=generator)
    else:
        labels = torch.multinomial(torch.softmax(logits / 2 / scale, dim=-1), 1, generator=generator).squeeze(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (fit,) = fit_temperatures(logits[:, None], labels)
        assert fit_temperature(logits, labels) == fit.temperature
    if fit.at_limit:  # few examples may have their optimum beyond an end of the range: the likelihood rises towards it
        rises = [
            negative_log_likelihood(logits, labels, end) < negative_log_likelihood(logits, labels, inside)
            for end, inside in ((0.01, 0.0101), (100.0, 99.0))
        ]
        assert fit.temperature == 1
        assert any(rises)
        return
    temperature = fit.temperature
    best = negative_log_likelihood(logits, labels, temperature)
    factors = torch.logspace(-1, 1, 41).tolist() + [1 - 1e-4, 1 + 1e-4]
    for other in (temperature * factor for factor in factors):
        assert best <= negative_log_likelihood(logits, labels, other) + 1e-12


def test_scaling_the_logits_scales_the_temperature(golden):
    logits, labels = golden[0][2], golden[1]
    assert fit_temperature(3 * logits, labels) == pytest.approx(3 * fit_temperature(logits, labels), rel=1e-6)


def test_every_answer_right_keeps_temperature_one_with_a_warning():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="every answer is right: it stays 1") as warned:
        assert fit_temperature(logits, labels) == 1
    with pytest.warns(UserWarning, match="optimal") as again:
        fit = fit_temperatures(logits[:, None], labels)[0]
    assert fit.at_limit
    assert fit.temperature == 1
    assert fit.nll_after == fit.nll_before
    # Where the user asked, however deep it was found.
    assert [warning.filename for warning in (*warned, *again)] == [__file__] * 2


def test_worse_than_chance_keeps_temperature_one_with_a_warning():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([1, 0])
    with pytest.warns(UserWarning, match="worse than chance: it stays 1"):
        assert fit_temperature(logits, labels) == 1


def test_equal_logits_say_nothing_and_keep_temperature_one():
    assert fit_temperature(torch.ones(5, 3), torch.tensor([0, 1, 2, 0, 1])) == 1.0


def test_bins_are_open_below_and_closed_above():
    # 0.6 is a boundary of five bins: it belongs to (0.4, 0.6] together with 0.5, not to (0.6, 0.8].
    probabilities = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.7, 0.3]])
    labels = torch.tensor([0, 1, 1])
    expected = 2 / 3 * abs(0.55 - 0.5) + 1 / 3 * abs(0.7 - 0.0)
    assert expected_calibration_error(probabilities, labels, bins=5) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_of_several_labels_counts_every_decision():
    probabilities, labels = torch.tensor([[0.95, 0.05], [0.25, 0.95]]), torch.tensor([[1, 0], [0, 0]])
    # Confidence 0.95 three times, one of them wrong; 0.75 once, right.
    expected = 3 / 4 * abs(0.95 - 2 / 3) + 1 / 4 * abs(0.75 - 1)
    assert expected_calibration_error(probabilities, labels, bins=10) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.tensor([[1.0, 0.0], [math.nan, 1.0]]), torch.tensor([0, 1]), r"1 of 2 rows .* row 1"),
        (torch.tensor([[1.0, math.inf]]), torch.tensor([0]), "must be finite"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "between 0 and 2"),
        (torch.zeros(2, 3), torch.tensor([0, -100]), "from -100 to 0"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "integer classes"),
        (torch.zeros(2, 3), torch.zeros(3), r"\(2,\) or \(2, 3\)"),
        (torch.zeros(2, 3), torch.full((2, 3), 2), "0 or 1"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "at least one example"),
    ],
)
def test_bad_input_is_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, labels)


def test_logits_instead_of_probabilities_are_refused():
    with pytest.raises(ValueError, match="Did you pass logits"):
        expected_calibration_error(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))


def test_exit_axis_is_required():
    with pytest.raises(ValueError, match="examples, exits, labels"):
        fit_temperatures(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
