"""Gradients of plain `Trainer` steps, for `accelerate launch`: each process gets its part of one batch.

    accelerate launch --multi_gpu --num_processes 2 two_processes.py job.json

(`--multi_gpu` starts the processes; the arguments of `Trainer` keep them on the CPU.)

Writes every run's gradients from the main process; after the step all processes must agree on the weights.
"""

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

from hf_adaptive import ExitDistillation, ExitsTrainer
from tests import tiny
from tests.training.test_trainer import ROWS, KeepsGradients, Rows, trainer

# Two processes on few cores.
torch.set_num_threads(1)


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


def main():
    """Runs the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    train_with_report(f"{job['out']}/reported")
    for name, routing in job["runs"]:
        kept, own = gradients(name, routing, job["out"], job["processes"])
        assert own.accelerator.num_processes == job["processes"], own.accelerator.num_processes
        check_agreement(own)
        own.save_model(f"{job['out']}/saved-{name}-{routing}")
        if own.is_world_process_zero():
            save_file(kept, f"{job['out']}/{name}-{routing}.safetensors")


if __name__ == "__main__":
    main()
