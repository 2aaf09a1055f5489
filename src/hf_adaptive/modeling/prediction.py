"""Prediction over a data set, stage by stage.

All examples go through the layers up to the first exit in full batches of similar length; those that stay are
regrouped into full batches for the next segment, and so on. One hard example does not hold a batch, and a batch that
lost most of its rows is not run on nearly empty.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from .answers import Answers, ExitAnswer, Leaving
from .bases import ModelBase
from .criteria import Policy
from .examples import INPUT_NAMES, TokenisedExamples, read_examples
from .inputs import BackboneInputs, input_limits
from .layers import Progress
from .local_gradients import is_sharded
from .outputs import SequenceClassifierWithExitsOutput
from .processes import Shares

# What starting a batch costs, in tokens that could be run through a layer instead: on CPUs of two cores 18 to 45 were
# measured with layers of width 384 and 768; a GPU is busy with a thousand while it launches one.
_TOKENS_PER_START = {"cpu": 28}
_TOKENS_PER_START_ELSEWHERE = 1024
# Batches' worth of rows that wait at an exit before they are run: more rows make batches of more similar length.
_WAITING_BATCHES = 4


@dataclass
class _Rows:
    """Some examples on their way through the layers.

    Args:
        places (`torch.LongTensor` of shape `(rows,)`): Their numbers in [`LengthSortedBatches`]; on the CPU.
        inputs (`BackboneInputs`): What the backbone is given.
        hidden (`torch.Tensor` of shape `(rows, length, hidden)`, *optional*): Output of the last layer that was run;
            None where the next stage begins anew (a cascade).
    """

    places: torch.Tensor
    inputs: BackboneInputs
    hidden: torch.Tensor | None

    def split(self, count: int) -> tuple["_Rows", "_Rows"]:
        """The first `count` rows, and the others."""
        parts = slice(0, count), slice(count, None)
        hidden = [None if self.hidden is None else self.hidden[part] for part in parts]
        first, rest = (_Rows(self.places[p], self.inputs.select(p), h) for p, h in zip(parts, hidden))
        return first, rest


class StageQueue:
    """Rows that wait at one exit until there are enough for batches of similar length.

    Args:
        batches (`LengthSortedBatches`): The data set.
    """

    def __init__(self, batches: "LengthSortedBatches"):
        self.batches = batches
        self.chunks: list[_Rows] = []

    def __len__(self) -> int:
        return sum(len(chunk.places) for chunk in self.chunks)

    def put(self, rows: _Rows) -> None:
        """Adds rows at the end."""
        self.chunks.append(rows)

    def take_all(self) -> Iterator[_Rows]:
        """Empties the queue, batch by batch."""
        places = torch.cat([chunk.places for chunk in self.chunks])
        for count in self.batches.sizes(places):
            yield self._take(count)

    def _take(self, count: int) -> _Rows:
        """Removes so many rows from the front, padded to a common length."""
        taken: list[_Rows] = []
        while count > 0:
            first, rest = self.chunks.pop(0).split(count)
            taken.append(first)
            count -= len(first.places)
            if len(rest.places):
                self.chunks.insert(0, rest)
        return self._join(taken)

    def _join(self, chunks: list[_Rows]) -> _Rows:
        length = max(chunk.inputs.length for chunk in chunks)
        padding = self.batches.padding
        tensors = {
            name: _pad_and_cat([chunk.inputs.tensors[name] for chunk in chunks], length, padding[name])
            for name in chunks[0].inputs.tensors
        }
        states = [chunk.hidden for chunk in chunks if chunk.hidden is not None]
        padded = [nn.functional.pad(state, (0, 0, 0, length - state.shape[1])) for state in states]
        hidden = torch.cat(padded) if padded else None
        places = torch.cat([chunk.places for chunk in chunks])
        return _Rows(places, self.batches.as_inputs(places, tensors), hidden)


def _pad_and_cat(tensors: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
    return torch.cat([nn.functional.pad(t, (0, length - t.shape[1]), value=value) for t in tensors])


class PredictsDatasets(ModelBase):
    """`predict` for a classifier with exits."""

    @torch.inference_mode()
    def predict(
        self,
        examples: Sequence[Mapping[str, Any]],
        batch_size: int = 32,
        exit_thresholds: list[float | None] | float | None = None,
        exit_at: int | None = None,
        show_progress: bool = True,
        split_between_processes: bool = True,
    ) -> SequenceClassifierWithExitsOutput:
        """Classifies a data set, without gradients.

        Started by `accelerate launch` on several processes or GPUs, every process has to make the call with the same
        examples: each runs a share of them, and all get every answer. (Where processes hold parts of the parameters,
        they run all examples together.)

        Args:
            examples (`Sequence[Mapping]`): Tokenised examples (a `datasets.Dataset`, say) with `input_ids` and, where
                the model takes them, `token_type_ids`; padding, if any, is marked in `attention_mask` and dropped.
            batch_size (`int`): Examples run at a time, at every stage.
            exit_thresholds, exit_at: As in `forward`.
            show_progress (`bool`): Whether to show a bar.
            split_between_processes (`bool`): False where each process has examples of its own, and wants its answers.

        Returns:
            `SequenceClassifierWithExitsOutput`: On the CPU, in the order of `examples`.

        Raises:
            ValueError: A model in training mode, no examples, a batch size below 1, or anything that `forward`
                refuses.
        """
        if self.training:
            raise ValueError("predict needs the evaluation mode: call model.eval() first.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        policy = self._policy(exit_thresholds, exit_at)
        is_alone = not split_between_processes or is_sharded(self)
        rows = read_examples(examples, input_limits(self._backbone_configs))
        batches = LengthSortedBatches(rows, batch_size, self._padding_values(), self.device, is_alone)
        with logging.tqdm(total=len(batches), desc="Classifying", disable=not show_progress) as bar:
            answers = batches.in_order_of_examples(StagedRun(self, batches, policy, bar).run())
        return SequenceClassifierWithExitsOutput(
            logits=answers.taken,
            exit_logits=answers.logits,
            exit_index=answers.exit_index,
            exit_certainty=answers.certainty,
        )

    def _padding_values(self) -> dict[str, int]:
        return {**dict.fromkeys(INPUT_NAMES, 0), "input_ids": self.config.pad_token_id or 0}

    @property
    def _backbone_configs(self) -> list[Any]:
        """Configurations of what reads the inputs."""
        return [self.config]


class LengthSortedBatches:
    """A tokenised data set in batches of similar length, the longest first (so that memory peaks at the start).

    On several processes, the share of this one. Rows are numbered in the order in which they come.

    Args:
        rows (`TokenisedExamples`): The data.
        batch_size (`int`): Rows of a batch.
        padding (`dict[str, int]`): What each input is padded with.
        device (`torch.device`): Where the batches go.
        is_alone (`bool`): Whether all rows are this process's.
    """

    def __init__(
        self,
        rows: TokenisedExamples,
        batch_size: int,
        padding: dict[str, int],
        device: torch.device,
        is_alone: bool,
    ):
        self.batch_size = batch_size
        self.padding = padding
        self.device = device
        self.rows = rows
        self.lengths = torch.from_numpy(rows.lengths)
        self.is_whole = torch.from_numpy(rows.is_whole)
        self._order = self.lengths.argsort(descending=True, stable=True)
        self._shares = Shares(self.lengths, device, is_alone)
        self._own = self._order[self._shares.own()]

    def __len__(self) -> int:
        return len(self._own)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, BackboneInputs]]:
        every_place = torch.arange(len(self))
        for places in every_place.split(self.sizes(every_place)):
            examples = self._own[places].numpy()
            tensors = {name: self._batch(name, examples) for name in self.rows.names}
            yield places, self.as_inputs(places, tensors)

    def sizes(self, places: torch.Tensor) -> list[int]:
        """Sizes of batches, at most `batch_size`, in which these rows are run with the least padding for their number.

        Args:
            places (`torch.LongTensor` of shape `(rows,)`): Ascending, so that the longest row is the first.
        """
        overhead = _TOKENS_PER_START.get(self.device.type, _TOKENS_PER_START_ELSEWHERE)
        return cheapest_sizes(self.lengths[self._own[places]].tolist(), self.batch_size, overhead)

    def as_inputs(self, places: torch.Tensor, tensors: dict[str, torch.Tensor]) -> BackboneInputs:
        """What the backbone is given for these rows; without a mask for the heads if no token is padding."""
        rows = self._own[places]
        longest = tensors["input_ids"].shape[1]
        is_full = bool((self.is_whole[rows] & (self.lengths[rows] == longest)).all())
        return BackboneInputs(tensors, None if is_full else tensors["attention_mask"])

    def in_order_of_examples(self, answers: Answers) -> Answers:
        """Answers to all examples in their order, on the CPU, from those to the rows of this process."""
        certainty = None if answers.certainty is None else self._in_order(answers.certainty)
        return Answers(self._in_order(answers.logits), self._in_order(answers.exit_index), certainty)

    def _in_order(self, values: torch.Tensor) -> torch.Tensor:
        return self._shares.join(values)[self._order.argsort()]

    def _batch(self, name: str, examples: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.rows.batch(name, examples, self.padding[name])).to(self.device)


def cheapest_sizes(lengths: list[int], limit: int, overhead: int) -> list[int]:
    """Splits sorted rows into batches such that rows times longest row, plus `overhead` a batch, is least in all.

    Args:
        lengths (`list[int]`): Tokens of the rows, descending.
        limit (`int`): Rows of a batch at most.
        overhead (`int`): What a batch costs beside its tokens, in tokens.

    Returns:
        `list[int]`: Rows of each batch.
    """
    count = len(lengths)
    cost, size = np.zeros(count + 1, dtype=np.int64), np.zeros(count, dtype=np.int64)
    rows = np.arange(1, limit + 1)
    for start in reversed(range(count)):
        most = min(limit, count - start)
        options = rows[:most] * max(lengths[start], 1) + cost[start + 1 : start + most + 1]
        best = int(options.argmin())
        cost[start], size[start] = overhead + options[best], best + 1
    sizes, start = [], 0
    while start < len(lengths):
        sizes.append(int(size[start]))
        start += sizes[-1]
    return sizes


class StagedRun:
    """One pass over a data set.

    Args:
        model: A classifier with exits, in evaluation mode.
        batches (`LengthSortedBatches`): The data.
        policy (`Policy`, *optional*): When rows leave; None to run everything.
        bar: Progress bar, moved on by an example when its answer is known.
    """

    def __init__(self, model: Any, batches: LengthSortedBatches, policy: Policy | None, bar: Any):
        self.model = model
        self.batches = batches
        self.policy = policy
        self.bar = bar
        self.answers: Answers | None = None
        self.queues = {depth: StageQueue(batches) for depth in model._stages}
        self.output_length: int | None = None

    def run(self) -> Answers:
        """Runs everything; the rows of a stage wait until there are several batches of them."""
        for places, inputs in self.batches:
            if self.policy is None:
                self._run_whole(places, inputs)
                continue
            self._run_stage(_Rows(places, inputs, None), None)
            self._run_queues(_WAITING_BATCHES * self.batches.batch_size)
        self._run_queues(1)
        assert self.answers is not None, "there is at least one example"
        return self.answers

    def _run_whole(self, places: torch.Tensor, inputs: BackboneInputs) -> None:
        answers, _ = self.model._run_everything(inputs, {})
        if self.answers is None:
            exits = answers.logits.shape[1]
            certainty = None if answers.certainty is None else answers.certainty[:, 0]
            self.answers = Answers.none_yet(len(self.batches), exits, ExitAnswer(answers.logits[:, 0], certainty))
        self.answers.note(places.to(answers.logits.device), slice(None), ExitAnswer(answers.logits, answers.certainty))
        self.bar.update(len(places))

    def _run_queues(self, least: int) -> None:
        """Runs the stages in which at least so many rows wait, the earliest first: it fills the later ones."""
        for depth, queue in self.queues.items():
            if len(queue) >= least:
                for rows in queue.take_all():
                    self._run_stage(rows, Progress(depth=depth, hidden=rows.hidden, output_length=self.output_length))

    def _run_stage(self, rows: _Rows, progress: Progress | None) -> None:
        policy = cast(Policy, self.policy)
        places, inputs = rows.places, rows.inputs
        numbers = places.to(inputs.device)
        leaving = Leaving(
            self.model.config, policy, inputs, rows=numbers, answers=self.answers, total=len(self.batches)
        )
        progress = self.model._run_until_rows_leave(leaving, progress)
        self.answers = leaving.answers
        if progress is None:
            self.bar.update(len(places))
            return
        places = places[leaving.staying]
        hidden = leaving.shrink(cast(torch.Tensor, progress.hidden))
        self.output_length = progress.output_length
        self.bar.update(len(rows.places) - len(places))
        self.queues[progress.depth].put(_Rows(places, leaving.inputs, hidden))
