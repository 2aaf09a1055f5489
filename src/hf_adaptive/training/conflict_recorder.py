"""Gradient conflict over training."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling.checks import is_number
from .gradient_conflict import GradientConflict, check_batch, gradient_conflict


class GradientConflictRecorder(TrainerCallback):
    """Compares the exits' gradients on one batch before training and during it; training is not changed by it.

    Args:
        batch (`Mapping[str, torch.Tensor]`): Held-out examples with `labels`, as for `gradient_conflict`.
        every (`float`): Steps between two records; below 1, the share of all steps.

    Attributes:
        records (`dict[int, GradientConflict]`): By the number of steps done.

    Raises:
        ValueError: `every` is not above 0.
    """

    def __init__(self, batch: Mapping[str, torch.Tensor], every: float = 0.1):
        check_batch(batch)
        if not is_number(every) or every <= 0:
            raise ValueError(f"every must be above 0 (steps, or below 1 a share of all steps), got {every!r}.")
        self.batch = dict(batch)
        self.every = every
        self.records: dict[int, GradientConflict] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Records the state before the first step."""
        self.records[state.global_step] = gradient_conflict(model, self.batch)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Records after every so many steps."""
        steps = self.every if self.every >= 1 else self.every * state.max_steps
        if state.global_step % max(1, round(steps)) == 0:
            self.records[state.global_step] = gradient_conflict(model, self.batch)
