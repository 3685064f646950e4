"""What metrics are made of: the sink's protocol, declared names, and bounds on labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeAlias

from .errors import ConfigError

MAX_SERIES: Final = 256
"""Combinations of label values that one instrument keeps apart."""

SECONDS_BUCKETS: Final = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Upper bounds for durations, one per decade from a microsecond."""

BYTES_BUCKETS: Final = tuple(float(1 << shift) for shift in range(10, 35, 4))
"""Upper bounds for sizes, from 1 KiB to 16 GiB by factors of 16."""


class Counter(Protocol):
    """Only grows. Thread-safe."""

    def add(self, value: float = 1, **labels: str) -> None:
        """Add to the series of these labels; every label of the instrument is given."""
        ...


class Histogram(Protocol):
    """Counts observations per bucket. Thread-safe."""

    def observe(self, value: float, **labels: str) -> None:
        """Record one observation in the instrument's unit."""
        ...


class Gauge(Protocol):
    """Goes up and down. Thread-safe."""

    def set(self, value: float, **labels: str) -> None:
        """Replace the value of the series of these labels."""
        ...

    def add(self, value: float, **labels: str) -> None:
        """Change the value of the series of these labels by `value`, which may be negative."""
        ...


class MetricsSink(Protocol):
    """Makes instruments. Asking twice for a name gives instruments over the same series."""

    def counter(self, name: str, description: str, labels: Sequence[str] = ()) -> Counter:
        """A counter; its name ends with unit and `_total`, as in `sagellm_comm_bytes_total`."""
        ...

    def histogram(
        self,
        name: str,
        description: str,
        unit: str = "s",
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] | None = None,
    ) -> Histogram:
        """A histogram; its name ends with the unit in words, as in `…_seconds`.

        Args:
            name: With the unit at its end.
            description: One sentence.
            unit: `s`, `By` or `1`, as UCUM writes them.
            labels: Names of the labels.
            buckets: Rising upper bounds; None takes decades of seconds, or of bytes for `By`.

        """
        ...

    def gauge(self, name: str, description: str, labels: Sequence[str] = ()) -> Gauge:
        """A gauge."""
        ...


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric that several packages record, declared once.

    Attributes:
        name: Ends with the unit.
        kind: Which instrument it is.
        description: One sentence for dashboards.
        labels: Names of its labels.
        unit: `s`, `By` or `1`, as UCUM writes them.

    """

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    description: str
    labels: tuple[str, ...] = ()
    unit: str = "1"


MetricRow: TypeAlias = "dict[str, Any]"  # JSON
"""One series as `InMemoryMetrics.snapshot` gives it."""

MetricSource: TypeAlias = "Callable[[], Sequence[MetricRow]]"
"""Series that somebody else keeps, asked for whenever a sink is read."""

_CALL = ("backend", "op")
COMM_CALLS: Final = Metric(
    "sagellm_comm_calls_total", "counter", "Calls of communication operations.", _CALL
)
COMM_BYTES: Final = Metric(
    "sagellm_comm_bytes_total", "counter", "Bytes of this rank's inputs.", _CALL, "By"
)
COMM_ERRORS: Final = Metric(
    "sagellm_comm_errors_total", "counter", "Failed calls, by error code.", (*_CALL, "code")
)
COMM_SECONDS: Final = Metric(
    "sagellm_comm_seconds", "histogram", "From the call to its completion here.", _CALL, "s"
)
COMM_IN_FLIGHT: Final = Metric(
    "sagellm_comm_in_flight", "gauge", "Asynchronous calls not yet done.", ("backend",)
)
_GROUP = ("backend", "group", "op")
_GROUP_CELL = (*_GROUP, "algorithm", "bucket")
GROUP_CALLS: Final = Metric(
    "sagellm_comm_group_calls_total", "counter", "Finished calls.", _GROUP_CELL
)
GROUP_BYTES: Final = Metric(
    "sagellm_comm_group_bytes_total", "counter", "Bytes of this rank's inputs.", _GROUP_CELL, "By"
)
GROUP_SECONDS: Final = Metric(
    "sagellm_comm_group_seconds",
    "histogram",
    "From the call to its completion here; bucket is the smallest size in bytes.",
    _GROUP_CELL,
    "s",
)
GROUP_WAIT_SECONDS: Final = Metric(
    "sagellm_comm_group_wait_seconds_total",
    "counter",
    "The part of the time that was spent waiting for other ranks.",
    _GROUP_CELL,
    "s",
)
GROUP_ERRORS: Final = Metric("sagellm_comm_group_errors_total", "counter", "Failed calls.", _GROUP)
GROUP_IN_FLIGHT: Final = Metric(
    "sagellm_comm_group_in_flight", "gauge", "Asynchronous calls not yet done.", _GROUP[:2]
)
KV_TRANSFERS: Final = Metric(
    "sagellm_kv_transfers_total",
    "counter",
    "Ended transfers, by status and error code.",
    ("direction", "status", "code"),
)
KV_PAYLOAD_BYTES: Final = Metric(
    "sagellm_kv_payload_bytes_total",
    "counter",
    "KV bytes as they lie in memory.",
    ("direction", "transport"),
    "By",
)
KV_WIRE_BYTES: Final = Metric(
    "sagellm_kv_wire_bytes_total",
    "counter",
    "KV bytes as they cross the wire, headers included.",
    ("direction", "transport"),
    "By",
)
KV_TRANSFER_SECONDS: Final = Metric(
    "sagellm_kv_transfer_seconds",
    "histogram",
    "From the request of a transfer to its end.",
    ("direction", "transport"),
    "s",
)
OVERLAP_RUNS: Final = Metric(
    "sagellm_overlap_runs_total", "counter", "Runs of an overlap manager.", ("mode", "status")
)
OVERLAP_HIDDEN_SECONDS: Final = Metric(
    "sagellm_overlap_hidden_seconds",
    "histogram",
    "Communication time that ran beside compute, per run.",
    ("mode",),
    "s",
)
DETECT_SECONDS: Final = Metric(
    "sagellm_topology_detect_seconds", "histogram", "Time of one detector.", ("detector",), "s"
)

ALL_METRICS: Final = (
    COMM_CALLS,
    COMM_BYTES,
    COMM_ERRORS,
    COMM_SECONDS,
    COMM_IN_FLIGHT,
    GROUP_CALLS,
    GROUP_BYTES,
    GROUP_SECONDS,
    GROUP_WAIT_SECONDS,
    GROUP_ERRORS,
    GROUP_IN_FLIGHT,
    KV_TRANSFERS,
    KV_PAYLOAD_BYTES,
    KV_WIRE_BYTES,
    KV_TRANSFER_SECONDS,
    OVERLAP_RUNS,
    OVERLAP_HIDDEN_SECONDS,
    DETECT_SECONDS,
)
"""Every metric that is declared here."""


class LabelGuard:
    """Turns the labels of a call into a tuple, and bounds how many different ones there are."""

    __slots__ = ("_known", "labels", "name")

    def __init__(self, name: str, labels: Sequence[str]) -> None:
        self.name = name
        self.labels = tuple(labels)
        self._known: set[tuple[str, ...]] = set()

    def __call__(self, given: Mapping[str, str]) -> tuple[str, ...]:
        """Values in the instrument's order, or `other` for each once there are too many.

        Raises:
            ConfigError: A label is missing, or the instrument has none of that name.

        """
        if len(given) != len(self.labels) or any(label not in given for label in self.labels):
            raise ConfigError(
                f"metric {self.name} has labels {list(self.labels)}, but was given {sorted(given)}"
            )
        key = tuple(str(given[label]) for label in self.labels)
        if key not in self._known:
            if len(self._known) >= MAX_SERIES:
                return ("other",) * len(self.labels)
            self._known.add(key)
        return key


def buckets_for(name: str, unit: str, buckets: Sequence[float] | None) -> tuple[float, ...]:
    """Bounds of a histogram: those given, or the default ones of the unit.

    Raises:
        ConfigError: They do not rise.

    """
    if buckets is None:
        return BYTES_BUCKETS if unit == "By" else SECONDS_BUCKETS
    bounds = tuple(float(b) for b in buckets)
    if any(b <= a for a, b in itertools.pairwise(bounds)) or not bounds:
        raise ConfigError(f"buckets of {name} must rise and not be empty: {list(bounds)}")
    return bounds
