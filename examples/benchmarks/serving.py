"""How many requests a second can be served? The engine with exits beside the plain model, in this process only.

    python examples/benchmarks/serving.py                                       # MPNet base and MiniLM: about an hour
    python examples/benchmarks/serving.py --encoders minilm --seconds 4         # minutes
    python examples/benchmarks/serving.py --encoders minilm --dataset sst2/train.parquet --text_column text

Requests come by a Poisson process or in bursts, whether earlier ones are answered or not. For each contender, the
highest rate is searched at which the 99th percentile of the latency stays below four times the plain model's time for
a single text. In the output folder: serving.json, serving.md (the table), and serving-ENCODER-ARRIVALS.png (rate
against latency). Measure on a machine that does nothing else.
"""

import gc
import json
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
OVERHEAD_ROUNDS = 5
KINDS = ("poisson", "bursts")
EXITS, PLAIN, PER_BATCH, ONE = "exits, regrouped", "plain, batched", "exits, batch by batch", "plain, one at a time"
COLOURS = {EXITS: "tab:blue", PLAIN: "tab:orange", PER_BATCH: "tab:green", ONE: "tab:gray"}


@dataclass
class ServingArguments:
    """What is measured, and for how long."""

    encoders: list[str] = field(default_factory=lambda: ["mpnet", "minilm"], metadata={"help": "mpnet, minilm."})
    seconds: float = field(default=20.0, metadata={"help": "For each rate."})
    steps: int = field(default=6, metadata={"help": "Rates tried for each contender."})
    output_dir: str = field(default="outputs/serving", metadata={"help": "Where everything is written."})
    clock: str = field(
        default="wall",
        metadata={"help": "'wall', or 'processor': on a busy machine, in processor time, see serving_load.simulate."},
    )
    overhead_rows: int = field(default=100_000, metadata={"help": "For the model that does nothing."})


def main() -> None:
    """Measures, and writes what is known after each encoder."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers.logging.set_verbosity_error()
    parser = HfArgumentParser((ServingArguments, DataArguments), description=__doc__)
    arguments, data = parser.parse_args_into_dataclasses()
    set_seed(0)
    # As the server does.
    gc.collect()
    gc.freeze()
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "machine": {**describe_machine(torch.device("cpu")), "load_before": os.getloadavg()},
        "settings": {"seconds": arguments.seconds, "dataset": data.dataset, "clock": arguments.clock},
        "overhead": overhead(arguments.overhead_rows),
        "encoders": {},
    }
    for name in arguments.encoders:
        workload = Workload(SIZES[name], data, [], None, folder)
        found["encoders"][name] = measure_encoder(workload, arguments, folder, name)
        (folder / "serving.json").write_text(json.dumps(found, indent=2) + "\n")
        (folder / "serving.md").write_text(table(found))
    print(table(found))


# Contenders


def contenders(workload: Workload) -> dict[str, Contender]:
    """The same engine, and the same weights of the layers, for each way to serve."""
    # Exits at the last layer only: the stock classifier.
    depth = workload.model.config.num_hidden_layers
    plain = AutoModelForSequenceClassificationWithExits.from_pretrained(
        workload.plain_checkpoint, exit_layers=[depth], exit_pooling=workload.model.config.exit_pooling
    ).eval()
    exits, thresholds = workload.model, workload.thresholds
    return {
        EXITS: Contender(exits, thresholds),
        PLAIN: Contender(plain),
        PER_BATCH: Contender(WithoutRegrouping(exits), thresholds),
        ONE: Contender(plain, max_batch_size=1, max_wait_ms=0.0),
    }


class Measurement:
    """What all rates of an encoder have in common.

    Args:
        workload (`Workload`): Models and texts.
        arguments (`ServingArguments`): What is asked for.
    """

    def __init__(self, workload: Workload, arguments: ServingArguments):
        self.contenders = contenders(workload)
        self.texts = [{"input_ids": row["input_ids"]} for row in workload.texts]
        self.arguments = arguments
        self.run = simulate if arguments.clock == "processor" else measure
        # One text after the other, so far apart that none waits.
        self.single_ms = self.run(self.contenders[ONE], self.texts[:60], np.arange(1, 61) * 1.0).p50_ms

    @property
    def limit_ms(self) -> float:
        """What p99 has to stay below."""
        return LIMIT * self.single_ms

    def of(self, kind: str) -> dict[str, Any]:
        """All contenders under one kind of arrivals."""
        found: dict[str, Any] = {name: self.search(one, kind) for name, one in self.contenders.items()}
        half = max_rate(found[EXITS], self.limit_ms) / 2
        if half:
            found["at half"] = {name: self.at(self.contenders[name], half, kind).to_dict() for name in (EXITS, PLAIN)}
        return found

    def at(self, contender: Contender, rate: float, kind: str) -> Point:
        """One rate, for some seconds."""
        times = arrivals(rate, self.arguments.seconds, kind == "bursts", seed=int(rate))
        point = self.run(contender, self.texts, times)
        sizes = "/".join(f"{size:.1f}" for size in point.batches)
        print(f"  {point.rate:7.1f}/s  p50 {point.p50_ms:7.1f} ms  p99 {point.p99_ms:7.1f} ms  {sizes}", flush=True)
        return point

    def search(self, contender: Contender, kind: str) -> list[dict[str, Any]]:
        """Points around the highest rate whose p99 is within the limit: raised until it is not, then in between."""
        points: list[Point] = []
        good, bad, rate = 0.0, float("inf"), 0.5 * 1000 / self.single_ms
        for _ in range(self.arguments.steps):
            points.append(self.at(contender, rate, kind))
            if points[-1].p99_ms <= self.limit_ms:
                good = rate
            else:
                bad = rate
            rate = (good + bad) / 2 if bad < float("inf") else rate * 1.6
        return [point.to_dict() for point in sorted(points, key=lambda point: point.rate)]


def measure_encoder(workload: Workload, arguments: ServingArguments, folder: Path, name: str) -> dict[str, Any]:
    """All contenders under both kinds of arrivals, and their plots."""
    measurement = Measurement(workload, arguments)
    found = {"single_text_ms": measurement.single_ms, "limit_ms": measurement.limit_ms}
    for kind in KINDS:
        print(f"{name}, {kind}", flush=True)
        found[kind] = measurement.of(kind)
        draw(found, kind, folder / f"serving-{name}-{kind}.png", name)
    return found


def max_rate(points: Sequence[dict[str, Any]], limit_ms: float) -> float:
    """The highest measured rate within the limit; 0 if none was."""
    return max((point["rate"] for point in points if point["p99_ms"] <= limit_ms), default=0.0)


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


def draw(found: dict[str, Any], kind: str, path: Path, name: str) -> None:
    """Rate against latency, a line for each contender, dashed for the median."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for contender, colour in COLOURS.items():
        points = found[kind][contender]
        rates = [point["rate"] for point in points]
        axes.plot(rates, [point["p99_ms"] for point in points], "o-", color=colour, label=contender, markersize=4)
        axes.plot(rates, [point["p50_ms"] for point in points], "--", color=colour, linewidth=1)
    axes.axhline(found["limit_ms"], color="black", linewidth=0.8, label=f"limit: {LIMIT:g} × one text, plain")
    axes.set(yscale="log", xlabel="requests a second", ylabel="milliseconds", title=f"{name}, {kind} arrivals")
    axes.plot([], [], "k-", label="99th percentile")
    axes.plot([], [], "k--", linewidth=1, label="median")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(found: dict[str, Any]) -> str:
    """The issue's rows, as Markdown."""
    machine = found["machine"]
    lines = [
        f"CPU {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}; "
        f"load of the machine before: {machine['load_before'][0]:.1f}; {found['settings']['seconds']:g} s a rate, "
        f"{found['settings']['clock']} time.",
        "",
        "| encoder, arrivals | what | goal | measured |",
        "| --- | --- | --- | --- |",
    ]
    for name, encoder in found["encoders"].items():
        for kind in KINDS:
            lines += _rows(f"{name}, {kind}", encoder, encoder[kind])
    lines.append(
        f"| – | engine overhead, a model that does nothing, one core | ≥ 20,000 rows/s "
        f"| {found['overhead']['wall']:,.0f} rows/s; {found['overhead']['processor']:,.0f} a processor second |"
    )
    return "\n".join(lines) + "\n"


def _rows(name: str, encoder: dict[str, Any], points: dict[str, Any]) -> list[str]:
    limit = encoder["limit_ms"]
    best = {contender: max_rate(points[contender], limit) for contender in COLOURS}
    rates = ", ".join(f"{contender}: {rate:.0f}/s" for contender, rate in best.items())
    return [
        f"| {name} | highest rate with p99 ≤ {limit:.0f} ms | – | {rates} |",
        f"| {name} | against the plain model, batched | ≥ 2.0 | {_times(best[EXITS], best[PLAIN])} |",
        f"| {name} | against early exit batch by batch | ≥ 1.15 | {_times(best[EXITS], best[PER_BATCH])} |",
        *([_half(name, points["at half"])] if "at half" in points else []),
    ]


def _half(name: str, half: dict[str, Any]) -> str:
    ours, plain = half[EXITS]["p50_ms"], half[PLAIN]["p50_ms"]
    return (
        f"| {name} | median at half of that, {half[EXITS]['rate']:.0f}/s, of the plain model's | ≤ 0.6 "
        f"| {ours / plain:.2f} ({ours:.1f} / {plain:.1f} ms) |"
    )


def _times(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if theirs else "– (no rate within the limit)"


if __name__ == "__main__":
    main()
