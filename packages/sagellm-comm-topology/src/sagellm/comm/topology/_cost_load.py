"""The prior of a group whose devices are known: what each step puts on the links of the graph.

A step takes as long as its slowest start and its fullest link: the bytes that all its messages put
on a link, over the link's bandwidth. Steps are taken one after the other, so that the sum is a
straight line over the payload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

from ._cost_prior import LinkCost, link_cost
from .graph import TopologyGraph

__all__ = ["MOST_RANKS", "Way", "Ways", "line", "way"]

MOST_RANKS = 64
"""Groups beyond it are priced by formula: the messages of a step grow with their square."""

Way = tuple[LinkCost, list[tuple[tuple[int, str], float]]]
"""A pair's own cost, and the directed links of known bandwidth on its way."""

Ways = Callable[[str, str], Way]

_Pairs = list[tuple[int, int]]
_Step = tuple[int, float, _Pairs, bool]
"""Repeats, share of the payload in each message, who sends to whom, and whether they reduce."""


def line(
    graph: TopologyGraph, ways: Ways, members: Sequence[str], op: str, algorithm: str
) -> tuple[float, float]:
    """Microseconds of an empty payload, and microseconds per byte.

    Args:
        graph: Whose links are loaded.
        ways: `way` in it, which may remember: algorithms and groups ask for the same pairs.
        members: Device of each rank, at least two.
        op: Operation that has a formula.
        algorithm: One of its algorithms.

    """
    hosts: dict[int, list[int]] = {}
    for rank, name in enumerate(members):
        hosts.setdefault(graph.device(name).node, []).append(rank)
    fixed = per_byte = 0.0
    found: dict[tuple[int, int], Way] = {}
    for repeats, share, pairs, reduces in _STEPS[op, algorithm](len(members), list(hosts.values())):
        alpha = slowest = 0.0
        load: dict[tuple[int, str], float] = {}
        incoming: dict[int, float] = {}
        for pair in pairs:
            if pair not in found:
                found[pair] = ways(members[pair[0]], members[pair[1]])
            cost, links = found[pair]
            alpha = max(alpha, cost.alpha_us)
            slowest = max(slowest, share / cost.bytes_per_s)
            for link, bytes_per_s in links:
                load[link] = load.get(link, 0.0) + share / bytes_per_s
            if reduces:
                combined = incoming.get(pair[1], 0.0) + share / cost.reduce_bytes_per_s
                incoming[pair[1]] = combined
        fullest = max(load.values(), default=0.0)
        fixed += repeats * alpha
        busy_s = max(slowest, fullest) + max(incoming.values(), default=0.0)
        per_byte += repeats * busy_s * 1e6
    return fixed, per_byte


def way(graph: TopologyGraph, a: str, b: str) -> Way:
    """How messages go from one device to another."""
    path = graph.path(a, b)
    links = [
        ((id(link), here), link.bandwidth_bytes_per_s)
        for here, link in zip(path.devices, path.links, strict=False)
        if link.bandwidth_bytes_per_s
    ]
    return link_cost(path.kind, path.bottleneck_bytes_per_s), links


def _next(n: int, by: int = 1) -> _Pairs:
    return [(i, (i + by) % n) for i in range(n)]


def _everybody(n: int) -> _Pairs:
    return [(a, b) for a in range(n) for b in range(n) if a != b]


def _powers(n: int) -> tuple[int, list[int]]:
    """The largest power of two in n, and the distances below it."""
    bits = n.bit_length() - 1
    return 1 << bits, [1 << k for k in range(bits)]


def _across(p: int, distance: int) -> _Pairs:
    return [(i, i ^ distance) for i in range(p)]


def _in(n: int, share: float = 1.0, *, reduces: bool = True) -> Iterator[_Step]:
    """Ranks beyond the power of two hand theirs in."""
    p, _ = _powers(n)
    yield 1, share, [(i, i - p) for i in range(p, n)], reduces


def _out(n: int, share: float = 1.0) -> Iterator[_Step]:
    p, _ = _powers(n)
    yield 1, share, [(i - p, i) for i in range(p, n)], False


def _rings(groups: Sequence[Sequence[int]], whole: float, *, reduces: bool) -> Iterator[_Step]:
    longest = max(map(len, groups))
    pairs = [(g[i], g[(i + 1) % len(g)]) for g in groups if len(g) > 1 for i in range(len(g))]
    yield longest - 1, whole / longest, pairs, reduces


def _halve(n: int) -> Iterator[_Step]:
    p, distances = _powers(n)
    for d in reversed(distances):
        yield 1, d / p, _across(p, d), True


def _double(n: int) -> Iterator[_Step]:
    p, distances = _powers(n)
    for d in distances:
        yield 1, d / p, _across(p, d), False


def _binomial(ranks: Sequence[int]) -> list[_Pairs]:
    """Parent to child, from the root down."""
    n, levels = len(ranks), []
    half = 1 << max(0, (n - 1).bit_length() - 1)
    while half:
        levels.append([(ranks[i], ranks[i + half]) for i in range(0, n - half, 2 * half)])
        half //= 2
    return levels


def _tree(ranks: Sequence[int], *, up: bool) -> Iterator[_Step]:
    levels = _binomial(ranks)
    for level in reversed(levels) if up else levels:
        yield 1, 1.0, [(b, a) for a, b in level] if up else level, up


def _pipeline(lines: Sequence[Sequence[int]]) -> Iterator[_Step]:
    longest = max(map(len, lines))
    pairs = [pair for x in lines for pair in pairwise(x)]
    yield 2 * longest - 2, 1 / longest, pairs, False


_Hosts = Sequence[Sequence[int]]


def _both_levels(n: int, hosts: _Hosts) -> Iterator[_Step]:
    parts = min(map(len, hosts))
    if any(len(h) != parts for h in hosts):
        leaders = [[h[0] for h in hosts]]
        hand = [(r, h[0]) for h in hosts for r in h[1:]]
        share = 1 / max(map(len, hosts))
        yield from _rings(hosts, 1.0, reduces=True)
        yield 1, share, hand, False
        yield from _rings(leaders, 1.0, reduces=True)
        yield from _rings(leaders, 1.0, reduces=False)
        yield 1, share, [(b, a) for a, b in hand], False
        yield from _rings(hosts, 1.0, reduces=False)
        return
    columns = [[h[i] for h in hosts] for i in range(parts)]
    yield from _rings(hosts, 1.0, reduces=True)
    yield from _rings(columns, 1 / parts, reduces=True)
    yield from _rings(columns, 1 / parts, reduces=False)
    yield from _rings(hosts, 1.0, reduces=False)


def _chained(*parts: Callable[[int], Iterator[_Step]]) -> Callable[[int, _Hosts], Iterator[_Step]]:
    def steps(n: int, hosts: _Hosts) -> Iterator[_Step]:
        for part in parts:
            yield from part(n)

    return steps


def _doubled_whole(n: int) -> Iterator[_Step]:
    p, distances = _powers(n)
    for d in distances:
        yield 1, 1.0, _across(p, d), True


def _bruck(n: int) -> Iterator[_Step]:
    for k in range((n - 1).bit_length()):
        moved = sum(1 for d in range(n) if d >> k & 1)
        yield 1, moved / n, _next(n, 1 << k), False


_REDUCE_RING = _chained(lambda n: _rings([range(n)], 1.0, reduces=True))
_GATHER_RING = _chained(lambda n: _rings([range(n)], 1.0, reduces=False))
_PARTS = _chained(lambda n: iter([(1, 1 / n, _everybody(n), False)]))
_REDUCED_PARTS = _chained(lambda n: iter([(1, 1 / n, _everybody(n), True)]))

_STEPS: Mapping[tuple[str, str], Callable[[int, _Hosts], Iterator[_Step]]] = {
    ("all_reduce", "ring"): lambda n, h: iter([*_REDUCE_RING(n, h), *_GATHER_RING(n, h)]),
    ("all_reduce", "tree"): lambda n, h: iter(
        [*_tree(range(n), up=True), *_tree(range(n), up=False)]
    ),
    ("all_reduce", "recursive_doubling"): _chained(_in, _doubled_whole, _out),
    ("all_reduce", "halving_doubling"): _chained(_in, _halve, _double, _out),
    ("all_reduce", "direct"): _chained(lambda n: iter([(1, 1.0, _everybody(n), True)])),
    ("all_reduce", "two_shot"): lambda n, h: iter([*_REDUCED_PARTS(n, h), *_PARTS(n, h)]),
    ("all_reduce", "hierarchical"): _both_levels,
    ("all_gather", "ring"): _GATHER_RING,
    ("all_gather", "recursive_doubling"): _chained(
        lambda n: _in(n, 1 / n, reduces=False), _double, lambda n: _out(n, (n - 1) / n)
    ),
    ("all_gather", "direct"): _PARTS,
    ("reduce_scatter", "ring"): _REDUCE_RING,
    ("reduce_scatter", "halving_doubling"): _chained(_in, _halve, lambda n: _out(n, 1 / n)),
    ("reduce_scatter", "direct"): _REDUCED_PARTS,
    ("broadcast", "ring"): _chained(lambda n: _pipeline([range(n)])),
    ("broadcast", "tree"): _chained(lambda n: _tree(range(n), up=False)),
    ("broadcast", "direct"): _chained(lambda n: iter([(1, 1.0, _next_of_root(n), False)])),
    ("broadcast", "hierarchical"): lambda n, h: iter(
        [*_tree([x[0] for x in h], up=False), *_pipeline(h)]
    ),
    ("all_to_all", "direct"): _PARTS,
    ("all_to_all", "pairwise"): _chained(
        lambda n: ((1, 1 / n, _next(n, k), False) for k in range(1, n))
    ),
    ("all_to_all", "ring"): _chained(
        lambda n: ((1, (n - k) / n, _next(n), False) for k in range(1, n))
    ),
    ("all_to_all", "recursive_doubling"): _chained(_bruck),
    ("p2p", "direct"): _chained(lambda n: iter([(1, 1.0, [(0, n - 1)], False)])),
}


def _next_of_root(n: int) -> _Pairs:
    return [(0, i) for i in range(1, n)]
