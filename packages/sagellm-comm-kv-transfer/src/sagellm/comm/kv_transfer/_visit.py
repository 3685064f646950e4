"""What has been received of a lane, by its thread and by callers who read for themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sagellm.core.protocols import IntegrityError, KVConnection

from ._device_extent import DeviceExtent
from ._flows import Inflow
from ._turn import Gate, ReadTurn
from .frames import HEADER_BYTES, REF, SECTIONS, Header
from .memory import Views
from .transports._socket import SocketConnection

__all__ = ["SMALL_BYTES", "Coming", "Lane", "open_lane"]

SMALL_BYTES = 1 << 18
"""What somebody who waits receives himself; the lane's thread receives the rest."""
_PATIENCE_S = 0.02
"""How long he waits for the rest of a frame before the lane's thread does."""


@dataclass(slots=True)
class Coming:
    """A frame of which somebody has received a part: what is left, and where it belongs."""

    flow: Inflow
    head: Header
    table: memoryview
    views: Views
    left: Views
    calls: int = 2


@dataclass(slots=True, eq=False)
class Lane:
    """One data connection of a reader; its fields belong to whoever has the turn.

    Attributes:
        conn: The connection.
        turn: Who reads it; None where only its thread can.
        head_bytes: Where a header goes.
        head_left: What a visitor has not received of it.
        head: A header whose frame a visitor has left to the lane's thread.
        coming: A frame that a visitor has not received in full.
        error: Why nobody can go on.
        posted: Whether the event loop has to be roused.
        rouse: Does that.
        receiving: Whether a visitor is in the middle of something; after a visit, that he was
            interrupted there.
        at: Whose blocks a visitor may have claimed, as a guest by the name of this lane.
        calm: Whether what came last was small, so that its thread need not hurry.

    """

    conn: KVConnection
    turn: ReadTurn | None = None
    head_bytes: memoryview = field(default_factory=lambda: memoryview(bytearray(HEADER_BYTES)))
    head_left: Views = field(default_factory=list)
    head: Header | None = None
    coming: Coming | None = None
    error: Exception | None = None
    posted: bool = False
    rouse: Callable[[], None] = lambda: None
    at: Inflow | None = None
    receiving: bool = False
    calm: bool = True

    def visit(
        self,
        gate: Gate,
        over: Callable[[], bool],
        timeout_s: float,
        flows: Mapping[int, Inflow],
        key: bytes,
        finish: Callable[[Lane, Coming], None],
    ) -> None:
        """Read small frames on the caller's thread, as `DataReader.read` says.

        Args:
            gate: What the caller waits at.
            over: Whether it has what it waits for.
            timeout_s: Longest wait.
            flows: Where frames go, by number.
            key: What seals their headers.
            finish: Takes a frame that has come in full.

        """
        turn = self.turn
        if turn is None:
            return
        end = time.monotonic() + timeout_s
        try:
            if not turn.ask(gate):
                return
            gate.wait(timeout_s)
            while not over() and turn.has(gate):
                left = end - time.monotonic()
                begun = self.coming is not None or bool(self.head_left)
                if left <= 0:
                    return
                if turn.come(min(left, _PATIENCE_S) if begun else left):
                    self.receiving = True
                    coming = self.receive_small(flows, key)
                    if coming is not None and not coming.left:
                        finish(self, coming)
                    self.receiving = False
                    if self.posted and not over():  # others wait for what has come
                        self.rouse()
                        self.posted = False
                    if self.head is not None:
                        return
                elif begun:
                    return
        except Exception as e:  # which its thread meets
            self.error = e
        finally:
            turn.leave(gate)

    def receive_small(self, flows: Mapping[int, Inflow], key: bytes) -> Coming | None:
        """Receive what has come of a frame; None when there is none that the visitor may take.

        `head` is set when its header has come, and its thread has to take it.
        """
        take = self.conn.take  # type: ignore[attr-defined]  # only those that have it are visited
        if (coming := self.coming) is None:
            self.head_left = take(self.head_left or [self.head_bytes])
            if self.head_left:
                return None
            head = Header.unpack(self.head_bytes, key)
            flow = flows.get(head.tid)
            if (
                flow is None
                or head.payload_bytes > SMALL_BYTES
                or head.flags & (REF | SECTIONS)
                or isinstance(flow.extent, DeviceExtent)
                or not self._claim(flow, head)
            ):
                self.head = head
                return None
            table = memoryview(bytearray(8 * head.count))
            views = flow.extent.views(head.layer, head.first, head.count)
            coming = self.coming = Coming(flow, head, table, views, [table, *views])
            if head.payload_bytes != sum(map(len, views)):
                raise IntegrityError(
                    f"a frame brings {head.payload_bytes} bytes for blocks of another size"
                )
        coming.left = take(coming.left)
        coming.calls += 1
        if coming.left:  # its end is on its way
            coming.left = take(coming.left)
            coming.calls += 1
        return coming

    def leave(self) -> None:
        """Leave the blocks that a visitor has claimed, if he has. Idempotent."""
        self.coming = None
        if self.at is not None:
            self.at.leave(self)
            self.at = None

    def _claim(self, flow: Inflow, head: Header) -> bool:
        self.at = flow  # before: an interrupt may come as soon as it is claimed
        if not flow.claim(head, self):
            self.at = None
        return self.at is not None


def open_lane(conn: KVConnection, rouse: Callable[[], None]) -> Lane:
    """A lane, which callers may read where connection and system allow it."""
    if isinstance(conn, SocketConnection) and ReadTurn.possible():
        turn = ReadTurn(conn.fileno(), conn.buffered, lambda: conn.aborted)
        return Lane(conn, turn, rouse=rouse)
    return Lane(conn)
