"""Frames whose blocks are on a device: received into halves, verified there, then scattered.

A frame of any size goes through halves of a fixed one, so that no peer decides how much pinned
memory there is. While the device scatters one half, the next is being filled. Unverified on
hardware.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import (
    CommError,
    IntegrityError,
    KVConnection,
    MemoryRuns,
    Reference,
)

from ._copy import pair
from ._device_extent import DeviceExtent
from ._device_staging import Half
from ._flows import Inflow
from .frames import Header, block_sums

__all__ = ["Landing", "Piece", "land"]


class Piece(NamedTuple):
    """Consecutive blocks of a frame that go through one half."""

    at: int
    blocks: int


class Landing:
    """What became of a frame so far; `errors` are what the device says of its pieces.

    Args:
        conn: Where it comes from.
        flow: Whose it is.
        head: Its header.
        table: Its table.

    """

    def __init__(self, conn: KVConnection, flow: Inflow, head: Header, table: memoryview) -> None:
        assert isinstance(flow.extent, DeviceExtent), "asked before"
        self.conn, self.flow, self.head, self.table = conn, flow, head, table
        self.extent = flow.extent
        self.unit = self.extent.unit_bytes(head.layer)
        self.raw = self.extent.span_bytes(head.layer, head.first, head.count)
        self.errors: list[CommError] = []
        self.bad: list[int] = []
        self.calls, self.runs = 1, len(self.extent.rows(head.layer)) * head.count
        self.verify_s = 0.0

    def note(self, error: CommError | None) -> None:
        """Take what the device says of a piece."""
        if error is not None:
            self.errors.append(error)

    @property
    def sums(self) -> NDArray[np.uint64]:
        """What each block should be."""
        return np.frombuffer(self.table[: self.head.count * 8], dtype="<u8")

    def pieces(self) -> list[Piece]:
        """How it goes through the halves."""
        step = max(1, self.extent.staging.half_bytes // max(1, self.unit))
        count = self.head.count
        return [Piece(at, min(step, count - at)) for at in range(0, count, step)]


_Fill = Callable[[Half, Piece], bool]


def land(
    landing: Landing,
    reference: Reference | None,
    *,
    checksum: bool,
    timeout_s: float,
) -> bool:
    """Receive a frame and begin to scatter it; False when its sender disowns a copy.

    The blocks are in place once the device is done with all that it was given until then.

    Raises:
        IntegrityError: The frame is not what its header says.
        CommError: The connection has ended, or no half became free.

    """
    head, staging = landing.head, landing.extent.staging
    if reference is not None:
        fill = _copying(landing, reference)
    else:
        fill = _receiving(landing, timeout_s)
    ids = landing.extent.ids(head.layer, head.first, head.count)
    rows = landing.extent.rows(head.layer)
    for piece in landing.pieces():
        size = max(piece.blocks * landing.unit, staging.half_bytes)
        half = staging.to_receive(size)
        try:
            kept = fill(half, piece)
            bad = _check(landing, half, piece) if checksum and kept else []
            if not kept or (reference is not None and not reference.kept()):
                return False
            if not landing.flow.stopped and len(bad) < piece.blocks:
                good = np.delete(np.arange(piece.blocks), bad) if bad else None
                some = ids[piece.at : piece.at + piece.blocks]
                half.spread(staging.incoming, rows, some, good)
        finally:
            if half.event is None:
                staging.dropped(half)
            else:
                staging.when_landed(half, landing.note)
        landing.bad += [piece.at + i for i in bad]
    landing.bad = sorted(set(landing.bad))
    return True


def _check(landing: Landing, half: Half, piece: Piece) -> list[int]:
    start, head = time.perf_counter(), landing.head
    units = half.units(piece.blocks, landing.unit)
    found = np.array(block_sums(units, head.layer, head.first + piece.at), dtype="<u8")
    wrong: list[int] = np.flatnonzero(
        found != landing.sums[piece.at : piece.at + piece.blocks]
    ).tolist()
    landing.verify_s += time.perf_counter() - start
    return wrong


def _receiving(landing: Landing, timeout_s: float) -> _Fill:
    if landing.head.payload_bytes != landing.raw:
        raise IntegrityError(
            f"a frame brings {landing.head.payload_bytes} bytes for blocks of {landing.raw}"
        )

    def fill(half: Half, piece: Piece) -> bool:
        view = half.memory[: piece.blocks * landing.unit]
        landing.calls += landing.conn.receive([view], timeout_s)
        return True

    return fill


def _copying(landing: Landing, reference: Reference) -> _Fill:
    if reference.total_bytes != landing.raw:
        raise IntegrityError(
            f"a frame refers to {reference.total_bytes} bytes for blocks of {landing.raw}"
        )
    cuts = np.array([p.at * landing.unit for p in landing.pieces()][1:], dtype=np.int64)
    whole = MemoryRuns(np.zeros(1, np.int64), np.array([landing.raw], np.int64))
    paired = pair(reference.runs, whole, cuts)
    sources, ends = paired.sources, paired.ends

    def fill(half: Half, piece: Piece) -> bool:
        first = piece.at * landing.unit
        low = int(np.searchsorted(ends, first, side="right"))
        high = int(np.searchsorted(ends, first + piece.blocks * landing.unit, side="left")) + 1
        some = MemoryRuns(sources.addresses[low:high], sources.lengths[low:high])
        to = paired.addresses[low:high] - first + half.address
        landing.calls += reference.copier(some, to)(0, high - low)
        return not landing.flow.stopped

    return fill
