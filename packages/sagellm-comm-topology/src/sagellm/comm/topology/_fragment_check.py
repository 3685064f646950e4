"""What is wrong with a fragment: plug-ins are others' code, and merging trusts types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from sagellm.core.protocols import (
    Device,
    DeviceKind,
    Link,
    LinkKind,
    Pair,
    SwitchDomain,
    TopologyFragment,
)

__all__ = ["fault"]

_KINDS = frozenset(get_args(DeviceKind))
_LINKS = frozenset(get_args(LinkKind))
_TEXTS = ("vendor", "model", "bdf", "uuid", "cpulist")
_NUMBERS = ("index", "memory_bytes")


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


def _device(device: Device) -> str | None:
    if not isinstance(device.id, str) or device.kind not in _KINDS:
        return f"kind {device.kind!r} or its id is none"
    for name in _TEXTS:
        if not isinstance(getattr(device, name), str | None):
            return f"{name} is {getattr(device, name)!r} and no text"
    for name in _NUMBERS:
        if not isinstance(getattr(device, name), int | None):
            return f"{name} is {getattr(device, name)!r} and no whole number"
    if not _each(device.numa_nodes, int):
        return f"numa_nodes is {device.numa_nodes!r} and no tuple of whole numbers"
    return None if _texts(device.attrs) else "attrs is no mapping of texts"


def _link(link: Link) -> str | None:
    if link.kind not in _LINKS:
        return f"kind {link.kind!r} is not known"
    if not isinstance(link.count, int) or link.count < 1:
        return f"count {link.count!r} is no whole number above 0"
    for name in ("bandwidth_bytes_per_s", "latency_s"):
        if not isinstance(getattr(link, name), int | float | None):
            return f"{name} is {getattr(link, name)!r} and no number"
    return None


def _each(found: object, kind: type) -> bool:
    return isinstance(found, tuple) and all(isinstance(x, kind) for x in found)


def _texts(found: object) -> bool:
    return isinstance(found, Mapping) and all(
        isinstance(k, str) and isinstance(v, str) for k, v in found.items()
    )
