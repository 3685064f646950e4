"""Copies of one host as a cluster, for plans: what nobody said of the host is assumed and told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sagellm.core.protocols import Device, Link, LinkKind, TopologyInfo

from ._join import join_hosts, network_of
from .graph import FABRIC_KINDS, NETWORK_KINDS

__all__ = ["copies_of"]

_ROOT, _PORT = "assumed-root", "assumed-port"
_ENDS = ("gpu", "npu", "nic")
_TRANSIT = ("numa", "pci_root", "pci_switch")


def copies_of(host: TopologyInfo, nodes: int) -> tuple[TopologyInfo, tuple[str, ...]]:
    """The host `nodes` times, joined by networks, with what had to be assumed, in words.

    A host of which a source tells pairs but not the links between gets one host bridge that joins
    its parts, and one without a port that is up gets one port. Both are inferred, and of unknown
    bandwidth.
    """
    devices, links, assumed = list(host.devices), list(host.links), []
    lonely = nodes > 1 and not any(network_of(d) for d in devices)
    tops = _tops(devices, links)
    if len(tops) > 1 or (lonely and tops):
        if len(tops) > 1:
            assumed.append("a host bridge that joins what no source says is joined")
        devices.append(Device(_ROOT, "pci_root"))
        links += [_inferred(top.id, _ROOT, _way_up(top)) for top in tops]
    if lonely and tops:
        assumed.append("a network port in each host")
        attrs = {"ib": _PORT, "link_layer": "InfiniBand"}
        devices.append(Device(_PORT, "nic", attrs=attrs))
        links.append(_inferred(_PORT, _ROOT, "pcie"))
    whole = replace(host, devices=tuple(devices), links=tuple(links))
    return join_hosts([whole] * nodes), tuple(assumed)


def _tops(devices: Sequence[Device], links: Sequence[Link]) -> list[Device]:
    """One device of each part of the host that has accelerators or NICs: the highest in it."""
    known = {d.id: d for d in devices}
    near: dict[str, list[str]] = {}
    for link in links:
        if link.kind in FABRIC_KINDS | NETWORK_KINDS or not {link.a, link.b} <= known.keys():
            continue
        near.setdefault(link.a, []).append(link.b)
        near.setdefault(link.b, []).append(link.a)
    seen: set[str] = set()
    tops: list[Device] = []
    for start in devices:
        if start.kind not in _ENDS or start.id in seen:
            continue
        part, todo = {start.id}, [start.id]
        while todo:
            fresh = [x for x in near.get(todo.pop(), ()) if x not in part]
            part.update(fresh)
            todo += fresh
        seen |= part
        ways = [known[name] for name in sorted(part) if known[name].kind in _TRANSIT]
        tops.append(min(ways, key=lambda d: _TRANSIT.index(d.kind), default=start))
    return tops


def _way_up(top: Device) -> LinkKind:
    return "host_bridge" if top.kind in ("numa", "pci_root") else "pcie"


def _inferred(a: str, b: str, kind: LinkKind) -> Link:
    return Link(a, b, kind, source="inference", confidence="inferred")
