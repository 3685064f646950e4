"""What the kernel knows of a TCP connection while a call is in the middle of it."""

from __future__ import annotations

import contextlib
import socket
import struct

__all__ = ["clock", "moved_bytes"]

_ACKED_AND_RECEIVED = struct.Struct("=QQ")
_AT = 120  # of tcpi_bytes_acked in Linux's struct tcp_info
_ACKED = struct.Struct("=Q")
_BUSY = struct.Struct("=QQ")
_BUSY_AT = 168  # of tcpi_busy_time, which tcpi_rwnd_limited follows


def moved_bytes(sock: socket.socket) -> int:
    """Bytes that the peer has taken and sent so far; 0 where that is not known."""
    with contextlib.suppress(OSError, AttributeError):  # closed, or not Linux
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        if len(info) >= _AT + _ACKED_AND_RECEIVED.size:
            return sum(_ACKED_AND_RECEIVED.unpack_from(info, _AT))
    return 0


def clock(sock: socket.socket) -> tuple[int, float] | None:
    """Bytes that the peer has acknowledged, and seconds in which the network held them back.

    Those in which the peer had no room do not count. None where that is not known.
    """
    with contextlib.suppress(OSError, AttributeError):
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        if len(info) >= _BUSY_AT + _BUSY.size:
            (acked,) = _ACKED.unpack_from(info, _AT)
            busy_us, no_room_us = _BUSY.unpack_from(info, _BUSY_AT)
            return acked, max(0, busy_us - no_room_us) / 1e6
    return None
