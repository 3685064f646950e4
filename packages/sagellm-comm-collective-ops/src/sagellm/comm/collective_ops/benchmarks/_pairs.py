"""Small differences between two calls: taken in pairs, and judged by what they can be at most.

Medians of two series differ by more than a call's small part costs, and by chance in the hoped-for
direction too. Here the two calls alternate in short stretches, one difference per pair; what
disturbs for longer than a pair falls out, and a sample is the median of many pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sagellm.core.protocols.bench import Case, Ratio, Row

CONFIDENCE = 0.95


def differences(on: Callable[[], float], off: Callable[[], float], pairs: int) -> list[float]:
    """`on` minus `off` of each pair; who comes first alternates."""
    found = []
    for i in range(pairs):
        if i % 2:
            with_it = on()
            found.append(with_it - off())
        else:
            without = off()
            found.append(on() - without)
    return found


@dataclass(frozen=True, slots=True)
class Added:
    """What something adds to a call, by samples of it.

    Attributes:
        low: One end of the interval that holds the median, each end with `CONFIDENCE`.
        high: The other end.

    """

    low: float
    high: float

    @staticmethod
    def of(samples: Sequence[float]) -> Added:
        """By order statistics, so that nothing is assumed of the samples' distribution."""
        ordered, n = sorted(samples), len(samples)
        outside = 0  # samples at each end that the interval can do without
        while sum(math.comb(n, i) for i in range(outside + 2)) <= (1 - CONFIDENCE) * 2**n:
            outside += 1
        return Added(ordered[outside], ordered[n - 1 - outside])

    @property
    def resolved(self) -> bool:
        """Whether it is above 0 at all."""
        return self.low > 0

    @property
    def at_most(self) -> float:
        """What it is judged by: the end of the interval that is further from 0."""
        return max(self.high, -self.low)


def over_added(
    rows: Sequence[Row], case: Case, name: str, budgets: Sequence[tuple[str, float, float | None]]
) -> Iterator[Ratio]:
    """`budget/name` for each (budget's name, seconds, goal), and `resolved/name`."""
    row = next((r for r in rows if r.case == case and r.contender == name), None)
    added = Added.of(row.samples) if row is not None and row.samples else None
    for budget, seconds, goal in budgets:
        value = seconds / max(added.at_most, 1e-12) if added else None
        yield Ratio(f"{budget}/{name}", case, value, goal)
    yield Ratio(f"resolved/{name}", case, float(added.resolved) if added else None)
