"""The engine's counts in the shape of the backend's statistics."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from sagellm.core.protocols import CommStats, OpStats

from .transport import ShmTransport

__all__ = ["merge_statistics"]

_METHODS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
    "broadcast": "broadcast",
    "barrier": "barrier",
}
"""The method whose hot calls only the engine counts, by the engine's operation."""


def merge_statistics(stats: CommStats, transport: ShmTransport) -> CommStats:
    """Add the hot calls, which the engine counts, to those that the backend counted itself."""
    ops = dict(stats.ops)
    for op, method in _METHODS.items():
        rows = [row for row in transport.engine.totals() if row.op == op]
        others = transport.counted(op)
        calls = sum(row.calls for row in rows) - others.calls
        if calls <= 0:
            continue
        histogram = [sum(column) for column in zip(*(row.histogram for row in rows), strict=True)]
        old = ops.get(method, OpStats())
        ops[method] = replace(
            old,
            calls=old.calls + calls,
            bytes=old.bytes + max(0, sum(row.nbytes for row in rows) - others.nbytes),
            seconds=old.seconds + max(0, sum(r.total_ns for r in rows) - others.nanoseconds) * 1e-9,
            p50_us=_percentile(histogram, 0.50),
            p99_us=_percentile(histogram, 0.99),
        )
    return replace(stats, ops=ops)


def _percentile(histogram: list[int], share: float) -> float | None:
    """Middle of the bucket that holds a share of the calls; see `EngineTotals.histogram`."""
    need = share * sum(histogram)
    for index, count in enumerate(accumulate(histogram)):
        if count and count >= need:
            return float(2 ** ((index + 0.5) / 8) * 1e-2)
    return None
