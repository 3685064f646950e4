"""The called side of a handshake, step by step on the event loop, with every step bounded."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

from sagellm.core.protocols import (
    AuthenticationError,
    CommError,
    ConfigError,
    DistributedRuntimeError,
)

from . import auth, wire
from ._loop import READ, EventLoop, Timer

__all__ = ["Accepted", "Doorkeeper"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A control connection whose both ends have proven the key."""

    sock: socket.socket
    buffer: wire.FrameBuffer
    node_id: int
    version: int
    session: bytes
    ready: wire.Ready
    rest: list[bytes]


class Doorkeeper:
    """Takes connections in and proves them; runs on the event loop.

    Args:
        loop: The loop.
        listener: Listening socket, which this object closes.
        node_id: Ours.
        key: The shared key.
        welcome: Makes our welcome, given our proof and the host that the peer has reached us at.
        on_accepted: Gets every proven connection.
        max_unauthenticated: Connections that are not proven yet; the oldest gives way.
        timeout_s: For the whole handshake.
        max_message_bytes: Of a proven peer.

    """

    def __init__(
        self,
        loop: EventLoop,
        listener: socket.socket,
        *,
        node_id: int,
        key: bytes,
        welcome: Callable[[bytes, str], wire.Welcome],
        on_accepted: Callable[[Accepted], None],
        max_unauthenticated: int,
        timeout_s: float,
        max_message_bytes: int,
    ) -> None:
        self.rejected = 0
        self._loop = loop
        self._listener = listener
        self._node_id = node_id
        self._key = key
        self._welcome = welcome
        self._on_accepted = on_accepted
        self._max = max_unauthenticated
        self._timeout_s = timeout_s
        self._max_message_bytes = max_message_bytes
        self._guests: dict[_Guest, None] = {}

    def open(self) -> None:
        """Begin to take connections in."""
        self._listener.setblocking(False)
        self._loop.watch(self._listener, READ, self._arrive)

    def close(self) -> None:
        """Close the listener and every connection that is not proven."""
        self._loop.unwatch(self._listener)
        self._listener.close()
        for guest in list(self._guests):
            self._turn_away(guest, None)

    def _arrive(self, _: int) -> None:
        try:
            sock, _address = self._listener.accept()
        except OSError as e:
            logger.debug("a connection went away before it was taken in: %s", e)
            return
        if len(self._guests) >= self._max:
            self._turn_away(next(iter(self._guests)), None)
        sock.setblocking(False)
        guest = _Guest(sock)
        self._guests[guest] = None
        guest.timer = self._loop.call_later(self._timeout_s, lambda: self._turn_away(guest, None))
        self._loop.watch(sock, READ, lambda _: self._read(guest))

    def _read(self, guest: _Guest) -> None:
        try:
            data = guest.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._turn_away(guest, None)
            return
        try:
            bodies = list(guest.buffer.feed(data))
            for i, body in enumerate(bodies):
                if self._step(guest, body, bodies[i + 1 :]):
                    return
        except CommError as e:
            self._turn_away(guest, e)

    def _step(self, guest: _Guest, body: bytes, rest: list[bytes]) -> bool:
        """Take one message; True when the guest has become a peer."""
        message = wire.decode(body)
        if guest.digest is None and isinstance(message, wire.Hello):
            self._challenge(guest, message, body)
        elif guest.digest is not None and not guest.proven and isinstance(message, wire.Proof):
            auth.verify(self._key, guest.digest, message.mac, initiator=True)
            guest.proven = True
            guest.buffer.max_bytes = self._max_message_bytes
            mac = auth.proof(self._key, guest.digest, initiator=False)
            self._send(guest, self._welcome(mac, guest.sock.getsockname()[0]))
        elif guest.digest is not None and guest.proven and isinstance(message, wire.Ready):
            self._let_go(guest)
            session = auth.session_key(self._key, guest.digest)
            self._on_accepted(
                Accepted(
                    guest.sock,
                    guest.buffer,
                    guest.node_id,
                    guest.version,
                    session,
                    message,
                    rest,
                )
            )
            return True
        else:
            raise DistributedRuntimeError(f"{type(message).__name__} out of turn")
        return False

    def _challenge(self, guest: _Guest, hello: wire.Hello, body: bytes) -> None:
        low, high = wire.VERSIONS
        version = min(high, hello.max_version)
        if hello.protocol != wire.PROTOCOL or version < max(low, hello.min_version):
            raise DistributedRuntimeError(
                f"{hello.protocol} {hello.min_version}..{hello.max_version} is not spoken here; "
                f"node {self._node_id} speaks {wire.PROTOCOL} {low}..{high}"
            )
        if hello.target != self._node_id:
            raise ConfigError(f"this is node {self._node_id}, not {hello.target}")
        guest.node_id, guest.version = hello.node_id, version
        challenge = wire.encode(wire.Challenge(self._node_id, auth.new_nonce(), version))
        guest.digest = auth.transcript(body, challenge[4:])
        try:
            guest.sock.send(challenge)
        except OSError as e:
            raise AuthenticationError(f"it went away during the handshake: {e}") from e

    def _send(self, guest: _Guest, message: wire.Message) -> None:
        data = wire.encode(message)
        guest.sock.setblocking(True)
        guest.sock.settimeout(1.0)  # a welcome can be larger than a socket's buffer
        try:
            guest.sock.sendall(data)
        except OSError as e:
            raise AuthenticationError(f"it went away during the handshake: {e}") from e
        finally:
            guest.sock.setblocking(False)

    def _turn_away(self, guest: _Guest, error: CommError | None) -> None:
        if guest not in self._guests:
            return
        self._let_go(guest)
        self.rejected += 1
        if error is not None:
            logger.warning("node %d turned a connection away: %s", self._node_id, error)
            try:
                guest.sock.send(wire.encode(wire.Reject(error.code, str(error)[:1024])))
            except OSError:
                logger.debug("it did not wait for the reason")
        guest.sock.close()

    def _let_go(self, guest: _Guest) -> None:
        del self._guests[guest]
        self._loop.unwatch(guest.sock)
        if guest.timer is not None:
            guest.timer.cancel()


class _Guest:
    """A connection that has not proven itself yet."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = wire.FrameBuffer(wire.MAX_HANDSHAKE_BYTES)
        self.timer: Timer | None = None
        self.digest: bytes | None = None
        self.proven = False
        self.node_id = -1
        self.version = 0
