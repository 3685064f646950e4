"""A stream socket as a connection: lists of scattered views per kernel call, in place.

Sockets stay blocking and the kernel keeps the time (SO_RCVTIMEO), because a socket with a
Python timeout is non-blocking underneath: MSG_WAITALL would return early and every wake-up
would take the GIL.
"""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections.abc import Callable, Sequence

from sagellm.core.protocols import CommTimeoutError, IntegrityError, KVConnection, PeerLostError

__all__ = ["IOV_MAX", "SocketConnection"]

logger = logging.getLogger(__name__)

IOV_MAX = 1024
"""Views that one kernel call takes."""

_TICK_S = 1.0


class SocketConnection(KVConnection):
    """One authenticated stream; one thread per direction.

    Args:
        sock: Connected socket, which this object closes.
        peer: Who is at the other end, for messages.

    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock = sock
        self._peer = peer
        self._aborted = False
        sock.setblocking(True)
        tick = struct.pack("ll", int(_TICK_S), 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)

    def send(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Send all bytes; `deadline_s` bounds the time without any progress."""
        return self._move(self._sock.sendmsg, views, deadline_s)

    def receive(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Fill all views; `deadline_s` bounds the time without any progress."""

        def call(batch: Sequence[memoryview]) -> int:
            return self._sock.recvmsg_into(batch, 0, socket.MSG_WAITALL)[0]

        return self._move(call, views, deadline_s)

    @property
    def aborted(self) -> bool:
        """Whether `abort` was called."""
        return self._aborted

    def fileno(self) -> int:
        """What becomes readable when something comes."""
        return self._sock.fileno()

    def buffered(self) -> bool:
        """Whether something has been received that nobody has taken."""
        return False

    def take(self, views: Sequence[memoryview]) -> list[memoryview]:
        """Fill views with what has come, without waiting; those that are left, or their rest."""
        batch = list(views[:IOV_MAX])
        try:
            moved = self._now(lambda: self._sock.recvmsg_into(batch, 0, socket.MSG_DONTWAIT)[0])
        except (BlockingIOError, InterruptedError):
            return list(views)
        return _rest(batch, moved) + list(views[IOV_MAX:])

    def _now(self, call: Callable[[], int]) -> int:
        """Bytes that a call receives, at least one; BlockingIOError when there are none."""
        try:
            moved = call()
        except (BlockingIOError, InterruptedError, IntegrityError):
            raise
        except OSError as e:
            raise PeerLostError(f"the connection to {self._peer} broke: {e}") from e
        if not moved:
            raise PeerLostError(f"{self._peer} closed the connection")
        return moved

    def _move(
        self,
        call: Callable[[Sequence[memoryview]], int],
        views: Sequence[memoryview],
        deadline_s: float,
        *,
        partly: bool = False,
    ) -> int:
        """Call until all is moved, or anything if `partly`; returns the number of calls."""
        calls = 0
        for start in range(0, len(views), IOV_MAX):
            batch = list(views[start : start + IOV_MAX])
            left, last = sum(map(len, batch)), time.monotonic()
            while True:
                try:
                    moved = call(batch)
                except (BlockingIOError, InterruptedError):  # the kernel's tick: look around
                    if self._aborted:
                        raise PeerLostError(f"the connection to {self._peer} was broken") from None
                    if time.monotonic() - last > deadline_s:
                        raise CommTimeoutError(
                            f"{self._peer} took or sent no byte for {deadline_s:g} s"
                        ) from None
                    continue
                except IntegrityError:
                    raise
                except OSError as e:
                    raise PeerLostError(f"the connection to {self._peer} broke: {e}") from e
                if moved == 0 and left:
                    raise PeerLostError(f"{self._peer} closed the connection")
                calls += 1
                if partly:
                    return calls
                left -= moved
                if not left:
                    break
                batch, last = _rest(batch, moved), time.monotonic()
        return calls

    def abort(self) -> None:
        """Break the connection at once, from any thread."""
        self._aborted = True
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            logger.debug("connection to %s was already down", self._peer)

    def close(self) -> None:
        """Release it. Idempotent."""
        self._sock.close()


def _rest(batch: list[memoryview], moved: int) -> list[memoryview]:
    """What is left of a batch after so many bytes."""
    at = 0
    while at < len(batch) and moved >= len(batch[at]):
        moved -= len(batch[at])
        at += 1
    batch = batch[at:]
    if moved:
        batch[0] = batch[0][moved:]
    return batch
