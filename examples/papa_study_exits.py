"""Constant heads × exits, of examples/run_papa.py: one checkpoint with both, beside each alone and beside neither.

All are fine-tuned whole. Exits are calibrated on the validation part, and scored on the test part.
"""

import json
from pathlib import Path
from typing import Any

import transformers

from hf_adaptive import AutoModelForSequenceClassificationWithExits, ExitsTrainer, calibrate_exits, evaluate_exits
from papa_study_parts import Part
from study_files import write_json

FRACTION = 0.5
# (constant heads, exits)
METHODS = {
    "neither": (False, False),
    "constant heads": (True, False),
    "exits": (False, True),
    "both": (True, True),
}


def run_method(part: Part, method: str, seed: int) -> None:
    """Trains, calibrates and scores one of the methods; of the first seed the checkpoint is kept."""
    path = method_file(part, method, seed)
    if path.exists():
        return
    if part.is_token_task:
        raise ValueError(f"exits_on names {part.name}, a task of tokens. Name tasks that classify whole texts.")
    model = _untrained(part, method, seed)
    trainer = ExitsTrainer(
        model=model,
        args=part.training_arguments(
            seed,
            num_train_epochs=part.arguments.exits_epochs,
            learning_rate=part.arguments.exits_learning_rate,
            warmup_steps=0.1,
            bf16=part.arguments.bf16,
            train_sampling_strategy="group_by_length",
        ),
        train_dataset=part.splits["train"],
        processing_class=part.tokenizer,
    )
    trainer.train()
    if METHODS[method][1]:
        calibrate_exits(
            model, part.splits["validation"], max_accuracy_drop=part.arguments.max_accuracy_drop, show_progress=False
        )
    report = evaluate_exits(model, part.splits["test"], timed_examples=0, show_progress=False)
    if seed == part.arguments.seeds[0]:
        model.save_pretrained(checkpoint(part, method))
    write_json(path, {"method": method, "seed": seed, **_scores(report)})


def method_file(part: Part, method: str, seed: int) -> Path:
    """The file that says that a method is finished."""
    return part.folder / "exits" / f"{method.replace(' ', '-')}-seed-{seed}.json"


def checkpoint(part: Part, method: str) -> Path:
    """The folder of a method's checkpoint."""
    return part.folder / "checkpoints" / method.replace(" ", "-")


def finished_methods(folder: Path) -> list[dict[str, Any]]:
    """What `run_method` wrote for a part."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "exits").glob("*.json"))]


def _untrained(part: Part, method: str, seed: int) -> Any:
    has_constants, has_exits = METHODS[method]
    fields: dict[str, Any] = {"exit_routing": "joint", "exit_pooling": "mean", "num_labels": part.num_labels}
    if not has_exits:
        fields["exit_layers"] = [part.config.num_hidden_layers]
    if has_constants:
        fields |= {"constants": part.averages, "constant_heads": FRACTION, "head_ranking": part.ranking.order}
    transformers.set_seed(seed)
    return AutoModelForSequenceClassificationWithExits.from_pretrained(part.encoder, **fields)


def _scores(report: Any) -> dict[str, Any]:
    chosen = report.chosen
    return {
        "exit_layers": report.exit_layers,
        "accuracy_by_exit": report.accuracy,
        "accuracy": report.accuracy[-1] if chosen is None else chosen.accuracy,
        "cost": 1.0 if chosen is None else chosen.cost,
        "test_examples": report.num_examples,
    }
