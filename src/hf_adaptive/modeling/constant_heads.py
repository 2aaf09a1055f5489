"""Constant attention heads in unmodified transformers backbones (PAPA, Hassid et al., Findings of EMNLP 2022,
arXiv 2211.03495).

A constant head has no query and no key. The other heads of the layer are run by the stock code of transformers, which
knows of no more heads than these.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils.import_utils import is_tracing

from .attention_kinds import StockClass, StockHeads, put_beside
from .attention_layouts import AttentionLayout, key_heads
from .constant_attention import (
    check_length,
    constant_attention,
    constant_probabilities,
    even_runs,
    spans_of,
    sums_and_scale,
    write_context,
)
from .head_choice import check_constant_heads, check_constants


def install_constant_heads(
    backbone: PreTrainedModel, architecture: Any, config: Any, constants: torch.Tensor | None = None
) -> None:
    """Makes the heads in `config.constant_heads` of a plain backbone constant, in place.

    Their query and key rows are removed, their value rows move to a layer of their own; what remains of the stock
    module runs the other heads. Works on the meta device. Layers that are one shared module (ALBERT) get a copy each,
    because constants differ by depth.

    Args:
        backbone (`PreTrainedModel`): With or without trained weights.
        architecture (`Architecture`): Its entry.
        config (`PreTrainedConfig`): Has `constant_heads` and `constant_length`.
        constants (`torch.Tensor`, *optional*): `(layers, heads, constant_length, constant_length)`; without them every
            head attends uniformly, until a checkpoint is loaded.

    Raises:
        ValueError: If the architecture is not supported, the configuration or the constants' shape is wrong, or the
            backbone has constant heads already.
    """
    check_constant_heads(config)
    if constants is not None:
        check_constants(constants, config)
    if not config.constant_heads:
        return
    layout = layout_of(backbone, architecture)
    if any(isinstance(module, ConstantHeads) for module in backbone.modules()):
        raise ValueError("the backbone has constant heads already. Install all of them at once, in a plain backbone.")
    separate_layers(backbone, architecture, config)
    for index, attention in enumerate(self_attentions(backbone, architecture)):
        heads = [head for layer, head in config.constant_heads if layer == index]
        if heads:
            make_heads_constant(attention, heads, config.constant_length, layout, backbone.config)
            if constants is not None:
                attention.constants.data.copy_(constants[index, heads])
    if len(config.constant_heads) == config.num_hidden_layers * config.num_attention_heads:
        _leave_out_rotary_positions(backbone, layout)


class NoRotaryPositions(nn.Module):
    """In the place of a backbone's rotary positions where no head reads them."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[None, None]:
        return None, None


def _leave_out_rotary_positions(backbone: Any, layout: AttentionLayout) -> None:
    if layout.rotary is not None:
        backbone.set_submodule(layout.rotary, NoRotaryPositions())


def layout_of(backbone: Any, architecture: Any) -> AttentionLayout:
    """How a backbone's self-attention is laid out; a ValueError if it cannot have constants."""
    if architecture.attention is None:
        raise ValueError(
            f"{type(backbone).__name__} cannot have constant heads: how its self-attention is laid out is not known. "
            "Say so in the field `attention` of its entry, see hf_adaptive.Architecture."
        )
    if getattr(backbone.config, "is_decoder", False):
        raise ValueError("constant heads need bidirectional attention, got is_decoder=True. Set is_decoder=False.")
    if getattr(backbone.config, "talking_head", False):
        raise ValueError("constant heads cannot be separated from talking heads. Set talking_head=False.")
    if getattr(backbone.config, "inner_group_num", 1) > 1:
        raise ValueError("constant heads need one self-attention a layer: inner_group_num must be 1.")
    return architecture.attention


def self_attentions(backbone: Any, architecture: Any) -> list[Any]:
    """The self-attention module of every layer."""
    return [layer.get_submodule(architecture.attention.path) for layer in backbone.get_submodule(architecture.layers)]


def separate_layers(backbone: Any, architecture: Any, config: Any) -> None:
    """Gives each layer a module of its own where layers share one (ALBERT); in the stock configuration's terms."""
    if not architecture.shares_layers:
        return
    groups, layers = backbone.config.num_hidden_groups, backbone.config.num_hidden_layers
    if groups == layers:
        return
    for own in (config, backbone.config):
        own.num_hidden_groups = layers
    shared = list(backbone.get_submodule(architecture.layers))
    parent, _, name = architecture.layers.rpartition(".")
    # As the stock backbone finds the group of a layer. The configuration stays one for all.
    config_stays = {id(backbone.config): backbone.config}
    copies = [copy.deepcopy(shared[int(layer / (layers / groups))], dict(config_stays)) for layer in range(layers)]
    setattr(backbone.get_submodule(parent), name, nn.ModuleList(copies))


def check_constants_loaded(missing_keys: Collection[str]) -> None:
    """A ValueError if `missing_keys` of a loaded checkpoint name the constants of a head.

    Raised rather than filled in: a model with made-up constants runs, and is wrong.
    """
    missing = sorted(key for key in missing_keys if is_constants(key))
    if missing:
        raise ValueError(
            f"the checkpoint has no constants for the heads in constant_heads ({missing[0]} and {len(missing) - 1} "
            "more). Load a plain checkpoint with constants=…, or a checkpoint that was saved with constant heads."
        )


def is_constants(name: str) -> bool:
    """Whether a parameter of this name holds the constants of a layer."""
    return name.rpartition(".")[2] == "constants"


def initialize_constants(module: nn.Module) -> None:
    """Fills constants that no checkpoint provided, for a model's `_init_weights`: uniform attention."""
    for attention in module.modules():
        if isinstance(attention, ConstantHeads):
            init.constant_(attention.constants, 1 / attention.constants.shape[-1])


def make_heads_constant(
    attention: Any, heads: list[int], length: int, layout: AttentionLayout, config: PreTrainedConfig
) -> None:
    """Gives one self-attention module constant heads, in place; they attend uniformly at first."""
    num_heads, num_values = config.num_attention_heads, key_heads(config)
    dynamic = [head for head in range(num_heads) if head not in heads]
    sources = [head // (num_heads // num_values) for head in heads]
    values = sorted(set(sources))
    weight_rows, bias_rows = layout.projections.value_rows(attention, num_values)
    weight = weight_rows[values].flatten(0, 1).detach().clone()
    bias = None if bias_rows is None else bias_rows[values].flatten().detach().clone()
    layout.projections.keep(attention, dynamic, num_heads, num_values)
    _count_heads(attention, len(dynamic), num_heads)

    attention.constant_value = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    attention.constant_value.weight = nn.Parameter(weight)
    if bias is not None:
        attention.constant_value.bias = nn.Parameter(bias)
    attention.constants = nn.Parameter(weight.new_full((len(heads), length, length), 1 / length))
    attention.constant_heads = heads
    attention.dynamic_heads = dynamic
    attention.stock_heads = len(dynamic)
    attention.constant_head_size = len(weight) // len(values)
    # Heads of one group read the same values.
    attention.value_of_head = None if len(values) == len(heads) else [values.index(source) for source in sources]
    put_beside(ConstantHeads, attention, layout, config)


def _count_heads(attention: Any, now: int, before: int) -> None:
    """Says how many heads there are, where a stock module remembers it."""
    counts = ("num_attention_heads", "n_heads", "all_head_size")
    for name in vars(attention).keys() & set(counts):
        setattr(attention, name, vars(attention)[name] // before * now)


@dataclass
class _ConstantPart:
    """What constant heads need of an input.

    Args:
        value (`torch.Tensor` of shape `(batch, length, heads, head_size)`): What they read from; with spans that of
            the real positions alone, row after row, `(positions, heads, head_size)`.
        shape (`torch.Size`): Batch and length.
        real (`torch.Tensor` of shape `(batch, length)`, *optional*): True at real positions; None if all are.
        wants_attentions (`bool`): Whether the matrices of all heads are asked for.
        spans (`list[tuple[int, int]]`, *optional*): Where the real positions of every row begin and end.
    """

    value: torch.Tensor
    shape: torch.Size
    real: torch.Tensor | None
    wants_attentions: bool
    spans: list[tuple[int, int]] | None = None


class ConstantHeads(StockClass):
    """Self-attention some of whose heads are constant; `make_heads_constant` puts it over a stock module.

    Padding positions get a zero context in constant heads, as in the papers' code.

    Attributes:
        constants: `(constant heads, length, length)`, trainable; not normalised, as the papers' averages are not.
        constant_heads, dynamic_heads: Which heads of the layer, ascending.
    """

    def _beside(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, wants_attentions: bool
    ) -> _ConstantPart:
        check_length(hidden_states.shape[1], self.constants.shape[-1])
        real = self.layout.real_positions(attention_mask)
        shape, spans = hidden_states.shape[:2], None if wants_attentions else self._spans(hidden_states, real)
        if spans is not None and real is not None:
            rows = [row[first:end] for row, (first, end) in zip(hidden_states, spans)]
            hidden_states = torch.cat(rows).unsqueeze(0)
        value = self.constant_value(hidden_states).unflatten(-1, (-1, self.constant_head_size))
        if self.value_of_head is not None:
            value = value[:, :, self.value_of_head]
        if spans is not None:
            value = value.flatten(0, 1)
        return _ConstantPart(value, shape, real, wants_attentions, spans)

    def _spans(self, hidden_states: torch.Tensor, real: torch.Tensor | None) -> list[tuple[int, int]] | None:
        """Where the real positions of each row lie, if padding can be passed over.

        Elsewhere than on a CPU it would have to be waited for; a compiler cannot follow it.
        """
        is_followed = torch.is_grad_enabled() or is_tracing(hidden_states)
        if is_followed or hidden_states.device.type != "cpu" or self.layout.dropout_of(self):
            return None
        batch, length = hidden_states.shape[:2]
        return [(0, length)] * batch if real is None else spans_of(real)

    def _of_stock_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, self.dynamic_heads]

    def _constants(self, length: int) -> torch.Tensor:
        """`(heads, length, length)`, 0 where the layer's attention does not reach."""
        constants = self.constants[:, :length, :length]
        reach = self.layout.reach(self, length, constants.device)
        return constants if reach is None else constants * reach

    def _combined(self, stock: StockHeads | None, constant: _ConstantPart) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What all heads read `(batch, length, heads, head_size)`, in their order; and where, if that is asked for."""
        constants = self._constants(constant.shape[1])
        if constant.spans is not None:
            return self._written(stock, constant, constants, constant.spans), None
        dropout = self.layout.dropout_of(self)
        if constant.wants_attentions:
            return self._combined_by_matrices(stock, constant, constants, dropout)
        if dropout:
            context = constant_attention(constants, constant.value, constant.real, dropout)
            kinds = [_Heads(self.constant_heads, context)]
        else:
            kinds = [_Heads(self.constant_heads, *sums_and_scale(constants, constant.value, constant.real))]
        if stock is not None:
            kinds.append(_Heads(self.dynamic_heads, stock.context))
        return _side_by_side(kinds, dim=2), None

    def _written(
        self,
        stock: StockHeads | None,
        constant: _ConstantPart,
        constants: torch.Tensor,
        spans: list[tuple[int, int]],
    ) -> torch.Tensor:
        """The same over real positions alone, written into place."""
        heads = len(self.constant_heads) + len(self.dynamic_heads)
        layer = constant.value.new_empty(*constant.shape, heads, self.constant_head_size)
        if stock is not None:
            _Heads(self.dynamic_heads, stock.context).write_products(layer, dim=2)
        write_context(constants, constant.value, spans, constant.real, layer, self.constant_heads)
        return layer

    def _combined_by_matrices(
        self, stock: StockHeads | None, constant: _ConstantPart, constants: torch.Tensor, dropout: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """By way of every head's matrix, so that what is read depends on the matrices that are returned."""
        value, real = constant.value, constant.real
        matrices = constant_probabilities(constants, value.shape[1], real).expand(len(value), -1, -1, -1)
        matrices = nn.functional.dropout(matrices, dropout).to(value.dtype)
        read, where = [_Heads(self.constant_heads, value)], [_Heads(self.constant_heads, matrices)]
        if stock is not None and stock.attentions is not None:
            read.append(_Heads(self.dynamic_heads, stock.value()))
            rows = None if real is None else real[:, None, :, None]
            where.append(_Heads(self.dynamic_heads, stock.attentions, rows))
        attentions = _side_by_side(where, dim=1)
        return torch.einsum("bhqk,bkhd->bqhd", attentions, _side_by_side(read, dim=2)), attentions


@dataclass
class _Heads:
    """What some heads of a layer give, still to be multiplied.

    Args:
        places (`list[int]`): Which heads they are.
        values (`torch.Tensor`): With a dimension of so many heads.
        factors (`torch.Tensor`, *optional*): Can be broadcast to the values; None for ones.
    """

    places: list[int]
    values: torch.Tensor
    factors: torch.Tensor | None = None

    @property
    def products(self) -> torch.Tensor:
        """The values times the factors."""
        return self.values if self.factors is None else (self.values * self.factors).to(self.values.dtype)

    def write_products(self, layer: torch.Tensor, dim: int) -> None:
        """Puts them into their places along `dim` of the whole layer's tensor."""
        target, values = layer.movedim(dim, 0), self.values.movedim(dim, 0)
        factors = None if self.factors is None else self.factors.expand(self.values.shape).movedim(dim, 0)
        for part, places in even_runs(self.places):
            if factors is None:
                target[places] = values[part]
            else:
                torch.mul(values[part], factors[part], out=target[places])


def _side_by_side(kinds: list[_Heads], dim: int) -> torch.Tensor:
    """The products of all heads along `dim`, in the layer's order.

    Without a gradient they are written into place at once, because passes over the memory are what this costs. No
    index tensor: that would be copied to the device.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler finds its own passes
        by_place = {place: head for kind in kinds for place, head in zip(kind.places, kind.products.unbind(dim))}
        return torch.stack([by_place[place] for place in sorted(by_place)], dim=dim)
    shape = list(kinds[0].values.shape)
    shape[dim] = sum(len(kind.places) for kind in kinds)
    merged = kinds[0].values.new_empty(shape)
    for kind in kinds:
        kind.write_products(merged, dim)
    return merged
