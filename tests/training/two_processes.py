"""Gradients of plain `Trainer` steps in two processes, of which each gets its part of one batch."""

import functools

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

from hf_adaptive import ExitDistillation, ExitsTrainer
from tests import tiny
from tests.training.test_trainer import ROWS, KeepsGradients, Rows, trainer


def gradients(name, routing, folder, processes, **fields):
    """Gradients of two steps over one batch of all rows, and the trainer; `<name>+distilled` has branches, too."""
    kept = KeepsGradients()
    name, _, distilled = name.partition("+")
    if distilled:
        fields = {"exit_branch_layers": 1, **fields}
    own = trainer(
        tiny.without_dropout(name, exit_routing=routing, **fields),
        folder,
        rows=Rows(),
        callbacks=[kept],
        kind=functools.partial(ExitsTrainer, distillation=ExitDistillation()) if distilled else Trainer,
        # A parameter without a gradient stops the second step.
        ddp_find_unused_parameters=False,
        max_steps=2,
        max_grad_norm=0,
        per_device_train_batch_size=ROWS // processes,
    )
    own.eval_dataset = None
    own.train()
    return {f"{step}/{key}": value for step, grads in enumerate(kept.steps) for key, value in grads.items()}, own


def check_agreement(own):
    """All processes have the same weights after the step."""
    total = torch.stack([parameter.detach().double().sum() for parameter in own.model.parameters()])
    everywhere = own.accelerator.gather(total).reshape(own.accelerator.num_processes, -1)
    assert (everywhere == everywhere[0]).all(), "the processes went apart"


def train_with_report(folder):
    """Every process takes part in measuring; the main one writes what `ExitsTrainer` adds."""
    arguments = TrainingArguments(
        folder, max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    own = ExitsTrainer(tiny.model(), arguments, train_dataset=Rows(), eval_dataset=Rows())
    own.train()
    assert own.report.num_examples == ROWS


def train_in_processes(runs, out):
    """Writes every run's gradients from the main process; after the step all processes must agree on the weights."""
    train_with_report(str(out / "reported"))
    for name, routing in runs:
        kept, own = gradients(name, routing, out, processes=2)
        assert own.accelerator.num_processes == 2, own.accelerator.num_processes
        check_agreement(own)
        own.save_model(str(out / f"saved-{name}-{routing}"))
        if own.is_world_process_zero():
            save_file(kept, out / f"{name}-{routing}.safetensors")
