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
    ConfigError,
    DistributedRuntimeError,
    IntegrityError,
    PeerLostError,
    error_from_code,
)

from . import auth, wire
from ._control import Control, keep_alive
from .tls import Tls, TlsSocket
from .transports.tcp import parse_address

__all__ = ["Dialled", "Dialler"]

M = TypeVar("M", wire.Challenge, wire.Welcome)
T = TypeVar("T")

_LEAST_ATTEMPT_S = 0.05
_FIRST_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class Dialled:
    """A control connection whose both ends have proven the key."""

    control: Control
    address: str
    instance: bytes
    version: int
    welcome: wire.Welcome


class Dialler:
    """Reaches one peer, however late it comes.

    Args:
        node_id: Ours.
        target: Its.
        instance: Tells this channel from any other that claims our node id.
        key: The shared key.
        tls: Our side of TLS; None dials plain connections.
        address_of: Where it is, None while that is unknown.
        timeout_s: For one attempt.
        retry_s: Longest pause between attempts.
        peer_timeout_s: A peer that is silent for so long is lost.
        max_message_bytes: Of the peer, once proven.

    """

    def __init__(
        self,
        *,
        node_id: int,
        target: int,
        instance: bytes,
        key: bytes,
        tls: Tls | None,
        address_of: Callable[[int], str | None],
        timeout_s: float,
        retry_s: float,
        peer_timeout_s: float,
        max_message_bytes: int,
    ) -> None:
        self.until = 0.0
        self.why = "its address is not known yet"
        self._node_id = node_id
        self._target = target
        self._instance = instance
        self._key = key
        self._tls = tls
        self._address_of = address_of
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._peer_timeout_s = peer_timeout_s
        self._max_message_bytes = max_message_bytes
        self._stop = threading.Event()
        self._pause_s = _FIRST_PAUSE_S

    def stop(self) -> None:
        """Let `dial` give up."""
        self._stop.set()

    def dial(self, go_on: Callable[[Dialled], T]) -> tuple[Dialled, T]:
        """A proven control connection, and what was made of it; both fail and are tried together.

        Raises:
            CommTimeoutError: Not before `until`; the message names the node and the last failure.
            AuthenticationError: The keys differ.
            CommError: The peer refused, for a reason that time does not cure.

        """
        self._pause_s = _FIRST_PAUSE_S
        while not self._stop.is_set():
            address = None
            try:
                address = self._address_of(self._target)
                if address is not None:
                    dialled = self._attempt(address)
                    with contextlib.ExitStack() as undo:
                        undo.callback(dialled.control.sock.close)
                        made = go_on(dialled)
                        undo.pop_all()
                    return dialled, made
            except (PeerLostError, TimeoutError, OSError) as e:
                if isinstance(e, CommError) and not isinstance(
                    e, (PeerLostError, CommTimeoutError)
                ):
                    raise
                self.why = f"{address}: {e}" if address else str(e)
            if not self.again(self.why) and not self._stop.is_set():
                raise CommTimeoutError(f"node {self._target} never came ({self.why})")
        raise PeerLostError("the channel is closed", rank=self._target)

    def again(self, why: str) -> bool:
        """Whether to try again after a failure, for which the time has come; else it is late."""
        self.why, left = why, self.until - time.monotonic()
        if left <= 0:
            return False
        self._stop.wait(min(self._pause_s, left))
        self._pause_s = min(2 * self._pause_s, self._retry_s)
        return not self._stop.is_set()

    def _attempt(self, address: str) -> Dialled:
        left = min(self._timeout_s, max(_LEAST_ATTEMPT_S, self.until - time.monotonic()))
        end = time.monotonic() + left
        sock = socket.create_connection(parse_address(address), timeout=left)
        with contextlib.ExitStack() as undo:
            binding = b""
            if self._tls is not None:
                sock = self._secure(sock, self._tls, left)
                binding = self._tls.binding(sock)
            undo.callback(sock.close)
            keep_alive(sock, self._peer_timeout_s)
            dialled = self._handshake(sock, address, binding, end)
            undo.pop_all()
        return dialled

    def _secure(self, sock: socket.socket, tls: Tls, timeout_s: float) -> TlsSocket:
        try:
            secured = tls.client(sock)
        except BaseException:
            sock.close()
            raise
        try:
            secured.settimeout(timeout_s)
            secured.handshake()
            secured.require_node(self._target)
        except AuthenticationError as e:
            secured.close()
            raise AuthenticationError(f"node {self._target}: {e}") from e
        except BaseException:
            secured.close()
            raise
        return secured

    def _handshake(self, sock: socket.socket, address: str, binding: bytes, end: float) -> Dialled:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = wire.FrameBuffer(wire.MAX_HANDSHAKE_BYTES)
        low, high = wire.VERSIONS
        hello = wire.encode(
            wire.Hello(
                wire.PROTOCOL,
                self._node_id,
                self._target,
                auth.new_nonce(),
                low,
                high,
                self._instance,
            )
        )
        sock.sendall(hello)
        body = _read(sock, buffer, end)
        challenge = self._expect(wire.decode(body), wire.Challenge)
        if challenge.node_id != self._target:
            raise ConfigError(f"{address} is node {challenge.node_id}, not {self._target}")
        if not low <= challenge.version <= high:
            raise DistributedRuntimeError(f"node {self._target} chose version {challenge.version}")
        digest = auth.transcript(hello[4:], body, binding)
        sock.sendall(wire.encode(wire.Proof(auth.proof(self._key, digest, initiator=True))))
        control = Control(
            sock,
            buffer,
            auth.session_key(self._key, digest),
            initiator=True,
            max_message_bytes=self._max_message_bytes,
        )
        welcome = self._welcomed(control, _read(sock, buffer, end))
        auth.verify(self._key, digest, welcome.mac, initiator=False)
        return Dialled(control, address, challenge.instance, challenge.version, welcome)

    def _welcomed(self, control: Control, body: bytes) -> wire.Welcome:
        """The sealed welcome; a peer without the key can only reject, in the open."""
        try:
            message = control.open(body)
        except IntegrityError:
            with contextlib.suppress(DistributedRuntimeError):
                self._raise_if_rejected(wire.decode(body))
            raise AuthenticationError(
                f"node {self._target} does not have this channel's key"
            ) from None
        return self._expect(message, wire.Welcome)

    def _expect(self, message: wire.Message, kind: type[M]) -> M:
        self._raise_if_rejected(message)
        if not isinstance(message, kind):
            raise DistributedRuntimeError(
                f"node {self._target} sent {type(message).__name__}, not {kind.__name__}"
            )
        return message

    def _raise_if_rejected(self, message: wire.Message) -> None:
        if isinstance(message, wire.Reject):
            text = f"node {self._target} refused us: {message.message}"
            if message.code == AuthenticationError.code:
                raise AuthenticationError(text)
            raise error_from_code(message.code, text)


def _read(sock: socket.socket, buffer: wire.FrameBuffer, end: float) -> bytes:
    while True:
        sock.settimeout(max(0.001, end - time.monotonic()))
        data = sock.recv(65536)
        if not data:
            raise PeerLostError("it closed the connection during the handshake")
        for body in buffer.feed(data):
            return body  # the peer waits for our answer: nothing can follow it
