"""Constant attention heads for unmodified transformers backbones (PAPA, Hassid et al., Findings of EMNLP 2022,
arXiv 2211.03495).

A constant head has no query and no key. Its attention matrix is a parameter `C (length, length)`; for an input with
the 0/1 padding vector `m` it attends with `C[i, j] m[i] m[j]`, every row divided by the sum of its absolute values.
The other ("dynamic") heads of the layer run the stock code of transformers with fewer heads.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

if TYPE_CHECKING:
    # Mixed into classes of transformers, which have what the mixins use.
    StockClass = Any
else:
    StockClass = object

_MINIMUM_ROW_SUM = 1e-12


@dataclass(frozen=True)
class AttentionLayout:
    """What the self-attention modules of two architectures do differently.

    Args:
        fused_projection (`bool`): Query, key and value are rows of one `in_proj`, head by head (DeBERTa), rather than
            three linear layers (BERT).
        additive_mask (`bool`): A floating-point mask is 0 at real positions and very negative elsewhere (BERT, eager),
            rather than 1 at real positions and 0 elsewhere (DeBERTa).
    """

    fused_projection: bool
    additive_mask: bool

    def value_projection(self, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What makes the values of all heads: weight `(heads, head_size, hidden)` and bias `(heads, head_size)`."""
        heads = attention.num_attention_heads
        if not self.fused_projection:
            weight, bias = attention.value.weight, attention.value.bias
            return weight.view(heads, -1, weight.shape[-1]), bias.view(heads, -1)
        weight = attention.in_proj.weight
        return weight.view(heads, 3, -1, weight.shape[-1])[:, 2], attention.v_bias.view(heads, -1)

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
        if attention_mask.is_floating_point() and self.additive_mask:
            return attention_mask == 0
        return attention_mask != 0


SUPPORTED_BACKBONES = {
    "BertModel": AttentionLayout(fused_projection=False, additive_mask=True),
    "RobertaModel": AttentionLayout(fused_projection=False, additive_mask=True),
    "DebertaModel": AttentionLayout(fused_projection=True, additive_mask=False),
}


def check_constant_heads(config: PreTrainedConfig) -> None:
    """Checks `config.constant_heads` and `config.constant_length`, and sorts the heads layer by layer.

    Raises:
        ValueError: If the heads are not distinct `[layer, head]` pairs of this model, or the length is missing or not
            positive.
    """
    config.constant_heads = _checked_heads(
        config.constant_heads or [], config.num_hidden_layers, config.num_attention_heads
    )
    length = config.constant_length
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ValueError(f"constant_length must be a positive number of tokens, got {length!r}.")
    if length is None and config.constant_heads:
        raise ValueError(
            f"constant_heads names {len(config.constant_heads)} heads but constant_length is None. Set "
            "constant_length to the longest input in tokens, the size of the constant attention matrices."
        )


def _checked_heads(heads: Any, num_layers: int, num_heads: int) -> list[list[int]]:
    form = "a list of [layer, head] pairs of integers, for example [[0, 3], [5, 1]]"
    if isinstance(heads, (str, bytes, dict)) or not isinstance(heads, Collection):
        raise ValueError(f"constant_heads must be {form}, got {heads!r}.")
    for pair in heads:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(index) is int for index in pair):
            raise ValueError(f"constant_heads must be {form}, got the entry {pair!r}.")
        layer, head = pair
        if not (0 <= layer < num_layers and 0 <= head < num_heads):
            raise ValueError(
                f"constant_heads names [layer {layer}, head {head}], but this model has layers 0 to {num_layers - 1} "
                f"and heads 0 to {num_heads - 1}."
            )
    pairs = sorted([layer, head] for layer, head in heads)
    repeated = [pair for pair, following in pairwise(pairs) if pair == following]
    if repeated:
        raise ValueError(f"constant_heads names {repeated[0]} more than once. Name every head at most once.")
    return pairs


def select_heads(
    choice: str | float | Sequence[Sequence[int]],
    num_layers: int,
    num_heads: int,
    ranking: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Turns a choice of heads into `[layer, head]` pairs.

    Args:
        choice (`str`, `float` or `list[list[int]]`): `"all"`, a fraction between 0 and 1 (rounded down to whole
            heads), or the pairs themselves.
        ranking (`list[list[int]]`, *optional*): All heads, those that need attention least first, as `rank_heads`
            orders them; a fraction takes its beginning.

    Raises:
        ValueError: If the choice is none of these, or a proper fraction comes without a complete ranking.
    """
    every_head = [[layer, head] for layer in range(num_layers) for head in range(num_heads)]
    if choice == "all":
        return every_head
    if isinstance(choice, (int, float)) and not isinstance(choice, bool):
        return _first_fraction(choice, every_head, ranking)
    if isinstance(choice, str):
        raise ValueError(f"constant_heads must be 'all', a fraction or a list of [layer, head] pairs, got {choice!r}.")
    return _checked_heads(choice, num_layers, num_heads)


def _first_fraction(
    fraction: float, every_head: list[list[int]], ranking: Sequence[Sequence[int]] | None
) -> list[list[int]]:
    if not 0 <= fraction <= 1:
        raise ValueError(f"constant_heads as a fraction must lie between 0 and 1, got {fraction}.")
    if fraction in (0, 1):
        return every_head if fraction else []
    if ranking is None:
        raise ValueError(
            f"constant_heads={fraction} does not say which heads. Pass head_ranking=…, the order that rank_heads "
            "found, or a list of [layer, head] pairs."
        )
    order = [list(pair) for pair in ranking]
    if sorted(order) != every_head:
        raise ValueError(f"head_ranking must name each of the {len(every_head)} heads once, got {len(order)} entries.")
    return sorted(order[: int(fraction * len(order))])


def heads_to_make_constant(
    choice: str | float | Sequence[Sequence[int]] | None,
    constants: torch.Tensor | None,
    config: PreTrainedConfig,
    ranking: Sequence[Sequence[int]] | None,
) -> list[list[int]]:
    """The `[layer, head]` pairs that a conversion is asked for; a ValueError if heads and constants do not match."""
    if choice is None and constants is not None:
        raise ValueError(
            "constants are given but constant_heads is not. Set constant_heads='all', a fraction with head_ranking=…, "
            "or a list of [layer, head] pairs."
        )
    heads = select_heads(choice or [], config.num_hidden_layers, config.num_attention_heads, ranking)
    if heads and constants is None:
        raise ValueError(
            f"constant_heads names {len(heads)} heads but constants are missing. Collect them with mean_attention and "
            "pass constants=…"
        )
    return heads


def common_length(constant_length: int | None, constants: torch.Tensor | None) -> int | None:
    """The length of the constants, which may also be given alone; a ValueError if the two differ."""
    if constants is None:
        return constant_length
    if constant_length not in (None, constants.shape[-1]):
        raise ValueError(
            f"constant_length={constant_length} does not fit constants of length {constants.shape[-1]}. Leave it out, "
            f"or collect the constants with mean_attention(…, max_length={constant_length})."
        )
    return constants.shape[-1]


def attention_layout(backbone: Any) -> AttentionLayout:
    """The layout of a backbone's self-attention; a ValueError if constant heads do not support the architecture."""
    names = [base.__name__ for base in type(backbone).__mro__ if base.__name__ in SUPPORTED_BACKBONES]
    if not names:
        raise ValueError(
            f"{type(backbone).__name__} does not support constant heads. Supported: {', '.join(SUPPORTED_BACKBONES)}."
        )
    if getattr(backbone.config, "is_decoder", False):
        raise ValueError("constant heads need bidirectional attention, got is_decoder=True. Set is_decoder=False.")
    if getattr(backbone.config, "talking_head", False):
        raise ValueError("constant heads cannot be separated from talking heads. Set talking_head=False.")
    return SUPPORTED_BACKBONES[names[0]]


def self_attentions(backbone: Any) -> list[Any]:
    """The self-attention module of every layer."""
    return [layer.attention.self for layer in backbone.encoder.layer]


def install_constant_heads(
    backbone: PreTrainedModel, config: PreTrainedConfig, constants: torch.Tensor | None = None
) -> None:
    """Makes the heads in `config.constant_heads` of a plain backbone constant, in place.

    Their query and key rows are removed, their value rows move to a layer of their own; what remains of the stock
    module runs the dynamic heads. Works on the meta device.

    Args:
        backbone (`PreTrainedModel`): A `BertModel`, `RobertaModel` or `DebertaModel` of transformers, with or without
            trained weights.
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
    layout = attention_layout(backbone)
    if any(isinstance(module, ConstantHeadsMixin) for module in backbone.modules()):
        raise ValueError("the backbone has constant heads already. Install all of them at once, in a plain backbone.")
    for index, attention in enumerate(self_attentions(backbone)):
        heads = [head for layer, head in config.constant_heads if layer == index]
        if heads:
            make_heads_constant(attention, heads, config.constant_length, layout, backbone.config)
            if constants is not None:
                attention.constants.data.copy_(constants[index, heads])


def check_constants(constants: torch.Tensor, config: PreTrainedConfig) -> None:
    """A ValueError unless the constants are finite and of the shape that the configuration asks for."""
    length = config.constant_length
    expected = (config.num_hidden_layers, config.num_attention_heads, length, length)
    if tuple(constants.shape) != expected:
        raise ValueError(
            f"constants must have the shape (layers, heads, constant_length, constant_length) = {expected} for this "
            f"model, got {tuple(constants.shape)}. Collect them from the same model with mean_attention(…, "
            f"max_length={length})."
        )
    if not constants.isfinite().all():
        raise ValueError("constants must be finite, got NaN or infinity. Collect them again with mean_attention.")


def check_constants_loaded(missing_keys: Collection[str]) -> None:
    """A ValueError if `missing_keys` of a loaded checkpoint name the constants of a head.

    Raised rather than filled in: a model with made-up constants runs, and is wrong.
    """
    missing = sorted(key for key in missing_keys if key.endswith(".attention.self.constants"))
    if missing:
        raise ValueError(
            f"the checkpoint has no constants for the heads in constant_heads ({missing[0]} and {len(missing) - 1} "
            "more). Load a plain checkpoint with constants=…, or a checkpoint that was saved with constant heads."
        )


def initialize_constants(module: nn.Module) -> None:
    """Fills constants that no checkpoint provided, for a model's `_init_weights`: uniform attention."""
    for attention in module.modules():
        if isinstance(attention, ConstantHeadsMixin):
            init.constant_(attention.constants, 1 / attention.constants.shape[-1])


def make_heads_constant(
    attention: Any, heads: list[int], length: int, layout: AttentionLayout, config: PreTrainedConfig
) -> None:
    """Gives one self-attention module constant heads, in place; they attend uniformly at first."""
    num_heads = attention.num_attention_heads
    dynamic = [head for head in range(num_heads) if head not in heads]
    weight, bias = (rows[heads].flatten(0, 1).detach().clone() for rows in layout.value_projection(attention))
    keep_heads(attention, dynamic)

    attention.constant_value = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    attention.constant_value.weight = nn.Parameter(weight)
    attention.constant_value.bias = nn.Parameter(bias)
    attention.constants = nn.Parameter(weight.new_full((len(heads), length, length), 1 / length))
    attention.constant_heads = heads
    attention.dynamic_heads = dynamic
    attention.layout = layout
    attention.config = config
    # As torch.nn.utils.parametrize does: the module stays an instance of its stock class, by which transformers
    # recognises where attentions are recorded and how weights are initialised.
    stock_class: Any = type(attention)
    attention.__class__ = _with_constant_heads(stock_class)


def keep_heads(attention: Any, heads: list[int]) -> None:
    """Prunes every parameter of a stock self-attention module to the rows of `heads`, in place."""
    num_heads = attention.num_attention_heads
    for module in attention.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            rows = parameter.detach().unflatten(0, (num_heads, -1))[heads].flatten(0, 1)
            setattr(module, name, nn.Parameter(rows.clone()))
        if isinstance(module, nn.Linear):
            module.out_features = module.weight.shape[0]
    attention.num_attention_heads = len(heads)
    attention.all_head_size = len(heads) * attention.attention_head_size


@cache
def _with_constant_heads(stock_class: Any) -> Any:
    return type(f"{stock_class.__name__}WithConstantHeads", (ConstantHeadsMixin, stock_class), {})


class ConstantHeadsMixin(StockClass):
    """Self-attention some of whose heads are constant; `make_heads_constant` puts it over a stock module.

    Attributes:
        constants: `(constant heads, length, length)`, trainable; not normalised, as the papers' averages are not.
        constant_heads, dynamic_heads: Which heads of the layer, ascending.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the stock module: the context `(batch, length, hidden)`, and attentions `(batch, heads, length, length)`.

        Padding positions get a zero context in every head, as in the papers' code.
        """
        check_length(hidden_states.shape[1], self.constants.shape[-1])
        real = self.layout.real_positions(attention_mask)
        # Only eager attention has probabilities to give, so a layer whose heads are all constant follows that too.
        output_attentions = (output_attentions or self.config.output_attentions) and (
            self.config._attn_implementation == "eager"
        )
        constant, constant_attentions = self._constant_part(hidden_states, real, output_attentions)
        if self.num_attention_heads == 0:
            return _side_by_side([constant], dim=2).flatten(2), constant_attentions
        context, attentions = super().forward(
            hidden_states, attention_mask=attention_mask, output_attentions=output_attentions, **kwargs
        )
        context = context.unflatten(-1, (self.num_attention_heads, -1))
        dynamic = _Heads(self.dynamic_heads, context, None if real is None else real[:, :, None, None])
        context = _side_by_side([dynamic, constant], dim=2).flatten(2)
        if constant_attentions is None:
            return context, None
        dynamic_matrices = _Heads(self.dynamic_heads, attentions, None if real is None else real[:, None, :, None])
        constant_matrices = _Heads(self.constant_heads, constant_attentions)
        return context, _side_by_side([dynamic_matrices, constant_matrices], dim=1)

    def _constant_part(
        self, hidden_states: torch.Tensor, real: torch.Tensor | None, output_attentions: bool
    ) -> tuple["_Heads", torch.Tensor | None]:
        """What the constant heads read, and their attentions if they are asked for."""
        value = self.constant_value(hidden_states).unflatten(-1, (len(self.constant_heads), -1))
        if _needs_matrices(self.dropout, output_attentions):
            context, attentions = constant_attention(self.constants, value, real, self.dropout, output_attentions)
            return _Heads(self.constant_heads, context), attentions
        return _Heads(self.constant_heads, *_sums_and_scale(self.constants, value, real)), None


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
        for part, places in _even_runs(self.places):
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


def _even_runs(places: list[int]) -> Iterator[tuple[slice, slice]]:
    """Cuts ascending places where their distance changes: for each run, where it is in the list, and its places."""
    start = 0
    while start < len(places):
        step = places[start + 1] - places[start] if start + 1 < len(places) else 1
        stop = start + 1
        while stop < len(places) and places[stop] - places[stop - 1] == step:
            stop += 1
        yield slice(start, stop), slice(places[start], places[stop - 1] + 1, step)
        start = stop


def check_length(length: int, constant_length: int) -> None:
    """A ValueError if an input is longer than the constants reach."""
    if length > constant_length:
        raise ValueError(
            f"the input has {length} tokens, but the constants of this model reach {constant_length} "
            f"(constant_length). Tokenize with truncation=True, max_length={constant_length}."
        )


def constant_attention(
    constants: torch.Tensor,
    value: torch.Tensor,
    real: torch.Tensor | None,
    dropout: nn.Dropout,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What constant heads read; the attention matrices of each input are made only where something needs them.

    Args:
        constants (`torch.Tensor`): `(heads, constant_length, constant_length)`.
        value (`torch.Tensor`): `(batch, length, heads, head_size)`.
        real (`torch.Tensor`, *optional*): `(batch, length)`, True at real positions; None if all are.
        dropout (`nn.Dropout`): Of attention probabilities; in training it acts on constants too.
        output_attentions (`bool`): Whether to return the matrices.

    Returns:
        Context `(batch, length, heads, head_size)`, and attentions `(batch, heads, length, length)` or None.
    """
    if not _needs_matrices(dropout, output_attentions):
        return constant_context(constants, value, real), None
    probabilities = constant_probabilities(constants, value.shape[1], real).expand(len(value), -1, -1, -1)
    probabilities = dropout(probabilities).to(value.dtype)
    context = torch.einsum("bhqk,bkhd->bqhd", probabilities, value)
    return context, probabilities if output_attentions else None


def _needs_matrices(dropout: nn.Dropout, output_attentions: bool) -> bool:
    return output_attentions or (dropout.training and dropout.p > 0)


def constant_context(constants: torch.Tensor, value: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """What constant heads read, without a matrix for each input: one product per head for the whole batch.

    Args:
        constants (`torch.Tensor`): `(heads, constant_length, constant_length)`.
        value (`torch.Tensor`): `(batch, length, heads, head_size)`.
        real (`torch.Tensor`, *optional*): `(batch, length)`, True at real positions; None if all are.

    Returns:
        `(batch, length, heads, head_size)`, zero at padding positions and where a row of the constants has no weight
        on any real position: a position that the averages never saw attends to nothing.
    """
    return _multiply(*_sums_and_scale(constants, value, real)).to(value.dtype)


def _sums_and_scale(
    constants: torch.Tensor, value: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of `constant_context`: what rows that are not normalised read, and one over the rows' sums."""
    batch, length = value.shape[:2]
    by_head = value.permute(2, 1, 0, 3)
    by_head = by_head.contiguous() if real is None else _multiply(by_head, real.t()[None, :, :, None])
    sums = torch.bmm(constants[:, :length, :length], by_head.flatten(2))
    scale = _inverse_row_sums(constants, length, real).unsqueeze(-1)
    return sums.unflatten(2, (batch, -1)).permute(2, 1, 0, 3), scale


def _multiply(permuted: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The product as a contiguous tensor: without a gradient, in one pass over the memory, which is what it costs."""
    if torch.is_grad_enabled():
        return (permuted * factor).contiguous()
    return torch.mul(permuted, factor, out=permuted.new_empty(permuted.shape))


def constant_probabilities(constants: torch.Tensor, length: int, real: torch.Tensor | None) -> torch.Tensor:
    """The masked and renormalised constants `(batch, heads, length, length)`; batch 1 if there is no padding."""
    inverse = _inverse_row_sums(constants, length, real).transpose(1, 2).unsqueeze(-1)
    constants = constants[:, :length, :length].unsqueeze(0)
    if real is not None:
        constants = constants * real[:, None, None, :]
    return constants * inverse


def _inverse_row_sums(constants: torch.Tensor, length: int, real: torch.Tensor | None) -> torch.Tensor:
    """One over the rows' absolute sums over real positions `(batch, length, heads)`; 0 where that sum is 0.

    A row without weight passes no gradient to the constants either; in the papers' code it passes one over 1e-12.
    """
    # Half precision cannot hold the smallest sums.
    magnitude = constants[:, :length, :length].abs().to(torch.promote_types(constants.dtype, torch.float32))
    if real is None:
        sums = magnitude.sum(-1).t().unsqueeze(0)
        attends = sums > _MINIMUM_ROW_SUM
    else:
        sums = (magnitude @ real.to(magnitude.dtype).t()).permute(2, 1, 0)
        attends = (sums > _MINIMUM_ROW_SUM) & real.unsqueeze(-1)
    return attends / sums.clamp(min=_MINIMUM_ROW_SUM)
