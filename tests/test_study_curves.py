"""Curves on common costs, intervals over seeds, areas, and which method is best where."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from study_curves import (
    area_over_costs,
    area_over_speeds,
    best_intervals,
    interpolate,
    mean_band,
    t_quantile,
)

SCORES = st.floats(0, 1)
COSTS = st.integers(10, 100).map(lambda percent: percent / 100)
CURVES = st.lists(st.tuples(COSTS, SCORES), min_size=1, max_size=12)


def split(points):
    return [cost for cost, _ in points], [score for _, score in points]


@given(CURVES)
def test_a_curve_goes_through_its_points(points):
    costs, scores = split(points)
    for cost in set(costs):
        expected = np.mean([score for other, score in points if other == cost])
        assert interpolate(costs, scores, [cost])[0] == pytest.approx(expected)


@given(CURVES, st.floats(0, 1))
def test_between_two_neighbours_a_curve_is_straight(points, place):
    costs, scores = split(points)
    distinct = sorted(set(costs))
    for low, high in itertools.pairwise(distinct):
        first, middle, last = interpolate(costs, scores, [low, low + place * (high - low), high])
        assert middle == pytest.approx(first + place * (last - first), abs=1e-9)


@given(CURVES, st.randoms())
def test_the_order_of_the_points_plays_no_part(points, random):
    shuffled = list(points)
    random.shuffle(shuffled)
    grid = np.linspace(0.1, 1, 7)
    np.testing.assert_allclose(interpolate(*split(points), grid), interpolate(*split(shuffled), grid), atol=1e-12)


@given(CURVES)
def test_outside_its_costs_a_curve_has_nothing_below_and_its_end_above(points):
    costs, scores = split(points)
    below, end, above = interpolate(costs, scores, [min(costs) - 0.01, max(costs), max(costs) + 5])
    assert math.isnan(below)
    assert above == end


def test_bad_curves_are_refused():
    with pytest.raises(ValueError, match="as many costs as scores, at least one, got 2 and 1"):
        interpolate([0.1, 0.2], [0.5], [0.1])
    with pytest.raises(ValueError, match="got 0 and 0"):
        interpolate([], [], [0.1])
    with pytest.raises(ValueError, match="must be finite"):
        interpolate([0.1], [math.nan], [0.1])


# Published tables of Student's t, two-sided.
@pytest.mark.parametrize(
    ("confidence", "freedom", "expected"),
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.95, 9, 2.262),
        (0.95, 30, 2.042),
        (0.99, 5, 4.032),
        (0.99, 120, 2.617),
        (0.80, 6, 1.440),
    ],
)
def test_quantiles_of_t(confidence, freedom, expected):
    assert t_quantile(confidence, freedom) == pytest.approx(expected, abs=6e-4)


@given(st.integers(2, 8), st.integers(0, 10_000))
def test_a_band_has_the_mean_in_its_middle(seeds, seed):
    values = np.random.default_rng(seed).normal(size=(seeds, 3))
    band = mean_band(values)
    np.testing.assert_allclose(band.mean, values.mean(axis=0))
    np.testing.assert_allclose(band.upper - band.mean, band.mean - band.lower)
    expected = t_quantile(0.95, seeds - 1) * values.std(axis=0, ddof=1) / seeds**0.5
    np.testing.assert_allclose(band.upper - band.mean, expected)


def test_about_95_of_100_bands_hold_the_true_mean():
    draws = np.random.default_rng(0).normal(loc=0.3, size=(3, 4000))
    band = mean_band(draws)
    held = ((band.lower <= 0.3) & (band.upper >= 0.3)).mean()
    assert held == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_no_band():
    band = mean_band([[0.5, 0.6]])
    assert band.mean.tolist() == [0.5, 0.6]
    assert np.isnan(band.lower).all()
    assert np.isnan(band.upper).all()
    with pytest.raises(ValueError, match="no seeds"):
        mean_band(np.empty((0, 2)))
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 95"):
        mean_band([[0.5], [0.6]], confidence=95)


@given(CURVES, SCORES)
def test_an_area_lies_between_the_least_and_the_largest_score(points, score):
    costs, scores = split([(0.1, score), *points])
    for area in (area_over_costs(costs, scores, 0.1, 1), area_over_speeds(costs, scores, 1, 9.9)):
        assert min(scores) - 1e-9 <= area <= max(scores) + 1e-9


@given(CURVES, st.floats(-1, 1))
def test_an_area_rises_with_the_curve(points, shift):
    costs, scores = split([(0.1, 0.5), *points])
    higher = [score + shift for score in scores]
    assert area_over_costs(costs, higher, 0.2, 0.9) == pytest.approx(area_over_costs(costs, scores, 0.2, 0.9) + shift)
    assert area_over_speeds(costs, higher, 2, 5) == pytest.approx(area_over_speeds(costs, scores, 2, 5) + shift)


def test_areas_known_in_closed_form():
    # Score = cost: the mean over costs 0.2 to 1 is 0.6; over speeds 1 to 5, ln 5 / 4.
    assert area_over_costs([0.2, 1], [0.2, 1], 0.2, 1) == pytest.approx(0.6)
    assert area_over_speeds([0.1, 1], [0.1, 1], 1, 5) == pytest.approx(math.log(5) / 4, abs=1e-5)


def test_areas_where_there_is_no_curve():
    assert math.isnan(area_over_costs([0.5, 1], [0.5, 1], 0.2, 1))
    assert math.isnan(area_over_speeds([0.5, 1], [0.5, 1], 1, 5))
    with pytest.raises(ValueError, match=r"from a smaller to a larger number, got 1 to 0\.2"):
        area_over_costs([0.2, 1], [0.2, 1], 1, 0.2)
    with pytest.raises(ValueError, match="speeds must be above 0, got slow=0"):
        area_over_speeds([0.2, 1], [0.2, 1], 0, 5)


@given(st.lists(st.tuples(SCORES, SCORES, SCORES), min_size=1, max_size=20))
def test_intervals_cover_the_grid_and_name_the_best(rows):
    grid = list(range(len(rows)))
    scores = {name: [row[place] for row in rows] for place, name in enumerate("abc")}
    intervals = best_intervals(grid, scores)
    assert [intervals[0].start, intervals[-1].end] == [0, len(rows) - 1]
    for one, other in itertools.pairwise(intervals):
        assert one.end + 1 == other.start
        assert one.method != other.method
    for found in intervals:
        for place in range(found.start, found.end + 1):
            assert scores[found.method][place] == max(rows[place])


def test_costs_that_no_method_reaches_are_left_out():
    nan = math.nan
    intervals = best_intervals([0.1, 0.2, 0.3], {"a": [nan, nan, 0.9], "b": [nan, 0.5, 0.6]})
    assert [(found.start, found.end, found.method) for found in intervals] == [(0.2, 0.2, "b"), (0.3, 0.3, "a")]
    with pytest.raises(ValueError, match="scores of 'a' must be 2"):
        best_intervals([0.1, 0.2], {"a": [0.5]})
