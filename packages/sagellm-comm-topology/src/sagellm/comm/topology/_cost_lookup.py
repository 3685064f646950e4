"""Estimates out of curves and formulas, for the live model and for a frozen table alike.

A curve speaks for its own group alone. Of another number of ranks, or of ranks joined in another
way, it gives bounds: between the time as it was measured and the time as formulas say it changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sagellm.core.protocols import Basis, ConfigError, CostTable, Estimate
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
    "on_line",
    "pick",
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
                    return on_line(lines[key], nbytes)
            sizes = {k.group_size for k in lines if k.algorithm == algorithm and not k.shape}
            near = CurveKey(op, algorithm, _nearest(sizes, size)) if sizes else None
            return on_line(lines[near], nbytes) if near else 0.0

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
        lenders = [k for k in self.curves if k.op == op and k.algorithm == algorithm]
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

    def readings(
        self, names: Sequence[str], op: str, nbytes: int, size: int, shape: str
    ) -> dict[str, Reading]:
        """What is known of algorithms, each of which has a measurement or a formula.

        Formulas of those never measured are scaled to what was measured of the others; where none
        of these has a formula they are `prior`.
        """
        found: dict[str, Reading] = {}
        lines: dict[str, float] = {}
        for name in names:
            measured = self.reading(op, name, nbytes, size, shape)
            if measured is not None:
                found[name] = measured
            line = self.formula(op, name, nbytes, size, shape)
            if line > 0:
                lines[name] = line
        ratios = [math.log(found[a][0] / lines[a]) for a in names if a in found and a in lines]
        basis: Basis = "scaled" if ratios else "prior"
        ratio = math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
        spread = (_SCALED_SPREAD if ratios else _PRIOR_SPREAD) + self._doubt(size)
        for name in lines.keys() - found.keys():
            time = lines[name] * ratio
            found[name] = (time, time * math.exp(-spread), time * math.exp(spread), basis)
        return found

    def _doubt(self, size: int) -> float:
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

    Mere formulas take part only where nothing was measured that they could be compared with.
    """
    readings = known.readings(names, op, nbytes, size, shape)
    compared = {a: r for a, r in readings.items() if r[3] != "prior"} or readings
    best = min(compared, key=lambda a: (compared[a][0], a))
    return best, compared[best]


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


def _nearest(sizes: Iterable[int], size: int) -> int:
    return min(sizes, key=lambda n: (abs(math.log(n / size)), n))


def on_line(points: Sequence[tuple[int, float]], nbytes: int) -> float:
    """Time by a formula, of which two payloads are enough."""
    (x0, t0), (x1, t1) = points[0], points[-1]
    return t0 + (t1 - t0) / (x1 - x0) * (nbytes - x0) if x1 != x0 else t0
