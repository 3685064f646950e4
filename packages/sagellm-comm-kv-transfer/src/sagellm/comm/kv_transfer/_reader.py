"""The receiving end of data connections: threads that read frames, one per lane."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import xxhash

from sagellm.core.protocols import (
    IntegrityError,
    KVCodec,
    KVConnection,
    OneSidedConnection,
    Reference,
)

from ._copy import pair
from ._flows import Inflow
from ._meters import Traffic
from .frames import CODED, HEADER_BYTES, RAW_BIT, REF, Header, block_sums
from .memory import Extent, Views

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
    codec_s: float


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
                outcome = self._take(conn, codec, flow, head, table, reference)
            finally:
                flow.leave()
            if outcome is not None:
                self._on_landed(flow, head, *outcome)

    def _take(
        self,
        conn: KVConnection,
        codec: KVCodec | None,
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
            arrived = self._receive(conn, codec, extent, head, table, raw)
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
        self,
        conn: KVConnection,
        codec: KVCodec | None,
        extent: Extent,
        head: Header,
        table: memoryview,
        raw: int,
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
            bad, calls, codec_s = self._decode(conn, codec, head, lengths, extent, units)
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


def _wrong(found: list[int], sums: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> list[int]:
    """Positions of blocks that are not what they were."""
    wrong: list[int] = np.flatnonzero(np.array(found, dtype="<u8") != sums).tolist()
    return wrong
