"""Tensor-parallel groups have the best worst pair that the machine allows."""

import itertools
import random

import pytest

from sagellm.comm.topology import TopologyGraph, _groups
from sagellm.comm.topology._groups import tightest_groups
from sagellm.comm.topology.cluster import ClusterShape, make_cluster
from sagellm.comm.topology.placement import nearest, rank_map
from sagellm.core.protocols import ConfigError, Device, Link, TopologyInfo


def machine(pairs, count, node=lambda i: 0):
    devices = tuple(Device(f"g{i}", "gpu", node=node(i)) for i in range(count))
    links = tuple(Link(f"g{a}", f"g{b}", "nvlink", n, n * 25e9) for a, b, n in pairs)
    return TopologyGraph(TopologyInfo(devices=devices, links=links, num_nodes=2))


def groups_of(items, size, count):
    """Every way to take `count` groups of `size`."""
    if count == 0:
        yield ()
        return
    for first in items:
        later = [i for i in items if i > first]
        for others in itertools.combinations(later, size - 1):
            rest = [i for i in later if i not in others]
            for more in groups_of(rest, size, count - 1):
                yield ((first, *others), *more)


def worst(graph, groups):
    return max(graph.quality(a, b) for g in groups for a, b in itertools.combinations(g, 2))


def split(ids, size):
    return [ids[i : i + size] for i in range(0, len(ids), size)]


@pytest.mark.parametrize("seed", range(60))
def test_no_other_groups_have_a_better_worst_pair(seed):
    rng = random.Random(seed)
    count, size = rng.choice([(4, 2), (5, 2), (6, 2), (6, 3), (7, 3), (8, 2), (8, 4), (9, 3)])
    pairs = [
        (a, b, rng.randint(1, 6))
        for a, b in itertools.combinations(range(count), 2)
        if rng.random() < 0.7
    ]
    g = machine(pairs, count)
    wanted = rng.randint(1, count // size)

    found = rank_map(g, size, 1, wanted, 1)

    every = groups_of([f"g{i}" for i in range(count)], size, wanted)
    assert worst(g, split(found, size)) == min(worst(g, groups) for groups in every)


def test_a_greedy_start_is_given_up_where_it_costs_the_last_pair():
    # The widest pair 1-2 leaves 0 and 3 without a link; 0-1 and 2-3 are good enough for both.
    g = machine([(0, 1, 2), (1, 2, 4), (2, 3, 2)], 4)

    assert rank_map(g, 2, 1, 2, 1) == ("g0", "g1", "g2", "g3")


def test_fewer_groups_than_fit_take_the_host_with_the_better_links():
    wired = [(a, b, 4) for a, b in itertools.combinations(range(4, 8), 2)]
    g = machine([(0, 1, 1), (2, 3, 1), *wired], 8, node=lambda i: i // 4)

    assert rank_map(g, 4, 1, 1, 1) == ("g4", "g5", "g6", "g7")
    assert set(rank_map(g, 4, 1, 2, 1)) == {f"g{i}" for i in range(8)}


@pytest.mark.parametrize("size", [2, 4, 8])
def test_hidden_cliques_of_sixteen_devices_are_found(size):
    rng = random.Random(size)
    order = rng.sample(range(16), 16)
    teams = {frozenset(p) for team in split(order, size) for p in itertools.combinations(team, 2)}
    pairs = [
        (a, b, 3 if frozenset((a, b)) in teams else rng.choice([1, 2, 4]))
        for a, b in itertools.combinations(range(16), 2)
    ]
    g = machine(pairs, 16)

    found = split(rank_map(g, size, 1, 16 // size, 1), size)

    assert worst(g, found) <= (1, -75e9, 1)


def test_a_search_that_takes_too_long_leaves_the_greedy_groups(monkeypatch):
    monkeypatch.setattr(_groups, "_MOST_STEPS", 0)
    g = machine([(0, 1, 2), (1, 2, 4), (2, 3, 2)], 4)

    assert sorted(rank_map(g, 2, 1, 2, 1)) == ["g0", "g1", "g2", "g3"]


def test_swaps_mend_what_greedy_groups_of_many_devices_miss():
    count = 24
    rates = [[(1, -1.0, 1)] * count for _ in range(count)]
    for i in range(0, count, 2):  # a chain of good pairs whose links between are better
        rates[i][i + 1] = rates[i + 1][i] = (0, -2.0, 1)
    for i in range(1, 4, 2):
        rates[i][i + 1] = rates[i + 1][i] = (0, -4.0, 1)

    found = tightest_groups(tuple(map(tuple, rates)), 2, count // 2)

    assert found.worst == (0, -2.0, 1)


@pytest.mark.parametrize("bad", [2.0, True, "2", 0, -1, None])
@pytest.mark.parametrize("name", ["tp", "pp", "dp", "ep"])
def test_degrees_are_whole_numbers(name, bad):
    degrees = {"tp": 1, "pp": 1, "dp": 1, "ep": 1, name: bad}

    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1, not"):
        rank_map(machine([], 4), **degrees)


def test_nearest_port_minds_no_rate_that_is_none():
    devices = [Device("g0", "gpu"), Device("s", "pci_switch")]
    devices += [
        Device(f"nic{i}", "nic", attrs={"port_bytes_per_s": rate})
        for i, rate in enumerate(("2.5e10", "fast", "12500000000", "True"))
    ]
    links = tuple(Link(d.id, "s", "pcie", 1, 1e9) for d in devices if d.id != "s")

    found = nearest(TopologyGraph(TopologyInfo(devices=tuple(devices), links=links)), "g0", "nic")

    assert found.id == "nic2"


@pytest.mark.parametrize("fabric", [450e9, 0.0])
def test_ten_thousand_accelerators_are_placed(fabric):
    shape = ClusterShape(nodes=1250, fabric_bytes_per_s=fabric)
    g = TopologyGraph(make_cluster(shape))

    found = rank_map(g, 4, 1, 2500, 1)

    assert len(set(found)) == 10_000
    assert all(len({d.split("/")[0] for d in group}) == 1 for group in split(found, 4))


def test_one_host_of_ten_thousand_accelerators_is_placed():
    devices = (*(Device(f"g{i}", "gpu") for i in range(10_000)), Device("s", "fabric_switch"))
    links = tuple(Link(f"g{i}", "s", "nvlink", 1, 1e9) for i in range(10_000))
    g = TopologyGraph(TopologyInfo(devices=devices, links=links))

    assert len(set(rank_map(g, 8, 1, 1250, 1))) == 10_000
