"""NCCL's file out of what is known, and words where it cannot say it."""

import itertools
import logging
import re

import pytest

from sagellm.comm.topology.export import from_json, to_json, to_nccl_xml
from sagellm.comm.topology.importers import import_topology
from sagellm.comm.topology.merge import merge
from sagellm.core.protocols import ConfigError, Device, Link, SwitchDomain, TopologyFragment

A, B, C = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"


def host(*devices, links=(), domains=()):
    return merge([(60, TopologyFragment("drawn", devices, tuple(links), tuple(domains)))])


def gpu(bdf, vendor="nvidia", **facts):
    return Device(bdf, "gpu", vendor=vendor, bdf=bdf, **facts)


@pytest.mark.parametrize("skeleton", [False, True])
def test_an_accelerator_without_an_address_is_refused(skeleton):
    text = "\tGPU0\tGPU1\nGPU0\tX\tNV4\nGPU1\tNV4\tX\n"

    with pytest.raises(ConfigError, match="no bus address is known of nvidia:0, nvidia:1"):
        to_nccl_xml(import_topology(text.encode()), skeleton=skeleton)


@pytest.mark.parametrize("vendor", ["amd", "nvidia"])
def test_the_version_is_that_of_the_library_that_reads_it(vendor):
    wanted = {"amd": "2", "nvidia": "1"}[vendor]

    text = to_nccl_xml(host(gpu(A, vendor), gpu(B, vendor)))

    assert f'<system version="{wanted}">' in text


def test_the_version_of_every_recorded_file_comes_back(shared_samples):
    found = {}
    for file in sorted((shared_samples / "samples").glob("[nr]ccl_*.xml")):
        data = file.read_bytes()
        version = re.search(rb'<system version="(\d)"', data)
        if version and b"<graphs" not in data:
            again = to_nccl_xml(import_topology(data))
            found[file.name] = (f'version="{version[1].decode()}"', again[:40])

    assert len(found) > 12
    assert {n: f for n, f in found.items() if f[0] not in f[1]} == {}


def test_an_unknown_place_is_told(caplog):
    domain = SwitchDomain("nvlink-switch", "nvlink", ())
    info = host(gpu(A), gpu(B), gpu(C), domains=[domain])

    with caplog.at_level(logging.WARNING):
        to_nccl_xml(info)

    assert f"the place of {A}, {B}, {C} is unknown" in caplog.text
    assert "nothing says which devices are on it" in caplog.text


def test_links_without_a_word_are_told(caplog):
    numa = Device("numa:0", "numa", numa_nodes=(0,))
    gpus = [gpu(x, "huawei", numa_nodes=(0,)) for x in (A, B, C)]

    to_nccl_xml(host(numa, *gpus, links=[Link(A, B, "hccs"), Link(B, C, "hccs")]))

    assert [r.getMessage() for r in caplog.records] == [
        "NCCL's file has no word for hccs links: 2 left out"
    ]


def test_a_known_machine_is_written_without_a_warning(hgx, caplog):
    to_nccl_xml(hgx.detect())

    assert caplog.records == []


def chain(count):
    root = Device("pci0000:00", "pci_root")
    switches = [Device(f"s{i:05}", "pci_switch", bdf=f"{i:04x}:00:00.0") for i in range(count)]
    last = gpu("ffff:01:00.0")
    ends = [root, *switches, last]
    links = [Link(b.id, a.id, "pcie") for a, b in itertools.pairwise(ends)]
    return host(*ends, links=links)


@pytest.mark.parametrize("count", [129, 1500])
def test_an_endless_chain_of_bridges_is_refused_in_words(count):
    info = from_json(to_json(chain(count)))

    with pytest.raises(ConfigError, match="more than 128 bridges are above"):
        to_nccl_xml(info)


def test_a_long_chain_of_bridges_comes_back():
    again = import_topology(to_nccl_xml(chain(100)).encode())

    assert sum(d.kind == "pci_switch" for d in again.devices) == 100


def test_a_card_keeps_what_is_below_it():
    root = Device("pci0000:00", "pci_root", numa_nodes=(0,))
    card = Device(A, "nic", bdf=A, attrs={"ib": "mlx5_0"})
    links = [Link(A, root.id, "pcie"), Link(B, A, "pcie"), Link(C, B, "pcie")]

    text = to_nccl_xml(host(root, card, gpu(B, index=0), gpu(C, index=1), links=links))

    again = import_topology(text.encode())
    assert {d.id for d in again.devices if d.bdf} == {A, B, C}
    assert {(x.a, x.b) for x in again.links if x.kind == "pcie"} >= {(A, B), (B, C)}
    assert again.find(A).attrs["ib"] == "mlx5_0"


def test_what_is_below_a_bridge_without_an_address_is_written():
    root = Device("pci0000:00", "pci_root", numa_nodes=(0,))
    switch = Device("sw", "pci_switch")
    links = [Link("sw", root.id, "pcie"), Link(A, "sw", "pcie"), Link(B, "sw", "pcie")]

    text = to_nccl_xml(host(root, switch, gpu(A), gpu(B), links=links))

    assert import_topology(text.encode()).num_devices == 2


def test_a_node_that_is_not_there_is_a_warning_and_no_place(machine, look):
    machine.numa(0, "0-3", (10, 20))
    machine.numa(1, "4-7", (20, 10))
    machine.pci(A, "pci0000:00", 0x030200, vendor=0x10DE, numa=7)
    machine.pci(B, "pci0000:40", 0x030200, vendor=0x10DE, numa=1)

    info = look(machine).detect()

    assert any(f"NUMA node 7 of {A} is not on this machine" in w for w in info.warnings)
    text = to_nccl_xml(info)
    assert text.index('numaid="-1"') < text.index(A) < text.index('numaid="0"')
    assert text.index('numaid="1"') < text.index(B)


@pytest.mark.parametrize(
    ("word", "vendor"), [("HygonGenuine", "hygon"), ("AuthenticAMD", "amd"), ("Other", None)]
)
def test_the_maker_of_a_processor_is_the_one_that_sysfs_would_tell(word, vendor):
    text = f'<system version="1"><cpu numaid="0" affinity="f" vendor="{word}"/></system>'

    assert import_topology(text.encode()).find("numa:0").vendor == vendor
