"""Blocks over TCP: whole lists of scattered views per kernel call, received in place."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time

from sagellm.comm.kv_transfer._tcp_info import clock, moved_bytes
from sagellm.comm.kv_transfer.tls import Tls, TlsConnection, TlsSocket
from sagellm.core.protocols import (
    ConfigError,
    KVConnection,
    KVTransport,
    PeerLostError,
    Probe,
    ResourceError,
    TransportSpec,
)
from sagellm.core.protocols.ports import SagePorts

from ._door import TokenDoor, binding_of, present
from ._socket import SocketConnection

__all__ = ["ANY_HOST", "TCP", "TcpConnection", "TcpTransport", "bracket", "listen", "parse_address"]

_TRIES = 4
_BUFFER_BYTES = 1 << 20
_BUFFER_BYTES_HERE = 1 << 18
"""On one host small buffers stay in the cache: 128 MiB in 64 KiB blocks over 2 connections cost
0.47 CPU seconds per GB with 256 KiB, 0.67 with 1 MiB (2 CPUs, Linux 6, loopback)."""
_CONGESTION_HERE = b"reno"
"""Nothing is lost and nothing has to be paced within a host: BBR takes a sixth more time there."""
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
    if not _is_host(host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is not host:port")
    return host, int(port)


def _is_host(host: str) -> bool:
    try:
        return bool(host.encode("idna"))
    except UnicodeError:  # of no name can be looked up: an empty or too long label
        return False


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


class TcpConnection(SocketConnection):
    """One authenticated stream over TCP; one thread per direction.

    Args:
        sock: Connected socket, which this object closes.
        peer: Who is at the other end, for messages.
        buffer_bytes: Kernel buffer, each way; 0 takes what suits the way to the peer.

    """

    def __init__(self, sock: socket.socket, peer: str, buffer_bytes: int = 0) -> None:
        super().__init__(sock, peer)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._here = sock.getpeername()[0] == sock.getsockname()[0]
        if not buffer_bytes:
            buffer_bytes = _BUFFER_BYTES_HERE if self._here else _BUFFER_BYTES
        if self._here and hasattr(socket, "TCP_CONGESTION"):
            with contextlib.suppress(OSError):  # a kernel that allows no choice
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _CONGESTION_HERE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)

    def moved_bytes(self) -> int:
        """What the kernel says."""
        return moved_bytes(self._sock)

    def clock(self) -> tuple[int, float] | None:
        """Bytes that the peer has acknowledged, and seconds in which some were under way."""
        return clock(self._sock)

    @property
    def most_lanes(self) -> int | None:
        """Within a host one for each CPU, where both ends take turns; else the transport's."""
        return os.cpu_count() if self._here else None


class TcpTransport(KVTransport):
    """Data connections on a listener of their own, next to the control port.

    Args:
        host: Address to bind.
        advertise: Host that peers are told; None is `host`, or for a wildcard the one at which
            a peer has reached us.
        socket_buffer_bytes: Kernel buffer of each connection; 0 takes what suits its way.
        handshake_timeout_s: A connection that presents no token by then is closed.
        tls: Our side of TLS; None uses plain connections.

    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        advertise: str | None = None,
        socket_buffer_bytes: int = 0,
        handshake_timeout_s: float = 5.0,
        tls: Tls | None = None,
        **_others: object,
    ) -> None:
        self._tls = tls
        self._buffer_bytes = socket_buffer_bytes
        listener = listen(host, 0, "kv_transfer_data")
        self._host = advertise or ("" if host in ANY_HOST else host)
        self._port = listener.getsockname()[1]
        self._door = TokenDoor(listener, handshake_timeout_s, f"kv-tcp-{self._port}", tls=tls)

    @property
    def rejected(self) -> int:
        """Connections that did not prove a token."""
        return self._door.rejected

    def endpoint(self, reached_at: str = "") -> str:
        """`host:port` of the data listener."""
        return f"{bracket(self._host or reached_at or 'localhost')}:{self._port}"

    def connect(self, endpoint: str, token: bytes, deadline_s: float) -> KVConnection:
        """Open a data connection and prove the token; the peer proves it too."""
        end = time.monotonic() + deadline_s
        for left in reversed(range(_TRIES)):
            sock = self._dial(endpoint, end)
            try:
                present(sock, token, binding_of(self._tls, sock))
                break
            except PeerLostError:
                sock.close()
                raise
            except OSError as e:  # a crowd of strangers at the peer's door may have pushed us out
                sock.close()
                if not left or time.monotonic() >= end or self._door.closed:
                    raise PeerLostError(f"{endpoint} dropped the data connection: {e}") from e
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

    def _connection(self, sock: socket.socket, peer: str) -> KVConnection:
        if isinstance(sock, TlsSocket):
            return TlsConnection(sock, peer)
        return TcpConnection(sock, peer, self._buffer_bytes)

    def accept(self, token: bytes, deadline_s: float) -> KVConnection:
        """Wait for the connection that presents `token`; it is good once."""
        sock = self._door.take(token, deadline_s)
        try:
            peer = f"{sock.getpeername()[0]}:{sock.getpeername()[1]}"
            return self._connection(sock, peer)
        except OSError as e:
            sock.close()
            raise PeerLostError(f"the data connection broke: {e}") from e

    def forget(self, token: bytes) -> None:
        """Have an `accept` that waits for this token give up."""
        self._door.forget(token)

    def close(self) -> None:
        """Release listener and thread. Idempotent."""
        self._door.close()


def bracket(host: str) -> str:
    """The host as it stands before a colon."""
    return f"[{host}]" if ":" in host else host


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
