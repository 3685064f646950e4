"""Counters as plain data, with what an engine below the transport counted merged in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sagellm.core.protocols.bandwidth import busbw_factor
from sagellm.core.protocols.comm_types import CallStats, OpStats

from .recorder import LOCAL, TAKEN_OVER
from .stats import BUCKETS, CallCounters, Cell, EngineRow, percentile_us

__all__ = ["snapshot"]

_METHODS = {
    "all_gather": ("all_gather_into_tensor", "all_gather"),
    "reduce_scatter": ("reduce_scatter_tensor", "reduce_scatter"),
    "all_to_all": ("all_to_all_single", "all_to_all"),
}
_TIMES_RANKS = frozenset({"all_gather", "gather", "scatter"})
"""Primitives whose size, as nccl-tests count it, is one rank's part times the ranks."""


def snapshot(
    counters: CallCounters, engine: Sequence[EngineRow], size: int
) -> tuple[dict[str, OpStats], tuple[CallStats, ...]]:
    """Counts per operation, and per (operation, algorithm, size bucket)."""
    counters.fold()
    with counters.lock:
        booked = {op: [c.calls, c.errors, c.copies, c.lowered] for op, c in counters.ops.items()}
        cells = {
            op: {(algorithm, cell.bucket): cell.copy() for (algorithm, _), cell in c.cells.items()}
            for op, c in counters.ops.items()
        }
    for primitive in dict.fromkeys(row.op for row in engine):
        rows = [_cell(row, size) for row in engine if row.op == primitive]
        ran = sum(cell.calls for _, cell in rows)
        method, *others = _METHODS.get(primitive, (primitive,))
        passed = 0
        for name in others:
            passed += _take(cells.get(name, {}), rows)
        found = cells.setdefault(method, {})
        for key in [key for key in found if key[0] not in (LOCAL, TAKEN_OVER)]:
            passed += found.pop(key).calls
        found.update({(name, cell.bucket): cell for name, cell in rows if cell.calls})
        if method in booked or ran > passed:
            booked.setdefault(method, [0, 0, 0, 0])[0] += max(0, ran - passed)
    own = {op: _sum(found.values()) for op, found in cells.items()}
    ops = {op: _op_stats(counts, own[op]) for op, counts in booked.items()}
    details = [
        _call_stats(op, algorithm, cell, size)
        for op, found in sorted(cells.items())
        for (algorithm, _), cell in sorted(found.items())
    ]
    return ops, tuple(details)


def _take(mine: dict[tuple[str, int], Cell], rows: list[tuple[str, Cell]]) -> int:
    """Take the calls of a list form out of the engine's rows; how many there were.

    The engine does not know which form called. Calls and bytes are exact; where both forms ran
    with one size, the engine's times there are shared by calls, and those of the list form are
    the ones that its own calls took, copies included.
    """
    passed = 0
    for key in [key for key in mine if key[0] not in (LOCAL, TAKEN_OVER)]:
        cell = mine.pop(key)
        passed += cell.calls
        left = cell.calls
        same = [row for row in rows if row[1].bucket == cell.bucket and row[1].calls]
        for _, row in same or [row for row in rows if row[1].calls]:
            taken = min(left, row.calls)
            share = row.take(taken, round(cell.bytes * taken / cell.calls))
            cell.wait_ns += share.wait_ns
            cell.waited_ns += share.waited_ns
            left -= taken
        algorithm = same[0][0] if len(same) == 1 else key[0]
        known = mine.setdefault((algorithm, cell.bucket), Cell(cell.bucket))
        known.add(cell)
    return passed


def _sum(cells: Iterable[Cell]) -> Cell:
    total = Cell(-1)
    for cell in cells:
        total.add(cell)
    return total


def _cell(row: EngineRow, size: int) -> tuple[str, Cell]:
    cell = Cell(row.bucket)
    cell.calls, cell.bytes, cell.ns = row.calls, row.nbytes, row.total_ns
    cell.wire = row.nbytes * (size if row.op in _TIMES_RANKS else 1)
    cell.wait_ns, cell.waited_ns = row.wait_ns, row.total_ns
    cell.histogram = [*row.histogram[:BUCKETS], *[0] * (BUCKETS - len(row.histogram))]
    return row.algorithm, cell


def _op_stats(counts: Sequence[int], cell: Cell) -> OpStats:
    calls, errors, copies, lowered = counts
    return OpStats(
        calls=calls,
        errors=errors,
        bytes=max(0, cell.bytes),
        seconds=max(0, cell.ns) * 1e-9,
        p50_us=percentile_us(cell.histogram, 0.50),
        p99_us=percentile_us(cell.histogram, 0.99),
        copies=copies,
        lowered=lowered,
    )


def _call_stats(op: str, algorithm: str, cell: Cell, size: int) -> CallStats:
    algbw = cell.wire * 1e9 / cell.ns if cell.ns and cell.wire else None
    # Only part of the calls may tell how long they waited: their share stands for all.
    share = cell.wait_ns / cell.waited_ns if cell.waited_ns else None
    return CallStats(
        op=op,
        algorithm=algorithm,
        bucket_bytes=1 << cell.bucket if cell.bucket >= 0 else 0,
        calls=cell.calls,
        bytes=cell.bytes,
        seconds=cell.ns * 1e-9,
        wait_s=None if share is None else cell.ns * share * 1e-9,
        transfer_s=None if share is None else cell.ns * (1 - share) * 1e-9,
        p50_us=percentile_us(cell.histogram, 0.50),
        p99_us=percentile_us(cell.histogram, 0.99),
        algbw_bytes_per_s=algbw,
        busbw_bytes_per_s=None if algbw is None else algbw * busbw_factor(op, size),
        histogram=tuple(cell.histogram),
    )
