"""What must hold for any machine: names and orders change nothing but names and orders."""

from hypothesis import given, settings, strategies as st

from sagellm.comm.topology import TopologyGraph
from sagellm.comm.topology.export import from_json, to_json
from sagellm.comm.topology.merge import merge
from sagellm.comm.topology.placement import ring
from sagellm.core.protocols import Device, Link, TopologyFragment


@st.composite
def machines(draw):
    """Accelerators with random links, and PCI switches in a random tree."""
    count = draw(st.integers(2, 6))
    switches = draw(st.integers(1, 4))
    devices = [Device(f"g{i}", "gpu", index=i) for i in range(count)]
    devices += [Device(f"s{i}", "pci_switch") for i in range(switches)]
    links = [
        Link(f"s{i}", f"s{draw(st.integers(0, i - 1))}", "pcie", 1, 8e9) for i in range(1, switches)
    ]
    links += [
        Link(f"g{i}", f"s{draw(st.integers(0, switches - 1))}", "pcie", 1, 32e9)
        for i in range(count)
        if draw(st.booleans())
    ]
    for a in range(count):
        for b in range(a + 1, count):
            lanes = draw(st.integers(0, 2))
            if lanes:
                links.append(Link(f"g{a}", f"g{b}", "nvlink", lanes, lanes * 25e9))
    return devices, links


def build(devices, links):
    return merge([(60, TopologyFragment("drawn", tuple(devices), tuple(links)))])


@settings(deadline=None, max_examples=60)
@given(machines(), st.randoms(use_true_random=False))
def test_renaming_and_shuffling_change_only_names(machine, rng):
    devices, links = machine
    info = build(devices, links)
    names = {d.id: f"{rng.randrange(10**9)}-{d.id}" for d in devices}
    renamed = [Device(names[d.id], d.kind, index=d.index) for d in devices]
    relinked = [
        Link(names[x.b], names[x.a], x.kind, x.count, x.bandwidth_bytes_per_s) for x in links
    ]
    rng.shuffle(renamed)
    rng.shuffle(relinked)

    other = build(renamed, relinked)

    assert other.fingerprint == info.fingerprint
    one, two = TopologyGraph(info), TopologyGraph(other)
    for a in devices:
        for b in devices:
            mine, theirs = one.path(a.id, b.id), two.path(names[a.id], names[b.id])
            assert (mine.kind, mine.hops) == (theirs.kind, theirs.hops)
            assert mine.bottleneck_bytes_per_s == theirs.bottleneck_bytes_per_s


@settings(deadline=None, max_examples=60)
@given(machines())
def test_paths_are_the_same_both_ways_and_links_join_up(machine):
    graph = TopologyGraph(build(*machine))

    for a in machine[0]:
        for b in machine[0]:
            path, back = graph.path(a.id, b.id), graph.path(b.id, a.id)
            assert path.kind == back.kind
            assert path.hops == back.hops
            if path.kind is None:
                continue
            assert len(path.devices) == len(path.links) + 1
            for here, link, there in zip(path.devices, path.links, path.devices[1:], strict=False):
                assert {here, there} == {link.a, link.b}


@settings(deadline=None, max_examples=40)
@given(machines())
def test_no_ring_order_has_a_better_bottleneck(machine):
    from itertools import permutations

    graph = TopologyGraph(build(*machine))
    members = [d.id for d in machine[0] if d.kind == "gpu"][:5]

    def worst(order):
        return max(
            graph.quality(a, b)[:2] for a, b in zip(order, [*order[1:], order[0]], strict=True)
        )

    best = min(worst([members[0], *rest]) for rest in permutations(members[1:]))
    assert worst(ring(graph, members)) == best


@settings(deadline=None, max_examples=40)
@given(machines())
def test_json_is_the_identity(machine):
    info = build(*machine)

    assert from_json(to_json(info)) == info
