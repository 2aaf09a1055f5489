"""The papers' fixed-position preprocessing (PAPA, arXiv 2211.03495): a separator or a second text always
begins at the same position, so that an average attention matrix means the same for every input.

Ordinary tokenization works too and is the default everywhere. Use these functions with `Dataset.map`, one example at a
time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_IGNORED_LABEL = -100


def fix_sequence_positions(
    example: Mapping[str, Sequence[int]], *, max_length: int, sep_token_id: int, pad_token_id: int
) -> dict[str, list[int]]:
    """Puts the second text of an example at half of `max_length`, and the last separator at the end.

    The first text, without its separator, keeps at most half of the positions, a single text too. What lies between is
    padding with mask 0. Token types move with their tokens, which the papers' code forgets.

    Args:
        example (`Mapping[str, list[int]]`): `input_ids` as a tokenizer makes them, and `token_type_ids` if there are
            any. Padding may follow.
        max_length (`int`): In tokens.
        sep_token_id (`int`): The separator. A doubled one, as RoBERTa has, goes to the second half with both tokens.
        pad_token_id (`int`): Fills the holes.

    Returns:
        `input_ids`, `attention_mask` and, if given, `token_type_ids`, each of `max_length` entries.

    Raises:
        ValueError: If there is no separator.
    """
    half = max_length // 2
    first, last = _separators(example["input_ids"], sep_token_id)
    # Where each token goes: position in the example by position in the result.
    sources = dict(enumerate(range(min(first, half))))
    sources |= {
        half + offset: source for offset, source in enumerate(range(first, last)) if half + offset < max_length - 1
    }
    sources[max_length - 1] = last
    return _arranged(example, sources, max_length, pad_token_id)


def fix_token_positions(
    example: Mapping[str, Sequence[int]], *, max_length: int, sep_token_id: int, pad_token_id: int
) -> dict[str, list[int]]:
    """Moves the separator of a single text to the end, and leaves every other token where it is.

    Args:
        example (`Mapping[str, list[int]]`): `input_ids`, and `token_type_ids` and `labels` if there are any. Padding
            may follow.
        max_length (`int`): In tokens.
        sep_token_id (`int`): The separator.
        pad_token_id (`int`): Fills the hole.

    Returns:
        As `fix_sequence_positions`; and `labels` if given, -100 where no token is.

    Raises:
        ValueError: If there is no separator, or the text is longer than `max_length`.
    """
    first, last = _separators(example["input_ids"], sep_token_id)
    if last >= max_length:
        raise ValueError(
            f"the text has {last + 1} tokens, but max_length is {max_length}. Tokenize with truncation=True, "
            f"max_length={max_length}."
        )
    sources = {position: position for position in range(last) if position != first}
    sources[max_length - 1] = last
    return _arranged(example, sources, max_length, pad_token_id)


def _separators(input_ids: Sequence[int], sep_token_id: int) -> tuple[int, int]:
    positions = [position for position, token in enumerate(input_ids) if token == sep_token_id]
    if not positions:
        raise ValueError(
            f"fixed positions need a separator, but the input has no token {sep_token_id} (sep_token_id): {input_ids}."
        )
    return positions[0], positions[-1]


def _arranged(
    example: Mapping[str, Sequence[int]], sources: Mapping[int, int], max_length: int, pad_token_id: int
) -> dict[str, list[int]]:
    fillers: dict[str, Any] = {"input_ids": pad_token_id, "token_type_ids": 0, "labels": _IGNORED_LABEL}
    arranged = {
        name: [example[name][sources[position]] if position in sources else filler for position in range(max_length)]
        for name, filler in fillers.items()
        # The label of a sequence is a number and does not move.
        if name in example and isinstance(example[name], Sequence)
    }
    return {**arranged, "attention_mask": [int(position in sources) for position in range(max_length)]}
