"""Several sources of one machine: who is believed, and that every contradiction is told."""

import pytest

from sagellm.comm.topology import TopologyGraph
from sagellm.comm.topology.benchmarks.fake_machine import GPU, StubNvml
from sagellm.comm.topology.importers import read_fragment
from sagellm.comm.topology.merge import merge
from sagellm.core.protocols import Device, Link, Pair, SwitchDomain, TopologyFragment

A, B, C = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"


def gpu(bdf=A, **facts):
    return Device(bdf, "gpu", bdf=bdf, **facts)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("vendor", "nvidia", "amd"),
        ("model", "A100", "H100"),
        ("cpulist", "0-3", "8-9"),
        ("index", 0, 5),
        ("memory_bytes", 80 << 30, 40 << 30),
    ],
)
def test_facts_that_differ_are_told_and_the_first_is_believed(name, first, second):
    info = merge([
        (80, TopologyFragment("one", (gpu(**{name: first}),))),
        (60, TopologyFragment("two", (gpu(**{name: second}),))),
    ])  # fmt: skip

    assert getattr(info.devices[0], name) == first
    assert [w for w in info.warnings if f"{name} is {first} by one but {second} by two" in w]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("model", "NVIDIA H100 80GB", "H100"),
        ("cpulist", "0-7", "0-3"),
        ("memory_bytes", 80 << 30, (80 << 30) - (1 << 29)),
    ],
)
def test_what_is_merely_coarser_is_no_contradiction(name, first, second):
    info = merge([
        (80, TopologyFragment("one", (gpu(**{name: first}),))),
        (60, TopologyFragment("two", (gpu(**{name: second}),))),
    ])  # fmt: skip

    assert info.warnings == ()


def test_one_uuid_at_two_addresses_is_told():
    info = merge([
        (80, TopologyFragment("one", (gpu(A, uuid="GPU-1"),))),
        (60, TopologyFragment("two", (gpu(B, uuid="GPU-1"),))),
    ])  # fmt: skip

    assert [d.id for d in info.devices] == [A]
    assert any(f"bdf is {A} by one but {B} by two" in w for w in info.warnings)


def test_rates_and_peer_access_that_differ_are_told():
    devices = (gpu(A), gpu(B))
    info = merge([
        (80, TopologyFragment("one", devices, (Link(A, B, "nvlink", 4, 100e9, source="one"),),
                              pairs=(Pair(A, B, peer={"read": "OK"}, source="one"),))),
        (60, TopologyFragment("two", devices, (Link(A, B, "nvlink", 4, 50e9, source="two"),),
                              pairs=(Pair(A, B, peer={"read": "GNS"}, source="two"),))),
    ])  # fmt: skip

    assert any("100.0 GB/s by one but 50.0 by two" in w for w in info.warnings)
    assert any("read is OK by one but GNS by two" in w for w in info.warnings)
    assert info.links[0].bandwidth_bytes_per_s == 100e9


def test_rates_that_nearly_agree_are_no_contradiction():
    devices = (gpu(A), gpu(B))
    info = merge([
        (80, TopologyFragment("one", devices, (Link(A, B, "nvlink", 4, 100e9, source="one"),))),
        (60, TopologyFragment("two", devices, (Link(A, B, "nvlink", 4, 106e9, source="two"),))),
    ])  # fmt: skip

    assert info.warnings == ()


def test_the_drivers_number_beats_that_of_a_file(machine, look):
    for bdf in (A, B):
        machine.pci(bdf, "pci0000:00", GPU, vendor=0x10DE)
    text = "".join(
        f'<pci busid="{bdf}" class="0x030200" vendor="0x10de"><gpu dev="{dev}"/></pci>'
        for bdf, dev in ((A, 1), (B, 0))
    )
    (machine.root / "topo.xml").write_text(
        f'<system version="1"><cpu numaid="0">{text}</cpu></system>'
    )
    from sagellm.comm.topology import _specs

    manager = look(
        machine, nvml=StubNvml([A, B]), extra=(_specs.TOPO_FILE,),
        environ={"NCCL_TOPO_FILE": "/topo.xml"},
    )  # fmt: skip
    info = manager.detect()

    assert {d.id: d.index for d in info.accelerators} == {A: 0, B: 1}
    assert manager.device(0).id == A
    assert any("index is 1 by topo-file but 0 by nvml; the driver's is believed" in w
               for w in info.warnings)  # fmt: skip


def test_weak_numbers_follow_the_driver_and_not_the_file():
    file = TopologyFragment(
        "file", (gpu(A, vendor="nvidia", index=1), gpu(B, vendor="nvidia", index=0))
    )
    driver = TopologyFragment(
        "nvml", (gpu(A, vendor="nvidia", index=0), gpu(B, vendor="nvidia", index=1))
    )
    tool = TopologyFragment(
        "smi", (Device("nvidia:0", "gpu", vendor="nvidia", index=0, model="first"),)
    )

    info = merge([(100, file), (80, driver), (40, tool)])

    assert {d.id: d.model for d in info.devices} == {A: "first", B: None}


def switch(name, members, source, count=18):
    return TopologyFragment(
        source,
        (*(gpu(m) for m in members), Device(name, "fabric_switch")),
        tuple(Link(m, name, "nvlink", count, count * 25e9, source=source) for m in members),
        (SwitchDomain(name, "nvlink", tuple(members)),),
    )


def test_one_switch_under_two_names_is_one_fabric():
    info = merge([(80, switch("left", (A, B), "one")), (40, switch("right", (A, B, C), "two"))])

    assert [d.id for d in info.devices if d.kind == "fabric_switch"] == ["left"]
    assert [(d.id, d.members) for d in info.domains] == [("left", (A, B, C))]
    assert TopologyGraph(info).path(A, C).devices == (A, "left", C)
    assert len([x for x in info.links if x.kind == "nvlink"]) == 3


def test_two_switches_of_one_source_stay_two():
    one = switch("left", (A, B), "one")
    two = switch("right", (A, B), "one")
    both = TopologyFragment(
        "one", (*one.devices, two.devices[-1]), one.links + two.links, one.domains + two.domains
    )

    assert [d.id for d in merge([(80, both)]).domains] == ["left", "right"]


def test_a_tools_switch_gives_way_to_the_drivers_wires():
    wires = TopologyFragment(
        "nvml", (gpu(A), gpu(B)), (Link(A, B, "nvlink", 4, 100e9, source="nvml"),)
    )

    info = merge([(80, wires), (40, switch("nvlink-switch", (A, B), "smi"))])

    assert [(x.a, x.b) for x in info.links] == [(A, B)]
    assert info.domains == ()
    assert not any(d.kind == "fabric_switch" for d in info.devices)
    assert any("smi: 2 links of a fabric left out" in w for w in info.warnings)


def test_a_tools_wires_give_way_to_the_drivers_switch():
    wires = TopologyFragment("smi", (gpu(A), gpu(B)), (Link(A, B, "nvlink", 18, source="smi"),))

    info = merge([(80, switch("nvlink-switch", (A, B), "nvml")), (40, wires)])

    assert all("nvlink-switch" in (x.a, x.b) for x in info.links)


def test_a_tool_may_speak_where_the_driver_is_silent():
    wires = TopologyFragment("nvml", (gpu(A), gpu(B)), (Link(A, B, "nvlink", 4, source="nvml"),))
    more = TopologyFragment("smi", (gpu(A), gpu(C)), (Link(A, C, "nvlink", 2, source="smi"),))

    info = merge([(80, wires), (40, more)])

    assert {(x.a, x.b) for x in info.links} == {(A, B), (A, C)}


def test_a_driver_and_its_tool_agree_on_a_switched_machine():
    text = "\tGPU0\tGPU1\tGPU2\n" + "".join(
        f"GPU{i}\t" + "\t".join("X" if i == j else "NV18" for j in range(3)) + "\n"
        for i in range(3)
    )
    tool = read_fragment(text.encode(), source="smi")
    stub = switch("nvlink-switch", (A, B, C), "nvml")
    driver = TopologyFragment(
        "nvml",
        tuple(gpu(bdf, vendor="nvidia", index=i) for i, bdf in enumerate((A, B, C)))
        + stub.devices[-1:],
        stub.links,
        stub.domains,
    )

    info = merge([(80, driver), (40, tool)])

    assert len(info.links) == 3
    assert [d.members for d in info.domains] == [(A, B, C)]


def visible(look, machine, text, **stub):
    return look(machine, nvml=StubNvml([A, B], **stub), environ={"CUDA_VISIBLE_DEVICES": text})


@pytest.fixture
def two(machine):
    for bdf in (A, B):
        machine.pci(bdf, "pci0000:00", GPU, vendor=0x10DE)
    return machine


def test_each_partition_is_a_device_of_this_process(look, two):
    manager = visible(look, two, "MIG-1,MIG-2", mig={B: ["MIG-1", "MIG-2"]})

    assert [manager.device(i).id for i in (0, 1)] == [B, B]
    assert manager.detect().find(B).visible_index == 0


@pytest.mark.parametrize("text", ["0,00", "0,GPU-00000000-fake", "MIG-1,MIG-1"])
def test_one_device_under_two_names_is_named_twice(look, two, text):
    info = visible(look, two, text, mig={B: ["MIG-1"]}).detect()

    assert not any(d.visible_index is not None for d in info.accelerators)
    assert any("twice" in w for w in info.warnings)
