"""Groups of equally many items whose worst pair is as good as can be.

A collective is as fast as its slowest link, so the worst pair of all groups decides; among
choices that are equal there, the groups are improved one swap at a time. Up to `EXACT_LIMIT`
items the worst pair is the best one possible: for each quality in question it is searched whether
groups of pairs at least as good exist. Beyond that, or where the search takes more than
`_MOST_STEPS`, groups are grown greedily and improved, which may miss the best.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from .graph import Quality

__all__ = ["EXACT_LIMIT", "Grouping", "Rates", "tightest_groups"]

EXACT_LIMIT = 16
"""Items up to which the worst pair is proven."""

_MOST_STEPS = 200_000
_MOST_ROUNDS = 20  # of swaps; each makes some group better and none that is as bad worse
_NO_PAIR: Quality = (-1, float("-inf"), 0)

Rates = tuple[tuple[Quality, ...], ...]
"""Quality of each pair of items, symmetric; smaller is better."""


class Grouping(NamedTuple):
    """Groups of item numbers, each rising, and the quality of the worst pair in them."""

    groups: tuple[tuple[int, ...], ...]
    worst: Quality


def tightest_groups(rates: Rates, size: int, count: int) -> Grouping:
    """`count` groups of `size` items with the best worst pair; other items are left over.

    Args:
        rates: Of at least `size * count` items.
        size: Items of a group.
        count: Groups.

    """
    if size == 1:
        return Grouping(tuple((i,) for i in range(count)), _NO_PAIR)
    found = _grown(rates, size, count)
    if len(rates) <= EXACT_LIMIT:
        better = sorted({q for i, row in enumerate(rates) for q in row[:i]})
        better = better[: bisect_left(better, _worst(rates, found))]
        low, high = 0, len(better)
        while low < high:
            middle = (low + high) // 2
            exact = _Cover(rates, size, better[middle]).find(count)
            if exact is None:
                low = middle + 1
            else:
                found, high = exact, middle
    found = _improved(rates, found)
    return Grouping(tuple(sorted(tuple(sorted(g)) for g in found)), _worst(rates, found))


def _pair_worst(rates: Rates, group: Sequence[int]) -> Quality:
    return max((rates[a][b] for a, b in combinations(group, 2)), default=_NO_PAIR)


def _worst(rates: Rates, groups: Sequence[Sequence[int]]) -> Quality:
    return max((_pair_worst(rates, g) for g in groups), default=_NO_PAIR)


def _grown(rates: Rates, size: int, count: int) -> list[list[int]]:
    """Greedy groups: each the best one that grows from any start, the best partner first."""
    left = list(range(len(rates)))
    groups: list[list[int]] = []
    while len(groups) < count:
        starts = left if len(left) <= EXACT_LIMIT else left[:1]
        _, group = min(_grow(rates, start, left, size) for start in starts)
        groups.append(group)
        left = [i for i in left if i not in group]
    return groups


def _grow(rates: Rates, start: int, left: Sequence[int], size: int) -> tuple[Quality, list[int]]:
    chosen, worst = [start], _NO_PAIR
    reach = {i: rates[start][i] for i in left if i != start}
    while len(chosen) < size:
        best = min(reach, key=lambda i: (reach[i], i))
        worst = max(worst, reach.pop(best))
        chosen.append(best)
        for i in reach:
            reach[i] = max(reach[i], rates[best][i])
    return worst, sorted(chosen)


class _Cover:
    """Groups of pairs that are all at least of a quality, searched for with bit masks."""

    def __init__(self, rates: Rates, size: int, level: Quality) -> None:
        self._near = [
            sum(1 << j for j, q in enumerate(row) if j != i and q <= level)
            for i, row in enumerate(rates)
        ]
        self._size = size
        self._steps = 0
        self._hopeless: set[tuple[int, int]] = set()

    def find(self, count: int) -> list[list[int]] | None:
        """So many groups; None when there are none, or none was found in time."""
        return self._rest((1 << len(self._near)) - 1, count)

    def _rest(self, free: int, count: int) -> list[list[int]] | None:
        if count == 0:
            return []
        if (free, count) in self._hopeless or self._steps > _MOST_STEPS:
            return None
        if free.bit_count() >= self._size * count:
            first = (free & -free).bit_length() - 1
            others = free & ~(1 << first)
            for members in self._cliques(others & self._near[first], self._size - 1):
                self._steps += 1
                rest = self._rest(others & ~members, count - 1)
                if rest is not None:
                    return [[first, *_numbers(members)], *rest]
            rest = self._rest(others, count)
            if rest is not None:
                return rest
        self._hopeless.add((free, count))
        return None

    def _cliques(self, among: int, size: int) -> Iterator[int]:
        if size == 0:
            yield 0
            return
        while among.bit_count() >= size and self._steps <= _MOST_STEPS:
            self._steps += 1
            lowest = among & -among
            among ^= lowest
            near = self._near[lowest.bit_length() - 1]
            for members in self._cliques(among & near, size - 1):
                yield lowest | members


def _numbers(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def _improved(rates: Rates, groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Swap items of two groups, or with what is left over, while the worse of them gets better."""
    found = [list(g) for g in groups]
    used = {i for g in found for i in g}
    spare = [i for i in range(len(rates)) if i not in used]
    for _ in range(_MOST_ROUNDS):
        changed = False
        for a, b in combinations(range(len(found)), 2):
            changed |= _swap(rates, found[a], found[b])
        for group in found:
            changed |= _swap(rates, group, spare, leftover=True)
        if not changed:
            break
    return found


def _swap(rates: Rates, one: list[int], other: list[int], *, leftover: bool = False) -> bool:
    def merit() -> list[Quality]:
        rest = [] if leftover else [_pair_worst(rates, other)]
        return sorted([_pair_worst(rates, one), *rest], reverse=True)

    best, changed = merit(), False
    for i in range(len(one)):
        for j in range(len(other)):
            one[i], other[j] = other[j], one[i]
            now = merit()
            if now < best:
                best, changed = now, True
            else:
                one[i], other[j] = other[j], one[i]
    return changed
