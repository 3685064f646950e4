"""What is wrong with what others wrote: fragments of plug-ins, whole topologies of files.

Merging, graphs and drawings trust types, ranges and unique ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

from sagellm.core.protocols import (
    Device,
    DeviceKind,
    IntegrityError,
    Link,
    LinkKind,
    Pair,
    SwitchDomain,
    TopologyFragment,
    TopologyInfo,
)

from ._sysfs import normal_bdf

__all__ = ["check_info", "checked", "fault"]

_KINDS = frozenset(get_args(DeviceKind))
_LINKS = frozenset(get_args(LinkKind))
_ENDLESS = float("inf")
_TEXTS = ("vendor", "model", "bdf", "uuid", "cpulist")
_NUMBERS = ("index", "visible_index", "memory_bytes")
_MOST_NODES = 1 << 20


def fault(fragment: object) -> str | None:
    """What makes it no fragment that can be merged, in words; None when nothing does."""
    if not isinstance(fragment, TopologyFragment):
        return f"gave {type(fragment).__name__} and no TopologyFragment"
    if not isinstance(fragment.source, str):
        return f"source is {fragment.source!r} and no text"
    if not _each(fragment.warnings, str):
        return "warnings are no tuple of texts"
    for name, kind in (("devices", Device), ("links", Link), ("domains", SwitchDomain),
                       ("pairs", Pair)):  # fmt: skip
        if not _each(getattr(fragment, name), kind):
            return f"{name} are no tuple of {kind.__name__}"
    for device in fragment.devices:
        if wrong := _device(device):
            return f"device {device.id!r}: {wrong}"
    edges: tuple[Link | Pair, ...] = (*fragment.links, *fragment.pairs)
    for edge in edges:
        if not (isinstance(edge.a, str) and isinstance(edge.b, str)):
            return f"{type(edge).__name__} {edge.a!r} - {edge.b!r}: its ends are no texts"
    for link in fragment.links:
        if wrong := _link(link):
            return f"link {link.a!r} - {link.b!r}: {wrong}"
    for domain in fragment.domains:
        if not isinstance(domain.id, str) or not _each(domain.members, str):
            return f"domain {domain.id!r}: id and members are no texts"
    for pair in fragment.pairs:
        if not _texts(pair.peer):
            return f"pair {pair.a!r} - {pair.b!r}: peer is no mapping of texts"
    return None


def checked(info: TopologyInfo) -> TopologyInfo:
    """The topology of a file as it may be used; its warnings tell what was put right.

    Raises:
        IntegrityError: It says what cannot be; the message names the device or link.

    """
    from ._fingerprint import fingerprint  # detectors need none

    check_info(info)
    known = {d.id for d in info.devices}
    links = tuple(x for x in info.links if x.a in known and x.b in known)
    pairs = tuple(p for p in info.pairs if p.a in known and p.b in known)
    domains = tuple(
        d if known.issuperset(d.members)
        else replace(d, members=tuple(m for m in d.members if m in known))
        for d in info.domains
    )  # fmt: skip
    told: list[str] = []
    lost = len(info.links) - len(links) + len(info.pairs) - len(pairs)
    if lost or domains != info.domains:
        told.append(f"{lost} links and pairs, or members of domains, name no device: left out")
        info = replace(info, links=links, pairs=pairs, domains=domains)
    if info.fingerprint and info.fingerprint != (real := fingerprint(info)):
        told.append(f"fingerprint {info.fingerprint[:40]} is not that of the content, {real}")
        info = replace(info, fingerprint=real)
    return replace(info, warnings=(*info.warnings, *told)) if told else info


def check_info(info: TopologyInfo) -> None:
    """Refuse a topology that says what cannot be.

    Raises:
        IntegrityError: The message names the device or link.

    """
    whole = TopologyFragment("file", info.devices, info.links, info.domains, pairs=info.pairs)
    wrong = fault(whole) or _hosts(info)
    if wrong:
        raise IntegrityError(f"not a topology: {wrong}")


def _hosts(info: TopologyInfo) -> str | None:
    if not 1 <= info.num_nodes <= _MOST_NODES:
        return f"num_nodes is {info.num_nodes}, not 1 to {_MOST_NODES}"
    seen: set[str] = set()
    for device in info.devices:
        if device.id in seen:
            return f"two devices are called {device.id!r}"
        if not -1 <= device.node < info.num_nodes:
            return f"device {device.id!r} is in node {device.node} of {info.num_nodes}"
        seen.add(device.id)
    return None


def _device(device: Device) -> str | None:
    if not isinstance(device.id, str) or device.kind not in _KINDS:
        return f"kind {device.kind!r} or its id is none"
    for name in _TEXTS:
        if not isinstance(getattr(device, name), str | None):
            return f"{name} is {getattr(device, name)!r} and no text"
    if device.bdf is not None and normal_bdf(device.bdf) is None:
        return f"bdf is {device.bdf!r} and no PCI address"
    for name in _NUMBERS:
        value = getattr(device, name)
        if value is not None and not (isinstance(value, int) and value >= 0):
            return f"{name} is {value!r} and no whole number from 0"
    if not _each(device.numa_nodes, int) or any(n < 0 for n in device.numa_nodes):
        return f"numa_nodes is {device.numa_nodes!r} and no tuple of whole numbers from 0"
    return None if _texts(device.attrs) else "attrs is no mapping of texts"


def _link(link: Link) -> str | None:
    if link.kind not in _LINKS:
        return f"kind {link.kind!r} is not known"
    if not isinstance(link.count, int) or link.count < 1:
        return f"count {link.count!r} is no whole number above 0"
    for name in ("bandwidth_bytes_per_s", "latency_s"):
        value = getattr(link, name)
        if value is not None and not (isinstance(value, int | float) and 0 <= value < _ENDLESS):
            return f"{name} is {value!r} and no number from 0"
    return None


def _each(found: object, kind: type) -> bool:
    return isinstance(found, tuple) and all(isinstance(x, kind) for x in found)


def _texts(found: object) -> bool:
    return isinstance(found, Mapping) and all(
        isinstance(k, str) and isinstance(v, str) for k, v in found.items()
    )
