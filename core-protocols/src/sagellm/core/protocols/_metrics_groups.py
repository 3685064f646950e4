"""The statistics of communication groups as metrics, made when a sink is read.

A call counts into its group and nowhere else; what this costs is paid by the reader.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from ._metrics_api import (
    GROUP_BYTES,
    GROUP_CALLS,
    GROUP_ERRORS,
    GROUP_IN_FLIGHT,
    GROUP_SECONDS,
    GROUP_WAIT_SECONDS,
    SECONDS_BUCKETS,
    LabelGuard,
    Metric,
    MetricRow,
)
from .comm_types import CallStats, CommStats

__all__ = ["group_metrics"]


class _HasStats(Protocol):
    def get_stats(self) -> CommStats:
        """A snapshot of its counters."""
        ...


def group_metrics(*backends: _HasStats) -> Callable[[], list[MetricRow]]:
    """A source of the backends' counters and histograms, for the `add_source` of a sink.

    Labels are backend, group, op, algorithm and bucket; what is beyond `MAX_SERIES` combinations
    is added up under `other`. Resetting a backend's statistics resets its series too.

    >>> group_metrics()()
    []
    """
    guards = {
        m.name: LabelGuard(m.name, m.labels)
        for m in (
            GROUP_CALLS,
            GROUP_BYTES,
            GROUP_SECONDS,
            GROUP_WAIT_SECONDS,
            GROUP_ERRORS,
            GROUP_IN_FLIGHT,
        )
    }

    def rows() -> list[MetricRow]:
        made = _Rows(guards)
        for backend in backends:
            stats = backend.get_stats()
            group = {"backend": stats.backend, "group": stats.group}
            made.add(GROUP_IN_FLIGHT, group, stats.in_flight)
            for op, counts in stats.ops.items():
                made.add(GROUP_ERRORS, {**group, "op": op}, counts.errors)
            for cell in stats.details:
                labels = {
                    **group,
                    "op": cell.op,
                    "algorithm": cell.algorithm,
                    "bucket": str(cell.bucket_bytes),
                }
                made.add(GROUP_CALLS, labels, cell.calls)
                made.add(GROUP_BYTES, labels, cell.bytes)
                if cell.wait_s is not None:
                    made.add(GROUP_WAIT_SECONDS, labels, cell.wait_s)
                made.observe(GROUP_SECONDS, labels, cell)
        return list(made.rows.values())

    return rows


class _Rows:
    """Rows by name and labels; equal ones are added up."""

    def __init__(self, guards: dict[str, LabelGuard]) -> None:
        self.rows: dict[tuple[str, ...], MetricRow] = {}
        self._guards = guards

    def _row(self, metric: Metric, labels: dict[str, str]) -> MetricRow:
        key = self._guards[metric.name](labels)
        row = self.rows.get((metric.name, *key))
        if row is None:
            named = dict(zip(metric.labels, key, strict=True))
            row = {"name": metric.name, "kind": metric.kind, "labels": named}
            self.rows[metric.name, *key] = row
        return row

    def add(self, metric: Metric, labels: dict[str, str], value: float) -> None:
        row = self._row(metric, labels)
        row["value"] = row.get("value", 0) + value

    def observe(self, metric: Metric, labels: dict[str, str], cell: CallStats) -> None:
        row = self._row(metric, labels)
        if "buckets" not in row:
            bounds = [*SECONDS_BUCKETS, None]
            row |= {"unit": "s", "count": 0, "sum": 0.0, "buckets": [[b, 0] for b in bounds]}
        for index, count in _by_decade(cell.histogram):
            row["buckets"][index][1] += count
            row["count"] += count
        row["sum"] += cell.seconds


def _by_decade(histogram: Sequence[int]) -> list[tuple[int, int]]:
    """Counts of a log histogram by index of `SECONDS_BUCKETS`, each where its middle is."""
    return [
        (bisect.bisect_left(SECONDS_BUCKETS, math.exp2((i + 0.5) / 8) * 1e-8), count)
        for i, count in enumerate(histogram)
        if count
    ]
