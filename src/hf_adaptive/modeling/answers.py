"""What the exits said of each row, and which rows go on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from .criteria import Evidence, Policy, problem_type
from .inputs import BackboneInputs
from .local_gradients import refuse_gradient

logger = logging.get_logger(__name__)


@dataclass
class ExitAnswer:
    """What one exit says of some rows.

    Args:
        logits (`torch.Tensor` of shape `(rows, labels)`): Divided by the temperature.
        certainty (`torch.Tensor` of shape `(rows,)`, *optional*): Of the learned unit.
    """

    logits: torch.Tensor
    certainty: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The logits, and the certainty if there is one."""
        return [self.logits] if self.certainty is None else [self.logits, self.certainty]

    def to(self, device: torch.device) -> "ExitAnswer":
        """The same on another device."""
        return ExitAnswer(self.logits.to(device), None if self.certainty is None else self.certainty.to(device))

    def like_unreached(self) -> "ExitAnswer":
        """NaN, as an exit says that was not reached."""
        certainty = None if self.certainty is None else torch.full_like(self.certainty, torch.nan)
        return ExitAnswer(torch.full_like(self.logits, torch.nan), certainty)

    def without_gradient(self) -> "ExitAnswer":
        """The same, free of what it was computed from."""
        certainty = None if self.certainty is None else refuse_gradient(self.certainty)
        return ExitAnswer(refuse_gradient(self.logits), certainty)


class Answers:
    """What the exits said so far.

    Args:
        logits (`torch.Tensor` of shape `(rows, exits, labels)`): NaN where an exit was not reached.
        exit_index (`torch.LongTensor` of shape `(rows,)`): The exit taken; the last one until a row leaves.
        certainty (`torch.Tensor` of shape `(rows, exits)`, *optional*): Of the exits' learned units, likewise.
    """

    def __init__(self, logits: torch.Tensor, exit_index: torch.Tensor, certainty: torch.Tensor | None = None):
        self.logits = logits
        self.exit_index = exit_index
        self.certainty = certainty

    @classmethod
    def none_yet(cls, rows: int, exits: int, like: ExitAnswer) -> "Answers":
        """No exit reached; of the type and on the device of one exit's answer."""
        logits = like.logits.new_full((rows, exits, like.logits.shape[-1]), torch.nan)
        exit_index = torch.full((rows,), exits - 1, dtype=torch.long, device=logits.device)
        certainty = None if like.certainty is None else like.certainty.new_full((rows, exits), torch.nan)
        return cls(logits, exit_index, certainty)

    @classmethod
    def of_every_exit(cls, answers: list[ExitAnswer], unreached: int = 0) -> "Answers":
        """All exits reached but the last `unreached`; the last one that was is taken."""
        logits = _side_by_side([answer.logits for answer in answers], unreached)
        exit_index = torch.full((logits.shape[0],), len(answers) - 1, dtype=torch.long, device=logits.device)
        certainties = [answer.certainty for answer in answers if answer.certainty is not None]
        return cls(logits, exit_index, _side_by_side(certainties, unreached) if certainties else None)

    def note(self, rows: torch.Tensor, index: int | slice, answer: ExitAnswer) -> None:
        """Writes down what one exit, or every one, says of some rows."""
        self.logits[rows, index] = answer.logits
        if self.certainty is not None and answer.certainty is not None:
            self.certainty[rows, index] = answer.certainty

    def evidence(self, index: int, config: Any, rows: torch.Tensor | slice = slice(None)) -> Evidence:
        """What is known of some rows at one exit."""
        certainty = None if self.certainty is None else self.certainty[rows, index]
        logits = self.logits[rows, : index + 1]
        return Evidence(logits, problem_type(config), certainty, config.exit_tolerance)

    def of_exit(self, index: int) -> ExitAnswer:
        """What one exit says."""
        return ExitAnswer(self.logits[:, index], None if self.certainty is None else self.certainty[:, index])

    def put(self, rows: torch.Tensor, answers: "Answers") -> None:
        """Writes down the answers to some rows, whole."""
        self.logits[rows] = answers.logits
        self.exit_index[rows] = answers.exit_index
        if self.certainty is not None and answers.certainty is not None:
            self.certainty[rows] = answers.certainty

    def select(self, rows: Sequence[int]) -> "Answers":
        """The answers to some rows."""
        index = torch.tensor(rows, dtype=torch.long, device=self.logits.device)
        certainty = None if self.certainty is None else self.certainty.index_select(0, index)
        return Answers(self.logits.index_select(0, index), self.exit_index.index_select(0, index), certainty)

    @classmethod
    def joined(cls, parts: Sequence["Answers"]) -> "Answers":
        """The answers to the rows of several, one after the other."""
        certainties = [part.certainty for part in parts if part.certainty is not None]
        logits = torch.cat([part.logits for part in parts])
        exit_index = torch.cat([part.exit_index for part in parts])
        return cls(logits, exit_index, torch.cat(certainties) if certainties else None)

    @property
    def taken(self) -> torch.Tensor:
        """Scores of the exit that each row took, `(rows, labels)`."""
        index = self.exit_index[:, None, None].expand(-1, 1, self.logits.shape[-1])
        return self.logits.gather(1, index).squeeze(1)


def _side_by_side(values: list[torch.Tensor], unreached: int) -> torch.Tensor:
    """What the exits said along dimension 1, and NaN for the last ones, which were not reached."""
    return torch.stack(values + [torch.full_like(values[0], torch.nan)] * unreached, dim=1)


def choose_exits(answers: Answers, policy: Policy, config: Any) -> torch.Tensor:
    """The exit that each row takes, where all exits were computed.

    Args:
        answers (`Answers`): Of every exit.
        policy (`Policy`): When rows leave.
        config: The model's configuration.

    Returns:
        `torch.LongTensor` of shape `(rows,)`: Indexes into `exit_layers`.
    """
    rows, exits = answers.logits.shape[:2]
    exit_index = torch.full((rows,), exits - 1, dtype=torch.long, device=answers.logits.device)
    for index in reversed(range(exits - 1)):
        leaves = policy.leaves(index, answers.evidence(index, config))
        exit_index = torch.where(leaves, index, exit_index)
    return exit_index


def warn_of_nan(depth: int, count: int, rows: int) -> None:
    """Says so where the exit after `depth` layers gave NaN for `count` of so many rows."""
    if count:
        logger.warning_once(
            f"the exit after layer {depth} gave NaN for {count} of {rows} rows. They are never counted as sure and "
            "went on; look for NaN in the weights or an overflow in float16."
        )


class Leaving:
    """The rows of one batch that are still being run.

    Args:
        config: The model's configuration.
        policy (`Policy`): When rows leave.
        inputs (`BackboneInputs`): The batch.
        answers (`Answers`, *optional*): What the exits before said; what the next ones say is written into it.
        spans (`torch.LongTensor` of shape `(2, rows)`, *optional*): Those of `inputs`, on the CPU, if they are known.
    """

    def __init__(
        self,
        config: Any,
        policy: Policy,
        inputs: BackboneInputs,
        answers: Answers | None = None,
        spans: torch.Tensor | None = None,
    ):
        self.exit_layers = config.exit_layers
        self.config = config
        self.policy = policy
        self.inputs = inputs
        self.rows = torch.arange(inputs.rows, device=inputs.device)
        self.answers = answers
        self.spans = inputs.spans().cpu() if spans is None else spans
        self.staying = torch.arange(inputs.rows)

    def answer(self, index: int, answer: ExitAnswer) -> None:
        """Notes what an exit says of the rows still here."""
        answer = answer.to(self.inputs.device)
        if self.answers is None:
            self.answers = Answers.none_yet(len(self.rows), len(self.exit_layers), answer)
        self.answers.note(self.rows, index, answer)

    def decide(self, index: int) -> None:
        """Lets rows leave. One transfer from the device tells who stays."""
        assert self.answers is not None, "an exit answers before rows leave there"
        evidence = self.answers.evidence(index, self.config, self.rows)
        leaves = self.policy.leaves(index, evidence)
        last = len(self.exit_layers) - 1
        self.answers.exit_index[self.rows] = torch.where(leaves, index, last)
        leaves, is_nan = torch.stack((leaves, evidence.is_nan)).cpu()
        warn_of_nan(self.exit_layers[index], int(is_nan.sum()), len(self.rows))
        self.staying = (~leaves).nonzero().flatten()

    def shrink(self, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """Keeps the rows that stay, without the padding that only rows gone needed; returns their hidden state."""
        self.spans = self.spans.index_select(1, self.staying)
        if self.inputs.can_be_trimmed:
            start, stop = self._window()
            self.spans = self.spans - start
            self.inputs = self.inputs.columns(start, stop)
            hidden = None if hidden is None else hidden[:, start:stop]
        staying = self.staying.to(self.rows.device)
        self.rows = self.rows[staying]
        self.inputs = self.inputs.select(staying)
        return None if hidden is None else hidden.index_select(0, self.staying.to(hidden.device))

    def _window(self) -> tuple[int, int]:
        """The positions that the rows still here need: the first, and one past the last."""
        start, stop = self.spans
        return 0 if self.config.counts_positions else int(start.min()), int(stop.max())
