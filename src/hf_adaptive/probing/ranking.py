"""Which heads need attention least (PAPA, arXiv 2211.03495).

Every head's attention is mixed with its constant, `s · attention + (1 − s) · constant` with `s = sigmoid(lambda)`, and
the lambdas are trained with the probe. Heads with a small lambda do well with the constant.
"""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import DataCollator, PreTrainedModel, Trainer, TrainingArguments

from ..files import write_whole
from ..modeling.attention_kinds import StockClass, StockHeads, put_beside
from ..modeling.checks import is_number, shortened
from ..modeling.constant_attention import check_length, constant_attention
from ..modeling.constant_heads import layout_of, self_attentions, separate_layers
from ..modeling.examples import as_rows, check_mapping
from ..modeling.head_choice import check_constants
from .averages import MeanAttention


@dataclass(frozen=True)
class HeadRanking:
    """Learned mixing weights of all heads.

    Args:
        lambdas (`tuple[tuple[float, ...], ...]`): By layer and head; the share of attention that a head keeps is
            `sigmoid(lambda)`.
    """

    lambdas: tuple[tuple[float, ...], ...]

    @property
    def order(self) -> list[list[int]]:
        """All `[layer, head]` pairs, those that need attention least first; equal lambdas layer by layer."""
        pairs = [[layer, head] for layer, row in enumerate(self.lambdas) for head in range(len(row))]
        return sorted(pairs, key=lambda pair: self.lambdas[pair[0]][pair[1]])

    @property
    def attention_weights(self) -> torch.Tensor:
        """`sigmoid(lambda)` `(layers, heads)`: 0 is all constant, 1 is all attention."""
        return torch.tensor(self.lambdas).sigmoid()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON with the lambdas and, for readers, the order; whole or not at all."""
        content = json.dumps({"lambdas": self.lambdas, "order": self.order}, indent=2)
        write_whole(path, lambda draft: Path(draft).write_text(content + "\n", encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HeadRanking":
        """Reads what `save` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "lambdas" not in content:
            raise ValueError(f"{path} holds no head ranking: it has no 'lambdas'.")
        return cls(tuple(tuple(row) for row in content["lambdas"]))


def rank_heads(
    model: Any,
    constants: torch.Tensor | MeanAttention,
    train_dataset: Dataset[Any],
    args: TrainingArguments,
    *,
    data_collator: DataCollator | None = None,
    lambda_learning_rate: float | None = None,
) -> HeadRanking:
    """Learns how much attention every head needs on a task, as PAPA does (arXiv 2211.03495).

    Lambdas and probe are trained, everything else is frozen. The model given is not changed.

    Args:
        model (`PreTrainedModel`): A `Papa…ForSequenceClassification` or `…ForTokenClassification` without constant
            heads, with `constant_length`.
        constants (`torch.Tensor` or `MeanAttention`): Average attention `(layers, heads, constant_length,
            constant_length)`, or what `mean_attention` returned, which is also checked to come from this model.
        train_dataset (`Dataset`): Tokenized, with labels.
        args (`TrainingArguments`): For the `Trainer`. The ranking is saved as `head_ranking.json` in its output
            folder.
        data_collator (`DataCollator`, *optional*): As in the `Trainer`.
        lambda_learning_rate (`float`, *optional*): For the lambdas; None means that of `args`. They never decay.

    Raises:
        ValueError: If the model has constant heads already, or the constants do not fit it.
    """
    is_papa = isinstance(model, PreTrainedModel) and "trainable_part" in model.config.to_dict()
    if not is_papa:
        raise ValueError(f"rank_heads needs a Papa…Classification model, got a {type(model).__name__}.")
    if not isinstance(args, TrainingArguments):
        raise ValueError(f"args must be TrainingArguments, got {shortened(args)}.")
    if not isinstance(constants, (torch.Tensor, MeanAttention)):
        raise ValueError(f"constants must be a tensor or what mean_attention returned, got {shortened(constants)}.")
    _check_training(train_dataset, lambda_learning_rate)
    if model.config.constant_heads:
        raise ValueError(
            f"rank_heads needs a model without constant heads, got one with {len(model.config.constant_heads)}. "
            "Convert the plain checkpoint with constant_heads=[] and constant_length=…"
        )
    if isinstance(constants, MeanAttention):
        constants = constants.average_for(model)
    mixed = copy.deepcopy(model)
    mixed.set_trainable_part("probe")
    lambdas = install_interpolation(mixed, constants)
    trainer = Trainer(
        model=mixed,
        args=args,
        train_dataset=train_dataset,
        data_collator=data_collator,
        optimizers=(_optimizer(mixed, lambdas, args, lambda_learning_rate), None),
    )
    trainer.train()
    ranking = HeadRanking(tuple(tuple(parameter.tolist()) for parameter in lambdas))
    if trainer.is_world_process_zero():
        ranking.save(Path(str(args.output_dir)) / "head_ranking.json")
    return ranking


def _check_training(train_dataset: Any, lambda_learning_rate: Any) -> None:
    if isinstance(train_dataset, Mapping):
        raise ValueError(
            f"train_dataset must be a data set of examples, got a mapping with the keys {list(train_dataset)}. Did "
            "you mean one of its splits?"
        )
    if not isinstance(train_dataset, IterableDataset):
        rows = as_rows(train_dataset)
        if len(rows) == 0:
            raise ValueError("train_dataset is empty: give at least one of the examples.")
        check_mapping(rows[0], 0)
    if lambda_learning_rate is not None and (not is_number(lambda_learning_rate) or lambda_learning_rate < 0):
        raise ValueError(
            f"lambda_learning_rate must be a number of at least 0, or None, got {shortened(lambda_learning_rate)}."
        )


def install_interpolation(model: Any, constants: torch.Tensor) -> list[nn.Parameter]:
    """Mixes the attention of every head with its constant, in place, half and half at first.

    Args:
        model (`PreTrainedModel`): A PAPA model without constant heads.
        constants (`torch.Tensor`): `(layers, heads, constant_length, constant_length)`, frozen.

    Returns:
        The lambdas of every layer, each `(heads,)`, 0 at first.
    """
    check_constants(constants, model.config)
    backbone, architecture = model.base_model, model.architecture
    layout = layout_of(backbone, architecture)
    separate_layers(backbone, architecture, model.config)
    attentions = self_attentions(backbone, architecture)
    for attention, layer_constants in zip(attentions, constants, strict=True):
        weight = next(attention.parameters())
        attention.lambdas = nn.Parameter(weight.new_zeros(len(layer_constants)))
        attention.register_buffer("constants", layer_constants.detach().to(weight))
        attention.stock_heads = len(layer_constants)
        put_beside(Interpolation, attention, layout, backbone.config)
    return [attention.lambdas for attention in attentions]


class Interpolation(StockClass):
    """Self-attention every head of which is mixed with a constant; put over a stock module.

    Attributes:
        lambdas: `(heads,)`.
        constants: `(heads, constant_length, constant_length)`.
    """

    def _beside(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, wants_attentions: bool
    ) -> torch.Tensor | None:
        """The real positions."""
        check_length(hidden_states.shape[1], self.constants.shape[-1])
        return self.layout.real_positions(attention_mask)

    def _of_stock_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _combined(self, stock: StockHeads, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mixing what the heads read equals mixing their matrices."""
        value = stock.value()
        reach = self.layout.reach(self, value.shape[1], value.device)
        constants = self.constants[:, : value.shape[1], : value.shape[1]]
        constants = constants if reach is None else constants * reach
        constant_context = constant_attention(constants, value, real, self.layout.dropout_of(self))
        share = self.lambdas.sigmoid().unsqueeze(-1)
        return share * stock.context + (1 - share) * constant_context, stock.attentions


def _optimizer(
    model: nn.Module, lambdas: list[nn.Parameter], args: TrainingArguments, lambda_learning_rate: float | None
) -> torch.optim.Optimizer:
    """AdamW with the lambdas apart: there is no penalty on them."""
    is_lambda = {id(parameter) for parameter in lambdas}
    rest = [
        parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in is_lambda
    ]
    groups = [
        {"params": lambdas, "lr": lambda_learning_rate or args.learning_rate, "weight_decay": 0.0},
        {"params": rest, "lr": args.learning_rate, "weight_decay": args.weight_decay},
    ]
    return torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
