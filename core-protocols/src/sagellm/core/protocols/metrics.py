"""Where measurements go: one small protocol, and the sinks that it can mean.

A package asks `get_metrics()` for instruments when it is built, and records into them; what
that costs is decided by the application, which calls `set_metrics` once. The default keeps
nothing and costs one attribute lookup and an empty call.

Names that several packages record are declared here, with their unit in the name, and nowhere
else. Labels have few values each: names of backends, operations and error codes, never ranks,
keys, addresses or sizes; an instrument that is given more than `MAX_SERIES` combinations
counts the rest under `other`.
"""

from __future__ import annotations

import bisect
import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TextIO

from ._metrics_api import (
    ALL_METRICS as ALL_METRICS,
    BYTES_BUCKETS as BYTES_BUCKETS,
    COMM_BYTES as COMM_BYTES,
    COMM_CALLS as COMM_CALLS,
    COMM_ERRORS as COMM_ERRORS,
    COMM_IN_FLIGHT as COMM_IN_FLIGHT,
    COMM_SECONDS as COMM_SECONDS,
    DETECT_SECONDS as DETECT_SECONDS,
    GROUP_BYTES as GROUP_BYTES,
    GROUP_CALLS as GROUP_CALLS,
    GROUP_ERRORS as GROUP_ERRORS,
    GROUP_IN_FLIGHT as GROUP_IN_FLIGHT,
    GROUP_SECONDS as GROUP_SECONDS,
    GROUP_WAIT_SECONDS as GROUP_WAIT_SECONDS,
    KV_PAYLOAD_BYTES as KV_PAYLOAD_BYTES,
    KV_TRANSFER_SECONDS as KV_TRANSFER_SECONDS,
    KV_TRANSFERS as KV_TRANSFERS,
    KV_WIRE_BYTES as KV_WIRE_BYTES,
    MAX_SERIES as MAX_SERIES,
    OVERLAP_HIDDEN_SECONDS as OVERLAP_HIDDEN_SECONDS,
    OVERLAP_RUNS as OVERLAP_RUNS,
    SECONDS_BUCKETS as SECONDS_BUCKETS,
    Counter as Counter,
    Gauge as Gauge,
    Histogram as Histogram,
    LabelGuard,
    Metric as Metric,
    MetricRow as MetricRow,
    MetricSource as MetricSource,
    MetricsSink as MetricsSink,
    buckets_for,
)
from ._metrics_export import (
    OpenTelemetryMetrics as OpenTelemetryMetrics,
    PrometheusMetrics as PrometheusMetrics,
)
from ._metrics_groups import group_metrics as group_metrics
from .errors import ConfigError

__all__ = [
    "ALL_METRICS",
    "BYTES_BUCKETS",
    "COMM_BYTES",
    "COMM_CALLS",
    "COMM_ERRORS",
    "COMM_IN_FLIGHT",
    "COMM_SECONDS",
    "DETECT_SECONDS",
    "GROUP_BYTES",
    "GROUP_CALLS",
    "GROUP_ERRORS",
    "GROUP_IN_FLIGHT",
    "GROUP_SECONDS",
    "GROUP_WAIT_SECONDS",
    "KV_PAYLOAD_BYTES",
    "KV_TRANSFERS",
    "KV_TRANSFER_SECONDS",
    "KV_WIRE_BYTES",
    "MAX_SERIES",
    "OVERLAP_HIDDEN_SECONDS",
    "OVERLAP_RUNS",
    "SECONDS_BUCKETS",
    "Counter",
    "Gauge",
    "Histogram",
    "InMemoryMetrics",
    "JsonMetrics",
    "Metric",
    "MetricRow",
    "MetricSource",
    "MetricsSink",
    "NoMetrics",
    "OpenTelemetryMetrics",
    "PrometheusMetrics",
    "counter",
    "gauge",
    "get_metrics",
    "group_metrics",
    "histogram",
    "set_metrics",
]


def counter(metric: Metric, sink: MetricsSink | None = None) -> Counter:
    """The counter of a declared metric, in `sink` or the one that is set."""
    _expect(metric, "counter")
    return (sink or get_metrics()).counter(metric.name, metric.description, metric.labels)


def histogram(metric: Metric, sink: MetricsSink | None = None) -> Histogram:
    """The histogram of a declared metric, in `sink` or the one that is set."""
    _expect(metric, "histogram")
    return (sink or get_metrics()).histogram(
        metric.name, metric.description, metric.unit, metric.labels
    )


def gauge(metric: Metric, sink: MetricsSink | None = None) -> Gauge:
    """The gauge of a declared metric, in `sink` or the one that is set."""
    _expect(metric, "gauge")
    return (sink or get_metrics()).gauge(metric.name, metric.description, metric.labels)


def _expect(metric: Metric, kind: str) -> None:
    if metric.kind != kind:
        raise ConfigError(f"{metric.name} is a {metric.kind}, not a {kind}")


# -- nothing ------------------------------------------------------------------------------


class _Nothing:
    """Every instrument at once, keeping nothing."""

    __slots__ = ()

    def add(self, value: float = 1, **labels: str) -> None:
        """Keep nothing."""

    def observe(self, value: float, **labels: str) -> None:
        """Keep nothing."""

    def set(self, value: float, **labels: str) -> None:
        """Keep nothing."""


_NOTHING: Final = _Nothing()


class NoMetrics:
    """The default sink: instruments that do nothing."""

    def counter(self, name: str, description: str, labels: Sequence[str] = ()) -> Counter:
        """A counter that keeps nothing."""
        return _NOTHING

    def histogram(
        self,
        name: str,
        description: str,
        unit: str = "s",
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] | None = None,
    ) -> Histogram:
        """A histogram that keeps nothing."""
        return _NOTHING

    def gauge(self, name: str, description: str, labels: Sequence[str] = ()) -> Gauge:
        """A gauge that keeps nothing."""
        return _NOTHING


# -- in memory ----------------------------------------------------------------------------


@dataclass(slots=True)
class _Series:
    value: float = 0.0
    count: int = 0
    buckets: list[int] = field(default_factory=list)


class _Instrument:
    """One instrument of `InMemoryMetrics`, whatever its kind."""

    def __init__(self, metric: Metric, buckets: Sequence[float], lock: threading.Lock) -> None:
        self.metric = metric
        self.bounds = tuple(buckets)
        self.series: dict[tuple[str, ...], _Series] = {}
        self._labels = LabelGuard(metric.name, metric.labels)
        self._lock = lock

    def add(self, value: float = 1, **labels: str) -> None:
        """Change the series by `value`."""
        if self.metric.kind == "counter" and not value >= 0:
            raise ConfigError(f"counter {self.metric.name} only grows; it was given {value}")
        with self._lock:
            self._at(labels).value += value

    def set(self, value: float, **labels: str) -> None:
        """Replace the value of the series."""
        with self._lock:
            self._at(labels).value = value

    def observe(self, value: float, **labels: str) -> None:
        """Count one observation."""
        with self._lock:
            series = self._at(labels)
            if not series.buckets:
                series.buckets = [0] * (len(self.bounds) + 1)
            series.buckets[bisect.bisect_left(self.bounds, value)] += 1
            series.count += 1
            series.value += value

    def _at(self, labels: Mapping[str, str]) -> _Series:
        key = self._labels(labels)
        found = self.series.get(key)
        if found is None:
            found = self.series[key] = _Series()
        return found

    def rows(self) -> list[dict[str, object]]:
        """The series as JSON-like rows; the caller holds the lock."""
        rows: list[dict[str, object]] = []
        for key, series in self.series.items():
            row: dict[str, object] = {
                "name": self.metric.name,
                "kind": self.metric.kind,
                "labels": dict(zip(self.metric.labels, key, strict=True)),
            }
            if self.metric.kind == "histogram":
                bounds = [*self.bounds, math.inf]
                row |= {
                    "unit": self.metric.unit,
                    "count": series.count,
                    "sum": series.value,
                    "buckets": [
                        [None if math.isinf(bound) else bound, n]
                        for bound, n in zip(bounds, series.buckets, strict=True)
                    ],
                }
            else:
                row["value"] = series.value
            rows.append(row)
        return rows


class InMemoryMetrics:
    """Keeps every series in this process, for tests and for looking at. Thread-safe.

    >>> sink = InMemoryMetrics()
    >>> sink.counter("bytes_total", "Bytes.", ["op"]).add(8, op="send")
    >>> sink.value("bytes_total", op="send")
    8.0
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._instruments: dict[str, _Instrument] = {}
        self._sources: list[MetricSource] = []

    def add_source(self, source: MetricSource) -> None:
        """Include what `source` gives in every snapshot, such as `group_metrics(backend)`."""
        with self._lock:
            self._sources.append(source)

    def counter(self, name: str, description: str, labels: Sequence[str] = ()) -> Counter:
        """A counter; the same name gives the same series."""
        return self._instrument(Metric(name, "counter", description, tuple(labels)), ())

    def histogram(
        self,
        name: str,
        description: str,
        unit: str = "s",
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] | None = None,
    ) -> Histogram:
        """A histogram; the same name gives the same series."""
        metric = Metric(name, "histogram", description, tuple(labels), unit)
        return self._instrument(metric, buckets_for(name, unit, buckets))

    def gauge(self, name: str, description: str, labels: Sequence[str] = ()) -> Gauge:
        """A gauge; the same name gives the same series."""
        return self._instrument(Metric(name, "gauge", description, tuple(labels)), ())

    def snapshot(self) -> list[dict[str, object]]:
        """Every series as a row: name, kind, labels, and value, or count, sum and buckets."""
        with self._lock:
            rows = [row for i in self._instruments.values() for row in i.rows()]
            sources = list(self._sources)
        return [*rows, *(row for source in sources for row in source())]

    def value(self, name: str, **labels: str) -> float:
        """Value of a counter or gauge, or sum of a histogram; 0 when nothing was recorded."""
        with self._lock:
            instrument = self._instruments.get(name)
            if instrument is None:
                return 0.0
            key = tuple(labels.get(label, "") for label in instrument.metric.labels)
            series = instrument.series.get(key)
            return series.value if series else 0.0

    def reset(self) -> None:
        """Forget every series; instruments that were handed out go on."""
        with self._lock:
            for instrument in self._instruments.values():
                instrument.series.clear()

    def _instrument(self, metric: Metric, buckets: Sequence[float]) -> _Instrument:
        with self._lock:
            known = self._instruments.get(metric.name)
            if known is None:
                known = self._instruments[metric.name] = _Instrument(metric, buckets, self._lock)
        same = (known.metric.kind, known.metric.labels, known.bounds)
        if same != (metric.kind, metric.labels, tuple(buckets)):
            raise ConfigError(
                f"metric {metric.name} is a {known.metric.kind} with labels "
                f"{list(known.metric.labels)}; it cannot also be a {metric.kind} with labels "
                f"{list(metric.labels)}, or have other buckets"
            )
        return known


# -- JSON ---------------------------------------------------------------------------------


class JsonMetrics(InMemoryMetrics):
    """Writes every series as one JSON line whenever `flush` is called.

    Each line has `time_unix_s` beside what `snapshot` gives. Values are totals since the start
    or the last `reset`, so that a lost line loses nothing.

    Args:
        file: Text file that stays open; the caller owns it.

    """

    def __init__(self, file: TextIO) -> None:
        super().__init__()
        self._file = file
        self._write_lock = threading.Lock()

    def flush(self) -> None:
        """Write the current state of every series, and flush the file."""
        now = time.time()
        rows = self.snapshot()
        with self._write_lock:
            for row in rows:
                self._file.write(json.dumps({"time_unix_s": now, **row}, sort_keys=True) + "\n")
            self._file.flush()


# -- the sink of this process -------------------------------------------------------------

_current: MetricsSink = NoMetrics()


def set_metrics(sink: MetricsSink) -> MetricsSink:
    """Make `sink` the one that objects built from now on record into; returns the former one."""
    global _current
    former, _current = _current, sink
    return former


def get_metrics() -> MetricsSink:
    """The sink that the application has set; `NoMetrics` if it has set none."""
    return _current
