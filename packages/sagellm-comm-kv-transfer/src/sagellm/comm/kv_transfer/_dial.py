"""The calling side of a handshake, on the thread that will send afterwards."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sagellm.core.protocols import (
    AuthenticationError,
    CommError,
    CommTimeoutError,
    DistributedRuntimeError,
    PeerLostError,
    error_from_code,
)

from . import auth, wire
from .transports.tcp import parse_address

__all__ = ["Dialled", "Dialler"]

M = TypeVar("M", wire.Challenge, wire.Welcome)

_LEAST_ATTEMPT_S = 0.05


@dataclass(frozen=True, slots=True)
class Dialled:
    """A control connection whose both ends have proven the key."""

    sock: socket.socket
    buffer: wire.FrameBuffer
    address: str
    version: int
    session: bytes
    welcome: wire.Welcome


class Dialler:
    """Reaches one peer, however late it comes.

    Args:
        node_id: Ours.
        target: Its.
        key: The shared key.
        address_of: Where it is, None while that is unknown.
        timeout_s: For one attempt.
        retry_s: Longest pause between attempts.
        max_message_bytes: Of the peer, once proven.

    """

    def __init__(
        self,
        *,
        node_id: int,
        target: int,
        key: bytes,
        address_of: Callable[[int], str | None],
        timeout_s: float,
        retry_s: float,
        max_message_bytes: int,
    ) -> None:
        self.until = 0.0
        self.why = "its address is not known yet"
        self._node_id = node_id
        self._target = target
        self._key = key
        self._address_of = address_of
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._max_message_bytes = max_message_bytes
        self._stop = threading.Event()

    def stop(self) -> None:
        """Let `dial` give up."""
        self._stop.set()

    def dial(self) -> Dialled:
        """A proven control connection.

        Raises:
            CommTimeoutError: Not before `until`; the message names the node and the last failure.
            AuthenticationError: The keys differ.
            CommError: The peer refused, for a reason that time does not cure.

        """
        pause = 0.01
        while not self._stop.is_set():
            address = None
            try:
                address = self._address_of(self._target)
                if address is not None:
                    return self._attempt(address)
            except (PeerLostError, TimeoutError, OSError) as e:
                if isinstance(e, CommError) and not isinstance(
                    e, (PeerLostError, CommTimeoutError)
                ):
                    raise
                self.why = f"{address}: {e}" if address else str(e)
            if time.monotonic() >= self.until:
                raise CommTimeoutError(f"node {self._target} never came ({self.why})")
            self._stop.wait(min(pause, max(0.0, self.until - time.monotonic())))
            pause = min(2 * pause, self._retry_s)
        raise PeerLostError("the channel is closed", rank=self._target)

    def _attempt(self, address: str) -> Dialled:
        left = min(self._timeout_s, max(_LEAST_ATTEMPT_S, self.until - time.monotonic()))
        end = time.monotonic() + left
        sock = socket.create_connection(parse_address(address), timeout=left)
        with contextlib.ExitStack() as undo:
            undo.callback(sock.close)
            dialled = self._handshake(sock, address, end)
            undo.pop_all()
        return dialled

    def _handshake(self, sock: socket.socket, address: str, end: float) -> Dialled:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        buffer = wire.FrameBuffer(self._max_message_bytes)
        low, high = wire.VERSIONS
        nonce = auth.new_nonce()
        hello = wire.encode(
            wire.Hello(wire.PROTOCOL, self._node_id, self._target, nonce, low, high)
        )
        sock.sendall(hello)
        body = _read(sock, buffer, end)
        challenge = _expect(body, wire.Challenge, self._target)
        if not low <= challenge.version <= high:
            raise DistributedRuntimeError(f"node {self._target} chose version {challenge.version}")
        digest = auth.transcript(hello[4:], body)
        sock.sendall(wire.encode(wire.Proof(auth.proof(self._key, digest, initiator=True))))
        welcome = _expect(_read(sock, buffer, end), wire.Welcome, self._target)
        auth.verify(self._key, digest, welcome.mac, initiator=False)
        session = auth.session_key(self._key, digest)
        return Dialled(sock, buffer, address, challenge.version, session, welcome)


def _read(sock: socket.socket, buffer: wire.FrameBuffer, end: float) -> bytes:
    while True:
        sock.settimeout(max(0.001, end - time.monotonic()))
        data = sock.recv(65536)
        if not data:
            raise PeerLostError("it closed the connection during the handshake")
        for body in buffer.feed(data):
            return body  # the peer waits for our answer: nothing can follow it


def _expect(body: bytes, kind: type[M], target: int) -> M:
    message = wire.decode(body)
    if isinstance(message, wire.Reject):
        if message.code == AuthenticationError.code:
            raise AuthenticationError(f"node {target} refused us: {message.message}")
        raise error_from_code(message.code, f"node {target} refused us: {message.message}")
    if not isinstance(message, kind):
        raise DistributedRuntimeError(
            f"node {target} sent {type(message).__name__}, not {kind.__name__}"
        )
    return message
