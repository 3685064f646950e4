"""Ways among thousands of vertices: as good as a search of everything, with and without table."""

import itertools
import random
from collections import deque

import pytest

from sagellm.comm.topology import TopologyGraph, _routes_even
from sagellm.comm.topology._routes_even import EvenRoutes
from sagellm.core.protocols import Device, Link, TopologyInfo


def torus(side, widths=(25e9,), seed=0):
    """Switches that are linked to their four neighbours."""
    rng = random.Random(seed)
    return [
        Link(f"s{x:02}.{y:02}", f"s{a % side:02}.{b % side:02}", "nvlink", 1, rng.choice(widths))
        for x in range(side)
        for y in range(side)
        for a, b in ((x + 1, y), (x, y + 1))
    ]


def random_links(seed):
    """Switches `s…` in a sparse net and leaves `g…` that hang from some of them, far apart."""
    rng = random.Random(seed)
    switches = [f"s{i:02}" for i in range(rng.randint(2, 30))]
    widths = (1e9, 2e9, 3e9, None)
    links = [
        Link(*rng.sample(switches, 2), "nvlink", 1, rng.choice(widths))
        for _ in range(rng.randint(1, 2 * len(switches)))
    ]
    for i in range(rng.randint(0, 8)):
        for s in rng.sample(switches, min(len(switches), rng.randint(1, 4))):
            links.append(Link(f"g{i}", s, "nvlink", 1, rng.choice(widths)))
    if rng.random() < 0.3:
        links.append(Link("g0", "g1", "nvlink", 1, 1e9))
    return links


def best(links, a, b):
    """Hops and width of the best way, by looking at everything."""
    near = {}
    for link in links:
        near.setdefault(link.a, []).append((link.b, link.bandwidth_bytes_per_s or 0.0))
        near.setdefault(link.b, []).append((link.a, link.bandwidth_bytes_per_s or 0.0))
    level, seen = {a: float("inf")}, {a}
    for hops in itertools.count(1):
        ahead = {}
        for here, width in level.items():
            if here != a and not here.startswith("s"):
                continue
            for there, narrow in near.get(here, ()):
                if there not in seen:
                    ahead[there] = max(ahead.get(there, -1.0), min(width, narrow))
        if b in ahead:
            return hops, ahead[b]
        if not ahead:
            return None
        seen |= ahead.keys()
        level = ahead


def answer(links):
    if links is None:
        return None
    return len(links), min(x.bandwidth_bytes_per_s or 0.0 for x in links)


def connected(links, a, b):
    todo, seen = deque([a]), {a}
    while todo:
        here = todo.popleft()
        for link in links:
            for one, other in ((link.a, link.b), (link.b, link.a)):
                if one == here and other not in seen:
                    seen.add(other)
                    todo.append(other)
    return b in seen


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_ways_are_the_best_there_are_searched_or_looked_up(seed, table, monkeypatch):
    monkeypatch.setattr(_routes_even, "_SEARCHED", -1 if table else 1e9)
    monkeypatch.setattr(_routes_even, "_HUB", 3 if seed % 2 else 48)
    links = random_links(seed)
    names = sorted({end for link in links for end in (link.a, link.b)})
    part = [x for x in links if connected(links, names[0], x.a)]
    routes = EvenRoutes(part, lambda name: name.startswith("s"))
    ends = sorted({end for link in part for end in (link.a, link.b)})
    wired = {frozenset((link.a, link.b)) for link in part}

    for a, b in itertools.permutations(ends, 2):
        way = routes.way(a, b)

        assert answer(way) == best(part, a, b), (a, b)
        if way is not None:
            assert routes.way(b, a) == way[::-1]
            here = a
            for link in way:
                assert here in (link.a, link.b)
                here = link.b if here == link.a else link.a
            assert here == b

    if not all(frozenset(pair) in wired for pair in itertools.combinations(ends, 2)):
        assert (routes._rows is not None) == table


@pytest.mark.parametrize("widths", [(25e9,), (10e9, 25e9, 50e9)])
def test_a_torus_is_searched_first_and_looked_up_once_that_is_worth_it(widths, monkeypatch):
    links = torus(20, widths)
    ids = sorted({x.a for x in links})
    devices = tuple(Device(i, "fabric_switch") for i in ids)
    graph = TopologyGraph(TopologyInfo(devices=devices, links=tuple(links)))
    rng = random.Random(1)
    pairs = [tuple(rng.sample(ids, 2)) for _ in range(400)]

    monkeypatch.setattr(_routes_even, "_PIECE", 300)
    early = {pair: answer(graph.links(*pair)) for pair in pairs[:20]}
    part = graph._fabric_routes._even[0]
    assert part._rows is None
    for pair in pairs:
        graph.links(*pair)
    assert part._rows is not None

    for pair in pairs[:20]:
        assert answer(graph.links(*pair)) == early[pair] == best(links, *pair)


def test_a_part_that_is_too_large_for_a_table_is_searched(monkeypatch):
    monkeypatch.setattr(_routes_even, "TABLE_LIMIT", 99)
    monkeypatch.setattr(_routes_even, "_SEARCHED", 0)
    routes = EvenRoutes(torus(10), lambda name: True)

    for _ in range(3):
        assert len(routes.way("s00.00", "s05.05")) == 10

    assert routes._rows is None


def test_no_question_makes_the_whole_table(monkeypatch):
    monkeypatch.setattr(_routes_even, "_SEARCHED", -1)
    monkeypatch.setattr(_routes_even, "_PIECE", 100)
    routes = EvenRoutes(torus(10), lambda name: True)  # 10 hops and one more that finds nothing

    asked = 0
    while routes._rows is None:
        assert len(routes.way("s00.00", "s05.05")) == 10
        asked += 1

    assert asked == 12
    assert len(routes.way("s00.00", "s05.05")) == 10


def test_order_of_links_changes_no_way():
    links = torus(8, (1e9, 2e9))
    shuffled = links[:]
    random.Random(3).shuffle(shuffled)
    one, other = (EvenRoutes(x, lambda name: True) for x in (links, shuffled))

    for a, b in itertools.permutations(["s00.00", "s03.04", "s07.01", "s05.05"], 2):
        assert one.way(a, b) == other.way(a, b)


def test_sockets_and_host_bridges_still_count_before_hops():
    kinds = {"g": "gpu", "r": "pci_root", "s": "pci_switch"}
    names = ["g0", "g1", "r0", "r1", *(f"s{i}" for i in range(4))]
    devices = tuple(Device(name, kinds[name[0]]) for name in names)
    chain = ["g0", "s0", "s1", "s2", "s3", "g1"]
    links = [Link(a, b, "pcie", 1, 1e9) for a, b in itertools.pairwise(chain)]
    links += [Link("s0", "r0", "pcie"), Link("r0", "r1", "socket"), Link("r1", "s3", "pcie")]

    path = TopologyGraph(TopologyInfo(devices=devices, links=tuple(links))).path("g0", "g1")

    assert path.devices == tuple(chain)
