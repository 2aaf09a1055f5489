"""The rows on training: SWEET's step beside plain fine-tuning and its memory beside joint training; and both, of exits
with branches and distillation, beside plain fine-tuning."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import Spread, measure_in_turn, measured_alone, medians, ratio
from results import Result, Target
from runs import in_batches
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification
from workload import BATCH_SIZE, Workload

from hf_adaptive import ExitDistillation
from hf_adaptive.modeling.losses import exits_loss

PROBE = Path(__file__).parent / "memory_probe.py"
ROUTINGS = {
    "SWEET": {"exit_routing": "sweet"},
    "ordinary SWEET (exit_local_gradients=False)": {"exit_routing": "sweet", "exit_local_gradients": False},
    "joint": {"exit_routing": "joint"},
}
BRANCHES = {"exit_routing": "joint", "exit_branch_layers": 1}
DISTILLATION = ExitDistillation()


def sweet_step(workload: Workload) -> list[Result]:
    """A SWEET training step beside a plain fine-tuning step of the same backbone."""
    size = workload.size
    texts = workload.tokenised("train", size.step_batches * BATCH_SIZE)
    batches = [workload.training_batch(batch) for batch in in_batches(texts)]
    sweet = workload.untrained(exit_layers=size.exit_layers, exit_routing="sweet")
    plain = AutoModelForSequenceClassification.from_pretrained(workload.plain_checkpoint)
    steps = {"SWEET": TrainingSteps(sweet.to(workload.device), batches)}
    steps["plain"] = TrainingSteps(plain.to(workload.device), batches)
    warm_up = {name: TrainingSteps(step.model, batches[:1]) for name, step in steps.items()}
    seconds = measure_in_turn(steps, warm_up, size.repeats, workload.device, "SWEET training step")
    return [
        Result(
            "sweet_step",
            f"SWEET training step, batch of {BATCH_SIZE} texts (AdamW)",
            "time / plain fine-tuning step",
            Target(1.05),
            ratio(seconds["SWEET"], seconds["plain"]),
            {**medians(seconds), "steps": len(batches)},
        )
    ]


def branch_step(workload: Workload) -> list[Result]:
    """A training step of exits with branches and distillation beside a plain fine-tuning step of the same backbone."""
    size = workload.size
    texts = workload.tokenised("train", size.step_batches * BATCH_SIZE)
    batches = [workload.training_batch(batch) for batch in in_batches(texts)]
    branched = workload.untrained(exit_layers=size.exit_layers, **BRANCHES).to(workload.device)
    plain = AutoModelForSequenceClassification.from_pretrained(workload.plain_checkpoint).to(workload.device)
    losses = {"branches, distillation": (branched, distilled_loss), "branches": (branched, own_loss)}
    steps = {name: TrainingSteps(model, batches, loss) for name, (model, loss) in losses.items()}
    steps["plain"] = TrainingSteps(plain, batches)
    warm_up = {name: TrainingSteps(step.model, batches[:1], step.loss_of) for name, step in steps.items()}
    seconds = measure_in_turn(steps, warm_up, size.repeats, workload.device, "training step with branches")
    return [
        Result(
            "branch_step",
            f"training step with {name}, batch of {BATCH_SIZE} texts (AdamW)",
            "time / plain fine-tuning step",
            Target(1.35) if loss is distilled_loss else None,
            ratio(seconds[name], seconds["plain"]),
            {**medians(seconds), "steps": len(batches)},
        )
        for name, (_, loss) in losses.items()
    ]


def branch_memory(workload: Workload) -> list[Result]:
    """Peak memory of a training step with branches beside that of the last exit alone, which is plain fine-tuning."""
    exit_layers = tuple(workload.size.exit_layers)
    branched = _peak(workload, exit_layers, BRANCHES)
    plain = _peak(workload, exit_layers[-1:], {"exit_routing": "joint"})
    shape = f"{workload.size.memory_rows} × {workload.longest} tokens"
    return [
        Result(
            "branch_memory",
            f"training with branches at exits {_text(exit_layers)}",
            f"peak memory with gradients, {shape} / plain fine-tuning",
            Target(1.35),
            Spread.of([branched["whole"] / plain["whole"]]),
            {"kB": branched["whole"], "plain, kB": plain["whole"]},
        )
    ]


def own_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own loss."""
    return model(**batch).loss


def distilled_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What `ExitsTrainer` trains with when it distils."""
    outputs = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    labels = batch["labels"]
    distance = DISTILLATION.loss(outputs.exit_logits, None, labels, model.config)
    return exits_loss(outputs.exit_logits, outputs.exit_certainty, labels, model.config) + distance


class TrainingSteps:
    """Forward, backward and optimizer step, for each of some batches.

    Args:
        model: In training mode from now on.
        batches (`Sequence[dict[str, torch.Tensor]]`): With labels, on the device.
        loss_of (`Callable`): From the model and a batch.
    """

    def __init__(
        self,
        model: Any,
        batches: Sequence[dict[str, torch.Tensor]],
        loss_of: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor] = own_loss,
    ):
        self.model = model.train()
        self.batches = batches
        self.loss_of = loss_of
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def __call__(self) -> None:
        for batch in self.batches:
            self.loss_of(self.model, batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def sweet_memory(workload: Workload) -> list[Result]:
    """Peak memory of a training step under SWEET beside joint training, each in a process of its own."""
    size = workload.size
    placements = {tuple(size.exit_layers): Target(0.60)}
    if size.even_exit_layers is not None:
        placements[tuple(size.even_exit_layers)] = Target(0.35)
    results = []
    for exit_layers, target in placements.items():
        peaks = {
            name: _peak(workload, exit_layers, fields)
            for name, fields in tqdm(ROUTINGS.items(), desc=f"memory, exits {_text(exit_layers)}")
        }
        results += _memory_results(peaks, exit_layers, target, workload)
    return results


def _memory_results(
    peaks: dict[str, dict[str, float]], exit_layers: tuple[int, ...], target: Target, workload: Workload
) -> list[Result]:
    shape = f"{workload.size.memory_rows} × {workload.longest} tokens"
    measures = {
        "activations": ("kB a token", "peak memory of activations / joint training"),
        "whole": ("kB", f"peak memory with gradients, {shape} / joint training"),
    }
    return [
        Result(
            "sweet_memory",
            f"{name} training at exits {_text(exit_layers)}",
            measured_as,
            target if name == "SWEET" and measure == "activations" else None,
            Spread.of([peak[measure] / peaks["joint"][measure]]),
            {unit: peak[measure], f"joint, {unit}": peaks["joint"][measure]},
        )
        for name, peak in peaks.items()
        if name != "joint"
        for measure, (unit, measured_as) in measures.items()
    ]


def _peak(workload: Workload, exit_layers: Sequence[int], fields: dict[str, Any]) -> dict[str, float]:
    job = {
        "encoder": workload.encoder,
        "fields": {"exit_layers": list(exit_layers), **fields},
        "device": str(workload.device),
        "rows": workload.size.memory_rows,
        "length": workload.longest,
    }
    return measured_alone(PROBE, job)


def _text(exit_layers: Sequence[int]) -> str:
    return "/".join(map(str, exit_layers))
