"""Which heads are constant, and whether their constants fit: what a user gives, checked."""

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedConfig

from .checks import check_count, shortened


def check_constant_heads(config: PreTrainedConfig) -> None:
    """Checks `config.constant_heads` and `config.constant_length`, and sorts the heads layer by layer.

    Raises:
        ValueError: If the heads are not distinct `[layer, head]` pairs of this model, or the length is missing or not
            positive.
    """
    config.constant_heads = _checked_heads(
        [] if config.constant_heads is None else config.constant_heads,
        config.num_hidden_layers,
        config.num_attention_heads,
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
    if isinstance(choice, str) and choice == "all":
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
    is_list = isinstance(ranking, (list, tuple)) and all(isinstance(pair, (list, tuple)) for pair in ranking)
    order = [list(pair) for pair in ranking] if is_list else []
    if len(order) != len(every_head) or not all(pair in order for pair in every_head):
        raise ValueError(
            f"head_ranking must be a list that names each of the {len(every_head)} heads once, as [layer, head], got "
            f"{shortened(ranking)}."
        )
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
    heads = select_heads(
        [] if choice is None else choice, config.num_hidden_layers, config.num_attention_heads, ranking
    )
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
    if constant_length is not None:
        check_count("constant_length", constant_length)
    if constant_length not in (None, constants.shape[-1]):
        raise ValueError(
            f"constant_length={constant_length} does not fit constants of length {constants.shape[-1]}. Leave it out, "
            f"or collect the constants with mean_attention(…, max_length={constant_length})."
        )
    return constants.shape[-1]


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
