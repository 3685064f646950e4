"""One topology out of many fragments.

On conflict the source of higher precedence wins and the conflict is a warning. What no source
knows stays unknown, but for what a rule concludes; its links say "inferred".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sagellm.core.protocols import (
    Device,
    Link,
    Pair,
    SwitchDomain,
    TopologyFragment,
    TopologyInfo,
)

from ._fingerprint import fingerprint
from ._same_device import differ, merge_devices
from ._same_fabric import (
    Speakers,
    drop_idle_switches,
    fabric_speakers,
    is_overruled,
    merge_domains,
)
from ._sysfs_numa import cpu_numbers
from .graph import TopologyGraph

__all__ = ["merge"]


def merge(
    fragments: Sequence[tuple[int, TopologyFragment]],
    *,
    warnings: Sequence[str] = (),
    hostname: str = "",
) -> TopologyInfo:
    """The topology that the fragments describe together.

    Args:
        fragments: Precedence and fragment; on conflict the higher precedence wins.
        warnings: What went wrong before, put in front of the fragments' own.
        hostname: Name of the host, for display only.

    """
    ordered = sorted(fragments, key=lambda f: (-f[0], f[1].source))
    notes = [*warnings]
    for _, fragment in ordered:
        notes += [f"{fragment.source}: {w}" for w in fragment.warnings]
    devices, names = merge_devices(ordered, notes)
    notes += _absent_nodes(devices)
    _place_by_cpus(devices)
    sources = [f for _, f in ordered]
    speakers = fabric_speakers(sources, devices, names)
    domains = merge_domains(sources, devices, names, speakers, notes)
    links = _merge_links(sources, devices, names, speakers, notes)
    pairs = _merge_pairs(sources, devices, names, notes)
    _materialise(domains, devices, links)
    _join_roots(devices, links)
    chosen = tuple(sorted(devices.values(), key=_order))
    edges = tuple(sorted(links.values(), key=lambda link: (link.a, link.b, link.kind)))
    info = TopologyInfo(
        devices=chosen,
        links=edges,
        domains=tuple(domains),
        warnings=tuple(dict.fromkeys(notes)),
        provenance={f.source: f.elapsed_s for _, f in ordered},
        hostname=hostname,
        pairs=pairs,
    )
    told = _contradictions(info)
    info = replace(info, warnings=(*info.warnings, *told)) if told else info
    return replace(info, fingerprint=fingerprint(info))


def _order(device: Device) -> tuple[bool, bool, int, str]:
    accelerator = device.kind in ("gpu", "npu")
    index = device.index if accelerator else None
    name = device.id
    if device.bdf is None:  # mlx5_2 before mlx5_10
        name = re.sub(r"\d+", lambda m: m[0].zfill(8), name)
    return not accelerator, index is None, index or 0, name


def _absent_nodes(devices: Mapping[str, Device]) -> list[str]:
    """Devices in NUMA nodes that the machine does not have, where its nodes are known."""
    here = {n for d in devices.values() if d.kind == "numa" for n in d.numa_nodes}
    found = [
        f"NUMA node {node} of {d.id} is not on this machine"
        for d in devices.values()
        for node in d.numa_nodes
        if here and node not in here
    ]
    return _few(found, "nodes")


def _place_by_cpus(devices: dict[str, Device]) -> None:
    """Give a device the one NUMA node that holds all the CPUs it is said to be local to.

    Some tools print CPUs and no node. CPUs of several nodes are no knowledge.
    """
    nodes = {
        d.numa_nodes[0]: set(numbers)
        for d in devices.values()
        if d.kind == "numa" and d.numa_nodes and (numbers := cpu_numbers(d.cpulist))
    }
    for device in list(devices.values()):
        if device.numa_nodes or device.kind == "numa" or len(nodes) < 2:
            continue
        mine = set(cpu_numbers(device.cpulist))
        homes = [node for node, cpus in nodes.items() if mine and mine <= cpus]
        if len(homes) == 1:
            devices[device.id] = replace(device, numa_nodes=(homes[0],))


def _merge_links(
    fragments: Sequence[TopologyFragment],
    devices: dict[str, Device],
    names: dict[str, str],
    speakers: Speakers,
    notes: list[str],
) -> dict[tuple[str, str, str], Link]:
    links: dict[tuple[str, str, str], Link] = {}
    parents: dict[str, str] = {}
    moved = False
    conflicts: list[str] = []
    left: set[str] = set()
    for number, fragment in enumerate(fragments):
        unknown: dict[str, None] = {}
        overruled = 0
        for link in fragment.links:
            a, b = names.get(link.a, link.a), names.get(link.b, link.b)
            absent = [end for end in (a, b) if end not in devices]
            if absent or a == b:
                unknown.update(dict.fromkeys(x for x in absent if not x.startswith("numa:")))
                continue
            a, b = sorted((a, b))
            if (a, b, link.kind) not in links and is_overruled(a, b, link.kind, number, speakers):
                overruled += 1
                left.update((a, b))
                continue
            below = _below(devices[a], devices[b]) if link.kind == "pcie" else None
            if below and parents.setdefault(below, fragment.source) != fragment.source:
                # A device hangs in one place: where the source that is believed first puts it.
                moved = moved or (a, b, link.kind) not in links
            elif (a, b, link.kind) not in links:
                links[a, b, link.kind] = replace(link, a=a, b=b)
            known = links.get((a, b, link.kind))
            if known is None:
                continue
            if known.count != link.count and known.source != link.source:
                notes.append(
                    f"{a} - {b}: {known.count} {link.kind} by {known.source} but {link.count} "
                    f"by {link.source}; {known.source} is believed"
                )
            mine, other = known.bandwidth_bytes_per_s, link.bandwidth_bytes_per_s
            if known.source != link.source and mine and other and differ(mine, other):
                conflicts.append(
                    f"{a} - {b}: {mine / 1e9:.1f} GB/s by {known.source} but "
                    f"{other / 1e9:.1f} by {link.source}; {known.source} is believed"
                )
            links[a, b, link.kind] = replace(
                known,
                bandwidth_bytes_per_s=known.bandwidth_bytes_per_s or link.bandwidth_bytes_per_s,
                latency_s=known.latency_s or link.latency_s,
            )
        if unknown:
            some = ", ".join(list(unknown)[:4]) + (" …" if len(unknown) > 4 else "")
            notes.append(f"{fragment.source}: links to unknown {some} left out")
        if overruled:
            notes.append(
                f"{fragment.source}: {overruled} links of a fabric left out; sources that are "
                "believed more say how these devices are joined"
            )
    notes += _few(conflicts, "links")
    drop_idle_switches(left, devices, links)
    if moved:
        _prune(devices, links)
    return links


def _below(a: Device, b: Device) -> str | None:
    """Which end of a PCI link hangs below the other; None between two switches."""
    bridges = ("pci_root", "pci_switch")
    lower = [d for d in (a, b) if d.kind not in bridges]
    if len(lower) == 1:
        return lower[0].id
    if {a.kind, b.kind} == set(bridges):
        return a.id if a.kind == "pci_switch" else b.id
    return None


def _prune(devices: dict[str, Device], links: dict[tuple[str, str, str], Link]) -> None:
    """Drop bridges that nothing hangs below any more."""
    while True:
        used: dict[str, int] = {}
        for a, b, kind in links:
            for end in (a, b) if kind == "pcie" else ():
                used[end] = used.get(end, 0) + 1
        empty = {
            d.id
            for d in devices.values()
            if (d.kind == "pci_root" and d.id not in used)
            or (d.kind == "pci_switch" and used.get(d.id, 0) < 2)
        }
        if not empty:
            return
        for name in empty:
            del devices[name]
        for key in [k for k in links if k[0] in empty or k[1] in empty]:
            del links[key]


def _merge_pairs(
    fragments: Sequence[TopologyFragment],
    devices: dict[str, Device],
    names: dict[str, str],
    notes: list[str],
) -> tuple[Pair, ...]:
    pairs: dict[tuple[str, str], Pair] = {}
    conflicts: list[str] = []
    for fragment in fragments:
        for pair in fragment.pairs:
            a, b = sorted((names.get(pair.a, pair.a), names.get(pair.b, pair.b)))
            if a == b or a not in devices or b not in devices:
                notes.append(f"{fragment.source}: pair {a} - {b} is not among the devices")
                continue
            known = pairs.get((a, b))
            if known is None:
                pairs[a, b] = replace(pair, a=a, b=b)
                continue
            if known.path and pair.path and known.path != pair.path:
                notes.append(
                    f"{a} - {b}: {known.path} by {known.source} but {pair.path} by "
                    f"{pair.source}; {known.source} is believed"
                )
            conflicts += [
                f"{a} - {b}: {name} is {known.peer[name]} by {known.source} but {word} by "
                f"{pair.source}; {known.source} is believed"
                for name, word in pair.peer.items()
                if known.peer.get(name, word) != word
            ]
            pairs[a, b] = replace(
                known,
                path=known.path or pair.path,
                via=known.via or pair.via,
                peer={**pair.peer, **known.peer},
            )
    notes += _few(conflicts, "pairs")
    return tuple(pairs[k] for k in sorted(pairs))


_MOST_CONTRADICTIONS = 8


def _contradictions(info: TopologyInfo) -> list[str]:
    """Pairs whose stated class is not that of the way over known links, which is believed."""
    graph = TopologyGraph(info)
    found: list[str] = []
    for pair in info.pairs:
        if pair.path is None:
            continue
        path = graph.path(pair.a, pair.b)
        if path.links and path.kind not in (pair.path, "LINK", "C2C"):
            sources = ", ".join(dict.fromkeys(x.source for x in path.links))
            found.append(
                f"{pair.a} - {pair.b}: {pair.path} by {pair.source}, but the links of {sources} "
                f"make it {path.kind}"
            )
    return _few(found, "pairs")


def _few(told: list[str], what: str) -> list[str]:
    rest = len(told) - _MOST_CONTRADICTIONS
    return told if rest <= 0 else [*told[:-rest], f"and {rest} more {what} of this kind"]


def _materialise(
    domains: list[SwitchDomain],
    devices: dict[str, Device],
    links: dict[tuple[str, str, str], Link],
) -> None:
    """Give every domain the vertex and edges that paths need, where no source gave them."""
    for domain in domains:
        if any(
            link.kind == domain.kind and domain.id in (a, b) for (a, b, _), link in links.items()
        ):
            continue
        switches = {d.id for d in devices.values() if d.kind == "fabric_switch"}
        joined = {
            end
            for (a, b, kind) in links
            if kind == domain.kind and (a in switches or b in switches)
            for end in (a, b)
        }
        missing = [m for m in domain.members if m not in joined]
        if not missing:
            continue
        devices.setdefault(domain.id, Device(domain.id, "fabric_switch"))
        for member in missing:
            a, b = sorted((member, domain.id))
            links[a, b, domain.kind] = Link(
                a,
                b,
                domain.kind,
                bandwidth_bytes_per_s=domain.port_bandwidth_bytes_per_s,
                source="domain",
                confidence="inferred",
            )


def _join_roots(devices: dict[str, Device], links: dict[tuple[str, str, str], Link]) -> None:
    """Join a host bridge of unknown NUMA node where a rule leaves one answer.

    Either a driver told the node of a device beneath it, or the machine has a single node.
    Devices themselves keep their node unknown: only the edge says "inferred".
    """
    joined = {end for (a, b, kind) in links if kind == "host_bridge" for end in (a, b)}
    roots = [d.id for d in devices.values() if d.kind == "pci_root" and d.id not in joined]
    if not roots:
        return
    beneath: dict[str, list[str]] = {}
    for a, b, kind in links:
        if kind == "pcie":
            beneath.setdefault(a, []).append(b)
            beneath.setdefault(b, []).append(a)
    nodes = [d.id for d in devices.values() if d.kind == "numa"]
    for root in roots:
        seen, todo = {root}, [root]
        while todo:
            fresh = [n for n in beneath.get(todo.pop(), ()) if n not in seen]
            seen.update(fresh)
            todo += fresh
        told = {f"numa:{n}" for v in seen for n in devices[v].numa_nodes[:1]} & set(nodes)
        if not told and len(nodes) == 1:
            told = {nodes[0]}
        for node in sorted(told):
            a, b = sorted((root, node))
            links[a, b, "host_bridge"] = Link(
                a, b, "host_bridge", source="inference", confidence="inferred"
            )
