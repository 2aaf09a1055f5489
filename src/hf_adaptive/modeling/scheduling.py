"""Which stage is run next, and on which rows: what `predict`, the serving engine and other runtimes share.

A *stage* is what is run between two exits. Rows enter stage 0; those that an exit lets go on wait at a later stage for
others, and are run with them as one batch. Three parts, none of which needs torch:

- [`StageScheduler`] knows rows by number, length and stage only, and says what to run next.
- A [`StagedModel`] runs one stage on one batch. Its batches are its own (tensors on a GPU, numpy arrays, …); it keeps
  nothing between two calls, and changes no batch that it was given: what failed can be run again row by row.
- [`StagedFlow`] carries rows from one to the other: it holds what the rows have become until they leave.

A new runtime writes a `StagedModel`. What decides whether a row leaves is in `criteria.py`, for numpy arrays as for
tensors: `policy.leaves(exit_index, Evidence(...))`.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from .examples import TokenisedExamples

# Full batches of a data set that are split into the cheapest sizes at a time, so that the memory for it does not grow
# with the data; where one span ends, a batch may be less than full.
_BATCHES_SPLIT_AT_ONCE = 256
# From so many batches' worth of waiting rows batches of similar length are made.
WINDOW_BATCHES = 4
# Entries of rows that wait no longer which are not worth being looked for.
_FEW = 256
# Rows near the chosen one for which no table of sizes is kept.
_MANY = 512
_length = attrgetter("length")

Batch = TypeVar("Batch")
Answers = TypeVar("Answers")


@dataclass
class RowAnswers:
    """Answers as numpy arrays, one row an example.

    Args:
        logits (`np.ndarray` of shape `(rows, exits, labels)`): Divided by the temperatures; NaN where an exit was not
            reached.
        exit_index (`np.ndarray` of shape `(rows,)`): The exit that each row took.
        certainty (`np.ndarray` of shape `(rows, exits)`, *optional*): Of the exits' learned units, likewise.
    """

    logits: np.ndarray
    exit_index: np.ndarray
    certainty: np.ndarray | None = None

    @property
    def taken(self) -> np.ndarray:
        """Scores of the exit that each row took, `(rows, labels)`."""
        return self.logits[np.arange(len(self.logits)), self.exit_index]

    def copy(self) -> "RowAnswers":
        """The same in arrays of their own."""
        certainty = None if self.certainty is None else self.certainty.copy()
        return RowAnswers(self.logits.copy(), self.exit_index.copy(), certainty)

    def select(self, rows: Sequence[int] | np.ndarray) -> "RowAnswers":
        """The answers to some rows, in arrays of their own."""
        index = np.asarray(rows, dtype=np.int64)
        certainty = None if self.certainty is None else self.certainty[index]
        return RowAnswers(self.logits[index], self.exit_index[index], certainty)


@dataclass
class StageResult(Generic[Batch, Answers]):
    """What came of a batch.

    Args:
        leaving (`list[int]`): Positions in the batch of the rows that left.
        answers: To those rows, in that order; of the model's own type.
        staying (`list[int]`): Positions in the batch of the rows that go on.
        stage (`int`): Where these are to be run next. May be more than one stage on, where nobody left in between.
        batch (*optional*): These rows, in that order, with what they have become; None if none is left.
    """

    leaving: list[int]
    answers: Answers
    staying: list[int] = field(default_factory=list)
    stage: int = 0
    batch: Batch | None = None


class StagedModel(Protocol[Batch, Answers]):
    """A classifier whose stages can be run one at a time: with exits, a cascade, or exported."""

    @property
    def stages(self) -> int:
        """Number of stages, numbered from 0."""
        ...

    @property
    def start_cost(self) -> int:
        """What starting a batch costs, in tokens that could be run through a stage instead."""
        ...

    def read(self, examples: Any) -> TokenisedExamples:
        """Checks examples, see [`read_examples`]; a `ValueError` says which cannot be used, and why."""
        ...

    def start(self, examples: TokenisedExamples, rows: np.ndarray) -> Batch:
        """A batch of some of the examples for stage 0."""
        ...

    def join(self, parts: Sequence[tuple[Batch, Sequence[int]]]) -> Batch:
        """One batch of some rows (positions) of batches that wait at one stage, no longer than these rows need."""
        ...

    def run(self, stage: int, batch: Batch) -> StageResult[Batch, Answers]:
        """Runs a batch from this stage on until a row leaves. The last stage lets every row leave."""
        ...

    def run_whole(self, batch: Batch) -> Answers:
        """Runs a batch of stage 0 to the last exit, which every row takes; says what the others say, too."""
        ...

    def as_arrays(self, answers: Answers) -> RowAnswers:
        """Answers on the CPU, in float32."""
        ...


@dataclass(slots=True, eq=False)
class WaitingRow:
    """What a scheduler knows of a row.

    Args:
        number (`int`): The row's own.
        length (`int`): Tokens.
        deadline (`float`): When its answer is wanted, in seconds of the caller's clock.
        stage (`int`): Where it waits.
        since (`float`): When it began to wait there.
    """

    number: int
    length: int
    deadline: float = math.inf
    stage: int = 0
    since: float = 0.0


class StageScheduler:
    """Rows that wait at the stages, and the choice of the next batch.

    Args:
        stages (`int`): Number of stages.
        max_batch_size (`int`): Rows of a batch at most.
        start_cost (`int`): What a batch costs beside its tokens, in tokens.
        max_wait (`float`): Seconds for which a row waits for others at most, if the machine is free.
        max_tokens (`int`, *optional*): A batch of so many tokens, padding included, is full, too; a longer row is run
            alone.
    """

    def __init__(
        self, stages: int, max_batch_size: int, start_cost: int, max_wait: float = 0.0, max_tokens: int | None = None
    ):
        self.max_batch_size = max_batch_size
        self.start_cost = start_cost
        self.max_wait = max_wait
        self.max_tokens = max_tokens
        self._queues: list[dict[int, WaitingRow]] = [{} for _ in range(stages)]
        self._tokens = [0] * stages
        self._hurried: list[tuple[float, int, WaitingRow]] = []

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def waiting(self) -> list[int]:
        """Rows that wait at each stage."""
        return [len(queue) for queue in self._queues]

    def put(self, stage: int, rows: Iterable[WaitingRow], now: float = 0.0) -> None:
        """Lets rows wait at a stage from now on."""
        queue, tokens = self._queues[stage], 0
        for row in rows:
            row.stage, row.since = stage, now
            queue[row.number] = row
            tokens += row.length
            if row.deadline < math.inf:
                heapq.heappush(self._hurried, (row.deadline - self.max_wait, row.number, row))
        self._tokens[stage] += tokens
        if len(self._hurried) > 2 * len(self) + _FEW:
            # Most are run long before their deadline: they are not kept until then.
            self._hurried = [entry for entry in self._hurried if self._waits(entry[2])]
            heapq.heapify(self._hurried)

    def take(self, rows: Iterable[WaitingRow]) -> None:
        """These rows wait no longer: they are run, or nobody wants to know any more."""
        for row in rows:
            del self._queues[row.stage][row.number]
            self._tokens[row.stage] -= row.length

    def latest_with(self, least: int) -> int | None:
        """The latest stage at which so many rows wait."""
        return next((stage for stage in self._latest_first() if len(self._queues[stage]) >= least), None)

    def split(self, stage: int) -> list[list[WaitingRow]]:
        """The rows of a stage as the batches that cost least, the longest rows first; they still wait."""
        rows = sorted(self._queues[stage].values(), key=_length, reverse=True)
        sizes = cheapest_sizes([row.length for row in rows], self.max_batch_size, self.start_cost, self.max_tokens)
        ends = list(itertools.accumulate(sizes, initial=0))
        return [rows[start:stop] for start, stop in itertools.pairwise(ends)]

    def choose(self, now: float, is_closing: bool = False) -> tuple[int, list[WaitingRow]] | None:
        """The stage to run now, and the rows (which still wait); None if it is better to wait for more rows.

        The latest stage comes first at which a batch is full, or a row has waited long enough, or has a deadline that
        nears. Else the earliest at which rows wait: nothing is on the way that could join them, unless it is stage 0.

        Args:
            now (`float`): Seconds of the clock by which rows were put.
            is_closing (`bool`): Whether no more rows will come.
        """
        hurried = self._most_hurried(now)
        for stage in self._latest_first():
            if (hurried is not None and hurried.stage == stage) or self._is_full(stage) or self._is_due(stage, now):
                return stage, self._batch(stage, hurried)
        earliest = next((stage for stage, queue in enumerate(self._queues) if queue), None)
        if earliest is None or (earliest == 0 and not is_closing):
            return None
        return earliest, self._batch(earliest, None)

    def due(self) -> float:
        """When `choose` should be asked again if no row comes before."""
        since = [next(iter(queue.values())).since for queue in self._queues if queue]
        times = [first + self.max_wait for first in since]
        self._forget_gone()
        return min([*times, *(time for time, *_ in self._hurried[:1])], default=math.inf)

    def _latest_first(self) -> Iterable[int]:
        return reversed(range(len(self._queues)))

    def _is_full(self, stage: int) -> bool:
        has_tokens = self.max_tokens is not None and self._tokens[stage] >= self.max_tokens
        return len(self._queues[stage]) >= self.max_batch_size or has_tokens

    def _is_due(self, stage: int, now: float) -> bool:
        # Rows wait in the order in which they came.
        oldest = next(iter(self._queues[stage].values()), None)
        return oldest is not None and now - oldest.since >= self.max_wait

    def _batch(self, stage: int, hurried: WaitingRow | None) -> list[WaitingRow]:
        """The batch, of rows of similar length, in which the row that should go first finds itself."""
        queue = self._queues[stage]
        window = list(itertools.islice(queue.values(), WINDOW_BATCHES * self.max_batch_size))
        first = window[0]
        if hurried is not None and hurried.stage == stage:
            first = hurried
            window = window if hurried in window else [hurried, *window]
        window.sort(key=_length, reverse=True)
        lengths = list(map(_length, window))
        start, stop = best_batch(lengths, window.index(first), self.max_batch_size, self.start_cost, self.max_tokens)
        return window[start:stop]

    def _most_hurried(self, now: float) -> WaitingRow | None:
        self._forget_gone()
        if self._hurried and self._hurried[0][0] <= now:
            return self._hurried[0][2]
        return None

    def _forget_gone(self) -> None:
        while self._hurried and not self._waits(self._hurried[0][2]):
            heapq.heappop(self._hurried)

    def _waits(self, row: WaitingRow) -> bool:
        return self._queues[row.stage].get(row.number) is row


class StagedFlow(Generic[Batch, Answers]):
    """Rows on their way through a model's stages.

    Args:
        model (`StagedModel`): What runs them.
        scheduler (`StageScheduler`): Where they wait.
        clock (`Callable[[], float]`): The time in seconds, where waiting is measured.
    """

    def __init__(
        self,
        model: StagedModel[Batch, Answers],
        scheduler: StageScheduler,
        clock: Callable[[], float] = lambda: 0.0,
    ):
        self.model = model
        self.scheduler = scheduler
        self.clock = clock
        self._states: dict[int, tuple[Batch, int]] = {}

    def start(self, rows: Sequence[WaitingRow], examples: TokenisedExamples, numbers: np.ndarray) -> None:
        """Lets rows wait at the first stage; each is one of the examples, of that number."""
        self._hold(rows, self.model.start(examples, numbers))
        self.scheduler.put(0, rows, self.clock())

    def run(self, stage: int, rows: Sequence[WaitingRow]) -> tuple[list[WaitingRow], Answers]:
        """Runs waiting rows as one batch; if that fails, they wait as before.

        Returns:
            The rows that left, and the answers to them; the others wait at a later stage.
        """
        rows, batch = self._joined(rows)
        result = self.model.run(stage, batch)
        self.scheduler.take(rows)
        leaving = [rows[position] for position in result.leaving]
        for row in leaving:
            del self._states[row.number]
        if result.batch is not None:
            staying = [rows[position] for position in result.staying]
            self._hold(staying, result.batch)
            self.scheduler.put(result.stage, staying, self.clock())
        return leaving, result.answers

    def run_all(
        self, examples: TokenisedExamples, batches: Iterable[tuple[list[WaitingRow], np.ndarray]]
    ) -> Iterator[tuple[list[WaitingRow], Answers]]:
        """Runs a data set; the rows of a stage wait until there are several batches of them.

        Args:
            examples (`TokenisedExamples`): The data.
            batches: Batches for the first stage, of rows and the numbers of their examples, see [`sorted_batches`].

        Yields:
            Rows that left, and the answers to them.
        """
        least = WINDOW_BATCHES * self.scheduler.max_batch_size
        for rows, numbers in batches:
            self.start(rows, examples, numbers)
            yield self.run(0, rows)
            while (stage := self.scheduler.latest_with(least)) is not None:
                yield from self._run_waiting(stage)
        # The earliest first: it fills the later ones.
        for stage in range(1, len(self.scheduler.waiting())):
            yield from self._run_waiting(stage)

    def _run_waiting(self, stage: int) -> Iterator[tuple[list[WaitingRow], Answers]]:
        for rows in self.scheduler.split(stage):
            yield self.run(stage, rows)

    def drop(self, row: WaitingRow) -> None:
        """Forgets a waiting row."""
        self.scheduler.take([row])
        del self._states[row.number]

    def _hold(self, rows: Sequence[WaitingRow], batch: Batch) -> None:
        for position, row in enumerate(rows):
            self._states[row.number] = batch, position

    def _joined(self, rows: Sequence[WaitingRow]) -> tuple[list[WaitingRow], Batch]:
        """The rows by the batches in which they are held, and as one batch."""
        parts: dict[int, tuple[Batch, list[int], list[WaitingRow]]] = {}
        for row in rows:
            batch, position = self._states[row.number]
            part = parts.get(id(batch))
            if part is None:
                parts[id(batch)] = (batch, [position], [row])
            else:
                part[1].append(position)
                part[2].append(row)
        joined = self.model.join([(batch, positions) for batch, positions, _ in parts.values()])
        return [row for _, _, own in parts.values() for row in own], joined


def sorted_batches(
    numbers: np.ndarray, lengths: np.ndarray, limit: int, overhead: int
) -> Iterator[tuple[list[WaitingRow], np.ndarray]]:
    """A data set's rows as batches for the first stage, numbered in the order in which they come.

    Args:
        numbers (`np.ndarray` of shape `(rows,)`): Numbers of examples, the longest first.
        lengths (`np.ndarray` of shape `(rows,)`): Their tokens.
        limit, overhead: As in [`cheapest_sizes`].
    """
    span = _BATCHES_SPLIT_AT_ONCE * limit
    start = 0
    for first in range(0, len(numbers), span):
        of_span = lengths[first : first + span].tolist()
        for size in cheapest_sizes(of_span, limit, overhead):
            rows = [WaitingRow(place, of_span[place - first]) for place in range(start, start + size)]
            yield rows, numbers[start : start + size]
            start += size


def cheapest_sizes(lengths: Sequence[int], limit: int, overhead: int, max_tokens: int | None = None) -> list[int]:
    """Splits sorted rows into batches such that rows times longest row, plus `overhead` a batch, is least in all.

    Args:
        lengths (`Sequence[int]`): Tokens of the rows, descending.
        limit (`int`): Rows of a batch at most.
        overhead (`int`): What a batch costs beside its tokens, in tokens.
        max_tokens (`int`, *optional*): Tokens of a batch at most, padding included, unless it is a single row.

    Returns:
        `list[int]`: Rows of each batch.
    """
    count = len(lengths)
    cost, size = np.zeros(count + 1, dtype=np.int64), np.zeros(count, dtype=np.int64)
    rows = np.arange(1, limit + 1)
    for start in reversed(range(count)):
        length = max(lengths[start], 1)
        most = min(limit, count - start, limit if max_tokens is None else max(1, max_tokens // length))
        options = rows[:most] * length + cost[start + 1 : start + most + 1]
        best = int(options.argmin())
        cost[start], size[start] = overhead + options[best], best + 1
    sizes, start = [], 0
    while start < count:
        sizes.append(int(size[start]))
        start += sizes[-1]
    return sizes


def best_batch(
    lengths: Sequence[int], chosen: int, limit: int, overhead: int, max_tokens: int | None = None
) -> tuple[int, int]:
    """The batch that holds a row and is worth most: of consecutive rows, the most real tokens for its cost.

    Args:
        lengths (`Sequence[int]`): Tokens of the rows, descending.
        chosen (`int`): Place of the row.
        limit, overhead, max_tokens: As in [`cheapest_sizes`].

    Returns:
        `tuple[int, int]`: Its first row, and one past its last.
    """
    first, last = max(0, chosen - limit + 1), min(len(lengths), chosen + limit)
    near = np.maximum(lengths[first:last], 1)
    sums = np.zeros(len(near) + 1, dtype=near.dtype)
    near.cumsum(out=sums[1:])
    starts, stops = chosen - first + 1, last - chosen
    sizes = _sizes(starts, stops) if starts + stops <= _MANY else _sizes.__wrapped__(starts, stops)
    tokens = sizes * near[:starts, None]
    is_allowed = sizes <= limit
    if max_tokens is not None:
        is_allowed &= (tokens <= max_tokens) | (sizes == 1)
    worth = np.where(is_allowed, (sums[starts:] - sums[:starts, None]) / (overhead + tokens), -1.0)
    start, stop = divmod(int(worth.argmax()), stops)
    return first + start, chosen + 1 + stop


@functools.lru_cache(maxsize=64)
def _sizes(starts: int, stops: int) -> np.ndarray:
    """How many rows there are from each of so many first ones, up to the row that was chosen, to each last one."""
    return np.arange(starts, starts + stops)[None] - np.arange(starts)[:, None]
