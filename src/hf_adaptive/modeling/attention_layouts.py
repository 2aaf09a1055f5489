"""How the self-attention of an architecture is laid out, as far as constant heads have to know it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn

Rows = tuple[torch.Tensor, torch.Tensor | None]


class Projections(ABC):
    """Where a self-attention module keeps what makes queries, keys and values."""

    @abstractmethod
    def value_rows(self, attention: Any, heads: int) -> Rows:
        """What makes the values of a module with so many heads of them.

        Returns:
            Weight `(heads, head_size, hidden)`, and bias `(heads, head_size)` or None.
        """

    @abstractmethod
    def keep(self, attention: Any, kept: Sequence[int], heads: int, key_heads: int) -> None:
        """Removes, in place, what makes queries, keys and values of all heads but those to be kept.

        Args:
            kept (`list[int]`): Heads, ascending.
            heads, key_heads (`int`): How many there are now, and how many heads of keys and values they share.
        """


@dataclass(frozen=True)
class SeparateProjections(Projections):
    """One linear layer each.

    Args:
        query, key, value (`str`): Names of the layers in the self-attention module.
        more_queries, more_keys (`tuple[str, ...]`): Layers that make further queries and keys, of positions.
    """

    query: str
    key: str
    value: str
    more_queries: tuple[str, ...] = ()
    more_keys: tuple[str, ...] = ()

    def value_rows(self, attention: Any, heads: int) -> Rows:
        value = attention.get_submodule(self.value)
        bias = None if value.bias is None else value.bias.unflatten(0, (heads, -1))
        return value.weight.unflatten(0, (heads, -1)), bias

    def keep(self, attention: Any, kept: Sequence[int], heads: int, key_heads: int) -> None:
        group = heads // key_heads
        read = sorted({head // group for head in kept})
        _keep_rows(attention, (self.query, *self.more_queries), (heads,), kept)
        _keep_rows(attention, (self.key, self.value, *self.more_keys), (key_heads,), read)
        if group == 1 or not kept:
            return
        readers = [sum(head // group == key for head in kept) for key in read]
        attention.num_key_value_groups = readers[0]
        if len(set(readers)) > 1:
            # Stock code gives out every head of keys and values equally often.
            attention.num_key_value_groups = 1
            for name in (self.key, self.value):
                _repeat_heads(attention.get_submodule(name), readers)


@dataclass(frozen=True)
class FusedProjection(Projections):
    """Queries, keys and values are rows of one linear layer.

    Args:
        name (`str`): Of the layer.
        is_by_head (`bool`): Whether the three of a head lie together, rather than all queries, all keys, all values.
        value_bias (`str`, *optional*): A parameter beside the layer.
        more (`tuple[str, ...]`): Layers and parameters that make something more for every head.
    """

    name: str
    is_by_head: bool
    value_bias: str | None = None
    more: tuple[str, ...] = ()

    def value_rows(self, attention: Any, heads: int) -> Rows:
        layer = attention.get_submodule(self.name)
        shape, kinds = ((heads, 3), 1) if self.is_by_head else ((3, heads), 0)
        weight = layer.weight.unflatten(0, (*shape, -1)).select(kinds, 2)
        if self.value_bias is not None:
            return weight, attention.get_parameter(self.value_bias).unflatten(0, (heads, -1))
        return weight, None if layer.bias is None else layer.bias.unflatten(0, (*shape, -1)).select(kinds, 2)

    def keep(self, attention: Any, kept: Sequence[int], heads: int, key_heads: int) -> None:
        _keep_rows(attention, (self.name,), (heads, 3) if self.is_by_head else (3, heads), kept, 1 - self.is_by_head)
        _keep_rows(attention, self.more, (heads,), kept)


@dataclass(frozen=True)
class AttentionLayout:
    """How the self-attention modules of an architecture are built.

    Args:
        path (`str`): Of the self-attention module in a layer.
        projections (`Projections`): Where it keeps what makes queries, keys and values.
        output (`tuple[str, ...]`): Modules in it that are applied to what the heads read, in this order.
        residual_norm (`str`, *optional*): Module in it that normalises the sum of that and the layer's input (ALBERT).
        dropout (`str`): Its attribute with the dropout of attention probabilities, a module or a number.
        has_interface (`bool`): Whether it asks `ALL_ATTENTION_FUNCTIONS` of `transformers` for attention; the others
            compute it themselves.
        has_position_bias (`bool`): Whether it is given a bias for the scores of every head (MPNet).
        has_additive_mask (`bool`): Whether a floating-point mask is 0 at real positions and very negative elsewhere,
            rather than 1 at real positions and 0 elsewhere (DeBERTa).
        is_causal (`bool`): Whether a position attends to none after it, unless the module says `is_causal=False`.
        window (`str`, *optional*): Its attribute with the distance from which on positions are out of reach; None in
            it: none are.
        rotary (`str`, *optional*): Path in the backbone of the module that computes rotary positions, which are handed
            to the layers; not run where no head reads them.
    """

    path: str
    projections: Projections
    output: tuple[str, ...] = ()
    residual_norm: str | None = None
    dropout: str = "dropout"
    has_interface: bool = True
    has_position_bias: bool = False
    has_additive_mask: bool = True
    is_causal: bool = False
    window: str | None = None
    rotary: str | None = None

    def dropout_of(self, attention: Any) -> float:
        """The dropout of attention probabilities as it is now: 0 in evaluation mode."""
        dropout = getattr(attention, self.dropout)
        probability = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        return probability if attention.training else 0.0

    def reach(self, attention: Any, length: int, device: torch.device) -> torch.Tensor | None:
        """Where a position may attend to whatever the input, `(length, length)`; None for everywhere."""
        window: Any = None if self.window is None else attrgetter(self.window)(attention)
        is_causal = self.is_causal and attention.is_causal
        if not is_causal and (window is None or window >= length):
            return None
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        reach = distance >= 0 if is_causal else distance > -window
        return reach if window is None else reach & (distance < window)

    def real_positions(self, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """The padding vector `(batch, length)`, True at real positions, of the mask that a layer was given.

        Reads the diagonal: position i is real if it may attend to itself. That holds for every form in which
        transformers hands padding to a layer, and goes on to hold when rows of the batch are dropped between layers.

        Returns:
            None if there is no mask, that is no padding.
        """
        if attention_mask is None:
            return None
        if not isinstance(attention_mask, torch.Tensor):
            raise ValueError(
                f"constant heads cannot read an attention mask of type {type(attention_mask).__name__}. Load the "
                "model with attn_implementation='sdpa', 'eager' or a flash attention."
            )
        if attention_mask.dim() == 4:
            attention_mask = attention_mask[:, 0]
            per_query = attention_mask.shape[-2] > 1
            attention_mask = attention_mask.diagonal(dim1=-2, dim2=-1) if per_query else attention_mask[:, 0]
        if attention_mask.is_floating_point() and self.has_additive_mask:
            return attention_mask == 0
        return attention_mask != 0


def key_heads(config: Any) -> int:
    """How many heads of keys and values there are: fewer than heads where these share them."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _keep_rows(
    attention: Any, names: Sequence[str], shape: tuple[int, ...], kept: Sequence[int], dim: int = 0
) -> None:
    """Keeps the rows of some heads in layers and parameters of these names. Rows lie in `shape`, heads along `dim`."""
    for name, parameter in list(attention.named_parameters()):
        if name.partition(".")[0] not in names:
            continue
        blocks = parameter.detach().unflatten(0, (*shape, -1)).movedim(dim, 0)
        rows = blocks[list(kept)].movedim(0, dim).flatten(0, len(shape)).clone()
        owner, _, last = name.rpartition(".")
        module = attention.get_submodule(owner)
        setattr(module, last, nn.Parameter(rows, requires_grad=parameter.requires_grad))
        if isinstance(module, nn.Linear):
            module.out_features = len(rows)


class RepeatedHeads(nn.Linear):
    """A linear layer whose heads are given out as often as they are read.

    Attributes:
        readers: How often, for every head.
    """

    readers: tuple[int, ...]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        heads = super().forward(hidden_states).unflatten(-1, (len(self.readers), -1)).unbind(-2)
        repeated = [head for head, count in zip(heads, self.readers) for _ in range(count)]
        return torch.stack(repeated, dim=-2).flatten(-2)


def _repeat_heads(layer: Any, readers: Sequence[int]) -> None:
    layer.readers = tuple(readers)
    layer.__class__ = RepeatedHeads
