"""One transfer over one link, seen from the thread that moves its bytes.

A flow belongs to the event loop; its data thread only claims a piece, moves it, and reports.
`stop` is the fence: once it has returned True, or `idle` has been called, no thread reads or
writes the blocks any more. Several threads may be at different pieces of one flow.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from sagellm.core.protocols import (
    CommError,
    IntegrityError,
    KVConnection,
    OneSidedConnection,
    Pledge,
    ReadyEvent,
)

from .frames import MAX_UNITS, Header
from .memory import Extent
from .transfer import TransferHandle

if TYPE_CHECKING:
    from ._coded_out import CodedPiece

__all__ = ["Chunk", "Flow", "Inflow", "Outflow", "Span"]

_MISSING, _COMING, _LANDED = 0, 1, 2


class Span(NamedTuple):
    """Consecutive units of a layer, to be sent once an event has happened."""

    layer: int
    first: int
    stop: int
    after: ReadyEvent | None = None


class Chunk(NamedTuple):
    """Units that go into one frame."""

    layer: int
    first: int
    units: int


class Flow:
    """What both directions share: the fence.

    Args:
        handle: The transfer that it is part of.
        tid: Its number on the link.

    """

    stopped = False
    idle: Callable[[], object] | None = None
    _pieces = 0

    def __init__(self, handle: TransferHandle, tid: int) -> None:
        self.handle = handle
        self.tid = tid
        self.lock = threading.Lock()
        self._guests: set[object] = set()

    @property
    def busy(self) -> bool:
        """Whether a thread is at the blocks now."""
        return self._pieces > 0 or bool(self._guests)

    def stop(self) -> bool:
        """Let no further piece begin; True when none is under way."""
        with self.lock:
            self.stopped = True
            return not self.busy

    def enter(self) -> bool:
        """Begin a piece; False when no further one may."""
        with self.lock:
            if self.stopped:
                return False
            self._pieces += 1
            return True

    def leave(self, guest: object = None) -> None:
        """End a piece; tells whoever waits behind the fence.

        Args:
            guest: By which name it was claimed, if by one: then this is idempotent, for who may
                have been interrupted.

        """
        with self.lock:
            if guest is None:
                self._pieces -= 1
            else:
                self._guests.discard(guest)
            idle = self.idle if self.stopped and not self.busy else None
        if idle is not None:
            idle()


class Outflow(Flow):
    """Blocks to be sent.

    Spans may be queued before the receiver has granted anything; they wait for the extent.
    """

    extent: Extent | None = None
    flags = 0
    broken: Callable[[Exception], object] | None = None
    """Told of an event that cannot be asked, under the locks of whoever asked it."""
    _claimed_bytes = 0

    def __init__(self, handle: TransferHandle, tid: int) -> None:
        super().__init__(handle, tid)
        self._pending: deque[Span] = deque()
        self._pledges: dict[OneSidedConnection, Pledge] = {}

    def stop(self) -> bool:
        """Let no further piece begin, and no peer's copy count that has not ended."""
        with self.lock:
            self.stopped = True
            pledges, self._pledges = self._pledges, {}
        for pledge in pledges.values():
            pledge.revoke()
        return not self.busy

    def pledge(self, conn: OneSidedConnection) -> Pledge | None:
        """Our word to one peer that the blocks stay as they are; None when it cannot be given."""
        with self.lock:
            if self.stopped:
                return None
            found = self._pledges.get(conn) or conn.pledge()
            if found is not None:
                self._pledges[conn] = found
            return found

    def queue(self, spans: Iterable[Span]) -> None:
        """Add units to send."""
        with self.lock:
            self._pending.extend(spans)

    def coded(self, chunk: Chunk) -> CodedPiece | None:
        """What a claimed chunk was encoded to; None sends it as it is."""
        return None

    def sent(self, conn: KVConnection, nbytes: int, seconds: float) -> None:
        """Note what a frame took on the wire."""

    def claim(self, first_bytes: int, chunk_bytes: int, lanes: int = 1) -> Chunk | None:
        """The next units to send; None when there are none, or none that are ready.

        Args:
            first_bytes: Of the first chunk at most, so that the receiver begins early; each may
                be as large as all before it.
            chunk_bytes: Of any chunk at most.
            lanes: That share what is left, so that all are done at about the same time.

        """
        with self.lock:
            if self.stopped or self.extent is None or not self._pending:
                return None
            for _ in range(len(self._pending)):
                span = self._pending[0]
                units = self.extent.units(span.layer)
                stop = min(span.stop, units)
                if span.first >= stop:
                    self._pending.popleft()
                    continue
                try:
                    ready = span.after is None or span.after.query()
                except Exception as e:  # the caller's event, of whatever library
                    self._pending.clear()
                    if self.broken is not None:
                        self.broken(e)
                    return None
                if not ready:
                    self._pending.rotate(-1)
                    continue
                unit = max(1, self.extent.unit_bytes(span.layer))
                share = (stop - span.first) * unit // lanes
                grown = min(max(first_bytes, self._claimed_bytes), max(first_bytes, share))
                most = min(chunk_bytes, grown)
                count = min(max(1, most // unit), stop - span.first, MAX_UNITS)
                self._claimed_bytes += count * unit
                self._pending.popleft()
                if span.first + count < stop:
                    rest = Span(span.layer, span.first + count, stop)
                    self._pending.appendleft(rest)
                self._pieces += 1
                return Chunk(span.layer, span.first, count)
            return None

    @property
    def waiting(self) -> bool:
        """Whether something is queued, ready or not."""
        with self.lock:
            return bool(self._pending) and not self.stopped and self.extent is not None

    def waiting_bytes(self, most: int) -> int:
        """Bytes that are queued, ready or not, counted until they are `most`."""
        with self.lock:
            total = 0
            if self.stopped or self.extent is None:
                return 0
            for span in self._pending:
                count = min(span.stop, self.extent.units(span.layer)) - span.first
                total += max(0, count) * self.extent.unit_bytes(span.layer)
                if total >= most:
                    break
            return total


class Inflow(Flow):
    """Blocks that a peer may write: exactly these, each once.

    Args:
        handle: The transfer that it is part of.
        tid: Its number on the link.
        extent: Where they go.
        layers: Layers that come; None means all.

    """

    def __init__(
        self,
        handle: TransferHandle,
        tid: int,
        extent: Extent,
        layers: Iterable[int] | None = None,
    ) -> None:
        super().__init__(handle, tid)
        self.extent = extent
        self.begun = False
        self.broken: Callable[[CommError], object] | None = None
        """Told when its blocks cannot be written."""
        wanted = range(extent.layers) if layers is None else set(layers)
        self._units = [  # one byte each
            bytearray(extent.units(i) if i in wanted else 0) for i in range(extent.layers)
        ]
        self._left = [len(u) for u in self._units]
        self._retried: set[tuple[int, int]] = set()
        self.total_bytes = sum(extent.span_bytes(i, 0, n) for i, n in enumerate(self._left) if n)
        self.total_units = sum(self._left)

    @property
    def complete(self) -> bool:
        """Whether all of it is in place and verified."""
        return not any(self._left)

    def layer_complete(self, layer: int) -> bool:
        """Whether all of a layer is in place and verified."""
        return not self._left[layer]

    def claim(self, head: Header, guest: object = None) -> bool:
        """Whether a frame may be written now; False when the transfer has ended meanwhile.

        Args:
            head: What comes.
            guest: A name by which `leave` may be called more than once.

        Raises:
            IntegrityError: It was never granted, or has landed before: the peer breaks the rules.

        """
        with self.lock:
            if self.stopped:
                return False
            layers = len(self._units)
            if head.layer >= layers or head.first + head.count > len(self._units[head.layer]):
                raise IntegrityError(
                    f"the peer sent blocks {head.first}..{head.first + head.count - 1} of layer "
                    f"{head.layer}, which were not granted"
                )
            units, stop = self._units[head.layer], head.first + head.count
            if units.count(_MISSING, head.first, stop) != head.count:
                raise IntegrityError(f"the peer sent landed blocks of layer {head.layer} again")
            units[head.first : stop] = bytes((_COMING,)) * head.count
            if guest is None:
                self._pieces += 1
            else:
                self._guests.add(guest)
            self.begun = True
            return True

    def landed(self, head: Header, bad: list[int]) -> tuple[list[int], list[int]]:
        """Note a frame's outcome: (damaged for the first time, damaged again)."""
        with self.lock:
            units = self._units[head.layer]
            units[head.first : head.first + head.count] = bytes((_LANDED,)) * head.count
            self._left[head.layer] -= head.count - len(bad)
            if not bad:
                return bad, bad
            for i in bad:
                units[head.first + i] = _MISSING
            again = [i for i in bad if (head.layer, head.first + i) in self._retried]
            fresh = [i for i in bad if (head.layer, head.first + i) not in self._retried]
            self._retried.update((head.layer, head.first + i) for i in fresh)
            return fresh, again
