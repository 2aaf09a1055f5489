"""What the comparison of deployments found: JSON, a page in Markdown, and a plot for each task."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from deployment_figure import draw
from deployment_systems import OURS, PROMISED, REFERENCE
from deployment_timing import has_vnni
from measuring import Spread
from results import Result, Target

sys.path.append(str(Path(__file__).resolve().parent.parent))
from hf_adaptive.modeling.switch import replaced_files
from study_curves import mean_band

# Losses of accuracy against the reference, for each of which the fastest point is named.
LOSSES = (0.005, 0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and its interval at 95 % (none of a single seed).

    Args:
        mean, lower, upper (`float`): `lower` and `upper` are None with a single seed.
    """

    mean: float
    lower: float | None
    upper: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """By Student's t, over at least one value."""
        band = mean_band(list(values))
        if len(values) == 1:
            return cls(float(band.mean), None, None)
        return cls(float(band.mean), float(band.lower), float(band.upper))

    def show(self, digits: int) -> str:
        """For the table."""
        text = f"{self.mean:.{digits}f}"
        return text if self.upper is None else f"{text} ± {self.upper - self.mean:.{digits}f}"


@dataclass(frozen=True)
class Point:
    """One line of a task's table.

    Args:
        name, series, label, kind (`str`): As in `System`.
        seeds (`int`): Over which the intervals are.
        accuracy (`Interval`): In percent.
        speed (`Interval`): Throughput from text to class / the reference's.
        texts_per_second (`float`): The same in texts; mean over the seeds.
        median_ms, p99_ms (`float`): Of a single text, from text to class; mean over the seeds.
        cost (`float`, *optional*): Fraction of the layers run, where there are exits.
    """

    name: str
    series: str
    label: str
    kind: str
    seeds: int
    accuracy: Interval
    speed: Interval
    texts_per_second: float
    median_ms: float
    p99_ms: float
    cost: float | None


class TaskResults:
    """One task.

    Args:
        name (`str`): Of the task.
        runs (`list[dict]`): What was measured with each seed, by point; see `Timing.measure`.
    """

    def __init__(self, name: str, runs: list[dict[str, Any]]):
        self.name = name
        self.runs = runs
        names = [name for name in runs[0] if all(name in run for run in runs)]
        self.points = {name: self._point(name) for name in names}

    def _point(self, name: str) -> Point:
        own = [run[name] for run in self.runs]
        costs = [one["cost"] for one in own if one["cost"] is not None]
        return Point(
            name,
            *(own[0][field] for field in ("series", "label", "kind")),
            len(own),
            Interval.of([100 * one["accuracy"] for one in own]),
            Interval.of([_ratio(run[REFERENCE], run[name], "seconds") for run in self.runs]),
            statistics.mean(one["texts"] / statistics.median(one["seconds"]) for one in own),
            statistics.mean(1000 * statistics.median(one["single_seconds"]) for one in own),
            statistics.mean(1000 * float(np.quantile(one["single_seconds"], 0.99)) for one in own),
            statistics.mean(costs) if costs else None,
        )

    # What it says

    @property
    def front(self) -> list[Point]:
        """Points that no other beats in both accuracy and speed, the slowest first."""
        return [
            point
            for point in sorted(self.points.values(), key=lambda point: point.speed.mean)
            if not any(_beats(other, point) for other in self.points.values())
        ]

    def sentences(self) -> list[str]:
        """What to choose, in words."""
        front = [f"{point.name} ({_where(point)})" for point in self.front]
        return [f"Nothing is better in both than, from slow to fast: {'; '.join(front)}.", *self._by_loss()]

    def _by_loss(self) -> list[str]:
        full = self.points[REFERENCE].accuracy.mean
        return [self._fastest(loss, full) for loss in LOSSES]

    def _fastest(self, loss: float, full: float) -> str:
        """Who is fastest among those that lose at most so much; and who is the fastest of the others."""
        within = [point for point in self.points.values() if point.accuracy.mean >= full - 100 * loss - 1e-9]
        ours = max((one for one in within if one.kind == OURS), key=_speed, default=None)
        rival = max((one for one in within if one.kind != OURS), key=_speed)
        allowed = f"At most {100 * loss:g} points below the whole model in torch ({full:.1f} %)"
        if ours is None:
            return f"{allowed}: **a rival is better**: {rival.name} ({_where(rival)}); of ours nothing is within."
        if rival.speed.mean >= ours.speed.mean:
            first = f"**a rival is better**: {rival.name} ({_where(rival)})"
            return f"{allowed}: {first}; the fastest of ours is {ours.name} ({_where(ours)})."
        return f"{allowed}: {ours.name} ({_where(ours)}); the fastest rival is {rival.name} ({_where(rival)})."

    def table(self) -> list[str]:
        """Markdown, by kind, as listed."""
        front = {point.name for point in self.front}
        lines = [
            "| | accuracy, % | times as fast | texts/s | one text, ms: median | p99 | layers run |",
            "|---|---|---|---|---|---|---|",
        ]
        for point in sorted(self.points.values(), key=lambda point: point.kind == OURS):
            name = f"**{point.name}**" if point.name in front else point.name
            cost = "–" if point.cost is None else f"{point.cost:.2f}"
            lines.append(
                f"| {name} | {point.accuracy.show(1)} | {point.speed.show(2)} | {point.texts_per_second:,.0f} | "
                f"{point.median_ms:.2f} | {point.p99_ms:.2f} | {cost} |"
            )
        return lines

    def speed_rows(self) -> list[Result]:
        """The goals for exits × ONNX × int8; over tokenised texts."""
        torch_exits, fp32, int8 = (f"exits, {engine}, {PROMISED}" for engine in ("torch", "ONNX fp32", "ONNX int8"))
        if not {torch_exits, fp32, int8, "ONNX int8"} <= self.points.keys():
            return []
        goal = 10 if has_vnni() else 6
        rows = [
            self._row(
                f"ONNX fp32 by stages, {self.runs[0][fp32]['texts']} texts",
                "time / torch `predict` at the same thresholds",
                Target(1.0),
                [_ratio(run[fp32], run[torch_exits], "tokenised_seconds") for run in self.runs],
                fp32,
            ),
            self._row(
                f"ONNX int8 by stages, {PROMISED}",
                "torch fp32 plain in data set order, batches of 32 / time",
                Target(goal, at_least=True),
                [_ratio(run[REFERENCE], run[int8], "tokenised_seconds") for run in self.runs],
                int8,
            ),
        ]
        for name, share in (("median", 0.5), ("p99", 0.99)):
            ratios = [
                _alone(run[int8], share) / (_alone(run["ONNX int8"], share) * run[int8]["cost"]) for run in self.runs
            ]
            what = f"one text at a time, ONNX int8 by stages, {name}"
            rows.append(self._row(what, "time / (plain ONNX int8 × fraction of layers)", Target(1.15), ratios, int8))
        return rows

    def _row(self, what: str, measured_as: str, target: Target, ratios: list[float], point: str) -> Result:
        values = {
            "fraction of layers": self.points[point].cost or 1.0,
            "accuracy, %": self.points[point].accuracy.mean,
        }
        return Result(self.name, f"{self.name}: {what}", measured_as, target, Spread.of(ratios), values)

    def promises(self) -> list[str]:
        """What calibration said of each promised setting, with the first seed."""
        run = self.runs[0]
        promised = {name: one["setting"].get("said") for name, one in run.items() if name.endswith(PROMISED)}
        return [f"{name.removesuffix(f', {PROMISED}')}: {said}" for name, said in promised.items() if said]


class Comparison:
    """All tasks.

    Args:
        measured (`list[dict]`): Of every task and seed, as the files in timing/ hold it.
        settings (`dict[str, str]`): What was run, for the reader.
    """

    def __init__(self, measured: list[dict[str, Any]], settings: Mapping[str, str]):
        self.settings = settings
        self.machine = measured[0]["machine"] if measured else {}
        names = dict.fromkeys(one["task"] for one in measured)
        self.tasks = [TaskResults(name, [one["points"] for one in measured if one["task"] == name]) for name in names]

    def write(self, folder: Path) -> None:
        """Writes `results.json`, `results.md` and a plot for each task."""
        plain = {
            "machine": self.machine,
            "settings": self.settings,
            "tasks": {
                task.name: {
                    "points": [asdict(point) for point in task.points.values()],
                    "front": [point.name for point in task.front],
                    "speed": [row.to_dict() for row in task.speed_rows()],
                    "promises": task.promises(),
                }
                for task in self.tasks
            },
        }
        with replaced_files(folder / "results", "results.json") as new:
            (new / "results.json").write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            (new / "results.md").write_text(self.text() + "\n", encoding="utf-8")
            for task in self.tasks:
                draw(task.name, list(task.points.values()), task.front, new / f"{task.name}.png")

    def text(self) -> str:
        """The page."""
        if not self.tasks:
            return "Nothing was measured yet."
        lines = [*self._introduction(), "", "## The goals for speed", "", *self._goals()]
        for task in self.tasks:
            lines += ["", f"## {task.name}", "", f"![accuracy over speed]({task.name}.png)", ""]
            lines += [f"- {sentence}" for sentence in task.sentences()]
            lines += ["", *task.table()]
            if promises := task.promises():
                lines += ["", "What was promised (first seed):", "", *(f"- {promise}" for promise in promises)]
        return "\n".join(lines)

    def _introduction(self) -> list[str]:
        machine = self.machine
        instructions = "with" if has_vnni() else "without"
        settings = "; ".join(f"{name}: {value}" for name, value in self.settings.items())
        seeds = max(point.seeds for task in self.tasks for point in task.points.values())
        return [
            "# Exits beside what people use today",
            "",
            f"Machine: {machine['cpu']}, {machine['cores']} CPU cores, {machine['threads']} threads, {instructions} "
            f"instructions for 8-bit products; torch {machine['torch']}, transformers {machine['transformers']}.",
            f"{settings[0].upper()}{settings[1:]}; {seeds} seeds (± is the interval of the mean at 95 %, by Student's "
            "t).",
            "",
            "Times as fast: throughput from text to class, tokenizer included, beside the whole model in torch fp32, "
            "in data set order, in batches of 32; everything else but TF-IDF and static embeddings runs in batches of "
            "similar length. All ways ran in turn in one process. Lines in bold are on the front: nothing is both "
            "more accurate and faster. All heads see the same pooling, except those of an exit as a stock model, "
            "which see what the stock class does.",
        ]

    def _goals(self) -> list[str]:
        rows = [row for task in self.tasks for row in task.speed_rows()]
        lines = ["| what | measured as | goal | measured | quartiles over seeds | met |", "|---|---|---|---|---|---|"]
        for row in rows:
            spread = f"{row.ratio.lower:.2f}–{row.ratio.upper:.2f} ({row.ratio.count})"
            met = "yes" if row.is_met else "**no**"
            lines.append(
                f"| {row.what} | {row.measured_as} | {row.target} | {row.ratio.median:.2f} | {spread} | {met} |"
            )
        return lines


def _ratio(above: Mapping[str, Any], below: Mapping[str, Any], which: str) -> float:
    """Of seconds measured beside each other."""
    return statistics.median(one / other for one, other in zip(above[which], below[which]))


def _alone(point: Mapping[str, Any], share: float) -> float:
    return float(np.quantile(point["single_tokenised_seconds"], share))


def _beats(other: Point, point: Point) -> bool:
    own, theirs = (point.accuracy.mean, point.speed.mean), (other.accuracy.mean, other.speed.mean)
    return theirs != own and theirs[0] >= own[0] and theirs[1] >= own[1]


def _speed(point: Point) -> float:
    return point.speed.mean


def _where(point: Point) -> str:
    return f"{point.accuracy.mean:.1f} %, {point.speed.mean:.1f} times"
