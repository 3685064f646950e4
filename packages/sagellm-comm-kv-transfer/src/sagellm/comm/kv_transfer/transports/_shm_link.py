"""A connection through shared memory: a stream of frames, and references beside it."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sagellm.comm.kv_transfer._board import Board, BoardPledge
from sagellm.comm.kv_transfer._copy import mover
from sagellm.comm.kv_transfer._offload import InFiles
from sagellm.comm.kv_transfer._peek import Peek
from sagellm.comm.kv_transfer._reference import (
    ADDRESSES,
    MAX_BYTES,
    MAX_RUNS,
    MAX_SHOWN,
    NOTHING,
    SEGMENTS,
    Table,
)
from sagellm.comm.kv_transfer._segment import Segment, View, locate
from sagellm.comm.kv_transfer.memory import Ints
from sagellm.core.protocols import (
    IntegrityError,
    MemoryRuns,
    OneSidedConnection,
    PeerLostError,
    Pledge,
    Reference,
)

from ._socket import SocketConnection

__all__ = ["Meeting", "ShmConnection"]

_FRAME_BYTES = 31 << 20
"""Less than 500 blocks of 64 KiB: beyond that numpy lets go of the GIL in every operation, which
costs a switch interval each beside a thread that computes in Python."""
_REFERRING_BUFFER_BYTES = 16 << 10
"""Kernel buffer where only references cross: more would queue frames before small transfers."""
_AHEAD_BYTES = 1 << 14
_SENT_BYTES = 1 << 16
"""Up to this the kernel's two copies cost less than a reference: making, sending, checking and
pairing its tables took 0.15 ms of one block of 64 KiB, 24 ms of 128 MiB in such blocks."""
_SENDING_BUFFER_BYTES = 1 << 18
_FDS = array.array("i").itemsize * MAX_SHOWN


class Meeting(NamedTuple):
    """What two processes know of each other: boards, and whose memory can be read."""

    board: Board
    theirs: View
    peek: Peek | None
    readable: bool


class ShmConnection(SocketConnection, OneSidedConnection):
    """A connection to a process of this host; one thread per direction.

    Args:
        sock: Connected and proven; this object closes it.
        peer: Who is at the other end, for messages.
        meeting: This object closes what is in it.
        buffer_bytes: Kernel buffer, where bytes have to be sent.

    """

    def __init__(self, sock: socket.socket, peer: str, meeting: Meeting, buffer_bytes: int) -> None:
        super().__init__(sock, peer)
        size = _REFERRING_BUFFER_BYTES if meeting.readable else buffer_bytes
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        self._buffer_bytes = size
        self._meeting = meeting
        self._promises = meeting.theirs.memory.view(np.uint64)
        self._views: dict[int, View] = {}
        self._ahead = bytearray(_AHEAD_BYTES)
        self._ahead_at = self._ahead_end = 0
        self._fds: deque[int] = deque()
        self._lock = threading.Lock()
        self._shown: set[int] = set()
        self._gone: list[int] = []
        self._enclosed: list[int] = []
        self._subscribed: dict[int, Segment] = {}
        self._on_news: Callable[[], object] = lambda: None
        self._closed = False

    @property
    def frame_bytes(self) -> int:
        """Enough to make the cost of a frame vanish, little enough to overlap sums and copies."""
        return _FRAME_BYTES

    @property
    def least_bytes(self) -> int:
        """More than one small block."""
        return _SENT_BYTES + 1

    # -- what we send -----------------------------------------------------------------------

    def pledge(self) -> Pledge | None:
        """A slot of our board."""
        return self._meeting.board.pledge()

    def refer(self, runs: MemoryRuns, pledge: Pledge) -> memoryview | None:
        """A table of places in our segments, or of addresses where the peer can read them."""
        assert isinstance(pledge, BoardPledge), "made by this connection"
        if len(runs.lengths) > MAX_RUNS:
            return None
        if self._meeting.readable:  # references shall not pile up
            self._buffer(_REFERRING_BUFFER_BYTES)
        located = locate(runs)
        shown: list[tuple[int, int]] = []
        which = np.empty(0, np.uint64)
        if located is not None:
            used = [located.segments[i] for i in np.unique(located.which).tolist()]
            if not self._show(used, shown):
                located = None
        if located is not None:
            numbers = np.array([s.number for s in located.segments], dtype=np.uint64)
            kind, which, places = SEGMENTS, numbers[located.which], located.offsets
        elif self._meeting.readable:
            kind, places = ADDRESSES, runs.addresses
        else:
            return None
        table = Table(
            kind,
            pledge.slot,
            pledge.number,
            shown,
            self._take_gone(),
            which,
            places.astype(np.uint64),
            runs.lengths.astype(np.uint64),
        )
        return memoryview(table.pack())

    def watch(self, callback: Callable[[], object]) -> None:
        """Call back when a segment that was shown is gone."""
        self._on_news = callback

    def news(self) -> memoryview | None:
        """Tells of segments that are gone."""
        gone = self._take_gone()
        return memoryview(Table(NOTHING, 0, 0, (), gone).pack()) if gone else None

    def send(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Send all bytes; segments that are shown go with the last view."""
        fds, self._enclosed = self._enclosed, []
        if not fds:
            if self._meeting.readable and sum(map(len, views)) >= _REFERRING_BUFFER_BYTES:
                self._buffer(_SENDING_BUFFER_BYTES)
            return super().send(views, deadline_s)
        try:
            calls = super().send(views[:-1], deadline_s)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]

            def call(batch: Sequence[memoryview]) -> int:
                sent = self._sock.sendmsg(batch, rights)
                rights.clear()
                return sent

            return calls + self._move(call, views[-1:], deadline_s)
        finally:
            for fd in fds:
                os.close(fd)

    def _buffer(self, nbytes: int) -> None:
        if nbytes == self._buffer_bytes:
            return
        self._buffer_bytes = nbytes
        with contextlib.suppress(OSError):  # broken, which the next call says
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)

    def _show(self, segments: Sequence[Segment], shown: list[tuple[int, int]]) -> bool:
        """Enclose those that the peer has not seen; False when it cannot see them all."""
        fresh = [s for s in segments if s.number not in self._shown]
        if len(self._shown) + len(fresh) > MAX_SHOWN:
            return False
        for segment in fresh:
            fd = segment.dup()
            if fd is None or not segment.when_closed(self._segment_closed):
                if fd is not None:
                    os.close(fd)
                return False
            self._enclosed.append(fd)
            shown.append((segment.number, segment.nbytes))
            with self._lock:
                self._shown.add(segment.number)
                self._subscribed[segment.number] = segment
        return True

    def _segment_closed(self, segment: Segment) -> None:
        with self._lock:
            self._shown.discard(segment.number)
            self._subscribed.pop(segment.number, None)
            self._gone.append(segment.number)
        self._on_news()

    def _take_gone(self) -> list[int]:
        if not self._gone:
            return []
        with self._lock:
            gone, self._gone = self._gone[:MAX_SHOWN], self._gone[MAX_SHOWN:]
        return gone

    # -- what we receive --------------------------------------------------------------------

    def receive(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Fill all views: small ones from what was read ahead, large ones in place."""
        calls = 0
        rest = list(views)
        while rest:
            calls += self._from_ahead(rest)
            missing = sum(map(len, rest))
            if not missing:
                break
            if missing >= _AHEAD_BYTES:
                return calls + super().receive(rest, deadline_s)
            calls += self._read_ahead(deadline_s)
        return calls

    def buffered(self) -> bool:
        """Whether something was read ahead."""
        return self._ahead_at < self._ahead_end

    def take(self, views: Sequence[memoryview]) -> list[memoryview]:
        """Fill views with what has come, without waiting; those that are left, or their rest."""
        rest = list(views)
        self._from_ahead(rest)
        if (missing := sum(map(len, rest))) >= _AHEAD_BYTES:
            return super().take(rest)
        if missing:
            self._ahead_at = self._ahead_end = 0
            with contextlib.suppress(BlockingIOError, InterruptedError):
                self._now(lambda: self._read_some([memoryview(self._ahead)], socket.MSG_DONTWAIT))
            self._from_ahead(rest)
        return rest

    def resolve(self, size: int, deadline_s: float) -> Reference:
        """Receive a reference, map what is shown with it, and check every run."""
        if size > MAX_BYTES:
            raise IntegrityError(f"a reference of {size} bytes, more than {MAX_BYTES}")
        data = bytearray(size)
        at = 0
        while at < size:  # never in place: descriptors come with these bytes
            if self._ahead_at == self._ahead_end:
                self._read_ahead(deadline_s)
            at += self._from_ahead([memoryview(data)[at:]], partly=True)
        table = Table.unpack(data)
        for number, nbytes in table.shown:
            if not self._fds or number in self._views or len(self._views) >= MAX_SHOWN:
                raise IntegrityError(f"segment {number} is shown without, or once too often")
            fd = self._fds.popleft()
            try:
                self._views[number] = View(fd, nbytes)
            finally:
                os.close(fd)
        for number in table.gone:
            if (view := self._views.pop(number, None)) is not None:
                view.close()
        if table.slot >= len(self._promises):
            raise IntegrityError(f"a reference with slot {table.slot} of {len(self._promises)}")
        if table.kind == ADDRESSES and self._meeting.peek is None:
            raise IntegrityError("a reference to memory that cannot be read")
        used = {n: self._views[n] for n in self._views} if table.kind == SEGMENTS else {}
        return _ShmReference(table, table.runs(used), used, self)

    def _from_ahead(self, views: list[memoryview], *, partly: bool = False) -> int:
        """Copy what was read ahead into views, which lose what was filled; bytes if `partly`."""
        copied = 0
        while views and self._ahead_at < self._ahead_end:
            n = min(len(views[0]), self._ahead_end - self._ahead_at)
            views[0][:n] = self._ahead[self._ahead_at : self._ahead_at + n]
            self._ahead_at += n
            copied += n
            views[0] = views[0][n:]
            if not len(views[0]):
                views.pop(0)
        return copied if partly else 0

    def _read_ahead(self, deadline_s: float) -> int:
        """Read what is there, at least a byte, with the descriptors that come with it."""
        self._ahead_at = self._ahead_end = 0
        return self._move(self._read_some, [memoryview(self._ahead)], deadline_s, partly=True)

    def _read_some(self, batch: Sequence[memoryview], flags: int = 0) -> int:
        """Receive bytes and descriptors."""
        got, ancillary, flags, _ = self._sock.recvmsg_into(
            batch, socket.CMSG_SPACE(_FDS), socket.MSG_CMSG_CLOEXEC | flags
        )
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_SHOWN:
            raise IntegrityError("more descriptors than a reference may bring")
        self._ahead_end = got
        return got

    # -- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Release socket, board, mappings and descriptors. Idempotent."""
        super().close()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            subscribed, self._subscribed = list(self._subscribed.values()), {}
        for segment in subscribed:
            segment.forget(self._segment_closed)
        self._promises = self._promises[:0].copy()
        for view in (self._meeting.theirs, *self._views.values()):
            view.close()
        self._meeting.board.close()
        if self._meeting.peek is not None:
            self._meeting.peek.close()
        for fd in [*self._fds, *self._enclosed]:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()
        self._enclosed = []
        self._views.clear()

    def read(self, sources: MemoryRuns, addresses: NDArray[np.int64]) -> int:
        """Read the peer's memory; returns the number of kernel calls."""
        peek = self._meeting.peek
        assert peek is not None, "checked with the reference"
        try:
            return peek.read(sources, addresses)
        except OSError as e:
            if isinstance(e, IntegrityError | PeerLostError):
                raise
            raise PeerLostError(f"{self._peer} can no longer be read: {e}") from e

    def promised(self, slot: int) -> int:
        """The pledge in a slot of the peer's board now."""
        return int(self._promises[slot]) if slot < len(self._promises) else 0


class _ShmReference(Reference, InFiles):
    """A checked table, with the mappings that it names."""

    def __init__(
        self, table: Table, runs: MemoryRuns, views: dict[int, View], connection: ShmConnection
    ) -> None:
        self._table = table
        self._runs = runs
        self._files = sorted(views.values(), key=lambda v: v.address)
        self._held = [v.memory for v in self._files]  # mapped as long as this is
        self._connection = connection

    @property
    def total_bytes(self) -> int:
        """Bytes in all runs."""
        return int(self._runs.lengths.sum())

    @property
    def runs(self) -> MemoryRuns:
        """The runs."""
        return self._runs

    def copier(
        self, sources: MemoryRuns, addresses: NDArray[np.int64]
    ) -> Callable[[int, int], int]:
        """Copies parts of the runs."""
        if self._table.kind == SEGMENTS:
            return mover(sources, addresses)
        lengths, places = sources.lengths, sources.addresses

        def read(low: int, high: int) -> int:
            part = MemoryRuns(places[low:high], lengths[low:high])
            return self._connection.read(part, addresses[low:high])

        return read

    def files(self, sources: MemoryRuns) -> tuple[Sequence[View], Ints, Ints] | None:
        """The segments that the runs are in."""
        if self._table.kind != SEGMENTS:
            return None
        starts = np.array([v.address for v in self._files], dtype=np.int64)
        at = np.searchsorted(starts, sources.addresses, side="right") - 1
        numbers = np.array([v.number for v in self._files], dtype=np.int64)
        used = [self._files[i] for i in np.unique(at).tolist()]
        return used, numbers[at], sources.addresses - starts[at]

    def kept(self) -> bool:
        """Whether the pledge is on the board still."""
        number = self._table.number
        return number != 0 and self._connection.promised(self._table.slot) == number
