"""What the Python engine remembers of its calls: the last ones, and counts of all.

A call costs two looks at the clock and one tuple in a list. Some hundred of them at a time become
counts, in numpy.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from itertools import chain

import numpy as np

from .choice import ALGORITHMS
from .engine import CallRecord, EngineTotals
from .layout import OPS

__all__ = ["BUCKETS", "FULL", "RING", "Records", "tag_of"]

RING = 1024
"""Calls remembered."""
FULL = RING // 2
"""Calls after which they are counted."""
BUCKETS = 256
"""Longest histogram: up to 42 s."""

Row = tuple[int, int, int, int, int]
_COLUMNS = 5
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


class _Past:
    """Calls that were taken from the list, before `found` was and with it.

    Attributes:
        rows: The last of them.
        number: How many there were.
        first: The first one taken with the last list.
        taken: How many were taken with it.

    """

    def __init__(self, before: _Past | None = None, found: Sequence[Row] = ()) -> None:
        self.rows: list[Row] = [*(before.rows if before else ()), *found][-RING:]
        self.number: int = (before.number if before else 0) + len(found)
        self.first = found[0] if found else None
        self.taken = len(found)


class Records:
    """The calls of one engine; `write` after each one, or append to `rows` what it would.

    One thread writes; any may read.

    Attributes:
        rows: `(tag, nbytes, started, ended, wait)` of calls that are not counted yet; the same
            list always. Who appends calls `count` when there are `FULL`.
        running: `((packed, nbytes), started_ns)` of the call that runs, None between calls.

    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.running: tuple[tuple[int, int], int] | None = None
        self._counting = threading.RLock()  # a signal's dump may come while it is held
        self._adding = False
        self._past = _Past()
        self._counts: dict[int, np.ndarray] = {}
        """By op, algorithm and size: calls, bytes, time and waiting, then the histogram."""

    def write(self, tag: int, nbytes: int, started: int, ended: int, wait: int) -> None:
        """Remember a call that has ended."""
        rows = self.rows
        rows.append((tag, nbytes, started, ended, wait))
        self.running = None
        if len(rows) >= FULL:
            self.count()

    def count(self) -> None:
        """Add the calls since the last time to the totals."""
        with self._counting:
            self._count()

    def _count(self) -> None:
        if self._adding:  # a signal's dump, in the middle of this
            return
        self._adding = True
        try:
            if found := self.rows[:]:
                self._past = _Past(self._past, found)
                del self.rows[: len(found)]  # what was appended meanwhile stays
                self._add_all(found)
        finally:
            self._adding = False

    def _add_all(self, found: list[Row]) -> None:
        flat = np.fromiter(chain.from_iterable(found), np.int64, len(found) * _COLUMNS)
        rows = flat.reshape(-1, _COLUMNS)
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
        counts = np.zeros(4 + BUCKETS, np.int64)
        counts[:4] = len(rows), rows[:, _NBYTES].sum(), spent.sum(), rows[:, _WAIT].sum()
        counts[4:] = np.bincount(_STARTS.searchsorted(spent, "right"), minlength=BUCKETS)
        before = self._counts.get(kind)
        self._counts[kind] = counts if before is None else before + counts  # at once

    def totals(self) -> Sequence[EngineTotals]:
        """Counts of all calls that have ended, by op, algorithm and size."""
        with self._counting:
            self._count()
            kept = [(kind, counts.tolist()) for kind, counts in list(self._counts.items())]
        found = []
        for kind, counts in kept:
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
        """Start the counts anew; what is remembered stays."""
        with self._counting:
            self._count()
            self._counts.clear()

    def last(self) -> Sequence[CallRecord]:
        """The last calls, oldest first, the running one last."""
        with self._counting:
            running = self.running
            past = None
            while past is not self._past:
                past, new = self._past, self.rows[:]
            if new and new[0] is past.first:  # taken, and not deleted yet
                del new[: past.taken]
            number = past.number + len(new)
            rows = [*past.rows, *new][-RING:]
        found = []
        first = number - len(rows)
        for i, (tag, nbytes, started, ended, wait) in enumerate(rows, first):
            algorithm = ALGORITHMS[tag >> _TAG_BITS]
            packed = tag & (1 << _TAG_BITS) - 1
            found.append(CallRecord(i, packed, nbytes, started, ended, wait, algorithm))
        if running is not None:
            (packed, nbytes), started = running
            found.append(CallRecord(number, packed, nbytes, started, 0, 0, ""))
        return found
