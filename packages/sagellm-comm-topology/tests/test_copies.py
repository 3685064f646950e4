"""Plans on copies of a host that a file describes, whatever the file leaves out."""

import json

import pytest

from sagellm.comm.topology.__main__ import main
from sagellm.comm.topology._copies import copies_of
from sagellm.comm.topology._join import join_hosts, network_of
from sagellm.comm.topology.graph import TopologyGraph
from sagellm.comm.topology.importers import import_topology
from sagellm.comm.topology.planning import plan
from sagellm.core.protocols import Device, IntegrityError, Link, Pair, TopologyInfo


def test_a_plan_is_made_of_every_recorded_machine_with_accelerators(shared_samples):
    failed, planned = [], 0
    for file in sorted((shared_samples / "samples").iterdir()):
        try:
            host = import_topology(file.read_bytes())
        except IntegrityError:
            continue  # an archive, or the note beside a sample
        if not host.accelerators:
            continue
        planned += 1
        cluster, _ = copies_of(host, 2)
        try:
            found = plan(cluster, "all_reduce", 1 << 20, algorithms=["ring"])
        except Exception as e:
            failed.append(f"{file.name}: {e}")
        else:
            assert all(row.time_us for row in found.rows if row.ranks > 1), file.name
    assert failed == []
    assert planned > 25


def test_a_host_of_pairs_alone_is_planned_and_says_what_was_assumed(tmp_path, capsys):
    file = tmp_path / "topo.txt"
    file.write_text("\tGPU0\tGPU1\nGPU0\tX\tSYS\nGPU1\tSYS\tX\n")
    words = ["plan", "--from", str(file), "--nodes", "2", "--bytes", "1M", "--algorithms", "ring"]

    assert main([*words, "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert [row["ranks"] for row in told["rows"]] == [2, 4]
    assert any("network port" in a for a in told["assumed"])
    assert any("host bridge" in a for a in told["assumed"])
    assert main(words) == 0
    assert "network port" in " ".join(capsys.readouterr().out.split())


def test_a_host_that_is_known_whole_gets_nothing_assumed():
    devices = (Device("g0", "gpu", index=0), Device("n", "nic", attrs={"ib": "mlx5_0"}))
    links = (Link("g0", "s", "pcie", 1, 1e9), Link("n", "s", "pcie", 1, 1e9))
    host = TopologyInfo((*devices, Device("s", "pci_switch")), links)

    cluster, assumed = copies_of(host, 3)

    assert assumed == ()
    assert TopologyGraph(cluster).path("n0/g0", "n2/g0").kind == "NET"
    assert copies_of(TopologyInfo(pairs=(Pair("a", "b", "SYS"),)), 2)[1] == ()


@pytest.mark.parametrize(
    ("attrs", "kind"),
    [
        ({"link_layer": "InfiniBand", "ib": "a"}, "infiniband"),
        ({"link_layer": "Ethernet", "ib": "a"}, "roce"),
        ({"link_layer": "Ethernet", "netdev": "a"}, "ethernet"),
        ({"ib": "a"}, "infiniband"),
        ({"ib": "a", "pci_class": "0x020000"}, "roce"),
        ({"pci_class": "0x020700"}, "infiniband"),
        ({"pci_class": "0x020000"}, "ethernet"),
        ({"netdev": "a"}, "ethernet"),
        ({"ib": "a", "ib_state": "DOWN"}, None),
        ({"netdev": "a", "operstate": "down"}, None),
        ({}, None),
    ],
)
def test_ports_of_files_lead_into_a_network_too(attrs, kind):
    host = TopologyInfo((Device("p", "nic", attrs=attrs),))

    joined = join_hosts([host, host])

    assert network_of(host.devices[0]) == kind
    path = TopologyGraph(joined).path("n0/p", "n1/p")
    assert path.kind == ("NET" if kind else None)
    assert {x.confidence for x in path.links} <= {"inferred"}


def test_an_unusable_device_is_no_port():
    assert network_of(Device("g", "gpu", attrs={"ib": "x"})) is None
