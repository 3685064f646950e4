"""What the Python engine remembers of its calls: the last ones, and counts of all.

A call costs two looks at the clock and one row in a ring of machine words. Rows are counted in
numpy, half a ring at a time, before they are written over.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .choice import ALGORITHMS
from .engine import CallRecord, EngineTotals
from .layout import OPS

__all__ = ["BUCKETS", "RING", "Records"]

RING = 1024
"""Calls remembered; a power of two."""
BUCKETS = 256
"""Longest histogram: up to 42 s."""

_HALF = RING // 2
_COLUMNS = 6
_ROW_BYTES = 8 * _COLUMNS
_PACKED, _NBYTES, _STARTED, _ENDED, _WAIT, _ALGORITHM = range(_COLUMNS)

Key = tuple[int, int, int]
"""Number of op, of algorithm, and size bucket."""


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
        self._totals: Counter[Key] = Counter()
        self._sums: dict[Key, np.ndarray] = {}
        self._histograms: dict[Key, np.ndarray] = {}

    def write(
        self, packed: int, nbytes: int, started: int, ended: int, wait: int, algorithm: int
    ) -> None:
        """Remember a call that has ended."""
        number = self.number
        self._pack_into(
            self._ring,
            number % RING * _ROW_BYTES,
            packed,
            nbytes,
            started,
            ended,
            wait,
            algorithm,
        )
        self.number = number = number + 1
        self.running = None
        if not number % _HALF:
            self._count()

    def _count(self) -> None:
        """Add the rows since the last time to the totals."""
        numbers = np.arange(self._counted, self.number) % RING
        rows = self._rows[numbers]
        self._counted = self.number
        nbytes = rows[:, _NBYTES]
        buckets = np.where(nbytes > 0, np.log2(np.maximum(nbytes, 1)).astype(np.int64), -1)
        spent = rows[:, _ENDED] - rows[:, _STARTED]
        slots = (8 * np.log2(np.maximum(spent, 10) / 10)).astype(np.int64)
        slots = np.minimum(slots, BUCKETS - 1)
        kinds = np.stack([rows[:, _PACKED] & 0xFF, rows[:, _ALGORITHM], buckets], axis=1)
        for kind in np.unique(kinds, axis=0):
            chosen = (kinds == kind).all(axis=1)
            op, algorithm, bucket = (int(value) for value in kind)
            key = (op, algorithm, bucket)
            sums = [nbytes[chosen].sum(), spent[chosen].sum(), rows[chosen, _WAIT].sum()]
            counts = np.bincount(slots[chosen], minlength=BUCKETS)
            self._totals[key] += int(chosen.sum())
            self._sums[key] = self._sums.get(key, 0) + np.array(sums)
            self._histograms[key] = self._histograms.get(key, 0) + counts

    def totals(self) -> Sequence[EngineTotals]:
        """Counts of all calls that have ended, by op, algorithm and size."""
        self._count()
        found = []
        for key in sorted(self._totals):
            op, algorithm, bucket = key
            nbytes, total_ns, wait_ns = (int(value) for value in self._sums[key])
            histogram = np.trim_zeros(self._histograms[key], "b")
            found.append(
                EngineTotals(
                    OPS[op],
                    ALGORITHMS[algorithm],
                    bucket,
                    self._totals[key],
                    nbytes,
                    total_ns,
                    wait_ns,
                    tuple(int(n) for n in histogram),
                )
            )
        return found

    def reset(self) -> None:
        """Start the counts anew; the ring stays."""
        self._count()
        self._totals.clear()
        self._sums.clear()
        self._histograms.clear()

    def last(self) -> Sequence[CallRecord]:
        """The calls of the ring, oldest first, the running one last."""
        number = self.number
        found = []
        for i in range(max(0, number - RING), number):
            packed, nbytes, started, ended, wait, algorithm = self._rows[i % RING].tolist()
            found.append(CallRecord(i, packed, nbytes, started, ended, wait, ALGORITHMS[algorithm]))
        running = self.running
        if running is not None:
            found.append(CallRecord(number, *running, 0, 0, ""))
        return found
