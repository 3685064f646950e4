"""Proving to each other, over an abstract UNIX socket, that two processes share a host.

A rank publishes the name of its socket and a nonce in the group's store. Whoever connects to the
socket is in the same network namespace; the kernel tells its user (SO_PEERCRED), and it must know
the nonces, which only readers of the store do. Messages are packets: each arrives whole.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import secrets
import select
import socket
import struct
import time
from collections import deque

from sagellm.core.protocols import AuthenticationError, CommTimeoutError, PeerLostError

__all__ = ["Listener", "connect", "receive", "send", "take_replies"]

_HELLO = struct.Struct("<8sI16s16s")
_MAGIC = b"sageshm1"
_PEERCRED = struct.Struct("3i")
_MAX_MESSAGE = 4096
_TRANSIENT = frozenset({errno.ECONNABORTED, errno.EINTR, errno.EPERM, errno.EPROTO})
"""Errors of `accept` that concern one guest: the next one may be accepted."""

Claims = dict[int, bytes]
"""Nonce of each rank, as the store has them."""


class Listener:
    """This rank's abstract socket, from before it is published until everyone has come.

    Args:
        backlog: Guests that may wait to be accepted, and that may be here and silent: beyond, the
            oldest is sent away. A multiple of the ranks leaves room for all of them.

    Attributes:
        trouble: Why no guest can be accepted now, such as a lack of descriptors; empty if they can.

    """

    def __init__(self, backlog: int) -> None:
        self.address = f"sagellm-{secrets.token_hex(16)}"
        self.nonce = secrets.token_bytes(16)
        self.trouble = ""
        self._backlog = backlog
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(b"\0" + self.address.encode())
        self._socket.listen(backlog)
        self._socket.setblocking(False)
        self._guests: deque[socket.socket] = deque()  # accepted, and silent so far

    def serve(self, rank: int, claims: Claims, wanted: set[int]) -> dict[int, socket.socket]:
        """Those of `wanted` who have come and proven themselves by now; never blocks.

        Strangers, and ranks nobody waits for, are sent away.
        """
        for _ in range(self._backlog):
            if not self._accept():
                break
        came = self._hear(rank, claims, wanted)
        while len(self._guests) > self._backlog:
            self._guests.popleft().close()
        return came

    def _hear(self, rank: int, claims: Claims, wanted: set[int]) -> dict[int, socket.socket]:
        came: dict[int, socket.socket] = {}
        for guest in list(self._guests):
            try:
                hello = guest.recv(_HELLO.size + 1)
            except BlockingIOError:
                continue
            except OSError:
                hello = b""
            self._guests.remove(guest)
            peer = self._judge(guest, hello, claims)
            if peer not in wanted - set(came):
                guest.close()
                continue
            with contextlib.suppress(OSError):
                guest.send(_HELLO.pack(_MAGIC, rank, self.nonce, claims[peer]))
            came[peer] = guest
        return came

    def _accept(self) -> bool:
        """Take one guest in; whether there may be another."""
        try:
            guest, _ = self._socket.accept()
        except BlockingIOError:
            self.trouble = ""
            return False
        except OSError as e:
            if e.errno in _TRANSIENT:
                return True
            self.trouble = f"no connection can be accepted: {e.strerror}"
            return False
        self.trouble = ""
        if _uid(guest) != os.getuid():
            guest.close()
            return True
        guest.setblocking(False)
        self._guests.append(guest)
        return True

    def _judge(self, guest: socket.socket, hello: bytes, claims: Claims) -> int:
        if len(hello) != _HELLO.size:
            return -1
        magic, peer, theirs, ours = _HELLO.unpack(hello)
        known = claims.get(peer, b"")
        proven = secrets.compare_digest(theirs, known) and secrets.compare_digest(ours, self.nonce)
        return int(peer) if magic == _MAGIC and proven else -1

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Take the address back and send away who is still silent. Safe more than once."""
        for guest in self._guests:
            guest.close()
        self._guests.clear()
        self._socket.close()


def connect(
    address: str, rank: int, nonce: bytes, peer: int, peer_nonce: bytes, deadline: float
) -> socket.socket:
    """A connection to `peer`, with our hello on its way.

    Raises:
        AuthenticationError: Another user listens there.
        PeerLostError: Nobody does: another network namespace, or the rank is gone.

    """
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        link.settimeout(max(0.001, deadline - time.monotonic()))
        link.connect(b"\0" + address.encode())
        if _uid(link) != os.getuid():
            raise AuthenticationError(
                f"rank {peer}'s socket belongs to uid {_uid(link)}, this process to {os.getuid()}"
            )
        link.send(_HELLO.pack(_MAGIC, rank, nonce, peer_nonce))
    except TimeoutError:
        link.close()
        raise CommTimeoutError(f"rank {peer} does not accept connections") from None
    except AuthenticationError:
        link.close()
        raise
    except OSError as e:
        link.close()
        raise PeerLostError(
            f"rank {peer} cannot be reached at its socket: {e.strerror}", rank=peer
        ) from e
    return link


def check_reply(link: socket.socket, nonce: bytes, peer: int, peer_nonce: bytes) -> None:
    """Read the answer to our hello; the socket is readable.

    Raises:
        AuthenticationError: It does not come from the rank that published the socket.
        PeerLostError: The connection was closed.

    """
    reply = receive(link, peer)[0]
    if len(reply) == _HELLO.size:
        magic, who, theirs, ours = _HELLO.unpack(reply)
        alike = secrets.compare_digest(theirs, peer_nonce) and secrets.compare_digest(ours, nonce)
        if magic == _MAGIC and who == peer and alike:
            return
    raise AuthenticationError(f"what answers at rank {peer}'s socket is not rank {peer}")


def take_replies(
    links: dict[int, socket.socket], nonce: bytes, claims: Claims, wait_s: float
) -> set[int]:
    """The peers of `links` whose answer has come, and is right, within `wait_s`."""
    if not links:
        return set()
    by_fd = {link.fileno(): peer for peer, link in links.items()}
    poller = select.poll()
    for fd in by_fd:
        poller.register(fd, select.POLLIN)
    came = {by_fd[fd] for fd, _ in poller.poll(wait_s * 1000)}
    for peer in came:
        check_reply(links[peer], nonce, peer, claims[peer])
    return came


def send(link: socket.socket, message: bytes, fd: int = -1) -> None:
    """One packet, with a descriptor if there is one."""
    extra = []
    if fd >= 0:
        extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    link.sendmsg([message], extra)


def receive(link: socket.socket, peer: int) -> tuple[bytes, int]:
    """One packet, and the descriptor that came with it or -1.

    Raises:
        PeerLostError: The connection was closed.

    """
    try:
        size = socket.CMSG_SPACE(array.array("i").itemsize)
        message, extra, _, _ = link.recvmsg(_MAX_MESSAGE, size, socket.MSG_CMSG_CLOEXEC)
    except OSError as e:
        raise PeerLostError(f"rank {peer} closed its connection: {e}", rank=peer) from e
    fd = -1
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(data) >= 4:
            fd = int(array.array("i", data[:4])[0])
    if not message:
        if fd >= 0:
            os.close(fd)
        raise PeerLostError(f"rank {peer} closed its connection", rank=peer)
    return message, fd


def _uid(link: socket.socket) -> int:
    found = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    return int(_PEERCRED.unpack(found)[1])
