"""From a pretrained encoder to a shared early-exit classifier, on real text, in a few minutes on a CPU.

Fine-tunes with SWEET, prints what each exit is worth, chooses an operating point, saves checkpoint, plot and card, and
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

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, DataCollatorWithPadding, HfArgumentParser, TrainingArguments, set_seed

from hf_adaptive import (
    AutoModelForSequenceClassificationWithExits,
    ExitReport,
    ExitsTrainer,
    calibrate_exits,
    evaluate_exits,
)
from hf_adaptive.hub import model_card, write_model_card
from text_data import DataArguments, encoder_path, load_splits

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


@dataclass
class ModelArguments:
    """Which encoder gets which exits."""

    model: str = field(default="minilm", metadata={"help": "'minilm' (from PyPI), a Hub name or a local folder."})
    exit_layers: list[int] = field(default_factory=lambda: [1, 2, 4, 6], metadata={"help": "Layers before each exit."})
    exit_routing: str = field(default="sweet", metadata={"help": "'sweet', 'joint' or 'disjoint'."})
    exit_pooling: str | None = field(default="mean", metadata={"help": "'cls', 'mean' or 'last'."})
    max_accuracy_drop: float = field(default=0.005, metadata={"help": "What speed may cost, on the validation data."})


@dataclass
class DemoTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for the demonstration."""

    output_dir: str = field(default="outputs/quickstart", metadata={"help": "Where everything is written."})
    num_train_epochs: float = field(default=2.0)
    per_device_train_batch_size: int = field(default=32)
    per_device_eval_batch_size: int = field(default=32)
    learning_rate: float = field(default=2e-4)
    warmup_steps: float = field(default=0.1)
    eval_strategy: str = field(default="epoch")
    save_strategy: str = field(default="no")
    logging_steps: float = field(default=50)
    report_to: str = field(default="none")


def main() -> None:
    """Runs the whole demonstration."""
    parser = HfArgumentParser((ModelArguments, DataArguments, DemoTrainingArguments), description=__doc__)
    model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses()
    set_seed(training_arguments.seed)
    checkpoint = Path(training_arguments.output_dir) / "checkpoint"

    name = Path(training_arguments.output_dir).name
    path = encoder_path(model_arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    splits = tokenised(load_splits(data_arguments), tokenizer, data_arguments.max_length)
    model = model_with_exits(path, splits, model_arguments)
    trainer = train(model, splits, tokenizer, training_arguments)
    calibration = calibrate_exits(model, splits["validation"], max_accuracy_drop=model_arguments.max_accuracy_drop)
    print(f"\nCalibrated on validation data: {calibration}")
    report = evaluate_exits(model.eval(), splits["test"])
    print_result(report, model, splits["test"])
    trainer.report.plot(checkpoint / PLOT_FILE)
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    card = model_card(model, trainer.report, repo_id=name, dataset_name=data_arguments.dataset, plot_file=PLOT_FILE)
    write_model_card(card, checkpoint, overwrite=True)
    print(f"\nCheckpoint, with plot (exits.png) and card (README.md): {checkpoint}")
    sentences = SENTENCES.get(data_arguments.dataset) or [text[:100] for text in splits["test"]["text"][:4]]
    print("\nIn a fresh process, without hf_adaptive:", flush=True)
    subprocess.run([sys.executable, str(CLASSIFY), str(checkpoint), *sentences], check=True)


def tokenised(splits: DatasetDict, tokenizer, max_length: int) -> DatasetDict:
    """Adds the encoder's inputs to every split."""

    def encode(batch: dict) -> dict:
        return tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length)

    return splits.map(encode, batched=True, desc="Tokenising")


def model_with_exits(path: str, splits: DatasetDict, arguments: ModelArguments):
    """The encoder with an untrained classifier after each of the chosen layers."""
    names = splits["train"].features["label"].names
    return AutoModelForSequenceClassificationWithExits.from_pretrained(
        path,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        exit_layers=arguments.exit_layers,
        exit_routing=arguments.exit_routing,
        exit_pooling=arguments.exit_pooling,
    )


def train(model, splits: DatasetDict, tokenizer, arguments: TrainingArguments) -> ExitsTrainer:
    """Fine-tunes, with the score of every exit after each epoch."""
    trainer = ExitsTrainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    return trainer


def print_result(report: ExitReport, model, test: Dataset) -> None:
    """The table by exit and the operating point, on test data that nothing was chosen on."""
    print(f"\nTest data, {report.num_examples} examples; every example answered by one exit:\n{report}")
    seconds = {}
    for name, arguments in {"all": {"exit_at": report.exit_layers[-1]}, "early": {}}.items():
        start = time.perf_counter()
        outputs = model.predict(test, **arguments)
        seconds[name] = time.perf_counter() - start
    accuracy = (outputs.logits.argmax(dim=-1) == torch.tensor(test["label"])).float().mean()
    shares = outputs.exit_index.bincount(minlength=len(report.exit_layers)) / len(test)
    cost = shares @ torch.tensor(report.costs)
    left = ", ".join(f"{share:.0%} after {layer}" for share, layer in zip(shares, report.exit_layers))
    print(
        f"\nOperating point: accuracy {accuracy:.4f} (all layers {report.accuracy[-1]:.4f}) at {cost:.0%} of the "
        f"layers, measured {seconds['all'] / seconds['early']:.1f} times as fast.\nRows left: {left} layers."
    )


if __name__ == "__main__":
    main()
