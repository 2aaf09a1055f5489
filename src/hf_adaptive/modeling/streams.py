"""Whatever can be iterated over, answered in order and in bounded memory: what every model's `predict_stream` shares.

Without torch: models exported to other engines answer streams by this code, too.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from .checks import check_count, shortened

Answer = TypeVar("Answer")


def stream(examples: Iterable[Any], window: int, answers: Callable[[list[Any]], Iterable[Answer]]) -> Iterator[Answer]:
    """One answer an example, in their order; no further examples are read than the window needs.

    Args:
        examples (`Iterable`): Any number of examples.
        window (`int`): Examples read at a time.
        answers (`Callable`): From some examples to one answer each.

    Raises:
        ValueError: A window below 1, or examples that cannot be iterated over, at once; what `answers` refuses, with
            the rows that it was given.
    """
    check_count("window", window)
    if not isinstance(examples, Iterable):
        raise ValueError(f"examples must be tokenised rows that can be iterated over, got {shortened(examples)}.")
    return _in_windows(iter(examples), window, answers)


def _in_windows(
    examples: Iterator[Any], window: int, answers: Callable[[list[Any]], Iterable[Answer]]
) -> Iterator[Answer]:
    start = 0
    while rows := list(itertools.islice(examples, window)):
        try:
            said = answers(rows)
        except ValueError as error:
            raise ValueError(f"rows {start} to {start + len(rows) - 1} of the stream: {error}") from error
        yield from said
        start += len(rows)
