"""Flows that share links, ranks that wait for each other, and plans of clusters."""

import json
import math
import random
import time
from dataclasses import replace

import pytest

from sagellm.comm.topology.__main__ import main
from sagellm.comm.topology._sim_schedules import SCHEDULES, schedule
from sagellm.comm.topology.benchmarks.random_topology import random_topology
from sagellm.comm.topology.cluster import ClusterShape, make_cluster
from sagellm.comm.topology.graph import TopologyGraph
from sagellm.comm.topology.planning import node_counts, plan
from sagellm.comm.topology.simulator import (
    Message,
    Network,
    Phase,
    SimSettings,
    fair_rates,
    simulate,
)
from sagellm.core.protocols import ConfigError, Device, Link, ResourceError, TopologyInfo

FREE = SimSettings(message_us=0, hop_us={}, other_hop_us=0, reduce_bytes_per_s=1e30)


def star(*widths, settings=FREE):
    """Ranks on one switch, each by a link of its own width in bytes per microsecond."""
    devices = [Device("s", "fabric_switch")]
    devices += [Device(f"g{i}", "gpu") for i in range(len(widths))]
    links = [Link(f"g{i}", "s", "nvlink", 1, w * 1e6) for i, w in enumerate(widths)]
    graph = TopologyGraph(TopologyInfo(devices=tuple(devices), links=tuple(links)))
    return Network(graph, [f"g{i}" for i in range(len(widths))], settings)


def random_network(seed, settings=None):
    info = random_topology(seed)
    group = [d.id for d in info.accelerators]
    network = Network(TopologyGraph(info), group, settings)
    hosts = {}
    for rank in range(len(group)):
        hosts.setdefault(network.host_of(rank), []).append(rank)
    return network, list(hosts.values())


def test_a_lone_message_takes_latency_and_bytes_over_the_narrowest_link():
    network = star(10, 4, settings=SimSettings(message_us=2, hop_us={}, other_hop_us=0.5))

    played = simulate(network, [Phase((Message(0, 1, 400),))])

    assert played.time_us == pytest.approx(2 + 2 * 0.5 + 400 / 4)


def test_two_flows_share_a_link_and_the_rest_goes_to_the_one_that_is_left():
    # Both leave rank 0: half each, until the shorter one is done.
    played = simulate(star(10, 10, 10), [Phase((Message(0, 1, 100), Message(0, 2, 300)))])

    assert played.time_us == pytest.approx(20 + 200 / 10)


def test_links_carry_both_directions_at_once():
    played = simulate(star(10, 10), [Phase((Message(0, 1, 100), Message(1, 0, 100)))])

    assert played.time_us == pytest.approx(10)


def test_what_one_flow_cannot_use_is_left_to_the_others():
    # Links: 0 is shared by all three; flow 0 is bound to 1 by link 1.
    assert fair_rates([[0, 1], [0], [0]], [9.0, 1.0]) == pytest.approx([1.0, 4.0, 4.0])


@pytest.mark.parametrize("seed", range(20))
def test_rates_are_max_min_fair(seed):
    rng = random.Random(seed)
    capacity = [rng.uniform(1, 10) for _ in range(6)]
    routes = [rng.sample(range(6), rng.randint(1, 4)) for _ in range(9)]

    rates = fair_rates(routes, capacity)

    load = [sum(r for r, route in zip(rates, routes, strict=True) if i in route) for i in range(6)]
    assert all(x <= c * (1 + 1e-9) for x, c in zip(load, capacity, strict=True))
    for rate, route in zip(rates, routes, strict=True):
        # On some full link of its route nobody is faster: it cannot gain but from a slower one.
        assert any(
            load[i] >= capacity[i] * (1 - 1e-9)
            and all(
                other <= rate * (1 + 1e-9)
                for other, way in zip(rates, routes, strict=True)
                if i in way
            )
            for i in route
        )


def test_a_reduction_delays_its_receiver_only():
    slow = SimSettings(message_us=0, hop_us={}, other_hop_us=0, reduce_bytes_per_s=1e6)
    phases = [Phase((Message(0, 1, 100, reduce=True),)), Phase((Message(0, 2, 100),))]

    assert simulate(star(10, 10, 10, settings=slow), phases[:1]).time_us == pytest.approx(110)
    assert simulate(star(10, 10, 10, settings=slow), phases).time_us == pytest.approx(110)


def test_a_rank_goes_on_without_those_it_does_not_talk_to():
    phases = [Phase((Message(0, 1, 1000), Message(2, 3, 10))), Phase((Message(2, 3, 10),))]

    assert simulate(star(10, 10, 10, 10), phases).time_us == pytest.approx(100)


@pytest.mark.parametrize("seed", range(12))
def test_repeats_that_are_skipped_take_as_long_as_those_that_are_played(seed):
    network, hosts = random_network(seed)
    phases = schedule("all_reduce", "ring", 1 << 24, hosts)
    longer = [Phase(p.messages, 5 * p.repeats) for p in phases]
    each = [Phase(p.messages) for p in longer for _ in range(p.repeats)]

    skipping, playing = simulate(network, longer), simulate(network, each)

    assert playing.skipped_repeats == 0
    assert skipping.time_us == pytest.approx(playing.time_us, rel=1e-4)


def test_long_rings_do_skip():
    network, hosts = star(*[10] * 8), [list(range(8))]

    played = simulate(network, [Phase(p.messages, 1000) for p in
                                schedule("all_gather", "ring", 8000, hosts)])  # fmt: skip

    assert played.skipped_repeats > 900
    assert played.time_us == pytest.approx(1000 * 1000 / 10)


def moved(phases):
    """Bytes that each rank sends and receives."""
    sent, received = {}, {}
    for phase in phases:
        for m in phase.messages:
            sent[m.src] = sent.get(m.src, 0) + phase.repeats * m.nbytes
            received[m.dst] = received.get(m.dst, 0) + phase.repeats * m.nbytes
    return sent, received


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize(
    ("op", "algorithm", "least"),
    [
        ("all_reduce", "ring", lambda n: 2 * (n - 1) / n),
        ("all_reduce", "two_shot", lambda n: 2 * (n - 1) / n),
        ("all_gather", "direct", lambda n: (n - 1) / n),
        ("reduce_scatter", "ring", lambda n: (n - 1) / n),
        ("all_to_all", "pairwise", lambda n: (n - 1) / n),
        ("all_to_all", "direct", lambda n: (n - 1) / n),
    ],
)
def test_optimal_schedules_move_what_they_must(size, op, algorithm, least):
    sent, received = moved(schedule(op, algorithm, 1000, [list(range(size))]))

    assert sent == pytest.approx(dict.fromkeys(range(size), 1000 * least(size)))
    assert received == pytest.approx(sent)


@pytest.mark.parametrize("hosts", [[[0, 1, 2], [3]], [[0], [1], [2]], [[0, 1], [2, 3], [4, 5]]])
@pytest.mark.parametrize(("op", "algorithm"), [(o, a) for o, x in SCHEDULES.items() for a in x])
def test_every_schedule_reaches_every_rank(op, algorithm, hosts):
    phases = schedule(op, algorithm, 1000, hosts)
    size = sum(map(len, hosts))

    # What rank 0 holds has spread over messages to everybody that needs it.
    knows = {0}
    for phase in phases:
        for _ in range(phase.repeats):
            knows |= {m.dst for m in phase.messages if m.src in knows}
    wanted = {size - 1} if op == "p2p" else set(range(size))
    assert wanted <= knows
    assert all(m.src != m.dst and m.nbytes > 0 for p in phases for m in p.messages)


def test_nothing_is_played_for_one_rank_and_unknown_names_are_refused():
    assert schedule("all_reduce", "ring", 10, [[0]]) == []
    with pytest.raises(ConfigError, match="known: all_reduce"):
        schedule("all_reduse", "ring", 10, [[0, 1]])
    with pytest.raises(ConfigError, match="known: direct"):
        schedule("p2p", "ring", 10, [[0, 1]])


def test_unjoined_devices_are_an_error_that_names_them():
    info = TopologyInfo(devices=(Device("a", "gpu"), Device("b", "gpu")))

    with pytest.raises(ConfigError, match="a and b"):
        simulate(Network(TopologyGraph(info), ["a", "b"]), [Phase((Message(0, 1, 1),))])


def test_a_bandwidth_that_nobody_stated_is_reported_as_assumed():
    devices = (Device("a", "gpu"), Device("b", "gpu"), Device("s", "pci_switch"))
    links = (Link("a", "s", "pcie"), Link("b", "s", "pcie", 1, 1e9))
    network = Network(TopologyGraph(TopologyInfo(devices=devices, links=links)), ["a", "b"])

    simulate(network, [Phase((Message(0, 1, 1000),))])

    assert network.assumed == {"pcie"}


def test_too_much_to_play_ends_in_words():
    network = star(10, 10, settings=SimSettings(max_events=3))

    with pytest.raises(ResourceError, match="more than 3 events"):
        simulate(network, [Phase((Message(0, 1, k),)) for k in range(1, 10)])


def test_a_plan_prefers_hierarchy_on_rails_and_compares_everything():
    found = plan(make_cluster(ClusterShape(nodes=4)), "all_reduce", 256 << 20)

    assert [r.nodes for r in found.rows] == [n for n in (1, 2, 4) for _ in range(7)]
    assert found.best(4).algorithm == "hierarchical"
    assert all(r.time_us and r.busbw_bytes_per_s for r in found.rows)
    assert found.assumed == ()


def test_thinner_ports_never_help():
    times = [
        plan(make_cluster(ClusterShape(nodes=3, gpus=2, nics=2, nic_bytes_per_s=w)), "all_reduce",
             1 << 24, counts=[3], algorithms=["ring"]).rows[0].time_us
        for w in (50e9, 25e9, 5e9)
    ]  # fmt: skip

    assert times == sorted(times)
    assert times[2] > 3 * times[0]


def test_an_oversubscribed_spine_slows_what_crosses_it():
    times = [
        plan(make_cluster(ClusterShape(nodes=8, rack_nodes=2, oversubscription=s)), "all_to_all",
             1 << 26, counts=[8], algorithms=["pairwise"]).rows[0].time_us
        for s in (1.0, 8.0)
    ]  # fmt: skip

    assert times[1] > 2 * times[0]


def test_a_hundred_hosts_are_planned_in_seconds():
    started = time.process_time()

    found = plan(make_cluster(ClusterShape(nodes=96)), "all_reduce", 1 << 28, counts=[96])

    assert found.best(96).algorithm == "hierarchical"
    assert {r.algorithm for r in found.rows if r.left_out} == {"direct", "two_shot"}
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"op": "all_reduse"}, "known: all_reduce"),
        ({"algorithms": ["rings"]}, "no 'rings'"),
        ({"nbytes": 0}, "at least 1 byte"),
        ({"counts": [3]}, "1 to 2"),
        ({"info": TopologyInfo()}, "no accelerators"),
    ],
)
def test_an_impossible_plan_is_refused_in_words(change, words):
    asked = {"info": make_cluster(ClusterShape(nodes=2)), "op": "all_reduce", "nbytes": 8, **change}

    with pytest.raises(ConfigError, match=words):
        plan(**asked)


@pytest.mark.parametrize(
    "bad", [{"nodes": 0}, {"nics": 9}, {"nic_bytes_per_s": 0}, {"oversubscription": math.nan}]
)
def test_an_impossible_cluster_is_refused(bad):
    with pytest.raises(ConfigError):
        ClusterShape(**bad)


def test_curve_ends_at_the_number_asked_for():
    assert node_counts(1) == (1,)
    assert node_counts(6) == (1, 2, 4, 6)
    assert node_counts(100)[-1] == 100


def test_plan_of_the_command_line_draws_and_speaks_json(capsys):
    words = ["plan", "--nodes", "3", "--gpus", "2", "--bytes", "1M"]

    assert main(words) == 0
    drawn = capsys.readouterr().out
    assert main([*words, "--json", "--algorithms", "ring,tree"]) == 0
    told = json.loads(capsys.readouterr().out)

    assert "hierarchical" in drawn
    assert "└" in drawn
    assert "on 3 hosts, 6 accelerators" in drawn
    assert told["schema"] == "sagellm.topology.plan/1"
    assert [(r["nodes"], r["algorithm"]) for r in told["rows"]] == [
        (n, a) for n in (1, 2, 3) for a in ("ring", "tree")
    ]


def test_a_plan_says_what_its_best_is_the_best_of(capsys):
    words = ["plan", "--nodes", "16", "--bytes", "1M", "--algorithms", "ring,two_shot"]

    assert main(words) == 0
    drawn = " ".join(capsys.readouterr().out.split())
    assert main([*words, "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["best"]

    assert "against best of those simulated" in drawn
    assert "fastest of those simulated:" in drawn
    assert (
        "not simulated, and perhaps faster: two_shot on 16 hosts (16 hosts: 65,536 messages"
        in drawn
    )
    assert [b["nodes"] for b in best] == [1, 2, 4, 8, 16]
    assert best[0]["of_simulated"] == ["ring", "two_shot"]
    assert best[0]["left_out"] == {}
    assert best[-1]["of_simulated"] == ["ring"]
    assert "65,536 messages" in best[-1]["left_out"]["two_shot"]


def test_a_plan_that_leaves_nothing_out_says_best(capsys):
    assert main(["plan", "--nodes", "2", "--bytes", "1M"]) == 0

    assert "of those simulated" not in capsys.readouterr().out


def test_plan_refuses_sizes_and_shapes_that_are_none(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--bytes", "much"])
    assert "write 4096" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--nodes", "0"])
    assert "no number from 1 to 4096" in capsys.readouterr().err


def test_ranks_that_take_no_part_do_not_hold_up_the_skipping():
    network = star(*[10] * 8)

    (phase,) = schedule("all_gather", "ring", 4000, [list(range(4))])
    played = simulate(network, [Phase(phase.messages, 1000)])

    assert played.skipped_repeats > 900
    assert played.time_us == pytest.approx(1000 * 1000 / 10)


def test_the_first_hosts_of_a_large_cluster_are_as_fast_as_a_small_one():
    small, large = (make_cluster(ClusterShape(nodes=n, rack_nodes=4)) for n in (4, 8))

    apart, part = (plan(info, "all_reduce", 1 << 26, counts=[4]).rows for info in (small, large))

    for a, b in zip(apart, part, strict=True):
        assert a.time_us == pytest.approx(b.time_us)


def test_renaming_and_reordering_devices_changes_no_simulated_time():
    info = random_topology(11)
    names = {d.id: f"x{i * 7919 % 1000}" for i, d in enumerate(info.devices)}
    renamed = TopologyInfo(
        devices=tuple(replace(d, id=names[d.id]) for d in reversed(info.devices)),
        links=tuple(replace(x, a=names[x.b], b=names[x.a]) for x in reversed(info.links)),
        num_nodes=info.num_nodes,
    )
    group = [d.id for d in info.accelerators]

    for algorithm in SCHEDULES["all_reduce"]:
        phases = schedule("all_reduce", algorithm, 1 << 24, [list(range(len(group)))])
        here = simulate(Network(TopologyGraph(info), group), phases)
        there = simulate(Network(TopologyGraph(renamed), [names[d] for d in group]), phases)
        assert here.time_us == pytest.approx(there.time_us)


@pytest.mark.parametrize(
    "message",
    [Message(0, 0, 1), Message(0, 2, 1), Message(-1, 0, 1), Message(0, 1, -1),
     Message(0, 1, math.nan)],
)  # fmt: skip
def test_an_impossible_message_is_refused(message):
    with pytest.raises(ConfigError, match="Message"):
        simulate(star(10, 10), [Phase((message,))])


def test_a_message_of_nothing_takes_its_latency():
    network = star(10, 10, settings=SimSettings(message_us=2, hop_us={}, other_hop_us=0))

    assert simulate(network, [Phase((Message(0, 1, 0),))]).time_us == pytest.approx(2)


def test_two_ranks_on_one_device_are_refused():
    graph = TopologyGraph(TopologyInfo(devices=(Device("a", "gpu"),)))

    with pytest.raises(ConfigError, match="twice"):
        Network(graph, ["a", "a"])
