"""One link: a control connection on the event loop, and lanes, data connections with threads.

The side that opened it (`outgoing`) uses it for its own pushes and fetches; the other side
answers on it. Two nodes that push to each other have two links.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from sagellm.core.protocols import (
    CommError,
    DistributedRuntimeError,
    KVConnection,
    KVLayout,
    LayoutMismatchError,
    PeerLostError,
)

from . import auth, wire
from ._coded_link import LinkCoding
from ._control import Control
from ._dial import Dialler
from ._flows import Inflow
from ._invitations import Invitations
from ._loop import READ, WRITE, EventLoop
from ._reader import DataReader
from ._room import Pressed, Room
from ._writer import DataWriter
from .plan import check_layouts

__all__ = ["Link"]

logger = logging.getLogger(__name__)

_BATCH_BYTES = 1 << 18
_MAX_REASON = 1024


class Link:
    """A link; everything without a note happens on the event loop.

    Args:
        loop: The loop.
        peer: Node at the other end.
        outgoing: Whether this side opened it.
        writer: Sends our blocks.
        make_reader: Makes the reader, given our inflows.
        max_backlog_bytes: Control bytes that the peer may leave unread, and that its invitations
            take.
        max_invitations: Invitations of the peer that are kept.
        invited: Memory of the invitations of all links.
        control: Memory that the control connections of all links hold.
        on_message: Gets every message of the peer.
        on_lost: Told once that the link is gone.

    """

    def __init__(
        self,
        loop: EventLoop,
        peer: int,
        *,
        outgoing: bool,
        writer: DataWriter,
        make_reader: Callable[[dict[int, Inflow]], DataReader],
        max_backlog_bytes: int,
        max_invitations: int,
        invited: Room,
        control: Pressed,
        on_message: Callable[[Link, wire.Session], None],
        on_lost: Callable[[Link, CommError], None],
    ) -> None:
        self.peer = peer
        self.outgoing = outgoing
        self.address = ""
        self.version = 0
        self.session = b""
        self.transport = ""
        self.refused: Mapping[str, str] = {}
        self.endpoints: Mapping[str, str] = {}
        self.lanes_promised = 0
        self.lanes_awaited = 0
        self.tokens_awaited: dict[bytes, str] = {}
        self.coding: LinkCoding | None = None
        self.one_sided = False
        self.layout: KVLayout | None = None
        self.mismatch: LayoutMismatchError | None = None
        self.error: CommError | None = None
        self.up = False
        self.serves = False
        self.inflows: dict[int, Inflow] = {}
        self.invitations = Invitations(max_invitations, max_backlog_bytes, invited)
        self.held_bytes = 0
        self._pressed = control
        self._kept = self._layout_bytes = 0
        self.layouts_told = 0
        self.layouts_heard = 0
        self.waiting: list[Callable[[CommError | None], None]] = []
        self.dialler: Dialler | None = None
        self.writer = writer
        self.reader = make_reader(self.inflows)
        self.threads: list[threading.Thread] = []
        self._loop = loop
        self.instance = b""
        self._sock: socket.socket | None = None
        self._control: Control | None = None
        self._lanes: list[KVConnection] = []
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._flush_due = False
        self._max_backlog = max_backlog_bytes
        self._on_message = on_message
        self._on_lost = on_lost
        self._next_tid = 0
        self._newest = self._confirmed = 0

    @property
    def lanes(self) -> Sequence[KVConnection]:
        """The data connections that are open."""
        return self._lanes

    @property
    def path(self) -> str:
        """How blocks go, such as `tcp:2`: the transport, and its lanes that are in use."""
        if not self.transport:
            return "unconnected"
        used = min(len(self._lanes), self.writer.tuner.lanes)
        return f"{self.transport}:{max(1, used)}"

    @property
    def unread_bytes(self) -> int:
        """Control bytes that the peer has not taken yet."""
        return self._out_bytes

    def new_tid(self) -> int:
        """A number for a transfer, never given out before on this link."""
        self._next_tid += 1
        return self._next_tid if self.outgoing else wire.INVITED + self._next_tid

    def confirmed_before(self, tid: int) -> bool:
        """Note that a push begins; whether what was last begun before is known to have come."""
        confirmed, self._newest = self._confirmed == self._newest, tid
        return confirmed

    def confirm(self, tid: int) -> None:
        """Note that a push has come in full."""
        self._confirmed = tid

    def when_up(self, callback: Callable[[CommError | None], None]) -> None:
        """Call back with None once the link is up, or with why it never will be."""
        if self.up or self.error is not None:
            callback(self.error)
        else:
            self.waiting.append(callback)

    def compare(self, ours: KVLayout | None) -> None:
        """Compare the layouts, as far as both are known."""
        self.mismatch = None
        if ours is not None and self.layout is not None:
            try:
                check_layouts(ours, self.layout)
            except LayoutMismatchError as e:
                self.mismatch = e

    def meet(self, instance: bytes, session: bytes) -> None:
        """Learn which process the peer is, and the secret that this link has with it."""
        self.instance, self.session = instance, session
        self.writer.key = auth.frame_key(session, initiator=self.outgoing)
        self.reader.key = auth.frame_key(session, initiator=not self.outgoing)

    def attach(self, control: Control) -> None:
        """Take over the control connection."""
        self._control, self._sock = control, control.sock
        control.sock.setblocking(False)
        control.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.watch(control.sock, READ, self._ready)
        self._take(control.feed(b""))  # what came with the handshake
        self._keep()

    def open_lane(self, conn: KVConnection) -> bool:
        """Take over a data connection; False when the link is gone already."""
        if self.error is not None:
            conn.abort()
            conn.close()
            return False
        if conn.most_lanes is not None:
            self.writer.tuner.enough(conn.most_lanes)
        self._lanes.append(conn)
        return True

    def settle(self) -> None:
        """Tell those that wait for the link."""
        waiting, self.waiting = self.waiting, []
        for callback in waiting:
            callback(self.error)

    def send(self, message: wire.Session) -> None:
        """Queue a message; a peer that does not read loses the link."""
        if self._control is None or self.error is not None:
            return
        data = self._control.seal(message)
        if self._out_bytes + len(data) > self._max_backlog:
            self.lose(PeerLostError(f"node {self.peer} does not read its messages", rank=self.peer))
            return
        self._out.append(memoryview(data))
        self._out_bytes += len(data)
        self._pressed.hold(self, len(data))
        if self.error is not None:
            return
        if not self._flush_due:
            self._flush_due = True
            self._loop.at_end_of_turn(self._flush)

    def lose(self, error: CommError) -> None:
        """End the link and tell the peer why; everything on it fails. Idempotent."""
        if self.error is not None:
            return
        if self._sock is not None and self._control is not None:
            bye = self._control.seal(wire.Bye(str(error)[:_MAX_REASON]))
            self._out.append(memoryview(bye))
            with contextlib.suppress(OSError):  # it may be gone
                self._write(self._sock)
        self.error, self.up = error, False
        self._pressed.free(self)
        if self.dialler is not None:
            self.dialler.stop()
        self.writer.stop()
        self.abort_data()
        if self._sock is not None:
            self._loop.unwatch(self._sock)
            self._sock.close()
        self._out.clear()
        self._on_lost(self, error)
        self._control = self.layout = None  # what the peer has filled; the threads may take a while
        self.settle()

    def run_data(self, conn: KVConnection, body: Callable[[KVConnection], None]) -> None:
        """Run one direction of a lane, whose end is the link's; on its own thread."""
        try:
            body(conn)
        except CommError as e:
            error = PeerLostError(f"node {self.peer}: {e}", rank=self.peer)
            lost = e if not isinstance(e, PeerLostError) else error
            self._loop.call(lambda: self._lane_lost(lost))
        except Exception as e:
            logger.exception("a bug in a data thread")
            bug = DistributedRuntimeError(f"node {self.peer}: {type(e).__name__}: {e}")
            self._loop.call(lambda: self.lose(bug))

    def _lane_lost(self, error: CommError) -> None:
        if self.error is None and self._sock is not None:
            self._read()  # what the peer has said last tells more than a connection that is gone
        self.lose(error)

    def abort_data(self) -> None:
        """Break the data connections, so that no thread stays in the middle of a frame."""
        for conn in self._lanes:
            conn.abort()

    def moved_bytes(self) -> int:
        """Bytes that its lanes have moved so far, as far as that is known."""
        return sum(conn.moved_bytes() for conn in self._lanes)

    def release(self, timeout_s: float) -> None:
        """Join the threads and free the connections; off the loop, after `lose`."""
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)
        for conn in self._lanes:
            conn.close()

    # -- the control socket -----------------------------------------------------------------

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & READ and self.error is None:
            self._read()

    def _read(self) -> None:
        assert self._sock is not None, "watched without a socket"
        assert self._control is not None, "watched without a control connection"
        try:
            data = self._sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as e:
            self.lose(PeerLostError(f"node {self.peer} is gone: {e}", rank=self.peer))
            return
        if not data:
            self.lose(PeerLostError(f"node {self.peer} is gone", rank=self.peer))
            return
        self._take(self._control.feed(data))
        self._keep()

    def _keep(self) -> None:
        """Count what of the peer's words is kept: a message that is not whole, and its layout."""
        if self.error is None and self._control is not None:
            kept = self._control.unfinished_bytes + self._layout_bytes
            if kept != self._kept:
                kept, self._kept = kept - self._kept, kept
                self._pressed.hold(self, kept)

    def learn(self, layout: KVLayout | None) -> None:
        """Note the peer's layout."""
        self.layout = layout
        self._layout_bytes = wire.layout_bytes(layout)
        self._keep()

    def give_way(self, error: CommError) -> None:
        """Lose the link: it holds more than any other."""
        self.lose(error)

    def _take(self, messages: Iterable[wire.Message]) -> None:
        try:
            for message in messages:
                if self.error is not None:
                    return
                self._receive(message)
        except CommError as e:
            self.lose(e)

    def _receive(self, message: wire.Message) -> None:
        if not isinstance(message, wire.Session):
            raise DistributedRuntimeError(
                f"node {self.peer} sent {type(message).__name__} after the handshake"
            )
        self._on_message(self, message)

    def _write(self, sock: socket.socket) -> None:
        """Send what is queued, many messages at once, as far as the kernel takes it."""
        while self._out:
            batch = [self._out.popleft()]
            size = len(batch[0])
            while self._out and size + len(self._out[0]) <= _BATCH_BYTES:
                batch.append(self._out.popleft())
                size += len(batch[-1])
            data = batch[0] if len(batch) == 1 else memoryview(b"".join(batch))
            try:
                sent = sock.send(data)
            except BlockingIOError:
                sent = 0
            self._out_bytes -= sent
            self._pressed.hold(self, -sent)
            if sent < size:
                self._out.appendleft(data[sent:])
            if not sent:
                return

    def _flush(self) -> None:
        self._flush_due = False
        sock = self._sock
        if sock is None or self.error is not None:
            return
        try:
            self._write(sock)
        except OSError as e:
            self.lose(PeerLostError(f"node {self.peer} is gone: {e}", rank=self.peer))
            return
        self._loop.watch(sock, READ | WRITE if self._out else READ, self._ready)
