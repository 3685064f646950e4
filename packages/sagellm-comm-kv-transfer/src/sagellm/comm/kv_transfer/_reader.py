"""The receiving end of data connections: threads that read frames, one per lane."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import xxhash

from sagellm.core.protocols import (
    CommError,
    DistributedRuntimeError,
    IntegrityError,
    KVConnection,
    MemoryRuns,
    OneSidedConnection,
    Reference,
    UnsupportedOperationError,
)

from ._coded_in import CodedReader
from ._copy import Paired, pair
from ._device_extent import DeviceExtent
from ._flows import Inflow
from ._landing import Landing, land
from ._meters import Traffic
from ._offload import Offloaded, offload
from ._segment import have_workers
from ._turn import Gate
from ._visit import SMALL_BYTES, Coming, Lane, open_lane
from .frames import HEADER_BYTES, REF, SECTIONS, Header, block_sums
from .memory import Extent, Ints, Views

__all__ = ["DataReader"]

_SCRATCH_BYTES = 1 << 16
_WARM_BYTES = 1 << 19
"""Copied before it is verified: little enough to be in the cache still."""


class _Arrived(NamedTuple):
    """What became of a frame: damaged blocks, and what it cost."""

    bad: list[int]
    calls: int
    runs: int
    verify_s: float


class DataReader:
    """Receives frames into the blocks they were granted, and verifies them there.

    Every lane runs `run` on a thread of its own; they share the flows.

    Args:
        flows: Flows of the link by number.
        on_landed: Told of every frame that was moved: flow, header, damaged blocks (first time),
            damaged blocks (again). Called on this thread; True when something was posted to the
            event loop, which is not awake.
        io_timeout_s: In the middle of a frame; between frames it waits for ever.
        traffic: Counts what is received.
        coded: Takes frames of codecs.
        rouse: Has the event loop look at what `on_landed` has posted.

    """

    def __init__(
        self,
        flows: Mapping[int, Inflow],
        on_landed: Callable[[Inflow, Header, list[int], list[int]], bool],
        *,
        io_timeout_s: float,
        traffic: Traffic,
        coded: CodedReader,
        rouse: Callable[[], None] = lambda: None,
    ) -> None:
        self.traffic = traffic
        self._coded = coded
        self.late = 0
        """Frames of transfers that have ended, or of an earlier epoch."""
        self.key = b""
        self._flows = flows
        self._on_landed = on_landed
        self._io_timeout_s = io_timeout_s
        self._rouse = rouse
        self._seat: Lane | None = None

    @property
    def checksum(self) -> bool:
        """Whether blocks are verified."""
        return self._coded.checksum

    @checksum.setter
    def checksum(self, on: bool) -> None:
        self._coded.checksum = on

    def run(self, conn: KVConnection) -> None:
        """Receive until the connection ends, by raising what it raises."""
        lane = open_lane(conn, self._rouse)
        self._seat = self._seat or lane
        for_ever = float("inf")
        try:
            while True:
                if lane.calm and lane.turn is not None and lane.turn.settle():
                    self._resume(lane)
                    continue
                conn.receive([lane.head_bytes], for_ever)
                self._frame(lane, Header.unpack(lane.head_bytes, self.key))
        finally:
            if lane.turn is not None:
                lane.turn.close()

    def _frame(self, lane: Lane, head: Header) -> None:
        """Receive what follows a header."""
        conn = lane.conn
        lane.calm = head.payload_bytes <= SMALL_BYTES
        if lane.calm and lane.turn is not None:
            self._seat = lane  # what is small goes over one lane, as long as that is idle
        table = memoryview(bytearray(head.table_bytes))
        with_table = not head.flags & (REF | SECTIONS)  # then it comes together with the bytes
        if not with_table:
            conn.receive([table], self._io_timeout_s)
        reference = None
        if head.flags & REF:  # also of a transfer that has ended: it may show us memory
            lane.calm = False
            if not isinstance(conn, OneSidedConnection):
                raise IntegrityError("a reference to memory on a path that reads none")
            reference = conn.resolve(head.payload_bytes, self._io_timeout_s)
        flow = self._flows.get(head.tid)
        if flow is None or not flow.claim(head):
            if reference is None:
                rest = len(table) if with_table else 0
                self._discard(conn, rest + head.payload_bytes)
            self.late += 1
            self.traffic.count(0, HEADER_BYTES + len(table) + head.payload_bytes)
            return
        on_device = isinstance(flow.extent, DeviceExtent)
        if head.flags & SECTIONS and on_device:
            self._refuse_coded(conn, flow, head)
            return
        if head.flags & SECTIONS:
            self._coded.receive(conn, flow, head, table)  # which leaves the flow, later
            return
        if on_device:
            self._land(conn, flow, head, table, reference)
            return
        try:
            outcome = self._take(conn, flow, head, table, reference)
        finally:
            flow.leave()
        if outcome is not None and self._on_landed(flow, head, *outcome):
            self._rouse()

    # -- on the thread of somebody who waits --------------------------------------------------

    def read(self, gate: Gate, over: Callable[[], bool], timeout_s: float) -> None:
        """Read small frames until it is over; returns early when a lane's thread has to go on.

        What an exception leaves unfinished ends the connection.

        Args:
            gate: What the caller waits at, which is opened when it is over.
            over: Whether it is.
            timeout_s: Longest wait.

        """
        if (lane := self._seat) is not None:
            lane.visit(gate, over, timeout_s, self._flows, self.key, self._finish)

    def _finish(self, lane: Lane, coming: Coming) -> None:
        """Verify a frame that has been received in parts, and report it."""
        flow, head = coming.flow, coming.head
        try:
            arrived = self._check(flow.extent, head, coming.table, coming.views, coming.calls)
            outcome = self._account(flow, head, arrived)
        finally:
            lane.leave()
        # not here: the event loop would take the GIL from a caller who has what he waits for
        lane.posted |= self._on_landed(flow, head, *outcome)

    def _resume(self, lane: Lane) -> None:
        """Go on with what somebody else has left."""
        coming, head = lane.coming, lane.head
        if lane.posted:
            lane.posted = False
            self._rouse()
        if lane.receiving and lane.error is None:
            lane.error = DistributedRuntimeError("whoever read a frame was interrupted")
        if lane.error is not None:
            lane.leave()
            raise lane.error
        if coming is not None:
            try:
                coming.calls += lane.conn.receive(coming.left, self._io_timeout_s)
            except BaseException:
                lane.leave()
                raise
            self._finish(lane, coming)
            self._rouse()
        elif head is not None:
            lane.head = None
            self._frame(lane, head)
        elif lane.head_left:
            lane.conn.receive(lane.head_left, self._io_timeout_s)
            lane.head_left = []
            self._frame(lane, Header.unpack(lane.head_bytes, self.key))

    # -- what a frame brings ------------------------------------------------------------------

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
        arrived = _Arrived(list(range(head.count)), 2, 1, 0.0)
        if reference is None:
            arrived = self._receive(conn, extent, head, table, raw)
        elif _sound(head, table):
            if reference.total_bytes != raw:
                raise IntegrityError(
                    f"a frame refers to {reference.total_bytes} bytes for blocks of {raw}"
                )
            try:
                arrived = self._copy(flow, head, table, reference)
            except CommError:
                if flow.stopped or not reference.kept():
                    return None  # its memory may be gone by now
                raise
            if flow.stopped or not reference.kept():
                return None
        return self._account(flow, head, arrived)

    def _account(
        self, flow: Inflow, head: Header, arrived: _Arrived
    ) -> tuple[list[int], list[int]]:
        """Count a frame: damaged blocks, first time and again."""
        extent, layer = flow.extent, head.layer
        good = head.count - len(arrived.bad)
        if arrived.bad:
            done = good * extent.unit_bytes(layer)
        elif head.flags & REF:
            done = extent.span_bytes(layer, head.first, head.count)
        else:
            done = head.payload_bytes
        table_bytes = head.table_bytes if head.flags else 8 * head.count
        wire = HEADER_BYTES + table_bytes + head.payload_bytes
        self.traffic.count(done, wire)
        flow.handle.moved(  # before `landed`: whoever sees it complete sees all of it counted
            done,
            good,
            wire_bytes=wire,
            runs=arrived.runs,
            syscalls=arrived.calls,
            verify_s=arrived.verify_s,
            codec_s=0.0,
        )
        return flow.landed(head, arrived.bad)

    def _land(
        self,
        conn: KVConnection,
        flow: Inflow,
        head: Header,
        table: memoryview,
        reference: Reference | None,
    ) -> None:
        """Take a frame whose blocks are on a device; its flow is left when the device is done."""
        assert isinstance(flow.extent, DeviceExtent), "asked before"
        staging, kept = flow.extent.staging, True
        try:
            landing = Landing(conn, flow, head, table)
            if not head.flags & REF:
                conn.receive([table], self._io_timeout_s)
            if not _sound(head, table):
                landing.bad = list(range(head.count))
                if reference is None:
                    self._discard(conn, head.payload_bytes)
            else:
                kept = land(
                    landing,
                    reference,
                    checksum=self.checksum,
                    timeout_s=self._io_timeout_s,
                )
        except BaseException:
            staging.when_landed(None, lambda _: flow.leave())
            raise
        staging.when_landed(None, lambda _: self._landed(landing, kept))

    def _refuse_coded(self, conn: KVConnection, flow: Inflow, head: Header) -> None:
        """Fail what codes for a pool that its sender did not know to be on a device."""
        text = "coded frames cannot be decoded into a pool on a device: send without a codec"
        try:
            self._discard(conn, head.payload_bytes)
            if flow.broken is not None:
                flow.broken(UnsupportedOperationError(text))
        finally:
            flow.leave()

    def _landed(self, landing: Landing, kept: bool) -> None:
        """Note what the device has put in place."""
        flow, head = landing.flow, landing.head
        outcome = None
        try:
            if landing.errors:
                if flow.broken is not None:
                    flow.broken(landing.errors[0])
            elif kept and not flow.stopped:
                arrived = _Arrived(landing.bad, landing.calls, landing.runs, landing.verify_s)
                outcome = self._account(flow, head, arrived)
        finally:
            flow.leave()
        if outcome is not None and self._on_landed(flow, head, *outcome):
            self._rouse()

    def _copy(
        self, flow: Inflow, head: Header, table: memoryview, reference: Reference
    ) -> _Arrived:
        """Copy what a frame refers to, and verify it while it is in the cache."""
        extent, layer, first, count = flow.extent, head.layer, head.first, head.count
        unit, step, helped = extent.unit_bytes(layer), count, have_workers()
        if self.checksum or helped:
            step = max(1, _WARM_BYTES // max(1, unit))
        starts = np.arange(0, count, step, dtype=np.int64)
        cuts = starts[1:] * unit
        paired = pair(reference.runs, extent.runs(layer, first, count), cuts)
        edges = [0, *np.searchsorted(paired.ends, cuts, side="right").tolist(), len(paired.ends)]
        sums = np.frombuffer(table[: count * 8], dtype="<u8")
        calls, verify_s = 1, 0.0
        bad: list[int] = []

        def copy_here(begin: int, stop: int) -> None:
            nonlocal calls, verify_s
            if begin == stop:
                return
            copy = reference.copier(paired.sources, paired.addresses)
            units = extent.unit_views(layer, first, count) if self.checksum else []
            found: list[int] = []
            for i in range(begin, stop):
                if flow.stopped:
                    return  # nobody waits for the rest
                calls += copy(edges[i], edges[i + 1])
                if self.checksum:
                    began, at = time.perf_counter(), int(starts[i])
                    found += block_sums(units[at : at + step], layer, first + at)
                    verify_s += time.perf_counter() - began
            if self.checksum:
                at = int(starts[begin])
                bad.extend(at + i for i in _wrong(found, sums[at : at + len(found)]))

        given = None
        if helped:
            edges_of = np.array(edges)
            units_to = np.minimum(starts + step, count)
            batches = np.stack((edges_of[:-1], edges_of[1:], starts, units_to), axis=1)
            given = self._offload(flow, head, reference, paired, batches, sums)
        theirs = 0 if given is None else given.batches
        found = None
        try:
            copy_here(theirs, len(starts))
        finally:
            if given is not None:
                began = time.perf_counter()
                found = given.working.wait()
                verify_s += time.perf_counter() - began if self.checksum else 0.0
                calls += 2
        if found is None:
            copy_here(0, theirs)
        else:
            bad = [*found, *bad]
        return _Arrived(sorted(bad), calls, len(paired.ends), verify_s)

    def _offload(
        self,
        flow: Inflow,
        head: Header,
        reference: Reference,
        paired: Paired,
        batches: Ints,
        sums: np.ndarray[tuple[int], np.dtype[np.uint64]],
    ) -> Offloaded | None:
        """What a copy worker does of it; None when none does any of it."""
        checks = None
        if self.checksum:
            runs = flow.extent.runs(head.layer, head.first, head.count)
            whole = self._whole_units(runs, flow.extent.unit_bytes(head.layer), head.count)
            if whole is None:
                return None  # a worker sums what lies in one piece only
            checks = (whole, (head.layer << 32) + head.first + np.arange(head.count), sums)
        return offload(reference, paired, batches, checks, lambda: flow.stopped, self._io_timeout_s)

    @staticmethod
    def _whole_units(runs: MemoryRuns, unit: int, count: int) -> MemoryRuns | None:
        """Where each unit lies; None when one of them is in pieces."""
        ends, starts = np.cumsum(runs.lengths), np.arange(count, dtype=np.int64) * unit
        at = np.searchsorted(ends, starts, side="right")
        if len(ends) == 0 or ends[-1] != count * unit or (starts + unit > ends[at]).any():
            return None
        addresses = runs.addresses[at] + starts - (ends[at] - runs.lengths[at])
        return MemoryRuns(addresses, np.full(count, unit, dtype=np.int64))

    def _receive(
        self, conn: KVConnection, extent: Extent, head: Header, table: memoryview, raw: int
    ) -> _Arrived:
        """Receive a table and its blocks in place, by one call, and verify them there."""
        layer, first, count = head.layer, head.first, head.count
        if head.payload_bytes != raw:
            raise IntegrityError(f"a frame brings {head.payload_bytes} bytes for blocks of {raw}")
        views = extent.views(layer, first, count)
        calls = 1 + conn.receive([table, *views], self._io_timeout_s)
        return self._check(extent, head, table, views, calls)

    def _check(
        self, extent: Extent, head: Header, table: memoryview, views: Views, calls: int
    ) -> _Arrived:
        """Verify blocks that are in place."""
        if not _sound(head, table):
            return _Arrived(list(range(head.count)), calls, len(views), 0.0)
        if head.count == len(views) == 1:  # without detours and numpy, which cost more than the sum
            start, bad = time.perf_counter(), []
            seed = (head.layer << 32) + head.first
            if self.checksum and xxhash.xxh3_64_digest(views[0], seed)[::-1] != table:
                bad = [0]
            return _Arrived(bad, calls, 1, time.perf_counter() - start)
        units = extent.unit_views(head.layer, head.first, head.count)
        bad, verify_s = self._verify(units, head, table)
        return _Arrived(bad, calls, len(views), verify_s)

    def _verify(
        self, units: list[Views], head: Header, table: memoryview
    ) -> tuple[list[int], float]:
        """Blocks that are not what they were, and seconds."""
        if not self.checksum:
            return [], 0.0
        start = time.perf_counter()
        found = block_sums(units, head.layer, head.first)
        wrong = _wrong(found, np.frombuffer(table[: head.count * 8], dtype="<u8"))
        return wrong, time.perf_counter() - start

    def _discard(self, conn: KVConnection, count: int) -> None:
        trash = memoryview(bytearray(min(count, _SCRATCH_BYTES)))
        while count:
            piece = trash[: min(count, len(trash))]
            conn.receive([piece], self._io_timeout_s)
            count -= len(piece)


def _sound(head: Header, table: memoryview) -> bool:
    """Whether a table is what its header says."""
    return xxhash.xxh3_64_intdigest(table) == head.table_digest


def _wrong(found: list[int], sums: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> list[int]:
    """Positions of blocks that are not what they were."""
    wrong: list[int] = np.flatnonzero(np.array(found, dtype="<u8") != sums).tolist()
    return wrong
