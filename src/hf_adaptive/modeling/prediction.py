"""Prediction over a data set, stage by stage.

All examples go through the layers up to the first exit in full batches of similar length; those that stay are
regrouped into full batches for the next segment, and so on. One hard example does not hold a batch, and a batch that
lost most of its rows is not run on nearly empty.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .answers import Answers
from .bases import ModelBase
from .checks import check_count
from .examples import INPUT_NAMES, TokenisedExamples
from .inputs import input_limits
from .local_gradients import is_sharded
from .outputs import SequenceClassifierWithExitsOutput
from .processes import Shares
from .scheduling import StagedFlow, StageScheduler, WaitingRow, sorted_batches
from .stages import TorchStages
from .streams import stream


class PredictsDatasets(ModelBase):
    """`predict` for a classifier with exits."""

    @torch.no_grad()
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
            examples: Tokenised examples (a `datasets.Dataset`, a list of mappings, or a mapping of columns as a
                tokenizer returns it) with `input_ids` and, where the model takes them, `token_type_ids`; lists, arrays
                or tensors. Padding, if any, is marked in `attention_mask` and dropped.
            batch_size (`int`): Examples run at a time, at every stage.
            exit_thresholds, exit_at: As in `forward`.
            show_progress (`bool`): Whether to show a bar.
            split_between_processes (`bool`): False where each process has examples of its own, and wants its answers.

        Returns:
            `SequenceClassifierWithExitsOutput`: On the CPU, in the order of `examples`.

        Raises:
            ValueError: A model in training mode, no examples or one that cannot be read (by its number), a batch size
                below 1, or anything that `forward` refuses.
        """
        if self.training:
            raise ValueError("predict needs the evaluation mode: call model.eval() first.")
        check_count("batch_size", batch_size)
        stages = self.staged(exit_thresholds, exit_at)
        is_alone = not split_between_processes or is_sharded(self)
        rows = stages.read(examples)
        batches = LengthSortedBatches(rows, batch_size, stages.start_cost, self.device, is_alone)
        with logging.tqdm(total=len(batches), desc="Classifying", disable=not show_progress) as bar:
            answers = batches.in_order_of_examples(StagedRun(stages, batches, bar).run())
        return SequenceClassifierWithExitsOutput(
            logits=answers.taken,
            exit_logits=answers.logits,
            exit_index=answers.exit_index,
            exit_certainty=answers.certainty,
        )

    def predict_stream(
        self,
        examples: Iterable[Mapping[str, Any]],
        batch_size: int = 32,
        window: int = 4096,
        exit_thresholds: list[float | None] | float | None = None,
        exit_at: int | None = None,
        split_between_processes: bool = True,
    ) -> Iterator[SequenceClassifierWithExitsOutput]:
        """Classifies whatever can be iterated over: a generator, an `IterableDataset`, rows of Parquet files.

        Rows are read in windows, each of which is classified as by `predict`, so that memory does not grow with their
        number. Several processes have to be given the same rows, as for `predict`.

        Args:
            examples (`Iterable[Mapping]`): Tokenised examples.
            batch_size (`int`): Examples run at a time, at every stage.
            window (`int`): Examples read at a time; the more, the more alike are the lengths in a batch.
            exit_thresholds, exit_at: As in `forward`.
            split_between_processes (`bool`): False where each process has examples of its own, and wants its answers.

        Returns:
            `Iterator[SequenceClassifierWithExitsOutput]`: One answer an example, in their order; on the CPU, without
            the batch dimension.

        Raises:
            ValueError: What `predict` refuses (when that row is read), or a window below 1.
        """
        settings: dict[str, Any] = {"exit_thresholds": exit_thresholds, "exit_at": exit_at, "show_progress": False}
        settings["split_between_processes"] = split_between_processes
        return stream(examples, window, lambda rows: _one_by_one(self.predict(rows, batch_size, **settings)))

    def staged(
        self, exit_thresholds: list[float | None] | float | None = None, exit_at: int | None = None
    ) -> TorchStages:
        """The model as stages that can be run one at a time, for `predict` and for serving.

        Args:
            exit_thresholds, exit_at: As in `forward`.

        Raises:
            ValueError: A model in training mode, or thresholds or `exit_at` that cannot be used.
        """
        if self.training:
            raise ValueError("stages need the evaluation mode: call model.eval() first.")
        self.config.check_before_use()
        padding = {**dict.fromkeys(INPUT_NAMES, 0), "input_ids": self.config.pad_token_id or 0}
        limits = self.input_limits
        return TorchStages(self, self._policy(exit_thresholds, exit_at), padding, limits, self._unmarked_padding)

    @property
    def input_limits(self) -> dict[str, int]:
        """How many values there are for each input that is looked up in a table: tokens, segments."""
        return input_limits(self._backbone_configs)

    @property
    def _backbone_configs(self) -> list[Any]:
        """Configurations of what reads the inputs."""
        return [self.config]

    @property
    def _unmarked_padding(self) -> int | None:
        """The token that heads take for padding where no mask says what is."""
        return self.config.pad_token_id if self.config.exit_pooling == "last" else None


class LengthSortedBatches:
    """A tokenised data set in batches of similar length, the longest first (so that memory peaks at the start).

    On several processes, the share of this one. Rows are numbered in the order in which they come.

    Args:
        rows (`TokenisedExamples`): The data.
        batch_size (`int`): Rows of a batch.
        start_cost (`int`): What starting a batch costs, in tokens.
        device (`torch.device`): Where the batches go.
        is_alone (`bool`): Whether all rows are this process's.
    """

    def __init__(
        self,
        rows: TokenisedExamples,
        batch_size: int,
        start_cost: int,
        device: torch.device,
        is_alone: bool,
    ):
        self.batch_size = batch_size
        self.start_cost = start_cost
        self.rows = rows
        lengths = torch.from_numpy(rows.lengths)
        self._shares = Shares(lengths, device, is_alone)
        # In few bytes: for short texts, numbers of eight bytes are much beside the texts themselves.
        self._order = lengths.argsort(descending=True, stable=True).to(torch.int32)
        self._own = self._order[self._shares.own()]

    def __len__(self) -> int:
        return len(self._own)

    def __iter__(self) -> Iterator[tuple[list[WaitingRow], np.ndarray]]:
        numbers = self._own.numpy()
        return sorted_batches(numbers, self.rows.lengths[numbers], self.batch_size, self.start_cost)

    def places(self, rows: Sequence[WaitingRow]) -> torch.Tensor:
        """Where the answers to some rows belong among those of this process."""
        places = torch.tensor([row.number for row in rows], dtype=torch.long)
        return self._order[places].long() if self._shares.are_all else places

    def in_order_of_examples(self, answers: Answers) -> Answers:
        """Answers to all examples in their order, on the CPU, from those to the rows of this process."""
        certainty = None if answers.certainty is None else self._in_order(answers.certainty)
        return Answers(self._in_order(answers.logits), self._in_order(answers.exit_index), certainty)

    def _in_order(self, values: torch.Tensor) -> torch.Tensor:
        # A process that has every row wrote each answer where it belongs.
        joined = self._shares.join(values)
        return joined if self._shares.are_all else joined[self._order.argsort()]


class StagedRun:
    """One pass over a data set.

    Args:
        stages (`TorchStages`): A classifier, in evaluation mode, and when rows leave it.
        batches (`LengthSortedBatches`): The data.
        bar: Progress bar, moved on by an example when its answer is known.
    """

    def __init__(self, stages: TorchStages, batches: LengthSortedBatches, bar: Any):
        self.batches = batches
        self.bar = bar
        self.answers: Answers | None = None
        self.flow = StagedFlow(stages, StageScheduler(stages.stages, batches.batch_size, stages.start_cost))

    def run(self) -> Answers:
        """Runs everything."""
        for left, answers in self.flow.run_all(self.batches.rows, self.batches):
            self._note(left, answers)
        assert self.answers is not None, "there is at least one example"
        return self.answers

    def _note(self, left: list[WaitingRow], answers: Answers) -> None:
        if self.answers is None:
            self.answers = Answers.none_yet(len(self.batches), answers.logits.shape[1], answers.of_exit(0))
        self.answers.put(self.batches.places(left).to(answers.logits.device), answers)
        self.bar.update(len(left))


def _one_by_one(outputs: SequenceClassifierWithExitsOutput) -> Iterator[SequenceClassifierWithExitsOutput]:
    """The answers of a batch, without the batch dimension."""
    names, columns = zip(*outputs.items())
    for values in zip(*(column.unbind() for column in columns)):
        yield SequenceClassifierWithExitsOutput(**dict(zip(names, values)))
