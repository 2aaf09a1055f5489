"""What do exits give beside what people use today? Accuracy against throughput, and against the latency of single
texts: the stock model in torch, ONNX and OpenVINO, in bf16 and int8, smaller models of several kinds, and exits in all
of these forms.

    python examples/benchmarks/compare_deployments.py --quick
    python examples/benchmarks/compare_deployments.py --output_dir outputs/deployments \
        --tasks sst2=data/sst2 ag_news=data/ag_news trec=data/trec
    python examples/benchmarks/compare_deployments.py --time True … (the same flags)

The first part trains, exports and calibrates; it may run on a busy machine, and is taken up where it was stopped (a
file in runs/ for each task, seed and system). The second, with `--time`, measures all that is there, on a machine that
does nothing else: the ways in turn, in one process; it is taken up after the last whole task and seed (timing/).
`--quick` does both, on a few texts. In results/: results.json, results.md, and a plot for each task.

Needs `hf_adaptive[onnx]`; TF-IDF needs scikit-learn, and OpenVINO openvino and nncf: without them these lines are left
out. A task is `name=source`, as for examples/run_exit_study.py.
"""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import HfArgumentParser

sys.path.append(str(Path(__file__).resolve().parent.parent))
from deployment_models import Sizes, TaskData, TaskModels
from deployment_results import Comparison
from deployment_systems import System, systems
from deployment_timing import Timing
from measuring import describe_machine

from hf_adaptive.files import identified
from run_exit_study import Task
from study_files import keep_settings, write_json

QUICK = {"train_texts": 96, "calibration_texts": 96, "test_texts": 64, "epochs": 1.0, "seeds": [0], "single_texts": 4}


@dataclass
class ComparisonArguments:
    """What is compared, and on what."""

    tasks: list[str] = field(default_factory=lambda: ["reviews=reviews"], metadata={"help": "name=source, several."})
    output_dir: str = field(default="outputs/deployments", metadata={"help": "Where everything is written."})
    time: bool = field(default=False, metadata={"help": "Measure what is there; else train what is not."})
    quick: bool = field(default=False, metadata={"help": "Train and measure on a few texts, to see that it works."})
    encoder: str = field(default="minilm", metadata={"help": "'minilm' or 'mpnet' (from PyPI), a Hub name, a folder."})
    exit_layers: list[int] = field(default_factory=lambda: [1, 2, 4, 6], metadata={"help": "Layers before each exit."})
    exit_branch_layers: int = field(default=1, metadata={"help": "Last layers of every early exit's own."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Everything is trained with each."})
    exit_pooling: str = field(default="mean", metadata={"help": "What all heads see: 'mean', 'cls' or 'last'."})
    train_texts: int = field(default=2000, metadata={"help": "Training texts at most."})
    calibration_texts: int = field(default=4000, metadata={"help": "Texts that thresholds are found on, at most."})
    test_texts: int = field(default=2000, metadata={"help": "Texts that everything is measured on, at most."})
    single_texts: int = field(default=200, metadata={"help": "Of these, one at a time."})
    repeats: int = field(default=1, metadata={"help": "How often everything is timed, with the models of each seed."})
    max_length: int = field(default=64, metadata={"help": "Tokens at most; longer texts are cut."})
    epochs: float = field(default=2.0, metadata={"help": "Of every model on the encoder."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Of every model on the encoder."})
    trains_words: bool = field(default=False, metadata={"help": "Train the vectors of the words, too."})
    bf16: bool = field(default=False, metadata={"help": "Train in bf16."})


def main() -> None:
    """Trains, or measures."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for chatty in ("nncf", "torch.onnx", "root"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    (arguments,) = HfArgumentParser(ComparisonArguments, description=__doc__).parse_args_into_dataclasses()
    if arguments.quick:
        arguments = dataclasses.replace(arguments, **QUICK)
    comparing = Comparing(arguments)
    if arguments.quick or not arguments.time:
        comparing.train()
    if arguments.quick or arguments.time:
        print(comparing.measure())


class Comparing:
    """The parts of the comparison; each one's results are files, and what is there is not repeated."""

    def __init__(self, arguments: ComparisonArguments):
        self.arguments = arguments
        self.folder = Path(arguments.output_dir)
        self.tasks = [Task.parse(words) for words in arguments.tasks]
        names = [one.name for one in dataclasses.fields(Sizes)]
        self.sizes = Sizes(**{name: getattr(arguments, name) for name in names})
        self._check_settings()

    def _check_settings(self) -> None:
        """Models of other settings must not be compared with these; tasks and seeds may be added."""
        keep_settings(self.folder, {**dataclasses.asdict(self.sizes), "encoder": identified(self.sizes.encoder)})

    def train(self) -> None:
        """Prepares every system; the seeds one after another, so that whoever stops early has whole ones."""
        for models in self._models():
            prepared: dict[str, dict[str, Any]] = {}
            for system in systems(models):
                path = self._run_file(models, system)
                if not path.exists():
                    print(f"{models.data.name}, seed {models.seed}: {system.name}", flush=True)
                    write_json(path, {"system": system.name, "prepared": system.prepare(prepared)})
                prepared[system.name] = json.loads(path.read_text())["prepared"]

    def measure(self) -> str:
        """Measures what was prepared, and writes the results; returns their table."""
        threads = torch.get_num_threads()
        for models in self._models():
            path = self.folder / "timing" / f"{models.data.name}-seed-{models.seed}.json"
            if path.exists():
                continue
            found = systems(models)
            prepared = self._prepared(models, found)
            if not prepared:
                print(f"{models.data.name}, seed {models.seed}: nothing was trained yet.")
                continue
            timing = Timing(models, self.arguments.repeats, self.arguments.single_texts, threads)
            write_json(
                path,
                {
                    "task": models.data.name,
                    "seed": models.seed,
                    "machine": describe_machine(torch.device("cpu")),
                    "points": timing.measure(prepared, found),
                },
            )
        return self._results()

    def _results(self) -> str:
        files = sorted((self.folder / "timing").glob("*.json"))
        names = [task.name for task in self.tasks]
        measured = [json.loads(path.read_text()) for path in files]
        comparison = Comparison([one for one in measured if one["task"] in names], self._described())
        comparison.write(self.folder)
        return f"{comparison.text()}\n\nWritten to {self.folder}."

    def _described(self) -> dict[str, str]:
        sizes = self.sizes
        name = Path(sizes.encoder).name
        return {
            "encoder": name,
            "exits": f"after {', '.join(map(str, sizes.exit_layers))} layers",
            "own layers of an early exit": str(sizes.exit_branch_layers),
            "training texts": str(sizes.train_texts),
            "calibration texts": f"{sizes.calibration_texts} at most, of the training data",
            "epochs": f"{sizes.epochs:g}",
            "tokens": f"{sizes.max_length} at most",
        }

    def _models(self) -> Iterator[TaskModels]:
        data = {task.name: TaskData(task, self.sizes) for task in self.tasks}
        for seed in self.arguments.seeds:
            for name, texts in data.items():
                yield TaskModels(texts, seed, self.folder / "models" / name / f"seed-{seed}")

    def _run_file(self, models: TaskModels, system: System) -> Path:
        name = "".join(letter if letter.isalnum() else "-" for letter in system.name)
        return self.folder / "runs" / f"{models.data.name}-seed-{models.seed}-{name}.json"

    def _prepared(self, models: TaskModels, found: list[System]) -> dict[str, dict[str, Any]]:
        paths = {system.name: self._run_file(models, system) for system in found}
        missing = [name for name, path in paths.items() if not path.exists()]
        if missing and len(missing) < len(paths):
            print(f"{models.data.name}, seed {models.seed}: not trained yet: {'; '.join(missing)}.")
        return {name: json.loads(path.read_text())["prepared"] for name, path in paths.items() if path.exists()}


if __name__ == "__main__":
    main()
