"""Estimates out of curves and formulas, for the live model and for a frozen table alike.

A curve speaks for its own group alone. Of another number of ranks, or of ranks joined in another
way, it gives bounds: between the time as it was measured and the time as formulas say it changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sagellm.core.protocols import ConfigError, CostTable, Estimate
from sagellm.core.protocols.bandwidth import busbw_factor

from ._cost_curve import Curve, Reading
from ._cost_prior import ALGORITHMS
from ._cost_rows import CurveKey

__all__ = [
    "MARK_NOISE",
    "MARK_PRIOR",
    "MARK_SHAPE",
    "Formula",
    "Knowledge",
    "estimate",
    "pick",
    "prior",
    "table_names",
]

MARK_PRIOR = "prior:"
MARK_NOISE = "noise:"
MARK_SHAPE = "@"

_PRIOR_SPREAD = math.log(4.0)
_SCALED_SPREAD = math.log(2.0)

Formula = Callable[[str, str, int, int, str], float]
"""Op, algorithm, payload, ranks and shape to microseconds by formula."""


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Measured curves of any ops, and formulas.

    Attributes:
        curves: Measurements.
        formula: Time by formula, 0 where there is none.
        priced: Numbers of ranks that the formulas are of; None for all.

    """

    curves: Mapping[CurveKey, Curve]
    formula: Formula
    priced: frozenset[int] | None = None

    @classmethod
    def of_table(cls, table: CostTable, op: str) -> Knowledge:
        """What a frozen table knows of one operation."""
        points: dict[CurveKey, Sequence[tuple[int, float]]] = {}
        noise: dict[CurveKey, Mapping[int, float]] = {}
        lines: dict[CurveKey, Sequence[tuple[int, float]]] = {}
        for (name, algorithm, size), knots in table.curves.items():
            rest, _, shape = name.partition(MARK_SHAPE)
            mark, _, bare = rest.rpartition(":")
            if bare != op or not knots:
                continue
            key = CurveKey(op, algorithm, size, shape)
            if not mark:
                points[key] = knots
            elif f"{mark}:" == MARK_NOISE:
                noise[key] = dict(knots)
            else:
                lines[key] = knots
        curves = {
            key: Curve(knots, [noise.get(key, {}).get(n) for n, _ in sorted(knots)])
            for key, knots in points.items()
        }

        def formula(op: str, algorithm: str, nbytes: int, size: int, shape: str) -> float:
            for key in (CurveKey(op, algorithm, size, shape), CurveKey(op, algorithm, size)):
                if key in lines:
                    return _on_line(lines[key], nbytes)
            sizes = {k.group_size for k in lines if k.algorithm == algorithm and not k.shape}
            near = CurveKey(op, algorithm, _nearest(sizes, size)) if sizes else None
            return _on_line(lines[near], nbytes) if near else 0.0

        return cls(curves, formula, frozenset(k.group_size for k in lines if not k.shape))

    def exact(self, op: str, algorithm: str, size: int, shape: str) -> Curve | None:
        """The curve of this very group."""
        return self.curves.get(CurveKey(op, algorithm, size, shape))

    def reading(
        self, op: str, algorithm: str, nbytes: int, size: int, shape: str
    ) -> Reading | None:
        """What measurements of the algorithm say; None where there are none of it.

        The nearest group lends its curve: by number of ranks, then by what formulas say of how
        differently it is joined.
        """
        own = self.exact(op, algorithm, size, shape)
        if own is not None:
            return own.read(nbytes)
        lenders = [
            k for k in self.curves if k.op == op and k.algorithm == algorithm and k.group_size > 1
        ]
        if not lenders:
            return None
        near = _nearest({k.group_size for k in lenders}, size)
        ratios = {k: self._ratio(k, nbytes, size, shape) for k in lenders if k.group_size == near}
        lender = min(ratios, key=lambda k: (abs(math.log(ratios[k])), k.shape))
        time, low, high, _ = self.curves[lender].read(nbytes)
        grown = ratios[lender]
        wide = math.exp(_SCALED_SPREAD * (1 + abs(math.log2(near / size))))
        guess = time * grown if algorithm in ALGORITHMS.get(op, ()) else time
        return guess, low * min(1.0, grown) / wide, high * max(1.0, grown) * wide, "scaled"

    def doubt(self, size: int) -> float:
        """How much wider a formula's interval is, in logarithms, for lack of its own line."""
        if not self.priced or size in self.priced:
            return 0.0
        return abs(math.log(size / _nearest(self.priced, size)))

    def _ratio(self, lender: CurveKey, nbytes: int, size: int, shape: str) -> float:
        """By what factor formulas expect this group to differ from the lender."""
        op, algorithm = lender.op, lender.algorithm
        if algorithm not in ALGORITHMS.get(op, ()):
            algorithm = "direct"  # of an algorithm without a formula it is but a bound
        here = self.formula(op, algorithm, nbytes, size, shape)
        there = self.formula(op, algorithm, nbytes, lender.group_size, lender.shape)
        return here / there if here > 0 and there > 0 else 1.0


def pick(
    known: Knowledge, names: Sequence[str], op: str, nbytes: int, size: int, shape: str
) -> tuple[str, Reading]:
    """The fastest of some algorithms; ties go to the first name.

    Formulas of those never measured are first scaled to what was measured of the others.
    """
    readings: dict[str, Reading] = {}
    lines: dict[str, float] = {}
    for name in names:
        found = known.reading(op, name, nbytes, size, shape)
        if found is not None:
            readings[name] = found
        line = known.formula(op, name, nbytes, size, shape)
        if line > 0:
            lines[name] = line
    ratios = [readings[a][0] / lines[a] for a in readings if a in lines]
    if ratios or not readings:  # else what was measured has no formula to compare others by
        ratio = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0
        spread = (_SCALED_SPREAD if ratios else _PRIOR_SPREAD) + known.doubt(size)
        for name, line in lines.items():
            scaled = _wide(line * ratio, spread)
            readings.setdefault(name, (*scaled, "scaled" if ratios else "prior"))
    best = min(readings, key=lambda a: (readings[a][0], a))
    return best, readings[best]


def prior(time_us: float) -> Reading:
    """The reading of a formula alone."""
    return (*_wide(time_us, _PRIOR_SPREAD), "prior")


def estimate(op: str, nbytes: int, size: int, reading: Reading) -> Estimate:
    """A reading as callers get it."""
    time, low, high, basis = reading
    busbw = None
    if nbytes > 0 and time > 0:
        busbw = nbytes / (time / 1e6) * busbw_factor(op, size)
    return Estimate(time, low, high, busbw, basis)


def table_names(table: CostTable, op: str) -> list[str]:
    """Algorithms that a table knows of an operation.

    Raises:
        ConfigError: It knows none; the message lists its operations.

    """
    found = {(k[0].partition(MARK_SHAPE)[0].rpartition(":")[2], k[1]) for k in table.curves}
    names = sorted(a for o, a in found if o == op)
    if not names:
        ops = ", ".join(sorted({o for o, _ in found})) or "nothing"
        raise ConfigError(f"the cost table has no {op!r}; it has {ops}")
    return names


def _wide(time: float, spread: float) -> tuple[float, float, float]:
    return time, time * math.exp(-spread), time * math.exp(spread)


def _nearest(sizes: Iterable[int], size: int) -> int:
    return min(sizes, key=lambda n: (abs(math.log(n / size)), n))


def _on_line(points: Sequence[tuple[int, float]], nbytes: int) -> float:
    (x0, t0), (x1, t1) = points[0], points[-1]
    return t0 + (t1 - t0) / (x1 - x0) * (nbytes - x0) if x1 != x0 else t0
