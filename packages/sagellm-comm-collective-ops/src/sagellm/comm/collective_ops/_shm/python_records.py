"""What the Python engine remembers of its calls: the last ones, and counts of all.

A call costs two looks at the clock and one row in a ring of machine words. Rows are counted in
numpy, half a ring at a time, before they are written over.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Sequence

import numpy as np

from .choice import ALGORITHMS
from .engine import CallRecord, EngineTotals
from .layout import OPS

__all__ = ["BUCKETS", "RING", "Records", "tag_of"]

RING = 1024
"""Calls remembered; a power of two."""
BUCKETS = 256
"""Longest histogram: up to 42 s."""

_HALF = RING // 2
_COLUMNS = 5
_ROW_BYTES = 8 * _COLUMNS
_TAG, _NBYTES, _STARTED, _ENDED, _WAIT = range(_COLUMNS)
_TAG_BITS = 48
"""Below this bit of a tag is the first signature word, above it the number of the algorithm."""
_SIZES = 65
"""Size buckets: one for 0 bytes, then one per power of two."""
_STARTS = np.array([math.ceil(10 * 2 ** (i / 8)) for i in range(1, BUCKETS)])
"""Durations with which the buckets of a histogram after the first begin."""


def tag_of(packed: int, algorithm: str) -> int:
    """First signature word and algorithm in one word, as `Records.write` takes them."""
    return packed | ALGORITHMS.index(algorithm) << _TAG_BITS


class Records:
    """A ring of calls; `write` after each one.

    Attributes:
        number: Calls written.
        running: `(packed, nbytes, started_ns)` of the call that runs, None between calls.

    """

    def __init__(self) -> None:
        self.number = 0
        self.running: tuple[int, int, int] | None = None
        self._ring = bytearray(RING * _ROW_BYTES)
        self._rows = np.frombuffer(self._ring, np.int64).reshape(RING, _COLUMNS)
        self._pack_into = struct.Struct(f"={_COLUMNS}q").pack_into
        self._counted = 0
        self._counting = threading.Lock()
        self._counts: dict[int, np.ndarray] = {}
        """By op, algorithm and size: calls, bytes, time and waiting, then the histogram."""

    def write(self, tag: int, nbytes: int, started: int, ended: int, wait: int) -> None:
        """Remember a call that has ended."""
        number = self.number
        at = number % RING * _ROW_BYTES
        self._pack_into(self._ring, at, tag, nbytes, started, ended, wait)
        self.running = None
        self.number = number = number + 1
        if not number % _HALF:
            with self._counting:
                self._count()

    def _count(self) -> None:
        """Add the rows since the last time to the totals; with the lock held."""
        first, end = self._counted, self.number
        self._counted = end
        if first == end:
            return
        low = first % RING
        rows = self._rows[low : low + end - first]  # never around the end: it is a half's end
        tags = rows[:, _TAG]
        _, sizes = np.frexp(rows[:, _NBYTES])
        kinds = ((tags >> _TAG_BITS) * len(OPS) + (tags & 0xFF)) * _SIZES + sizes
        kind = int(kinds[0])
        if (kinds == kind).all():
            self._add(kind, rows)
            return
        for kind in np.unique(kinds).tolist():
            self._add(kind, rows[kinds == kind])

    def _add(self, kind: int, rows: np.ndarray) -> None:
        spent = rows[:, _ENDED] - rows[:, _STARTED]
        counts = self._counts.get(kind)
        if counts is None:
            counts = self._counts[kind] = np.zeros(4 + BUCKETS, np.int64)
        sums = len(rows), rows[:, _NBYTES].sum(), spent.sum(), rows[:, _WAIT].sum()
        counts[:4] += sums
        counts[4:] += np.bincount(_STARTS.searchsorted(spent, "right"), minlength=BUCKETS)

    def totals(self) -> Sequence[EngineTotals]:
        """Counts of all calls that have ended, by op, algorithm and size."""
        with self._counting:
            self._count()
            rows = [(kind, counts.tolist()) for kind, counts in self._counts.items()]
        found = []
        for kind, counts in rows:
            rest, size = divmod(kind, _SIZES)
            algorithm, op = divmod(rest, len(OPS))
            calls, nbytes, total_ns, wait_ns, *histogram = counts
            while not histogram[-1]:
                histogram.pop()
            found.append(
                EngineTotals(
                    OPS[op],
                    ALGORITHMS[algorithm],
                    size - 1,
                    calls,
                    nbytes,
                    total_ns,
                    wait_ns,
                    tuple(histogram),
                )
            )
        return sorted(found, key=lambda t: (OPS.index(t.op), t.algorithm, t.bucket))

    def reset(self) -> None:
        """Start the counts anew; the ring stays."""
        with self._counting:
            self._count()
            self._counts.clear()

    def last(self) -> Sequence[CallRecord]:
        """The calls of the ring, oldest first, the running one last."""
        number = self.number
        found = []
        for i in range(max(0, number - RING), number):
            tag, nbytes, started, ended, wait = self._rows[i % RING].tolist()
            algorithm = ALGORITHMS[tag >> _TAG_BITS]
            packed = tag & (1 << _TAG_BITS) - 1
            found.append(CallRecord(i, packed, nbytes, started, ended, wait, algorithm))
        running = self.running
        if running is not None:
            found.append(CallRecord(number, *running, 0, 0, ""))
        return found
