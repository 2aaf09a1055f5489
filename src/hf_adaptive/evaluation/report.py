"""What speed costs in accuracy: `evaluate_exits` and the report that it returns."""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import write_whole
from ..modeling.answers import Answers, choose_exits
from ..modeling.checks import check_classifier, check_count, is_number, shortened
from ..modeling.criteria import CRITERIA, ThresholdPolicy, problem_type
from ..modeling.examples import as_rows
from ..modeling.labels import LABEL_COLUMNS, has_label, labels_of
from .data_use import note_use
from .metrics import Metric, default_metric, metric_name, score
from .plain import plain_logits
from .plots import Mark, Panel, Picture, draw
from .timing import seconds_in_turn

# How many points of a curve are timed, and how often each.
_TIMED_POINTS, _ROUNDS = 5, 3


@dataclass(frozen=True)
class CurvePoint:
    """One operating point.

    Args:
        threshold (`float` or `list[float | None]`): In the criterion's unit, the same at every exit but the last; or
            one for each of them.
        cost (`float`): Mean fraction of the layers run.
        accuracy (`float`): Of the answers given.
        exit_distribution (`list[float]`): Share of the examples that left at each exit.
        seconds (`float`, *optional*): Median of the measured times for `timed_examples` examples; None if it was not
            measured.
        speed_range (`list[float]`, *optional*): Least and largest of how many times as fast as running everything it
            was, each time measured beside it.
    """

    threshold: float | list[float | None]
    cost: float
    accuracy: float
    exit_distribution: list[float]
    seconds: float | None = None
    speed_range: list[float] | None = None


@dataclass(frozen=True)
class PlainModel:
    """A model without exits, on the same examples.

    Args:
        accuracy (`float`): By the report's metric.
        seconds (`float`, *optional*): Median time for the report's `timed_examples`, in batches of similar length too.
        speed_range (`list[float]`, *optional*): As in [`CurvePoint`].
    """

    accuracy: float
    seconds: float | None = None
    speed_range: list[float] | None = None


@dataclass(frozen=True)
class ExitReport:
    """What each exit of a model is worth, and what leaving early saves.

    Args:
        exit_layers (`list[int]`): Layers run before each exit.
        costs (`list[float]`): The same as a fraction of all layers (heads and embeddings cost nothing here), with the
            branches passed, so that it can exceed 1.
        accuracy (`list[float]`): By exit: every example answered by that exit.
        metric_name (`str`): What `accuracy` is; `accuracy` unless another metric was given.
        curve (`list[CurvePoint]`): Over thresholds, ascending.
        num_examples (`int`): How many examples were used.
        criterion (`str`): What is compared with the thresholds.
        full_seconds (`float`, *optional*): Measured time of running everything for `timed_examples` examples.
        timed_examples (`int`): How many examples the seconds are for.
        batch_size (`int`): Examples run at a time.
        device (`str`): Where it was run.
        chosen (`CurvePoint`, *optional*): The thresholds that the configuration stores; None if it stores none.
        plain (`PlainModel`, *optional*): A model without exits, measured beside.
        num_unlabelled (`int`): Examples that were left out because they have no label (-100).
    """

    exit_layers: list[int]
    costs: list[float]
    accuracy: list[float]
    metric_name: str
    curve: list[CurvePoint]
    num_examples: int
    criterion: str
    full_seconds: float | None
    timed_examples: int
    batch_size: int
    device: str
    chosen: CurvePoint | None = None
    plain: PlainModel | None = None
    num_unlabelled: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the JSON file."""
        return dataclasses.asdict(self)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes the report, whole or not at all."""
        write_whole(path, lambda draft: Path(draft).write_text(json.dumps(self.to_dict(), indent=2) + "\n"))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "ExitReport":
        """Reads a report that `to_json` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExitReport":
        """From the plain values that `to_dict` gives; a `ValueError` if they are no report."""
        try:
            return cls._from_values(values)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"these values are no report of exits ({error}): {shortened(values)}.") from error

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> "ExitReport":
        parts: dict[str, Any] = {"curve": [CurvePoint(**point) for point in values["curve"]]}
        for name, kind in (("chosen", CurvePoint), ("plain", PlainModel)):
            part = values.get(name)
            parts[name] = None if part is None else kind(**part)
        return cls(**{**values, **parts})

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws accuracy over cost, and over measured speed, into a picture (the file's ending says which kind)."""
        write_whole(path, lambda draft: draw(self._picture(), draft))

    def interval(self, accuracy: float) -> tuple[float, float] | None:
        """Where an accuracy on new data lies, by Wilson's 95 % interval; None for other metrics.

        Args:
            accuracy (`float`): A share of the report's examples.
        """
        if self.metric_name != "accuracy":
            return None
        count, z = self.num_examples, 1.959964
        centre = (accuracy + z**2 / (2 * count)) / (1 + z**2 / count)
        half = z / (1 + z**2 / count) * math.sqrt(accuracy * (1 - accuracy) / count + (z / (2 * count)) ** 2)
        return centre - half, centre + half

    def speed(self, point: CurvePoint | PlainModel) -> float:
        """Measured: how many times as fast as running everything.

        Raises:
            ValueError: Time was not measured.
        """
        if self.full_seconds is None or point.seconds is None:
            raise ValueError("time was not measured: call evaluate_exits with timed_examples above 0.")
        return self.full_seconds / point.seconds

    def point_at_cost(self, cost: float) -> CurvePoint | None:
        """The most accurate point of at most this cost, the cheaper of two alike; None if there is none."""
        if not is_number(cost):
            raise ValueError(f"cost must be a number (0.4 = 40 % of the layers), got {shortened(cost)}.")
        within = [point for point in self.curve if point.cost <= cost]
        return max(within, key=lambda point: (point.accuracy, -point.cost), default=None)

    def _picture(self) -> Picture:
        is_timed = self.full_seconds is not None and any(point.seconds is not None for point in self.curve)
        return Picture(
            panels=[self._cost_panel(), *([self._speed_panel()] if is_timed else [])],
            title=f"What leaving early costs in {self.metric_name}, and what it saves",
            score_name=self.metric_name,
            criterion=self.criterion,
            full_score=self.accuracy[-1],
            interval=" (95 % interval)" if self.interval(0.5) is not None else "",
        )

    def _cost_panel(self) -> Panel:
        exits = zip(self.exit_layers, self.costs, self.accuracy)
        return Panel(
            x_label="cost: fraction of the layers run",
            title=f"{self.num_examples} examples",
            points=[Mark(point.cost, point.accuracy) for point in self.curve],
            exits=[Mark(cost, score, label=f"layer {layer}") for layer, cost, score in exits],
            chosen=self._mark(self.chosen, None if self.chosen is None else self.chosen.cost),
            plain=self._mark(self.plain, 1.0),
        )

    def _speed_panel(self) -> Panel:
        timed = [point for point in self.curve if point.seconds is not None]
        return Panel(
            x_label="measured speed: times as fast as all layers",
            title=f"timed on {self.timed_examples} of them, {self.device}, batches of {self.batch_size}",
            points=[Mark(self.speed(point), point.accuracy, _pair(point.speed_range)) for point in timed],
            chosen=self._timed_mark(self.chosen),
            plain=self._timed_mark(self.plain),
            joined=False,
        )

    def _timed_mark(self, point: CurvePoint | PlainModel | None) -> Mark | None:
        if point is None or point.seconds is None:
            return None
        return self._mark(point, self.speed(point), point.speed_range)

    def _mark(
        self, point: CurvePoint | PlainModel | None, x: float | None, x_range: list[float] | None = None
    ) -> Mark | None:
        if point is None or x is None:
            return None
        return Mark(x, point.accuracy, _pair(x_range), self.interval(point.accuracy))

    def __str__(self) -> str:
        rows = [
            f"{layer:>6} {cost:>6.2f} {accuracy:>10.4f}"
            for layer, cost, accuracy in zip(self.exit_layers, self.costs, self.accuracy)
        ]
        chosen = []
        if self.chosen is not None:
            chosen = [f"chosen thresholds: {self.metric_name} {self.chosen.accuracy:.4f}, cost {self.chosen.cost:.2f}"]
        left_out = [f"({self.num_unlabelled} examples without a label left out)"] if self.num_unlabelled else []
        return "\n".join([f"{'layers':>6} {'cost':>6} {self.metric_name:>10}", *rows, *left_out, *chosen])


def _pair(values: list[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])


def evaluate_exits(
    model: Any,
    dataset: Sequence[Mapping[str, Any]],
    metric: Metric | None = None,
    thresholds: Sequence[float] | None = None,
    batch_size: int = 32,
    timed_examples: int = 512,
    show_progress: bool = True,
    plain: Any = None,
) -> ExitReport:
    """Measures every exit, and the trade-off between accuracy and cost over thresholds.

    One pass over the data gives the accuracy at every threshold. The seconds come from real early-exit runs on the
    first `timed_examples` examples, at a few thresholds of different cost and at the stored ones, three times each,
    each time beside a run of everything.

    Args:
        model: A classifier with exits (or a cascade).
        dataset: Tokenised examples as for `predict`, with `labels`, `label` or `label_ids`; those of label -100 are
            left out.
        metric (`Callable`, *optional*): Called with `predictions` and `references` (arrays of shape `(examples,)`, or
            `(examples, labels)` for several labels at once); returns a number, or a dict whose first value counts, as
            `evaluate`'s `compute` does. Defaults to accuracy, for regression to Pearson's correlation.
        thresholds (`Sequence[float]`, *optional*): Defaults to 21 over the criterion's useful range.
        batch_size (`int`): Examples run at a time.
        timed_examples (`int`): How many examples to measure time on; 0 for none.
        show_progress (`bool`): Whether to show bars.
        plain (*optional*): A stock `…ForSequenceClassification` of the same labels and tokenizer, to be measured
            beside: on the same examples, in batches of similar length too.

    Raises:
        ValueError: No examples, no labels, or anything that `model.predict` refuses.
    """
    report = measure_exits(model, dataset, metric, thresholds, batch_size, timed_examples, show_progress, plain)
    note_use(model, as_rows(dataset), "evaluation")
    return report


def measure_exits(
    model: Any,
    dataset: Sequence[Mapping[str, Any]],
    metric: Metric | None = None,
    thresholds: Sequence[float] | None = None,
    batch_size: int = 32,
    timed_examples: int = 512,
    show_progress: bool = True,
    plain: Any = None,
) -> ExitReport:
    """[`evaluate_exits`] for data that may be calibrated on later."""
    _check_arguments(model, metric, thresholds, timed_examples)
    rows, read = as_rows(dataset), labels_of(dataset, model.config)
    if read is None:
        raise ValueError(
            f"the examples have no labels: expected a column {' or '.join(LABEL_COLUMNS)}, got {sorted(rows[0])}."
        )
    kind = problem_type(model.config)
    is_labelled = has_label(read, kind)
    labels = read[is_labelled]
    metric = metric or default_metric(kind)
    timed = [rows[row] for row in range(min(timed_examples, len(rows)))]
    was_training = model.training
    model.eval()
    try:
        everything = [None] * (len(model.config.exit_layers) - 1)
        outputs = model.predict(dataset, batch_size, exit_thresholds=everything, show_progress=show_progress)
        certainty = None if outputs.exit_certainty is None else outputs.exit_certainty[is_labelled]
        answers = Answers(outputs.exit_logits[is_labelled], outputs.exit_index[is_labelled], certainty)
        curve, chosen = _trade_off(model.config, answers, labels, metric, thresholds)
        report = ExitReport(
            exit_layers=list(model.config.exit_layers),
            costs=list(model.config.exit_costs),
            accuracy=[score(metric, logits, labels, kind) for logits in answers.logits.unbind(dim=1)],
            metric_name=metric_name(metric),
            curve=curve,
            num_examples=len(labels),
            criterion=model.config.exit_criterion,
            full_seconds=None,
            timed_examples=len(timed),
            batch_size=batch_size,
            device=str(model.device),
            chosen=chosen,
            plain=_score_of_plain(plain, dataset, batch_size, read, metric, kind),
            num_unlabelled=len(read) - len(labels),
        )
        return _with_times(report, model, plain, timed, show_progress) if timed else report
    finally:
        model.train(was_training)


def _check_arguments(model: Any, metric: Any, thresholds: Any, timed_examples: Any) -> None:
    check_classifier("evaluate_exits", model)
    if metric is not None and not callable(metric):
        raise ValueError(f"metric must be called with predictions and references, got {shortened(metric)}.")
    if thresholds is not None and not isinstance(thresholds, (list, tuple, np.ndarray)):
        raise ValueError(f"thresholds must be a list of numbers, got {shortened(thresholds)}.")
    check_count("timed_examples", timed_examples, least=0)


def _score_of_plain(
    plain: Any, dataset: Sequence[Mapping[str, Any]], batch_size: int, labels: torch.Tensor, metric: Metric, kind: str
) -> PlainModel | None:
    if plain is None:
        return None
    is_labelled = has_label(labels, kind)
    logits = plain_logits(plain, dataset, batch_size)
    return PlainModel(score(metric, logits[is_labelled], labels[is_labelled], kind))


def _trade_off(
    config: Any, answers: Answers, labels: torch.Tensor, metric: Metric, thresholds: Sequence[float] | None
) -> tuple[list[CurvePoint], CurvePoint | None]:
    """A point for every threshold, and one for the stored thresholds if there are any."""
    criterion = CRITERIA[config.exit_criterion]
    if problem_type(config) not in criterion.problem_types or len(config.exit_layers) == 1:
        return [], None
    if thresholds is None:
        thresholds = criterion.useful_thresholds(config.num_labels, len(config.exit_layers))
    curve = [_curve_point(config, answers, labels, metric, threshold) for threshold in thresholds]
    stored = config.exit_thresholds
    return curve, None if stored is None else _curve_point(config, answers, labels, metric, stored)


def _curve_point(
    config: Any, answers: Answers, labels: torch.Tensor, metric: Metric, threshold: float | list[float | None]
) -> CurvePoint:
    policy = ThresholdPolicy(CRITERIA[config.exit_criterion], config.checked_thresholds(threshold))
    exit_index = choose_exits(answers, policy, config)
    taken = Answers(answers.logits, exit_index).taken
    shares = exit_index.bincount(minlength=len(config.exit_layers)) / len(exit_index)
    return CurvePoint(
        threshold=threshold,
        cost=float(shares.double() @ torch.tensor(config.exit_costs_under(threshold), dtype=torch.float64)),
        accuracy=score(metric, taken, labels, problem_type(config)),
        exit_distribution=shares.tolist(),
    )


def spread_by_cost(points: Sequence[CurvePoint], count: int) -> list[CurvePoint]:
    """At most so many of the points, from the cheapest to the dearest in steps of cost as equal as can be."""
    by_cost = sorted({point.cost: point for point in reversed(points)}.values(), key=lambda point: point.cost)
    if len(by_cost) <= count:
        return by_cost
    steps = np.linspace(by_cost[0].cost, by_cost[-1].cost, count)
    nearest = {min(range(len(by_cost)), key=lambda place: abs(by_cost[place].cost - step)) for step in steps}
    return [by_cost[place] for place in sorted(nearest)]


def _with_times(
    report: ExitReport, model: Any, plain: Any, examples: list[Mapping[str, Any]], show_progress: bool
) -> ExitReport:
    """The report with the seconds of everything, of a few points of the curve, of the chosen one and of `plain`."""

    def run(thresholds: Any) -> Callable[[], object]:
        return lambda: model.predict(examples, report.batch_size, exit_thresholds=thresholds, show_progress=False)

    runs: dict[str, Callable[[], object]] = {"everything": run([None] * (len(report.exit_layers) - 1))}
    if report.plain is not None:
        runs["plain"] = lambda: plain_logits(plain, examples, report.batch_size)
    if report.chosen is not None:
        runs["chosen"] = run(report.chosen.threshold)
    runs |= {str(point.threshold): run(point.threshold) for point in spread_by_cost(report.curve, _TIMED_POINTS)}
    seconds = seconds_in_turn(runs, _ROUNDS, show_progress)

    def timed(name: str, one: Any) -> Any:
        return _timed(one, seconds[name], seconds["everything"]) if name in seconds else one

    return dataclasses.replace(
        report,
        full_seconds=statistics.median(seconds["everything"]),
        plain=timed("plain", report.plain),
        chosen=timed("chosen", report.chosen),
        curve=[timed(str(point.threshold), point) for point in report.curve],
    )


def _timed(one: Any, seconds: list[float], of_everything: list[float]) -> Any:
    speeds = [everything / own for everything, own in zip(of_everything, seconds)]
    return dataclasses.replace(one, seconds=statistics.median(seconds), speed_range=[min(speeds), max(speeds)])
