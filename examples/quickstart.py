"""From a pretrained encoder to a shared classifier that keeps a promise, on real text, in minutes on a CPU.

Fine-tunes an encoder with exits and, beside it, the plain model; asks for thresholds that lose at most one point of
accuracy with 95 % confidence; and compares the promise with test data. Then it saves checkpoint, picture and card, and
classifies a few sentences in a fresh process that does not have this package. Any encoder and data by flags:

    python examples/quickstart.py
    python examples/quickstart.py --model answerdotai/ModernBERT-base --dataset stanfordnlp/sst2 --text_column sentence
    python examples/quickstart.py --dataset pairs.csv --text_column question --text_pair_column answer
"""

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adaptive import (
    AutoModelForSequenceClassificationWithExits,
    CalibrationReport,
    ExitReport,
    ExitsTrainer,
    calibrate_exits,
    evaluate_exits,
)
from hf_adaptive.hub import model_card, write_model_card
from text_data import DataArguments, encoder_path, label_fields, load_splits, tokenised

PLOT_FILE = "exits.png"
CLASSIFY = Path(__file__).parent / "classify.py"
SENTENCES = {
    "reviews": [
        "A masterpiece: moving, funny and beautifully acted.",
        "Dull, predictable and far too long.",
        "It has its moments, though they never quite add up to the film that it wants to be.",
        "For a sequel nobody asked for, this is better than it has any right to be.",
    ],
}
STEPS = 6


@dataclass
class ModelArguments:
    """Which encoder gets which exits, and what is asked of them."""

    model: str = field(default="minilm", metadata={"help": "'minilm' (from PyPI), a Hub name or a local folder."})
    exit_layers: list[int] = field(default_factory=lambda: [1, 2, 4, 6], metadata={"help": "Layers before each exit."})
    exit_routing: str = field(default="sweet", metadata={"help": "'sweet', 'joint' or 'disjoint'."})
    exit_pooling: str | None = field(default="mean", metadata={"help": "'cls', 'mean' or 'last'."})
    max_accuracy_drop: float = field(default=0.01, metadata={"help": "What leaving early may cost: 0.01 is a point."})
    confidence: float = field(default=0.95, metadata={"help": "How surely that is to hold on new data."})


@dataclass
class DemoDataArguments(DataArguments):
    """`DataArguments` with less to train on, and more to test a promise on."""

    max_train_examples: int = field(default=1200, metadata={"help": "Training examples at most."})
    max_eval_examples: int = field(default=2500, metadata={"help": "Validation and test examples at most, each."})


@dataclass
class DemoTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for the demonstration."""

    output_dir: str = field(default="outputs/quickstart", metadata={"help": "Where everything is written."})
    num_train_epochs: float = field(default=2.0)
    per_device_train_batch_size: int = field(default=32)
    per_device_eval_batch_size: int = field(default=32)
    learning_rate: float = field(default=2e-4)
    warmup_steps: float = field(default=0.1)
    # Less padding: a third of the time.
    train_sampling_strategy: str = field(default="group_by_length")
    save_strategy: str = field(default="no")
    logging_steps: float = field(default=25)
    report_to: str = field(default="none")
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available())


@dataclass
class Demo:
    """What the steps share: the encoder, its tokenizer, the data and how to train."""

    path: str
    tokenizer: Any
    splits: DatasetDict
    arguments: TrainingArguments

    @property
    def fields(self) -> dict[str, Any]:
        """Configuration fields of any classifier of these data."""
        return label_fields(self.splits["train"].features["label"].names)

    def train(self, model: Any, trainer_class: type[Trainer]) -> Trainer:
        """Fine-tunes a model, from the same seed as every other."""
        set_seed(self.arguments.seed)
        trainer = trainer_class(
            model=model,
            args=self.arguments,
            train_dataset=self.splits["train"],
            processing_class=self.tokenizer,
            data_collator=DataCollatorWithPadding(self.tokenizer),
        )
        trainer.train()
        model.eval()
        return trainer


def main() -> None:
    """Runs the whole demonstration."""
    parser = HfArgumentParser((ModelArguments, DemoDataArguments, DemoTrainingArguments), description=__doc__)
    wanted, data, training = parser.parse_args_into_dataclasses()
    # Of what takes a second: training and prediction keep theirs.
    datasets.disable_progress_bars()
    start = time.perf_counter()

    say(1, "Reading the encoder and the texts.")
    path = encoder_path(wanted.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    demo = Demo(path, tokenizer, tokenised(load_splits(data), tokenizer, data.max_length), training)
    print("; ".join(f"{len(split)} texts to {use}" for split, use in zip(demo.splits.values(), USES)))

    say(2, "Fine-tuning the plain model, to compare with.")
    plain = AutoModelForSequenceClassification.from_pretrained(path, **demo.fields)
    demo.train(plain, Trainer)

    say(3, f"Fine-tuning the same encoder with exits after layers {wanted.exit_layers}.")
    model = model_with_exits(demo, wanted)
    trainer = demo.train(model, ExitsTrainer)

    say(4, f"Asking for thresholds that lose at most {points(wanted.max_accuracy_drop)} points.")
    promise = ask(model, demo.splits["validation"], wanted)

    say(5, "Testing on texts that nothing was chosen on.")
    report = evaluate_exits(model, demo.splits["test"], timed_examples=256, plain=plain)
    print(f"\nEvery text answered by one exit:\n{report}\n")
    print(promise_beside_test(promise, report, wanted))

    say(6, "Saving, and classifying in a fresh process that does not have hf_adaptive.")
    trainer.report = report
    checkpoint = save(trainer, demo, data.dataset)
    sentences = SENTENCES.get(data.dataset) or [text[:100] for text in demo.splits["test"]["text"][:4]]
    subprocess.run([sys.executable, str(CLASSIFY), str(checkpoint), *sentences], check=True)
    print(last_words(checkpoint, time.perf_counter() - start))


USES = ("train on", "calibrate on", "test on")


def say(step: int, text: str) -> None:
    """One line a step."""
    print(f"\n[{step}/{STEPS}] {text}", flush=True)


def points(share: float) -> str:
    """A share as points of a hundred."""
    return f"{100 * share:.3g}"


def model_with_exits(demo: Demo, wanted: ModelArguments) -> Any:
    """The encoder with an untrained classifier after each of the chosen layers."""
    return AutoModelForSequenceClassificationWithExits.from_pretrained(
        demo.path,
        exit_layers=wanted.exit_layers,
        exit_routing=wanted.exit_routing,
        exit_pooling=wanted.exit_pooling,
        **demo.fields,
    )


def ask(model: Any, validation: Any, wanted: ModelArguments) -> CalibrationReport | None:
    """Calibrates with a promise; without one where the data do not suffice for it, and says how many would do."""
    try:
        promise = calibrate_exits(
            model, validation, max_accuracy_drop=wanted.max_accuracy_drop, confidence=wanted.confidence
        )
    except ValueError as error:
        print(f"No promise can be made: {error}\nWithout one, thresholds are the best on the calibration texts.")
        calibrate_exits(model, validation, max_accuracy_drop=wanted.max_accuracy_drop)
        return None
    print(promise)
    return promise if promise.found else None


def promise_beside_test(promise: CalibrationReport | None, report: ExitReport, wanted: ModelArguments) -> str:
    """What was promised, what the test data say, and the plain model."""
    full, plain, chosen = report.accuracy[-1], report.plain, report.chosen
    lines = [f"{'':<34}{'accuracy':>10}{'cost':>7}{'seconds':>10}", as_row("plain model, no exits", plain, 1)]
    lines.append(f"{'with exits, all layers':<34}{full:>10.4f}{report.costs[-1]:>7.2f}{report.full_seconds:>10.2f}")
    if chosen is None:
        return "\n".join([*lines, "Nothing leaves early: no thresholds kept the promise on the calibration texts."])
    lines.append(as_row("with exits, chosen thresholds", chosen, chosen.cost))
    lost = f"{points(full - chosen.accuracy)} points on {report.num_examples} test texts"
    asked = f"at most {points(wanted.max_accuracy_drop)} points, with {wanted.confidence:.0%} confidence"
    promised = (
        "NOTHING WAS PROMISED: see step 4." if promise is None else f"Promised loss against all layers: {asked}."
    )
    return "\n".join([*lines, "", promised, f"Measured loss against all layers: {lost}."])


def as_row(name: str, measured: Any, cost: float) -> str:
    """One row of the comparison."""
    return f"{name:<34}{measured.accuracy:>10.4f}{cost:>7.2f}{measured.seconds:>10.2f}"


def save(trainer: ExitsTrainer, demo: Demo, dataset: str) -> Path:
    """Writes checkpoint, tokenizer, picture and card into one folder."""
    folder = Path(demo.arguments.output_dir)
    checkpoint = folder / "checkpoint"
    trainer.model.save_pretrained(checkpoint)
    demo.tokenizer.save_pretrained(checkpoint)
    trainer.report.plot(checkpoint / PLOT_FILE)
    trainer.report.to_json(checkpoint / "exit_report.json")
    card = model_card(
        trainer.model,
        trainer.report,
        repo_id=folder.name,
        dataset_name=dataset,
        language="en" if dataset in SENTENCES else None,
        plot_file=PLOT_FILE,
        # Of your own texts none is published.
        widget=SENTENCES.get(dataset),
        training=trainer.settings,
    )
    write_model_card(card, checkpoint, overwrite=True)
    return checkpoint


def last_words(checkpoint: Path, seconds: float) -> str:
    """Where everything is, and what to do next."""
    return f"""
Done in {seconds:.0f} seconds. Checkpoint, picture and card:
    {checkpoint}
    {checkpoint / PLOT_FILE}
    {checkpoint / "README.md"}
Next:
    {sys.executable} {CLASSIFY} {checkpoint} "A text of your own."
    {sys.executable} -m hf_adaptive.serving {checkpoint} --port 8000
    hf upload YOUR_NAME/{checkpoint.parent.name} {checkpoint}"""


if __name__ == "__main__":
    main()
