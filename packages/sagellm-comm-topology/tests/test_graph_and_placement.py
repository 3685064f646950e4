"""Paths, nearest devices, islands, rings and rank placement."""

import random
import time
import tracemalloc
from itertools import pairwise

import pytest

from sagellm.comm.topology import TopologyGraph, TopologyManager
from sagellm.comm.topology.cluster import ClusterShape, make_cluster
from sagellm.comm.topology.placement import rank_map, ring, trees
from sagellm.core.protocols import (
    ConfigError,
    DetectorSpec,
    Device,
    Link,
    TopologyFragment,
    TopologyInfo,
    TopologyManagerProtocol,
)


def graph(links, count, node=lambda i: 0, switches=()):
    devices = [Device(f"g{i}", "gpu", index=i, visible_index=i, node=node(i)) for i in range(count)]
    devices += [Device(s, "pci_switch") for s in switches]
    return TopologyGraph(TopologyInfo(devices=tuple(devices), links=tuple(links)))


def lanes(*pairs, kind="nvlink", bandwidth=25e9):
    return [Link(f"g{a}", f"g{b}", kind, n, n * bandwidth) for a, b, n in pairs]


def test_manager_is_the_protocol():
    assert issubclass(TopologyManager, TopologyManagerProtocol)
    assert TopologyManager.__abstractmethods__ == frozenset()


def test_switched_gpus_reach_each_other_at_full_width(hgx, hgx_gpus):
    path = hgx.path(hgx_gpus[0], hgx_gpus[7])

    assert (path.kind, path.hops, path.devices[1]) == ("LINK", 2, "nvlink-switch")
    assert path.bottleneck_bytes_per_s == pytest.approx(18 * 26_562e6)


def test_nearest_nic_is_behind_the_same_switch(hgx, hgx_gpus):
    names = [hgx.nearest(g, "nic").attrs["ib"] for g in hgx_gpus]

    assert names == ["mlx5_0", "mlx5_0", "mlx5_2", "mlx5_2", "mlx5_4", "mlx5_4", "mlx5_6", "mlx5_6"]
    assert hgx.nearest(hgx_gpus[0], "cxl_mem") is None
    assert hgx.nearest(hgx_gpus[0], "numa").id == "numa:0"


def test_nearest_prefers_a_port_that_is_up(machine, look):
    machine.pci("0000:01:00.0", "pci0000:00", 0x030200, vendor=0x10DE)
    for i, state in ((2, "down"), (3, "up")):
        machine.pci(f"0000:0{i}:00.0", "pci0000:00", 0x020000)
        machine.net(f"eth{i}", f"0000:0{i}:00.0", state=state)

    assert look(machine).nearest("0000:01:00.0", "nic").attrs["netdev"] == "eth3"


def test_islands_are_what_links_of_a_kind_connect():
    found = graph(lanes((0, 1, 4), (2, 3, 4), (3, 4, 1)), 6).components("nvlink")

    assert found == (("g0", "g1"), ("g2", "g3", "g4"))
    assert graph([], 3).components("nvlink") == ()


def test_unknown_id_names_the_nearest(hgx):
    with pytest.raises(ConfigError, match=r"0000:13:00\.0"):
        hgx.path("0000:13:00.1", "numa:0")


def test_local_rank_that_is_not_there_lists_what_is(hgx):
    with pytest.raises(
        ConfigError, match=r"no accelerator 8 is visible; visible: 0: 0000:13:00\.0"
    ):
        hgx.device(8)


def test_no_path_leads_through_an_accelerator():
    g = graph(lanes((0, 1, 4), (1, 2, 4)), 3)

    assert g.path("g0", "g2").kind is None


def test_best_class_wins_over_width_and_widest_asks_for_width():
    wide = [Link("g0", "s", "pcie", 1, 60e9), Link("s", "g1", "pcie", 1, 60e9)]
    g = graph([*lanes((0, 1, 1)), *wide], 2, switches=("s",))

    assert g.path("g0", "g1").kind == "LINK"
    assert g.widest("g0", "g1").devices == ("g0", "s", "g1")
    assert g.widest("g0", "g1").bottleneck_bytes_per_s == 60e9


def test_one_unknown_bandwidth_makes_the_bottleneck_unknown():
    links = [Link("g0", "s", "pcie", 1, 60e9), Link("s", "g1", "pcie", 1, None)]

    assert graph(links, 2, switches=("s",)).path("g0", "g1").bottleneck_bytes_per_s is None


def test_cyclic_and_disconnected_graphs_end():
    rng = random.Random(3)
    ids = [f"s{i}" for i in range(40)]
    links = [Link(rng.choice(ids), rng.choice(ids), "pcie", 1, 1e9) for _ in range(200)]
    devices = tuple(Device(i, "pci_switch") for i in [*ids, "alone"])
    g = TopologyGraph(TopologyInfo(devices=devices, links=tuple(x for x in links if x.a != x.b)))

    for a in ids[:8]:
        for b in ids:
            path = g.path(a, b)
            assert path.kind is None or path.devices[0] == a
            assert path.kind is None or path.devices[-1] == b
    assert g.path("s0", "alone").kind is None


def test_ring_follows_the_links_of_a_ring_whatever_the_order_given():
    order = [3, 0, 5, 2, 7, 4, 1, 6]  # the cycle that is wired, in scrambled names
    pairs = [(order[i], order[(i + 1) % 8], 4) for i in range(8)]
    g = graph(lanes(*pairs), 8)

    found = ring(g, [f"g{i}" for i in range(8)])

    wired = {frozenset((f"g{a}", f"g{b}")) for a, b, _ in pairs}
    assert found[0] == "g0"
    assert all(frozenset((found[i], found[(i + 1) % 8])) in wired for i in range(8))


def test_ring_takes_the_wider_lanes():
    # A square of double lanes with single lanes across.
    pairs = [(0, 2, 2), (2, 1, 2), (1, 3, 2), (3, 0, 2), (0, 1, 1), (2, 3, 1)]
    g = graph(lanes(*pairs), 4)

    assert ring(g, ["g0", "g1", "g2", "g3"]) in (
        ("g0", "g2", "g1", "g3"),
        ("g0", "g3", "g1", "g2"),
    )


@pytest.mark.parametrize("size", [0, 1, 2, 3, 9, 80])
def test_ring_holds_every_member_once(size):
    g = graph([], size)
    members = [f"g{i}" for i in range(size)]

    assert sorted(ring(g, members)) == sorted(members)


def test_ring_refuses_strangers_and_twins():
    with pytest.raises(ConfigError, match="twice"):
        ring(graph([], 2), ["g0", "g0"])
    with pytest.raises(ConfigError, match="g7"):
        ring(graph([], 2), ["g0", "g7"])


def test_tensor_parallel_pairs_sit_on_the_bridged_cards():
    g = graph(lanes((0, 2, 4), (1, 3, 4)), 4)

    assert rank_map(g, 2, 1, 2, 1) == ("g0", "g2", "g1", "g3")


def test_greedy_choice_does_not_spoil_the_last_group():
    g = graph(lanes((0, 1, 1), (1, 2, 4), (3, 4, 4), (0, 5, 1)), 6)

    found = rank_map(g, 2, 3, 1, 1)

    pairs = {frozenset(found[i : i + 2]) for i in range(0, 6, 2)}
    assert pairs == {frozenset(p) for p in (("g1", "g2"), ("g3", "g4"), ("g0", "g5"))}


def test_groups_stay_within_hosts_where_they_can(hgx):
    devices = tuple(
        Device(f"n{n}/g{i}", "gpu", node=n, index=i) for n in range(2) for i in range(6)
    )
    g = TopologyGraph(TopologyInfo(devices=devices, num_nodes=2))

    found = rank_map(g, 4, 1, 3, 1)

    nodes = [{name[:2] for name in found[i : i + 4]} for i in range(0, 12, 4)]
    assert nodes == [{"n0"}, {"n1"}, {"n0", "n1"}]


def test_rank_map_covers_fewer_ranks_than_devices(hgx, hgx_gpus):
    assert hgx.rank_map(2, pp=2) == hgx_gpus[:4]
    assert set(hgx.rank_map(2, pp=2, dp=2)) == set(hgx_gpus)


@pytest.mark.parametrize(
    ("degrees", "words"), [((16,), "16 ranks, but only 8"), ((0,), "tp must be")]
)
def test_rank_map_refuses_the_impossible(hgx, degrees, words):
    with pytest.raises(ConfigError, match=words):
        hgx.rank_map(*degrees)


def test_hidden_devices_are_not_placed(look):
    devices = tuple(Device(f"g{i}", "gpu", vendor="nvidia", index=i) for i in range(4))
    fragment = TopologyFragment("fixed", devices)

    class Fixed:
        def detect(self, ctx):
            return fragment

    manager = TopologyManager(
        environ={"CUDA_VISIBLE_DEVICES": "3,1"},
        detectors=[DetectorSpec("fixed", 50, Fixed)],
    )

    assert set(manager.rank_map(2)) == {"g1", "g3"}
    assert manager.device(0).id == "g3"


def test_ten_thousand_devices_are_a_matter_of_seconds():
    devices, links = [], []
    for host in range(1250):
        name = f"n{host}/"
        devices.append(Device(f"{name}sw", "fabric_switch", node=host))
        for i in range(8):
            devices.append(Device(f"{name}g{i}", "gpu", node=host))
            links.append(Link(f"{name}g{i}", f"{name}sw", "nvlink", 18, 450e9))
    g = TopologyGraph(TopologyInfo(devices=tuple(devices), links=tuple(links), num_nodes=1250))

    assert g.path("n7/g0", "n7/g5").kind == "LINK"
    assert g.path("n7/g0", "n8/g0").kind is None


def test_ten_thousand_devices_are_built_and_asked_in_bounded_time_and_memory():
    info = make_cluster(ClusterShape(nodes=345))
    ids = [d.id for d in info.devices]
    rng = random.Random(5)
    started = time.process_time()

    tracemalloc.start()
    g = TopologyGraph(info)
    for _ in range(2000):
        assert g.path(rng.choice(ids), rng.choice(ids)) is not None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(ids) > 10_000
    assert peak < 500e6
    assert time.process_time() - started < 20  # tracing costs most of it


def test_one_switch_with_ten_thousand_ports_is_searched_at_once():
    devices = (*(Device(f"g{i}", "gpu") for i in range(10_000)), Device("s", "fabric_switch"))
    links = tuple(Link(f"g{i}", "s", "nvlink", 1, 1e9) for i in range(10_000))
    g = TopologyGraph(TopologyInfo(devices=devices, links=links))
    started = time.process_time()

    for i in range(0, 9000, 9):
        assert g.path(f"g{i}", f"g{i + 5}").hops == 2

    assert time.process_time() - started < 2


def test_what_is_kept_of_searches_is_bounded(monkeypatch):
    monkeypatch.setattr("sagellm.comm.topology._routes._KEPT_STEPS", 50)
    ids = [f"s{i}" for i in range(30)]
    links = tuple(Link(a, b, "pcie", 1, 1e9) for a, b in pairwise(ids))
    links = (*links[:-1], Link("s28", "s29", "socket", 1, 1e9))
    g = TopologyGraph(
        TopologyInfo(devices=tuple(Device(i, "pci_switch") for i in ids), links=links)
    )

    for a in ids:
        assert g.path(a, "s29").hops == 29 - int(a[1:])

    assert sum(map(len, g._host_routes._searches.values())) < 100


def test_shortest_counts_hops_where_path_minds_class_and_widest_minds_width():
    narrow = [Link("g0", "s", "pcie", 1, 5e9), Link("s", "g1", "pcie", 1, 5e9)]
    round_about = [Link("g0", "f1", "nvlink", 1, 50e9), Link("f1", "f2", "nvlink", 1, 50e9),
                   Link("f2", "g1", "nvlink", 1, 50e9)]  # fmt: skip
    devices = (*(Device(f"g{i}", "gpu") for i in range(2)), Device("s", "pci_switch"),
               *(Device(f"f{i}", "fabric_switch") for i in (1, 2)))  # fmt: skip
    g = TopologyGraph(TopologyInfo(devices=devices, links=(*narrow, *round_about)))

    assert g.shortest("g0", "g1").devices == ("g0", "s", "g1")
    assert g.path("g0", "g1").kind == "LINK"
    assert g.widest("g0", "g1").hops == 3
    assert g.shortest("g0", "g0").kind == g.widest("g1", "g1").kind == "LOC"


def test_equally_short_ways_go_to_the_wider_one():
    thin = [Link("g0", "a", "pcie", 1, 1e9), Link("a", "g1", "pcie", 1, 1e9)]
    thick = [Link("g0", "b", "pcie", 1, 9e9), Link("b", "g1", "pcie", 1, 9e9)]

    g = graph([*thin, *thick], 2, switches=("a", "b"))

    assert g.shortest("g0", "g1").devices[1] == g.path("g0", "g1").devices[1] == "b"


def test_graphs_of_nothing_and_of_one_device_answer():
    assert TopologyGraph(TopologyInfo()).components("nvlink") == ()
    assert graph([], 1).path("g0", "g0").kind == "LOC"
    assert trees(TopologyGraph(TopologyInfo()), []) == ({}, {})
    assert trees(graph([], 1), ["g0"]) == ({"g0": None}, {"g0": None})
    with pytest.raises(ConfigError, match="none"):
        TopologyGraph(TopologyInfo()).path("a", "b")


def test_a_link_from_a_device_to_itself_is_no_way():
    assert graph([Link("g0", "g0", "nvlink")], 1).links_of("g0") == ()


def test_paths_go_over_leaves_and_spines_and_end_at_switches_too():
    g = TopologyGraph(make_cluster(ClusterShape(nodes=4, rack_nodes=2)))

    assert g.path("n0/gpu3", "n1/gpu3").hops == 6
    across = g.path("n0/gpu3", "n2/gpu4")
    assert "net:spine" in across.devices
    assert across.devices[2] == "n0/nic3"
    assert across.devices[-3] == "n2/nic4"
    assert g.path("n0/gpu3", "net:leaf1.3").kind == "NET"


def test_large_rings_keep_hosts_together():
    g = TopologyGraph(make_cluster(ClusterShape(nodes=12)))
    members = [d.id for d in g.info.accelerators]
    random.Random(1).shuffle(members)

    found = ring(g, members)

    assert sorted(found) == sorted(members)
    hosts = [name.split("/")[0] for name in found]
    assert sum(a != b for a, b in pairwise(hosts)) == 11


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 7, 8])
def test_trees_reach_everybody_once_and_share_the_forwarding(hosts):
    g = TopologyGraph(make_cluster(ClusterShape(nodes=hosts, gpus=3, nics=1)))
    members = [d.id for d in g.info.accelerators]

    both = trees(g, members)

    inner = []
    for parents in both:
        assert sorted(parents) == sorted(members)
        assert list(parents.values()).count(None) == 1
        for name in members:
            steps, here = 0, name
            while (above := parents[here]) is not None:
                here, steps = above, steps + 1
                assert steps <= 3 + hosts.bit_length() + 1
        # Hosts that pass data on to other hosts.
        inner.append({p.split("/")[0] for c, p in parents.items()
                      if p and p.split("/")[0] != c.split("/")[0]})  # fmt: skip
    if hosts > 2:
        assert len(inner[0] & inner[1]) <= hosts % 2


def test_ranks_are_placed_among_thousands_of_devices_in_seconds():
    g = TopologyGraph(make_cluster(ClusterShape(nodes=128)))
    started = time.process_time()

    found = rank_map(g, 8, 4, 32, 1)

    assert len(set(found)) == 1024
    assert all(len({d.split("/")[0] for d in found[i : i + 8]}) == 1 for i in range(0, 1024, 8))
    assert time.process_time() - started < 15
