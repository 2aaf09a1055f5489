"""Says when a trained model may exit: the trade-off for several wishes, and the chosen one saved with the model.

Calibrates on validation data, reports what each wish costs and keeps on test data that nothing was chosen on, saves
the chosen setting, and shows that the reloaded model does what the report says.

    python examples/quickstart.py
    python examples/calibrate.py --checkpoint outputs/quickstart/checkpoint --max_accuracy_drop 0.01
    python examples/calibrate.py --checkpoint outputs/quickstart/checkpoint --max_disagreement 0.05 --confidence 0.95
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from hf_adaptive import CalibrationReport, ExitCalibrator
from text_data import DataArguments, load_splits, tokenised

WISHES: list[dict[str, Any]] = [
    {"target_cost": 0.25},
    {"target_cost": 0.5},
    {"target_cost": 0.5, "per_exit": True},
    {"max_accuracy_drop": 0.005},
    {"max_accuracy_drop": 0.02},
    {"max_accuracy_drop": 0.02, "confidence": 0.95},
    {"max_disagreement": 0.05},
    {"max_disagreement": 0.05, "confidence": 0.95},
]


@dataclass
class CalibrationArguments:
    """What is calibrated, and what is wished for."""

    checkpoint: str = field(default="outputs/quickstart/checkpoint", metadata={"help": "Folder or Hub name."})
    output_dir: str = field(default="outputs/calibrated", metadata={"help": "Where the calibrated model is saved."})
    target_cost: float | None = field(default=None, metadata={"help": "Best accuracy at this mean cost."})
    max_accuracy_drop: float | None = field(default=None, metadata={"help": "Cheapest with at most this drop."})
    max_disagreement: float | None = field(default=None, metadata={"help": "Cheapest with so many other answers."})
    confidence: float | None = field(default=None, metadata={"help": "Make the bound hold on new data, so surely."})
    per_exit: bool = field(default=False, metadata={"help": "One threshold an exit instead of one for all."})
    batch_size: int = field(default=32, metadata={"help": "Examples run at a time."})
    write_pool: str | None = field(default=None, metadata={"help": "File for the outputs of all exits, for studies."})


def main() -> None:
    """Calibrates, compares, saves, reloads."""
    arguments, data_arguments = HfArgumentParser(
        (CalibrationArguments, DataArguments), description=__doc__
    ).parse_args_into_dataclasses()
    model, tokenizer = load(arguments.checkpoint)
    splits = tokenised(load_splits(data_arguments), tokenizer, data_arguments.max_length)
    model.config.exit_thresholds = None
    calibrator = ExitCalibrator(model, splits["validation"], batch_size=arguments.batch_size)
    print_trade_off(calibrator, splits["test"], arguments.batch_size)
    if arguments.write_pool is not None:
        write_pool(calibrator, model, splits["test"], arguments)

    try:
        report = calibrator.calibrate(**chosen_wish(arguments))
    except ValueError as error:  # the wish cannot be tested: nothing is saved
        raise SystemExit(f"\n{error}") from None
    calibrator.store(report)
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    report.to_json(Path(arguments.output_dir) / "calibration.json")
    reloaded, _ = load(arguments.output_dir)
    print(f"\nChosen, saved in {arguments.output_dir}, and reloaded:\n{report}")
    for name, split in (("the calibration data", splits["validation"]), ("unseen test data", splits["test"])):
        print(f"The reloaded model on {name}: {as_text(measured(reloaded, split, arguments.batch_size))}.")


def load(path: str) -> tuple[Any, Any]:
    """A checkpoint and its tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
    return model, AutoTokenizer.from_pretrained(path, trust_remote_code=True)


def chosen_wish(arguments: CalibrationArguments) -> dict[str, Any]:
    """The wish of the command line; at most half a point worse if there is none."""
    names = ("target_cost", "max_accuracy_drop", "max_disagreement")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return {
        **(given or {"max_accuracy_drop": 0.005}),
        "confidence": arguments.confidence,
        "per_exit": arguments.per_exit,
    }


def print_trade_off(calibrator: ExitCalibrator, test: Dataset, batch_size: int) -> None:
    """A row for every wish: what calibration found, and what the model then does on test data."""
    print(f"\n{'wish':<42} | calibration: cost   drop  other | test: cost   drop  other  times as fast")
    for wish in WISHES:
        try:
            report = calibrator.calibrate(**wish)
        except ValueError as error:  # too few examples for the promised confidence; the others can be tried
            print(f"{in_words(wish):<42} | {error}")
            continue
        calibrator.store(report)
        on_test = measured(calibrator.model, test, batch_size)
        print(f"{in_words(wish):<42} | {_found(report)} | {as_columns(on_test)}")


def _found(report: CalibrationReport) -> str:
    point = report.choice.measured
    row = f"             {point.mean_cost:5.2f} {point.accuracy_drop:+7.4f} {point.disagreement:6.2%}"
    return row if report.found else f"{'nothing found: all layers are run':>33}"


def in_words(wish: dict[str, Any]) -> str:
    """The wish as it would be written in a call."""
    return ", ".join(f"{name}={value}" for name, value in wish.items())


def measured(model: Any, split: Dataset, batch_size: int) -> dict[str, float]:
    """What the stored setting really costs and keeps."""
    full, full_seconds = _run(model, split, batch_size, model.config.exit_layers[-1])
    early, seconds = _run(model, split, batch_size, None)
    labels = torch.tensor(split["label"])
    answers, full_answers = early.logits.argmax(dim=-1), full.logits.argmax(dim=-1)
    return {
        "cost": torch.tensor(model.config.exit_costs)[early.exit_index].mean().item(),
        "accuracy": (answers == labels).float().mean().item(),
        "drop": ((full_answers == labels).float().mean() - (answers == labels).float().mean()).item(),
        "other": (answers != full_answers).float().mean().item(),
        "speed": full_seconds / seconds,
    }


def _run(model: Any, split: Dataset, batch_size: int, exit_at: int | None) -> tuple[Any, float]:
    start = time.perf_counter()
    outputs = model.predict(split, batch_size, exit_at=exit_at, show_progress=False)
    return outputs, time.perf_counter() - start


def as_columns(point: dict[str, float]) -> str:
    """One row of the table."""
    return f"      {point['cost']:4.2f} {point['drop']:+7.4f} {point['other']:6.2%} {point['speed']:14.1f}"


def as_text(point: dict[str, float]) -> str:
    """One sentence."""
    return (
        f"cost {point['cost']:.3f}, accuracy {point['accuracy']:.4f} (drop {point['drop']:+.4f}), "
        f"{point['other']:.1%} other answers, {point['speed']:.1f} times as fast"
    )


def write_pool(calibrator: ExitCalibrator, model: Any, test: Dataset, arguments: CalibrationArguments) -> None:
    """Saves the logits of all exits, before temperatures, and the labels, of validation and test data together."""
    everything = [None] * (len(model.config.exit_layers) - 1)
    model.config.exit_temperatures = None
    outputs = model.predict(test, arguments.batch_size, exit_thresholds=everything)
    logits = torch.cat((calibrator.logits, outputs.exit_logits)).half()
    labels = torch.cat((torch.as_tensor(calibrator.labels), torch.tensor(test["label"]))).to(torch.uint8)
    costs = torch.tensor(model.config.exit_costs)
    save_file({"exit_logits": logits.contiguous(), "labels": labels, "costs": costs}, arguments.write_pool)


if __name__ == "__main__":
    main()
