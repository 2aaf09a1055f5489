"""Is it fast? Early exit, SWEET training, constant heads and loading, each timed beside the plain model in one run.

    python examples/benchmarks/run_benchmarks.py --quick
    python examples/benchmarks/run_benchmarks.py --dataset sst2/train.parquet \
        --texts sst2/validation.parquet sst2/test.parquet
    python examples/benchmarks/run_benchmarks.py --rows prediction nothing_exits --output_dir outputs/prediction

The alternatives of a row run in turn (A B A B …) after a warm-up; the ratio is the median over the pairs, with its
quartiles. In the output folder: benchmarks.json, benchmarks.md (the table), cost_and_time.png, and the models, which
the next run uses again. Runs on a GPU where torch finds one. Encoders come from PyPI, texts too unless named.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from transformers import HfArgumentParser, set_seed

sys.path.append(str(Path(__file__).resolve().parent.parent))
from attention import constant_heads, constant_heads_memory
from host_work import host_work
from inference import composition, cost_and_time, early_exit_in_batches, nothing_exits, one_at_a_time, prediction
from loading import remote_code_load
from many_rows import many_rows
from measuring import describe_machine
from profiling import where_time_goes
from results import CurvePoint, Result, Results
from training import branch_memory, branch_step, sweet_memory, sweet_step
from workload import FULL, QUICK, Size, Workload

from text_data import DataArguments

Row = Callable[[Workload], Sequence[Result | CurvePoint]]
ROWS: dict[str, Row] = {
    row.__name__: row
    for row in (
        early_exit_in_batches,
        prediction,
        one_at_a_time,
        nothing_exits,
        host_work,
        many_rows,
        where_time_goes,
        sweet_step,
        sweet_memory,
        branch_step,
        branch_memory,
        constant_heads,
        constant_heads_memory,
        remote_code_load,
        composition,
        cost_and_time,
    )
}
# They take minutes.
FULL_ONLY = ("where_time_goes", "composition")


@dataclass
class BenchmarkArguments:
    """What is run, and on what."""

    quick: bool = field(
        default=False,
        metadata={"help": "A small encoder and few texts: minutes. Its ratios are no measure of a base."},
    )
    rows: list[str] | None = field(default=None, metadata={"help": f"Some of {', '.join(ROWS)}. Default: all."})
    output_dir: str = field(default="outputs/benchmarks", metadata={"help": "Where everything is written."})
    encoder: str | None = field(default=None, metadata={"help": "'mpnet', 'minilm', a Hub name or a local folder."})
    exit_layers: list[int] | None = field(default=None, metadata={"help": "Layers before each exit."})
    even_exit_layers: list[int] | None = field(
        default=None, metadata={"help": "The same in equal segments, for sweet_memory."}
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "Trained exits on the same encoder; else they are trained, and kept."}
    )
    texts: list[str] = field(
        default_factory=list, metadata={"help": "Local files with the texts to time; else a part of --dataset."}
    )
    repeats: int | None = field(default=None, metadata={"help": "How often everything is timed."})


def main() -> None:
    """Runs the rows, and writes what is known after each."""
    # Processes must not fork after the tokenizer used its threads; it has little to do here.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Every model would report which weights are new; the processes that are started follow the variable.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    transformers.logging.set_verbosity_error()
    parser = HfArgumentParser((BenchmarkArguments, DataArguments), description=__doc__)
    arguments, data = parser.parse_args_into_dataclasses()
    rows = chosen_rows(arguments)
    set_seed(0)
    folder = Path(arguments.output_dir)
    workload = Workload(chosen_size(arguments), data, arguments.texts, arguments.checkpoint, folder)
    results = Results(describe_machine(workload.device), settings(workload, arguments, data))
    for row in rows:
        results.add(ROWS[row](workload))
        results.write(folder)
    print(f"\n{results.table()}\n\nWritten to {folder}.")


def chosen_rows(arguments: BenchmarkArguments) -> list[str]:
    """In the order of the table."""
    default = [row for row in ROWS if not (arguments.quick and row in FULL_ONLY)]
    asked = default if arguments.rows is None else arguments.rows
    unknown = sorted(set(asked) - set(ROWS))
    if unknown:
        raise ValueError(f"there are no rows {unknown}: --rows can be {', '.join(ROWS)}.")
    return [row for row in ROWS if row in asked]


def chosen_size(arguments: BenchmarkArguments) -> Size:
    """Quick or full, with what was asked for by flag."""
    names = ("encoder", "exit_layers", "even_exit_layers", "repeats")
    asked = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return dataclasses.replace(QUICK if arguments.quick else FULL, **asked)


def settings(workload: Workload, arguments: BenchmarkArguments, data: DataArguments) -> dict[str, str]:
    """For the reader of the table."""
    return {
        "size": "quick" if arguments.quick else "full",
        "encoder": workload.size.encoder,
        "exits": "/".join(map(str, workload.size.exit_layers)),
        "texts": ", ".join(arguments.texts) or data.dataset,
        "repeats": str(workload.size.repeats),
    }


if __name__ == "__main__":
    main()
