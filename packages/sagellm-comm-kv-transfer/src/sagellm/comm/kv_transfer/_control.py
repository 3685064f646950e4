"""A control connection whose both ends have proven the key: sealed messages over a socket."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from . import auth, wire

__all__ = ["Control", "keep_alive"]

_LENGTH = struct.Struct(">I")


class Control:
    """A socket with the seals of both directions.

    Args:
        sock: Connected socket.
        buffer: What has been read from it.
        session: Secret of the link.
        initiator: Whether this side opened it.
        max_message_bytes: Longest message of the peer.

    """

    def __init__(
        self,
        sock: socket.socket,
        buffer: wire.FrameBuffer,
        session: bytes,
        *,
        initiator: bool,
        max_message_bytes: int,
    ) -> None:
        self.sock = sock
        self.session = session
        self._buffer = buffer
        buffer.max_bytes = max_message_bytes + auth.SEAL_BYTES
        self._ours = auth.Seal(session, initiator=initiator)
        self._theirs = auth.Seal(session, initiator=not initiator)

    @property
    def unfinished_bytes(self) -> int:
        """Bytes of the peer's message that is not whole yet."""
        return self._buffer.held_bytes

    def seal(self, message: wire.Message) -> bytes:
        """The message as it goes on the wire; they have to be sent in the order of these calls."""
        body = self._ours.close(wire.encode(message)[_LENGTH.size :])
        return _LENGTH.pack(len(body)) + body

    def open(self, body: bytes) -> wire.Message:
        """The message in a frame's body.

        Raises:
            IntegrityError: Its seal is broken.
            DistributedRuntimeError: It is no message of this protocol.

        """
        return wire.decode(self._theirs.open(body))

    def feed(self, data: bytes) -> Iterator[wire.Message]:
        """The messages that are complete with these bytes; raises as `open`."""
        for body in self._buffer.feed(data):
            yield self.open(body)


def keep_alive(sock: socket.socket, timeout_s: float) -> None:
    """Have the kernel probe an idle peer, and give it up when it is silent for so long.

    The kernel counts whole seconds; what it does not offer is left out.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    step = max(1, int(timeout_s / 3))
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
    for option, value in (
        (idle, step),
        (getattr(socket, "TCP_KEEPINTVL", None), step),
        (getattr(socket, "TCP_KEEPCNT", None), 2),
        (getattr(socket, "TCP_USER_TIMEOUT", None), max(1, int(timeout_s * 1000))),
    ):
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
