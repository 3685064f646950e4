"""Coded frames on their way in: decoded by worker threads while the next ones arrive."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import xxhash

from sagellm.core.protocols import (
    CommError,
    CommTimeoutError,
    DistributedRuntimeError,
    IntegrityError,
    KVConnection,
    LayoutMismatchError,
)

from ._coded_request import CodecRequest
from ._coded_threads import CodecThreads, Credits
from ._coded_view import MAX_PIECE_BYTES, CodedUnits, codable, is_whole
from ._flows import Inflow
from ._meters import Traffic
from .compression import Decoder, Header as FrameHeader
from .compression.auto import label
from .compression.frame import split
from .frames import HEADER_BYTES, Header, block_sums

__all__ = ["CodedReader", "OnLanded"]

logger = logging.getLogger(__name__)

OnLanded = Callable[[Inflow, Header, list[int], list[int]], None]

_SLACK_BYTES = 1 << 17
"""What a frame may take beyond its values: a description of 64 KiB, and a table."""
_STEP_BYTES = 1 << 18
_ANY = CodecRequest("none")


class CodedReader:
    """Takes coded frames off a link's lanes. Every lane's thread calls `receive`.

    At most the channel's limit of bytes is held, coded and decoded together: a lane waits for
    room before it takes a frame off the wire, so that the peer waits, too. One link holds half of
    it at most; where none becomes free the transfer fails, and the link goes on.

    Args:
        threads: Of the channel.
        on_landed: Told what became of a frame, on a worker thread.
        on_bug: Told of an error that no frame can cause.
        io_timeout_s: In the middle of a frame, and for room.
        traffic: Counts what is received.

    """

    def __init__(
        self,
        threads: CodecThreads,
        on_landed: OnLanded,
        on_bug: Callable[[CommError], object],
        *,
        io_timeout_s: float,
        traffic: Traffic,
    ) -> None:
        self.checksum = True
        self._threads = threads
        self._share = Credits(max(1, threads.decoding.limit // 2))
        self._on_landed = on_landed
        self._on_bug = on_bug
        self._io_timeout_s = io_timeout_s
        self._traffic = traffic

    def receive(self, conn: KVConnection, flow: Inflow, head: Header, table: memoryview) -> None:
        """Take a claimed frame off the wire, and leave its flow; have it decoded in its turn.

        Raises:
            IntegrityError: Its sizes cannot be: the peer breaks the rules.
            CommTimeoutError: It does not come.

        """
        try:
            raw = flow.extent.span_bytes(head.layer, head.first, head.count)
            if not codable(flow.extent, head.layer) or raw > MAX_PIECE_BYTES:
                raise IntegrityError(f"a coded frame for {raw} bytes of layer {head.layer}")
            if head.payload_bytes > raw + _SLACK_BYTES:
                raise IntegrityError(f"a coded frame of {head.payload_bytes} bytes for {raw}")
        finally:
            flow.leave()  # nobody is at the blocks until it is decoded
        held, handed = head.payload_bytes + raw, False
        try:
            self._take(held)
        except CommTimeoutError as e:  # nobody's link is lost because others use the room
            if flow.broken is not None:
                flow.broken(e)
            _skip(conn, head.payload_bytes, self._io_timeout_s)
            return
        try:
            data, at, calls = self._arrive(conn, flow, head.payload_bytes)
            if at == head.payload_bytes:
                handed = self._threads.submit(
                    lambda: self._finish(flow, head, table, data, raw, held, calls)
                )
        finally:
            if not handed:
                self._give(held)
        _skip(conn, head.payload_bytes - at, self._io_timeout_s)

    def _take(self, held: int) -> None:
        """Wait for room, for less time than the peer waits for us.

        Raises:
            CommTimeoutError: There is none.
            PeerLostError: The channel is closed.

        """
        self._share.take(held, self._io_timeout_s / 2)
        try:
            self._threads.decoding.take(held, self._io_timeout_s / 4)
        except BaseException:
            self._share.give(held)
            raise

    def _give(self, held: int) -> None:
        self._threads.decoding.give(held)
        self._share.give(held)

    def _arrive(self, conn: KVConnection, flow: Inflow, size: int) -> tuple[memoryview, int, int]:
        """A payload, how much of it has come before nobody waited for it, and the calls."""
        if not flow.enter():
            return memoryview(b""), 0, 0
        try:  # within the flow, so that its fence breaks off what does not come
            data, at, calls = memoryview(bytearray(size)), 0, 0
            while at < size and not flow.stopped:
                piece = data[at : at + _STEP_BYTES]
                calls += conn.receive([piece], self._io_timeout_s)
                at += len(piece)
            return data, at, calls
        finally:
            flow.leave()

    def _finish(
        self,
        flow: Inflow,
        head: Header,
        table: memoryview,
        data: memoryview,
        raw: int,
        held: int,
        calls: int,
    ) -> None:
        """Check a frame, decode it into its blocks, and report; on a worker thread."""
        start = time.perf_counter()
        entered = flow.enter()
        try:
            try:
                if not entered:
                    return
                bad, name = self._decode(flow, head, table, data)
                wire = HEADER_BYTES + len(table) + head.payload_bytes
                done = 0 if bad else raw
                self._traffic.count(done, wire)
                flow.handle.coded_as(name)
                flow.handle.moved(  # before `landed`: whoever sees it complete sees it counted
                    done,
                    head.count - len(bad),
                    wire_bytes=wire,
                    runs=1,
                    syscalls=2 + calls,
                    verify_s=0.0,
                    codec_s=time.perf_counter() - start,
                )
                outcome = flow.landed(head, bad)
            finally:
                self._give(held)
                if entered:
                    flow.leave()
            self._on_landed(flow, head, *outcome)
        except Exception as e:
            logger.exception("a bug in a codec thread")
            self._on_bug(DistributedRuntimeError(f"decoding: {type(e).__name__}: {e}"))

    def _decode(
        self, flow: Inflow, head: Header, table: memoryview, data: memoryview
    ) -> tuple[list[int], str]:
        """Damaged blocks, which are none or all, and the codec's name."""
        every = list(range(head.count))
        units = CodedUnits(flow.extent, head.layer, head.first, head.count)
        try:
            if xxhash.xxh3_64_intdigest(table) != head.table_digest:
                return every, flow.handle.codec
            frame, sections = split(data)
            _check_front(frame, data, table)
            want = units.layout(_ANY)
            if frame.geometry.layout.axes != want.axes:
                raise LayoutMismatchError(
                    "a coded frame's axes",
                    ours=str(want.axes),
                    theirs=str(frame.geometry.layout.axes),
                )
            whole = is_whole(frame.geometry)
            with units.target(whole=whole) as out:
                decoder = Decoder(frame, out)
                for i, (entry, payload) in enumerate(sections):
                    if flow.stopped:
                        raise IntegrityError("nobody waits for it any more")
                    decoder.section(i, entry, payload)
            if whole and self._wrong(units, table):
                return every, label(frame.codings[0])
        except (IntegrityError, LayoutMismatchError) as e:
            logger.debug("%s: a coded frame of layer %d: %s", flow.handle, head.layer, e)
            return every, flow.handle.codec
        return [], label(frame.codings[0])

    def _wrong(self, units: CodedUnits, table: memoryview) -> bool:
        """Whether blocks that must arrive as they were did not."""
        sums = np.frombuffer(table[:-8], dtype="<u8")
        if not self.checksum or not sums.any():
            return False
        views = units.extent.unit_views(units.layer, units.first, units.count)
        found = block_sums(views, units.layer, units.first)
        return bool((np.array(found, dtype="<u8") != sums).any())


def _skip(conn: KVConnection, size: int, timeout_s: float) -> None:
    """Take bytes that nobody waits for off the wire."""
    scratch = memoryview(bytearray(min(size, _STEP_BYTES)))
    while size:
        piece = scratch[:size]
        conn.receive([piece], timeout_s)
        size -= len(piece)


def _check_front(frame: FrameHeader, data: memoryview, table: memoryview) -> None:
    """Check that the frame is the one that the sealed header announced.

    Raises:
        IntegrityError: It is another.

    """
    front = data[: frame.payload_offset]
    if xxhash.xxh3_64_intdigest(front) != int.from_bytes(table[-8:], "little"):
        raise IntegrityError("the frame is not the one that was announced")
