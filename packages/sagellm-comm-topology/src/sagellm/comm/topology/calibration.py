"""Which sizes to measure: few, and where the curve bends or switches protocol.

A first handful of sizes spans the range. Then the gap in which straight and bent interpolation
disagree most, or whose ends their neighbours miss most, is halved, until the budget is spent or
every gap is narrow or agreed upon. A jump (a library changing its protocol) is missed by both
neighbours, so that the knots close in on it from both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sagellm.core.protocols import ConfigError

from ._cost_curve import Curve
from ._cost_rows import MOST_US

__all__ = ["Switch", "calibrate", "check_range", "find_switches"]

_FIRST_KNOTS = 4
_LEAST_JUMP = math.log(1.1)
_NARROWEST_OCTAVES = 0.75  # a gap of less is left alone: the switch is pinned down


@dataclass(frozen=True, slots=True)
class Switch:
    """A jump of a curve, as where a library changes its protocol.

    Attributes:
        below: Largest payload measured before it.
        above: Smallest payload measured after it.
        factor: Times after it over what sizes before it make expect.

    """

    below: int
    above: int
    factor: float


def calibrate(
    measure: Callable[[int], Sequence[float]],
    *,
    op: str,
    algorithm: str,
    group_size: int,
    smallest: int = 4 << 10,
    largest: int = 256 << 20,
    knots: int = 12,
    tolerance: float = 0.02,
    multiple: int = 8,
) -> list[Mapping[str, Any]]:  # Any: JSON-like rows
    """Rows for `CostModel.observe`, measured at adaptively chosen sizes, in rising size.

    They name no members: add those where the ranks are devices of the topology.

    With several ranks, every rank calls this and `measure` must give all of them the same times
    (the slowest rank's, say): the next size follows from the times of the last.

    Args:
        measure: Microseconds of some repeats at a payload; at least five are advised.
        op: Operation that `measure` runs.
        algorithm: Algorithm by which it runs.
        group_size: Ranks that take part.
        smallest: First payload in bytes.
        largest: Last payload in bytes.
        knots: Most sizes that are measured, at least 2.
        tolerance: Relative doubt within which a gap is left alone.
        multiple: Sizes are multiples of it.

    Raises:
        ConfigError: The range is empty, fewer than two knots are allowed, or `measure` gave
            nothing, NaN or a time that is not above 0.

    """
    check_range(smallest, largest, knots, multiple)
    times: dict[int, list[float]] = {}

    def take(nbytes: int) -> None:
        times[nbytes] = [float(t) for t in measure(nbytes)]
        if not times[nbytes] or not all(0 < t <= MOST_US for t in times[nbytes]):
            raise ConfigError(f"measuring {nbytes} bytes gave {times[nbytes]}, not times above 0")

    first = min(_FIRST_KNOTS, knots)
    for i in range(first):
        nbytes = _rounded(smallest * (largest / smallest) ** (i / (first - 1)), multiple)
        if nbytes not in times:
            take(nbytes)
    while len(times) < knots:
        found = _doubtful(times, tolerance, multiple)
        if found is None:
            break
        take(found)
    return [
        {"op": op, "algorithm": algorithm, "group_size": group_size, "nbytes": n, "time_us": t}
        for n in sorted(times)
        for t in times[n]
    ]


def check_range(smallest: int, largest: int, knots: int, multiple: int = 1) -> None:
    """Refuse sizes that nothing can be calibrated by.

    Raises:
        ConfigError: As of `calibrate`.

    """
    if not 0 < smallest < largest or knots < 2 or multiple < 1:
        raise ConfigError(
            f"calibration from {smallest} to {largest} bytes by {knots} sizes that are multiples "
            f"of {multiple}: needs 0 < smallest < largest, 2 sizes and a multiple of 1"
        )


def find_switches(rows: Sequence[Mapping[str, Any]]) -> tuple[Switch, ...]:  # Any: as above
    """Jumps of one curve of more than a tenth, in rising size.

    A bend lies on one side of the lines that go on from both its sides; a jump lies above the one
    and below the other.

    Args:
        rows: Of one op, algorithm and group, as `calibrate` gives them.

    """
    times: dict[int, list[float]] = {}
    for row in rows:
        times.setdefault(row["nbytes"], []).append(row["time_us"])
    knots = [(float(n), median(times[n])) for n in sorted(times)]
    found = []
    for before, low, high, after in zip(knots, knots[1:], knots[2:], knots[3:], strict=False):
        onward, backward = _on_line(before, low, high[0]), _on_line(high, after, low[0])
        if onward <= 0 or backward <= 0:
            continue
        risen, fallen = math.log(high[1] / onward), math.log(backward / low[1])
        if risen * fallen > 0 and min(abs(risen), abs(fallen)) > _LEAST_JUMP:
            factor = math.exp((risen + fallen) / 2)
            found.append(Switch(int(low[0]), int(high[0]), factor))
    return tuple(found)


def _on_line(a: tuple[float, float], b: tuple[float, float], x: float) -> float:
    return a[1] + (b[1] - a[1]) / (b[0] - a[0]) * (x - a[0])


def _doubtful(times: Mapping[int, Sequence[float]], tolerance: float, multiple: int) -> int | None:
    """The middle of the gap that is known worst; None when none is worth a measurement."""
    curve = Curve([(n, median(t)) for n, t in times.items()])
    doubts = []
    for (low, _), (high, _) in zip(curve.points, curve.points[1:], strict=False):
        middle = _rounded(math.sqrt(low * high), multiple)
        octaves = math.log2(high / low)
        if octaves < _NARROWEST_OCTAVES or not low < middle < high:
            continue
        doubt = curve.doubt(middle)
        if doubt > tolerance:
            doubts.append((-doubt * octaves, middle))
    return min(doubts)[1] if doubts else None


def _rounded(nbytes: float, multiple: int) -> int:
    return max(multiple, round(nbytes / multiple) * multiple)
