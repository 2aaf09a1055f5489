"""The rows of many requests through one model, stage by stage."""

import asyncio
import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.utils import logging

from ..modeling.checks import check_at_least, check_choice, check_count
from ..modeling.scheduling import RowAnswers, StagedFlow, StageScheduler
from ..tokenizing import check_tokenizer
from .errors import DeadlineExceededError, EngineBrokenError, EngineClosedError, EngineFullError, NotANumberError
from .monitor import Monitor
from .places import Places
from .requests import AnswerFuture, EngineAnswer, Example, Reader, Request, check_example
from .statistics import EngineStatistics, Recorder

logger = logging.get_logger(__name__)

# A batch is full, too, when its start is so small a part of what it costs: larger ones answer later, not faster.
_COST_OF_STARTS = 16
# Rows that are read at a time, so that one long row does not pad thousands.
_READ_AT_ONCE = 128
# Answered rows which are not worth being taken off the list of deadlines.
_FEW = 256


@dataclass
class _Reload:
    """Asks the worker for another model, once all rows before it are answered."""

    model: Any
    tokenizer: Any
    done: "Future[None]"


class _Wake:
    """Asks the worker to look up."""


class ExitsEngine:
    """Answers rows as they come: at every step it runs the stage, and the batch of rows, that are worth most.

    New rows enter the first stage while others wait or are run further up; those that an exit lets go on wait there
    for rows of other requests. A row's answer is the one that it gets alone. One thread runs the model; any number of
    threads or coroutines may submit. For several devices make an engine for each.

    Args:
        model: A classifier with exits, a cascade, or an exported one, in evaluation mode; what has `staged(...)`.
        max_batch_size (`int`): Rows of a batch at most.
        max_wait_ms (`float`): For how long a row waits for others at most while the model is not busy.
        tokenizer (*optional*): For texts and pairs of texts; without it, rows have to be tokenised.
        exit_thresholds, exit_at (*optional*): As in `forward`; by default those of the configuration.
        max_waiting (`int`): Rows that may be in the engine at a time.
        when_full (`str`): `"refuse"` raises [`EngineFullError`] at once, `"block"` lets `submit` wait for a place.
        audit_share (`float`): Share of the answered rows that are run to the last exit when nothing else is to do.
        when_broken (`str`): What to do when the audit shows with confidence that more answers differ from the last
            exit's than calibrated: `"warn"`, `"tighten"` thresholds, or `"run_everything"`.
        false_alarm_rate (`float`): Probability that drift, or a broken bound, is ever reported where there is none.
        seed (`int`): Of what is drawn for audits.

    Raises:
        ValueError: A setting out of range, or what the model refuses.
        TypeError: A model without stages.

    Example:

        >>> with ExitsEngine(model, tokenizer=tokenizer) as engine:
        ...     answer = engine.submit("A masterpiece.").result()
    """

    def __init__(
        self,
        model: Any,
        max_batch_size: int = 32,
        max_wait_ms: float = 2.0,
        *,
        tokenizer: Any = None,
        exit_thresholds: list[float | None] | float | None = None,
        exit_at: int | None = None,
        max_waiting: int = 10_000,
        when_full: str = "refuse",
        audit_share: float = 0.01,
        when_broken: str = "warn",
        false_alarm_rate: float = 0.01,
        seed: int = 0,
    ):
        check_count("max_batch_size", max_batch_size)
        check_at_least("max_wait_ms", max_wait_ms, 0)
        check_count("max_waiting", max_waiting)
        check_choice("when_full", when_full, ("refuse", "block"))
        check_count("seed", seed, least=0)
        check_tokenizer(tokenizer)
        self.max_batch_size = max_batch_size
        self.max_wait = max_wait_ms / 1000
        self.max_waiting = max_waiting
        self.when_full = when_full
        self._watch: dict[str, Any] = {
            "audit_share": audit_share,
            "when_broken": when_broken,
            "false_alarm_rate": false_alarm_rate,
            "seed": seed,
        }
        self._decisions = {"exit_thresholds": exit_thresholds, "exit_at": exit_at}
        self._use(model, tokenizer)
        self._recorder = Recorder(self._exit_layers, self._flow.model.stages)
        self._numbers = itertools.count()
        self._places = Places(max_waiting)
        self._arrivals: queue.SimpleQueue[Request | _Reload | _Wake] = queue.SimpleQueue()
        # Rows that somebody waits for. Whoever takes one out, answers it or gives it up, and frees its place.
        self._held: dict[int, Request] = {}
        self._admitted: dict[int, Request] = {}  # the worker's, in the order in which they came
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap
        self._admission = threading.Lock()
        self._is_closing = False
        self._cause: BaseException | None = None
        self._worker = threading.Thread(target=self._work, name="exits-engine", daemon=True)
        self._worker.start()

    # What callers do

    def submit(self, example: Example, timeout_ms: float | None = None) -> "Future[EngineAnswer]":
        """Asks for the answer to one row.

        Args:
            example (`str`, `tuple[str, str]` or `Mapping`): A text, a pair of texts, or a tokenised row.
            timeout_ms (`float`, *optional*): After which the answer is of no use.

        Returns:
            `Future` of an [`EngineAnswer`]; `cancel()` gives its place up. It fails with `ValueError` for a row that
            the model cannot read, [`NotANumberError`], [`DeadlineExceededError`], [`EngineClosedError`] or
            [`EngineBrokenError`].

        Raises:
            EngineFullError: No place is left (`when_full="refuse"`).
            EngineClosedError, EngineBrokenError: Nothing is answered any more.
            TypeError, ValueError: What is no example.
        """
        _check_request(example, timeout_ms, self.tokenizer)
        if not self._places.take(may_wait=self.when_full == "block"):
            raise EngineFullError(f"{self.max_waiting} rows wait already (max_waiting). Try again later.")
        return self._enter(example, timeout_ms)

    async def answer(self, example: Example, timeout_ms: float | None = None) -> EngineAnswer:
        """As `submit`, for coroutines; a cancelled coroutine gives its place up."""
        _check_request(example, timeout_ms, self.tokenizer)
        if not self._places.take(may_wait=False):
            if self.when_full == "refuse":
                raise EngineFullError(f"{self.max_waiting} rows wait already (max_waiting). Try again later.")
            await self._place()
        return await asyncio.wrap_future(self._enter(example, timeout_ms))

    def statistics(self) -> EngineStatistics:
        """What the engine has done since its start or its last `reload`."""
        waiting = self._flow.scheduler.waiting()
        waiting[0] += self._arrivals.qsize()
        return self._recorder.statistics(waiting, self.monitor.audit_report(), self.monitor.drift_report())

    def reload(self, model: Any, tokenizer: Any = None) -> None:
        """Goes on with another model. Rows submitted before are answered by the old one, none is lost.

        Args:
            model: As for the engine; what the engine was told of thresholds holds for it, too.
            tokenizer (*optional*): The new model's; by default the one that is used now.

        Raises:
            EngineClosedError, EngineBrokenError: There is nothing to reload.
            TypeError, ValueError: A model that cannot be served; the old one stays.
        """
        _staged(model, self._decisions)
        check_tokenizer(tokenizer)
        done: Future[None] = Future()
        with self._admission:
            self._check_open()
            self._arrivals.put(_Reload(model, tokenizer or self.tokenizer, done))
        done.result()

    def close(self, drain: bool = True) -> None:
        """Takes no more rows.

        Args:
            drain (`bool`): Whether to answer those that wait; else they are cancelled.
        """
        with self._admission:
            self._is_closing = True
        if not drain:
            self._cancel_all()
        self._arrivals.put(_Wake())
        if self._worker is not threading.current_thread():
            self._worker.join()

    def __enter__(self) -> "ExitsEngine":
        return self

    def __exit__(self, kind: Any, *exception: object) -> None:
        self.close(drain=kind is None)

    @property
    def is_alive(self) -> bool:
        """Whether rows are answered."""
        return self._cause is None and not self._is_closing

    # Entering

    def _enter(self, example: Example, timeout_ms: float | None) -> "Future[EngineAnswer]":
        now = time.monotonic()
        future = AnswerFuture(self._give_up)
        deadline = float("inf") if timeout_ms is None else now + timeout_ms / 1000
        request = Request(-1, 0, deadline, example=example, future=future, arrived=now)
        with self._admission:
            try:
                self._check_open()
            except (EngineClosedError, EngineBrokenError):
                self._places.free()
                raise
            request.number = future.number = next(self._numbers)
            self._held[request.number] = request
            self._arrivals.put(request)
        return future

    async def _place(self) -> None:
        """Waits for a place; a coroutine that is cancelled meanwhile keeps none."""
        taking = asyncio.ensure_future(asyncio.to_thread(self._places.take, True))
        try:
            await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(lambda _: self._places.free())
            raise

    def _give_up(self, number: int) -> None:
        """Its caller cancelled a row; what has become of it is dropped at the next stage."""
        request = self._forget(number)
        if request is not None:
            request.future.set_running_or_notify_cancel()
            self._recorder.note_cancelled()

    def _check_open(self) -> None:
        if self._cause is not None:
            raise EngineBrokenError("the engine's worker died; make a new engine.") from self._cause
        if self._is_closing:
            raise EngineClosedError("the engine was closed: make a new one.")

    def _cancel_all(self) -> None:
        for request in list(self._held.values()):
            request.future.cancel()

    # The worker

    def _work(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:
            logger.error("the engine's worker died: %r", error)
            self._break(error)

    def _break(self, error: BaseException) -> None:
        with self._admission:
            self._cause = error
        for request in list(self._held.values()):
            failure = EngineBrokenError("the engine's worker died before the answer was there.")
            failure.__cause__ = error
            self._fail(request, failure)
        for arrival in self._drained():
            if isinstance(arrival, _Reload):
                arrival.done.set_exception(EngineBrokenError("the engine's worker died."))

    def _step(self) -> bool:
        """Runs the best batch, or waits for rows; False when all is done."""
        self._admit(self._drained())
        self._give_up_late()
        self.monitor.look(next(iter(self._admitted), float("inf")))
        choice = self._flow.scheduler.choose(time.monotonic(), self._is_closing)
        if choice is not None:
            self._run(*choice)
        elif self._is_closing and not self._held and self._arrivals.empty():
            return False
        elif not self._audit_one():
            self._admit(self._awaited())
        return True

    def _drained(self, count: int = _READ_AT_ONCE) -> list[Any]:
        """What has arrived."""
        arrivals: list[Any] = []
        while len(arrivals) < count:
            try:
                arrivals.append(self._arrivals.get_nowait())
            except queue.Empty:
                break
        return arrivals

    def _awaited(self) -> list[Any]:
        """What arrives next, if it does before rows that wait are due."""
        due = min(self._flow.scheduler.due(), self._next_deadline())
        try:
            wait = due - time.monotonic()
            first = self._arrivals.get(timeout=None if wait == float("inf") else max(wait, 0))
        except queue.Empty:
            return []
        return [first, *self._drained(_READ_AT_ONCE - 1)]

    def _admit(self, arrivals: Sequence[Any]) -> None:
        requests: list[Request] = []
        for arrival in arrivals:
            if isinstance(arrival, Request):
                requests.append(arrival)
            elif isinstance(arrival, _Reload):
                self._read(requests)
                requests = []
                self._change_model(arrival)
        self._read(requests)

    def _read(self, requests: list[Request]) -> None:
        for request in requests:
            if request.deadline < float("inf"):
                heapq.heappush(self._deadlines, (request.deadline, request.number, request))
        if len(self._deadlines) > 2 * len(self._held) + _FEW:
            # Most are answered long before their deadline: they are not kept until then.
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._held]
            heapq.heapify(self._deadlines)
        wanted = [request for request in requests if request.number in self._held]
        self._admitted |= {request.number: request for request in wanted}
        for group in self._reader.groups(wanted):
            self._read_group(group)

    def _read_group(self, group: list[Request]) -> None:
        try:
            examples = self._reader.read([request.example for request in group])
            for number, request in enumerate(group):
                request.length, request.source = int(examples.lengths[number]), (examples, number)
            self._flow.start(group, examples, np.arange(len(group)))
        except Exception as error:
            self._one_by_one(group, error, lambda request: self._read_group([request]))

    def _one_by_one(self, requests: list[Request], error: Exception, again: Any) -> None:
        """What failed for several rows is tried for each, so that only those fail that are at fault."""
        if len(requests) == 1:
            self._fail(requests[0], error)
            return
        for request in requests:
            again(request)

    def _run(self, stage: int, rows: list[Any]) -> None:
        held = self._held
        if not all(row.number in held for row in rows):
            rows = self._without_gone(rows)
        if not rows:
            return
        try:
            left, answers = self._flow.run(stage, rows)
            arrays = self._flow.model.as_arrays(answers)
        except Exception as error:
            if len(rows) == 1:
                self._flow.drop(rows[0])
            self._one_by_one(rows, error, lambda row: self._run(stage, [row]))
            return
        self._recorder.note_batch(stage, len(rows))
        self._answer(left, arrays)

    def _answer(self, rows: list[Any], arrays: RowAnswers) -> None:
        now, taken, answered = time.monotonic(), arrays.taken, []
        is_number, exits = (~np.isnan(taken).any(axis=1)).tolist(), arrays.exit_index.tolist()
        for position, row in enumerate(rows):
            if not is_number[position]:
                self._fail(row, NotANumberError("the model answered NaN: look for NaN in its weights."))
                continue
            depth = self._exit_layers[exits[position]]
            answer = EngineAnswer(taken[position], arrays.logits[position], exits[position], depth, row.length)
            if self._finish(row, answer):
                answered.append(position)
        if len(answered) < len(rows):
            rows, arrays = [rows[position] for position in answered], arrays.select(answered)
        self._recorder.note_answers(rows, arrays.exit_index.tolist(), now)
        self.monitor.note(rows, arrays)

    def _finish(self, request: Request, answer: EngineAnswer) -> bool:
        """Whether somebody still wanted the answer."""
        self._admitted.pop(request.number, None)
        if self._forget(request.number) is None:
            return False
        try:
            request.future.set_result(answer)
        except InvalidStateError:
            self._note_cancelled(request)
            return False
        return True

    def _fail(self, request: Request, error: BaseException) -> None:
        self._admitted.pop(request.number, None)
        if self._forget(request.number) is None:
            return
        try:
            request.future.set_exception(error)
            self._recorder.note_failure(error)
        except InvalidStateError:
            self._note_cancelled(request)

    def _note_cancelled(self, request: Request) -> None:
        """The caller was about to give the row up, but the worker had already taken it out."""
        request.future.set_running_or_notify_cancel()
        self._recorder.note_cancelled()

    def _forget(self, number: int) -> Request | None:
        """The row, if it was still held; only one thread is given it."""
        request = self._held.pop(number, None)
        if request is not None:
            self._places.free()
        return request

    def _without_gone(self, rows: list[Any]) -> list[Any]:
        """The rows that somebody still waits for; the others are dropped."""
        wanted = []
        for row in rows:
            if row.number in self._held:
                wanted.append(row)
            else:
                self._admitted.pop(row.number, None)
                self._flow.drop(row)
        return wanted

    def _give_up_late(self) -> None:
        now = time.monotonic()
        while self._next_deadline() <= now:
            request = heapq.heappop(self._deadlines)[2]
            self._fail(request, DeadlineExceededError("the answer was not ready in time (timeout_ms)."))

    def _next_deadline(self) -> float:
        while self._deadlines and self._deadlines[0][1] not in self._held:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else float("inf")

    # Models

    def _use(self, model: Any, tokenizer: Any) -> None:
        staged = _staged(model, self._decisions)
        self.model, self.tokenizer = model, tokenizer
        self._exit_layers = list(model.config.exit_layers)
        self._flow = make_flow(staged, self.max_batch_size, self.max_wait, time.monotonic)
        self._reader = Reader(staged, tokenizer, getattr(model.config, "max_position_embeddings", None))
        self.monitor = Monitor(model.config, self._decisions, **self._watch)

    def _change_model(self, asked: _Reload) -> None:
        while (choice := self._flow.scheduler.choose(time.monotonic(), is_closing=True)) is not None:
            self._run(*choice)
        try:
            self._use(asked.model, asked.tokenizer)
            self._recorder.reset(self._exit_layers, self._flow.model.stages)
        except Exception as error:
            asked.done.set_exception(error)
        else:
            asked.done.set_result(None)

    def _audit_one(self) -> bool:
        """Runs an answered row to the last exit; False if there is none. One at a time: rows may come."""
        audited = self.monitor.next_audit()
        if audited is None:
            return False
        assert audited.request.source is not None, "rows are read before they are answered"
        examples, number = audited.request.source
        staged = self._flow.model
        whole = staged.as_arrays(staged.run_whole(staged.start(examples, np.array([number]))))
        decisions = self.monitor.note_audit(audited, whole.taken[0])
        if decisions is not None:
            self._flow.model = self.model.staged(**decisions)
        return True


def make_flow(staged: Any, max_batch_size: int, max_wait: float, clock: Callable[[], float]) -> StagedFlow[Any, Any]:
    """A model's stages with the scheduler of an engine.

    Args:
        staged (`StagedModel`): The model.
        max_batch_size (`int`): Rows of a batch at most.
        max_wait (`float`): Seconds for which a row waits for others at most.
        clock (`Callable[[], float]`): The time in seconds.
    """
    tokens = _COST_OF_STARTS * staged.start_cost
    scheduler = StageScheduler(staged.stages, max_batch_size, staged.start_cost, max_wait, max_tokens=tokens)
    return StagedFlow(staged, scheduler, clock)


def _check_request(example: Any, timeout_ms: Any, tokenizer: Any) -> None:
    """Raises `TypeError` or `ValueError` for what cannot be asked."""
    check_example(example, tokenizer is not None)
    if timeout_ms is not None:
        check_at_least("timeout_ms", timeout_ms, 0)


def _staged(model: Any, decisions: dict[str, Any]) -> Any:
    if not callable(getattr(model, "staged", None)):
        raise TypeError(
            f"the engine needs a classifier with exits, a cascade or an exported one, got {type(model).__name__}. "
            "Load it with AutoModelForSequenceClassificationWithExits.from_pretrained(...)."
        )
    return model.staged(**decisions)
