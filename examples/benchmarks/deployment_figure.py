"""The plot of the comparison of deployments: accuracy over times as fast, with the front."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployment_systems import OURS, SMALLER, TODAY, WISHES
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

if TYPE_CHECKING:
    from deployment_results import Point

COLORS = {TODAY: "#6b6b6b", SMALLER: "#d9730d", OURS: "#0b6e99"}
MARKERS = {TODAY: "s", SMALLER: "^", OURS: "o"}
# What loses more points than this is named under the title, and bars end so far above the best, so that points can be
# told apart: two seeds give bars of tens of points.
LOWEST, HIGHEST = 12.0, 2.5
KEY = (
    "“At most 2 points lost” is what thresholds were chosen for, on other texts. No number: slower points of a line.\n"
    "Bars: 95 % intervals of the mean over seeds, as far as the picture goes."
)


def draw(title: str, points: Sequence["Point"], front: Sequence["Point"], path: Path) -> None:
    """Writes the plot as PNG: numbers stand at the front, and at the fastest point of every other line; a list beside
    it names them."""
    best = max(point.accuracy.mean for point in points)
    floor = best - LOWEST
    below = [point for point in points if point.accuracy.mean < floor]
    points = [point for point in points if point.accuracy.mean >= floor]
    fastest = {point.series: point for point in sorted(points, key=lambda one: one.speed.mean)}
    named = [point for point in points if point in front or point is fastest[point.series]]
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(
        [point.speed.mean for point in front],
        [point.accuracy.mean for point in front],
        color="#c9c9c9",
        linewidth=6,
        solid_capstyle="round",
        zorder=1,
        label="front: nothing is better in both",
    )
    for kind in (TODAY, SMALLER, OURS):
        _points(axes, kind, [point for point in points if point.kind == kind])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter("")
    axes.set_xticks([tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if _is_near(tick, points)])
    axes.margins(x=0.15, y=0.1)
    axes.set(xlabel="times as fast as torch fp32, from text to class", ylabel="accuracy, %")
    axes.set_ylim(bottom=floor - 0.5, top=best + HIGHEST)
    words = [f"{title}: accuracy over speed. {KEY}", *([_outside(below)] if below else [])]
    axes.set_title("\n".join(words), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    named = sorted(named, key=lambda point: (list(COLORS).index(point.kind), -point.accuracy.mean))
    _list(axes, named)
    _number(axes, canvas, named, points)
    figure.savefig(path, dpi=130)


def _outside(points: Sequence["Point"]) -> str:
    named = ", ".join(f"{_text(point)} ({point.accuracy.mean:.1f} %)" for point in points)
    return "\n".join(textwrap.wrap(f"Below the picture: {named}.", 150))


def _is_near(tick: float, points: Sequence["Point"]) -> bool:
    speeds = [point.speed.mean for point in points]
    return min(speeds) / 2 <= tick <= max(speeds) * 2


def _points(axes: Any, kind: str, points: Sequence["Point"]) -> None:
    style = {"color": COLORS[kind], "marker": MARKERS[kind], "markersize": 6}
    for number, series in enumerate(dict.fromkeys(point.series for point in points)):
        own = sorted((one for one in points if one.series == series), key=lambda one: one.speed.mean)
        axes.errorbar(
            [point.speed.mean for point in own],
            [point.accuracy.mean for point in own],
            yerr=_reach(own),
            linewidth=1,
            elinewidth=0.6,
            zorder=2,
            label=kind if number == 0 else None,
            **style,
        )


def _reach(points: Iterable["Point"]) -> list[float]:
    return [0.0 if one.accuracy.upper is None else one.accuracy.upper - one.accuracy.mean for one in points]


def _list(axes: Any, points: Sequence["Point"]) -> None:
    """Names the numbers, to the right of the picture."""
    for number, point in enumerate(points, start=1):
        text = f"{number}  {_text(point)} ({point.accuracy.mean:.1f} %)"
        place = (1.02, 0.97 - 0.045 * (number - 1))
        axes.text(*place, text, transform=axes.transAxes, fontsize=9, color=COLORS[point.kind], va="top")


def _number(axes: Any, canvas: Any, named: Sequence["Point"], points: Sequence["Point"]) -> None:
    """Writes numbers beside points where they cover neither a point nor a number, as far as there is room."""
    canvas.draw()
    within = axes.get_window_extent(canvas.get_renderer())
    inverse = axes.transData.inverted()
    taken = [_box(x, y, 9, 9) for x, y in map(axes.transData.transform, map(_place, points))]
    for number, point in enumerate(named, start=1):
        x, y = axes.transData.transform(_place(point))
        spots = [_box(x + dx, y + dy, 16, 13) for dx, dy in _around(16, 13)]
        best = min(spots, key=lambda spot: _covered(spot, taken, within))
        taken.append(best)
        axes.annotate(
            str(number),
            xy=_place(point),
            xytext=inverse.transform(((best[0] + best[2]) / 2, (best[1] + best[3]) / 2)),
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=COLORS[point.kind],
            arrowprops={"arrowstyle": "-", "color": COLORS[point.kind], "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3},
            zorder=4,
        )


def _place(point: "Point") -> tuple[float, float]:
    return point.speed.mean, point.accuracy.mean


def _text(point: "Point") -> str:
    """The name in words: what was asked of the thresholds, or how many layers there are."""
    if point.label == point.series:
        return point.label
    if point.label in WISHES:
        loss, _, promised = point.label.partition(" points")
        return f"{point.series}: at most {loss} points lost{promised and ','}{promised}"
    if point.label.isdigit():
        return f"{point.series}: {point.label} layer{'' if point.label == '1' else 's'}"
    return f"{point.series}: {point.label}"


def _around(width: float, height: float) -> list[tuple[float, float]]:
    """Where the middle of a label may stand, beside its point; near places first."""
    spots = []
    for step in range(8):
        gap = 9 + 13 * step
        spots += [(width / 2 + gap, 0), (0, height / 2 + gap), (0, -height / 2 - gap), (-width / 2 - gap, 0)]
        for side in (1, -1):
            spots += [(side * (width / 2 + gap / 2), height + gap), (side * (width / 2 + gap / 2), -height - gap)]
    return spots


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _covered(box: tuple[float, ...], taken: Sequence[tuple[float, ...]], within: Any) -> float:
    """How much of what is there a label would cover, or stand outside."""
    inside = _overlap(box, (within.x0, within.y0, within.x1, within.y1))
    outside = (box[2] - box[0]) * (box[3] - box[1]) - inside
    return outside + sum(_overlap(box, other) for other in taken)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
