"""A measured curve: time over payload for one operation, algorithm and group.

Between two knots two interpolations disagree in opposite directions: straight in bytes (right
where bandwidth rules) and straight in the logarithms (right where a knee is near). Their geometric
mean is the estimate. The interval is the noise, or how far a knot's own neighbours miss it where
that is more.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from statistics import median

from sagellm.core.protocols import Basis

from . import _cost_noise

__all__ = ["Curve", "Reading"]

Reading = tuple[float, float, float, Basis]
"""Time, low and high in microseconds, and what they rest on."""

_FLOOR = 0.01  # even medians of one machine and size differ by about this much
_SPARSE = 0.5  # of a curve without inner knots nothing tells how it bends
_WIDEN_PER_OCTAVE = 0.15
# Median misses that a knot measured once stands for. In the middle of a gap noise alone would ask
# for 2.4, but misses are of gaps twice as wide; at a knot there is no gap, and one time, not two.
_ONCE_BETWEEN = 2.0
_ONCE_AT = 2.8


class Curve:
    """Knots in rising size; immutable.

    Args:
        points: (bytes, microseconds), at least one.
        noise: Half-width, in logarithms, of what fresh measurements at each knot cover; where it
            is None the knot was measured once, and how smooth the curve is must tell.
        floor: What is added to every half-width.

    """

    def __init__(
        self,
        points: Sequence[tuple[int, float]],
        noise: Sequence[float | None] | None = None,
        floor: float = _FLOOR,
    ) -> None:
        self._floor = floor
        self.points = tuple(sorted(points))
        self._x = [float(x) for x, _ in self.points]
        self._t = [t for _, t in self.points]
        self.noise = tuple(noise or [None] * len(self._x))
        residuals = [self._left_out(i) for i in range(1, len(self._x) - 1)]
        inner = [abs(r) for r in residuals]
        outer = median(inner) if inner else _SPARSE
        self._miss = [outer, *inner, outer][: len(self._x)]
        self._typical = (_ONCE_BETWEEN * outer, _ONCE_AT * outer) if inner else (_SPARSE, _SPARSE)
        self._guess = _cost_noise.of_residuals(residuals)

    @classmethod
    def of_repeats(cls, repeats: Mapping[int, Sequence[float]]) -> Curve:
        """The curve through the medians of repeats at each payload."""
        knots = sorted(repeats.items())
        noise = _cost_noise.of_repeats([times for _, times in knots])
        return cls([(nbytes, median(times)) for nbytes, times in knots], noise)

    def read(self, nbytes: int) -> Reading:
        """Time at a payload; beyond the knots it is `scaled`, and wider the farther away."""
        x = float(nbytes)
        if x < self._x[0]:
            return self._below(max(x, 1.0))
        if x > self._x[-1]:
            return self._beyond(x)
        right = bisect_left(self._x, x)
        if self._x[right] == x:
            time, known = self._t[right], self.noise[right]
            width = self._once(right) if known is None else self._floor + known
        else:
            time = _between(x, self._x, self._t, right)
            share = math.log(x / self._x[right - 1]) / math.log(self._x[right] / self._x[right - 1])
            near = abs(2 * share - 1)
            width = max(self._width(right - 1, near), self._width(right, near))
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

    def _once(self, i: int) -> float:
        """At a knot measured once: what its neighbours' line leaves, but no more than beside it.

        Three knots leave one degree of freedom, of which Student's t makes factors of thousands.
        The wider side counts: by the narrower one too few fresh measurements are inside.
        """
        beside = max(self._width(j) for j in (i - 1, i, i + 1) if 0 <= j < len(self._x))
        return min(self._floor + self._guess, beside)

    def _width(self, i: int, near: float = 1.0) -> float:
        """What knot i tells of times around it; near is 1 at a knot, 0 in the middle of a gap."""
        noise = self.noise[i]
        if noise is None:
            noise = self._typical[0] + near * (self._typical[1] - self._typical[0])
        return self._floor + max(self._miss[i], noise)

    def _left_out(self, i: int) -> float:
        """How far the line between knot i's neighbours misses it; a real gap is half as wide."""
        x, t = (values[i - 1 :: 2][:2] for values in (self._x, self._t))
        return math.log(self._t[i] / _between(self._x[i], x, t, 1))

    def _below(self, x: float) -> Reading:
        """Between the first knot's time, a floor that payloads do not change, and less by slope."""
        first = self._t[0]
        least = first
        if len(self._x) == 1:
            least = first * x / self._x[0]
        elif self._t[1] > first:
            rise = math.log(self._t[1] / first) / math.log(self._x[1] / self._x[0])
            slope = (self._t[1] - first) / (self._x[1] - self._x[0])
            bent = first * (x / self._x[0]) ** min(rise, 1.0)
            least = max(bent, first - slope * (self._x[0] - x))
        width = self._width(0) + _WIDEN_PER_OCTAVE * math.log2(self._x[0] / x)
        time = math.sqrt(first * least)
        return time, least * math.exp(-width), first * math.exp(width), "scaled"

    def _beyond(self, x: float) -> Reading:
        """The last slope goes on; the bounds also hold where the last bandwidth does."""
        last = self._t[-1]
        steady = time = last * x / self._x[-1]
        if len(self._x) > 1:
            slope = (last - self._t[-2]) / (self._x[-1] - self._x[-2])
            time = last + max(slope, 0.0) * (x - self._x[-1])
        width = self._width(-1) + _WIDEN_PER_OCTAVE * math.log2(x / self._x[-1])
        low, high = min(time, steady), max(time, steady)
        return time, low * math.exp(-width), high * math.exp(width), "scaled"


def _between(x: float, xs: Sequence[float], ts: Sequence[float], right: int) -> float:
    straight, bent = _both(x, xs, ts, right)
    return math.sqrt(straight * bent)


def _both(x: float, xs: Sequence[float], ts: Sequence[float], right: int) -> tuple[float, float]:
    left = right - 1
    share = (x - xs[left]) / (xs[right] - xs[left])
    straight = ts[left] + share * (ts[right] - ts[left])
    log_share = math.log(x / xs[left]) / math.log(xs[right] / xs[left])
    return straight, ts[left] * (ts[right] / ts[left]) ** log_share
