"""What one graph computes, as modules that `torch.export` can follow."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..modeling.inputs import BackboneInputs
from ..modeling.layers import Progress
from .folder import NEXT_STATE, STATE


class ExitStage(nn.Module):
    """The layers from one exit of a model to the next, and that one's head.

    A run that pauses at an exit, as `predict`'s does, would leave an exporter with half of the backbone's modules on
    its stack. So the rest of the backbone is passed through, and what was noted at the exit is returned.

    Args:
        model: A classifier with exits, in evaluation mode, without temperatures.
        index (`int`): Of the exit, an index into `exit_layers`.
        before (`ExitStage`, *optional*): The stage before it, which has been run once.
    """

    def __init__(self, model: Any, index: int, before: "ExitStage | None" = None):
        super().__init__()
        self.model = model
        self.index = index
        self.depth = model.config.exit_layers[index]
        self.is_last = index == len(model.config.exit_layers) - 1
        has_certainty = model.exits[index].certainty is not None
        self.inputs = _input_names(model.base_model) if index == 0 else [STATE, "attention_mask"]
        self.outputs = ["logits", *["certainty"] * has_certainty, *[NEXT_STATE] * (not self.is_last)]
        # Length of the tuple that a layer returns, for layers that are skipped; known after a run.
        self.output_length: int | None = None
        self._before = (before,)  # in a tuple, so that it is no module of this one

    def forward(self, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What `outputs` names, from what `inputs` names."""
        mask = tensors["attention_mask"]
        # Of later stages' tokens a backbone asks for the shape only: their embeddings are in the state.
        input_ids = tensors["input_ids"] if self.index == 0 else torch.zeros_like(mask)
        inputs = self.model._inputs(input_ids, mask, tensors.get("token_type_ids"), None, None)
        answers: list[Any] = []

        def at_exit(depth: int, hidden: torch.Tensor) -> torch.Tensor:
            answers.append(self.model._exit_answer(self.index, hidden, inputs))
            return hidden

        outputs, progress = self.model._run_layers(
            inputs, at_exit, progress=self._start(tensors), stop=None if self.is_last else self.depth
        )
        self.output_length = progress.output_length
        if self.is_last:
            at_exit(self.depth, outputs.last_hidden_state)
            return tuple(answers[0].tensors)
        return (*answers[0].tensors, progress.hidden)

    def _start(self, tensors: dict[str, torch.Tensor]) -> Progress | None:
        before = self._before[0]
        return None if before is None else Progress(before.depth, tensors[STATE], before.output_length)


class MemberStage(nn.Module):
    """One member of a cascade.

    Args:
        model: A cascade, in evaluation mode, without temperatures.
        index (`int`): Of the member.
    """

    def __init__(self, model: Any, index: int):
        super().__init__()
        self.model = model
        self.index = index
        self.inputs = _input_names(model.members[index].base_model)
        self.outputs = ["logits"]

    def forward(self, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What `outputs` names, from what `inputs` names."""
        return (self.model._member_answer(self.index, BackboneInputs(tensors, tensors["attention_mask"])).logits,)


def stage_modules(model: Any) -> Sequence[ExitStage | MemberStage]:
    """The stages of a classifier with exits or of a cascade, to be run in this order."""
    indexes = range(len(model.config.exit_layers))
    if model.config.model_type == "cascade":
        return [MemberStage(model, index) for index in indexes]
    stages: list[ExitStage] = []
    for index in indexes:
        stages.append(ExitStage(model, index, before=stages[-1] if stages else None))
    return stages


def _input_names(backbone: Any) -> list[str]:
    """What a backbone reads of an example."""
    has_segments = getattr(backbone.config, "type_vocab_size", None)
    return ["input_ids", "attention_mask", *["token_type_ids"] * bool(has_segments)]
