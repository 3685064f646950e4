"""The threads at the ends of data connections: some write frames, some read them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
import xxhash

from sagellm.core.protocols import IntegrityError, KVCodec, KVConnection

from ._flows import Chunk, Inflow, Outflow
from ._lanes import LaneTuner, RateMeter
from ._meters import Traffic
from .frames import CODED, HEADER_BYTES, RAW_BIT, Header, block_sums
from .memory import Extent, Views

__all__ = ["DataReader", "DataWriter"]

_NOT_READY_S = 0.0005
_SCRATCH_BYTES = 1 << 16
_SHARED_BYTES = 1 << 20


class DataWriter:
    """Sends the chunks of its flows in turn, one frame each, over one or several lanes.

    A lane is a thread in `run` with a connection of its own. What is small goes over one lane;
    as long as much is waiting, each busy lane wakes the next.

    Args:
        chunk_bytes: Payload of a frame at most, unless one block is larger.
        io_timeout_s: Without progress for so long, the peer is lost.
        traffic: Counts what is sent.
        tuner: Says how many lanes are used.
        want_lanes: Told when more lanes are wanted than run; called on a lane's thread.

    """

    def __init__(
        self,
        chunk_bytes: int,
        io_timeout_s: float,
        traffic: Traffic,
        tuner: LaneTuner,
        want_lanes: Callable[[int], object],
    ) -> None:
        self.traffic = traffic
        self.checksum = True
        self.make_codec: Callable[[], KVCodec] | None = None
        self.tuner = tuner
        self._want_lanes = want_lanes
        self._chunk_bytes = chunk_bytes
        self._io_timeout_s = io_timeout_s
        self._lock = threading.Lock()
        self._wakes: list[threading.Condition] = []
        self._asleep: list[bool] = []
        self._flows: deque[Outflow] = deque()
        self._rate = RateMeter()
        self._stopped = False

    def add(self, flow: Outflow) -> None:
        """Begin to serve a flow that has been granted."""
        with self._lock:
            if flow not in self._flows:
                self._flows.append(flow)
            self._wake_one()

    def stop(self) -> None:
        """Let `run` return."""
        with self._lock:
            self._stopped = True
            for lane in range(len(self._wakes)):
                self._wake(lane)

    def run(self, conn: KVConnection) -> None:
        """Send until stopped, as one lane more; raises what the connection raises."""
        codec = self.make_codec() if self.make_codec is not None else None
        with self._lock:
            lane = len(self._wakes)
            self._wakes.append(threading.Condition(self._lock))
            self._asleep.append(False)
        while (work := self._next(lane)) is not None:
            flow, chunk = work
            sent = 0
            try:
                sent = self._send(conn, codec, flow, chunk)
            finally:
                flow.leave()
                self._sent(sent)

    def _next(self, lane: int) -> tuple[Outflow, Chunk] | None:
        with self._lock:
            while not self._stopped:
                blocked = False
                if lane < self.tuner.lanes:
                    for _ in range(len(self._flows)):
                        flow = self._flows[0]
                        self._flows.rotate(-1)
                        chunk = flow.claim(self._chunk_bytes)
                        if chunk is not None:
                            self._rate.begin()
                            if self._much_waits():
                                self._wake_one()
                            return flow, chunk
                        if flow.waiting:
                            blocked = True
                        else:
                            self._flows.pop()  # comes back with its next span
                self._asleep[lane] = True
                # an event has no descriptor to wait for: look again soon
                pause_s = _NOT_READY_S if blocked and not lane else None
                self._wakes[lane].wait_for(lambda: not self._asleep[lane], pause_s)
                self._asleep[lane] = False
            return None

    def _much_waits(self) -> bool:
        left = _SHARED_BYTES
        for flow in self._flows:
            left -= flow.waiting_bytes(left)
            if left <= 0:
                return True
        return False

    def _wake_one(self) -> None:
        """Wake the first lane that is in use and has nothing to do."""
        for lane in range(min(self.tuner.lanes, len(self._wakes))):
            if self._asleep[lane]:
                self._wake(lane)
                return

    def _wake(self, lane: int) -> None:
        self._asleep[lane] = False
        self._wakes[lane].notify()

    def _sent(self, count: int) -> None:
        with self._lock:
            if (rate := self._rate.end(count)) is None:
                return
            wanted, running = self.tuner.measured(rate), len(self._wakes)
        if wanted > running:
            self._want_lanes(wanted)

    def _send(self, conn: KVConnection, codec: KVCodec | None, flow: Outflow, chunk: Chunk) -> int:
        """Send one frame; the bytes of the blocks in it."""
        extent = flow.extent
        assert extent is not None, "claimed without an extent"
        layer, first, count = chunk
        raw = extent.span_bytes(layer, first, count)
        verify_s = codec_s = 0.0
        sums = np.zeros(count, dtype="<u8")
        units: list[Views] = []
        if self.checksum or codec is not None:
            units = extent.unit_views(layer, first, count)
        if self.checksum:
            start = time.perf_counter()
            sums = block_sums(units, layer, first)
            verify_s = time.perf_counter() - start
        if codec is None:
            payload = extent.views(layer, first, count)
            head = Header(flow.tid, layer, first, count, raw, flow.flags).pack(sums.tobytes())
        else:
            start = time.perf_counter()
            payload, lengths = self._encode(codec, extent, layer, units)
            codec_s = time.perf_counter() - start
            size = sum(map(len, payload))
            head = Header(flow.tid, layer, first, count, size, CODED | flow.flags).pack(
                sums.tobytes() + lengths.tobytes()
            )
        runs = len(payload)
        calls = conn.send([memoryview(head), *payload], self._io_timeout_s)
        wire = len(head) + sum(map(len, payload))
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
        return raw

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


class DataReader:
    """Receives frames into the blocks they were granted, and verifies them there.

    Every lane runs `run` on a thread of its own; they share the flows.

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
        self.make_codec: Callable[[], KVCodec] | None = None
        self._flows = flows
        self._on_landed = on_landed
        self._io_timeout_s = io_timeout_s
        self._scratch_bytes = scratch_bytes

    def run(self, conn: KVConnection) -> None:
        """Receive until the connection ends, by raising what it raises."""
        codec = self.make_codec() if self.make_codec is not None else None
        head_bytes = memoryview(bytearray(HEADER_BYTES))
        while True:
            conn.receive([head_bytes], float("inf"))
            head = Header.unpack(head_bytes)
            table = memoryview(bytearray(head.table_bytes))
            conn.receive([table], self._io_timeout_s)
            flow = self._flows.get(head.tid)
            if flow is None or not flow.claim(head):
                self._discard(conn, head.payload_bytes)  # late bytes of a transfer that has ended
                self.traffic.count(0, HEADER_BYTES + len(table) + head.payload_bytes)
                continue
            try:
                fresh, again = self._take(conn, codec, flow, head, table)
            finally:
                flow.leave()
            self._on_landed(flow, head, fresh, again)

    def _take(
        self,
        conn: KVConnection,
        codec: KVCodec | None,
        flow: Inflow,
        head: Header,
        table: memoryview,
    ) -> tuple[list[int], list[int]]:
        extent, layer = flow.extent, head.layer
        raw = extent.span_bytes(layer, head.first, head.count)
        verify_s = codec_s = 0.0
        calls, runs = 2, 1
        if xxhash.xxh3_64_intdigest(table) != head.table_digest:
            self._discard(conn, head.payload_bytes)
            bad = list(range(head.count))
        else:
            sums = np.frombuffer(table[: head.count * 8], dtype="<u8")
            units: list[Views] = []
            if self.checksum or head.flags & CODED:
                units = extent.unit_views(layer, head.first, head.count)
            if head.flags & CODED:
                lengths = np.frombuffer(table[head.count * 8 :], dtype="<u4")
                bad, more, codec_s = self._decode(conn, codec, head, lengths, extent, units)
                calls += more
                runs = head.count
            else:
                if head.payload_bytes != raw:
                    raise IntegrityError(
                        f"a frame brings {head.payload_bytes} bytes for blocks of {raw}"
                    )
                views = extent.views(layer, head.first, head.count)
                runs = len(views)
                calls += conn.receive(views, self._io_timeout_s)
                bad = []
            if self.checksum:
                start = time.perf_counter()
                wrong = np.flatnonzero(block_sums(units, layer, head.first) != sums)
                bad = sorted({*bad, *wrong.tolist()})
                verify_s = time.perf_counter() - start
        good = head.count - len(bad)
        done = raw if not bad else good * extent.unit_bytes(layer)
        wire = HEADER_BYTES + len(table) + head.payload_bytes
        self.traffic.count(done, wire)
        flow.handle.moved(  # before `landed`: whoever sees it complete sees all of it counted
            done,
            good,
            wire_bytes=wire,
            runs=runs,
            syscalls=calls,
            verify_s=verify_s,
            codec_s=codec_s,
        )
        return flow.landed(head, bad)

    def _decode(
        self,
        conn: KVConnection,
        codec: KVCodec | None,
        head: Header,
        lengths: np.ndarray[tuple[int], np.dtype[np.uint32]],
        extent: Extent,
        units: list[Views],
    ) -> tuple[list[int], int, float]:
        """Blocks that could not be decoded, kernel calls, seconds."""
        sizes = (lengths & (RAW_BIT - 1)).tolist()
        plain = (lengths & RAW_BIT).astype(bool).tolist()
        limit = extent.unit_bytes(head.layer)
        if codec is None and not all(plain):
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
                    self._place(codec if not plain[i] else None, frame, units[i], dtype)
                except IntegrityError:
                    bad.append(i)
            codec_s += time.perf_counter() - start
            at = stop
        return bad, calls, codec_s

    @staticmethod
    def _place(codec: KVCodec | None, frame: memoryview, views: Views, dtype: str) -> None:
        """Put a block where it belongs, decoded unless it came as it is (no codec)."""
        size = sum(map(len, views))
        if codec is None:
            if len(frame) != size:
                raise IntegrityError(f"a raw frame of {len(frame)} bytes for a block of {size}")
            out = frame
        else:
            out = views[0] if len(views) == 1 else memoryview(bytearray(size))
            codec.decode(frame, out, dtype=dtype)
            if len(views) == 1:
                return
        at = 0
        for view in views:
            view[:] = out[at : at + len(view)]
            at += len(view)

    def _discard(self, conn: KVConnection, count: int) -> None:
        trash = memoryview(bytearray(min(count, _SCRATCH_BYTES)))
        while count:
            piece = trash[: min(count, len(trash))]
            conn.receive([piece], self._io_timeout_s)
            count -= len(piece)
