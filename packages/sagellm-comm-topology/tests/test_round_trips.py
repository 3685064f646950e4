"""What we print is what we read: link classes with counts, makers, and NCCL's file."""

import pytest
from hypothesis import given, settings, strategies as st

from sagellm.comm.topology.export import _LANE_NAMES, pair_label, to_matrix
from sagellm.comm.topology.graph import TopologyGraph
from sagellm.comm.topology.importers import import_topology
from sagellm.comm.topology.merge import merge
from sagellm.core.protocols import Device, Link, TopologyFragment

once = settings(deadline=None, max_examples=60)
VENDORS = (None, "nvidia", "amd", "metax", "intel", "0xabcd")


def host(vendors, links, kind="gpu"):
    devices = [
        Device(f"{v or kind}:{i}", kind, vendor=v, index=i, numa_nodes=(0,))
        for i, v in enumerate(vendors)
    ]
    edges = [Link(devices[a].id, devices[b].id, k, n) for (a, b), (k, n) in links.items()]
    numa = Device("numa:0", "numa", numa_nodes=(0,))
    return merge([(60, TopologyFragment("drawn", (*devices, numa), tuple(edges)))])


def cells(info):
    graph = TopologyGraph(info)
    return [[pair_label(graph, a, b) for b in info.accelerators] for a in info.accelerators]


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("kind", _LANE_NAMES)
def test_every_link_class_we_print_is_read(kind, count):
    first = host(["amd"] * 2, {(0, 1): (kind, count)})

    again = import_topology(to_matrix(first).encode())

    assert again.warnings == ()
    assert cells(again) == cells(first) != [["X", "?"], ["?", "X"]]
    assert [x.kind for x in again.links] == [kind]


@once
@given(st.data())
def test_our_matrix_is_the_identity_for_every_class_and_maker(data):
    size = data.draw(st.integers(2, 5))
    vendors = data.draw(st.lists(st.sampled_from(VENDORS), min_size=size, max_size=size))
    # Even counts to all would be read as ways into a switch: every pair has its own.
    kinds = data.draw(st.lists(st.sampled_from(sorted(_LANE_NAMES)), min_size=1, max_size=3))
    pairs = [(a, b) for a in range(size) for b in range(a + 1, size)]
    links = {
        pair: (data.draw(st.sampled_from(kinds)), 1 + i)
        for i, pair in enumerate(pairs)
        if data.draw(st.booleans())
    }
    first = host(vendors, links, data.draw(st.sampled_from(["gpu", "npu"])))

    again = import_topology(to_matrix(first).encode())

    assert again.warnings == ()
    assert to_matrix(again) == to_matrix(first)
    assert [d.vendor for d in again.accelerators] == vendors


def test_a_maker_nobody_knows_is_not_guessed_from_our_own_layout():
    again = import_topology(to_matrix(host([None, None], {})).encode())

    assert [d.vendor for d in again.accelerators] == [None, None]
    assert [d.kind for d in again.accelerators] == ["gpu", "gpu"]


def test_a_class_of_one_maker_names_it():
    text = "\tGPU0\tGPU1\nGPU0\tX\tXGMI2\nGPU1\tXGMI2\tX\n"

    assert {d.vendor for d in import_topology(text.encode()).accelerators} == {"amd"}


def test_nics_keep_address_names_and_node_in_our_matrix():
    nics = (
        Device("0000:05:00.0", "nic", bdf="0000:05:00.0", numa_nodes=(1,)),
        Device("0000:06:00.0", "nic", bdf="0000:06:00.0", attrs={"ib": "mlx5_0,mlx5_1"}),
    )
    gpu = Device("amd:0", "gpu", vendor="amd", index=0)
    first = merge([(60, TopologyFragment("drawn", (gpu, *nics)))])

    again = import_topology(to_matrix(first).encode())

    assert again.find("0000:05:00.0").numa_nodes == (1,)
    assert [d.attrs["ib"] for d in again.devices if "ib" in d.attrs] == ["mlx5_0,mlx5_1"]


HEAD = "\tGPU0\tGPU1\n"
NV4, NV8, SYS = (f"GPU0\t X \t{c}\nGPU1\t{c}\t X \n" for c in ("NV4", "NV8", "SYS"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + NV4 + "\n" + HEAD + SYS, "NV4 in one table, SYS in a later one"),
        (HEAD + NV4 + "\n" + HEAD + NV8, "NV4 in one table, NV8 in a later one"),
        (HEAD + "GPU0\t X \tNV4\n" + NV8, "row GPU0 is there twice"),
        (HEAD + "GPU0\tNV4\tNV4\nGPU1\tNV4\tX\n", "NV4 stands where a device meets itself"),
    ],
)
def test_tables_that_contradict_themselves_are_a_warning(text, words):
    info = import_topology(text.encode(), vendor="nvidia")

    assert any(words in w for w in info.warnings), info.warnings
    assert cells(info)[0][1] == "NV4"


def test_the_same_table_twice_is_no_contradiction():
    text = HEAD + NV4 + "\n" + HEAD + NV4

    assert import_topology(text.encode(), vendor="nvidia").warnings == ()
