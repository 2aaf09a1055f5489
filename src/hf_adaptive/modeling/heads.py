"""An exit's own classification head, and the ways to make one vector of a sequence."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

POOLINGS = ("cls", "mean", "last", "late")


class CertaintyUnit(nn.Module):
    """Learns from an exit's pooled vector whether the exit is right (`exit_criterion="learned"`).

    Args:
        size (`int`): Width of the pooled vector.
    """

    least: torch.Tensor
    largest: torch.Tensor

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, 1)
        # Range over a calibration set; 0 to 1 until there was one.
        self.register_buffer("least", torch.tensor(0.0))
        self.register_buffer("largest", torch.tensor(1.0))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Certainty from 0 to 1, `torch.Tensor` of shape `(rows,)`; stretched to its range in evaluation mode."""
        certainty = self.linear(pooled).squeeze(-1).sigmoid()
        return certainty if self.training else ((certainty - self.least) / (self.largest - self.least)).clamp(0, 1)


@dataclass(frozen=True)
class Head:
    """How an architecture's own classification head is built, and where its stock classifier keeps the parts.

    Applied in the order: input dropout, dense, activation, norm, dropout, classifier.

    Args:
        classifier (`str`, *optional*): Path of the last linear layer in the stock `…ForSequenceClassification`; None
            if there is no such class: a plain checkpoint then gives its backbone only, and all heads are new.
        dense (`str`, *optional*): Path of the linear layer before it; None if there is none.
        dense_bias, classifier_bias (`Callable`): From the configuration, whether these have a bias.
        activation (`str`): A name of `ACT2FN`, or the configuration field that holds one.
        norm (`str`, *optional*): Path of a normalisation after the activation.
        build_norm (`Callable`, *optional*): Makes that normalisation from the configuration.
        input_dropout, dropout (`Callable`): Dropout probabilities from the configuration.
        initialise (`Callable`, *optional*): Gives new weights of an `ExitHead`, with the configuration, their first
            values where the stock head has others than its architecture's layers.
    """

    classifier: str | None = None
    dense: str | None = None
    dense_bias: Callable[[Any], bool] = lambda config: True
    classifier_bias: Callable[[Any], bool] = lambda config: True
    activation: str = "tanh"
    norm: str | None = None
    build_norm: Callable[[Any], nn.Module] | None = None
    input_dropout: Callable[[Any], float] = lambda config: 0.0
    dropout: Callable[[Any], float] = lambda config: 0.0
    initialise: Callable[["ExitHead", Any], None] | None = None

    @property
    def sources(self) -> dict[str, str]:
        """Paths in the stock classifier by the name of the part in `ExitHead`."""
        parts = {"dense": self.dense, "norm": self.norm, "classifier": self.classifier}
        return {name: path for name, path in parts.items() if path is not None}


class ExitHead(nn.Module):
    """Classifies the pooled hidden state of one exit.

    Args:
        config: The model's configuration.
        head (`Head`): How the architecture builds its head.
        final_norm (`nn.Module`, *optional*): The normalisation that the backbone applies after its last layer. An
            earlier exit gets its own copy, because its hidden state has not been through it.
        branch (`Sequence[nn.Module]`): Layers of its own, which are run before it.
    """

    def __init__(self, config: Any, head: Head, final_norm: nn.Module | None = None, branch: Sequence[nn.Module] = ()):
        super().__init__()
        self.branch = nn.ModuleList(branch)
        self.final_norm = copy.deepcopy(final_norm)
        self.input_dropout = nn.Dropout(head.input_dropout(config))
        self.dense = self.activation = None
        if head.dense is not None:
            self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=head.dense_bias(config))
            self.activation = ACT2FN[getattr(config, head.activation, head.activation)]
        self.norm = None if head.build_norm is None else head.build_norm(config)
        self.dropout = nn.Dropout(head.dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, bias=head.classifier_bias(config))
        self.certainty = CertaintyUnit(config.hidden_size) if config.exit_criterion == "learned" else None

    def forward(
        self, hidden: torch.Tensor, pooling: str, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the exit says after the layers of its branch.

        Args:
            hidden, pooling, mask: As in `pool`.

        Returns:
            The logits, `torch.Tensor` of shape `(rows, labels)`; and what the learned unit says, `(rows,)`, or None.
        """
        pooled = self.pool(hidden, pooling, mask)
        return self.classifier(pooled), None if self.certainty is None else self.certainty(pooled)

    def pool(self, hidden: torch.Tensor, pooling: str, mask: torch.Tensor | None) -> torch.Tensor:
        """Vector that the classifier sees.

        Args:
            hidden (`torch.Tensor` of shape `(rows, length, hidden)`): Output of the exit's layer.
            pooling (`str`): `cls`, `mean`, `last`, or `late` (the mean is taken after dense layer and norm).
            mask (`torch.Tensor` of shape `(rows, length)`, *optional*): 1 at real tokens; None if all are real.

        Returns:
            `torch.Tensor` of shape `(rows, hidden)`.
        """
        if pooling == "late":
            return self.dropout(pool(self._transformed(self._normalised(hidden)), "mean", mask))
        if pooling == "mean":
            # A normalisation belongs to each token, as in the backbone.
            vector = pool(self._normalised(hidden), pooling, mask)
        else:
            vector = self._normalised(pool(hidden, pooling, mask))
        return self.dropout(self._transformed(vector))

    def _transformed(self, vector: torch.Tensor) -> torch.Tensor:
        vector = self.input_dropout(vector)
        if self.dense is not None and self.activation is not None:
            vector = self.activation(self.dense(vector))
        return vector if self.norm is None else self.norm(vector)

    def _normalised(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.final_norm is None else self.final_norm(hidden)


def pool(hidden: torch.Tensor, pooling: str, mask: torch.Tensor | None) -> torch.Tensor:
    """First real token, mean of the real tokens, or last real token.

    Args:
        hidden (`torch.Tensor` of shape `(rows, length, hidden)`): Hidden state.
        pooling (`str`): `cls`, `mean` or `last`.
        mask (`torch.Tensor` of shape `(rows, length)`, *optional*): 1 at real tokens; None if all are real.

    Returns:
        `torch.Tensor` of shape `(rows, hidden)`.
    """
    if mask is None:
        return hidden.mean(dim=1) if pooling == "mean" else hidden[:, 0 if pooling == "cls" else -1]
    if pooling == "mean":
        weights = mask.to(hidden.dtype).unsqueeze(-1)
        # where, not only a product: padding may hold anything, NaN included.
        total = torch.where(weights > 0, hidden, 0).sum(dim=1)
        return total / weights.sum(dim=1).clamp(min=1)
    real = (mask != 0).long()
    position = torch.arange(mask.shape[1], device=mask.device)
    index = real.argmax(dim=1) if pooling == "cls" else (real * position).argmax(dim=1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index.to(hidden.device)]
