"""A measured curve: time over payload for one operation, algorithm and group size.

Between two knots two interpolations disagree in opposite directions: straight in bytes (right
where bandwidth rules) and straight in the logarithms (right where a knee is near). Their geometric
mean is the estimate, and how far a knot's own neighbours miss it is the interval.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from statistics import median

from sagellm.core.protocols import Basis

__all__ = ["Curve", "Reading"]

Reading = tuple[float, float, float, Basis]
"""Time, low and high in microseconds, and what they rest on."""

_FLOOR = 0.02  # repeats of one machine and size differ by about this much (log scale)
_SPARSE = 0.5  # of a curve without inner knots nothing tells how it bends
_WIDEN_PER_OCTAVE = 0.15


class Curve:
    """Knots in rising size; immutable.

    Args:
        points: (bytes, microseconds), at least one.
        spread: Relative spread of repeats at a knot, where repeats exist.
        floor: Relative noise that is taken for granted.

    """

    def __init__(
        self,
        points: Sequence[tuple[int, float]],
        spread: Sequence[float] | None = None,
        floor: float = _FLOOR,
    ) -> None:
        self._floor = floor
        self.points = tuple(sorted(points))
        self._x = [float(x) for x, _ in self.points]
        self._t = [t for _, t in self.points]
        self._spread = list(spread or [0.0] * len(self._x))
        self._miss = [self._left_out(i) for i in range(len(self._x))]

    def read(self, nbytes: int) -> Reading:
        """Time at a payload; beyond the knots it is `scaled`, and wider the farther away."""
        x, n = float(nbytes), len(self._x)
        if x < self._x[0]:
            # Small payloads cost what the fixed part costs, which the first knot bounds.
            octaves = math.log2(self._x[0] / max(x, 1.0))
            width = self._floor + self._width(0) + _WIDEN_PER_OCTAVE * octaves
            return (
                self._t[0],
                self._t[0] * math.exp(-width),
                self._t[0] * math.exp(self._floor),
                "scaled",
            )
        if x > self._x[-1]:
            time = self._beyond(x)
            octaves = math.log2(x / self._x[-1])
            width = self._width(n - 1) + _WIDEN_PER_OCTAVE * octaves
            return time, time * math.exp(-width), time * math.exp(width), "scaled"
        right = bisect_left(self._x, x)
        if self._x[right] == x:
            time, width = self._t[right], self._floor + self._spread[right]
        else:
            time = _between(x, self._x, self._t, right)
            width = max(self._width(right - 1), self._width(right))
        return time, time * math.exp(-width), time * math.exp(width), "calibrated"

    def doubt(self, nbytes: int) -> float:
        """How unsure the curve is between its knots, relative to the time and without noise.

        The greater of two: how far straight and bent interpolation are apart, and how far the
        knots on both sides are missed by their own neighbours.
        """
        right = bisect_left(self._x, nbytes)
        if right in (0, len(self._x)):
            return math.inf
        straight, bent = _both(float(nbytes), self._x, self._t, right)
        return max(abs(math.log(straight / bent)), self._miss[right - 1], self._miss[right])

    def _width(self, i: int) -> float:
        return self._floor + max(self._miss[i], self._spread[i])

    def _left_out(self, i: int) -> float:
        """How far the curve without knot i misses it; wider than a real gap, which is half."""
        if not 0 < i < len(self._x) - 1:
            inner = [self._left_out(j) for j in range(1, len(self._x) - 1)]
            return median(inner) if inner else _SPARSE
        x, t = self._x[:i] + self._x[i + 1 :], self._t[:i] + self._t[i + 1 :]
        return abs(math.log(_between(self._x[i], x, t, i) / self._t[i]))

    def _beyond(self, x: float) -> float:
        if len(self._x) == 1:
            return self._t[-1] * max(1.0, x / self._x[-1])
        slope = (self._t[-1] - self._t[-2]) / (self._x[-1] - self._x[-2])
        return self._t[-1] + max(slope, 0.0) * (x - self._x[-1])


def _between(x: float, xs: Sequence[float], ts: Sequence[float], right: int) -> float:
    straight, bent = _both(x, xs, ts, right)
    return math.sqrt(straight * bent)


def _both(x: float, xs: Sequence[float], ts: Sequence[float], right: int) -> tuple[float, float]:
    left = right - 1
    share = (x - xs[left]) / (xs[right] - xs[left])
    straight = ts[left] + share * (ts[right] - ts[left])
    log_share = math.log(x / xs[left]) / math.log(xs[right] / xs[left])
    return straight, ts[left] * (ts[right] / ts[left]) ** log_share
