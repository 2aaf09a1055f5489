"""PAPA models: encoders with constant attention heads, and the papers' probe over all their layers (Hassid et al.,
Findings of EMNLP 2022, arXiv 2211.03495).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import can_return_tuple

from .checks import check_choice
from .constant_attention import check_length
from .constant_heads import install_constant_heads, is_constants
from .initialising import InitialisesAsStock
from .labels import NO_LABEL, read_labels, read_token_labels
from .loading import LoadsPlainCheckpoints
from .losses import answer_loss
from .papa_configuration import TRAINABLE_PARTS
from .saving import SavesWhole
from .weight_files import LoadsSafetensors


class PapaPreTrainedMixin(SavesWhole, LoadsPlainCheckpoints, LoadsSafetensors, InitialisesAsStock):
    """Saving and initialising, the same for all tasks."""

    # Each forward takes keyword arguments for the backbone, none of which may reach the loss (transformers#47688).
    accepts_loss_kwargs = False

    def _announce_backbone(self) -> None:
        """Nothing: `AutoModel` has no backbone class for these checkpoints."""


class PapaMaskedLMMixin(PapaPreTrainedMixin):
    """Constant heads under the stock language-model head."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        install_constant_heads(self.base_model, self.architecture, config)

    @classmethod
    def _plain_class(cls) -> Any:
        return cls.architecture.stock("ForMaskedLM")


class PapaProbeMixin(PapaPreTrainedMixin):
    """The frozen backbone with a probe over its embeddings and the outputs of all layers (arXiv 2211.03495)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        backbone = self.architecture.stock("Model")(config, **self.architecture.model_arguments)
        install_constant_heads(backbone, self.architecture, config)
        setattr(self, self.base_model_prefix, backbone)
        self._add_probe(config)
        self.post_init()
        self.freeze_backbone()

    @classmethod
    def _plain_class(cls) -> Any:
        return cls.architecture.bare

    def _after_loading(self) -> None:
        self.freeze_backbone()

    def set_trainable_part(self, part: str) -> None:
        """Changes what is trained: `"probe"`, `"constants"` or `"all"` (see the configuration)."""
        check_choice("trainable_part", part, TRAINABLE_PARTS)
        self.config.trainable_part = part
        self.freeze_backbone()

    def freeze_backbone(self) -> None:
        """Freezes what `config.trainable_part` leaves out, and nothing else."""
        part = self.config.trainable_part
        self.requires_grad_(True)
        for name, parameter in self.base_model.named_parameters():
            parameter.requires_grad_(part == "all" or (part == "constants" and is_constants(name)))

    def _run_backbone(
        self, attention_mask: torch.Tensor | None, inputs: dict[str, torch.Tensor | None], kwargs: dict[str, Any]
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Embeddings and every layer's output, each `(batch, length, hidden)`; and what else was asked for."""
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                "constant attention takes an attention_mask of shape (batch, length), got "
                f"{tuple(attention_mask.shape)}."
            )
        wanted = kwargs.pop("output_hidden_states", None)
        wanted = self.config.output_hidden_states if wanted is None else wanted
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        arguments = {**self.architecture.forward_arguments, **given, **kwargs}
        outputs = self.base_model(
            attention_mask=attention_mask, output_hidden_states=True, return_dict=True, **arguments
        )
        states = outputs.hidden_states
        return states, {"hidden_states": _selected(states, wanted), "attentions": outputs.attentions}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PapaPooler):
            init.constant_(module.position_weights, 1 / module.position_weights.shape[1])


class PapaForSequenceClassificationMixin(PapaProbeMixin):
    """Sequence classification with the PAPA pooler."""

    def _add_probe(self, config: Any) -> None:
        self.pooler = PapaPooler(config)
        self.dropout = nn.Dropout(self.architecture.probe_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids (`torch.Tensor`, *optional*): `(batch, length)`, with length at most `config.constant_length`.
            attention_mask (`torch.Tensor`, *optional*): `(batch, length)`, 1 at real positions; padding may lie
                anywhere. None: no padding.
            labels (`torch.Tensor`, *optional*): `(batch,)` int64 classes, or float targets `(batch,)` / `(batch,
                labels)` for regression and multi-label problems.

        Returns:
            Loss if labels are given, logits `(batch, labels)`, hidden states and attentions on request.
        """
        inputs = {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        hidden_states, asked_for = self._run_backbone(attention_mask, inputs, kwargs)
        logits = self.classifier(self.dropout(self.pooler(hidden_states, attention_mask)))
        if labels is not None:
            labels = read_labels(labels, len(logits), self.config)
        return SequenceClassifierOutput(
            loss=None if labels is None else answer_loss(logits, labels, self.config),
            logits=logits,
            **asked_for,
        )


class PapaForTokenClassificationMixin(PapaProbeMixin):
    """Token classification with the PAPA token head."""

    def _add_probe(self, config: Any) -> None:
        self.classifier = PapaTokenHead(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """
        Args:
            input_ids (`torch.Tensor`, *optional*): `(batch, length)`, with length at most `config.constant_length`.
            attention_mask (`torch.Tensor`, *optional*): `(batch, length)`, 1 at real positions; padding may lie
                anywhere. None: no padding.
            labels (`torch.Tensor`, *optional*): `(batch, length)` int64, -100 where there is none. Padding never
                counts.

        Returns:
            Loss if labels are given, logits `(batch, length, labels)`, hidden states and attentions on request.
        """
        inputs = {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        hidden_states, asked_for = self._run_backbone(attention_mask, inputs, kwargs)
        logits = self.classifier(hidden_states)
        if labels is not None:
            labels = read_token_labels(labels, logits.shape[:2], self.config.num_labels)
            labels = labels if attention_mask is None else labels.masked_fill(attention_mask == 0, NO_LABEL)
        return TokenClassifierOutput(
            loss=None if labels is None else self.loss_function(logits, labels, self.config),
            logits=logits,
            **asked_for,
        )


class PapaPooler(nn.Module):
    """One vector for a text, from all layers and positions (arXiv 2211.03495).

    Every hidden state is summed over its real positions with weights of its own, one for each position, not
    renormalised; a linear layer and tanh follow on all the sums.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        if config.constant_length is None:
            raise ValueError(
                "constant_length is None, but the PAPA pooler has one weight for each position. Set constant_length "
                "to the longest input in tokens."
            )
        states = config.num_hidden_layers + 1
        self.position_weights = nn.Parameter(torch.full((states, config.constant_length), 1 / config.constant_length))
        self.dense = nn.Linear(states * config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Sequence[torch.Tensor], attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`list[torch.Tensor]`): Embeddings and the output of every layer, each `(batch, length,
                hidden)`.
            attention_mask (`torch.Tensor`, *optional*): `(batch, length)`, 0 at padding.

        Returns:
            `(batch, hidden)`.
        """
        length = hidden_states[0].shape[1]
        check_length(length, self.position_weights.shape[1])
        weights = self.position_weights[:, None, :length]
        if attention_mask is not None:
            weights = weights * (attention_mask != 0)
        sums = [(state_weights.unsqueeze(-1) * state).sum(1) for state_weights, state in zip(weights, hidden_states)]
        return torch.tanh(self.dense(torch.cat(sums, dim=-1)))


class PapaTokenHead(nn.Module):
    """Logits for every token, from all layers (arXiv 2211.03495): concatenate, linear, tanh, linear."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear((config.num_hidden_layers + 1) * config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """From states `(batch, length, hidden)` to logits `(batch, length, labels)`."""
        return self.out_proj(torch.tanh(self.dense(torch.cat(tuple(hidden_states), dim=-1))))


def _selected(
    states: tuple[torch.Tensor, ...], wanted: bool | int | Sequence[int]
) -> tuple[torch.Tensor | None, ...] | None:
    """All, none, or those of these indexes, as `output_hidden_states` of a stock model means it."""
    if isinstance(wanted, bool):
        return states if wanted else None
    count = len(states)
    chosen = {index % count for index in ([wanted] if isinstance(wanted, int) else wanted) if -count <= index < count}
    return tuple(state if index in chosen else None for index, state in enumerate(states))
