"""Exits taken offline and thresholds from a wish, against brute force on instances small enough for it."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_adaptive.calibration.exit_table import ExitTable, take_exits
from hf_adaptive.calibration.setting_search import SharedPath
from hf_adaptive.calibration.threshold_search import find_thresholds
from hf_adaptive.calibration.wishes import make_wish
from tests.calibration.simulated import GOLDEN, golden_cascade, simulated_exits

WISHES = (
    make_wish(target_cost=0.5),
    make_wish(max_accuracy_drop=0.0),
    make_wish(max_accuracy_drop=0.2),
    make_wish(max_disagreement=0.0),
    make_wish(max_disagreement=0.25),
)


@st.composite
def tables(draw, max_examples=7, max_exits=4):
    """Small tables with ties, scores in any order and NaN."""
    num_examples, num_exits = draw(st.integers(1, max_examples)), draw(st.integers(2, max_exits))
    size = num_examples * num_exits
    values = st.sampled_from([0.2, 0.4, 0.5, 0.7, 0.9, math.nan])
    scores = torch.tensor(draw(st.lists(values, min_size=size, max_size=size))).view(num_examples, num_exits)
    answers = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)))
    labels = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=num_examples, max_size=num_examples)))
    costs = [(exit_index + 1) / num_exits for exit_index in range(num_exits)]
    return ExitTable.from_predictions(scores, answers.view(num_examples, num_exits), costs, labels)


def merit(wish, point, table):
    """What the search maximises, computed from a measurement; −inf where the wish is not granted."""
    if wish.name == "target_cost":
        return point.accuracy if point.mean_cost <= wish.bound + 1e-9 else -math.inf
    loss = point.disagreement if wish.name == "max_disagreement" else point.accuracy_drop
    return -point.mean_cost if loss <= wish.bound + 1e-9 else -math.inf


def brute_force(table, wish, per_exit):
    options = [None, *sorted({s for s in table.scores[:, :-1].flatten().tolist() if not math.isnan(s)})]
    inner = table.num_exits - 1
    settings_ = itertools.product(options, repeat=inner) if per_exit else [(option,) * inner for option in options]
    return max(merit(wish, table.measure(setting), table) for setting in settings_)


def found_merit(table, wish, per_exit):
    choice = find_thresholds(table, wish, per_exit)
    return merit(wish, choice.measured, table)


@settings(deadline=None, max_examples=60)
@given(table=tables(), wish=st.sampled_from(WISHES))
def test_shared_threshold_is_the_best_there_is(table, wish):
    assert found_merit(table, wish, per_exit=False) == pytest.approx(brute_force(table, wish, per_exit=False))


@settings(deadline=None, max_examples=60)
@given(table=tables(), wish=st.sampled_from(WISHES))
def test_per_exit_lies_between_shared_and_brute_force(table, wish):
    merit_found = found_merit(table, wish, per_exit=True)
    assert merit_found >= found_merit(table, wish, per_exit=False) - 1e-9
    assert merit_found <= brute_force(table, wish, per_exit=True) + 1e-9


@settings(deadline=None, max_examples=40)
@given(table=tables(max_exits=2), wish=st.sampled_from(WISHES))
def test_with_one_threshold_both_searches_are_exact(table, wish):
    assert found_merit(table, wish, per_exit=True) == pytest.approx(brute_force(table, wish, per_exit=True))


def test_per_exit_finds_the_optimum_of_almost_all_small_problems():
    misses = 0
    for seed in range(30):
        table = simulated_exits(10, seed, exits=(0, 1, 3))
        wish = WISHES[seed % len(WISHES)]
        misses += found_merit(table, wish, per_exit=True) < brute_force(table, wish, per_exit=True) - 1e-9
    assert misses <= 2


@settings(deadline=None, max_examples=60)
@given(table=tables())
def test_the_path_agrees_with_measuring_every_point(table):
    path = SharedPath(table)
    costs = path.mean(table.costs.expand(table.scores.shape))
    accuracy = path.mean(table.correct.double())
    for point in range(len(costs)):
        measured = table.measure(path.setting(point))
        assert measured.mean_cost == pytest.approx(costs[point].item())
        assert measured.accuracy == pytest.approx(accuracy[point].item())


def test_settings_spread_over_the_path_hold_both_ends_and_lie_evenly():
    scores = torch.arange(1, 9)[:, None].expand(8, 2) / 10
    path = SharedPath(ExitTable.from_predictions(scores, torch.zeros(8, 2), [0.5, 1.0], lowest_score=0.0))
    for count, between in ((3, [0.45]), (5, [0.65, 0.45, 0.25])):
        found = sorted((threshold for (threshold,) in path.spread(count) if threshold is not None), reverse=True)
        assert found == pytest.approx([*between, 0.0])
        assert (None,) in path.spread(count)
    assert len(path.spread(9)) == len(path.spread(50)) == 9


@pytest.mark.parametrize("per_exit", [False, True])
@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_thresholds_survive_float_noise(wish, per_exit):
    table = simulated_exits(300, seed=1)
    choice = find_thresholds(table, wish, per_exit)
    for score, threshold in zip(table.scores.unbind(1), choice.thresholds, strict=False):
        distances = (score - (2.0 if threshold is None else threshold)).abs()
        gaps = table.scores[:, :-1].flatten().unique().diff()
        assert distances.min() >= gaps.min() / 2.01


def test_thresholds_mean_the_same_in_float32():
    neighbours = torch.tensor([0.5, torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()])
    scores = torch.stack([neighbours, neighbours], dim=1)
    table = ExitTable.from_predictions(scores, torch.tensor([[1, 0], [0, 0]]), [0.5, 1.0])
    (threshold,) = find_thresholds(table, make_wish(max_disagreement=0.0)).thresholds
    assert (scores[:, 0] >= threshold).tolist() == [False, True]


def test_a_lower_bound_of_the_scores_lets_all_new_examples_leave():
    agree = torch.zeros(3, 2, dtype=torch.long)
    scores = torch.tensor([[0.6, 1.0], [0.7, 1.0], [0.8, 1.0]])
    wish = make_wish(max_disagreement=0.0)
    bounded = ExitTable.from_predictions(scores, agree, [0.5, 1.0], lowest_score=0.0)
    unbounded = ExitTable.from_predictions(scores, agree, [0.5, 1.0])
    assert find_thresholds(bounded, wish).thresholds == (0.0,)
    assert find_thresholds(unbounded, wish).thresholds == (pytest.approx(0.6),)


def test_nan_never_leaves():
    scores = torch.tensor([[math.nan, 0.1, 0.0], [math.nan, math.nan, math.nan]])
    assert take_exits(scores, (-1e9, -1e9)).tolist() == [1, 2]
    table = ExitTable.from_predictions(scores, torch.zeros(2, 3, dtype=torch.long), [0.3, 0.6, 1.0])
    for per_exit in (False, True):
        choice = find_thresholds(table, make_wish(max_disagreement=0.0), per_exit)
        assert choice.measured.exit_shares == (0.0, 0.5, 0.5)


def test_none_never_leaves_and_thresholds_are_reached_at_equality():
    scores = torch.tensor([[0.9, 0.5, 0.0], [0.9, 0.4, 0.0]])
    assert take_exits(scores, (None, 0.5)).tolist() == [1, 2]
    assert take_exits(scores, (None, None)).tolist() == [2, 2]


def test_golden_cascade_exits():
    golden = json.loads((GOLDEN / "multi_model.json").read_text())
    chosen = load_file(GOLDEN / "multi_model.safetensors")
    table = golden_cascade()
    for threshold, expected in golden["results"].items():
        setting = (float(threshold),) * 3
        assert take_exits(table.scores, setting).equal(chosen[f"{threshold}/chosen_model"])
        point = table.measure(setting)
        assert [round(64 * share) for share in point.exit_shares] == expected["counts"]
        assert point.mean_cost == pytest.approx(expected["speedup_ratio"])
        assert point.accuracy == expected["accuracy"]


def test_nothing_grants_a_cost_below_the_first_exit():
    choice = find_thresholds(simulated_exits(100), make_wish(target_cost=0.05), per_exit=True)
    assert not choice.found
    assert choice.thresholds == (None, None, None)
    assert choice.measured.mean_cost == 1.0


def test_running_everything_can_be_the_answer_to_a_target_cost():
    table = ExitTable.from_predictions(torch.rand(4, 2), torch.tensor([[1, 0]] * 4), [0.5, 1.0], torch.zeros(4))
    choice = find_thresholds(table, make_wish(target_cost=1.0))
    assert choice.found
    assert choice.thresholds == (None,)


def test_a_quality_bound_that_only_the_full_model_keeps_is_not_found():
    table = ExitTable.from_predictions(torch.rand(4, 2), torch.tensor([[1, 0]] * 4), [0.5, 1.0])
    choice = find_thresholds(table, make_wish(max_disagreement=0.1))
    assert not choice.found
    assert choice.measured.disagreement == 0
    assert choice.measured.accuracy is None


def test_several_labels_agree_only_as_a_whole():
    predictions = torch.tensor([[[1, 0], [1, 1]], [[1, 1], [1, 1]]])
    table = ExitTable.from_predictions(torch.rand(2, 2), predictions, [0.5, 1.0], torch.tensor([[1, 0], [1, 1]]))
    assert table.agrees.tolist() == [[False, True], [True, True]]
    assert table.correct.tolist() == [[True, False], [True, True]]


def test_result_is_plain_data():
    choice = find_thresholds(simulated_exits(200), make_wish(max_accuracy_drop=0.01), per_exit=True)
    data = json.loads(json.dumps(choice.to_dict()))
    assert data["wish"] == {"name": "max_accuracy_drop", "bound": 0.01}
    assert data["measured"]["num_examples"] == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"target_cost": 0.4, "max_disagreement": 0.1}, "target_cost=0.4.*max_disagreement=0.1"),
        ({"target_cost": 0.0}, "positive number.*got 0.0"),
        ({"target_cost": math.inf}, "positive number"),
        ({"max_accuracy_drop": -0.01}, "at least 0 and below 1.*got -0.01"),
        ({"max_accuracy_drop": 2}, r"Did you mean 0.02"),
        ({"max_accuracy_drop": 1}, r"at least 0 and below 1.*got 1\. Did you mean 0.01"),
        ({"max_disagreement": 1.5}, r"max_disagreement must be .*got 1\.5\. Did you mean 0.015"),
        ({"max_disagreement": 100}, r"max_disagreement must be .*got 100\.$"),
        ({"target_cost": -1}, "target_cost must be a positive number .*got -1"),
        ({"max_disagreement": math.nan}, "max_disagreement must be"),
    ],
)
def test_bad_wishes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_wish(**arguments)


def test_labels_are_required_where_accuracy_counts():
    table = ExitTable.from_predictions(torch.rand(4, 2), torch.zeros(4, 2), [0.5, 1.0])
    with pytest.raises(ValueError, match="is about accuracy and needs labels"):
        find_thresholds(table, make_wish(target_cost=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.rand(4)}, "scores must have the shape"),
        ({"scores": torch.rand(0, 2), "predictions": torch.zeros(0, 2)}, r"at least one example .* got \(0, 2\)"),
        ({"scores": torch.rand(4, 1), "predictions": torch.zeros(4, 1), "costs": [1.0]}, r"two exits, got \(4, 1\)"),
        ({"scores": torch.full((4, 2), math.inf)}, "infinite"),
        ({"costs": [1.0, 0.5]}, "ascending"),
        ({"costs": [0.5, 0.5]}, "ascending"),
        ({"costs": [-0.5, 1.0]}, "none of them negative"),
        ({"costs": [0.5]}, "2 ascending numbers"),
        ({"labels": torch.zeros(3)}, r"labels must have the shape \(4,\)"),
        ({"predictions": torch.zeros(4, 3)}, "agrees must be"),
    ],
)
def test_bad_tables_are_refused(changes, message):
    arguments = {"scores": torch.rand(4, 2), "predictions": torch.zeros(4, 2), "costs": [0.5, 1.0]} | changes
    with pytest.raises(ValueError, match=message):
        ExitTable.from_predictions(**arguments)


def test_as_many_thresholds_as_exits_are_refused():
    with pytest.raises(ValueError, match="one for every exit but the last, got 2"):
        take_exits(torch.rand(4, 2), (0.5, 0.5))
