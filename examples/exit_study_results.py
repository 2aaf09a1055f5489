"""Tables of examples/run_exit_study.py: what its runs say, with intervals over seeds.

Every interval is mean ± t · s / √seeds (95 %, Student's t); of a difference between methods it is that of the
differences seed by seed, because one seed gives all methods the same order of examples.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from study_curves import (
    area_over_costs,
    area_over_speeds,
    best_intervals,
    interpolate,
    mean_band,
)

PAPER = ("joint", "sweet", "multi-model")
# (first, second): by how much the first is better, on average over the exits.
COMPARISONS = (("multi-model", "joint"), ("sweet", "joint"), ("multi-model", "sweet"))
# What the paper reports for them, in points of accuracy (abstract; low-resource setting, 7 GLUE tasks).
PAPERS_NUMBERS = {("multi-model", "joint"): 2.3, ("sweet", "joint"): 1.1}
NOT_BETWEEN = (*PAPER, "disjoint")
FAST = 0.5
GRID_POINTS = 101

Values = dict[str, Any]


def summarise(runs: list[Values]) -> Values:
    """What the runs say, by setting (task and pooling), and on average over the tasks.

    Args:
        runs (`list[dict]`): Contents of the runs' files.
    """
    settings = {(run["task"], run["pooling"]): None for run in runs}
    by_setting = {
        f"{task}, {pooling}": _setting([run for run in runs if (run["task"], run["pooling"]) == (task, pooling)])
        for task, pooling in settings
    }
    poolings = dict.fromkeys(pooling for _, pooling in settings)
    over_tasks = {
        pooling: _over_tasks([by_setting[f"{t}, {p}"] for t, p in settings if p == pooling]) for pooling in poolings
    }
    return {"settings": by_setting, "over_tasks": over_tasks}


def _setting(runs: list[Values]) -> Values:
    """One task with one pooling."""
    first = runs[0]["report"]
    methods = dict.fromkeys(run["method"] for run in sorted(runs, key=lambda run: _order(run["method"])))
    by_method = {
        method: sorted((run for run in runs if run["method"] == method), key=lambda run: run["seed"])
        for method in methods
    }
    share = first["exit_layers"][0] / first["exit_layers"][-1]
    scores = {method: [run["report"]["accuracy"] for run in own] for method, own in by_method.items()}
    grid = np.linspace(share, 1, GRID_POINTS)
    curves = {method: _curve(own, grid) for method, own in by_method.items()}
    means = {method: curve["mean"] for method, curve in curves.items()}
    return {
        "task": runs[0]["task"],
        "pooling": runs[0]["pooling"],
        "metric": first["metric_name"],
        "exit_layers": first["exit_layers"],
        "test_examples": first["num_examples"],
        "seeds": {method: [run["seed"] for run in own] for method, own in by_method.items()},
        "exits": {method: [interval(column) for column in zip(*rows)] for method, rows in scores.items()},
        "comparisons": _comparisons(scores),
        "between": _between(scores),
        "grid": grid.tolist(),
        "curves": curves,
        "areas": {method: _areas(own, share) for method, own in by_method.items()},
        "best_of_paper": _best(grid, {method: means[method] for method in PAPER if method in means}),
        "best_of_all": _best(grid, means),
    }


def _order(method: str) -> tuple[int, str]:
    """The paper's methods first, then shares, then schedules."""
    known = ("joint", "sweet", "multi-model", "disjoint")
    if method in known:
        return known.index(method), ""
    if "+" in method:  # branches and distillation
        return len(known) + 2, method
    return len(known) + (not method.startswith("share-")), method


def interval(values: Sequence[float]) -> Values:
    """Mean over seeds, and half the width of its 95 % interval (None with a single seed)."""
    band = mean_band(list(values))
    half = float(band.upper - band.mean)
    return {"mean": float(band.mean), "half": None if math.isnan(half) else half, "values": list(values)}


def curve_points(report: Values) -> tuple[list[float], list[float]]:
    """Costs and scores of a curve, with the setting that runs everything at its end."""
    costs = [point["cost"] for point in report["curve"]] + [report["costs"][-1]]
    scores = [point["accuracy"] for point in report["curve"]] + [report["accuracy"][-1]]
    return costs, scores


def _curve(runs: list[Values], grid: np.ndarray) -> Values:
    band = mean_band([interpolate(*curve_points(run["report"]), grid) for run in runs])
    return {"mean": band.mean.tolist(), "lower": _plain(band.lower), "upper": _plain(band.upper)}


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values]


def _areas(runs: list[Values], cheapest: float) -> Values:
    """Mean score over ranges of cost and of speed."""
    curves = [curve_points(run["report"]) for run in runs]
    fastest = 1 / cheapest
    ranges = {
        f"cost {cheapest:.2f} to {FAST:.2f}": [area_over_costs(*curve, cheapest, FAST) for curve in curves],
        f"cost {cheapest:.2f} to 1": [area_over_costs(*curve, cheapest, 1) for curve in curves],
        # The cheapest cost again, but for rounding.
        f"speed 1 to {fastest:.3g}": [area_over_speeds(*curve, 1, fastest * (1 - 1e-12)) for curve in curves],
    }
    return {name: interval(values) for name, values in ranges.items()}


def _best(grid: np.ndarray, means: Values) -> list[Values]:
    return [
        {"method": found.method, "from_cost": found.start, "to_cost": found.end}
        for found in best_intervals(grid.tolist(), means)
    ]


def _comparisons(scores: dict[str, list[list[float]]]) -> Values:
    """The paper's first comparison: single exits, averaged."""
    return {
        f"{first} minus {second}": interval(_differences(scores, first, second, slice(None)))
        for first, second in COMPARISONS
        if first in scores and second in scores
    }


def _between(scores: dict[str, list[list[float]]]) -> Values:
    """Do the methods between SWEET and joint training keep the early exits of one and the last exit of the other?"""
    if "joint" not in scores or "sweet" not in scores:
        return {}
    return {
        method: {
            "first exit minus sweet": interval(_differences(scores, method, "sweet", slice(0, 1))),
            "exits before the last minus sweet": interval(_differences(scores, method, "sweet", slice(0, -1))),
            "last exit minus joint": interval(_differences(scores, method, "joint", slice(-1, None))),
            "all exits minus joint": interval(_differences(scores, method, "joint", slice(None))),
            "all exits minus sweet": interval(_differences(scores, method, "sweet", slice(None))),
        }
        for method in scores
        if method not in NOT_BETWEEN
    }


def _differences(scores: dict[str, list[list[float]]], first: str, second: str, exits: slice) -> list[float]:
    """Seed by seed, the mean difference over some exits."""
    return [float(np.mean(np.subtract(one[exits], other[exits]))) for one, other in zip(scores[first], scores[second])]


def _over_tasks(settings: list[Values]) -> Values:
    """The mean over the tasks of each seed's difference; tasks are as they are, seeds are drawn."""
    comparisons = [setting["comparisons"] for setting in settings]
    between = [setting["between"] for setting in settings]
    methods = [method for method in between[0] if all(method in other for other in between)]
    return {
        "tasks": [setting["task"] for setting in settings],
        "comparisons": {
            name: _mean_interval([one[name] for one in comparisons])
            for name in comparisons[0]
            if all(name in other for other in comparisons)
        },
        "between": {
            method: {name: _mean_interval([one[method][name] for one in between]) for name in between[0][method]}
            for method in methods
        },
    }


def _mean_interval(intervals: list[Values]) -> Values:
    return interval([float(np.mean(values)) for values in zip(*(one["values"] for one in intervals))])


# Markdown


def results_table(settings: Values, summary: Values, timing: Values) -> str:
    """The results as Markdown."""
    parts = [_heading(settings)]
    parts += [_setting_tables(name, setting) for name, setting in summary["settings"].items()]
    parts += [_over_tasks_tables(pooling, values) for pooling, values in summary["over_tasks"].items()]
    if timing["points"]:
        parts.append(_timing_table(timing))
    return "\n\n".join(parts) + "\n"


def _heading(settings: Values) -> str:
    seeds = ", ".join(map(str, settings["seeds"]))
    return (
        f"# Exits compared\n\nEncoder `{settings['model']}`, exits after layers "
        f"{', '.join(map(str, settings['exit_layers']))}; at most {settings['max_train_examples']} training examples, "
        f"{settings['num_train_epochs']:g} epochs, batches of {settings['per_device_train_batch_size']}, learning "
        f"rate {settings['learning_rate']:g}; seeds {seeds}.\n\nScores are in %, on test data: mean ± half of the "
        "95 % interval over seeds (Student's t); differences are in points and paired, seed by seed. Cost is the "
        "fraction of the layers run."
    )


def _setting_tables(name: str, setting: Values) -> str:
    layers = setting["exit_layers"]
    exits = [
        (method, *map(percent, intervals), _mean_of_exits(intervals)) for method, intervals in setting["exits"].items()
    ]
    ranges = list(next(iter(setting["areas"].values())))
    areas = [(method, *(percent(own[one]) for one in ranges)) for method, own in setting["areas"].items()]
    parts = [
        f"## {name} pooling",
        f"{setting['metric']} of single exits, all of {setting['test_examples']} test examples answered by one:",
        table(("method", *(f"layer {layer}" for layer in layers), "mean"), exits),
        "Area under the curve: the mean score over a range.",
        table(("method", *ranges), areas),
        "Best of the paper's three methods: " + _best_in_words(setting["best_of_paper"]) + "\n\nBest of all: "
        "" + _best_in_words(setting["best_of_all"]),
    ]
    return "\n\n".join([*parts, *_difference_tables(setting)])


def _mean_of_exits(intervals: list[Values]) -> str:
    return percent(interval([float(np.mean(values)) for values in zip(*(one["values"] for one in intervals))]))


def _difference_tables(values: Values) -> list[str]:
    parts = []
    if values["comparisons"]:
        rows = [(name, points(one), _papers_number(name)) for name, one in values["comparisons"].items()]
        parts += ["Single exits, on average:", table(("difference", "here", "paper"), rows)]
    if values["between"]:
        columns = list(next(iter(values["between"].values())))
        rows = [(method, *(points(own[name]) for name in columns)) for method, own in values["between"].items()]
        parts += ["Between SWEET and joint training:", table(("method", *columns), rows)]
    return parts


def _over_tasks_tables(pooling: str, values: Values) -> str:
    parts = [f"## Mean over {', '.join(values['tasks'])}; {pooling} pooling", *_difference_tables(values)]
    return "\n\n".join(parts)


def _papers_number(name: str) -> str:
    numbers = {f"{first} minus {second}": number for (first, second), number in PAPERS_NUMBERS.items()}
    return f"{numbers[name]:+.1f}" if name in numbers else "–"


def _best_in_words(intervals: list[Values]) -> str:
    return "; ".join(f"{one['method']} from cost {one['from_cost']:.2f}" for one in intervals) + "."


def _timing_table(timing: Values) -> str:
    rows = [
        (
            f"{run['task']}, {run['pooling']}",
            run["method"],
            f"{point['cost']:.2f}",
            f"{median_seconds(point):.3f}",
            f"{full / median_seconds(point):.2f}",
        )
        for run, points in timed_runs(timing)
        for full in [full_seconds(timing, run)]
        for point in points
    ]
    words = (
        f"Measured on {timing['device']} with {timing['threads']} thread(s), batches of {timing['batch_size']}, the "
        f"first {timing['wanted']['examples']} test examples; medians of {timing['rounds']} rounds. Times as fast: "
        "as all layers of the joint model (of the method itself where it is not timed)."
    )
    return "\n\n".join(["## Time", words, table(("setting", "method", "cost", "seconds", "times as fast"), rows)])


def timed_runs(timing: Values) -> list[tuple[Values, list[Values]]]:
    """Every run that was timed, with its points by cost."""
    key = lambda point: tuple(point["run"].values())  # noqa: E731 (used twice)
    groups = itertools.groupby(sorted(timing["points"], key=lambda point: (key(point), point["cost"])), key=key)
    listed = [list(points) for _, points in groups]
    return [(points[0]["run"], points) for points in listed]


def full_seconds(timing: Values, run: Values) -> float:
    """Seconds of running all layers once: of the joint model of the setting, or of the method itself."""
    same = [
        point
        for point in timing["points"]
        if (point["run"]["task"], point["run"]["pooling"]) == (run["task"], run["pooling"])
    ]
    joint = [point for point in same if point["run"]["method"] == "joint"]
    own = [point for point in same if point["run"]["method"] == run["method"]]
    return median_seconds(max(joint or own, key=lambda point: point["cost"]))


def median_seconds(point: Values) -> float:
    return float(np.median(point["seconds"]))


def percent(one: Values) -> str:
    """A score in %, with half of its interval."""
    return f"{100 * one['mean']:.1f}" + ("" if one["half"] is None else f" ± {100 * one['half']:.1f}")


def points(one: Values) -> str:
    """A difference in points, with half of its interval."""
    return f"{100 * one['mean']:+.1f}" + ("" if one["half"] is None else f" ± {100 * one['half']:.1f}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table whose first columns are words and the others numbers."""
    ruler = [*["---"] * words, *["---:"] * (len(header) - words)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ruler, *rows))
