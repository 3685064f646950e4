"""How far a fresh measurement may lie from the median of a few repeats.

All in logarithms. The scale is the median absolute deviation, which one interruption among the
repeats does not move, with the small-sample factors of C. Croux and P. Rousseeuw, "Time-efficient
algorithms for two highly robust estimators of scale", 1992. Of it a Student's t prediction
interval for one further observation is made (G. Hahn and W. Meeker, "Statistical Intervals", 1991,
chapter 4), about a median, whose variance is about pi/(2n + pi - 2) of one value's, and with 0.37
of the degrees of freedom, which is how efficient that scale is (P. Huber, "Robust Statistics",
1981).

That forgets interruptions, however many there are up to half. Where enough is known to tell them
from an accident, the interval also holds nine tenths of what was seen, by the rank that split
conformal prediction takes (J. Lei and others, "Distribution-free predictive inference for
regression", 2018).

Where nothing was repeated, noise is what is left at each knot of the line between its neighbours
(T. Gasser, L. Sroka and C. Jennen-Steinmetz, "Residual variance and residual pattern in nonlinear
regression", Biometrika 73, 1986); bends of the curve count as noise then, and widen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

__all__ = ["UNKNOWN", "of_repeats", "of_residuals"]

UNKNOWN = 0.5
"""Where neither repeats nor neighbours tell anything: a factor of 1.6 either way."""

_SHARE = 0.9
_EFFICIENCY = 0.37
_TO_SIGMA = 1.4826  # of a median absolute deviation, for the normal distribution
_FACTORS = {2: 1.196, 3: 1.495, 4: 1.363, 5: 1.206, 6: 1.200, 7: 1.140, 8: 1.129, 9: 1.107}
_RESIDUAL = math.sqrt(1.5)  # sigma of a knot less the mean of two neighbours, over its own

# 95 % points of Student's t by degrees of freedom; between them, straight in their inverse.
_T = (
    (1, 6.314), (2, 2.920), (3, 2.353), (4, 2.132), (5, 2.015), (6, 1.943), (8, 1.860),
    (10, 1.812), (15, 1.753), (20, 1.725), (30, 1.697), (math.inf, 1.645),
)  # fmt: skip


def of_repeats(repeats: Sequence[Sequence[float]]) -> list[float | None]:
    """Half-width of the interval that should hold 9 of 10 further measurements, for each knot.

    Neighbouring knots are taken to be alike: three of them lend each other degrees of freedom, and
    a knot's own scale counts where it is the greater. None where none of the three was repeated.
    Interruptions are rare, so five tell of them.
    """
    scales = [_scale(times) for times in repeats]
    found: list[float | None] = []
    for i, times in enumerate(repeats):
        near = [j for j in range(max(0, i - 1), min(len(repeats), i + 2)) if scales[j] is not None]
        freedom = sum(len(repeats[j]) - 1 for j in near)
        if not freedom:
            found.append(None)
            continue
        first = max(0, min(i - 2, len(repeats) - 5))
        around = [times for times in repeats[first : first + 5] if len(times) > 1]
        seen = _seen([x for times in around for x in _deviations(times)])
        squares = sum((len(repeats[j]) - 1) * (scales[j] or 0.0) ** 2 for j in near)
        scale = max(scales[i] or 0.0, math.sqrt(squares / freedom))
        found.append(max(seen, _half_width(scale, _EFFICIENCY * freedom, len(times))))
    return found


def of_residuals(residuals: Sequence[float]) -> float:
    """The same for a knot measured once, of how far inner knots lie off their neighbours' line."""
    if not residuals:
        return UNKNOWN
    scale = _TO_SIGMA * median(map(abs, residuals)) / _RESIDUAL
    return _half_width(scale, _EFFICIENCY * len(residuals), 1)


def _scale(times: Sequence[float]) -> float | None:
    count = len(times)
    if count < 2:
        return None
    return _TO_SIGMA * _FACTORS.get(count, count / (count - 0.8)) * median(_deviations(times))


def _seen(deviations: Sequence[float]) -> float:
    """What nine tenths stay within; nothing where that is the very last, maybe an accident."""
    rank = math.ceil(_SHARE * (len(deviations) + 1))
    return sorted(deviations)[rank - 1] if rank < len(deviations) else 0.0


def _deviations(times: Sequence[float]) -> list[float]:
    middle = median(times)
    return [abs(math.log(t / middle)) for t in times]


def _half_width(scale: float, freedom: float, count: int) -> float:
    return _student(freedom) * scale * math.sqrt(1 + math.pi / (2 * count + math.pi - 2))


def _student(freedom: float) -> float:
    freedom = max(1.0, freedom)
    for (low, t_low), (high, t_high) in pairwise(_T):
        if freedom <= high:
            share = (1 / low - 1 / freedom) / (1 / low - 1 / high)
            return t_low + share * (t_high - t_low)
    raise AssertionError("unreachable: the last point is at infinity")
