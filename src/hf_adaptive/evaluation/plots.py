"""Pictures of a report."""

from typing import TYPE_CHECKING

import matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .report import ExitReport

CURVE, EXITS, FULL = "#0b6e99", "#d9730d", "#6b6b6b"


def plot_report(report: "ExitReport", path: str) -> None:
    """Accuracy over cost and, where time was measured, over speed; written to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = report.full_seconds is not None and report.curve
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11 if timed else 6, 4.7), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
        _plot_over_cost(report, axes[0])
        if timed:
            _plot_over_speed(report, axes[1])
        for panel in axes:
            panel.margins(y=0.12)  # the labels of the exits stand below them
        figure.savefig(path, dpi=130)


def _plot_over_cost(report: "ExitReport", axes: "Axes") -> None:
    points = sorted(report.curve, key=lambda point: point.cost)
    if points:
        costs, scores = [point.cost for point in points], [point.accuracy for point in points]
        axes.plot(costs, scores, "-o", color=CURVE, markersize=4, label=f"by {report.criterion}")
    axes.plot(report.costs, report.accuracy, "D", color=EXITS, markersize=7, label="one exit for all")
    for layer, cost, score in zip(report.exit_layers, report.costs, report.accuracy):
        axes.annotate(f"layer {layer}", (cost, score), (5, -13), textcoords="offset points", color=EXITS, fontsize=9)
    axes.axhline(report.accuracy[-1], color=FULL, linewidth=1, linestyle=":", label="all layers")
    axes.set_xlabel("cost: fraction of the layers run")
    axes.set_ylabel(report.metric_name)
    axes.set_xlim(0, 1.08)
    axes.set_title(f"{report.num_examples} examples")
    # Below, where no data is.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)


def _plot_over_speed(report: "ExitReport", axes: "Axes") -> None:
    timed = sorted((report.speed(point), point.accuracy) for point in report.curve)
    axes.plot([speed for speed, _ in timed], [score for _, score in timed], "-o", color=CURVE, markersize=4)
    axes.axhline(report.accuracy[-1], color=FULL, linewidth=1, linestyle=":")
    axes.axvline(1, color=FULL, linewidth=1, linestyle=":")
    axes.set_xlabel("measured speed: times as fast as all layers")
    axes.set_title(f"timed on {report.timed_examples} of them, {report.device}, batches of {report.batch_size}")
