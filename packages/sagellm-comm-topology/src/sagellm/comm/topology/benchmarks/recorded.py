"""Recorded machines, read and compared with the facts that a person found in them.

The records lie beside the checkout and are no part of it; see their SCHEMA. A fact that is null is
not stated by the input, so that a reader must call it unknown.
"""

from __future__ import annotations

import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from sagellm.comm.topology import TopologyGraph, TopologyManager
from sagellm.comm.topology._sysfs import pcie_bytes_per_s
from sagellm.comm.topology.export import pair_label
from sagellm.comm.topology.importers import import_topology
from sagellm.core.protocols import Device, TopologyInfo

__all__ = ["case_files", "mismatches", "read_sample"]

_SWITCHES = {"NVSwitch": "nvlink"}
_UNKNOWN_LINKS = "links between GPUs are unknown"
_LOOSE = ("PHB", "NODE", "SYS")  # shared by all GPUs, they make no NIC the close one of any

_Case = Mapping[str, Any]  # Any: JSON


def case_files() -> list[Path]:
    """Every case beside this checkout; none where there is no such folder."""
    for folder in Path(__file__).resolve().parents:
        found = sorted((folder.parent / "shared/data/topology/expected").glob("*.json"))
        if found:
            return found
    return []


def read_sample(case_file: Path, case: _Case) -> TopologyInfo:
    """The topology of a case's sample: a file of some format, or a recorded tree."""
    sample = case_file.parent.parent / "samples" / case["sample"]
    if ".tar." not in sample.name:
        return import_topology(sample.read_bytes())
    with tempfile.TemporaryDirectory(prefix="topology-") as name:
        root = Path(name)
        with tarfile.open(sample) as tar:
            tar.extractall(root, filter="data")
        tops = [p for p in root.iterdir() if p.is_dir()]
        return TopologyManager(root=root if (root / "sys").is_dir() else tops[0]).detect()


def mismatches(case_file: Path) -> list[str]:
    """What the reader says differently from a case, in words; empty when all is right."""
    case = json.loads(case_file.read_text())
    info = read_sample(case_file, case)
    graph = TopologyGraph(info)
    count = case["devices"]["count"]
    if len(info.accelerators) != count:
        return [f"{len(info.accelerators)} devices, not {count}"]
    chosen = [info.find(bdf) for bdf in case["bdf"]] if case.get("bdf") else info.accelerators
    gpus = [g for g in chosen if g is not None]
    if len(gpus) != count:
        return [f"devices are {[d.id for d in info.accelerators]}, not {case['bdf']}"]
    return [
        *_differ(
            "vendor", {g.vendor for g in gpus}, {case["devices"]["vendor"]} if gpus else set()
        ),
        *_matrix(graph, gpus, case["link_matrix"]),
        *(_unstated(info, graph, gpus) if case["link_matrix"] is None else ()),
        *_places(gpus, case),
        *(_nics(info, graph, gpus, case["nics"]) if "nics" in case else ()),
        *_switches(info, gpus, case.get("switch_domain")),
        *_pcie(graph, gpus, case.get("pcie")),
    ]


def _differ(what: str, found: object, wanted: object) -> Iterator[str]:
    if found != wanted:
        yield f"{what}: {found}, not {wanted}"


def _matrix(
    graph: TopologyGraph, gpus: Sequence[Device], wanted: Sequence[Sequence[str | None]] | None
) -> Iterator[str]:
    for a, row in zip(gpus, wanted or (), strict=bool(wanted)):
        for b, cell in zip(gpus, row, strict=True):
            yield from _differ(f"{a.id} - {b.id}", pair_label(graph, a, b), cell or "?")


def _unstated(info: TopologyInfo, graph: TopologyGraph, gpus: Sequence[Device]) -> Iterator[str]:
    """No link may be claimed of a file that names none.

    Pairs are unknown, or have the class of their way over the PCI tree that the file states; the
    reader must say then that there may be links besides.
    """
    labels = {(a.id, b.id): pair_label(graph, a, b) for a, b in combinations(gpus, 2)}
    for (a, b), label in labels.items():
        if graph.path(a, b).kind in ("LINK", "C2C") or graph.stated(a, b) is not None:
            yield f"{a} - {b}: {label}, though the input states no link"
    if set(labels.values()) - {"?"} and not any(_UNKNOWN_LINKS in w for w in info.warnings):
        yield f"no warning says that {_UNKNOWN_LINKS}"


def _places(gpus: Sequence[Device], case: _Case) -> Iterator[str]:
    nodes = case["numa_node"] or [None] * len(gpus)
    cpus = case["cpu_affinity"] or [None] * len(gpus)
    for gpu, node, cpulist in zip(gpus, nodes, cpus, strict=True):
        yield from _differ(
            f"NUMA node of {gpu.id}", gpu.numa_nodes, () if node is None else (node,)
        )
        yield from _differ(f"CPUs of {gpu.id}", gpu.cpulist, cpulist)


def _names(nic: Device) -> list[str]:
    listed = f"{nic.attrs.get('ib', '')},{nic.attrs.get('netdev', '')}".split(",")
    return [n for n in listed if n] or [nic.id]


def _closest(
    graph: TopologyGraph, gpus: Sequence[Device], nic: Device
) -> tuple[list[int], str | None]:
    """Indices of the GPUs with the best path to the NIC, and its class."""
    ranked = [(graph.quality(g.id, nic.id)[0], graph.path(g.id, nic.id).kind) for g in gpus]
    best, kind = min(ranked, key=lambda r: r[0])
    near = [i for i, r in enumerate(ranked) if r[0] == best]
    everywhere = len(near) == len(gpus) and len(gpus) > 1 and kind in _LOOSE
    return ([] if everywhere else near), kind


def _nics(
    info: TopologyInfo, graph: TopologyGraph, gpus: Sequence[Device], wanted: Sequence[_Case]
) -> Iterator[str]:
    nics = {name: d for d in info.devices if d.kind == "nic" for name in _names(d)}
    yield from _differ("NICs", sorted(nics), sorted(n["name"] for n in wanted))
    for case in wanted:
        nic = nics.get(case["name"])
        if nic is None:
            continue
        if "closest_gpus" in case:
            near = (case["closest_gpus"], case["path"])
            yield from _differ(f"GPUs near {case['name']}", _closest(graph, gpus, nic), near)
        for key, attr in (("link_layer", "link_layer"), ("state", "ib_state"),
                          ("hca_type", "hca_type")):  # fmt: skip
            if key in case:
                yield from _differ(f"{key} of {case['name']}", nic.attrs.get(attr), case[key])
        if "rate_gbps" in case:
            rate = str(case["rate_gbps"] * 125_000_000)
            yield from _differ(f"rate of {case['name']}", nic.attrs.get("port_bytes_per_s"), rate)


def _switches(info: TopologyInfo, gpus: Sequence[Device], wanted: _Case | None) -> Iterator[str]:
    kinds = [d.kind for d in info.domains]
    yield from _differ("switch domains", kinds, [_SWITCHES[wanted["type"]]] if wanted else [])
    if not wanted or len(info.domains) != 1:
        return
    domain = info.domains[0]
    if "inferred" in wanted:
        inferred = domain.confidence == "inferred"
        yield from _differ("switch domain inferred", inferred, wanted["inferred"])
    if "members" in wanted:
        members = sorted(gpus[i].id for i in wanted["members"])
        yield from _differ("members", sorted(domain.members), members)
    listed = wanted.get("switch_bdf") or wanted.get("bdf")
    if listed:
        found = sorted(d.bdf for d in info.devices if d.kind == "fabric_switch" and d.bdf)
        yield from _differ("switches", found, sorted(listed))


def _pcie(graph: TopologyGraph, gpus: Sequence[Device], wanted: _Case | None) -> Iterator[str]:
    stated = re.search(r"([0-9.]+ GT/s).*x(\d+)", (wanted or {}).get("gpu_link", ""))
    if stated is None:
        return
    speed = pcie_bytes_per_s(stated[1], stated[2]) or 0.0
    for gpu in gpus:
        rates = [x.bandwidth_bytes_per_s or 0.0 for x in graph.links_of(gpu.id) if x.kind == "pcie"]
        if len(rates) != 1 or abs(rates[0] - speed) > 0.01 * speed:
            yield f"PCIe of {gpu.id}: {rates}, not {speed}"
