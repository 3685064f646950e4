"""Hosts side by side as one topology, with what joins them: networks, racks, rails, fabrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sagellm.core.protocols import Device, Link, LinkKind, Pair, SwitchDomain, TopologyInfo

from ._fingerprint import fingerprint
from ._numbers import number

__all__ = ["LABELS", "join_hosts", "network_of"]

LABELS = ("rack", "spine")
"""Labels of a host that say where in the network it is, nearest first."""


def join_hosts(
    hosts: Sequence[TopologyInfo],
    *,
    missing: Sequence[int] = (),
    warnings: Sequence[str] = (),
    labels: Sequence[Mapping[str, str]] = (),
) -> TopologyInfo:
    """One topology of many hosts; ids get the prefix `n<node>/`.

    Ports of one kind are joined by one network vertex (`net:ethernet`, or one per InfiniBand
    subnet), which is inferred: that ports of a kind reach each other is a conclusion. Hosts with
    labels are joined by a vertex for their rack first, then one for their spine; what lies above
    a rack has no known bandwidth. RDMA ports are numbered as rails where every host has equally
    many. Switched fabrics of one clique become one.

    Args:
        hosts: Descriptions in node order.
        missing: Ranks that gave none.
        warnings: Put in front of the hosts' own.
        labels: `rack` and `spine` of each host, either may be missing; none at all if empty.

    """
    devices: list[Device] = []
    links: list[Link] = []
    domains: list[SwitchDomain] = []
    pairs: list[Pair] = []
    notes = list(warnings)
    for node, host in enumerate(hosts):
        names = {d.id: f"n{node}/{d.id}" for d in host.devices}
        where = {k: v for k, v in labels[node].items() if k in LABELS} if labels else {}
        devices += [
            replace(d, id=names[d.id], node=node, attrs={**d.attrs, **where}) for d in host.devices
        ]
        ends = names.keys()  # what ends nowhere joins nothing
        links += [replace(x, a=names[x.a], b=names[x.b]) for x in host.links if {x.a, x.b} <= ends]
        pairs += [replace(p, a=names[p.a], b=names[p.b]) for p in host.pairs if {p.a, p.b} <= ends]
        domains += [
            replace(
                d,
                id=f"n{node}/{d.id}",
                members=tuple(names[m] for m in d.members if m in names),
            )
            for d in host.domains
        ]
        notes += [f"n{node}: {w}" for w in host.warnings]
    if len(hosts) > 1:
        devices = _with_rails(devices, len(hosts))
        _join_networks(devices, links)
        devices, links, domains = _join_cliques(devices, links, domains)
    accelerators = [d for d in devices if d.kind in ("gpu", "npu")]
    others = sorted((d for d in devices if d.kind not in ("gpu", "npu")), key=lambda d: d.id)
    joined = TopologyInfo(
        devices=(*accelerators, *others),
        links=tuple(links),
        domains=tuple(domains),
        num_nodes=len(hosts),
        missing_nodes=tuple(missing),
        warnings=tuple(dict.fromkeys(notes)),
        pairs=tuple(pairs),
    )
    return replace(joined, fingerprint=fingerprint(joined))


def _with_rails(devices: Sequence[Device], hosts: int) -> list[Device]:
    """RDMA ports numbered within their hosts, by name as people count; 10 comes after 9."""
    ports: dict[int, list[Device]] = {}
    for device in devices:
        if device.kind == "nic" and device.attrs.get("ib"):
            ports.setdefault(device.node, []).append(device)
    counts = {len(found) for found in ports.values()}
    if len(ports) < hosts or len(counts) != 1:
        return list(devices)
    rails: dict[str, str] = {}
    for found in ports.values():
        found.sort(key=lambda d: [int(p) if p.isdigit() else p for p in
                                  re.split(r"(\d+)", d.attrs["ib"])])  # fmt: skip
        rails.update({d.id: str(i) for i, d in enumerate(found)})
    return [
        replace(d, attrs={**d.attrs, "rail": rails[d.id]}) if d.id in rails else d for d in devices
    ]


def network_of(device: Device) -> LinkKind | None:
    """The kind of network that a port leads into; None if it is down, or no port.

    Files tell names and classes but no link layer: an RDMA name is InfiniBand unless the card is
    of the Ethernet class, and a name of a net interface is Ethernet.
    """
    attrs = device.attrs
    down = attrs.get("operstate") == "down" or attrs.get("ib_state", "ACTIVE") != "ACTIVE"
    if device.kind != "nic" or down:
        return None
    rdma, layer = "ib" in attrs, attrs.get("link_layer")
    if layer is None:
        family = attrs.get("pci_class", "")[:6]
        if family not in ("0x0200", "0x0207") and not (rdma or "netdev" in attrs):
            return None
        ethernet = family == "0x0200" or (family != "0x0207" and not rdma)
        layer = "Ethernet" if ethernet else "InfiniBand"
    if layer == "InfiniBand":
        return "infiniband"
    return "roce" if rdma else "ethernet"


def _join_networks(devices: list[Device], links: list[Link]) -> None:
    networks: dict[str, Device] = {}
    for nic in [d for d in devices if d.kind == "nic"]:
        kind = network_of(nic)
        if kind is None:
            continue
        subnet = nic.attrs.get("subnet_prefix", "") if kind == "infiniband" else ""
        network = f"net:{kind}" + (f":{subnet}" if subnet else "")
        steps = [f"{network}/{x}={nic.attrs[x]}" for x in LABELS if x in nic.attrs]
        below, speed = nic.id, number(nic.attrs.get("port_bytes_per_s"))
        for name in (*steps, network):
            if below == nic.id or below not in networks:
                links.append(
                    Link(
                        below,
                        name,
                        kind,
                        bandwidth_bytes_per_s=speed if speed and below == nic.id else None,
                        source="inference",
                        confidence="inferred",
                    )
                )
            if below != nic.id:
                networks.setdefault(below, Device(below, "fabric_switch", node=-1))
            below = name
        networks.setdefault(below, Device(below, "fabric_switch", node=-1))
    devices += networks.values()


def _join_cliques(
    devices: Sequence[Device], links: Sequence[Link], domains: Sequence[SwitchDomain]
) -> tuple[list[Device], list[Link], list[SwitchDomain]]:
    """Make one fabric of the domains that share a clique, and one switch of their switches."""
    nodes = {d.id: d.node for d in devices}
    kinds = {d.id: d.kind for d in devices}
    shared: dict[tuple[LinkKind, str], list[SwitchDomain]] = {}
    for domain in domains:
        if domain.clique and domain.members:
            shared.setdefault((domain.kind, domain.clique), []).append(domain)
    renamed: dict[str, str] = {}
    joined: list[SwitchDomain] = []
    for (kind, clique), found in shared.items():
        if len({nodes[d.members[0]] for d in found}) < 2:
            continue
        name = f"fabric:{kind}:{clique}"
        members = tuple(m for d in found for m in d.members)
        joined.append(replace(found[0], id=name, members=members))
        inside = frozenset(members)
        switches: dict[int, list[str]] = {}
        for link in links:
            for here, there in ((link.a, link.b), (link.b, link.a)):
                if link.kind == kind and here in inside and kinds.get(there) == "fabric_switch":
                    local = switches.setdefault(nodes[there], [])
                    if there not in local:
                        local.append(there)
        for local in switches.values():
            for i, switch in enumerate(sorted(local)):
                renamed[switch] = f"{name}/{i}" if len(local) > 1 else name
    merged = {d.id for (d_kind, d_clique), found in shared.items() for d in found
              if any(j.kind == d_kind and j.clique == d_clique for j in joined)}  # fmt: skip
    kept = [d for d in devices if d.id not in renamed]
    kept += [Device(name, "fabric_switch", node=-1) for name in dict.fromkeys(renamed.values())]
    moved = [
        replace(x, a=renamed.get(x.a, x.a), b=renamed.get(x.b, x.b))
        if x.a in renamed or x.b in renamed
        else x
        for x in links
    ]
    return kept, moved, [*joined, *(d for d in domains if d.id not in merged)]
