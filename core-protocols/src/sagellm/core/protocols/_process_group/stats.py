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
    "BATCH",
    "BUCKETS",
    "PER_OCTAVE",
    "CallCounters",
    "Cell",
    "EngineRow",
    "percentile_us",
]

BATCH = 512
"""Calls that wait to be counted, at most."""
PER_OCTAVE = 8
BUCKETS = 40 * PER_OCTAVE
_FLOOR = -PER_OCTAVE * log2(10)


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


Kind = tuple[str, str, int, int, int | None]
"""Operation, algorithm, bytes, bytes on the wire, and nanoseconds of waiting."""
_UNTIMED = -1


class OpCounter:
    """Counts of one operation, and its cells by (algorithm, bits of the size)."""

    __slots__ = ("calls", "cells", "copies", "errors", "lowered")

    def __init__(self) -> None:
        self.calls = self.errors = self.copies = self.lowered = 0
        self.cells: dict[tuple[str, int], Cell] = {}


class CallCounters:
    """Counts per operation, algorithm and size bucket. Thread-safe.

    A finished call is only appended to a list, which is atomic, and counted with up to `BATCH`
    others when somebody reads or the list is full: nothing is looked up or locked per call.

    Attributes:
        ran: Records of calls that blocked and are over; append to it, and call `fold` when it
            has `BATCH`. A record whose `ended_ns` is 0 has no time.
        ended: The same of calls that `started` counted.

    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ops: dict[str, OpCounter] = {}
        self.ran: list[Record] = []
        self.ended: list[Record] = []

    def started(self, op: str, copies: int, lowered: int) -> None:
        """Count a call when it is issued."""
        with self.lock:
            counter = self._of(op)
            counter.calls += 1
            counter.copies += copies
            counter.lowered += lowered

    def extra(self, op: str, copies: int, lowered: int) -> None:
        """What a call did besides, where it did anything; the call itself goes to `ran`."""
        with self.lock:
            counter = self._of(op)
            counter.copies += copies
            counter.lowered += lowered

    def failed(self, op: str) -> None:
        """Count a call that ended with an error."""
        with self.lock:
            self._of(op).errors += 1

    def fold(self) -> None:
        """Count what was appended so far; `ops` is complete afterwards."""
        with self.lock:
            for key, times in _by_kind(_drain(self.ran)).items():
                self._of(key[0]).calls += len(times)
                self._count(key, times)
            for key, times in _by_kind(_drain(self.ended)).items():
                self._count(key, times)

    def reset(self) -> None:
        """Forget everything counted so far; works in flight keep being counted at their end."""
        with self.lock:
            _drain(self.ran)
            _drain(self.ended)
            self.ops = {op: OpCounter() for op in self.ops}

    def _of(self, op: str) -> OpCounter:
        counter = self.ops.get(op)
        if counter is None:
            counter = self.ops[op] = OpCounter()
        return counter

    def _count(self, kind: Kind, times: list[int]) -> None:
        op, algorithm, nbytes, wire_bytes, wait_ns = kind
        cells = self._of(op).cells
        key = (algorithm, nbytes.bit_length())
        cell = cells.get(key)
        if cell is None:
            cell = cells[key] = Cell(key[1] - 1)
        calls = len(times)
        cell.calls += calls
        cell.bytes += nbytes * calls
        if min(times) < 0:
            times = [ns for ns in times if ns >= 0]
        spent = sum(times)
        cell.ns += spent
        cell.wire += wire_bytes * len(times)
        if wait_ns is not None:
            cell.wait_ns += wait_ns * len(times)
            cell.waited_ns += spent
        histogram = cell.histogram
        for ns in times:
            index = int(log2(ns) * PER_OCTAVE + _FLOOR) if ns > 10 else 0
            histogram[index if index < BUCKETS else -1] += 1


def _drain(records: list[Record]) -> list[Record]:
    """Take out what is there; what other threads append meanwhile stays."""
    taken = records[:]
    del records[: len(taken)]
    return taken


def _by_kind(records: Sequence[Record]) -> dict[Kind, list[int]]:
    """The durations of calls that are alike; `_UNTIMED` for those without one."""
    found: dict[Kind, list[int]] = {}
    times: list[int] = []
    op = algorithm = nbytes = wire_bytes = wait_ns = None
    for record in records:
        # A program's next call is mostly like its last: then there is nothing to look up.
        if (
            record.nbytes != nbytes
            or record.op is not op
            or record.algorithm is not algorithm
            or record.wire_bytes != wire_bytes
            or record.wait_ns is not wait_ns
        ):
            op, algorithm, nbytes = record.op, record.algorithm, record.nbytes
            wire_bytes, wait_ns = record.wire_bytes, record.wait_ns
            times = found.setdefault((op, algorithm, nbytes, wire_bytes, wait_ns), [])
        ended = record.ended_ns
        times.append(ended - record.started_ns if ended else _UNTIMED)
    return found
