"""Measured time of examples/run_papa.py: what constant heads save, beside the stock model; and with exits."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from hf_adaptive import AutoModelForSequenceClassificationWithExits
from hf_adaptive.modeling.switch import settle
from papa_study_exits import METHODS, checkpoint
from papa_study_parts import Part
from study_files import write_json

sys.path.append(str(Path(__file__).resolve().parent / "benchmarks"))
from measuring import Run, Spread, describe_machine, measure_in_turn, ratio

ROUNDS = 5
STOCK = "stock"
CPU = torch.device("cpu")


def measure_time(parts: list[Part], folder: Path) -> None:
    """Measures every part that has results, and writes `timing.json`."""
    path = folder / "timing.json"
    timing = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}}
    timing["machine"] = describe_machine(CPU)
    for part in parts:
        measured = {"examples": part.arguments.timed_examples, "heads": _time_of_heads(part)}
        if all((checkpoint(part, method) / "config.json").exists() for method in METHODS):
            measured["exits"] = _time_of_exits(part)
        timing["parts"][part.name] = measured
        write_json(path, timing)


def _time_of_heads(part: Part) -> Any:
    """The backbone on test texts in batches of similar length, for every share of constant heads."""
    batches = [_inputs(batch) for batch in part.batches("test", part.arguments.timed_examples)]
    shares = [fraction for fraction in part.arguments.fractions if fraction > 0]
    models = {f"{fraction:.4f}": part.papa_model(fraction, 0).base_model for fraction in shares}
    models[STOCK] = AutoModel.from_pretrained(part.encoder, attn_implementation="sdpa")
    runs: dict[str, Run] = {name: _forward(model.eval(), batches) for name, model in models.items()}
    return _ratios(measure_in_turn(runs, runs, ROUNDS, CPU, f"{part.name}: time"), STOCK)


def _inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _forward(model: Any, batches: list[dict[str, torch.Tensor]]) -> Run:
    @torch.inference_mode()
    def run() -> None:
        for batch in batches:
            model(**batch)

    return run


def _time_of_exits(part: Part) -> Any:
    """`predict` of every method's checkpoint on test texts."""
    test = part.splits["test"]
    rows = test.select(range(min(4 * part.arguments.timed_examples, len(test)))).remove_columns("labels")[:]
    runs: dict[str, Run] = {method: _predict(checkpoint(part, method), rows) for method in METHODS}
    return _ratios(measure_in_turn(runs, runs, ROUNDS, CPU, f"{part.name}: time with exits"), "neither")


def _predict(folder: Path, rows: Any) -> Run:
    settle(folder)
    model = AutoModelForSequenceClassificationWithExits.from_pretrained(folder).eval()
    return lambda: model.predict(rows, show_progress=False)


def _ratios(seconds: dict[str, list[float]], base: str) -> dict[str, Any]:
    ratios: dict[str, Spread] = {name: ratio(own, seconds[base]) for name, own in seconds.items()}
    return {
        name: {"ratio": one.median, "lower": one.lower, "upper": one.upper, "seconds": seconds[name]}
        for name, one in ratios.items()
    }
