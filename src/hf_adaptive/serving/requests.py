"""What is asked of the engine, and how texts and tokenised rows become what a model reads."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..modeling.examples import TokenisedExamples
from ..modeling.scheduling import WaitingRow

# A text, a pair of texts, or a tokenised row.
Example = str | tuple[str, str] | Mapping[str, Any]
# What tokenizers say that know of no longest text is larger.
_NO_LIMIT = 10**6


@dataclass(frozen=True)
class EngineAnswer:
    """The answer to one row, the one that it gets alone.

    Args:
        logits (`np.ndarray` of shape `(labels,)`): Scores before the softmax, of the exit taken; float32.
        exit_logits (`np.ndarray` of shape `(exits, labels)`): Of every exit; NaN where it was not reached.
        exit_index (`int`): The exit taken, an index into `exit_layers`.
        exit_layer (`int`): Layers run before it.
        tokens (`int`): Length of the row.
    """

    logits: np.ndarray
    exit_logits: np.ndarray
    exit_index: int
    exit_layer: int
    tokens: int


class AnswerFuture(Future[EngineAnswer]):
    """A future that tells its engine when its caller gives it up.

    Args:
        give_up (`Callable[[int], object]`): Called with the row's number, again if it is cancelled again.
    """

    def __init__(self, give_up: Callable[[int], object]):
        super().__init__()
        self.number = -1
        self._give_up = give_up

    def cancel(self) -> bool:
        """Whether the answer was not there yet; then the row's place is free at once."""
        is_cancelled = super().cancel()
        if is_cancelled:
            self._give_up(self.number)
        return is_cancelled


@dataclass(slots=True, eq=False)
class Request(WaitingRow):
    """A row that waits for its answer.

    Args:
        example: What was given.
        future (`Future`): Of the answer.
        arrived (`float`): When it was given, in seconds of the engine's clock.
        source (`tuple[TokenisedExamples, int]`, *optional*): The row as the model reads it.
    """

    example: Any = None
    future: "Future[EngineAnswer]" = field(default_factory=Future)
    arrived: float = 0.0
    source: tuple[TokenisedExamples, int] | None = None


def check_example(example: Any, has_tokenizer: bool) -> None:
    """Raises `TypeError` or `ValueError` for what no model could read."""
    if isinstance(example, Mapping):
        return
    is_pair = isinstance(example, (tuple, list)) and len(example) == 2
    if not isinstance(example, str) and not (is_pair and all(isinstance(text, str) for text in example)):
        raise TypeError(
            "an example must be a text, a pair of texts, or a tokenised row {'input_ids': [...], ...}, got "
            f"{type(example).__name__}."
        )
    if not has_tokenizer:
        raise ValueError("texts need a tokenizer: make the engine with ExitsEngine(model, tokenizer=tokenizer).")


class Reader:
    """Makes rows for a model of what was given.

    Args:
        staged (`StagedModel`): Checks them.
        tokenizer (*optional*): For texts.
        longest (`int`, *optional*): Tokens to which texts are cut, if the tokenizer names no limit.
    """

    def __init__(self, staged: Any, tokenizer: Any, longest: int | None):
        self.staged = staged
        self.tokenizer = tokenizer
        self.longest = longest

    def groups(self, requests: Sequence[Request]) -> list[list[Request]]:
        """The requests in groups that can be read together: all texts, all pairs, or rows of the same names."""
        groups: dict[Any, list[Request]] = {}
        for request in requests:
            example = request.example
            kind = frozenset(example) if isinstance(example, Mapping) else type(example) is str
            groups.setdefault(kind, []).append(request)
        return list(groups.values())

    def read(self, examples: Sequence[Example]) -> TokenisedExamples:
        """One group's examples, tokenised and checked; a `ValueError` names what cannot be used."""
        if isinstance(examples[0], Mapping):
            return self.staged.read(examples)
        return self.staged.read(dict(self._tokenised(examples)))

    def _tokenised(self, examples: Sequence[Any]) -> Mapping[str, Any]:
        cut: dict[str, Any] = {"truncation": True}
        if self.tokenizer.model_max_length >= _NO_LIMIT:
            cut = {"truncation": self.longest is not None, "max_length": self.longest}
        if isinstance(examples[0], str):
            return self.tokenizer(list(examples), **cut)
        firsts, seconds = zip(*examples)
        return self.tokenizer(list(firsts), list(seconds), **cut)
