"""What an engine has done so far."""

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .requests import Request

# Answers of each exit whose latency is remembered.
_REMEMBERED = 4096
# Seconds over which rows and tokens a second are counted.
_WINDOW = 10.0
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class EngineStatistics:
    """A look at an engine.

    Args:
        answered (`int`): Rows answered.
        failed (`dict[str, int]`): Rows without an answer, by the error's name.
        cancelled (`int`): Rows that their callers cancelled.
        exits (`dict[int, int]`): Rows answered, by layers run.
        waiting (`list[int]`): Rows that wait now, by stage.
        batches (`list[dict[int, int]]`): By stage, how often a batch of each size was run.
        latency_ms (`dict[int, dict[str, float]]`): By layers run, percentiles of the time from submission to answer
            over the latest rows.
        rows_per_second, tokens_per_second (`float`): Answered over the last ten seconds.
        audit (`dict`): See [`AuditReport`].
        drift (`dict`): See [`DriftReport`].
    """

    answered: int
    failed: dict[str, int]
    cancelled: int
    exits: dict[int, int]
    waiting: list[int]
    batches: list[dict[int, int]]
    latency_ms: dict[int, dict[str, float]]
    rows_per_second: float
    tokens_per_second: float
    audit: dict[str, Any] = field(default_factory=dict)
    drift: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Recorder:
    """Counts what happens; written to by one thread, read by any.

    Args:
        exit_layers (`Sequence[int]`): Layers run before each exit.
        stages (`int`): Number of stages.
    """

    def __init__(self, exit_layers: Sequence[int], stages: int):
        self._lock = threading.Lock()
        self.reset(exit_layers, stages)

    def reset(self, exit_layers: Sequence[int], stages: int) -> None:
        """Starts anew, for another model."""
        with self._lock:
            self.exit_layers = list(exit_layers)
            self._exits = [0] * len(self.exit_layers)
            self._failed: Counter[str] = Counter()
            self._cancelled = 0
            self._batches: list[Counter[int]] = [Counter() for _ in range(stages)]
            self._latency: list[deque[float]] = [deque(maxlen=_REMEMBERED) for _ in self.exit_layers]
            self._recent: deque[tuple[float, int, int]] = deque()

    def note_batch(self, stage: int, size: int) -> None:
        """A batch was run."""
        with self._lock:
            self._batches[stage][size] += 1

    def note_answers(self, rows: Sequence[Request], exits: Sequence[int], now: float) -> None:
        """Rows were answered."""
        with self._lock:
            for row, index in zip(rows, exits):
                self._exits[index] += 1
                self._latency[index].append(now - row.arrived)
            self._recent.append((now, len(rows), sum(row.length for row in rows)))
            self._forget(now)

    def note_failure(self, error: BaseException) -> None:
        """A row got no answer."""
        with self._lock:
            self._failed[type(error).__name__] += 1

    def note_cancelled(self) -> None:
        """A caller wants no answer any more."""
        with self._lock:
            self._cancelled += 1

    def statistics(self, waiting: list[int], audit: dict[str, Any], drift: dict[str, Any]) -> EngineStatistics:
        """All of it so far."""
        with self._lock:
            self._forget(time.monotonic())
            return EngineStatistics(
                answered=sum(self._exits),
                failed=dict(self._failed),
                cancelled=self._cancelled,
                exits=dict(zip(self.exit_layers, self._exits)),
                waiting=waiting,
                batches=[dict(sorted(sizes.items())) for sizes in self._batches],
                latency_ms={
                    depth: _percentiles(seconds) for depth, seconds in zip(self.exit_layers, self._latency) if seconds
                },
                rows_per_second=sum(rows for _, rows, _ in self._recent) / _WINDOW,
                tokens_per_second=sum(tokens for *_, tokens in self._recent) / _WINDOW,
                audit=audit,
                drift=drift,
            )

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    values = np.percentile(np.array(seconds) * 1000, PERCENTILES).tolist()
    return {f"p{percentile}": round(value, 3) for percentile, value in zip(PERCENTILES, values)}
