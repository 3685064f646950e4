"""What the kernel knows of a TCP connection while a call is in the middle of it."""

from __future__ import annotations

import contextlib
import socket
import struct

__all__ = ["moved_bytes"]

_ACKED_AND_RECEIVED = struct.Struct("=QQ")
_AT = 120  # of tcpi_bytes_acked in Linux's struct tcp_info


def moved_bytes(sock: socket.socket) -> int:
    """Bytes that the peer has taken and sent so far; 0 where that is not known."""
    with contextlib.suppress(OSError, AttributeError):  # closed, or not Linux
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        if len(info) >= _AT + _ACKED_AND_RECEIVED.size:
            return sum(_ACKED_AND_RECEIVED.unpack_from(info, _AT))
    return 0
