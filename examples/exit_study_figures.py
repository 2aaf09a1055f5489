"""Figures of examples/run_exit_study.py, as SVG."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from exit_study_results import full_seconds, median_seconds, timed_runs
from hf_adaptive.files import write_whole

# Okabe and Ito's colours, which colour-blind readers can tell apart; lines differ in dashes and marks as well.
STYLES = {
    "joint": ("#D55E00", "-", "s"),
    "sweet": ("#0072B2", "-", "o"),
    "multi-model": ("#009E73", "-", "D"),
    "disjoint": ("#7F7F7F", "--", "v"),
    "open-to-closed": ("#CC79A7", "--", "<"),
    "closed-to-open": ("#E69F00", "--", ">"),
    "joint-then-sweet": ("#CC79A7", ":", "P"),
    "sweet-then-joint": ("#E69F00", ":", "X"),
}
OTHER_STYLES = (("#56B4E9", "-.", "^"), ("#000000", "-.", "p"), ("#56B4E9", ":", "h"), ("#000000", ":", "*"))
LAYER_COLOURS = "viridis"
# Two panels: what the paper compares, and what lies between SWEET and joint training.
PANELS = {
    "the paper's methods": lambda method: method in ("joint", "sweet", "multi-model", "disjoint"),
    "between SWEET and joint": lambda method: method not in ("multi-model", "disjoint") and "+" not in method,
    "with branches and distillation": lambda method: "+" in method,
}
RC = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # One result gives one file.
    "svg.hashsalt": "exit-study",
}


def write_figures(
    summary: dict[str, Any], runs: list[dict[str, Any]], timing: dict[str, Any], folder: Path, kind: str = "svg"
) -> None:
    """Draws all figures.

    Args:
        summary (`dict`): From `summarise`.
        runs (`list[dict]`): Contents of the runs' files.
        timing (`dict`): Measured time.
        folder (`Path`): Where they go.
        kind (`str`): Ending of the files.
    """
    with matplotlib.rc_context(RC):
        for name, setting in summary["settings"].items():
            ending = f"{name.replace(', ', '-')}.{kind}"
            _save(_panels(setting, _draw_curves), folder / f"curves-{ending}")
            _save(_panels(setting, _draw_exits), folder / f"exits-{ending}")
            recorded = [run for run in runs if run["gradient_conflict"] and f"{run['task']}, {run['pooling']}" == name]
            if recorded:
                _save(_conflict_figure(recorded), folder / f"gradient-conflict-{ending}")
        if timing["points"]:
            _save(_time_figure(timing), folder / f"time.{kind}")
            _save(_score_over_time_figure(summary, timing), folder / f"score-over-time.{kind}")


def style(method: str, methods: list[str]) -> dict[str, Any]:
    """Colour, dashes and mark of a method."""
    others = [name for name in methods if name not in STYLES]
    colour, line, mark = STYLES.get(method) or OTHER_STYLES[others.index(method) % len(OTHER_STYLES)]
    return {"color": colour, "linestyle": line, "marker": mark, "markersize": 5}


def _panels(setting: dict[str, Any], draw: Any) -> Figure:
    methods = list(setting["exits"])
    panels = {title: [m for m in methods if belongs(m)] for title, belongs in PANELS.items()}
    panels = {title: shown for title, shown in panels.items() if shown}
    figure = Figure(figsize=(5 * len(panels), 4.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, shown) in zip(all_axes, panels.items()):
        draw(axes, setting, shown)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(_limits(setting))
        axes.grid(alpha=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=9)
    all_axes[0].set_ylabel(f"{setting['metric']}, %")
    seeds = max(len(own) for own in setting["seeds"].values())
    figure.suptitle(
        f"{setting['task']}, {setting['pooling']} pooling: mean of {seeds} seeds, 95 % intervals", fontsize=11
    )
    return figure


def _limits(setting: dict[str, Any]) -> tuple[float, float]:
    """From the scores' means: the interval of few seeds can be wider than any score."""
    curves = np.array([curve["mean"] for curve in setting["curves"].values()], dtype=float)
    exits = [one["mean"] for intervals in setting["exits"].values() for one in intervals]
    low, high = 100 * min(np.nanmin(curves), *exits), 100 * max(np.nanmax(curves), *exits)
    margin = 0.15 * (high - low) + 1
    return max(0, low - margin), min(100, high + margin)


def _draw_curves(axes: Axes, setting: dict[str, Any], methods: list[str]) -> None:
    grid = np.array(setting["grid"])
    for method in methods:
        curve = {name: 100 * np.array(values, dtype=float) for name, values in setting["curves"][method].items()}
        own = style(method, list(setting["exits"]))
        axes.plot(grid, curve["mean"], label=method, markevery=12, linewidth=1.6, **own)
        axes.fill_between(grid, curve["lower"], curve["upper"], color=own["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel("cost: fraction of the layers run")


def _draw_exits(axes: Axes, setting: dict[str, Any], methods: list[str]) -> None:
    places = np.arange(len(setting["exit_layers"]))
    for number, method in enumerate(methods):
        intervals = setting["exits"][method]
        means = [100 * one["mean"] for one in intervals]
        halves = [100 * (one["half"] or 0) for one in intervals]
        # Side by side, so that no interval covers another.
        shift = 0.06 * (number - (len(methods) - 1) / 2)
        own = style(method, list(setting["exits"]))
        axes.errorbar(
            places + shift, means, yerr=halves, label=method, capsize=2, linewidth=1.2, elinewidth=0.8, **own
        )
    axes.set_xticks(places, [f"layer {layer}" for layer in setting["exit_layers"]])
    axes.set_xlabel("every example answered by the exit after")


def _conflict_figure(runs: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(3.6 * len(runs), 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, run in zip(all_axes, runs):
        _draw_conflict(axes, run)
    all_axes[0].set_ylabel("cosine of the exits' gradients,\nmean over pairs")
    figure.suptitle(f"{runs[0]['task']}, {runs[0]['pooling']} pooling, seed {runs[0]['seed']}", fontsize=11)
    handles = {line.get_label(): line for axes in all_axes for line in axes.get_lines() if line.get_label()[0] != "_"}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return figure


def _draw_conflict(axes: Axes, run: dict[str, Any]) -> None:
    records = run["gradient_conflict"]
    steps = [record["step"] / run["steps"] for record in records]
    similarity = np.array([record["mean_similarity"] for record in records], dtype=float)
    layers = similarity.shape[1]
    colours = matplotlib.colormaps[LAYER_COLOURS](np.linspace(0, 0.85, layers))
    reached = [layer for layer in range(layers) if np.isfinite(similarity[:, layer]).any()]
    for layer in reached:
        axes.plot(
            steps, similarity[:, layer], color=colours[layer], marker="o", markersize=3, label=f"layer {layer + 1}"
        )
    if not reached:
        axes.text(
            0.5, 0.5, "undefined: no layer gets\nthe gradients of two exits", ha="center", transform=axes.transAxes
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(-0.03, 1.03)
    axes.set_title(run["method"], fontsize=10)
    axes.set_xlabel("share of training")
    axes.grid(alpha=0.25)


def _time_figure(timing: dict[str, Any]) -> Figure:
    figure, all_axes = _timed_axes(timing)
    for setting, axes in all_axes.items():
        for run, points in _timed_in(timing, setting):
            _draw_time(axes, points, full_seconds(timing, run), _timed_style(timing, run), run["method"])
        axes.axline((0, 0), slope=1, color="black", linewidth=0.7, linestyle=":", label="time = cost")
        axes.set_xlabel("cost: fraction of the layers run")
    # Once all lines are drawn: the axes share their range.
    for axes in all_axes.values():
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    next(iter(all_axes.values())).set_ylabel("measured time, all layers of joint = 1")
    _legend_below(figure, all_axes)
    return figure


def _score_over_time_figure(summary: dict[str, Any], timing: dict[str, Any]) -> Figure:
    """The curves with their bands over seeds, cost replaced by the time that was measured at that cost."""
    figure, all_axes = _timed_axes(timing, share_y=False)
    for (task, pooling), axes in all_axes.items():
        setting = summary["settings"][f"{task}, {pooling}"]
        for run, points in _timed_in(timing, (task, pooling)):
            _draw_score_over_time(axes, setting, run, points, full_seconds(timing, run), _timed_style(timing, run))
        axes.set_ylim(_limits(setting))
        axes.set_ylabel(f"{setting['metric']}, %")
        axes.set_xlabel("measured time, all layers of joint = 1")
    _legend_below(figure, all_axes)
    return figure


def _timed_axes(timing: dict[str, Any], share_y: bool = True) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """Axes for every setting that was timed."""
    settings = list(dict.fromkeys((run["task"], run["pooling"]) for run, _ in timed_runs(timing)))
    figure = Figure(figsize=(3.9 * len(settings), 4.2), layout="constrained")
    all_axes = dict(zip(settings, figure.subplots(1, len(settings), sharey=share_y, squeeze=False)[0]))
    for (task, pooling), axes in all_axes.items():
        axes.set_title(f"{task}, {pooling} pooling", fontsize=10)
        axes.grid(alpha=0.25)
    return figure, all_axes


def _timed_in(timing: dict[str, Any], setting: tuple[str, str]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    return [(run, points) for run, points in timed_runs(timing) if (run["task"], run["pooling"]) == setting]


def _timed_style(timing: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    return style(run["method"], list(dict.fromkeys(other["method"] for other, _ in timed_runs(timing))))


def _legend_below(figure: Figure, all_axes: dict[tuple[str, str], Axes]) -> None:
    lines = [line for axes in all_axes.values() for line in axes.get_lines() if line.get_label()[0] != "_"]
    handles = {line.get_label(): line for line in lines}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def _draw_score_over_time(
    axes: Axes,
    setting: dict[str, Any],
    run: dict[str, Any],
    points: list[dict[str, Any]],
    full: float,
    own: dict[str, Any],
) -> None:
    curve = setting["curves"][run["method"]]
    times = np.interp(
        setting["grid"], [point["cost"] for point in points], [median_seconds(point) / full for point in points]
    )
    mean, lower, upper = (100 * np.array(curve[name], dtype=float) for name in ("mean", "lower", "upper"))
    axes.plot(times, mean, label=run["method"], markevery=12, linewidth=1.6, **own)
    axes.fill_between(times, lower, upper, color=own["color"], alpha=0.12, linewidth=0)


def _draw_time(axes: Axes, points: list[dict[str, Any]], full: float, own: dict[str, Any], method: str) -> None:
    costs = [point["cost"] for point in points]
    axes.plot(costs, [median_seconds(point) / full for point in points], label=method, linewidth=1.4, **own)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    # Without the date, so that one result gives one file.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    write_whole(path, lambda draft: figure.savefig(draft, dpi=110, metadata=metadata))
