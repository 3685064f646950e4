"""Best ways where every link costs one hop: fewest hops, then the widest, then the first names.

Nobody asks for all pairs of ten thousand switches, so a way is first searched for from both its
ends. Once searches have cost about as much as a table of all distances, the table is made, a piece
with each question: of each distance only its remainder by 3 is kept, one bit in one of three rows
of bits, because a neighbour's distance differs by at most one. From it every way is walked without
searching. Ways themselves are never kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from sagellm.core.protocols import Link

__all__ = ["TABLE_LIMIT", "EvenRoutes"]

TABLE_LIMIT = 16_000
"""Vertices up to which a table is made: 100 MB then (40 MB for 10 000), twice that meanwhile."""

_SEARCHED = 20  # visits per vertex of the whole part that are worth a table
_PIECE = 2_000  # vertices and hops of the table that one question adds: milliseconds
_HUB = 48  # neighbours from which on they are looked at as one row of bits

_Rows = tuple[list[int], list[int], list[int]]
"""Of each vertex, those at a distance of 0, 1 and 2 by modulus 3; itself is in none."""

_Step = Callable[[int, int], Iterable[int]]
"""Vertices one hop nearer to the end, from a vertex after so many hops."""


class EvenRoutes:
    """Ways within one connected part of a graph. Thread-safe.

    Args:
        links: Links of the part; of parallel ones the widest counts.
        forwards: Whether a way may lead through a vertex.

    """

    def __init__(self, links: Iterable[Link], forwards: Callable[[str], bool]) -> None:
        links = tuple(links)
        names = {end for link in links for end in (link.a, link.b)}
        # Those that forward have the lowest numbers, and names decide among equals.
        self._names = sorted(names, key=lambda n: (not forwards(n), n))
        self._numbers = {name: i for i, name in enumerate(self._names)}
        self._inner = sum(map(forwards, names))
        self._links: list[dict[int, Link]] = [{} for _ in self._names]
        for link in links:
            a, b = self._numbers[link.a], self._numbers[link.b]
            known = self._links[a].get(b)
            if known is None or _width(link) > _width(known):
                self._links[a][b] = self._links[b][a] = link
        self._near = [tuple(sorted(w for w in x if w < self._inner)) for x in self._links]
        self._one_width = len({_width(link) for link in links}) == 1
        self._widths: list[dict[int, float]] = []
        if not self._one_width:
            self._widths = [{w: _width(link) for w, link in x.items()} for x in self._links]
        self._searched = 0
        self._making: Iterator[None] | None = None
        self._turn = threading.Lock()  # to make a piece of the table
        self._rows: _Rows | None = None
        self._hubs: dict[int, int] = {}

    def way(self, a: str, b: str) -> tuple[Link, ...] | None:
        """Links from `a` to `b`, two vertices of the part; None where nothing forwards between."""
        first, last = self._numbers[a], self._numbers[b]
        direct = self._links[first].get(last)
        if direct is not None:
            return (direct,)
        turned = first > last  # so that the way back is the same
        if turned:
            first, last = last, first
        self._perhaps_make_rows()
        steps = self._search(first, last) if self._rows is None else self._walks(first, last)
        if steps is None:
            return None
        stations = (
            self._first(first, last, steps[0])
            if self._one_width
            else self._widest(first, last, steps[0], steps[1])
        )
        if turned:
            stations.reverse()
        return tuple(self._links[u][v] for u, v in pairwise(stations))

    def _first(self, first: int, last: int, step: _Step) -> list[int]:
        stations, here = [first], first
        while here != last:
            here = min(step(here, len(stations) - 1))
            stations.append(here)
        return stations

    def _widest(self, first: int, last: int, ahead: _Step, back: _Step) -> list[int]:
        """Of the shortest ways one with the widest bottleneck.

        What links of a width reach is explored from both ends in turn. Where one end comes to
        its end, no way is that wide, and narrower links are let in.
        """
        out, into = _End(first, ahead), _End(last, back)
        bound, mine, other = float("inf"), out, into
        while True:
            if not mine.open:
                bound = max(mine.narrower)
                for end in (out, into):
                    for width in [w for w in end.narrower if w >= bound]:
                        end.open += end.narrower.pop(width)
            here, hops, came_from = mine.open.pop()
            if here in mine.before:
                continue
            mine.before[here] = came_from
            if here in other.before:
                return [*out.line(here)[::-1], *into.line(here)[1:]]
            widths = self._widths[here]
            for there in sorted(mine.step(here, hops), reverse=True):
                if there not in mine.before:
                    width = widths[there]
                    reached = mine.open if width >= bound else mine.narrower.setdefault(width, [])
                    reached.append((there, hops + 1, here))
            mine, other = other, mine

    def _search(self, first: int, last: int) -> tuple[_Step, _Step] | None:
        """Search from both ends; what is nearer to the last, and to the first, on ways found."""
        near = self._near
        out, back = ([{v}, set(near[v])] if v >= self._inner else [{v}] for v in (first, last))
        while out[-1].isdisjoint(back[-1]):
            side = out if len(out[-1]) <= len(back[-1]) else back
            fresh = set().union(*[near[v] for v in side[-1]])
            fresh -= side[-1]
            if len(side) > 1:
                fresh -= side[-2]
            if not fresh:
                return None
            self._searched += len(fresh)
            side.append(fresh)
        # Of what was met on the way out, only what leads to where both met.
        out[-1] &= back[-1]
        for k in range(len(out) - 2, 0, -1):
            out[k] &= set().union(*[near[v] for v in out[k + 1]])
        levels = [*out, *back[-2::-1]]

        def ahead(here: int, hops: int) -> Iterable[int]:
            found = levels[hops + 1]
            return found if hops + 2 == len(levels) else found.intersection(near[here])

        def behind(here: int, hops: int) -> Iterable[int]:
            found = levels[-hops - 2]
            return found if hops + 2 == len(levels) else found.intersection(near[here])

        return ahead, behind

    def _walks(self, first: int, last: int) -> tuple[_Step, _Step] | None:
        ahead, behind = self._walk(first, last), self._walk(last, first)
        return None if ahead is None or behind is None else (ahead, behind)

    def _walk(self, first: int, last: int) -> _Step | None:
        """Nearer vertices by the table."""
        assert self._rows is not None
        size = len(self._names) // 8 + 1
        whole = [rows[last] for rows in self._rows]
        bits = [row.to_bytes(size, "little") for row in whole]
        at, mask = first >> 3, 1 << (first & 7)
        far = next((m for m in range(3) if bits[m][at] & mask), None)
        if far is None:
            return None

        def step(here: int, hops: int) -> Sequence[int]:
            if last in self._links[here]:
                return (last,)
            m = (far - hops - 1) % 3
            if here in self._hubs:
                return _numbers_in(self._hubs[here] & whole[m])
            row = bits[m]
            return [w for w in self._near[here] if row[w >> 3] & 1 << (w & 7)]

        if first < self._inner:
            return step
        # Neighbours of what does not forward may differ by more than one hop, and look alike by 3.
        starts = step(first, 0)
        if len(starts) < 2:
            return step
        lengths = {}
        for start in starts:
            here, hops = start, 1
            while here != last:
                here, hops = step(here, hops)[0], hops + 1
            lengths[start] = hops
        nearest = [w for w in starts if lengths[w] == min(lengths.values())]
        return lambda here, hops: step(here, hops) if hops else nearest

    def _perhaps_make_rows(self) -> None:
        """Make a piece of the table if it is worth it; until it is whole everybody searches."""
        count = len(self._names)
        if self._rows is not None or not self._searched > _SEARCHED * count:
            return
        if count <= TABLE_LIMIT and self._turn.acquire(blocking=False):
            try:
                self._making = self._making or self._make_rows()
                next(self._making, None)
            finally:
                self._turn.release()

    def _make_rows(self) -> Iterator[None]:
        """Distances of all pairs by 3: hop by hop, for all vertices at once in rows of bits.

        It stops after every piece of the work, so that nobody waits for the whole of it.
        """
        count = len(self._names)
        rows: _Rows = ([0] * count, [0] * count, [0] * count)
        before, now = [0] * count, [1 << v for v in range(count)]
        ends = [sum(1 << w for w in x if w >= self._inner) for x in self._links]
        hops, done, going = 0, 0, True
        while going:
            hops += 1
            kept, ahead, going = rows[hops % 3], [], False
            for v, near in enumerate(self._near):
                done += 1
                if done % _PIECE == 0:
                    yield
                fresh = ends[v] if hops == 1 else 0
                for w in near:
                    fresh |= now[w]
                met = now[v] | before[v]
                if v >= self._inner:  # its neighbours may be any number of hops apart
                    met |= rows[0][v] | rows[1][v] | rows[2][v]
                fresh ^= fresh & met
                ahead.append(fresh)
                if fresh:
                    kept[v] |= fresh
                    going = True
            before, now = now, ahead
        self._hubs = {
            v: sum(1 << w for w in near) for v, near in enumerate(self._near) if len(near) > _HUB
        }
        self._rows = rows


class _End:
    """One end of a way that is searched for: what was reached from it, and over which links."""

    __slots__ = ("before", "narrower", "open", "step")

    def __init__(self, start: int, step: _Step) -> None:
        self.step = step
        self.before: dict[int, int] = {}
        self.open = [(start, 0, start)]  # vertex, hops, vertex before
        self.narrower: dict[float, list[tuple[int, int, int]]] = {}

    def line(self, here: int) -> list[int]:
        """Vertices from here to where the search began."""
        found = [here]
        while self.before[found[-1]] != found[-1]:
            found.append(self.before[found[-1]])
        return found


def _width(link: Link) -> float:
    """Unknown bandwidth counts as none."""
    return link.bandwidth_bytes_per_s or 0.0


def _numbers_in(row: int) -> Sequence[int]:
    found = []
    while row:
        lowest = row & -row
        found.append(lowest.bit_length() - 1)
        row ^= lowest
    return found
