"""Every recorded machine, read and compared with the facts that a person found in it.

The records lie beside the checkout and not in it; without them there is one skipped test. What is
null in a case is not stated by its input.
"""

import json
import re
import tarfile
from pathlib import Path

import pytest

from sagellm.comm.topology import TopologyGraph
from sagellm.comm.topology._sysfs import pcie_bytes_per_s
from sagellm.comm.topology.export import pair_label
from sagellm.comm.topology.importers import import_topology

CASES = sorted(
    case
    for folder in Path(__file__).resolve().parents
    for case in (folder.parent / "shared/data/topology/expected").glob("*.json")
)
SWITCHES = {"NVSwitch": "nvlink"}
LOOSE = ("PHB", "NODE", "SYS")  # classes that make no NIC the close one when all GPUs share them


@pytest.fixture
def read(look, tmp_path):
    """The topology of a case's sample: a file of some format, or a recorded tree."""

    def topology(case_file, case):
        sample = case_file.parent.parent / "samples" / case["sample"]
        if ".tar." not in sample.name:
            return import_topology(sample.read_bytes())
        with tarfile.open(sample) as tar:
            tar.extractall(tmp_path, filter="data")
        tops = [p for p in tmp_path.iterdir() if p.is_dir()]
        return look(tmp_path if (tmp_path / "sys").is_dir() else tops[0]).detect()

    return topology


def names_of(nic):
    names = [*nic.attrs.get("ib", "").split(","), *nic.attrs.get("netdev", "").split(",")]
    return [n for n in names if n] or [nic.id]


def closest(graph, gpus, nic):
    """Indices of the GPUs with the best path to the NIC, and its class."""
    ranked = [(graph.quality(gpu.id, nic.id)[0], graph.path(gpu.id, nic.id).kind) for gpu in gpus]
    best, kind = min(ranked, key=lambda r: r[0])
    near = [i for i, r in enumerate(ranked) if r[0] == best]
    everywhere = len(near) == len(gpus) and len(gpus) > 1 and kind in LOOSE
    return ([] if everywhere else near), kind


@pytest.mark.skipif(not CASES, reason="recorded machines are not beside this checkout")
@pytest.mark.parametrize("case_file", CASES, ids=lambda c: c.stem)
def test_recorded_machine_is_what_a_person_read(case_file, read):
    case = json.loads(case_file.read_text())
    info = read(case_file, case)
    graph = TopologyGraph(info)

    gpus = [info.find(bdf) for bdf in case["bdf"]] if case.get("bdf") else info.accelerators
    assert len(info.accelerators) == case["devices"]["count"]
    assert None not in gpus
    assert len(gpus) == case["devices"]["count"]
    assert {g.vendor for g in gpus} == ({case["devices"]["vendor"]} if gpus else set())
    assert_matrix(graph, gpus, case["link_matrix"])
    assert_places(gpus, case)
    assert_nics(info, graph, gpus, case)
    assert_switches(info, gpus, case.get("switch_domain"))
    assert_pcie(graph, gpus, case.get("pcie"))


def assert_matrix(graph, gpus, wanted):
    if wanted is None:
        return
    found = [[pair_label(graph, a, b) for b in gpus] for a in gpus]
    # Tools that print no count for a fabric mean one: XGMI is what we print too.
    assert found == [["?" if cell is None else cell for cell in row] for row in wanted]


def assert_places(gpus, case):
    if case["numa_node"] is not None:
        wanted = [() if n is None else (n,) for n in case["numa_node"]]
        assert [g.numa_nodes for g in gpus] == wanted
    else:
        assert not any(g.numa_nodes for g in gpus)
    assert [g.cpulist for g in gpus] == (case["cpu_affinity"] or [None] * len(gpus))


def assert_nics(info, graph, gpus, case):
    if "nics" not in case:
        return
    nics = {name: d for d in info.devices if d.kind == "nic" for name in names_of(d)}
    assert set(nics) == {n["name"] for n in case["nics"]}
    for wanted in case["nics"]:
        nic = nics[wanted["name"]]
        if "closest_gpus" in wanted:
            assert closest(graph, gpus, nic) == (wanted["closest_gpus"], wanted["path"])
        if "link_layer" in wanted:
            assert nic.attrs["link_layer"] == wanted["link_layer"]
            assert nic.attrs["ib_state"] == wanted["state"]
            assert nic.attrs["hca_type"] == wanted["hca_type"]
            assert int(nic.attrs["port_bytes_per_s"]) * 8 == wanted["rate_gbps"] * 10**9


def assert_switches(info, gpus, wanted):
    if wanted is None:
        assert info.domains == ()
        return
    (domain,) = info.domains
    assert domain.kind == SWITCHES[wanted["type"]]
    if "inferred" in wanted:
        assert (domain.confidence == "inferred") == wanted["inferred"]
    if "members" in wanted:
        assert set(domain.members) == {gpus[i].id for i in wanted["members"]}
    listed = wanted.get("switch_bdf") or wanted.get("bdf")
    if listed:
        assert {d.bdf for d in info.devices if d.kind == "fabric_switch" and d.bdf} == set(listed)


def assert_pcie(graph, gpus, wanted):
    stated = re.search(r"([0-9.]+ GT/s).*x(\d+)", (wanted or {}).get("gpu_link", ""))
    if stated is None:
        return
    speed = pcie_bytes_per_s(stated[1], stated[2])
    for gpu in gpus:
        (link,) = [x for x in graph.links_of(gpu.id) if x.kind == "pcie"]
        assert link.bandwidth_bytes_per_s == pytest.approx(speed, rel=0.01)
