"""The sending end of data connections: threads that write frames, one per lane."""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Callable

import xxhash

from sagellm.core.protocols import (
    CommError,
    DistributedRuntimeError,
    KVConnection,
    OneSidedConnection,
)

from ._coded_out import CodedPiece
from ._device_extent import DeviceExtent, Gathered
from ._flows import Chunk, Outflow
from ._lanes import LaneTuner, RateMeter
from ._meters import Traffic
from .frames import REF, SECTIONS, Header, block_sum, block_sums
from .memory import Extent, Views

__all__ = ["DataWriter"]

_NOT_READY_S, _LONGEST_NOT_READY_S = 0.0005, 0.005
_PATIENCE = 1.25
"""How much longer each look at an event that has not happened waits than the last."""
_SHARED_BYTES = 1 << 20
_GROWTH = 4
"""The first frames of a transfer are smaller by this, so that its pipeline fills early."""
_FRAME_S = 0.025
_LEAST_BYTES = 1 << 18
"""What a slow network brings frames down to."""


class _Lane:
    """One data connection of a writer; fields are under the writer's lock.

    `busy` while some thread writes to it: its own, or one that had something small to send.
    """

    def __init__(
        self,
        conn: KVConnection,
        chunk_bytes: int,
        lock: threading.Lock,
    ) -> None:
        self.conn = conn
        self.one_sided = conn if isinstance(conn, OneSidedConnection) else None
        self.first_bytes = max(1, chunk_bytes // _GROWTH)
        self.chunk_bytes = self.one_sided.frame_bytes if self.one_sided else chunk_bytes
        self._most_bytes = self.chunk_bytes
        self.wake = threading.Condition(lock)
        self.asleep = False
        self.busy = False
        self.pause_s = _NOT_READY_S
        self.ended = False
        self.ahead: tuple[Outflow, Chunk, Gathered | None] | None = None
        """What comes next, on its way from a device while something else is being sent."""
        self.error: CommError | None = None

    def pace(self, count: int, seconds: float) -> None:
        """Have frames take about as long as others may wait for, after one took so long."""
        if self.one_sided is not None:
            return
        if seconds > _FRAME_S:
            self.chunk_bytes = max(_LEAST_BYTES, int(count * _FRAME_S / seconds))
        elif seconds < _FRAME_S / 2:
            self.chunk_bytes = min(self._most_bytes, 2 * self.chunk_bytes)

    def rouse(self) -> None:
        """Have its thread look again."""
        self.asleep = False
        self.wake.notify_all()


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
        self.key = b""
        self.tuner = tuner
        self._want_lanes = want_lanes
        self._chunk_bytes = chunk_bytes
        self._io_timeout_s = io_timeout_s
        self._lock = threading.Lock()
        self._lanes: list[_Lane] = []
        self._flows: deque[Outflow] = deque()
        self._rate = RateMeter()
        self._stopped = False

    def add(self, flow: Outflow, *, here: bool = False) -> None:
        """Begin to serve a flow that has been granted.

        Args:
            flow: The flow.
            here: Whether this thread may send the first frame itself, which it does when a lane
                is idle and nothing else waits. It may block as long as the connection lets it.

        """
        lane = chunk = None
        sent, stopped = 0, True
        try:
            with self._lock:
                if here and not self._flows and not self._stopped:
                    lane = self._idle_lane()
                if lane is not None:
                    lane.busy = True
                    chunk = flow.claim(lane.first_bytes, lane.first_bytes)
                if chunk is not None:
                    self._rate.begin()
                if chunk is None or flow.waiting:
                    if flow not in self._flows:
                        self._flows.append(flow)
                    self._wake_one()
            if lane is not None and chunk is not None:
                sent = self._send(lane, flow, chunk)
            stopped = False
        except CommError as e:
            if lane is None:
                raise
            lane.error, stopped = e, False  # the lane's own thread ends the link
        finally:
            if lane is not None:
                if stopped:  # perhaps in the middle of a frame
                    lane.error = DistributedRuntimeError("whoever sent was stopped")
                self._hand_back(lane, flow, chunk, sent)

    def _idle_lane(self) -> _Lane | None:
        for lane in self._lanes:
            if lane.asleep and not lane.busy:
                return lane
        return None

    def _hand_back(self, lane: _Lane, flow: Outflow, chunk: Chunk | None, sent: int) -> None:
        """Leave a lane to its own thread, whatever stops us meanwhile."""
        stopped = True
        try:
            if chunk is not None:
                try:
                    flow.leave()
                finally:
                    self._sent(sent)
            stopped = False
        finally:
            with self._lock:
                if stopped and lane.error is None:
                    lane.error = DistributedRuntimeError("whoever sent was stopped")
                lane.busy = False
                if lane.error is not None or self._flows or self._stopped or lane.ended:
                    lane.rouse()

    def stop(self) -> None:
        """Let `run` return."""
        with self._lock:
            self._stopped = True
            for lane in self._lanes:
                lane.rouse()

    def run(self, conn: KVConnection) -> None:
        """Send until stopped, as one lane more; raises what the connection raises."""
        lane = _Lane(conn, self._chunk_bytes, self._lock)
        if lane.one_sided is not None:
            lane.one_sided.watch(lambda: self._rouse(lane))
            if not self.checksum:  # then a large frame is there as early as a small one
                lane.first_bytes = lane.chunk_bytes
        with self._lock:
            index = len(self._lanes)
            self._lanes.append(lane)
        try:
            while (work := self._next(index, lane)) is not None:
                self._work(lane, work)
        finally:
            self._drop_ahead(lane)
            with self._lock:
                lane.ended = True
                if lane.busy:  # whoever sends for us must be gone before the connection is
                    conn.abort()
                lane.wake.wait_for(lambda: not lane.busy, self._io_timeout_s)

    def _rouse(self, lane: _Lane) -> None:
        with self._lock:
            lane.rouse()

    def _work(self, lane: _Lane, work: tuple[Outflow, Chunk] | memoryview) -> None:
        sent = 0
        if isinstance(work, memoryview):
            self._tell(lane, work)
            return
        flow, chunk = work
        try:
            sent = self._send(lane, flow, chunk, look_ahead=True)
        finally:
            flow.leave()
            self._sent(sent)

    def _look_ahead(self, lane: _Lane) -> None:
        """Begin to gather what comes next, if it is there already."""
        with self._lock:
            if (
                lane.ahead is not None
                or self._stopped
                or self._lanes.index(lane) >= self.tuner.lanes
            ):
                return
            chosen, _ = self._choose(lane)
            if chosen is None:
                return
            flow, chunk = chosen
            lane.ahead = (flow, chunk, None)
        if isinstance(flow.extent, DeviceExtent):
            lane.ahead = (flow, chunk, _gather(flow, flow.extent, chunk, wait=False))

    def _drop_ahead(self, lane: _Lane) -> None:
        """Let go of what will not be sent."""
        ahead, lane.ahead = lane.ahead, None
        if ahead is not None:
            flow, chunk, gathered = ahead
            if gathered is not None:
                gathered.close()
            if (piece := flow.coded(chunk)) is not None:
                piece.done()
            flow.leave()
            self._sent(0)

    def _next(self, index: int, lane: _Lane) -> tuple[Outflow, Chunk] | memoryview | None:
        """What to send next; bytes are what the connection itself has to say."""
        with self._lock:
            while not self._stopped:
                if lane.error is not None:
                    raise lane.error
                if lane.ahead is not None:
                    return lane.ahead[:2]
                blocked = False
                if not lane.busy:
                    if lane.one_sided is not None and (news := lane.one_sided.news()) is not None:
                        return news
                    if index < self.tuner.lanes:
                        chosen, blocked = self._choose(lane)
                        if chosen is not None:
                            lane.pause_s = _NOT_READY_S
                            return chosen
                lane.asleep = True
                # an event has no descriptor to wait for: look again soon
                pause_s = lane.pause_s if blocked and not index else None
                lane.wake.wait_for(lambda: not lane.asleep, pause_s)
                if blocked:
                    lane.pause_s = min(_PATIENCE * lane.pause_s, _LONGEST_NOT_READY_S)
                lane.asleep = False
            return None

    def _choose(self, lane: _Lane) -> tuple[tuple[Outflow, Chunk] | None, bool]:
        """The next chunk of the next flow, and whether one waits for something."""
        blocked = False
        for _ in range(len(self._flows)):
            flow = self._flows[0]
            self._flows.rotate(-1)
            lanes = min(self.tuner.lanes, len(self._lanes))
            chunk = flow.claim(lane.first_bytes, lane.chunk_bytes, lanes)
            if chunk is not None:
                self._rate.begin()
                if self._much_waits():
                    self._wake_one()
                return (flow, chunk), blocked
            if flow.waiting:
                blocked = True
            else:
                self._flows.pop()  # comes back with its next span
        return None, blocked

    def _much_waits(self) -> bool:
        left = _SHARED_BYTES
        for flow in self._flows:
            left -= flow.waiting_bytes(left)
            if left <= 0:
                return True
        return False

    def _wake_one(self) -> None:
        """Wake the first lane that is in use and has nothing to do."""
        for lane in self._lanes[: self.tuner.lanes]:
            if lane.asleep and not lane.busy:
                lane.rouse()
                return

    def _sent(self, count: int) -> None:
        with self._lock:
            if (rate := self._rate.end(count)) is None:
                return
            wanted, running = self.tuner.measured(rate), len(self._lanes)
        if wanted > running:
            self._want_lanes(wanted)

    def _tell(self, lane: _Lane, news: memoryview) -> None:
        """Send a reference to nothing, in a frame of no transfer."""
        sums = bytes(8)
        head = Header(0, 0, 0, 1, len(news), REF).pack(sums, self.key)
        lane.conn.send([memoryview(head), news], self._io_timeout_s)
        self.traffic.count(0, len(head) + len(news))

    def _send(self, lane: _Lane, flow: Outflow, chunk: Chunk, *, look_ahead: bool = False) -> int:
        """Send one frame; the bytes of the blocks in it."""
        gathered, lane.ahead = (lane.ahead[2] if lane.ahead else None), None
        if (piece := flow.coded(chunk)) is not None:
            return self._send_coded(lane, flow, chunk, piece)
        extent = flow.extent
        assert extent is not None, "claimed without an extent"
        if not isinstance(extent, DeviceExtent):
            return self._send_from(lane, flow, chunk, extent)
        gathered = gathered or _gather(flow, extent, chunk, wait=True)
        if gathered is None:
            return 0
        try:
            if look_ahead:
                self._look_ahead(lane)
            try:
                gathered.wait()
            except CommError as e:
                _broken(flow, e)
                return 0
            return self._send_from(lane, flow, chunk, extent, gathered)
        finally:
            gathered.close()

    def _send_from(
        self,
        lane: _Lane,
        flow: Outflow,
        chunk: Chunk,
        extent: Extent,
        gathered: Gathered | None = None,
    ) -> int:
        """Send one frame from where its blocks are in host memory."""
        layer, first, count = chunk
        memory = extent if gathered is None else gathered
        if gathered is None and count == 1:
            views = extent.views(layer, first, 1)
            raw = sum(map(len, views))
            if lane.one_sided is None or raw < lane.one_sided.least_bytes:
                return self._send_one(lane, flow, chunk, views, raw)
        raw = extent.span_bytes(layer, first, count)
        verify_s = 0.0
        table = bytes(8 * count)
        units: list[Views] = []
        if self.checksum:
            units = memory.unit_views(layer, first, count)
            start = time.perf_counter()
            sums = block_sums(units, layer, first)
            table = struct.pack(f"<{count}Q", *sums)
            verify_s = time.perf_counter() - start
        flags = 0
        reference = None  # what is in a pinned half stays there no longer than this call
        if gathered is None:
            reference = self._refer(lane, flow, extent, chunk, raw)
        if reference is not None:  # sent in any case: it may show segments
            (payload, runs), flags = reference, REF
        elif flow.stopped:
            return 0  # nobody waits for it
        else:
            payload = memory.views(layer, first, count)
            runs = len(payload)
        size = sum(map(len, payload))
        head = Header(flow.tid, layer, first, count, size, flags | flow.flags).pack(table, self.key)
        self._ship(lane, flow, chunk, raw, head, payload, runs, verify_s)
        return raw

    def _send_one(self, lane: _Lane, flow: Outflow, chunk: Chunk, views: Views, raw: int) -> int:
        """Send one block as it is, without the detours that many are worth."""
        if flow.stopped:
            return 0  # nobody waits for it
        layer, first, _ = chunk
        start, table = time.perf_counter(), bytes(8)
        if self.checksum and len(views) == 1:
            table = xxhash.xxh3_64_digest(views[0], (layer << 32) + first)[::-1]
        elif self.checksum:
            table = block_sum(views, layer, first).to_bytes(8, "little")
        verify_s = time.perf_counter() - start
        head = Header(flow.tid, layer, first, 1, raw, flow.flags).pack(table, self.key)
        self._ship(lane, flow, chunk, raw, head, views, len(views), verify_s)
        return raw

    def _ship(
        self,
        lane: _Lane,
        flow: Outflow,
        chunk: Chunk,
        raw: int,
        head: bytes,
        payload: Views,
        runs: int,
        verify_s: float,
    ) -> None:
        """Put a frame on the wire, and count it."""
        start = time.perf_counter()
        calls = lane.conn.send([memoryview(head), *payload], self._io_timeout_s)
        spent_s = time.perf_counter() - start
        lane.pace(raw, spent_s)
        wire = len(head) + sum(map(len, payload))
        flow.sent(lane.conn, wire, spent_s)
        self.traffic.count(raw, wire)
        flow.handle.moved(
            raw,
            chunk.units,
            wire_bytes=wire,
            runs=runs,
            syscalls=calls,
            verify_s=verify_s,
            codec_s=0.0,
        )

    def _send_coded(self, lane: _Lane, flow: Outflow, chunk: Chunk, piece: CodedPiece) -> int:
        """Send a frame that was encoded ahead; the bytes of the blocks in it."""
        try:
            extent = flow.extent
            if flow.stopped or extent is None:
                return 0  # nobody waits for it
            raw, flags = extent.span_bytes(*chunk), SECTIONS | flow.flags
            head = Header(flow.tid, *chunk, piece.nbytes, flags).pack(piece.table, self.key)
            start = time.perf_counter()
            calls = lane.conn.send([memoryview(head), *piece.views], self._io_timeout_s)
            wire = len(head) + piece.nbytes
            flow.sent(lane.conn, wire, time.perf_counter() - start)
        finally:
            piece.done()
        self.traffic.count(raw, wire)
        flow.handle.moved(
            raw,
            chunk.units,
            wire_bytes=wire,
            runs=len(piece.views),
            syscalls=calls,
            verify_s=0.0,
            codec_s=piece.codec_s,
        )
        return raw

    @staticmethod
    def _refer(
        lane: _Lane, flow: Outflow, extent: Extent, chunk: Chunk, raw: int
    ) -> tuple[Views, int] | None:
        """A reference to a chunk and its number of runs; None where the bytes must be sent."""
        if lane.one_sided is None or raw < lane.one_sided.least_bytes:
            return None
        if (pledge := flow.pledge(lane.one_sided)) is None:
            return None
        memory = extent.runs(*chunk)
        reference = lane.one_sided.refer(memory, pledge)
        return None if reference is None else ([reference], len(memory.lengths))


def _gather(flow: Outflow, extent: DeviceExtent, chunk: Chunk, *, wait: bool) -> Gathered | None:
    """Begin to bring a chunk to the host; None when its flow is broken, or none may wait."""
    try:
        return extent.gather(*chunk, wait=wait)
    except Exception as e:  # of a device and its library
        _broken(flow, e)
        return None


def _broken(flow: Outflow, error: Exception) -> None:
    if flow.broken is not None:
        flow.broken(error)
