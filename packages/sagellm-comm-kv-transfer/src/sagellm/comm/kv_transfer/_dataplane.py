"""The two threads at the ends of a data connection: one writes frames, one reads them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import xxhash

from sagellm.core.protocols import (
    CommError,
    IntegrityError,
    KVCodec,
    KVConnection,
    OneSidedConnection,
    Reference,
)

from ._copy import pair
from ._flows import Chunk, Inflow, Outflow
from ._meters import Traffic
from .frames import CODED, HEADER_BYTES, RAW_BIT, REF, Header, block_sums
from .memory import Extent, Views

__all__ = ["DataReader", "DataWriter"]

_NOT_READY_S = 0.0005
_SCRATCH_BYTES = 1 << 16
_WARM_BYTES = 1 << 19
"""Copied before it is verified: little enough to be in the cache still."""


class _Lane:
    """One data connection of a writer; `busy` while some thread writes to it."""

    def __init__(self, conn: KVConnection, chunk_bytes: int) -> None:
        self.conn = conn
        self.one_sided = conn if isinstance(conn, OneSidedConnection) else None
        self.least_bytes = chunk_bytes
        self.chunk_bytes = self.one_sided.frame_bytes if self.one_sided else chunk_bytes
        self.busy = False
        self.error: CommError | None = None


class DataWriter:
    """Sends the chunks of its flows in turn, one frame each, over one lane or several.

    Args:
        chunk_bytes: Payload of a frame at most, unless one block is larger.
        io_timeout_s: Without progress for so long, the peer is lost.
        traffic: Counts what is sent.

    """

    def __init__(self, chunk_bytes: int, io_timeout_s: float, traffic: Traffic) -> None:
        self.traffic = traffic
        self.checksum = True
        self.codec: KVCodec | None = None
        self._chunk_bytes = chunk_bytes
        self._io_timeout_s = io_timeout_s
        self._changed = threading.Condition()
        self._flows: deque[Outflow] = deque()
        self._lanes: list[_Lane] = []
        self._poked = False
        self._stopped = False

    def add(self, flow: Outflow, *, here: bool = False) -> None:
        """Begin to serve a flow that has been granted.

        Args:
            flow: The flow.
            here: Whether this thread may send the first frame itself, which it does when a lane
                is idle and nothing waits. It may block for as long as the connection lets it.

        """
        lane, chunk = None, None
        with self._changed:
            if here and not self._flows and not self._stopped:
                lane = next((x for x in self._lanes if not x.busy and x.error is None), None)
            if (
                lane is not None
                and (chunk := flow.claim(lane.least_bytes, lane.chunk_bytes)) is not None
            ):
                lane.busy = True
            if (chunk is None or flow.waiting) and flow not in self._flows:
                self._flows.append(flow)
                self._poke_locked()
        if lane is None or chunk is None:
            return
        try:
            self._send(lane, flow, chunk)
        except CommError as e:
            lane.error = e  # the lane's own thread ends the link
        finally:
            flow.leave()
            with self._changed:
                lane.busy = False
                self._poke_locked()

    def stop(self) -> None:
        """Let `run` return."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def run(self, conn: KVConnection) -> None:
        """Send until stopped; raises what the connection raises. One call per lane."""
        lane = _Lane(conn, self._chunk_bytes)
        if lane.one_sided is not None:
            lane.one_sided.watch(self._poke)
        with self._changed:
            self._lanes.append(lane)
        try:
            while (work := self._next(lane)) is not None:
                if isinstance(work, memoryview):
                    self._tell(lane, work)
                    continue
                flow, chunk = work
                try:
                    self._send(lane, flow, chunk)
                finally:
                    flow.leave()
        finally:
            with self._changed:
                self._lanes.remove(lane)
            if lane.busy:
                conn.abort()
            with self._changed:  # whoever sends for us must be gone before the connection is
                self._changed.wait_for(lambda: not lane.busy)

    def _poke(self) -> None:
        with self._changed:
            self._poke_locked()

    def _poke_locked(self) -> None:
        self._poked = True
        self._changed.notify_all()

    def _next(self, lane: _Lane) -> tuple[Outflow, Chunk] | memoryview | None:
        """What to send next; bytes are what the connection itself has to say."""
        with self._changed:
            while not self._stopped:
                if lane.error is not None:
                    raise lane.error
                self._poked = False
                blocked = False
                if not lane.busy:
                    if lane.one_sided is not None and (news := lane.one_sided.news()) is not None:
                        return news
                    for _ in range(len(self._flows)):
                        flow = self._flows[0]
                        self._flows.rotate(-1)
                        chunk = flow.claim(lane.least_bytes, lane.chunk_bytes)
                        if chunk is not None:
                            return flow, chunk
                        if flow.waiting:
                            blocked = True
                        else:
                            self._flows.pop()  # comes back with its next span
                # an event has no descriptor to wait for: look again soon
                self._changed.wait_for(
                    lambda: self._poked or self._stopped, _NOT_READY_S if blocked else None
                )
            return None

    def _tell(self, lane: _Lane, news: memoryview) -> None:
        """Send a reference to nothing, in a frame of no transfer."""
        sums = bytes(8)
        head = Header(0, 0, 0, 1, len(news), REF).pack(sums)
        lane.conn.send([memoryview(head), news], self._io_timeout_s)
        self.traffic.count(0, len(head) + len(news))

    def _send(self, lane: _Lane, flow: Outflow, chunk: Chunk) -> None:
        extent = flow.extent
        assert extent is not None, "claimed without an extent"
        layer, first, count = chunk
        raw = extent.span_bytes(layer, first, count)
        verify_s = codec_s = 0.0
        sums = np.zeros(count, dtype="<u8")
        units: list[Views] = []
        if self.checksum or self.codec is not None:
            units = extent.unit_views(layer, first, count)
        if self.checksum:
            start = time.perf_counter()
            sums = np.array(block_sums(units, layer, first), dtype="<u8")
            verify_s = time.perf_counter() - start
        table, flags = sums.tobytes(), 0
        reference = self._refer(lane, flow, extent, chunk)
        if reference is not None:
            (payload, runs), flags = reference, REF
        elif self.codec is None:
            payload = extent.views(layer, first, count)
            runs = len(payload)
        else:
            start = time.perf_counter()
            payload, lengths = self._encode(self.codec, extent, layer, units)
            codec_s = time.perf_counter() - start
            table, flags, runs = table + lengths.tobytes(), CODED, len(payload)
        size = sum(map(len, payload))
        head = Header(flow.tid, layer, first, count, size, flags).pack(table)
        calls = lane.conn.send([memoryview(head), *payload], self._io_timeout_s)
        wire = len(head) + size
        self.traffic.count(raw, wire)
        flow.handle.moved(
            raw,
            count,
            wire_bytes=wire,
            runs=runs,
            syscalls=calls,
            verify_s=verify_s,
            codec_s=codec_s,
        )

    @staticmethod
    def _refer(
        lane: _Lane, flow: Outflow, extent: Extent, chunk: Chunk
    ) -> tuple[Views, int] | None:
        """A reference to a chunk and its number of runs; None where the bytes must be sent."""
        if lane.one_sided is None or (pledge := flow.pledge(lane.one_sided)) is None:
            return None
        memory = extent.runs(*chunk)
        reference = lane.one_sided.refer(memory, pledge)
        return None if reference is None else ([reference], len(memory.lengths))

    @staticmethod
    def _encode(
        codec: KVCodec, extent: Extent, layer: int, units: list[Views]
    ) -> tuple[Views, np.ndarray[tuple[int], np.dtype[np.uint32]]]:
        dtype = extent.dtype(layer)
        payload: Views = []
        lengths = np.empty(len(units), dtype="<u4")
        for i, views in enumerate(units):
            block = views[0] if len(views) == 1 else memoryview(b"".join(views))
            coded = memoryview(codec.encode(block, dtype=dtype))
            shrank = len(coded) < len(block)
            payload.append(coded if shrank else block)
            lengths[i] = len(coded) if shrank else len(block) | RAW_BIT
        return payload, lengths


class _Arrived(NamedTuple):
    """What became of a frame: damaged blocks, and what it cost."""

    bad: list[int]
    calls: int
    runs: int
    verify_s: float
    codec_s: float


class DataReader:
    """Receives frames into the blocks they were granted, and verifies them there.

    Args:
        flows: Flows of the link by number.
        on_landed: Told of every frame that was moved: flow, layer, damaged blocks (first time),
            damaged blocks (again). Called on this thread.
        io_timeout_s: In the middle of a frame; between frames it waits for ever.
        scratch_bytes: Coded bytes that are held at once, unless one block is larger.
        traffic: Counts what is received.

    """

    def __init__(
        self,
        flows: Mapping[int, Inflow],
        on_landed: Callable[[Inflow, Header, list[int], list[int]], None],
        *,
        io_timeout_s: float,
        scratch_bytes: int,
        traffic: Traffic,
    ) -> None:
        self.traffic = traffic
        self.checksum = True
        self.codec: KVCodec | None = None
        self._flows = flows
        self._on_landed = on_landed
        self._io_timeout_s = io_timeout_s
        self._scratch_bytes = scratch_bytes
        self._trash = memoryview(bytearray(_SCRATCH_BYTES))

    def run(self, conn: KVConnection) -> None:
        """Receive until the connection ends, by raising what it raises."""
        head_bytes = memoryview(bytearray(HEADER_BYTES))
        while True:
            conn.receive([head_bytes], float("inf"))
            head = Header.unpack(head_bytes)
            table = memoryview(bytearray(head.table_bytes))
            conn.receive([table], self._io_timeout_s)
            reference = None
            if head.flags & REF:  # also of a transfer that has ended: it may show us memory
                if not isinstance(conn, OneSidedConnection):
                    raise IntegrityError("a reference to memory on a path that reads none")
                reference = conn.resolve(head.payload_bytes, self._io_timeout_s)
            flow = self._flows.get(head.tid)
            if flow is None or not flow.claim(head):
                if reference is None:
                    self._discard(conn, head.payload_bytes)
                self.traffic.count(0, HEADER_BYTES + len(table) + head.payload_bytes)
                continue
            try:
                outcome = self._take(conn, flow, head, table, reference)
            finally:
                flow.leave()
            if outcome is not None:
                self._on_landed(flow, head, *outcome)

    def _take(
        self,
        conn: KVConnection,
        flow: Inflow,
        head: Header,
        table: memoryview,
        reference: Reference | None,
    ) -> tuple[list[int], list[int]] | None:
        """Damaged blocks, first time and again; None for a copy that the sender disowns."""
        extent, layer = flow.extent, head.layer
        raw = extent.span_bytes(layer, head.first, head.count)
        sound = xxhash.xxh3_64_intdigest(table) == head.table_digest
        arrived = _Arrived(list(range(head.count)), 2, 1, 0.0, 0.0)
        if not sound:
            if reference is None:
                self._discard(conn, head.payload_bytes)
        elif reference is not None:
            if reference.total_bytes != raw:
                raise IntegrityError(
                    f"a frame refers to {reference.total_bytes} bytes for blocks of {raw}"
                )
            arrived = self._copy(flow, head, table, reference)
            if flow.stopped or not reference.kept():
                return None
        else:
            arrived = self._receive(conn, extent, head, table, raw)
        fresh, again = flow.landed(head, arrived.bad)
        good = head.count - len(arrived.bad)
        done = raw if not arrived.bad else good * extent.unit_bytes(layer)
        wire = HEADER_BYTES + len(table) + head.payload_bytes
        self.traffic.count(done, wire)
        flow.handle.moved(
            done,
            good,
            wire_bytes=wire,
            runs=arrived.runs,
            syscalls=arrived.calls,
            verify_s=arrived.verify_s,
            codec_s=arrived.codec_s,
        )
        return fresh, again

    def _copy(
        self, flow: Inflow, head: Header, table: memoryview, reference: Reference
    ) -> _Arrived:
        """Copy what a frame refers to, and verify it while it is in the cache."""
        extent, layer, first, count = flow.extent, head.layer, head.first, head.count
        unit, step = extent.unit_bytes(layer), count
        if self.checksum:
            step = max(1, _WARM_BYTES // max(1, unit))
        starts = np.arange(0, count, step, dtype=np.int64)
        cuts = starts[1:] * unit
        paired = pair(reference.runs, extent.runs(layer, first, count), cuts)
        edges = [0, *np.searchsorted(paired.ends, cuts, side="right").tolist(), len(paired.ends)]
        sums = np.frombuffer(table[: count * 8], dtype="<u8")
        units = extent.unit_views(layer, first, count) if self.checksum else []
        copy = reference.copier(paired.sources, paired.addresses)
        calls, verify_s = 1, 0.0
        found: list[int] = []
        for at, low, high in zip(starts.tolist(), edges, edges[1:], strict=False):
            if flow.stopped:
                break  # nobody waits for the rest
            calls += copy(low, high)
            if self.checksum:
                start = time.perf_counter()
                found += block_sums(units[at : at + step], layer, first + at)
                verify_s += time.perf_counter() - start
        bad = _wrong(found, sums) if self.checksum and not flow.stopped else []
        return _Arrived(bad, calls, len(paired.ends), verify_s, 0.0)

    def _receive(
        self, conn: KVConnection, extent: Extent, head: Header, table: memoryview, raw: int
    ) -> _Arrived:
        """Receive a frame's bytes in place, and verify them there."""
        layer, first, count = head.layer, head.first, head.count
        sums = np.frombuffer(table[: count * 8], dtype="<u8")
        units: list[Views] = []
        if self.checksum or head.flags & CODED:
            units = extent.unit_views(layer, first, count)
        bad: list[int] = []
        runs, verify_s, codec_s = count, 0.0, 0.0
        if head.flags & CODED:
            lengths = np.frombuffer(table[count * 8 :], dtype="<u4")
            bad, calls, codec_s = self._decode(conn, head, lengths, extent, units)
        elif head.payload_bytes != raw:
            raise IntegrityError(f"a frame brings {head.payload_bytes} bytes for blocks of {raw}")
        else:
            views = extent.views(layer, first, count)
            runs = len(views)
            calls = conn.receive(views, self._io_timeout_s)
        if self.checksum:
            start = time.perf_counter()
            bad = sorted({*bad, *_wrong(block_sums(units, layer, first), sums)})
            verify_s = time.perf_counter() - start
        return _Arrived(bad, 2 + calls, runs, verify_s, codec_s)

    def _decode(
        self,
        conn: KVConnection,
        head: Header,
        lengths: np.ndarray[tuple[int], np.dtype[np.uint32]],
        extent: Extent,
        units: list[Views],
    ) -> tuple[list[int], int, float]:
        """Blocks that could not be decoded, kernel calls, seconds."""
        sizes = (lengths & (RAW_BIT - 1)).tolist()
        plain = (lengths & RAW_BIT).astype(bool).tolist()
        limit = extent.unit_bytes(head.layer)
        if self.codec is None and not all(plain):
            raise IntegrityError("a coded frame on a link without codec")
        if sum(sizes) != head.payload_bytes or max(sizes) > limit:
            raise IntegrityError(f"a coded frame whose lengths do not fit blocks of {limit} bytes")
        bad: list[int] = []
        calls, codec_s, at = 0, 0.0, 0
        dtype = extent.dtype(head.layer)
        while at < head.count:
            stop, size = at + 1, sizes[at]
            while stop < head.count and size + sizes[stop] <= self._scratch_bytes:
                size += sizes[stop]
                stop += 1
            scratch = memoryview(bytearray(size))
            calls += conn.receive([scratch], self._io_timeout_s)
            start = time.perf_counter()
            offset = 0
            for i in range(at, stop):
                frame = scratch[offset : offset + sizes[i]]
                offset += sizes[i]
                try:
                    self._place(frame, units[i], dtype, plain=plain[i])
                except IntegrityError:
                    bad.append(i)
            codec_s += time.perf_counter() - start
            at = stop
        return bad, calls, codec_s

    def _place(self, frame: memoryview, views: Views, dtype: str, *, plain: bool) -> None:
        size = sum(map(len, views))
        if plain:
            if len(frame) != size:
                raise IntegrityError(f"a raw frame of {len(frame)} bytes for a block of {size}")
            out = frame
        else:
            assert self.codec is not None, "checked with the frame"
            out = views[0] if len(views) == 1 else memoryview(bytearray(size))
            self.codec.decode(frame, out, dtype=dtype)
            if len(views) == 1:
                return
        at = 0
        for view in views:
            view[:] = out[at : at + len(view)]
            at += len(view)

    def _discard(self, conn: KVConnection, count: int) -> None:
        while count:
            piece = self._trash[: min(count, len(self._trash))]
            conn.receive([piece], self._io_timeout_s)
            count -= len(piece)


def _wrong(found: list[int], sums: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> list[int]:
    """Positions of blocks that are not what they were."""
    wrong: list[int] = np.flatnonzero(np.array(found, dtype="<u8") != sums).tolist()
    return wrong
