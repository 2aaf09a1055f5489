"""What the rows of the benchmark give, and the files made of it: JSON, a Markdown table, a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import Spread

from hf_adaptive.modeling.switch import replaced_files

LAYERS_COLOR, TOKENS_COLOR, IDEAL_COLOR = "#0b6e99", "#d9730d", "#6b6b6b"


@dataclass(frozen=True)
class Target:
    """What a ratio should be.

    Args:
        limit (`float`): The largest ratio that meets it, or the smallest.
        at_least (`bool`): Whether larger ratios are better.
    """

    limit: float
    at_least: bool = False

    def is_met(self, ratio: float) -> bool:
        """Whether this ratio is good enough."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Args:
        row (`str`): The name of the row of the benchmark, as in `--rows`.
        what (`str`): What was run.
        measured_as (`str`): What the ratio is of.
        target (`Target`, *optional*): None where none was set.
        ratio (`Spread`): Measured.
        values (`dict[str, float]`): What the ratio was made of, by name and unit.
    """

    row: str
    what: str
    measured_as: str
    target: Target | None
    ratio: Spread
    values: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the JSON file."""
        target = None if self.target is None else str(self.target)
        return {**asdict(self), "target": target, "is_met": self.is_met}

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None else self.target.is_met(self.ratio.median)


@dataclass(frozen=True)
class CurvePoint:
    """What one threshold costs.

    Args:
        threshold (`float`): Of every exit.
        layers (`float`): Fraction of the layers run.
        tokens (`float`): The same with each text counted by its tokens.
        time (`Spread`): Measured seconds / the plain model's.
    """

    threshold: float
    layers: float
    tokens: float
    time: Spread


@dataclass
class Results:
    """Everything that was measured.

    Args:
        machine (`dict`): See `describe_machine`.
        settings (`dict`): What was run on it.
        rows (`list[Result]`): Lines of the table.
        curve (`list[CurvePoint]`): Of the plot.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Result] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)

    def add(self, measured: Sequence[Result | CurvePoint]) -> None:
        """Adds what one row of the benchmark gave."""
        self.rows.extend(one for one in measured if isinstance(one, Result))
        self.curve.extend(one for one in measured if isinstance(one, CurvePoint))

    def write(self, folder: Path) -> None:
        """Writes `benchmarks.json`, `benchmarks.md` and, where time was measured over cost, `cost_and_time.png`."""
        plain = {
            "machine": self.machine,
            "settings": self.settings,
            "rows": [row.to_dict() for row in self.rows],
            "curve": [asdict(point) for point in self.curve],
        }
        text = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
        with replaced_files(folder, "benchmarks.json") as new:
            (new / "benchmarks.json").write_text(text, encoding="utf-8")
            (new / "benchmarks.md").write_text(self.table() + "\n", encoding="utf-8")
            if self.curve:
                self._plot(new / "cost_and_time.png")

    def table(self) -> str:
        """Markdown: the machine, what was run, and a line for each result."""
        lines = [
            self._machine_line(),
            "",
            self._settings_line(),
            "",
            "| what | measured as | target | measured | quartiles | met | from |",
            "|---|---|---|---|---|---|---|",
            *(_table_line(row) for row in self.rows),
        ]
        return "\n".join(lines)

    def _machine_line(self) -> str:
        machine = self.machine
        versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "hf_adaptive"))
        processor = machine["gpu"] or machine["cpu"]
        return f"Machine: {processor}, {machine['cores']} CPU cores, {machine['threads']} threads; {versions}."

    def _settings_line(self) -> str:
        described = "; ".join(f"{name}: {value}" for name, value in self.settings.items())
        return f"Run with {described}. Targets are for a 12-layer base-size encoder on 2 CPU cores or a GPU."

    def _plot(self, path: Path) -> None:
        figure = Figure(figsize=(6.4, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        points = sorted(self.curve, key=lambda point: point.layers)
        largest = 1.08 * max(1, *(point.time.upper for point in points))
        axes.plot([0, 1], [0, 1], "--", color=IDEAL_COLOR, linewidth=1, label="time = cost")
        axes.axhline(1, color=IDEAL_COLOR, linewidth=1, linestyle=":", label="plain model, length-sorted")
        by_tokens = [point.tokens for point in points], [point.time.median for point in points]
        axes.plot(*by_tokens, "o", color=TOKENS_COLOR, markerfacecolor="white", label="cost weighted by tokens")
        axes.errorbar(
            [point.layers for point in points],
            [point.time.median for point in points],
            yerr=[
                [point.time.median - point.time.lower for point in points],
                [point.time.upper - point.time.median for point in points],
            ],
            fmt="-o",
            color=LAYERS_COLOR,
            markersize=5,
            capsize=3,
            label="cost: fraction of the layers run (bars: quartiles)",
        )
        axes.set(xlim=(0, 1.08), ylim=(0, largest), xlabel="cost", ylabel="measured time / plain model's")
        axes.set_title(f"predict over thresholds: {self.settings['encoder']}, {self.machine['device']}", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False, fontsize=9)
        figure.savefig(path, dpi=130)


def _table_line(row: Result) -> str:
    met = {None: "–", True: "yes", False: "**no**"}[row.is_met]
    target = "–" if row.target is None else str(row.target)
    spread = f"{row.ratio.lower:.3f}–{row.ratio.upper:.3f} ({row.ratio.count})"
    values = "; ".join(f"{name} {_short(value)}" for name, value in row.values.items())
    return f"| {row.what} | {row.measured_as} | {target} | {row.ratio.median:.3f} | {spread} | {met} | {values} |"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
