"""Blocks through shared memory: the receiver copies them out of the sender's pool.

Two processes of one host meet at an abstract UNIX socket, where the kernel says whose process
is at the other end. Frames cross it as they do on TCP, with references in place of the bytes:
to sealed segments that are mapped read-only, or to the sender's address space, which the
receiver reads where the kernel permits.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import sys
import time
from pathlib import Path

import numpy as np

from sagellm.comm.kv_transfer._board import BOARD_BYTES, Board
from sagellm.comm.kv_transfer._peek import Peek
from sagellm.comm.kv_transfer._segment import View, shared_segments
from sagellm.core.protocols import (
    AuthenticationError,
    BackendUnavailableError,
    CommError,
    ConfigError,
    IntegrityError,
    KVConnection,
    KVTransport,
    MemoryRuns,
    PeerLostError,
    Probe,
    TransportSpec,
)

from ._door import TokenDoor, present
from ._shm_link import Meeting, ShmConnection

__all__ = ["SHM", "ShmTransport"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CREDENTIALS = struct.Struct("3i")
_GREETING = struct.Struct("<4sHHQ16s")
_MAGIC = b"sKVm"
_HAS_SEGMENTS = 1
_NONCE_BYTES = 16
_BUFFER_BYTES = 1 << 18


class ShmTransport(KVTransport):
    """Data connections to processes of this host and this user.

    Args:
        socket_buffer_bytes: Kernel buffer where bytes have to be sent; 0 takes 256 KiB.
        handshake_timeout_s: A connection that presents no token by then is closed.
        ignored: What other transports need.

    Raises:
        BackendUnavailableError: This system cannot share memory.

    """

    def __init__(
        self,
        *,
        socket_buffer_bytes: int = 0,
        handshake_timeout_s: float = 5.0,
        **ignored: object,
    ) -> None:
        if not (probe := _probe()).available:
            raise BackendUnavailableError(f"shm: {probe.reason}")
        self._buffer_bytes = socket_buffer_bytes or _BUFFER_BYTES
        name = f"sagellm-kv-{os.getpid()}-{secrets.token_hex(8)}"
        self._endpoint = f"{_boot_id()}/{name}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0{name}")
        listener.listen(128)
        self._door = TokenDoor(listener, handshake_timeout_s, f"kv-shm-{os.getpid()}", _is_ours)

    @property
    def rejected(self) -> int:
        """Connections of other users, and those that did not prove a token."""
        return self._door.rejected

    def endpoint(self, reached_at: str = "") -> str:
        """The host's boot id and the name of the socket."""
        return self._endpoint

    def reaches(self, endpoint: str) -> Probe:
        """Whether it is on this host."""
        if endpoint.partition("/")[0] != _boot_id():
            return Probe(False, "the peer is on another host: its boot id differs")
        return Probe(True, "same host")

    def connect(self, endpoint: str, token: bytes, deadline_s: float) -> KVConnection:
        """Open a connection to a process of this host.

        Raises:
            BackendUnavailableError: It is on another host, behind another network namespace,
                or neither side could read the other's memory; the message says which.
            AuthenticationError: It is another user's, or does not know the token.

        """
        name = endpoint.partition("/")[2]
        if not name:
            raise ConfigError(f"{endpoint!r} is not the endpoint of a shm transport")
        if not (probe := self.reaches(endpoint)).available:
            raise BackendUnavailableError(probe.reason)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as undo:
            undo.callback(sock.close)
            end = time.monotonic() + deadline_s
            try:
                # the kernel's time, not Python's: a crowd at the door is waited for, in turn
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(deadline_s))
                sock.connect(f"\0{name}")
                sock.settimeout(max(0.001, end - time.monotonic()))
            except BlockingIOError as e:
                raise PeerLostError(f"a crowd at the peer's door for {deadline_s:g} s") from e
            except OSError as e:
                raise BackendUnavailableError(
                    f"the peer's socket cannot be reached ({e.strerror or e}): it is in another "
                    "network namespace, or gone"
                ) from e
            if not _is_ours(sock):
                raise AuthenticationError("the peer's socket belongs to another user")
            try:
                present(sock, token)
            except OSError as e:
                if isinstance(e, CommError):
                    raise
                raise PeerLostError(f"the peer dropped the data connection: {e}") from e
            connection = self._meet(sock, "the peer", end)
            undo.pop_all()
        return connection

    def accept(self, token: bytes, deadline_s: float) -> KVConnection:
        """Wait for the connection that presents `token`; it is good once."""
        end = time.monotonic() + deadline_s
        sock = self._door.take(token, deadline_s)
        with contextlib.ExitStack() as undo:
            undo.callback(sock.close)
            connection = self._meet(sock, f"process {_credentials(sock)[0]}", end)
            undo.pop_all()
        return connection

    def forget(self, token: bytes) -> None:
        """Have an `accept` that waits for this token give up."""
        self._door.forget(token)

    def close(self) -> None:
        """Release listener and thread. Idempotent."""
        self._door.close()

    def _meet(self, sock: socket.socket, peer: str, end: float) -> ShmConnection:
        """Show each other the boards, and try to read each other's memory."""
        with contextlib.ExitStack() as undo:
            board = Board()
            undo.callback(board.close)
            nonce = np.frombuffer(secrets.token_bytes(_NONCE_BYTES), dtype=np.uint8).copy()
            mine = _HAS_SEGMENTS if shared_segments() else 0
            greeting = _GREETING.pack(_MAGIC, 1, mine, nonce.ctypes.data, nonce.tobytes())
            try:
                sock.settimeout(max(0.001, end - time.monotonic()))
                socket.send_fds(sock, [greeting], [board.segment.fd])
                theirs, fd = _greeting(sock)
                with contextlib.ExitStack() as shut:
                    shut.callback(os.close, fd)
                    view = View(fd, BOARD_BYTES)
                    undo.callback(view.close)
                peek, why = _try_peek(_credentials(sock)[0], theirs)
                if peek is not None:
                    undo.callback(peek.close)
                sock.sendall(b"y" if peek is not None else b"n")
                answer = sock.recv(1)
            except IntegrityError as e:
                raise PeerLostError(f"{peer} shows us what is no board: {e}") from e
            except OSError as e:
                raise PeerLostError(f"{peer} broke off while we met: {e}") from e
            if answer not in (b"y", b"n"):
                raise PeerLostError(f"{peer} broke off while we met")
            readable = answer == b"y"
            if not (readable or mine) or not (peek is not None or theirs[0] & _HAS_SEGMENTS):
                reason = why or "the peer could not read ours"
                raise BackendUnavailableError(
                    f"memory that is no allocated pool cannot be read across processes ({reason}); "
                    "`channel.allocate` makes pools that can"
                )
            meeting = Meeting(board, view, peek, readable)
            connection = ShmConnection(sock, peer, meeting, self._buffer_bytes)
            undo.pop_all()
        return connection


def _greeting(sock: socket.socket) -> tuple[tuple[int, int, bytes], int]:
    """The peer's flags, where its nonce is and what it is, and its board's descriptor."""
    data, fds, _, _ = socket.recv_fds(sock, _GREETING.size, 1)
    try:
        while data and len(data) < _GREETING.size:
            more = sock.recv(_GREETING.size - len(data))
            data = data + more if more else b""
        if len(data) != _GREETING.size or len(fds) != 1:
            raise ConnectionResetError("it closed the connection")
        magic, version, flags, address, nonce = _GREETING.unpack(data)
        if magic != _MAGIC or version != 1:
            raise ConnectionResetError(f"it greets with version {version}")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return (flags, address, nonce), fds[0]


def _try_peek(pid: int, theirs: tuple[int, int, bytes]) -> tuple[Peek | None, str]:
    """The peer's memory, if the kernel lets us read it, else why not."""
    _, address, nonce = theirs
    try:
        peek = Peek(pid)
    except (OSError, CommError) as e:
        return None, str(e)
    seen = np.zeros(_NONCE_BYTES, dtype=np.uint8)
    try:
        place = MemoryRuns(np.array([address & (1 << 62) - 1]), np.array([_NONCE_BYTES]))
        peek.read(place, np.array([seen.ctypes.data]))
        if seen.tobytes() == nonce:
            return peek, ""
        why = "it is not where it says"
    except (OSError, CommError) as e:
        why = str(e)
    peek.close()
    return None, why


def _timeval(seconds: float) -> bytes:
    microseconds = max(1, int(seconds * 1e6))
    return struct.pack("ll", microseconds // 1_000_000, microseconds % 1_000_000)


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _credentials(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as the kernel says."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


def _is_ours(sock: socket.socket) -> bool:
    try:
        return _credentials(sock)[1] == os.geteuid()
    except OSError:
        return False


def _probe() -> Probe:
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return Probe(False, "shared memory between channels needs Linux")
    if not _BOOT_ID.exists():
        return Probe(False, f"{_BOOT_ID} is not there, so that hosts cannot be told apart")
    return Probe(True, "Linux, same host and user")


SHM = TransportSpec(
    name="shm",
    priority=20,
    one_sided=True,
    remote_write=False,
    cancel=True,
    integrity=False,
    probe=_probe,
    load=lambda: ShmTransport,
)
