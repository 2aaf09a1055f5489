"""The mathematics of constant attention (PAPA, Hassid et al., Findings of EMNLP 2022, arXiv 2211.03495).

A constant head's attention matrix is a parameter `C (length, length)`; for an input with the 0/1 padding vector `m` it
attends with `C[i, j] m[i] m[j]`, every row divided by the sum of its absolute values.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

_MINIMUM_ROW_SUM = 1e-12


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
    dropout: float,
) -> torch.Tensor:
    """What constant heads read; the attention matrices of each input are made only where dropout needs them.

    Args:
        constants (`torch.Tensor`): `(heads, constant_length, constant_length)`.
        value (`torch.Tensor`): `(batch, length, heads, head_size)`.
        real (`torch.Tensor`, *optional*): `(batch, length)`, True at real positions; None if all are.
        dropout (`float`): Of attention probabilities; it acts on constants too.

    Returns:
        `(batch, length, heads, head_size)`.
    """
    if dropout == 0:
        return constant_context(constants, value, real)
    probabilities = constant_probabilities(constants, value.shape[1], real).expand(len(value), -1, -1, -1)
    probabilities = nn.functional.dropout(probabilities, dropout).to(value.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, value)


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
    return _multiply(*sums_and_scale(constants, value, real)).to(value.dtype)


def sums_and_scale(
    constants: torch.Tensor, value: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of `constant_context`: what rows that are not normalised read, and one over the rows' sums."""
    batch, length = value.shape[:2]
    by_head = value.permute(2, 1, 0, 3)
    by_head = by_head.contiguous() if real is None else _multiply(by_head, real.t()[None, :, :, None])
    sums = torch.bmm(constants[:, :length, :length], by_head.flatten(2))
    scale = _inverse_row_sums(constants, length, real).unsqueeze(-1)
    return sums.unflatten(2, (batch, -1)).permute(2, 1, 0, 3), scale


def spans_of(real: torch.Tensor) -> list[tuple[int, int]] | None:
    """Where the real positions of every row begin and end; None if they do not lie together in each.

    Args:
        real (`torch.Tensor`): `(batch, length)`, True at real positions.
    """
    first = real.int().argmax(1)
    end = real.shape[1] - real.flip(1).int().argmax(1)
    first, end, count = torch.stack([first, end, real.sum(1)]).tolist()
    spans = list(zip(first, end))
    return spans if all(end - first == number for (first, end), number in zip(spans, count)) else None


def write_context(
    constants: torch.Tensor,
    packed: torch.Tensor,
    spans: Sequence[tuple[int, int]],
    real: torch.Tensor | None,
    layer: torch.Tensor,
    places: Sequence[int],
) -> None:
    """Writes `constant_context` into the places of these heads in the layer's tensor; not differentiable.

    Row by row, over its real positions alone: each row's values are in the processor's cache from the product to its
    normalisation, and no value is copied before.

    Args:
        constants (`torch.Tensor`): `(heads, length, length)`.
        packed (`torch.Tensor`): Values of the real positions `(positions, heads, head_size)`, row after row.
        spans (`list[tuple[int, int]]`): From `spans_of`.
        real (`torch.Tensor`, *optional*): As in `constant_context`.
        layer (`torch.Tensor`): `(batch, length, heads of the layer, head_size)`.
        places (`list[int]`): Which of its heads these are, ascending.
    """
    scale = _inverse_row_sums(constants, layer.shape[1], real).expand(len(layer), -1, -1).unsqueeze(-1)
    constants = constants.to(packed.dtype)  # autocast does not reach products that are written into place
    runs = list(even_runs(places))
    values = packed.split([end - first for first, end in spans])
    for row, ((first, end), value) in enumerate(zip(spans, values)):
        for heads, target_heads in runs:
            target = layer[row, :, target_heads]
            target[:first] = 0
            target[end:] = 0
            context = target[first:end]
            matrices = constants[heads, first:end, first:end]
            torch.bmm(matrices, value[:, heads].transpose(0, 1), out=context.transpose(0, 1))
            context.mul_(scale[row, first:end, heads])


def even_runs(places: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Cuts ascending places where their distance changes: for each run, where it is in the list, and its places."""
    start = 0
    while start < len(places):
        step = places[start + 1] - places[start] if start + 1 < len(places) else 1
        stop = start + 1
        while stop < len(places) and places[stop] - places[stop - 1] == step:
            stop += 1
        yield slice(start, stop), slice(places[start], places[stop - 1] + 1, step)
        start = stop


def _multiply(permuted: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The product as a contiguous tensor: without a gradient, in one pass over the memory, which is what it costs."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler finds its own passes
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
