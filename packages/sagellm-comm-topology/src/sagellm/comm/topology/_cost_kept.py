"""What was measured, bounded: the latest repeats of each size, curve by curve. Not thread-safe.

Every change is made on copies and then put in place, so that a change that fails changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from ._cost_curve import Curve
from ._cost_rows import CurveKey, Sample

__all__ = ["MOST_CURVES", "MOST_REPEATS", "MOST_SIZES", "Kept", "Repeats"]

MOST_CURVES = 512
MOST_SIZES = 128
MOST_REPEATS = 32

Repeats = Mapping[int, Sequence[float]]
"""Payload to microseconds, in the order they were measured."""


class Kept:
    """Repeats and the curves through them.

    Attributes:
        curves: Replaced whole at each change, so that a reader may go on with the one it holds.
        members: One group of each shape that was seen, by whose links a formula prices the shape.

    """

    def __init__(self) -> None:
        self.curves: Mapping[CurveKey, Curve] = {}
        self.members: Mapping[str, tuple[str, ...]] = {}
        self._repeats: dict[CurveKey, Repeats] = {}

    def add(self, samples: Iterable[Sample]) -> None:
        """Take measurements in, the latest last."""
        changed: dict[CurveKey, dict[int, list[float]]] = {}
        members: dict[str, tuple[str, ...]] = {}
        for sample in samples:
            if sample.key not in changed:
                old = self._repeats.get(sample.key, {})
                changed[sample.key] = {n: list(times) for n, times in old.items()}
            changed[sample.key].setdefault(sample.nbytes, []).append(sample.time_us)
            if sample.key.shape:
                members[sample.key.shape] = sample.members
        self._put({key: _bounded(knots) for key, knots in changed.items()}, members)

    def merge(
        self, found: Mapping[CurveKey, Repeats], members: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Take in what is not here yet, as older than what is; doing it again changes nothing."""
        changed: dict[CurveKey, Repeats] = {}
        for key, theirs in found.items():
            ours = self._repeats.get(key, {})
            knots = {n: _older_first(theirs.get(n, ()), times) for n, times in ours.items()}
            for n in sorted(theirs.keys() - ours.keys())[: MOST_SIZES - len(ours)]:
                knots[n] = list(theirs[n])[-MOST_REPEATS:]
            changed[key] = knots
        self._put(changed, {s: m for s, m in members.items() if s not in self.members})

    def drop(self, unwanted: Callable[[CurveKey], bool]) -> None:
        """Forget curves."""
        self._repeats = {k: v for k, v in self._repeats.items() if not unwanted(k)}
        self._settle(dict(self.curves), dict(self.members))

    def items(self) -> list[tuple[CurveKey, Repeats]]:
        """Everything, the curve that was touched last at the end."""
        return list(self._repeats.items())

    def _put(
        self, changed: Mapping[CurveKey, Repeats], members: Mapping[str, tuple[str, ...]]
    ) -> None:
        fresh = {key: Curve.of_repeats(knots) for key, knots in changed.items()}
        rest = {k: v for k, v in self._repeats.items() if k not in changed}
        every = [*rest.items(), *changed.items()]
        self._repeats = dict(every[-MOST_CURVES:])
        self._settle({**self.curves, **fresh}, {**self.members, **members})

    def _settle(self, curves: dict[CurveKey, Curve], members: dict[str, tuple[str, ...]]) -> None:
        shapes = {key.shape for key in self._repeats}
        self.curves = {key: curves[key] for key in self._repeats}
        self.members = {shape: names for shape, names in members.items() if shape in shapes}


def _older_first(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    missing = list(theirs)
    for time in ours:
        if time in missing:
            missing.remove(time)
    return [*missing, *ours][-MOST_REPEATS:]


def _bounded(knots: dict[int, list[float]]) -> Repeats:
    """The latest repeats; of too many sizes those go that lie closest between two others."""
    sizes = sorted(knots)
    while len(sizes) > MOST_SIZES:
        gaps = [math.log(b / a) for a, b in zip(sizes, sizes[2:], strict=False)]
        del sizes[1 + gaps.index(min(gaps))]
    return {n: knots[n][-MOST_REPEATS:] for n in sizes}
