"""Do exits with branches and distillation keep both ends, the last exit of plain fine-tuning and the first of a small
model?

    python examples/exit_study_both_ends.py outputs/exit-study model_cards/exit-study/both-ends

Reads the finished runs of examples/run_exit_study.py (`runs/`, and `timing.json` where time was measured), also of a
study that is not finished, and writes results.md, results.json and a figure for every task. Methods compared on a task
are those that have all seeds of the recipe there. The members of `multi-model` are plain fine-tuning of each depth
alone, the last one that of the whole encoder.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from exit_study_figures import RC
from exit_study_results import Values, curve_points, interval, median_seconds, percent, points, table, timed_runs
from hf_adaptive.files import write_whole
from study_curves import interpolate, mean_band
from study_files import write_json

# What could become the recipe; seeds are those of the first.
CANDIDATES = ("joint+branch+distilled", "joint+branch", "sweet+branch")
PLAIN = "multi-model"
RIVALS = ("joint", "sweet", PLAIN)
COSTS = tuple(round(0.1 * tenth, 1) for tenth in range(1, 11))
# Scores so far below the best are not drawn.
CUT_OFF = 0.18
# What was asked for, in points: nowhere below the best rival (on average, and as far as the interval tells), above all
# of them somewhere, and both ends kept.
LEAST_MEAN, LEAST_LEAD, LAST_EXIT, FIRST_EXIT = -0.3, 2.0, -0.3, -0.5
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#F0E442")


def main() -> None:
    """Reads the runs and writes the page."""
    if len(sys.argv) != 3:
        raise SystemExit(f"give the study's folder and the page's, got {sys.argv[1:]}.")
    study, folder = map(Path, sys.argv[1:])
    settings = json.loads((study / "settings.json").read_text(encoding="utf-8"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((study / "runs").glob("*.json"))]
    tasks = [task_results(name, [run for run in runs if run["task"] == name]) for name in sorted(settings["tasks"])]
    tasks = [task for task in tasks if task["methods"]]
    timing = study / "timing.json"
    timing = json.loads(timing.read_text(encoding="utf-8")) if timing.exists() else {"points": []}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", {"settings": settings, "tasks": tasks, "timing": timing})
    for task in tasks:
        write_whole(folder / f"curves-{task['task']}.svg", lambda draft, task=task: draw(task, draft))
    words = page(settings, tasks, timing)
    write_whole(folder / "results.md", lambda draft: Path(draft).write_text(words, encoding="utf-8"))
    print(words)


# What the runs say


def task_results(name: str, runs: list[Values]) -> Values:
    """Scores by exit and along the curve, of every method that was run with all the first candidate's seeds."""
    by_method: dict[str, dict[int, Values]] = {}
    for run in runs:
        if run["pooling"] == "mean":
            by_method.setdefault(run["method"], {})[run["seed"]] = run["report"]
    seeds = sorted(by_method.get(CANDIDATES[0], {}))
    whole = {method: own for method, own in by_method.items() if seeds and set(seeds) <= set(own)}
    return {
        "task": name,
        "seeds": seeds,
        "test_examples": next((own[seeds[0]]["num_examples"] for own in whole.values()), 0),
        "exit_layers": next((own[seeds[0]]["exit_layers"] for own in whole.values()), []),
        "methods": {
            method: {
                "costs": own[seeds[0]]["costs"],
                "accuracy": [own[seed]["accuracy"] for seed in seeds],
                "curve": [interpolate(*curve_points(own[seed]), COSTS).tolist() for seed in seeds],
                "points": [curve_points(own[seed]) for seed in seeds],
            }
            for method, own in sorted(whole.items(), key=lambda item: _order(item[0]))
        },
    }


def _order(method: str) -> tuple[bool, int, str]:
    return "+" in method, RIVALS.index(method) if method in RIVALS else len(RIVALS), method


def difference(first: list[list[float]], second: list[list[float]], place: int) -> Values:
    """At one exit or cost, seed by seed."""
    return interval([one[place] - other[place] for one, other in zip(first, second)])


def beside_rivals(task: Values, method: str) -> list[tuple[float, dict[str, Values]]]:
    """At every cost that all reach, a method's score minus each rival's."""
    methods = task["methods"]
    rivals = [rival for rival in RIVALS if rival in methods]
    curves = {name: methods[name]["curve"] for name in (method, *rivals)}
    reached = [
        place for place in range(len(COSTS)) if all(np.isfinite(np.array(c)[:, place]).all() for c in curves.values())
    ]
    return [
        (COSTS[place], {rival: difference(curves[method], curves[rival], place) for rival in rivals})
        for place in reached
    ]


# In words


def page(settings: Values, tasks: list[Values], timing: Values) -> str:
    """The page."""
    parts = [_heading(settings, tasks), _verdict(tasks)]
    parts += [_task(task) for task in tasks]
    if timing["points"]:
        parts.append(_timing(timing))
    return "\n\n".join(parts) + "\n"


def _heading(settings: Values, tasks: list[Values]) -> str:
    ran = "; ".join(f"{task['task']} (seeds {', '.join(map(str, task['seeds']))})" for task in tasks)
    return (
        "# Both ends: branches and distillation\n\n"
        "Written by `examples/exit_study_both_ends.py` from the runs of `examples/run_exit_study.py`; numbers in "
        f"[results.json](results.json).\n\nEncoder `{settings['model']}`, exits after layers "
        f"{', '.join(map(str, settings['exit_layers']))}, mean pooling; at most {settings['max_train_examples']} "
        f"training examples, {settings['num_train_epochs']:g} epochs, learning rate "
        f"{settings['learning_rate']:g}. Run: {ran}. `multi-model` has a model of each depth of its own, trained "
        "plainly; `+branch`: `exit_branch_layers=1`; "
        "`+distilled`: `ExitDistillation()` from the own last exit. Cost is the fraction of the layers run, branches "
        "passed among them. Differences are in points, paired by seed, with 95 % intervals (Student's t)."
    )


def _verdict(tasks: list[Values]) -> str:
    rows = [
        (method, task["task"], name, words, _met(is_met))
        for method in CANDIDATES
        for task in tasks
        if method in task["methods"]
        for name, words, is_met in claims(task, method)
    ]
    names = ("method", "task", "claim", "measured", "met")
    return "\n\n".join(["## What was asked of a recipe", table(names, rows, words=3)])


def _met(is_met: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "–"}[is_met]


def claims(task: Values, method: str) -> list[tuple[str, str, bool | None]]:
    """Each claim of a method on a task: its name, what was measured, and whether it holds (None: no rival was run)."""
    methods = task["methods"]
    if PLAIN not in methods:
        return []
    own, plain = methods[method]["accuracy"], methods[PLAIN]["accuracy"]
    last, first = difference(own, plain, -1), difference(own, plain, 0)
    by_cost = beside_rivals(task, method)
    # The rival that is best on average at a cost: by how much the method is below or above it.
    leads = [(cost, min(rivals.values(), key=lambda one: one["mean"])) for cost, rivals in by_cost]
    cost_low, low = min(leads, key=lambda lead: lead[1]["mean"])
    cost_high, high = max(leads, key=lambda lead: lead[1]["mean"])
    return [
        (f"last exit ≥ plain − {-LAST_EXIT}", points(last), _holds(last, LAST_EXIT)),
        (f"first exit ≥ its depth alone − {-FIRST_EXIT}", points(first), _holds(first, FIRST_EXIT)),
        ("never below the best rival", f"{points(low)} at {cost_low}", _never_below(leads)),
        (
            f"{LEAST_LEAD:g} points above all somewhere",
            f"{points(high)} at {cost_high}",
            high["mean"] >= LEAST_LEAD / 100,
        ),
    ]


def _holds(one: Values, least: float) -> bool:
    return one["mean"] >= least / 100


def _never_below(leads: list[tuple[float, Values]]) -> bool:
    return all(
        lead["mean"] >= LEAST_MEAN / 100 and (lead["half"] is None or lead["mean"] + lead["half"] >= 0)
        for _, lead in leads
    )


def _task(task: Values) -> str:
    methods, layers = task["methods"], task["exit_layers"]
    exits = [
        (name, *(percent(interval(list(column))) for column in zip(*own["accuracy"])), f"{own['costs'][-1]:.2f}")
        for name, own in methods.items()
    ]
    parts = [
        f"## {task['task']}: {task['test_examples']} test examples, seeds {', '.join(map(str, task['seeds']))}",
        "Single exits, %; the last column is the cost of a row that passed them all:",
        table(("method", *(f"layer {layer}" for layer in layers), "cost"), exits),
    ]
    if PLAIN in methods:
        parts += ["Minus a model of the same depth alone (`multi-model`), by exit:", _minus_plain(task)]
    parts += [
        "Along the curve (one threshold for all exits), score at a cost, %:",
        _along(task),
        *_against_rivals(task),
        f"![Curves](curves-{task['task']}.svg)",
    ]
    return "\n\n".join(parts)


def _minus_plain(task: Values) -> str:
    plain = task["methods"][PLAIN]["accuracy"]
    rows = [
        (name, *(points(difference(own["accuracy"], plain, place)) for place in range(len(task["exit_layers"]))))
        for name, own in task["methods"].items()
        if name != PLAIN
    ]
    return table(("method", *(f"layer {layer}" for layer in task["exit_layers"])), rows)


def _along(task: Values) -> str:
    rows = [
        (name, *("–" if np.isnan(value) else f"{100 * value:.1f}" for value in np.mean(own["curve"], axis=0)))
        for name, own in task["methods"].items()
    ]
    return table(("method", *map(str, COSTS)), rows)


def _against_rivals(task: Values) -> list[str]:
    parts = []
    for method in CANDIDATES:
        if method in task["methods"]:
            by_cost = beside_rivals(task, method)
            rows = [(name, *(points(rivals[name]) for _, rivals in by_cost)) for name in by_cost[0][1]]
            words = f"`{method}` minus the others at the same cost:"
            parts += [words, table(("minus", *(str(cost) for cost, _ in by_cost)), rows)]
    return parts


def _timing(timing: Values) -> str:
    rows = [
        (f"{run['task']}", run["method"], f"{point['cost']:.2f}", f"{median_seconds(point):.3f}")
        for run, own in timed_runs(timing)
        for point in own
    ]
    words = (
        f"First seed, {timing['wanted']['examples']} test examples, {timing['threads']} thread(s), batches of "
        f"{timing['batch_size']}, medians of {timing['rounds']} rounds over all methods in turn."
    )
    return "\n\n".join(["## Measured seconds", words, table(("task", "method", "cost", "seconds"), rows)])


# Figure


def draw(task: Values, path: Any) -> None:
    """Mean curves with bands, cost to 1.5, and the single exits."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for colour, (name, own) in zip(COLOURS, task["methods"].items()):
            dearest = max(own["costs"])
            grid = np.linspace(own["costs"][0], min(dearest, 1.5), 101)
            band = mean_band([interpolate(*curve, grid) for curve in own["points"]])
            axes.plot(grid, 100 * band.mean, color=colour, label=name, linestyle="--" if "+" in name else "-")
            axes.fill_between(grid, 100 * band.lower, 100 * band.upper, color=colour, alpha=0.08, linewidth=0)
        # What is far below would press the others together; the tables have it.
        best = np.concatenate([np.mean(own["accuracy"], axis=0) for own in task["methods"].values()])
        axes.set_ylim(100 * (best.max() - CUT_OFF), 100 * best.max() + 2)
        axes.axvline(1, color="#7F7F7F", linewidth=0.8, linestyle=":")
        axes.set_xlabel("cost: fraction of the layers run, branches passed among them")
        axes.set_ylabel("accuracy, %")
        seeds = len(task["seeds"])
        axes.set_title(f"{task['task']}, mean over {seeds} seeds with 95 % bands (what is far below is cut off)")
        axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
