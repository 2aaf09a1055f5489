"""A classifier with exits, or a cascade, run one stage at a time: the `StagedModel` of `scheduling.py` in torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from .answers import Answers, Leaving
from .criteria import Policy
from .examples import TokenisedExamples, read_examples
from .inputs import BackboneInputs
from .layers import Progress
from .scheduling import RowAnswers, StageResult

# What starting a batch costs, in tokens that could be run through a layer instead: on CPUs of two cores 18 to 45 were
# measured with layers of width 384 and 768; a GPU is busy with a thousand while it launches one.
_TOKENS_PER_START = {"cpu": 28}
_TOKENS_PER_START_ELSEWHERE = 1024


@dataclass
class StagedRows:
    """Rows of one stage, padded on the right to a common length.

    Args:
        tensors (`dict[str, torch.Tensor]`): What the backbone is given, `attention_mask` too.
        lengths (`list[int]`): Tokens of each row.
        is_whole (`list[bool]`): Whether a row's mask has no holes.
        ends (`list[int]`): Tokens of each row up to the last that heads take for real.
        progress (`Progress`, *optional*): How far they have come; None at the first stage.
        answers (`Answers`, *optional*): What the exits said so far.
    """

    tensors: dict[str, torch.Tensor]
    lengths: list[int]
    is_whole: list[bool]
    ends: list[int]
    progress: Progress | None = None
    answers: Answers | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def inputs(self) -> BackboneInputs:
        """As the backbone takes them; without a mask for the heads if no token is padding."""
        mask = self.tensors["attention_mask"]
        if all(self.is_whole) and min(self.ends) == mask.shape[1]:
            return BackboneInputs(self.tensors, None)
        if self.ends != self.lengths:
            positions = torch.arange(mask.shape[1], device=mask.device)
            mask = mask * (positions < torch.tensor(self.ends, device=mask.device).unsqueeze(1))
        return BackboneInputs(self.tensors, mask)


class TorchStages:
    """The stages of a classifier with exits or a cascade, each run for a batch of rows at a time.

    Args:
        model: The classifier, in evaluation mode.
        policy (`Policy`, *optional*): When rows leave; None: all run to the last exit.
        padding (`dict[str, int]`): What each input is padded with.
        limits (`dict[str, int]`): How many values there are for each input that is looked up in a table.
        unmarked_padding (`int`, *optional*): The token at the end of a row that heads take for padding where the
            examples have no masks, as in `forward`.
    """

    def __init__(
        self,
        model: Any,
        policy: Policy | None,
        padding: dict[str, int],
        limits: dict[str, int],
        unmarked_padding: int | None = None,
    ):
        self.model = model
        self.policy = policy
        self.padding = padding
        self.limits = limits
        self.unmarked_padding = unmarked_padding

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.model._stages) + 1

    @property
    def start_cost(self) -> int:
        """What starting a batch costs, in tokens."""
        return _TOKENS_PER_START.get(self.model.device.type, _TOKENS_PER_START_ELSEWHERE)

    def read(self, examples: Any) -> TokenisedExamples:
        """Checks examples, see [`read_examples`]."""
        return read_examples(examples, self.limits)

    @torch.inference_mode()
    def start(self, examples: TokenisedExamples, rows: np.ndarray) -> StagedRows:
        """A batch of some of the examples for the first stage."""
        columns = {name: examples.batch(name, rows, self.padding[name]) for name in examples.names}
        lengths = examples.lengths[rows]
        is_marked = examples.has_masks or self.unmarked_padding is None
        ends = lengths if is_marked else _ends(columns["input_ids"] != self.unmarked_padding, lengths)
        tensors = {name: torch.from_numpy(values).to(self.model.device) for name, values in columns.items()}
        return StagedRows(tensors, lengths.tolist(), examples.is_whole[rows].tolist(), ends.tolist())

    @torch.inference_mode()
    def join(self, parts: Sequence[tuple[StagedRows, Sequence[int]]]) -> StagedRows:
        """One batch of rows of several, no longer than these rows need."""
        chosen = [_Chosen(rows, positions) for rows, positions in parts]
        first = parts[0][0]
        if first.progress is None and len(chosen) == 1 and chosen[0].index is None:
            return first  # as it was started
        lengths = [rows.lengths[position] for rows, positions in parts for position in positions]
        is_whole = [rows.is_whole[position] for rows, positions in parts for position in positions]
        ends = [rows.ends[position] for rows, positions in parts for position in positions]
        length = max(lengths)
        tensors = {
            name: torch.cat([one.padded(one.rows.tensors[name], length, self.padding[name]) for one in chosen])
            for name in first.tensors
        }
        return StagedRows(tensors, lengths, is_whole, ends, _joined_progress(chosen, length), _joined_answers(chosen))

    @torch.inference_mode()
    def run(self, stage: int, batch: StagedRows) -> StageResult[StagedRows, Answers]:
        """Runs a batch from a stage on until a row leaves."""
        if self.policy is None:
            return StageResult(list(range(len(batch))), self.run_whole(batch))
        spans = torch.tensor([[0] * len(batch), batch.lengths])
        leaving = Leaving(self.model.config, self.policy, batch.inputs, batch.answers, spans)
        progress = self.model._run_until_rows_leave(leaving, batch.progress)
        answers = cast(Answers, leaving.answers)
        if progress is None:
            return StageResult(list(range(len(batch))), answers)
        staying = leaving.staying.tolist()
        left = sorted(set(range(len(batch))) - set(staying))
        hidden = leaving.shrink(progress.hidden)
        rest = StagedRows(
            leaving.inputs.tensors,
            [batch.lengths[position] for position in staying],
            [batch.is_whole[position] for position in staying],
            [batch.ends[position] for position in staying],
            Progress(progress.depth, hidden, progress.output_length),
            answers.select(staying),
        )
        return StageResult(left, answers.select(left), staying, 1 + self.model._stages.index(progress.depth), rest)

    @torch.inference_mode()
    def run_whole(self, batch: StagedRows) -> Answers:
        """Runs a batch to the last exit, noting what all say."""
        return self.model._run_everything(batch.inputs, {})[0]

    def as_arrays(self, answers: Answers) -> RowAnswers:
        """Answers on the CPU, in float32."""
        certainty = None if answers.certainty is None else answers.certainty.float().cpu().numpy()
        return RowAnswers(answers.logits.float().cpu().numpy(), answers.exit_index.cpu().numpy(), certainty)


def _ends(is_real: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """One past each row's last real token, at least 1.

    Args:
        is_real (`np.ndarray` of shape `(rows, length)`): Where a token is no padding.
        lengths (`np.ndarray` of shape `(rows,)`): Tokens of each row.
    """
    positions = np.arange(is_real.shape[1])
    return np.where(is_real & (positions < lengths[:, None]), positions + 1, 1).max(axis=1)


class _Chosen:
    """Some rows of a batch."""

    def __init__(self, rows: StagedRows, positions: Sequence[int]):
        self.rows = rows
        self.positions = positions
        is_every = list(positions) == list(range(len(rows)))
        self.index = None if is_every else torch.tensor(positions)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Their part of a tensor, batch first, on any device."""
        return tensor if self.index is None else tensor.index_select(0, self.index.to(tensor.device))

    def padded(self, tensor: torch.Tensor, length: int, value: int) -> torch.Tensor:
        """Their part of a tensor of shape `(rows, length, ...)`, cut or padded to a length."""
        part = self.of(tensor[:, :length])
        missing = length - part.shape[1]
        return part if missing == 0 else nn.functional.pad(part, (0, 0) * (part.dim() - 2) + (0, missing), value=value)


def _joined_progress(chosen: list[_Chosen], length: int) -> Progress | None:
    first = chosen[0].rows.progress
    if first is None or first.hidden is None:
        return first
    states = [cast(torch.Tensor, cast(Progress, one.rows.progress).hidden) for one in chosen]
    hidden = torch.cat([one.padded(state, length, 0) for one, state in zip(chosen, states)])
    return Progress(first.depth, hidden, first.output_length)


def _joined_answers(chosen: list[_Chosen]) -> Answers | None:
    if chosen[0].rows.answers is None:
        return None
    return Answers.joined([cast(Answers, one.rows.answers).select(one.positions) for one in chosen])
