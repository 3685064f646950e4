"""Pinned halves between a device's blocks and the wire. Unverified on hardware.

To send, the blocks of a frame are gathered on the device by one call per run of a block, and
copied to a half while the frame before it is on the wire. What is received is verified in a half
and then scattered while the next frame comes. A half is free again when the device is done with it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sagellm.core.protocols import CommError, CommTimeoutError, ReadyEvent

from ._device import Device, Queue, wait_for
from .frames import MAX_UNITS
from .memory import Ints, Views, bytes_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DeviceStaging", "Half", "Rows"]

logger = logging.getLogger(__name__)

_LOOK_S = 5.0
_INDEX_BYTES = 2 * 8 * MAX_UNITS

Rows = Sequence["Tensor"]
"""Per run of a block: a view `[block, element]` of the device's memory."""


class Half:
    """Pinned bytes and their twin on the device.

    Args:
        device: Whose.
        nbytes: How many.

    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = nbytes
        self.host, self._twin = device.pinned(nbytes), device.empty(nbytes)
        self._indices = device.pinned(_INDEX_BYTES), device.empty(_INDEX_BYTES)
        self.memory = bytes_of(self.host)
        self.address = self.host.data_ptr()
        self.event: ReadyEvent | None = None

    def units(self, count: int, nbytes: int) -> list[Views]:
        """Memory of each of its first units of that size."""
        return [[self.memory[i * nbytes : (i + 1) * nbytes]] for i in range(count)]

    def fill(self, queue: Queue, rows: Rows, ids: Ints) -> None:
        """Begin to bring these blocks here, their runs side by side."""
        import torch

        def work() -> None:
            (where,) = self._upload(ids)
            for run, part in self._parts(self._twin, rows, len(ids)):
                part.copy_(torch.index_select(run, 0, where))
            size = len(ids) * _width(rows)
            self.host[:size].copy_(self._twin[:size], non_blocking=True)

        self.event = queue.submit(work)

    def spread(self, queue: Queue, rows: Rows, ids: Ints, positions: Ints | None) -> None:
        """Begin to bring what is here to these blocks.

        Args:
            queue: In which stream.
            rows: Of the blocks.
            ids: Blocks of the units that are here.
            positions: Those of the units that are good; None for all.

        """

        def work() -> None:
            size = len(ids) * _width(rows)
            self._twin[:size].copy_(self.host[:size], non_blocking=True)
            if positions is None:
                (where,), which = self._upload(ids), None
            else:
                where, which = self._upload(ids[positions], positions)
            for run, part in self._parts(self._twin, rows, len(ids)):
                run.index_copy_(0, where, part if which is None else part[which])

        self.event = queue.submit(work)

    def _upload(self, *columns: Ints) -> list[Tensor]:
        """Numbers on the device, from pinned memory so that nobody waits for them."""
        import torch

        words = torch.from_numpy(np.concatenate(columns))
        host, twin = (t[: 8 * len(words)].view(torch.int64) for t in self._indices)
        host.copy_(words)
        twin.copy_(host, non_blocking=True)
        ends = np.cumsum([len(c) for c in columns]).tolist()
        return [twin[end - len(c) : end] for c, end in zip(columns, ends, strict=True)]

    @staticmethod
    def _parts(memory: Tensor, rows: Rows, count: int) -> list[tuple[Tensor, Tensor]]:
        """Each run, with where it lies in units that are side by side."""
        unit, at, found = _width(rows), 0, []
        table = memory[: count * unit].view(count, unit)
        for run in rows:
            width = run.shape[1] * run.element_size()
            part = table[:, at : at + width]
            found.append((run, part.view(run.dtype)))
            at += width
        return found


def _width(rows: Rows) -> int:
    """Bytes of a unit."""
    return sum(r.shape[1] * r.element_size() for r in rows)


class DeviceStaging:
    """The halves of one pool, with the streams that fill and empty them. Thread-safe.

    Args:
        device: Where the pool is.
        half_bytes: Of a half that receives, unless one block is larger.
        halves: Of each direction: two for each connection that moves at once.
        timeout_s: Longest wait for a free half, or for a gather.

    """

    def __init__(
        self, device: Device, half_bytes: int, halves: int = 4, timeout_s: float = 30.0
    ) -> None:
        self.device = device
        self.half_bytes = half_bytes
        self.timeout_s = timeout_s
        self.outgoing, self.incoming = device.queue(), device.queue()
        self._free_out, self._free_in = _Halves(device, halves), _Halves(device, halves)
        self._ends: queue.SimpleQueue[tuple[Half | None, Callable[[CommError | None], None]] | None]
        self._ends = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def to_send(self, nbytes: int, *, wait: bool) -> Half | None:
        """A half of so many bytes at least; None when none is free and nobody shall wait."""
        return self._free_out.take(nbytes, self.timeout_s if wait else None)

    def sent(self, half: Half) -> None:
        """Take one back, once the device no longer reads blocks for it."""
        self._quiet(half)
        self._free_out.give(half)

    def to_receive(self, nbytes: int) -> Half:
        """A half of so many bytes at least.

        Raises:
            CommTimeoutError: None became free in time.

        """
        half = self._free_in.take(nbytes, self.timeout_s)
        assert half is not None, "waited for"
        return half

    def dropped(self, half: Half) -> None:
        """Take back one whose bytes go nowhere."""
        self._free_in.give(half)

    def when_landed(self, half: Half | None, then: Callable[[CommError | None], None]) -> None:
        """Call back once the device has written what it holds, with what went wrong if it has.

        On a thread of this object, or at once when it is closed; in order, so that without a half
        it is the end of all before. The half is taken back.
        """
        with self._lock:
            late = self._closed
            if not late and self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"kv-landing-{self.device}", daemon=True
                )
                self._thread.start()
            if not late:
                self._ends.put((half, then))
        if late:
            self._end(half, then)

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread, once what it waits for has happened. Idempotent."""
        with self._lock:
            thread, self._closed = self._thread, True
        if thread is not None and thread is not threading.current_thread():
            self._ends.put(None)
            thread.join(timeout_s)

    def _run(self) -> None:
        while (work := self._ends.get()) is not None:
            self._end(*work)

    def _end(self, half: Half | None, then: Callable[[CommError | None], None]) -> None:
        error = None
        if half is not None:
            error = self._quiet(half)
            self._free_in.give(half)
        try:
            then(error)
        except Exception:
            logger.exception("a bug in what follows a landing on %s", self.device)

    def _quiet(self, half: Half) -> CommError | None:
        """Wait until the device is done with a half, and say what went wrong.

        Without limit: as long as the device may write, no block is safe.
        """
        event, half.event = half.event, None
        while event is not None:
            try:
                wait_for(event, _LOOK_S, f"blocks of {self.device}")
                return None
            except CommTimeoutError:
                logger.warning("%s has not ended a copy of blocks for %g s", self.device, _LOOK_S)
            except CommError as e:
                return e
        return None


class _Halves:
    """A bounded number of halves, made when first needed."""

    def __init__(self, device: Device, count: int) -> None:
        self._device = device
        self._left = count
        self._idle = threading.Condition()
        self._free: list[Half] = []

    def take(self, nbytes: int, timeout_s: float | None) -> Half | None:
        with self._idle:
            if not (self._free or self._left):
                if timeout_s is None:
                    return None
                if not self._idle.wait_for(lambda: self._free or self._left, timeout_s):
                    raise CommTimeoutError(
                        f"no pinned buffer of {self._device} became free in {timeout_s:g} s"
                    )
            half = self._free.pop() if self._free else None
            if half is None:
                self._left -= 1
        if half is not None and half.nbytes >= nbytes:
            return half
        try:
            return Half(self._device, nbytes)
        except BaseException:
            with self._idle:
                self._left += 1
                self._idle.notify()
            raise

    def give(self, half: Half) -> None:
        with self._idle:
            self._free.append(half)
            self._idle.notify()
