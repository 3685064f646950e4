"""Counters of a backend: calls, bytes and latency, cheap enough to be always on.

Durations go into a log histogram with `PER_OCTAVE` buckets per doubling, from 10 ns: bucket `i`
holds those of [2**(i/8), 2**((i+1)/8)) times 10 ns, so that a percentile is within 5 %.
"""

from __future__ import annotations

import threading
from math import ceil, log2
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .recorder import Record

__all__ = [
    "BUCKETS",
    "PER_OCTAVE",
    "CallCounters",
    "Cell",
    "EngineRow",
    "busbw_factor",
    "percentile_us",
]

PER_OCTAVE = 8
BUCKETS = 40 * PER_OCTAVE
_FLOOR = -PER_OCTAVE * log2(10)


def busbw_factor(op: str, size: int) -> float:
    """What nccl-tests multiply algorithm bandwidth by, to compare it with link speed.

    >>> busbw_factor("all_reduce", 4), busbw_factor("all_gather", 4), busbw_factor("send", 4)
    (1.5, 0.75, 1.0)
    """
    if op == "all_reduce":
        return 2 * (size - 1) / size
    if op in ("broadcast", "reduce", "send", "recv", "send_kv_blocks", "recv_kv_blocks"):
        return 1.0
    return (size - 1) / size


def percentile_us(buckets: Sequence[int], share: float) -> float | None:
    """The middle of the bucket in which that share of the calls is reached; None without any."""
    total = sum(buckets)
    if not total:
        return None
    need = ceil(total * share)
    for index, count in enumerate(buckets):
        need -= count
        if need <= 0:
            return float(2 ** ((index + 0.5) / PER_OCTAVE) * 1e-2)
    raise AssertionError("unreachable: the buckets sum to the total")


class EngineRow(Protocol):
    """Counts that an engine below a transport keeps for one (op, algorithm, size bucket)."""

    @property
    def op(self) -> str:
        """The primitive: `all_reduce`, `all_gather`, …."""
        ...

    @property
    def algorithm(self) -> str:
        """What ran."""
        ...

    @property
    def bucket(self) -> int:
        """Floor of log2 of the bytes; -1 for 0 bytes."""
        ...

    @property
    def calls(self) -> int:
        """Finished calls."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's input, summed."""
        ...

    @property
    def total_ns(self) -> int:
        """From entry to end, summed."""
        ...

    @property
    def wait_ns(self) -> int:
        """The part spent waiting for peers."""
        ...

    @property
    def histogram(self) -> Sequence[int]:
        """Calls per duration, in the buckets of this module."""
        ...


class Cell:
    """Counts of one (op, algorithm, size bucket)."""

    __slots__ = ("bucket", "bytes", "calls", "histogram", "ns", "wait_ns", "waited_ns", "wire")

    def __init__(self, bucket: int) -> None:
        self.bucket = bucket
        self.calls = self.bytes = 0
        self.ns = self.wire = 0  # of the calls whose end the host saw
        self.wait_ns = self.waited_ns = 0  # waits, and the whole time of the calls that tell them
        self.histogram = [0] * BUCKETS

    def add(self, other: Cell) -> None:
        """Add another cell's counts to this one's."""
        self.calls += other.calls
        self.bytes += other.bytes
        self.ns += other.ns
        self.wire += other.wire
        self.wait_ns += other.wait_ns
        self.waited_ns += other.waited_ns
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]

    def take(self, calls: int, nbytes: int) -> Cell:
        """Remove some calls and their bytes; all else goes in proportion. What was removed."""
        taken, before = Cell(self.bucket), self.calls
        taken.calls, taken.bytes = calls, nbytes
        wire = self.wire // self.bytes if self.bytes else 0
        taken.wire = nbytes * wire
        for name in ("ns", "wait_ns", "waited_ns"):
            setattr(taken, name, getattr(self, name) * calls // before)
        done = 0
        for i, count in enumerate(self.histogram):
            part = (done + count) * calls // before - done * calls // before
            taken.histogram[i] = part
            done += count
        for name in ("calls", "bytes", "ns", "wire", "wait_ns", "waited_ns"):
            setattr(self, name, getattr(self, name) - getattr(taken, name))
        self.histogram = [a - b for a, b in zip(self.histogram, taken.histogram, strict=True)]
        return taken

    def copy(self) -> Cell:
        """The same counts, apart."""
        made = Cell(self.bucket)
        made.add(self)
        return made


class OpCounter:
    """Counts of one operation, and its cells by (algorithm, bits of the size)."""

    __slots__ = ("calls", "cells", "copies", "errors", "lowered")

    def __init__(self) -> None:
        self.calls = self.errors = self.copies = self.lowered = 0
        self.cells: dict[tuple[str, int], Cell] = {}


class CallCounters:
    """Counts per operation, algorithm and size bucket. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ops: dict[str, OpCounter] = {}

    def started(self, op: str, copies: int, lowered: int) -> None:
        """Count a call when it is issued."""
        with self.lock:
            counter = self._of(op)
            counter.calls += 1
            counter.copies += copies
            counter.lowered += lowered

    def finished(self, record: Record, ns: int | None, wait_ns: int | None) -> None:
        """Count its bytes when it is done; `ns` is None where the host did not see its end."""
        with self.lock:
            self._count(self._of(record.op), record, ns, wait_ns)

    def ran(
        self, record: Record, ns: int | None, wait_ns: int | None, copies: int, lowered: int
    ) -> None:
        """`started` and `finished` at once, for a call that blocked."""
        with self.lock:
            counter = self.ops.get(record.op)
            if counter is None:
                counter = self.ops[record.op] = OpCounter()
            counter.calls += 1
            if copies or lowered:
                counter.copies += copies
                counter.lowered += lowered
            if ns is None or wait_ns is not None:
                self._count(counter, record, ns, wait_ns)
                return
            # `_count`, written out: this is the path of nearly every call.
            nbytes = record.nbytes
            key = (record.algorithm, nbytes.bit_length())
            cell = counter.cells.get(key)
            if cell is None:
                cell = counter.cells[key] = Cell(key[1] - 1)
            cell.calls += 1
            cell.bytes += nbytes
            cell.ns += ns
            cell.wire += record.wire_bytes
            index = int(log2(ns) * 8 + _FLOOR) if ns > 10 else 0
            cell.histogram[index if index < BUCKETS else -1] += 1

    def failed(self, op: str) -> None:
        """Count a call that ended with an error."""
        with self.lock:
            self._of(op).errors += 1

    def reset(self) -> None:
        """Forget everything counted so far; works in flight keep being counted at their end."""
        with self.lock:
            self.ops = {op: OpCounter() for op in self.ops}

    def _of(self, op: str) -> OpCounter:
        counter = self.ops.get(op)
        if counter is None:
            counter = self.ops[op] = OpCounter()
        return counter

    def _count(
        self, counter: OpCounter, record: Record, ns: int | None, wait_ns: int | None
    ) -> None:
        nbytes = record.nbytes
        key = (record.algorithm, nbytes.bit_length())
        cell = counter.cells.get(key)
        if cell is None:
            cell = counter.cells[key] = Cell(key[1] - 1)
        cell.calls += 1
        cell.bytes += nbytes
        if ns is None:
            return
        cell.ns += ns
        cell.wire += record.wire_bytes
        if wait_ns is not None:
            cell.wait_ns += wait_ns
            cell.waited_ns += ns
        index = int(log2(ns) * 8 + _FLOOR) if ns > 10 else 0
        cell.histogram[min(index, BUCKETS - 1)] += 1
