"""The picture of a trade-off between accuracy and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE, EXITS, CHOSEN, PLAIN, FULL = "#0b6e99", "#d9730d", "#b3261e", "#2f7d4f", "#6b6b6b"
Range = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """One point of a picture.

    Args:
        x (`float`): Cost, or times as fast.
        score (`float`): Of the answers given.
        x_range (`tuple[float, float]`, *optional*): Least and largest `x` that was measured.
        score_range (`tuple[float, float]`, *optional*): Interval of the score.
        label (`str`): Written beside it.
    """

    x: float
    score: float
    x_range: Range | None = None
    score_range: Range | None = None
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One half of a picture.

    Args:
        x_label (`str`): What is to the right.
        title (`str`): What was measured.
        points (`Sequence[Mark]`): One for each setting of the thresholds.
        exits (`Sequence[Mark]`): Every row answered by one exit.
        chosen (`Mark`, *optional*): The stored thresholds.
        plain (`Mark`, *optional*): A model without exits.
        joined (`bool`): Whether the points are joined by a line: where each follows from the one before it, and not
            where noise of a measurement would make it jump.
    """

    x_label: str
    title: str
    points: Sequence[Mark] = ()
    exits: Sequence[Mark] = ()
    chosen: Mark | None = None
    plain: Mark | None = None
    joined: bool = True


@dataclass(frozen=True)
class Picture:
    """Panels beside each other that share the score's axis.

    Args:
        title (`str`): What it shows.
        panels (`Sequence[Panel]`): From left to right.
        score_name (`str`): What is up.
        criterion (`str`): What is compared with the thresholds.
        full_score (`float`): Of running everything, drawn as a line.
        interval (`str`): What the bars mean; empty if there are none.
    """

    title: str
    panels: Sequence[Panel]
    score_name: str
    criterion: str
    full_score: float
    interval: str = ""


def draw(picture: Picture, path: str) -> None:
    """Writes a picture to `path`; the ending says which kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with matplotlib.rc_context({**style, "grid.color": "#e4e4e4", "grid.linewidth": 0.8}):
        figure = Figure(figsize=(6.2 * len(picture.panels), 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(picture.panels), sharey=True, squeeze=False)[0]
        for panel, area in zip(picture.panels, axes):
            _draw_panel(panel, picture, area)
        figure.suptitle(picture.title, fontsize=13)
        axes[0].set_ylabel(picture.score_name)
        figure.legend(*_legend(axes), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=130)


def _draw_panel(panel: Panel, picture: Picture, area: "Axes") -> None:
    area.axhline(picture.full_score, color=FULL, linewidth=1, linestyle=":", label="all layers")
    points = sorted(panel.points, key=lambda mark: mark.x)
    if points:
        area.plot(
            [mark.x for mark in points],
            [mark.score for mark in points],
            "-o" if panel.joined else "o",
            color=CURVE,
            markersize=4,
            label=f"one threshold for all exits ({picture.criterion})",
        )
    if not panel.joined:
        for mark in points:
            _draw_ranges(mark, CURVE, area)
    for mark in panel.exits:
        area.plot(mark.x, mark.score, "D", color=EXITS, markersize=7, label="one exit for all")
        area.annotate(mark.label, (mark.x, mark.score), (6, -14), textcoords="offset points", color=EXITS, fontsize=10)
    _draw_special(panel.plain, "s", PLAIN, "model without exits", area)
    _draw_special(panel.chosen, "*", CHOSEN, f"chosen thresholds{picture.interval}", area)
    area.set_xlabel(panel.x_label)
    area.set_title(panel.title, fontsize=11)
    area.margins(x=0.08, y=0.14)


def _draw_special(mark: Mark | None, shape: str, colour: str, label: str, area: "Axes") -> None:
    if mark is None:
        return
    _draw_ranges(mark, colour, area)
    area.plot(mark.x, mark.score, shape, color=colour, markersize=15 if shape == "*" else 8, label=label, zorder=5)


def _draw_ranges(mark: Mark, colour: str, area: "Axes") -> None:
    if mark.score_range is not None:
        area.vlines(mark.x, *mark.score_range, color=colour, linewidth=1.4, alpha=0.7)
    if mark.x_range is not None:
        area.hlines(mark.score, *mark.x_range, color=colour, linewidth=1.4, alpha=0.7)


def _legend(axes: Sequence["Axes"]) -> tuple[list[Any], list[str]]:
    """Every label once, whichever panel it is in."""
    found = {label: handle for area in axes for handle, label in zip(*area.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)
