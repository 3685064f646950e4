"""The engine's counts in the shape of the backend's statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest

from sagellm.core.protocols import BandwidthStats, CommStats, OpStats
from sagellm.core.protocols.process_group import busbw_factor

from .transport import ShmTransport

__all__ = ["merge_bandwidth", "merge_statistics"]

_METHODS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
    "broadcast": "broadcast",
    "barrier": "barrier",
}
"""The method whose hot calls only the engine counts, by the engine's operation."""


@dataclass(frozen=True, slots=True)
class _Hot:
    """Hot calls of one method: the engine's counts less those of the general way."""

    method: str
    calls: int
    nbytes: int
    seconds: float
    p50_us: float | None
    p99_us: float | None


def _hot(transport: ShmTransport) -> Iterator[_Hot]:
    totals = transport.totals()
    for op, method in _METHODS.items():
        rows = [row for row in totals if row.op == op]
        others = transport.counted(op)
        calls = sum(row.calls for row in rows) - others.calls
        if calls <= 0:
            continue
        columns = zip_longest(*(row.histogram for row in rows), fillvalue=0)
        histogram = [sum(column) for column in columns]
        yield _Hot(
            method,
            calls,
            max(0, sum(row.nbytes for row in rows) - others.nbytes),
            max(0, sum(row.total_ns for row in rows) - others.nanoseconds) * 1e-9,
            _percentile(histogram, 0.50),
            _percentile(histogram, 0.99),
        )


def merge_statistics(stats: CommStats, transport: ShmTransport) -> CommStats:
    """Add the hot calls, which the engine counts, to those that the backend counted itself."""
    ops = dict(stats.ops)
    for hot in _hot(transport):
        old = ops.get(hot.method, OpStats())
        ops[hot.method] = replace(
            old,
            calls=old.calls + hot.calls,
            bytes=old.bytes + hot.nbytes,
            seconds=old.seconds + hot.seconds,
            p50_us=hot.p50_us,
            p99_us=hot.p99_us,
        )
    return replace(stats, ops=ops)


def merge_bandwidth(stats: BandwidthStats, transport: ShmTransport) -> BandwidthStats:
    """Bandwidth of the hot calls where there are any, which then are the most."""
    alg, bus = dict(stats.algbw_bytes_per_s), dict(stats.busbw_bytes_per_s)
    for hot in _hot(transport):
        parts = transport.size if hot.method == "all_gather_into_tensor" else 1
        if hot.seconds and hot.nbytes:
            alg[hot.method] = hot.nbytes * parts / hot.seconds
            bus[hot.method] = alg[hot.method] * busbw_factor(hot.method, transport.size)
    return BandwidthStats(algbw_bytes_per_s=alg, busbw_bytes_per_s=bus)


def _percentile(histogram: list[int], share: float) -> float | None:
    """Middle of the bucket that holds a share of the calls; see `EngineTotals.histogram`."""
    need = share * sum(histogram)
    for index, count in enumerate(accumulate(histogram)):
        if count and count >= need:
            return float(2 ** ((index + 0.5) / 8) * 1e-2)
    return None
