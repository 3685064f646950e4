"""How fast a link is, measured while it carries blocks.

The kernel knows how long data was under way and how much of it was acknowledged, less the time
in which the receiver had no room. Where data is under way most of the time the link sets the
pace, and bytes per second are its rate. Where it is not, the link is at least as fast as the
bytes were while it was busy.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sagellm.core.protocols import KVConnection

__all__ = ["Clocked", "LinkRate"]

_WINDOW_S, _WINDOW_BYTES, _LONGEST_S = 0.05, 1 << 19, 1.0
_BUSY = 0.85
_MEMORY_S = 0.3
"""How long ago a measurement has lost most of its weight, in seconds of sending."""


@runtime_checkable
class Clocked(Protocol):
    """A connection that knows for how long it has been sending."""

    def clock(self) -> tuple[int, float] | None:
        """Bytes that the peer has, and seconds in which any were under way; None if unknown."""
        ...


@dataclass(slots=True)
class _Lane:
    """A connection at the beginning of the window, and its own count where it has no clock."""

    bytes: int
    busy_s: float
    sent: int = 0
    sending_s: float = 0.0


class LinkRate:
    """The rate of one link in bytes per second. Thread-safe.

    Args:
        assumed: Before anything was measured.

    """

    def __init__(self, assumed: float) -> None:
        self.assumed = assumed
        self._rate: float | None = None
        self._paced = False
        self._lock = threading.Lock()
        self._lanes: weakref.WeakKeyDictionary[KVConnection, _Lane] = weakref.WeakKeyDictionary()
        self._since = self._last = time.monotonic()
        self._pending = 0

    @property
    def measured(self) -> bool:
        """Whether anything was measured."""
        return self._rate is not None

    @property
    def bytes_per_s(self) -> float:
        """As measured, or assumed."""
        return self.assumed if self._rate is None else self._rate

    def sent(self, conn: KVConnection, nbytes: int, seconds: float) -> None:
        """Note a frame that was handed to the kernel."""
        now = time.monotonic()
        with self._lock:
            lane = self._lanes.get(conn)
            if lane is None:
                lane = self._lanes[conn] = _Lane(*(_clock(conn) or (0, 0.0)))
            lane.sent += nbytes
            lane.sending_s += seconds
            self._pending += nbytes
            if now - self._last > _LONGEST_S:  # nothing was sent for long: begin anew
                self._begin(now)
            self._last = now
            if now - self._since >= _WINDOW_S and self._pending >= _WINDOW_BYTES:
                self._close(now)

    def _begin(self, now: float) -> None:
        self._since, self._pending = now, 0
        for conn, lane in self._lanes.items():
            clock = _clock(conn)
            lane.bytes, lane.busy_s = clock or (0, 0.0)
            lane.sent, lane.sending_s = 0, 0.0

    def _close(self, now: float) -> None:
        wall_s = now - self._since
        total, busy_s, rates = 0, 0.0, 0.0
        for conn, lane in self._lanes.items():
            clock = _clock(conn)
            count, spent = lane.sent, lane.sending_s
            if clock is not None:
                count, spent = clock[0] - lane.bytes, clock[1] - lane.busy_s
            if count > 0 and spent > 0:
                total += count
                busy_s += spent
                rates += count / spent
        if total < _WINDOW_BYTES // 2:
            if wall_s > _LONGEST_S:
                self._begin(now)
            return
        span_s = min(wall_s, busy_s)
        self._learn(total / span_s, rates, span_s, paced=span_s > _BUSY * wall_s)
        self._begin(now)

    def _learn(self, rate: float, fastest: float, span_s: float, *, paced: bool) -> None:
        if paced:
            weight = 1.0 if not self._paced or self._rate is None else 1 - math.exp(
                -span_s / _MEMORY_S
            )  # fmt: skip
            old = self._rate or rate
            self._rate, self._paced = old + weight * (rate - old), True
        elif not self._paced:
            self._rate = max(fastest, self._rate or 0.0)
        else:
            self._rate = max(rate, self._rate or 0.0)


def _clock(conn: KVConnection) -> tuple[int, float] | None:
    return conn.clock() if isinstance(conn, Clocked) else None
