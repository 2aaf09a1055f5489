"""Open-loop load on an engine in this process: requests come whether earlier ones are answered or not."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hf_adaptive.modeling.answers import Answers
from hf_adaptive.modeling.scheduling import StageResult, WaitingRow
from hf_adaptive.serving import ExitsEngine
from hf_adaptive.serving.engine import make_flow

# Mean number of requests that come together in a burst. Of 16 together, the last would wait for longer than the limit
# whatever answers them: a limit of four texts' time has room for bursts of a few.
BURST = 4
# After so many times the point's seconds, an engine that is still behind is given up.
_PATIENCE = 3


@dataclass(frozen=True)
class Point:
    """One rate, measured.

    Args:
        rate (`float`): Requests a second, as asked for.
        answered (`float`): Answers a second, until the last one.
        p50_ms, p99_ms (`float`): Of the time from when a request was to come to its answer.
        requests (`int`): How many.
        exits (`dict[int, int]`): Rows by layers run.
        batches (`list[float]`): Mean rows of a batch, by stage.
    """

    rate: float
    answered: float
    p50_ms: float
    p99_ms: float
    requests: int
    exits: dict[int, int] = field(default_factory=dict)
    batches: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def arrivals(rate: float, seconds: float, bursts: bool, seed: int) -> np.ndarray:
    """Times at which requests come: a Poisson process, or bursts that come as one.

    Args:
        rate (`float`): Requests a second on average.
        seconds (`float`): For so long.
        bursts (`bool`): Whether several come at once, geometrically many, `BURST` on average.
        seed (`int`): The same times for every contender.
    """
    random = np.random.default_rng(seed)
    count = max(8, int(rate * seconds))
    if not bursts:
        return random.exponential(1 / rate, count).cumsum()
    sizes = random.geometric(1 / BURST, count)
    starts = random.exponential(BURST / rate, count).cumsum()
    return np.repeat(starts, sizes)[:count]


@dataclass(frozen=True)
class Contender:
    """A way to serve.

    Args:
        model: What has `staged(...)`.
        thresholds (`list[float]`, *optional*): For its exits.
        max_batch_size (`int`), max_wait_ms (`float`): As of an engine.
    """

    model: Any
    thresholds: list[float] | None = None
    max_batch_size: int = 32
    max_wait_ms: float = 2.0

    def engine(self) -> ExitsEngine:
        """A new one."""
        return ExitsEngine(
            self.model,
            self.max_batch_size,
            self.max_wait_ms,
            exit_thresholds=self.thresholds,
            max_waiting=10**6,
            audit_share=0.0,
        )


def measure(contender: Contender, texts: Sequence[Any], times: np.ndarray, hopeless_ms: float = float("inf")) -> Point:
    """Sends a request at each of the times, and waits for the answers.

    Args:
        contender (`Contender`): What answers.
        texts (`Sequence`): Tokenised rows, asked for in turn.
        times (`np.ndarray`): When each request comes, in seconds.
        hopeless_ms (`float`): No more is sent once so much lies between a request's time and its answer for more than
            one in a hundred of all.
    """
    finished = np.full(len(times), np.nan)
    late = LateAnswers(finished, hopeless_ms / 1000)
    with contender.engine() as engine:
        start = late.start = time.perf_counter()
        for number, due in enumerate(times.tolist()):
            while (wait := start + due - time.perf_counter()) > 0:
                time.sleep(wait)
            if late.count > len(times) / 100:
                times = times[:number]
                break
            engine.submit(texts[number % len(texts)]).add_done_callback(late.noting(number, due))
        engine.close()
        done = engine.statistics()
    finished = finished[: len(times)] - start
    return _point(times, finished, done.exits, [mean_size(sizes) for sizes in done.batches])


class LateAnswers:
    """When answers came, and how many came late.

    Args:
        finished (`np.ndarray`): Where the times are written.
        limit (`float`): Seconds after which one is late.
    """

    def __init__(self, finished: np.ndarray, limit: float):
        self.finished = finished
        self.limit = limit
        self.start = 0.0
        self.count = 0

    def noting(self, number: int, due: float) -> Callable[[Any], None]:
        """What is called when the answer to a request is there."""

        def note(_: Any) -> None:
            now = self.finished[number] = time.perf_counter()
            self.count += now - self.start - due > self.limit

        return note


def simulate(
    contender: Contender, texts: Sequence[Any], times: np.ndarray, hopeless_ms: float = float("inf")
) -> Point:
    """The same requests, in the time that the processor spends on them instead of that on the wall.

    Batches are chosen by the engine's scheduler and really run; the clock is moved on by the processor time of each,
    so that other programs on the machine take nothing away. Threads, and what comes between, are not measured.
    """
    clock = [0.0]
    staged = contender.model.staged(exit_thresholds=contender.thresholds)
    flow = make_flow(staged, contender.max_batch_size, contender.max_wait_ms / 1000, lambda: clock[0])
    finished, sizes = np.full(len(times), np.nan), [Counter() for _ in range(staged.stages)]
    exits: Counter[int] = Counter()
    coming = 0
    while np.isnan(finished).any() and clock[0] < times[-1] * (1 + _PATIENCE):
        if (finished - times > hopeless_ms / 1000).sum() > len(times) / 100:
            break
        before = time.process_time()
        last = int(np.searchsorted(times, clock[0], side="right"))
        if last > coming:
            examples = staged.read([texts[number % len(texts)] for number in range(coming, last)])
            rows = [WaitingRow(coming + place, int(length)) for place, length in enumerate(examples.lengths)]
            flow.start(rows, examples, np.arange(len(rows)))
            coming = last
        choice = flow.scheduler.choose(clock[0], is_closing=False)
        if choice is None:
            clock[0] = min(flow.scheduler.due(), times[coming] if coming < len(times) else np.inf)
            continue
        left, answers = flow.run(*choice)
        clock[0] += time.process_time() - before
        sizes[choice[0]][len(choice[1])] += 1
        finished[[row.number for row in left]] = clock[0]
        exits.update(staged.as_arrays(answers).exit_index.tolist())
    depths = contender.model.config.exit_layers
    shares = {depths[index]: count for index, count in sorted(exits.items())}
    return _point(times, finished, shares, [mean_size(one) for one in sizes])


def _point(times: np.ndarray, finished: np.ndarray, exits: dict[int, int], batches: list[float]) -> Point:
    latency = 1000 * np.nan_to_num(finished - times, nan=_PATIENCE * times[-1])
    return Point(
        rate=len(times) / times[-1],
        answered=float(np.isfinite(finished).sum() / np.nanmax(finished)),
        p50_ms=float(np.percentile(latency, 50)),
        p99_ms=float(np.percentile(latency, 99)),
        requests=len(times),
        exits=exits,
        batches=batches,
    )


def mean_size(sizes: dict[int, int]) -> float:
    """Mean rows of a batch; 0 where none was run."""
    batches = sum(sizes.values())
    return sum(size * count for size, count in sizes.items()) / batches if batches else 0.0


class WithoutRegrouping:
    """A model whose batches are run on as they are until all their rows have left: early exit per batch.

    Args:
        model: A classifier with exits.
    """

    def __init__(self, model: Any):
        self.model, self.config = model, model.config

    def staged(self, **decisions: Any) -> "_OneStage":
        """The model as a single stage."""
        return _OneStage(self.model.staged(**decisions))


class _OneStage:
    stages = 1

    def __init__(self, staged: Any):
        self.staged = staged

    def __getattr__(self, name: str) -> Any:
        return getattr(self.staged, name)

    def run(self, stage: int, batch: Any) -> StageResult:
        """Runs a batch to its end."""
        rows, order, parts = list(range(len(batch))), [], []
        while batch is not None:
            result = self.staged.run(stage, batch)
            order += [rows[position] for position in result.leaving]
            parts.append(result.answers)
            rows = [rows[position] for position in result.staying]
            stage, batch = result.stage, result.batch
        return StageResult(order, Answers.joined(parts))
