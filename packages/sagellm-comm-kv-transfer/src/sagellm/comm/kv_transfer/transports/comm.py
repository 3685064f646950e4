"""Blocks by the point-to-point operations of a communication backend that was handed in.

A backend moves whole tensors between ranks and knows no connections: who may connect, where a
message begins and that a peer is gone is said over two TCP connections, one for each direction.
What is small goes over them, too. Of a large piece the sender tells size and tag, the receiver
posts its receive and says so, and only then is it sent: no operation is begun whose other half
may never come. Pieces are staged, so that nothing writes into blocks once a transfer has failed,
even where the backend cannot be stopped.

Gloo is tested. Backends of devices (NCCL, HCCL) go the same way, with a copy to the device and
back, and are unverified on hardware; they ignore tags, so only one connection in one direction
at a time between two ranks is safe with them.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import logging
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sagellm.core.protocols import (
    BackendUnavailableError,
    CommBackendProtocol,
    CommError,
    CommTimeoutError,
    IntegrityError,
    KVConnection,
    KVTransport,
    PeerLostError,
    Probe,
    TransportSpec,
    Work,
)

from .tcp import TcpTransport

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["COMM", "CommConnection", "CommTransport"]

logger = logging.getLogger(__name__)

_PIECE_BYTES = 4 << 20
_SMALL_BYTES = 64 << 10
"""Up to here a piece goes over TCP: it needs no staging and no answer."""
_TAGS = 0x4B56
"""Tags of ours are below this, which backends keep for themselves."""
_LONGEST_S = 60.0
"""A piece that has been announced takes no longer, even for one who waits for ever."""
_TICK_S = 0.5
_ANNOUNCEMENT = struct.Struct("<IQ")  # tag, 0 for what follows at once; bytes
_RANK = struct.Struct("<I")
_GO = b"\x01"


class CommTransport(KVTransport):
    """Connections over a backend, with TCP for what is said about them.

    Args:
        comm: The backend. It is used from several threads, one at a time, so it must be used by
            nothing else (`backend.split(range(backend.size))` makes such a one); it stays the
            caller's, who closes it after the channel.
        host: Address to bind.
        advertise: Host that peers are told.
        handshake_timeout_s: A connection that presents no token by then is closed.
        tls: Refused: a backend does not encrypt.

    Raises:
        BackendUnavailableError: No backend was handed in, it has one rank only, or TLS is asked
            for.

    """

    def __init__(
        self,
        *,
        comm: CommBackendProtocol | None = None,
        host: str = "127.0.0.1",
        advertise: str | None = None,
        handshake_timeout_s: float = 5.0,
        tls: object = None,
        **_others: object,
    ) -> None:
        if comm is None:
            raise BackendUnavailableError("no backend was handed in: KVTransferChannel(comm=...)")
        if comm.size < 2:
            raise BackendUnavailableError(f"the {comm.name} backend has no other rank")
        if tls is not None:
            raise BackendUnavailableError(f"TLS is asked for, and {comm.name} does not encrypt")
        if comm.device_type != "cpu":
            logger.warning("blocks over %s are unverified on hardware", comm.name)
        self._comm = comm
        self._signals = TcpTransport(
            host=host, advertise=advertise, handshake_timeout_s=handshake_timeout_s
        )
        members = repr((comm.name, comm.global_ranks))
        self._group = hashlib.sha256(members.encode()).hexdigest()[:16]
        self._using = threading.Lock()
        self._tags = itertools.count()
        self._stuck: list[tuple[Work[Any], Tensor]] = []  # Any: the operation's result

    @property
    def rejected(self) -> int:
        """Connections that did not prove a token."""
        return self._signals.rejected

    def endpoint(self, reached_at: str = "") -> str:
        """`group/rank@host:port`."""
        return f"{self._group}/{self._comm.rank}@{self._signals.endpoint(reached_at)}"

    def reaches(self, endpoint: str) -> Probe:
        """Whether the endpoint is another rank of our group."""
        group, rank, _ = _parse(endpoint)
        if group != self._group:
            return Probe(False, "the peer's backend is of another group")
        if rank == self._comm.rank or not 0 <= rank < self._comm.size:
            return Probe(False, f"rank {rank} is not another rank of {self._comm.size}")
        return Probe(True, f"rank {rank} of the same group")

    def connect(self, endpoint: str, token: bytes, deadline_s: float) -> KVConnection:
        """Open both connections and say who we are."""
        probe = self.reaches(endpoint)
        if not probe.available:
            raise PeerLostError(f"{endpoint}: {probe.reason}")
        _, rank, address = _parse(endpoint)
        end = time.monotonic() + deadline_s
        there = self._signals.connect(address, _derive(token, b"there"), deadline_s)
        try:
            there.send([memoryview(_RANK.pack(self._comm.rank))], deadline_s)
            left = max(0.001, end - time.monotonic())
            back = self._signals.connect(address, _derive(token, b"back"), left)
        except BaseException:
            there.close()
            raise
        return CommConnection(self, rank, there, back)

    def accept(self, token: bytes, deadline_s: float) -> KVConnection:
        """Wait for both connections of one that presents `token`."""
        end = time.monotonic() + deadline_s
        back = self._signals.accept(_derive(token, b"there"), deadline_s)
        try:
            raw = bytearray(_RANK.size)
            back.receive([memoryview(raw)], deadline_s)
            (rank,) = _RANK.unpack(raw)
            if rank == self._comm.rank or rank >= self._comm.size:
                raise PeerLostError(f"the peer says it is rank {rank} of {self._comm.size}")
            left = max(0.001, end - time.monotonic())
            there = self._signals.accept(_derive(token, b"back"), left)
        except BaseException:
            back.close()
            raise
        return CommConnection(self, rank, there, back)

    def forget(self, token: bytes) -> None:
        """Have an `accept` that waits for this token give up."""
        for which in (b"there", b"back"):
            self._signals.forget(_derive(token, which))

    def close(self) -> None:
        """Release listener and thread; the backend stays open. Idempotent."""
        self._signals.close()

    def tag(self) -> int:
        """A tag that no operation in flight has."""
        return 1 + next(self._tags) % (_TAGS - 1)

    def staging(self, size: int) -> Tensor:
        """Memory for one operation, where the backend takes it."""
        import torch

        with self._using:
            return self._comm.empty((size,), torch.uint8)

    def begin(self, what: str, tensor: Tensor, rank: int, tag: int) -> Work[Any]:
        """Start to `send` or `recv`.

        Raises:
            PeerLostError: The backend refuses: its group has failed.

        """
        try:
            with self._using:
                call = self._comm.send if what == "send" else self._comm.recv
                work = call(tensor, rank, tag, async_op=True)
        except CommError as e:
            raise PeerLostError(f"{self._comm.name} to rank {rank}: {e}", rank=rank) from e
        assert isinstance(work, Work), "asked for with async_op"
        return work

    def keep(self, work: Work[Any], tensor: Tensor) -> None:
        """Hold memory of an operation that nobody waits for any more until it has ended."""
        with self._using:
            self._stuck = [(w, t) for w, t in self._stuck if not w.done()]
            self._stuck.append((work, tensor))


class CommConnection(KVConnection):
    """One stream over a backend; one thread per direction.

    Args:
        transport: Whose.
        rank: At the other end.
        there: Connection for what we send.
        back: Connection for what we receive.

    """

    def __init__(
        self, transport: CommTransport, rank: int, there: KVConnection, back: KVConnection
    ) -> None:
        self._transport = transport
        self._rank = rank
        self._there = there
        self._back = back
        self._aborted = False
        self._coming = 0
        self._staged: Tensor | None = None
        self._rest = memoryview(b"")

    def send(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Send all bytes; `deadline_s` bounds the time without any progress."""
        calls = 0
        for piece in _pieces(views):
            size = sum(map(len, piece))
            if size <= _SMALL_BYTES:
                head = memoryview(_ANNOUNCEMENT.pack(0, size))
                calls += self._there.send([head, *piece], deadline_s)
            else:
                self._send_large(piece, size, deadline_s)
                calls += 3
        return calls

    def _send_large(self, piece: Sequence[memoryview], size: int, deadline_s: float) -> None:
        import torch

        flat = torch.empty(size, dtype=torch.uint8)
        into, at = memoryview(flat.numpy()), 0  # type: ignore[arg-type,unused-ignore]  # numpy 1's stubs
        for view in piece:
            into[at : at + len(view)] = view
            at += len(view)
        tensor = self._transport.staging(size).copy_(flat)
        tag = self._transport.tag()
        self._there.send([memoryview(_ANNOUNCEMENT.pack(tag, size))], deadline_s)
        answer = bytearray(len(_GO))
        self._there.receive([memoryview(answer)], deadline_s)
        if answer != _GO:
            raise IntegrityError(f"rank {self._rank} answers an announcement with {answer!r}")
        self._wait(self._transport.begin("send", tensor, self._rank, tag), tensor, deadline_s)

    def receive(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Fill all views; `deadline_s` bounds the time without any progress."""
        calls = 0
        for view in views:
            left = view
            while len(left):
                if not self._coming:
                    self._announced(deadline_s)
                    calls += 1
                take = min(len(left), self._coming)
                if len(self._rest):
                    left[:take] = self._rest[:take]
                    self._rest = self._rest[take:]
                else:
                    calls += self._back.receive([left[:take]], deadline_s)
                self._coming -= take
                left = left[take:]
        return calls

    def _announced(self, deadline_s: float) -> None:
        """Take the next announcement, and what it announces when that is large."""
        raw = bytearray(_ANNOUNCEMENT.size)
        self._back.receive([memoryview(raw)], deadline_s)
        tag, size = _ANNOUNCEMENT.unpack(raw)
        if not 0 < size <= (_PIECE_BYTES if tag else _SMALL_BYTES) or tag >= _TAGS:
            raise IntegrityError(f"rank {self._rank} announces {size} bytes with tag {tag}")
        if tag:
            tensor = self._transport.staging(size)
            work = self._transport.begin("recv", tensor, self._rank, tag)
            try:
                self._back.send([memoryview(_GO)], deadline_s)
            except BaseException:
                self._transport.keep(work, tensor)
                raise
            self._wait(work, tensor, deadline_s)
            self._staged = tensor.cpu()
            self._rest = memoryview(self._staged.numpy())  # type: ignore[arg-type,unused-ignore]  # numpy 1's stubs
        self._coming = size

    def _wait(self, work: Work[Any], tensor: Tensor, deadline_s: float) -> None:
        end = time.monotonic() + min(deadline_s, _LONGEST_S)
        while True:
            try:
                work.synchronize(max(0.001, min(_TICK_S, end - time.monotonic())))
                return
            except CommTimeoutError as e:
                if work.done() or self._aborted or time.monotonic() >= end:
                    self._transport.keep(work, tensor)
                    if self._aborted:
                        text = f"the connection to rank {self._rank} was broken"
                        raise PeerLostError(text, rank=self._rank) from None
                    raise CommTimeoutError(f"rank {self._rank}: {e}") from e
            except CommError as e:
                self._transport.keep(work, tensor)  # a failed group may still be at it
                raise PeerLostError(f"rank {self._rank}: {e}", rank=self._rank) from e

    def abort(self) -> None:
        """Break the connection at once; what the backend has begun, it ends."""
        self._aborted = True
        self._there.abort()
        self._back.abort()

    def moved_bytes(self) -> int:
        """What goes over TCP."""
        return self._there.moved_bytes() + self._back.moved_bytes()

    def close(self) -> None:
        """Release it. Idempotent."""
        self._there.close()
        self._back.close()


def _pieces(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The views, in lists of at most one piece's bytes."""
    piece: list[memoryview] = []
    room = _PIECE_BYTES
    for view in views:
        at = 0
        while at < len(view):
            part = view[at : at + room]
            piece.append(part)
            at, room = at + len(part), room - len(part)
            if not room:
                yield piece
                piece, room = [], _PIECE_BYTES
    if piece:
        yield piece


def _parse(endpoint: str) -> tuple[str, int, str]:
    """Group, rank and address of an endpoint; a rank of -1 when it is none."""
    who, _, address = endpoint.partition("@")
    group, _, rank = who.partition("/")
    return group, int(rank) if rank.isdecimal() and len(rank) < 10 else -1, address


def _derive(token: bytes, which: bytes) -> bytes:
    return hmac.digest(token, which, "sha256")


COMM = TransportSpec(
    name="comm",
    priority=5,
    one_sided=False,
    remote_write=False,
    cancel=False,
    integrity=False,
    probe=lambda: Probe(True, "it needs a backend that is handed in"),
    load=lambda: CommTransport,
)
