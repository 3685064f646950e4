"""References on the wire: a table of runs in place of the bytes.

A fixed head, then the segments shown with it (number, bytes), the segments that are gone, and
three columns with one entry per run: segment, offset and length; a reference to the address
space has no first column. Everything is little-endian and nothing in it is believed: `Table`
checks what can be checked from the bytes, `runs` what depends on the segments.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import IntegrityError, MemoryRuns

from ._segment import View
from .memory import Ints

__all__ = ["ADDRESSES", "MAX_BYTES", "MAX_RUNS", "MAX_SHOWN", "NOTHING", "SEGMENTS", "Table"]

NOTHING, SEGMENTS, ADDRESSES = range(3)
"""What runs are places in."""

MAX_RUNS = 1 << 16
MAX_SHOWN = 64
"""Segments of a peer that are mapped at once, and so those shown with one reference."""

_HEAD = struct.Struct("<4sBBHIIIQ")
_MAGIC = b"sKVr"
_LONGEST = np.uint64(1 << 46)

MAX_BYTES = _HEAD.size + MAX_SHOWN * 16 + MAX_RUNS * 28

U64 = NDArray[np.uint64]


def _columns(words: U64, counts: Sequence[int]) -> list[U64]:
    found, at = [], 0
    for count in counts:
        found.append(words[at : at + count])
        at += count
    return found


@dataclass(frozen=True, slots=True)
class Table:
    """What a reference says.

    Attributes:
        kind: `NOTHING`, `SEGMENTS` or `ADDRESSES`.
        slot: Slot of the sender's board.
        number: The pledge that has to be in it.
        shown: Segments that come with it: number and bytes.
        gone: Numbers of segments to let go.
        which: Segment of each run; empty unless the kind is `SEGMENTS`.
        places: Offset or address of each run.
        lengths: Bytes of each run.

    """

    kind: int
    slot: int
    number: int
    shown: Sequence[tuple[int, int]] = ()
    gone: Sequence[int] = ()
    which: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    places: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    lengths: U64 = field(default_factory=lambda: np.empty(0, np.uint64))

    def pack(self) -> bytes:
        """As it crosses the wire."""
        head = _HEAD.pack(
            _MAGIC,
            1,
            self.kind,
            len(self.shown),
            len(self.gone),
            len(self.lengths),
            self.slot,
            self.number,
        )
        columns: list[U64] = [np.array(self.shown, dtype=np.uint64).reshape(-1)]
        columns.append(np.array(self.gone, dtype=np.uint64))
        columns += [self.which, self.places, self.lengths]
        return head + b"".join(c.astype("<u8").tobytes() for c in columns)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Table:
        """The table in these bytes.

        Raises:
            IntegrityError: They are none, or its numbers are beyond the bounds.

        """
        if len(data) < _HEAD.size:
            raise IntegrityError(f"a reference of {len(data)} bytes")
        magic, version, kind, shown, gone, runs, slot, number = _HEAD.unpack_from(data)
        if magic != _MAGIC or version != 1 or kind > ADDRESSES:
            raise IntegrityError(f"a reference of version {version} and kind {kind}")
        if (
            shown > MAX_SHOWN
            or gone > 2 * MAX_SHOWN
            or runs > MAX_RUNS
            or (kind == 0) != (not runs)
        ):
            raise IntegrityError(f"a reference to {runs} runs, with {shown} segments, {gone} gone")
        counts = (2 * shown, gone, runs if kind == SEGMENTS else 0, runs, runs)
        if len(data) != _HEAD.size + 8 * sum(counts):
            raise IntegrityError(f"a reference of {len(data)} bytes for {runs} runs")
        words = np.frombuffer(data, dtype="<u8", offset=_HEAD.size).astype(np.uint64, copy=False)
        announced, gone_, which, places, lengths = _columns(words, counts)
        if (lengths == 0).any() or (lengths > _LONGEST).any() or (places > _LONGEST * 2).any():
            raise IntegrityError("a reference with runs of no memory")
        pairs = announced.reshape(-1, 2).tolist()
        return cls(
            kind, slot, number, [(n, s) for n, s in pairs], gone_.tolist(), which, places, lengths
        )

    def runs(self, views: dict[int, View]) -> MemoryRuns:
        """The runs, as addresses: of ours where they are in segments, else of the peer's.

        Raises:
            IntegrityError: A run is not in a segment that the peer has shown, or leaves it.

        """
        lengths = self.lengths.astype(np.int64)
        if self.kind != SEGMENTS:
            return MemoryRuns(self.places.astype(np.int64), lengths)
        known = sorted(views)
        numbers = np.array(known, dtype=np.uint64)
        at = np.searchsorted(numbers, self.which)
        if not known or (at == len(known)).any() or (numbers[at] != self.which).any():
            raise IntegrityError(f"a reference to segments other than {known}, which were shown")
        sizes = np.array([views[n].nbytes for n in known], dtype=np.uint64)[at]
        if (self.lengths > sizes).any() or (self.places > sizes - self.lengths).any():
            raise IntegrityError("a reference that leaves its segment")
        bases: Ints = np.array([views[n].address for n in known], dtype=np.int64)[at]
        return MemoryRuns(bases + self.places.astype(np.int64), lengths)
