"""What speed costs in accuracy: `evaluate_exits` and the report that it returns."""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..files import write_whole
from ..modeling.answers import Answers, choose_exits
from ..modeling.criteria import CRITERIA, ThresholdPolicy
from ..modeling.losses import problem_type
from .data_use import note_use
from .metrics import Metric, default_metric, label_array, metric_name, score
from .plots import plot_report


@dataclass(frozen=True)
class CurvePoint:
    """One operating point: every exit but the last with the same threshold.

    Args:
        threshold (`float`): In the criterion's unit.
        cost (`float`): Mean fraction of the layers run.
        accuracy (`float`): Of the answers given.
        exit_distribution (`list[float]`): Share of the examples that left at each exit.
        seconds (`float`, *optional*): Measured time for `timed_examples` examples; None if time was not measured.
    """

    threshold: float
    cost: float
    accuracy: float
    exit_distribution: list[float]
    seconds: float | None = None


@dataclass(frozen=True)
class ExitReport:
    """What each exit of a model is worth, and what leaving early saves.

    Args:
        exit_layers (`list[int]`): Layers run before each exit.
        costs (`list[float]`): The same as a fraction of all layers (heads and embeddings cost nothing here).
        accuracy (`list[float]`): By exit: every example answered by that exit.
        metric_name (`str`): What `accuracy` is; `accuracy` unless another metric was given.
        curve (`list[CurvePoint]`): Over thresholds, ascending.
        num_examples (`int`): How many examples were used.
        criterion (`str`): What is compared with the thresholds.
        full_seconds (`float`, *optional*): Measured time of running everything for `timed_examples` examples.
        timed_examples (`int`): How many examples the seconds are for.
        batch_size (`int`): Examples run at a time.
        device (`str`): Where it was run.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the JSON file."""
        return dataclasses.asdict(self)

    def to_json(self, path: str | os.PathLike) -> None:
        """Writes the report, whole or not at all."""
        write_whole(path, lambda draft: Path(draft).write_text(json.dumps(self.to_dict(), indent=2) + "\n"))

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "ExitReport":
        """Reads a report that `to_json` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExitReport":
        """From the plain values that `to_dict` gives."""
        return cls(**{**values, "curve": [CurvePoint(**point) for point in values["curve"]]})

    def plot(self, path: str | os.PathLike) -> None:
        """Draws accuracy over cost, and over measured time, into a picture (the file's ending says which kind)."""
        write_whole(path, lambda draft: plot_report(self, draft))

    def speed(self, point: CurvePoint) -> float:
        """Measured: how many times as fast as running everything.

        Raises:
            ValueError: Time was not measured.
        """
        if self.full_seconds is None or point.seconds is None:
            raise ValueError("time was not measured: call evaluate_exits with timed_examples above 0.")
        return self.full_seconds / point.seconds

    def point_at_cost(self, cost: float) -> CurvePoint | None:
        """The most accurate point of at most this cost, the cheaper of two alike; None if there is none."""
        within = [point for point in self.curve if point.cost <= cost]
        return max(within, key=lambda point: (point.accuracy, -point.cost), default=None)

    def __str__(self) -> str:
        rows = [
            f"{layer:>6} {cost:>6.2f} {accuracy:>10.4f}"
            for layer, cost, accuracy in zip(self.exit_layers, self.costs, self.accuracy)
        ]
        return "\n".join([f"{'layers':>6} {'cost':>6} {self.metric_name:>10}", *rows])


def evaluate_exits(
    model: Any,
    dataset: Sequence[Mapping[str, Any]],
    metric: Metric | None = None,
    thresholds: Sequence[float] | None = None,
    batch_size: int = 32,
    timed_examples: int = 512,
    show_progress: bool = True,
) -> ExitReport:
    """Measures every exit, and the trade-off between accuracy and cost over thresholds.

    One pass over the data gives the accuracy at every threshold. The seconds come from real early-exit runs on the
    first `timed_examples` examples, each beside a run of everything (the median of those is `full_seconds`).

    Args:
        model: A classifier with exits (or a cascade).
        dataset (`Sequence[Mapping]`): Tokenised examples with `labels` or `label`, such as a `datasets.Dataset`.
        metric (`Callable`, *optional*): Called with `predictions` and `references` (arrays of shape `(examples,)`, or
            `(examples, labels)` for several labels at once); returns a number, or a dict whose first value counts, as
            `evaluate`'s `compute` does. Defaults to accuracy, for regression to Pearson's correlation.
        thresholds (`Sequence[float]`, *optional*): Defaults to 21 over the criterion's useful range.
        batch_size (`int`): Examples run at a time.
        timed_examples (`int`): How many examples to measure time on; 0 for none.
        show_progress (`bool`): Whether to show bars.

    Raises:
        ValueError: No examples, no labels, or anything that `model.predict` refuses.
    """
    if len(dataset):
        note_use(model, dataset, "evaluation")
    return measure_exits(model, dataset, metric, thresholds, batch_size, timed_examples, show_progress)


def measure_exits(
    model: Any,
    dataset: Sequence[Mapping[str, Any]],
    metric: Metric | None = None,
    thresholds: Sequence[float] | None = None,
    batch_size: int = 32,
    timed_examples: int = 512,
    show_progress: bool = True,
) -> ExitReport:
    """[`evaluate_exits`] for data that may be calibrated on later."""
    labels = label_array(dataset)
    metric = metric or default_metric(problem_type(model.config))
    was_training = model.training
    model.eval()
    try:
        everything = [None] * (len(model.config.exit_layers) - 1)
        outputs = model.predict(dataset, batch_size, exit_thresholds=everything, show_progress=show_progress)
        curve = _curve(model.config, _answers(outputs), labels, metric, thresholds)
        timed = [dataset[row] for row in range(min(timed_examples, len(dataset)))]
        full_seconds, curve = _timed(model, timed, batch_size, curve, show_progress) if timed else (None, curve)
    finally:
        model.train(was_training)
    kind = problem_type(model.config)
    return ExitReport(
        exit_layers=list(model.config.exit_layers),
        costs=list(model.config.exit_costs),
        accuracy=[score(metric, logits, labels, kind) for logits in outputs.exit_logits.unbind(dim=1)],
        metric_name=metric_name(metric),
        curve=curve,
        num_examples=len(labels),
        criterion=model.config.exit_criterion,
        full_seconds=full_seconds,
        timed_examples=len(timed),
        batch_size=batch_size,
        device=str(model.device),
    )


def _answers(outputs: Any) -> Answers:
    return Answers(outputs.exit_logits, outputs.exit_index, outputs.exit_certainty)


def _curve(
    config: Any, answers: Answers, labels: np.ndarray, metric: Metric, thresholds: Sequence[float] | None
) -> list[CurvePoint]:
    criterion = CRITERIA[config.exit_criterion]
    if problem_type(config) not in criterion.problem_types or len(config.exit_layers) == 1:
        return []
    if thresholds is None:
        thresholds = criterion.useful_thresholds(config.num_labels, len(config.exit_layers))
    return [_curve_point(config, answers, labels, metric, threshold) for threshold in thresholds]


def _curve_point(config: Any, answers: Answers, labels: np.ndarray, metric: Metric, threshold: float) -> CurvePoint:
    policy = ThresholdPolicy(CRITERIA[config.exit_criterion], config.checked_thresholds(threshold))
    exit_index = choose_exits(answers, policy, config)
    taken = Answers(answers.logits, exit_index).taken
    shares = exit_index.bincount(minlength=len(config.exit_layers)) / len(exit_index)
    return CurvePoint(
        threshold=threshold,
        cost=float(shares.double() @ torch.tensor(config.exit_costs, dtype=torch.float64)),
        accuracy=score(metric, taken, labels, problem_type(config)),
        exit_distribution=shares.tolist(),
    )


def _timed(
    model: Any, examples: list[Mapping[str, Any]], batch_size: int, curve: list[CurvePoint], show_progress: bool
) -> tuple[float, list[CurvePoint]]:
    """Seconds of every point, and the median of the full runs beside them."""
    everything = [None] * (len(model.config.exit_layers) - 1)

    def seconds(thresholds: Any) -> float:
        start = time.perf_counter()
        model.predict(examples, batch_size, exit_thresholds=thresholds, show_progress=False)
        return time.perf_counter() - start

    seconds(everything)  # warm-up
    full, timed = [seconds(everything)], []
    for point in logging.tqdm(curve, desc="Measuring time", disable=not show_progress):
        timed.append(dataclasses.replace(point, seconds=seconds(point.threshold)))
        full.append(seconds(everything))
    return statistics.median(full), timed
