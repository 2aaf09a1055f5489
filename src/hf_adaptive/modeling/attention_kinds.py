"""Stock self-attention modules with something beside their own attention: the ways in which stock code is called.

A module's class is made of three: what is computed beside (its `_beside` and `_combined`: constant heads, or a mixture
with constants), one of the classes here, and the stock class, which runs unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from sys import modules as imported
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_layouts import AttentionLayout

if TYPE_CHECKING:
    # Mixed into classes of transformers, which have what the mixins use.
    StockClass = Any
else:
    StockClass = object

# A copy of this file that travelled with a checkpoint must not take the place of another version's.
_INTERFACE = f"beside@{__name__}"


@dataclass
class StockHeads:
    """What the stock code of a layer computed for its heads.

    Args:
        context (`torch.Tensor` of shape `(batch, length, heads, head_size)`): What they read.
        attentions (`torch.Tensor` of shape `(batch, heads, length, length)`, *optional*): Where, if it gave that.
        value (`Callable`): Makes the values that they read, of the context's shape.
    """

    context: torch.Tensor
    attentions: torch.Tensor | None
    value: Callable[[], torch.Tensor]


class Beside(StockClass):
    """The part that all such modules have in common.

    Attributes:
        layout, stock_class: Of the class.
        stock_heads: How many heads stock code runs.
    """

    layout: AttentionLayout
    stock_class: Any
    role: Any
    stock_heads: int

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made when it is needed, so that pickle cannot find it by its name.
        return _new_instance, (self.role, self.stock_class, self.layout), self.__dict__

    def _finished(self, context: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """From what all heads read `(batch, length, heads, head_size)` to what the stock module returns."""
        output = context.reshape(*context.shape[:2], -1)  # no flatten, which the ONNX exporter takes for a view
        for name in self.layout.output:
            output = self.get_submodule(name if self.layout.has_interface else _kept(name))(output)
        norm = self.layout.residual_norm
        return output if norm is None else self.get_submodule(norm)(hidden_states + output)


class CallsInterface(Beside):
    """Stock code that asks `ALL_ATTENTION_FUNCTIONS` for what its heads read, and applies its output layer to that."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Only eager attention has probabilities to give, so a layer in which stock code runs no head follows that too.
        own = self.config.own
        asked = kwargs.get("output_attentions") or own.output_attentions
        beside = self._beside(hidden_states, attention_mask, bool(asked) and own._attn_implementation == "eager")
        if self.stock_heads == 0:
            context, attentions = self._combined(None, beside)
            return self._finished(context, hidden_states), attentions
        return super().forward(hidden_states, attention_mask=attention_mask, beside=beside, **kwargs)


class ReturnsContext(Beside):
    """Stock code that computes probabilities itself and returns what its heads read (DeBERTa)."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        beside = self._beside(hidden_states, attention_mask, output_attentions)
        stock = None
        if self.stock_heads:
            outputs = super().forward(hidden_states, attention_mask, output_attentions=output_attentions, **kwargs)
            stock = self._stock(hidden_states, *outputs)
        context, attentions = self._combined(stock, beside)
        return self._finished(context, hidden_states), attentions

    def _stock(
        self, hidden_states: torch.Tensor, context: torch.Tensor, attentions: torch.Tensor | None = None
    ) -> StockHeads:
        context = context.unflatten(-1, (self.stock_heads, -1))

        def value() -> torch.Tensor:
            weight, bias = self.layout.projections.value_rows(self, self.stock_heads)
            flat_bias = None if bias is None else bias.flatten(0, 1)
            return nn.functional.linear(hidden_states, weight.flatten(0, 1), flat_bias).view_as(context)

        return StockHeads(context, attentions, value)


class TakesPositionBias(ReturnsContext):
    """The same, with a bias for the scores of every head that is made outside (MPNet)."""

    def forward(  # type: ignore[override] # as the stock modules differ
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        if position_bias is not None:
            position_bias = self._of_stock_heads(position_bias)
        output, attentions = super().forward(
            hidden_states, attention_mask, output_attentions, position_bias=position_bias, **kwargs
        )
        return (output,) if attentions is None else (output, attentions)


class _Configuration:
    """What a self-attention module sees of its configuration: that attention is to be asked for here.

    Args:
        own (`PreTrainedConfig`): The model's.
    """

    _attn_implementation = _INTERFACE

    def __init__(self, own: PreTrainedConfig):
        self.own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def __reduce__(self) -> Any:
        return _Configuration, (self.own,)


class _StockView:
    """What attention functions of transformers see of a module: its own configuration."""

    def __init__(self, attention: Any):
        self.attention = attention
        self.config = attention.config.own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)


def _attend(
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    beside: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of transformers: what the module was loaded with, and what stands beside it."""
    view = _StockView(attention)
    eager = imported[attention.stock_class.__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(view.config._attn_implementation, eager)
    context, attentions = attend(view, query, key, value, attention_mask, **kwargs)
    readers = query.shape[1] // value.shape[1]
    stock = StockHeads(context, attentions, lambda: value.repeat_interleave(readers, dim=1).transpose(1, 2))
    return attention._combined(stock, beside)


AttentionInterface.register(_INTERFACE, _attend)


def put_beside(role: Any, attention: Any, layout: AttentionLayout, config: PreTrainedConfig) -> None:
    """Makes a stock self-attention module one of this role, in place."""
    # As torch.nn.utils.parametrize does: the module stays an instance of its stock class, by which transformers
    # recognises where attentions are recorded and how weights are initialised.
    if layout.has_interface:
        attention.config = _Configuration(config)
    else:
        for name in layout.output:
            # Stock code would apply it to its own heads alone.
            setattr(attention, _kept(name), attention.get_submodule(name))
            setattr(attention, name, nn.Identity())
    stock_class: Any = type(attention)
    attention.__class__ = _with_role(role, stock_class, layout)


def _kept(name: str) -> str:
    return f"{name}_of_all_heads"


@cache
def _with_role(role: Any, stock_class: Any, layout: AttentionLayout) -> Any:
    itself = TakesPositionBias if layout.has_position_bias else ReturnsContext
    kind = CallsInterface if layout.has_interface else itself
    attributes = {"layout": layout, "stock_class": stock_class, "role": role}
    return type(f"{stock_class.__name__}{role.__name__}", (role, kind, stock_class), attributes)


def _new_instance(role: Any, stock_class: Any, layout: AttentionLayout) -> Any:
    made = _with_role(role, stock_class, layout)
    return made.__new__(made)
