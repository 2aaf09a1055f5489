"""What Prometheus reads (extra `serve`)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError('metrics need prometheus_client: pip install "hf_adaptive[serve]"') from error

from .statistics import EngineStatistics

_PREFIX = "hf_adaptive"
_PATHS = ("/", "/classify", "/health", "/metrics")
_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """Counts requests, and shows an engine's statistics.

    Args:
        statistics (`Callable[[], EngineStatistics]`): Of the engine.
    """

    def __init__(self, statistics: Callable[[], EngineStatistics]):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(statistics))
        names = ("path", "status")
        self._requests = Counter(f"{_PREFIX}_requests", "HTTP requests.", names, registry=self._registry)
        self._seconds = Histogram(
            f"{_PREFIX}_request_seconds", "Time to answer a request.", buckets=_BUCKETS, registry=self._registry
        )

    def note_request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        # Any path may be asked for; each would be a time series.
        self._requests.labels(path if path in _PATHS else "other", str(status)).inc()
        if path in ("/", "/classify"):
            self._seconds.observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """Everything in Prometheus' text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _EngineCollector(Collector):
    def __init__(self, statistics: Callable[[], EngineStatistics]):
        self._statistics = statistics

    def describe(self) -> Iterator[Metric]:
        """Nothing: names do not depend on what is measured."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All metrics of the engine."""
        now = self._statistics()
        yield _by_label(CounterMetricFamily, "rows", "Rows answered.", "layers_run", now.exits)
        yield _by_label(CounterMetricFamily, "rows_failed", "Rows without an answer.", "error", now.failed)
        yield CounterMetricFamily(f"{_PREFIX}_rows_cancelled", "Rows given up by their callers.", now.cancelled)
        waiting = dict(enumerate(now.waiting))
        yield _by_label(GaugeMetricFamily, "rows_waiting", "Rows that wait.", "stage", waiting)
        batches = {stage: sum(sizes.values()) for stage, sizes in enumerate(now.batches)}
        rows = {stage: sum(k * n for k, n in sizes.items()) for stage, sizes in enumerate(now.batches)}
        yield _by_label(CounterMetricFamily, "batches", "Batches run.", "stage", batches)
        yield _by_label(CounterMetricFamily, "batched_rows", "Rows in them.", "stage", rows)
        yield from self._latency(now)
        yield GaugeMetricFamily(f"{_PREFIX}_tokens_per_second", "Over ten seconds.", now.tokens_per_second)
        yield from self._promise(now)

    def _latency(self, now: EngineStatistics) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            f"{_PREFIX}_row_seconds", "From submission to answer.", labels=("layers_run", "quantile")
        )
        for depth, percentiles in now.latency_ms.items():
            for name, milliseconds in percentiles.items():
                family.add_metric((str(depth), f"0.{name[1:]}"), milliseconds / 1000)
        yield family

    def _promise(self, now: EngineStatistics) -> Iterator[Metric]:
        audit, drift = now.audit, now.drift
        yield CounterMetricFamily(f"{_PREFIX}_audited_rows", "Rows run to the last exit.", audit["rows"])
        yield CounterMetricFamily(f"{_PREFIX}_other_answers", "Audited rows it differs on.", audit["other_answers"])
        yield GaugeMetricFamily(f"{_PREFIX}_bound_broken", "1: more than calibrated.", int(audit["is_broken"]))
        yield GaugeMetricFamily(f"{_PREFIX}_drift", "1: rows are no longer as calibrated.", int(drift["is_drifting"]))


def _by_label(family: type, name: str, text: str, label: str, values: Mapping[Any, float]) -> Metric:
    made = family(f"{_PREFIX}_{name}", text, labels=(label,))
    for key, value in values.items():
        made.add_metric((str(key),), value)
    return made
