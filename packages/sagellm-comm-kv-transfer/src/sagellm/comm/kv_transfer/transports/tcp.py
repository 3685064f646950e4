"""Blocks over TCP: whole lists of scattered views per kernel call, received in place.

Sockets stay blocking and the kernel keeps the time (SO_RCVTIMEO), because a socket with a
Python timeout is non-blocking underneath: MSG_WAITALL would return early and every wake-up
would take the GIL.
"""

from __future__ import annotations

import errno
import hmac
import logging
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sagellm.comm.kv_transfer.auth import token_id, token_proof
from sagellm.comm.kv_transfer.tls import Tls, TlsConnection, TlsSocket
from sagellm.core.protocols import (
    CommTimeoutError,
    ConfigError,
    KVConnection,
    KVTransport,
    PeerLostError,
    Probe,
    ResourceError,
    TransportSpec,
)
from sagellm.core.protocols.ports import SagePorts

__all__ = ["ANY_HOST", "TCP", "TcpConnection", "TcpTransport", "bracket", "listen", "parse_address"]

logger = logging.getLogger(__name__)

_IOV_MAX = 1024
_TICK_S = 1.0
_PAUSE_S = 0.1
_HELLO_BYTES = 16 + 32
_MAX_PENDING = 64
_TRIES = 4
ANY_HOST = ("0.0.0.0", "::", "")
"""Hosts that stand for every address of this machine."""


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`.

    >>> parse_address("[::1]:80")
    ('::1', 80)

    Raises:
        ConfigError: It is not of that form.

    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is not host:port")
    return host, int(port)


def listen(host: str, port: int, name: str = "kv_transfer") -> socket.socket:
    """A listening socket; port 0 takes the configured one or lets the kernel choose.

    Raises:
        ResourceError: The port is in use.
        ConfigError: The host is not one of this machine's.

    """
    if not port:
        return SagePorts(host=host).listen(name)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(128)
    except OSError as e:
        sock.close()
        kind = ResourceError if e.errno == errno.EADDRINUSE else ConfigError
        raise kind(
            f"cannot listen on {host}:{port}: {e.strerror or e}; "
            "port 0 lets the kernel choose a free one"
        ) from e
    return sock


class TcpConnection(KVConnection):
    """One authenticated stream; one thread per direction.

    Args:
        sock: Connected socket, which this object closes.
        peer: Who is at the other end, for messages.
        buffer_bytes: Kernel buffer, each way; None leaves it.

    """

    def __init__(self, sock: socket.socket, peer: str, buffer_bytes: int | None = None) -> None:
        self._sock = sock
        self._peer = peer
        self._aborted = False
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
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

    def _move(
        self,
        call: Callable[[Sequence[memoryview]], int],
        views: Sequence[memoryview],
        deadline_s: float,
    ) -> int:
        calls = 0
        last = time.monotonic()
        for start in range(0, len(views), _IOV_MAX):
            batch = list(views[start : start + _IOV_MAX])
            while batch:
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
                except OSError as e:
                    raise PeerLostError(f"the connection to {self._peer} broke: {e}") from e
                if moved == 0 and any(map(len, batch)):
                    raise PeerLostError(f"{self._peer} closed the connection")
                calls += 1
                last = time.monotonic()
                batch = _rest(batch, moved)
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


class _Presented(NamedTuple):
    """A connection that has shown a token which nobody has asked for yet."""

    sock: socket.socket
    proof: bytes
    end: float


class TcpTransport(KVTransport):
    """Data connections on a listener of their own, next to the control port.

    Args:
        host: Address to bind.
        advertise: Host that peers are told; None is `host`, or for a wildcard the one at which
            a peer has reached us.
        socket_buffer_bytes: Kernel buffer of each connection.
        handshake_timeout_s: A connection that presents no token by then is closed.
        tls: Our side of TLS; None uses plain connections.

    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        advertise: str | None = None,
        socket_buffer_bytes: int = 1 << 20,
        handshake_timeout_s: float = 5.0,
        tls: Tls | None = None,
        **_others: object,
    ) -> None:
        self._tls = tls
        self._buffer_bytes = socket_buffer_bytes
        self._handshake_s = handshake_timeout_s
        self._listener = listen(host, 0, "kv_transfer_data")
        port = self._listener.getsockname()[1]
        self._host = advertise or ("" if host in ANY_HOST else host)
        self._port = port
        self._changed = threading.Condition()
        self._presented: dict[bytes, _Presented] = {}
        self._expected: set[bytes] = set()
        self.rejected = 0
        self._closed = False
        self._wake_r, self._wake_w = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=f"kv-tcp-{port}", daemon=True)
        self._thread.start()

    def endpoint(self, reached_at: str = "") -> str:
        """`host:port` of the data listener."""
        return f"{bracket(self._host or reached_at or 'localhost')}:{self._port}"

    def connect(self, endpoint: str, token: bytes, deadline_s: float) -> KVConnection:
        """Open a data connection and prove the token; the peer proves it too."""
        end = time.monotonic() + deadline_s
        for left in reversed(range(_TRIES)):
            sock = self._dial(endpoint, end)
            try:
                binding = self._binding(sock)
                proof = token_proof(token, initiator=True, binding=binding)
                sock.sendall(token_id(token) + proof)
                answer = _read_exactly(sock, 32)
                break
            except OSError as e:  # a crowd of strangers at the peer's door may have pushed us out
                sock.close()
                if not left or time.monotonic() >= end or self._closed:
                    raise PeerLostError(f"{endpoint} dropped the data connection: {e}") from e
        if not hmac.compare_digest(answer, token_proof(token, initiator=False, binding=binding)):
            sock.close()
            raise PeerLostError(f"{endpoint} does not know the data connection's token")
        return self._connection(sock, endpoint)

    def _dial(self, endpoint: str, end: float) -> socket.socket:
        left = max(0.001, end - time.monotonic())
        try:
            sock = socket.create_connection(parse_address(endpoint), timeout=left)
            if self._tls is None:
                return sock
            secured = self._tls.client(sock)
        except OSError as e:
            raise PeerLostError(f"no data connection to {endpoint}: {e}") from e
        try:
            secured.settimeout(left)
            secured.handshake()
        except OSError as e:
            secured.close()
            raise PeerLostError(f"no TLS connection to {endpoint}: {e}") from e
        return secured

    def _binding(self, sock: socket.socket) -> bytes:
        return self._tls.binding(sock) if self._tls and isinstance(sock, TlsSocket) else b""

    def _connection(self, sock: socket.socket, peer: str) -> KVConnection:
        if isinstance(sock, TlsSocket):
            return TlsConnection(sock, peer)
        return TcpConnection(sock, peer, self._buffer_bytes)

    def accept(self, token: bytes, deadline_s: float) -> KVConnection:
        """Wait for the connection that presents `token`; it is good once."""
        name, end = token_id(token), time.monotonic() + deadline_s
        with self._changed:
            self._expected.add(name)
            try:
                while True:
                    left = end - time.monotonic()
                    if not self._changed.wait_for(
                        lambda: name in self._presented or self._closed, max(0.0, left)
                    ):
                        raise CommTimeoutError(f"no data connection within {deadline_s:g} s")
                    if self._closed:
                        raise PeerLostError("the transport is closed")
                    found = self._presented.pop(name)
                    sock = found.sock
                    binding = self._binding(sock)
                    proof = token_proof(token, initiator=True, binding=binding)
                    if hmac.compare_digest(found.proof, proof):
                        break
                    self._reject(sock)
            finally:
                self._expected.discard(name)
        try:
            peer = f"{sock.getpeername()[0]}:{sock.getpeername()[1]}"
            sock.settimeout(max(0.001, end - time.monotonic()))
            sock.sendall(token_proof(token, initiator=False, binding=binding))
        except OSError as e:
            sock.close()
            raise PeerLostError(f"the data connection broke: {e}") from e
        return self._connection(sock, peer)

    def close(self) -> None:
        """Release listener and thread. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
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
            while not self._closed:
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


def bracket(host: str) -> str:
    """The host as it stands before a colon."""
    return f"[{host}]" if ":" in host else host


def _read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        got = sock.recv(count - len(data))
        if not got:
            raise ConnectionResetError("closed by the peer")
        data += got
    return data


TCP = TransportSpec(
    name="tcp",
    priority=10,
    one_sided=False,
    remote_write=False,
    cancel=True,
    integrity=False,
    probe=lambda: Probe(True, "sockets are always there"),
    load=lambda: TcpTransport,
    start_lanes=2,
    max_lanes=4,
)
