"""The called side of a handshake, step by step on the event loop, with every step bounded."""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from sagellm.core.protocols import (
    AuthenticationError,
    CommError,
    ConfigError,
    DistributedRuntimeError,
)

from . import auth, wire
from ._control import Control, keep_alive
from ._loop import READ, WRITE, EventLoop, Timer
from ._room import Pressed
from .tls import RECORD_TYPE, Tls, TlsSocket

__all__ = ["Accepted", "Doorkeeper"]

logger = logging.getLogger(__name__)

_PAUSE_S = 0.1
_LINGER_S = 0.5
_MAX_ADDRESS = 512


@dataclass(frozen=True, slots=True)
class Accepted:
    """A control connection whose both ends have proven the key."""

    control: Control
    node_id: int
    instance: bytes
    version: int
    ready: wire.Ready


class Doorkeeper:
    """Takes connections in and proves them; runs on the event loop.

    Args:
        loop: The loop.
        listener: Listening socket, which this object closes.
        node_id: Ours.
        instance: Tells this channel from any other that claims our node id.
        key: The shared key.
        tls: Our side of TLS; None takes plain connections only.
        admit: Raises what speaks against a node that has proven the key.
        welcome: Makes our welcome, given our proof and the host that the peer has reached us at.
        on_accepted: Gets every proven connection.
        max_unauthenticated: Connections that are not proven yet; the oldest gives way.
        timeout_s: For the whole handshake.
        peer_timeout_s: A peer that is silent for so long is lost.
        max_message_bytes: Of a proven peer.
        control: Memory that the connections hold, together with those of links.

    """

    def __init__(
        self,
        loop: EventLoop,
        listener: socket.socket,
        *,
        node_id: int,
        instance: bytes,
        key: bytes,
        tls: Tls | None,
        admit: Callable[[int, bytes], None],
        welcome: Callable[[bytes, str], wire.Welcome],
        on_accepted: Callable[[Accepted], None],
        max_unauthenticated: int,
        timeout_s: float,
        peer_timeout_s: float,
        max_message_bytes: int,
        control: Pressed,
    ) -> None:
        self.rejected = 0
        self._pressed = control
        self._loop = loop
        self._listener = listener
        self._node_id = node_id
        self._instance = instance
        self._key = key
        self._tls = tls
        self._admit = admit
        self._welcome = welcome
        self._on_accepted = on_accepted
        self._max = max_unauthenticated
        self._timeout_s = timeout_s
        self._peer_timeout_s = peer_timeout_s
        self._max_message_bytes = max_message_bytes
        self._guests: dict[_Guest, None] = {}
        self._closed = False
        self._silent_until = 0.0

    def open(self) -> None:
        """Begin to take connections in."""
        self._listener.setblocking(False)
        self._watch()

    def close(self) -> None:
        """Close the listener and every connection that is not proven."""
        self._closed = True
        self._loop.unwatch(self._listener)
        self._listener.close()
        for guest in list(self._guests):
            self._drop(guest)

    def _watch(self) -> None:
        if not self._closed:
            self._loop.watch(self._listener, READ, self._arrive)

    def _arrive(self, _: int) -> None:
        try:
            sock, _address = self._listener.accept()
        except OSError as e:
            logger.debug("a connection went away before it was taken in: %s", e)
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # it stays in the kernel's queue, and the listener ready: do not spin
                self._loop.unwatch(self._listener)
                self._loop.call_later(_PAUSE_S, self._watch)
            return
        if len(self._guests) >= self._max:
            self._drop(min(self._guests, key=lambda g: g.proven))
        sock.setblocking(False)
        guest = _Guest(sock, self._drop)
        self._guests[guest] = None
        guest.timer = self._loop.call_later(self._timeout_s, lambda: self._drop(guest))
        self._loop.watch(sock, READ, lambda events: self._ready(guest, events))

    def _ready(self, guest: _Guest, events: int) -> None:
        try:
            if events & WRITE:
                self._flush(guest)
            if events & READ:
                self._read(guest)
        except BlockingIOError:
            return
        except CommError as e:
            self._turn_away(guest, e)
        except OSError:
            self._drop(guest)

    def _read(self, guest: _Guest) -> None:
        if guest.leaving:  # nothing of it is looked at, not even by TLS
            if not socket.socket.recv(guest.sock, 65536):
                self._drop(guest)
            return
        if not guest.opened:
            self._open(guest)
        data = guest.sock.recv(65536)
        if not data:
            self._drop(guest)
            return
        for body in guest.buffer.feed(data):
            if self._step(guest, body):
                return
        self._pressed.hold(guest, guest.buffer.held_bytes - guest.held_bytes)

    def _open(self, guest: _Guest) -> None:
        """See whether it speaks TLS, and shake hands if both do."""
        if not isinstance(guest.sock, TlsSocket):
            first = guest.sock.recv(1, socket.MSG_PEEK)
            if self._tls is None and first == RECORD_TYPE:
                raise AuthenticationError(
                    f"node {self._node_id} does not speak TLS: set tls_cert, tls_key and tls_ca "
                    "on all nodes, or on none"
                )
            if self._tls is None or not first:
                guest.opened = True
                return
            if first != RECORD_TYPE:
                raise AuthenticationError(
                    f"node {self._node_id} takes TLS only: set tls_cert, tls_key and tls_ca "
                    "on all nodes, or on none"
                )
            self._loop.unwatch(guest.sock)
            guest.sock = self._tls.server(guest.sock)
            self._loop.watch(guest.sock, READ, lambda events: self._ready(guest, events))
        assert self._tls is not None, "wrapped by it"
        guest.sock.handshake()
        guest.binding = self._tls.binding(guest.sock)
        guest.opened = True

    def _step(self, guest: _Guest, body: bytes) -> bool:
        """Take one message; True when the guest has become a peer."""
        if guest.control is not None:
            ready = guest.control.open(body)
            if not isinstance(ready, wire.Ready) or guest.out:
                raise DistributedRuntimeError(f"{type(ready).__name__} out of turn")
            if len(ready.address) > _MAX_ADDRESS:
                raise DistributedRuntimeError(f"an address of {len(ready.address)} characters")
            self._admit(guest.node_id, guest.instance)  # others may have come meanwhile
            self._let_go(guest)
            keep_alive(guest.sock, self._peer_timeout_s)
            self._on_accepted(
                Accepted(guest.control, guest.node_id, guest.instance, guest.version, ready)
            )
            return True
        message = wire.decode(body)
        if guest.digest is None and isinstance(message, wire.Hello):
            self._challenge(guest, message, body)
        elif guest.digest is not None and isinstance(message, wire.Proof):
            auth.verify(self._key, guest.digest, message.mac, initiator=True)
            self._admit(guest.node_id, guest.instance)
            session = auth.session_key(self._key, guest.digest)
            guest.control = Control(
                guest.sock,
                guest.buffer,
                session,
                initiator=False,
                max_message_bytes=self._max_message_bytes,
            )
            mac = auth.proof(self._key, guest.digest, initiator=False)
            welcome = self._welcome(mac, guest.sock.getsockname()[0])
            guest.out = memoryview(guest.control.seal(welcome))
            self._flush(guest)
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
        if isinstance(guest.sock, TlsSocket):
            guest.sock.require_node(hello.node_id)
        guest.node_id, guest.instance, guest.version = hello.node_id, hello.instance, version
        challenge = wire.encode(
            wire.Challenge(self._node_id, auth.new_nonce(), version, self._instance)
        )
        guest.digest = auth.transcript(body, challenge[4:], guest.binding)
        guest.out = memoryview(challenge)
        self._flush(guest)

    def _flush(self, guest: _Guest) -> None:
        try:
            while guest.out:
                guest.out = guest.out[guest.sock.send(guest.out) :]
        except BlockingIOError:
            pass
        events = READ | WRITE if guest.out else READ
        self._loop.watch(guest.sock, events, lambda events: self._ready(guest, events))

    def _turn_away(self, guest: _Guest, error: CommError) -> None:
        """Tell it why, and leave it a moment to read that before the connection goes."""
        if guest.leaving or guest not in self._guests:
            self._drop(guest)
            return
        self._complain(error)
        guest.leaving = True
        try:
            if guest.opened or not isinstance(guest.sock, TlsSocket):  # else TLS has said it
                guest.sock.send(wire.encode(wire.Reject(error.code, str(error)[:1024])))
            socket.socket.shutdown(guest.sock, socket.SHUT_WR)
        except OSError:
            self._drop(guest)
            return
        if guest.timer is not None:
            guest.timer.cancel()
        guest.out = memoryview(b"")
        self._loop.watch(guest.sock, READ, lambda events: self._ready(guest, events))
        guest.timer = self._loop.call_later(
            min(_LINGER_S, self._timeout_s), lambda: self._drop(guest)
        )

    def _complain(self, error: CommError) -> None:
        """Say it, but let nobody fill the log."""
        now = time.monotonic()
        level = logging.WARNING if now >= self._silent_until else logging.DEBUG
        if level == logging.WARNING:
            self._silent_until = now + 1.0
        logger.log(level, "node %d turned a connection away: %s", self._node_id, error)

    def _drop(self, guest: _Guest) -> None:
        if guest in self._guests:
            self._let_go(guest)
            self.rejected += 1
            guest.sock.close()

    def _let_go(self, guest: _Guest) -> None:
        del self._guests[guest]
        self._pressed.free(guest)
        self._loop.unwatch(guest.sock)
        if guest.timer is not None:
            guest.timer.cancel()


class _Guest:
    """A connection that has not proven itself yet."""

    def __init__(self, sock: socket.socket, drop: Callable[[_Guest], None]) -> None:
        self.sock = sock
        self.held_bytes = 0
        self._drop = drop
        self.buffer = wire.FrameBuffer(wire.MAX_HANDSHAKE_BYTES)
        self.timer: Timer | None = None
        self.opened = False
        self.leaving = False
        self.binding = b""
        self.digest: bytes | None = None
        self.control: Control | None = None
        self.out = memoryview(b"")
        self.node_id = -1
        self.instance = b""
        self.version = 0

    def give_way(self, error: CommError) -> None:
        """Close it: it holds more than any other."""
        self._drop(self)

    @property
    def proven(self) -> bool:
        """Whether it has shown that it knows the key."""
        return self.control is not None
