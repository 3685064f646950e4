"""A hash of what a choice may depend on: equal for equal machines, whatever their names.

Vertices are coloured by what they are, then again and again by the colours around them
(Weisfeiler-Leman); addresses, UUIDs, host names, orders and visibility leave no trace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sagellm.core.protocols import Device, TopologyInfo

from ._sysfs_numa import cpu_count

__all__ = ["fingerprint"]

_ROUNDS = 4  # colours reach further than any PCI tree is deep between two switches


def fingerprint(info: TopologyInfo) -> str:
    """Sixteen hexadecimal digits of the structure of `info`."""
    colour = {d.id: _hash(_label(d)) for d in info.devices}
    around: dict[str, list[tuple[str, str]]] = {d.id: [] for d in info.devices}
    for link in info.links:
        edge = f"{link.kind}/{link.count}/{link.bandwidth_bytes_per_s}/{link.latency_s}"
        if link.a in around and link.b in around:
            around[link.a].append((edge, link.b))
            around[link.b].append((edge, link.a))
    for pair in info.pairs:
        edge = f"pair/{pair.path}/{pair.via}/{sorted(pair.peer.items())}"
        if pair.a in around and pair.b in around:
            around[pair.a].append((edge, pair.b))
            around[pair.b].append((edge, pair.a))
    for domain in info.domains:
        for member in domain.members:
            if member in around:
                port = domain.port_bandwidth_bytes_per_s
                edge = f"domain/{domain.kind}/{len(domain.members)}/{port}"
                around[member].append((edge, member))
    for _ in range(_ROUNDS):
        colour = {
            name: _hash(colour[name] + "|".join(sorted(f"{e}>{colour[n]}" for e, n in near)))
            for name, near in around.items()
        }
    return _hash(f"{info.num_nodes};" + ";".join(sorted(colour.values())))


def _label(d: Device) -> str:
    shown = {
        k: d.attrs.get(k)
        for k in ("pci_class", "pci_device", "link_layer", "port_bytes_per_s", "mig_mode")
    }
    memory = d.memory_bytes if d.kind in ("gpu", "npu") else None
    return (
        f"{d.kind}/{d.vendor}/{d.model}/{memory}/{cpu_count(d.cpulist)}/{len(d.numa_nodes)}/{shown}"
    )


def _hash(text: str) -> str:
    return str(_blake2b()(text.encode(errors="replace"), digest_size=8).hexdigest())


@functools.cache
def _blake2b() -> Callable[..., Any]:  # Any: the hash object's own type is private
    from hashlib import blake2b  # brings a cryptography library: not at import

    return blake2b
