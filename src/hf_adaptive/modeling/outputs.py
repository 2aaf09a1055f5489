"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class SequenceClassifierWithExitsOutput(ModelOutput):
    """Answer of a classifier with exits.

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned with `labels`):
            All exits run: sum over the exits of weight times mean loss. Rows left early: mean loss of `logits`.
        logits (`torch.Tensor` of shape `(batch, labels)`):
            Scores (before the softmax) of the exit that each row took. In training mode those of the last exit: a loss
            of your own on them is warned of, because no other exit learns from it. Use `exit_logits`.
        exit_logits (`torch.Tensor` of shape `(batch, exits, labels)`):
            Scores of every exit, divided by its temperature; NaN where a row had left before, or where the exit has a
            branch that nothing asked for.
        exit_index (`torch.LongTensor` of shape `(batch,)`):
            The exit that each row took, an index into `config.exit_layers`.
        exit_certainty (`torch.Tensor` of shape `(batch, exits)`, *optional*):
            With `exit_criterion="learned"`: how sure each exit is to be right, 0 to 1; NaN where it was not reached.
        hidden_states (`tuple` of `torch.Tensor` of shape `(batch, length, hidden)`, *optional*):
            Embeddings and the output of every layer, as the backbone returns them.
        attentions (`tuple` of `torch.Tensor` of shape `(batch, heads, length, length)`, *optional*):
            Attention probabilities of every layer, as the backbone returns them.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_logits: torch.Tensor | None = None
    exit_index: torch.Tensor | None = None
    exit_certainty: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
