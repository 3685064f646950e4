"""How many data connections of a link carry its blocks: one for little, tuned for much."""

from __future__ import annotations

import time

__all__ = ["MAX_ANNOUNCED", "LaneTuner", "RateMeter"]

MAX_ANNOUNCED = 64
"""Data connections that one link may announce in its life, those that failed included."""

_WINDOW_BYTES = 64 << 20
_GAIN = 1.08
_REST, _LONGEST_REST = 4, 64


class LaneTuner:
    """Finds the number of lanes with the best rate by trying one more and one less.

    A trial is kept when it is at least 8 % faster; otherwise the way back is taken and the next
    trial, in the other direction, waits twice as long.

    Args:
        start: Lanes to begin with.
        most: Bound; the least is 1 until `enough` says otherwise. Equal to `start` with `fixed`.
        fixed: Never change.

    """

    def __init__(self, start: int, most: int, *, fixed: bool = False) -> None:
        self.lanes = start
        self._least, self._most = 1, most
        self._fixed = fixed
        self._direction = 1
        self._kept = start
        self._kept_rate = 0.0
        self._rest = self._patience = _REST

    def limit(self, most: int) -> None:
        """Note that there are no more lanes than this."""
        self._most = max(1, min(self._most, most))
        self.lanes, self._kept = min(self.lanes, self._most), min(self._kept, self._most)
        self._least = min(self._least, self._most)

    def enough(self, most: int) -> None:
        """Note that neither more than these help nor fewer than now; a fixed number stays.

        Within a host one lane is never faster than two: it had 0.6 of their rate, and every
        trial of it costs a window.
        """
        if not self._fixed:
            self.limit(most)
            self._least = self.lanes

    def measured(self, bytes_per_s: float) -> int:
        """Take the rate that `lanes` had lately; the number of lanes to use from now on."""
        if self._fixed or self._most == self._least:
            return self.lanes
        if self.lanes != self._kept:  # a trial has ended
            if bytes_per_s >= _GAIN * self._kept_rate:
                self._kept, self._patience = self.lanes, _REST
            else:
                self.lanes, self._direction = self._kept, -self._direction
                self._patience = min(2 * self._patience, _LONGEST_REST)
            self._rest = self._patience
            return self.lanes
        self._kept_rate = bytes_per_s
        self._rest -= 1
        if self._rest <= 0:
            if not self._least <= self.lanes + self._direction <= self._most:
                self._direction = -self._direction
            self.lanes += self._direction
        return self.lanes


class RateMeter:
    """Bytes per second while there is something to send; not thread-safe."""

    def __init__(self) -> None:
        self._pieces = 0
        self._since = 0.0
        self._busy_s = 0.0
        self._bytes = 0

    def begin(self) -> None:
        """A piece is being sent from now on."""
        if not self._pieces:
            self._since = time.perf_counter()
        self._pieces += 1

    def end(self, count: int) -> float | None:
        """It has been sent; the rate of the window that this completes."""
        self._pieces -= 1
        self._bytes += count
        if self._bytes < _WINDOW_BYTES and self._pieces:
            return None
        now = time.perf_counter()
        self._busy_s += now - self._since
        self._since = now
        if self._bytes < _WINDOW_BYTES:
            return None
        rate = self._bytes / max(self._busy_s, 1e-9)
        self._bytes, self._busy_s = 0, 0.0
        return rate
