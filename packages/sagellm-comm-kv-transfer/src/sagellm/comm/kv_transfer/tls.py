"""TLS 1.3 with certificates on both sides, for control and data connections.

Each node has a certificate of one common CA. Where the certificate names nodes, as a DNS name
`node-3` or a URI `sagellm://node/3` among its alternative names, it stands for those nodes only;
one that names none stands for any. Host names and addresses are not compared: node ids are what
peers are known by. The shared key is needed as well, and its proofs cover both certificates.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import select
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm.core.protocols import (
    AuthenticationError,
    CommError,
    CommTimeoutError,
    ConfigError,
    IntegrityError,
    KVConnection,
    PeerLostError,
)

from ._tcp_info import moved_bytes

if TYPE_CHECKING:
    from .settings import KVTransferSettings

__all__ = ["RECORD_TYPE", "Tls", "TlsConnection", "TlsSocket"]

RECORD_TYPE = b"\x16"
"""First byte of a TLS connection; no message of ours begins with it."""

_TICK_S = 1.0
_PIECE_BYTES = 1 << 16
_NODE_NAME = re.compile(r"(?:node-|sagellm://node/)(\d{1,18})")

_OURS_TO_MEND = {  # what a peer's alert says of our certificate
    "CERTIFICATE_EXPIRED": "our certificate has expired for it: renew tls_cert, or mend its clock",
    "CERTIFICATE_REQUIRED": "it needs a certificate from us: set tls_cert and tls_key",
    "UNKNOWN_CA": "it does not know our certificate's CA: all nodes need the same tls_ca",
    "DECRYPT_ERROR": "our certificate is not of its CA: all nodes need the same tls_ca",
    "CERTIFICATE_UNKNOWN": "it does not accept our certificate: check tls_cert and its dates",
    "BAD_CERTIFICATE": "it does not accept our certificate: check tls_cert and its dates",
    "UNSUPPORTED_CERTIFICATE": "our certificate is not made for this use: check its extensions",
    "PROTOCOL_VERSION": "it does not speak TLS 1.3",
}
_THEIRS_TO_MEND = {  # OpenSSL's numbers of what is wrong with a peer's certificate
    9: "its certificate is not valid yet: check its dates and both clocks",
    10: "its certificate has expired: renew it",
}
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE")


class Tls:
    """This node's side of every TLS connection. Thread-safe.

    Args:
        cert: PEM file with this node's certificate, and those between it and the CA.
        key: PEM file with its private key, mode 0600.
        ca: PEM file with the certificates that peers' certificates have to lead to.

    Raises:
        ConfigError: A file is missing, open to others, or does not fit the others.

    """

    def __init__(self, cert: str, key: str, ca: str) -> None:
        self._fingerprint = _fingerprint_of_file(cert)
        with _reading("tls_key", key):
            mode = stat.S_IMODE(Path(key).stat().st_mode)
        if mode & 0o077:
            raise ConfigError(
                f"tls_key {key} has mode {mode:04o}: others can read it; `chmod 600` it"
            )
        self._client = _context(ssl.PROTOCOL_TLS_CLIENT, cert, key, ca)
        self._server = _context(ssl.PROTOCOL_TLS_SERVER, cert, key, ca)
        self._server.num_tickets = 0  # every connection shows its certificate

    @classmethod
    def of(cls, settings: KVTransferSettings) -> Tls | None:
        """TLS with the files that the settings name; None when they name none."""
        cert, key, ca = settings.tls_cert, settings.tls_key, settings.tls_ca
        return cls(cert, key, ca) if cert and key and ca else None

    def client(self, sock: socket.socket) -> TlsSocket:
        """Take over a connected socket; `handshake` is the caller's."""
        return self._wrap(self._client, sock, server_side=False)

    def server(self, sock: socket.socket) -> TlsSocket:
        """Take over an accepted socket; `handshake` is the caller's."""
        return self._wrap(self._server, sock, server_side=True)

    def binding(self, sock: TlsSocket) -> bytes:
        """Digest of both certificates, the same on both sides of one TLS connection."""
        pair = (self._fingerprint, sock.fingerprint())
        return b"".join(reversed(pair) if sock.server_side else pair)

    @staticmethod
    def _wrap(context: ssl.SSLContext, sock: socket.socket, *, server_side: bool) -> TlsSocket:
        wrapped = context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)
        assert isinstance(wrapped, TlsSocket), "contexts make sockets of this class"
        return wrapped


class TlsSocket(ssl.SSLSocket):
    """A TLS connection that behaves like the plain socket that it replaces; for one thread."""

    def handshake(self) -> None:
        """Shake hands, as far as the socket lets.

        Raises:
            BlockingIOError: Again when the socket is ready; only of a non-blocking one.
            AuthenticationError: A certificate is missing or was refused, or there is no TLS.

        """
        with _explained():
            self.do_handshake()

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """As of a plain socket; all that has been decrypted."""
        if self.version() is None:
            self.handshake()
        with _explained():
            data = super().recv(buflen, flags)
            while data and len(data) < buflen and self.pending():
                data += super().recv(buflen - len(data), flags)
        return data

    def send(self, data: bytes | bytearray | memoryview, flags: int = 0) -> int:  # type: ignore[override]  # typeshed: any buffer
        """As of a plain socket; after BlockingIOError the same bytes have to come again."""
        if self.version() is None:
            self.handshake()
        with _explained():
            return super().send(data, flags)

    def fingerprint(self) -> bytes:
        """SHA-256 of the peer's certificate."""
        der = self.getpeercert(binary_form=True)
        assert der is not None, "no connection without the peer's certificate"
        return hashlib.sha256(der).digest()

    def require_node(self, node_id: int) -> None:
        """Check that the peer's certificate may stand for a node.

        Raises:
            AuthenticationError: It names other nodes.

        """
        named: Any = (self.getpeercert() or {}).get("subjectAltName", ())  # typeshed: loose
        names = [str(name) for _, name in named]
        nodes = {int(m[1]) for name in names if (m := _NODE_NAME.fullmatch(name))}
        if nodes and node_id not in nodes:
            raise AuthenticationError(
                f"the certificate of node {node_id} is made for node "
                f"{', '.join(map(str, sorted(nodes)))}: give each node its own tls_cert"
            )


class TlsConnection(KVConnection):
    """One authenticated, encrypted stream; one thread per direction.

    OpenSSL does not let two threads into one connection: each step is taken under a lock with a
    socket that never blocks, and both threads wait outside of it.

    Args:
        sock: Connection that has shaken hands, which this object closes.
        peer: Who is at the other end, for messages.

    """

    def __init__(self, sock: TlsSocket, peer: str) -> None:
        self._sock = sock
        self._peer = peer
        self._aborted = False
        self._lock = threading.Lock()  # for every call into OpenSSL
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Send all bytes; `deadline_s` bounds the time without any progress."""
        return sum(self._move(self._sock.write, piece, deadline_s) for piece in _pieces(views))

    def receive(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Fill all views; `deadline_s` bounds the time without any progress."""
        return sum(self._move(self._sock.recv_into, v, deadline_s) for v in views if len(v))

    def abort(self) -> None:
        """Break the connection at once, from any thread."""
        self._aborted = True
        with contextlib.suppress(OSError):  # it may be down already
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def moved_bytes(self) -> int:
        """What the kernel says, of encrypted bytes."""
        return moved_bytes(self._sock)

    def close(self) -> None:
        """Release it. Idempotent."""
        with self._lock:
            self._sock.close()

    def _move(self, call: Callable[[memoryview], int], view: memoryview, deadline_s: float) -> int:
        calls = 0
        last = time.monotonic()
        while view:
            try:  # once per record of 16 KiB: `_explained` would take as long as the decryption
                with self._lock:
                    moved = call(view)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN, last, deadline_s)
                continue
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, last, deadline_s)
                continue
            except (OSError, ValueError) as e:  # ValueError: closed meanwhile
                raise self._broken(e) from e
            if not moved:
                raise PeerLostError(f"{self._peer} closed the connection")
            calls += 1
            last = time.monotonic()
            view = view[moved:]
        return calls

    def _broken(self, error: OSError | ValueError) -> CommError:
        """What an error of OpenSSL or of the socket is to those who move blocks."""
        try:
            with _explained():
                raise error
        except (OSError, ValueError) as e:
            return PeerLostError(f"the connection to {self._peer} broke: {e}")
        except CommError as e:
            return e

    def _wait(self, events: int, last: float, deadline_s: float) -> None:
        """Wait for what TLS needs next; the caller looks again."""
        left = last + deadline_s - time.monotonic()
        if self._aborted:
            raise PeerLostError(f"the connection to {self._peer} was broken")
        if left <= 0:
            raise CommTimeoutError(f"{self._peer} took or sent no byte for {deadline_s:g} s")
        poll = select.poll()
        try:
            poll.register(self._sock, events)
        except ValueError as e:
            raise PeerLostError(f"the connection to {self._peer} was closed") from e
        poll.poll(1000 * min(left, _TICK_S))


class _BlockedError(BlockingIOError):
    """TLS waits for the socket; poll's name for what."""

    def __init__(self, events: int) -> None:
        super().__init__("TLS waits for the socket")
        self.events = events


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raise what OpenSSL says as what a caller can act on."""
    try:
        yield
    except ssl.SSLWantReadError:
        raise _BlockedError(select.POLLIN) from None
    except ssl.SSLWantWriteError:
        raise _BlockedError(select.POLLOUT) from None
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        raise ConnectionResetError("the TLS connection was closed") from None
    except ssl.SSLCertVerificationError as e:
        why = _THEIRS_TO_MEND.get(
            e.verify_code,
            f"its certificate is refused ({e.verify_message}): all nodes need certificates of "
            "the CA in tls_ca",
        )
        raise AuthenticationError(why) from e
    except ssl.SSLError as e:
        reason = e.reason or ""
        for sign, what in _OURS_TO_MEND.items():
            if f"ALERT_{sign}" in reason:
                raise AuthenticationError(what) from e
        if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
            raise AuthenticationError("it showed no certificate: set its tls_cert") from e
        if any(sign in reason for sign in _NO_TLS):
            raise AuthenticationError(
                "it does not speak TLS: set tls_cert, tls_key and tls_ca on all nodes, or on none"
            ) from e
        raise IntegrityError(f"the TLS connection is damaged: {reason or e}") from e


def _pieces(views: Sequence[memoryview]) -> Iterator[memoryview]:
    """The same bytes in pieces that fill TLS records without being too long to see progress."""
    small: list[memoryview] = []
    held = 0
    for view in views:
        if len(view) < _PIECE_BYTES:
            small.append(view)
            held += len(view)
            if held < _PIECE_BYTES:
                continue
        if small:
            yield memoryview(b"".join(small))
            small, held = [], 0
        if len(view) >= _PIECE_BYTES:
            for start in range(0, len(view), _PIECE_BYTES):
                yield view[start : start + _PIECE_BYTES]
    if small:
        yield memoryview(b"".join(small))


def _context(protocol: int, cert: str, key: str, ca: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # node ids are compared instead
    context.verify_mode = ssl.CERT_REQUIRED
    context.sslsocket_class = TlsSocket
    with _reading("tls_cert, tls_key", f"{cert}, {key}"):
        context.load_cert_chain(cert, key)
    with _reading("tls_ca", ca):
        context.load_verify_locations(cafile=ca)
    return context


def _fingerprint_of_file(cert: str) -> bytes:
    with _reading("tls_cert", cert):
        text = Path(cert).read_text(encoding="ascii", errors="replace")
        begin, end = text.find(ssl.PEM_HEADER), text.find(ssl.PEM_FOOTER)
        if not 0 <= begin < end:
            raise ConfigError(f"tls_cert {cert} has no certificate in PEM form")
        der = ssl.PEM_cert_to_DER_cert(text[begin : end + len(ssl.PEM_FOOTER)])
    return hashlib.sha256(der).digest()


@contextlib.contextmanager
def _reading(setting: str, path: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except ssl.SSLError as e:
        raise ConfigError(f"{setting} {path}: {e.reason or e}") from e
    except (OSError, ValueError) as e:
        raise ConfigError(f"{setting} {path}: {getattr(e, 'strerror', None) or e}") from e
