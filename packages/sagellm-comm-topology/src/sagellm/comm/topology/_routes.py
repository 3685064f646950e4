"""Best ways through the vertices that forward: switches, host bridges, NUMA nodes.

Where sockets and host bridges count before hops, which is within a host, a search from each
forwarding vertex is made once and kept: there are few of them. Where all links cost one hop,
which is every fabric and every network, `EvenRoutes` finds ways among thousands of vertices.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

from sagellm.core.protocols import Link

from ._routes_even import EvenRoutes

__all__ = ["Cost", "Edges", "Routes", "best_way", "cost_of"]

Cost = tuple[int, int, int, float]
"""Sockets crossed, host bridges crossed, hops, and the negated narrowest bandwidth."""

Edges = Mapping[str, Sequence[tuple[str, Link]]]
"""Vertex to its neighbours and the links to them."""

_NOTHING: Cost = (0, 0, 0, float("-inf"))
_KEPT_STEPS = 2_000_000  # about 150 MB


def cost_of(link: Link) -> Cost:
    """What one link adds; unknown bandwidth counts as none."""
    return (
        int(link.kind == "socket"),
        int(link.kind == "host_bridge"),
        1,
        -(link.bandwidth_bytes_per_s or 0.0),
    )


def _plus(a: Cost, b: Cost) -> Cost:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], max(a[3], b[3]))


class Routes:
    """Ways over one kind of links. Thread-safe: searches are replaced whole.

    Args:
        edges: The links.
        forwards: Whether a way may lead through a vertex.

    """

    def __init__(self, edges: Edges, forwards: Callable[[str], bool]) -> None:
        self._edges = edges
        self._forwards = forwards
        self._searches: dict[str, dict[str, Link | None]] = {}
        self._kept = 0
        self._parts: dict[str, int] | None = None
        self._even: list[EvenRoutes | None] = []

    def way(self, a: str, b: str) -> tuple[Link, ...] | None:
        """Links from `a` to `b`, best cost first; None where there is no way.

        Ties go to the smallest names, so that equal topologies give equal ways.
        """
        parts = self._parts or self._divide()
        part = parts.get(a)
        if part is None or parts.get(b) != part:
            return None
        even = self._even[part]
        return self._ranked(a, b) if even is None else even.way(a, b)

    def _divide(self) -> dict[str, int]:
        """The connected part of each vertex; ways of those with one cost of links are even."""
        parts: dict[str, int] = {}
        evens: list[EvenRoutes | None] = []
        for start in self._edges:
            if start in parts:
                continue
            parts[start] = len(evens)
            todo, links = [start], {}
            while todo:
                for there, link in self._edges.get(todo.pop(), ()):
                    links[id(link)] = link
                    if there not in parts:
                        parts[there] = len(evens)
                        todo.append(there)
            alike = len({cost_of(link)[:3] for link in links.values()}) == 1
            evens.append(EvenRoutes(links.values(), self._forwards) if alike else None)
        self._even, self._parts = evens, parts
        return parts

    def _ranked(self, a: str, b: str) -> tuple[Link, ...] | None:
        found: list[tuple[Cost, str, str, tuple[Link, ...]]] = [
            (cost_of(link), "", "", (link,)) for there, link in self._edges.get(a, ()) if there == b
        ]
        ends = self._ends(b)
        for u, first in self._ends(a):
            search = self._search(u)
            for v, last in ends:
                if v not in search:
                    continue
                links = (*first, *_walk(search, u, v), *last)
                cost = _NOTHING
                for link in links:
                    cost = _plus(cost, cost_of(link))
                found.append((cost, u, v, links))
        return min(found, key=lambda f: f[:3])[3] if found else None

    def _ends(self, name: str) -> list[tuple[str, tuple[Link, ...]]]:
        """Forwarding vertices by which a way begins or ends, with the link to them."""
        if self._forwards(name):
            return [(name, ())]
        return [(u, (link,)) for u, link in self._edges.get(name, ()) if self._forwards(u)]

    def _search(self, start: str) -> dict[str, Link | None]:
        """The last link of the best way from `start` to each forwarding vertex (Dijkstra)."""
        known = self._searches.get(start)
        if known is not None:
            return known
        costs: dict[str, Cost] = {start: _NOTHING}
        last: dict[str, Link | None] = {start: None}
        todo: list[tuple[Cost, str]] = [(_NOTHING, start)]
        while todo:
            cost, here = heapq.heappop(todo)
            if cost > costs[here]:
                continue
            for there, link in self._edges.get(here, ()):
                if not self._forwards(there):
                    continue
                fresh = _plus(cost, cost_of(link))
                if there not in costs or fresh < costs[there]:
                    costs[there] = fresh
                    last[there] = link
                    heapq.heappush(todo, (fresh, there))
        if self._kept > _KEPT_STEPS:
            self._searches, self._kept = {}, 0
        self._searches[start] = last
        self._kept += len(last)
        return last


def _walk(search: Mapping[str, Link | None], start: str, end: str) -> list[Link]:
    links: list[Link] = []
    here = end
    while here != start:
        link = search[here]
        assert link is not None
        links.append(link)
        here = link.a if link.b == here else link.b
    links.reverse()
    return links


def best_way(
    edges: Sequence[Edges],
    a: str,
    b: str,
    forwards: Callable[[str], bool],
    price: Callable[[Link], tuple[float, float]],
) -> tuple[Link, ...] | None:
    """The way of least price over all `edges` together; None where there is none.

    Args:
        edges: Link tables, joined.
        a: First vertex.
        b: Last vertex.
        forwards: Whether a way may lead through a vertex.
        price: A link's two prices: the greatest of the first ones on the way counts before the
            sum of the second ones, or its hops where the first ones are all equal.

    """
    best: dict[str, tuple[float, float]] = {a: (float("-inf"), 0.0)}
    last: dict[str, Link | None] = {a: None}
    todo: list[tuple[float, float, str]] = [(float("-inf"), 0.0, a)]
    while todo:
        worst, total, here = heapq.heappop(todo)
        if here == b:
            return tuple(_walk(last, a, b))
        if (worst, total) > best[here]:
            continue
        for table in edges:
            for there, link in table.get(here, ()):
                if there != b and not forwards(there):
                    continue
                greatest, added = price(link)
                fresh = (max(worst, greatest), total + added)
                if there not in best or fresh < best[there]:
                    best[there] = fresh
                    last[there] = link
                    heapq.heappush(todo, (*fresh, there))
    return None
