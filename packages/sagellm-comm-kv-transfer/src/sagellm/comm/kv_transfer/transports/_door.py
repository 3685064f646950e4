"""The door of a data listener: connections come in by a one-time token, and only by it."""

from __future__ import annotations

import errno
import hmac
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from sagellm.comm.kv_transfer.auth import token_id, token_proof
from sagellm.comm.kv_transfer.tls import Tls, TlsSocket
from sagellm.core.protocols import CommTimeoutError, PeerLostError

__all__ = ["TokenDoor", "binding_of", "present"]

_HELLO_BYTES = 16 + 32
_MAX_PENDING = 64
_MAX_FORGOTTEN = 256
_PAUSE_S = 0.1


class _Presented(NamedTuple):
    """A connection that has shown a token which nobody has asked for yet."""

    sock: socket.socket
    proof: bytes
    end: float


class TokenDoor:
    """Accepts connections and reads their tokens, on one thread that no connection can block.

    Args:
        listener: Bound and listening; closed with the door.
        handshake_s: A connection that presents no token by then is closed.
        name: Of the thread.
        admit: Whether a fresh connection may present a token at all.
        tls: Our side of TLS; None takes plain connections.

    """

    def __init__(
        self,
        listener: socket.socket,
        handshake_s: float,
        name: str,
        admit: Callable[[socket.socket], bool] = lambda _: True,
        tls: Tls | None = None,
    ) -> None:
        self._tls = tls
        self._listener = listener
        self._handshake_s = handshake_s
        self._admit = admit
        self._changed = threading.Condition()
        self._presented: dict[bytes, _Presented] = {}
        self._expected: set[bytes] = set()
        self._forgotten: deque[bytes] = deque(maxlen=_MAX_FORGOTTEN)
        self.rejected = 0
        self.closed = False
        self._wake_r, self._wake_w = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def take(self, token: bytes, deadline_s: float) -> socket.socket:
        """The connection that presents `token`, which is good once; it is told that we know it.

        Raises:
            CommTimeoutError: It did not come.
            PeerLostError: It came and went, or the door is closed.

        """
        name, end = token_id(token), time.monotonic() + deadline_s
        with self._changed:
            self._expected.add(name)
            try:
                while True:
                    left = end - time.monotonic()
                    if not self._changed.wait_for(
                        lambda: name in self._presented or self.closed or name in self._forgotten,
                        max(0.0, left),
                    ):
                        raise CommTimeoutError(f"no data connection within {deadline_s:g} s")
                    if self.closed or name in self._forgotten:
                        what = "the transport is closed" if self.closed else "nobody wants it now"
                        raise PeerLostError(what)
                    found = self._presented.pop(name)
                    sock = found.sock
                    binding = binding_of(self._tls, sock)
                    proof = token_proof(token, initiator=True, binding=binding)
                    if hmac.compare_digest(found.proof, proof):
                        break
                    self._reject(sock)
            finally:
                self._expected.discard(name)
        try:
            sock.settimeout(max(0.001, end - time.monotonic()))
            sock.sendall(token_proof(token, initiator=False, binding=binding))
        except OSError as e:
            sock.close()
            raise PeerLostError(f"the data connection broke: {e}") from e
        return sock

    def forget(self, token: bytes) -> None:
        """Have a `take` of this token give up, also one that is only about to begin."""
        with self._changed:
            self._forgotten.append(token_id(token))
            self._changed.notify_all()

    def close(self) -> None:
        """Release listener, thread and whoever waits. Idempotent."""
        with self._changed:
            if self.closed:
                return
            self.closed = True
            self._changed.notify_all()
        self._wake_w.send(b"x")
        self._thread.join()
        waiting = [p.sock for p in self._presented.values()]
        for sock in (self._listener, self._wake_r, self._wake_w, *waiting):
            sock.close()

    def _run(self) -> None:
        """Accept, and read tokens, without ever blocking on one connection."""
        pending: dict[socket.socket, tuple[bytearray, float]] = {}
        self._listener.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_r, selectors.EVENT_READ)
            while not self.closed:
                timeout = self._sweep(selector, pending)
                for key, _ in selector.select(timeout):
                    sock = key.fileobj
                    if sock is self._listener:
                        self._take_in(selector, pending)
                    elif isinstance(sock, socket.socket) and sock in pending:
                        self._read_token(selector, pending, sock)
            for sock in pending:
                sock.close()

    def _take_in(
        self,
        selector: selectors.BaseSelector,
        pending: dict[socket.socket, tuple[bytearray, float]],
    ) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):  # it stays in the queue: do not spin
                time.sleep(_PAUSE_S)
            return
        if not self._admit(sock):
            self._reject(sock)
            return
        if len(pending) >= _MAX_PENDING:
            oldest = next(iter(pending))  # the one that has had the longest time to prove itself
            self._drop(selector, pending, oldest)
        sock.setblocking(False)
        if self._tls is not None:
            try:
                sock = self._tls.server(sock)
            except OSError:  # it is gone already
                self._reject(sock)
                return
        pending[sock] = (bytearray(), time.monotonic() + self._handshake_s)
        selector.register(sock, selectors.EVENT_READ)

    def _read_token(
        self,
        selector: selectors.BaseSelector,
        pending: dict[socket.socket, tuple[bytearray, float]],
        sock: socket.socket,
    ) -> None:
        data, _ = pending[sock]
        try:
            got = sock.recv(_HELLO_BYTES - len(data))
        except BlockingIOError:
            return
        except OSError:
            got = b""
        if not got:
            self._drop(selector, pending, sock)
            return
        data += got
        if len(data) < _HELLO_BYTES:
            return
        selector.unregister(sock)
        _, end = pending.pop(sock)
        with self._changed:
            # it may come before its `accept`: the token was promised on the control connection
            if bytes(data[:16]) in self._presented:
                self._reject(sock)
                return
            strangers = [n for n in self._presented if n not in self._expected]
            if len(strangers) >= _MAX_PENDING:
                self._reject(self._presented.pop(strangers[0]).sock)
            self._presented[bytes(data[:16])] = _Presented(sock, bytes(data[16:]), end)
            self._changed.notify_all()

    def _sweep(
        self,
        selector: selectors.BaseSelector,
        pending: dict[socket.socket, tuple[bytearray, float]],
    ) -> float | None:
        """Close what had its time; seconds until the next has."""
        now = time.monotonic()
        for sock in [s for s, (_, t) in pending.items() if t <= now]:
            self._drop(selector, pending, sock)
        with self._changed:
            for name in [n for n, p in self._presented.items() if p.end <= now]:
                self._reject(self._presented.pop(name).sock)
            ends = [p.end for p in self._presented.values()]
        ends += [t for _, t in pending.values()]
        return max(0.0, min(ends) - now) if ends else None

    def _drop(
        self,
        selector: selectors.BaseSelector,
        pending: dict[socket.socket, tuple[bytearray, float]],
        sock: socket.socket,
    ) -> None:
        selector.unregister(sock)
        del pending[sock]
        self._reject(sock)

    def _reject(self, sock: socket.socket) -> None:
        sock.close()
        self.rejected += 1


def binding_of(tls: Tls | None, sock: socket.socket) -> bytes:
    """What ties a token's proof to the certificates of a connection; nothing without TLS."""
    return tls.binding(sock) if tls is not None and isinstance(sock, TlsSocket) else b""


def present(sock: socket.socket, token: bytes, binding: bytes = b"") -> None:
    """Prove a token at a peer's door, which proves it, too.

    Raises:
        PeerLostError: The peer does not know it.
        OSError: The connection broke.

    """
    sock.sendall(token_id(token) + token_proof(token, initiator=True, binding=binding))
    answer = b""
    while len(answer) < 32:
        got = sock.recv(32 - len(answer))
        if not got:
            raise ConnectionResetError("closed by the peer")
        answer += got
    if not hmac.compare_digest(answer, token_proof(token, initiator=False, binding=binding)):
        raise PeerLostError("the peer does not know the data connection's token")
