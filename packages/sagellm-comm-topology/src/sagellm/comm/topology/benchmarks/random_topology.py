"""Machines drawn by chance, with links that devices share: switches, sockets, ports, spines."""

from __future__ import annotations

import random
from dataclasses import replace

from sagellm.comm.topology._fingerprint import fingerprint
from sagellm.core.protocols import Device, Link, LinkKind, TopologyInfo

__all__ = ["random_topology"]


def random_topology(seed: int, *, most_gpus: int = 12) -> TopologyInfo:
    """A topology of 2 to `most_gpus` accelerators in 1 to 3 hosts; equal for equal seeds."""
    rng = random.Random(seed)
    hosts = rng.choice((1, 1, 2, 2, 3))
    gpus = rng.randint(2 if hosts == 1 else 1, max(2, most_gpus // hosts))
    shape = _Shape(rng, gpus)
    accelerators: list[Device] = []
    others: list[Device] = []
    links: list[Link] = []
    for node in range(hosts):
        _host(shape, node, accelerators, others, links)
    if hosts > 1:
        _network(rng, hosts, shape.nics, others, links)
    order = list(accelerators)
    if rng.random() < 0.3:  # driver order need not follow the tree
        rng.shuffle(order)
    info = TopologyInfo(devices=(*order, *others), links=tuple(links), num_nodes=hosts)
    return replace(info, fingerprint=fingerprint(info))


class _Shape:
    """What the hosts of one topology have in common."""

    def __init__(self, rng: random.Random, gpus: int) -> None:
        self.gpus = gpus
        self.per_switch = rng.choice((1, 2, 2, 4))
        self.sockets = 1 if gpus < 3 else rng.choice((1, 2, 2))
        self.nics = rng.choice((1, 1, 2, gpus))
        self.pcie = rng.choice((12e9, 25e9, 50e9))
        self.socket = rng.choice((10e9, 20e9, 40e9))
        self.fabric = rng.choice(("none", "none", "switch", "pairs", "ring"))
        self.fabric_rate = rng.choice((50e9, 150e9, 450e9))


def _host(
    shape: _Shape, node: int, accelerators: list[Device], others: list[Device], links: list[Link]
) -> None:
    n = f"n{node}"
    for s in range(shape.sockets):
        others.append(Device(f"{n}/numa:{s}", "numa", numa_nodes=(s,), node=node))
        others.append(Device(f"{n}/root{s}", "pci_root", node=node))
        links.append(_link(f"{n}/root{s}", f"{n}/numa:{s}", "host_bridge", 2 * shape.pcie))
    if shape.sockets == 2:
        links.append(_link(f"{n}/numa:0", f"{n}/numa:1", "socket", shape.socket))
    switches = -(-shape.gpus // shape.per_switch)
    for i in range(switches):
        s = i * shape.sockets // switches
        others.append(Device(f"{n}/sw{i}", "pci_switch", node=node))
        links.append(_link(f"{n}/sw{i}", f"{n}/root{s}", "pcie", shape.pcie))
    for i in range(shape.nics):
        others.append(Device(f"{n}/nic{i}", "nic", node=node, attrs={"rail": str(i)}))
        links.append(
            _link(f"{n}/nic{i}", f"{n}/sw{i * switches // shape.nics}", "pcie", shape.pcie)
        )
    names = [f"{n}/gpu{g}" for g in range(shape.gpus)]
    for g, name in enumerate(names):
        accelerators.append(Device(name, "gpu", index=g, node=node))
        links.append(_link(name, f"{n}/sw{g // shape.per_switch}", "pcie", shape.pcie))
    if shape.fabric == "switch":
        others.append(Device(f"{n}/fabric", "fabric_switch", node=node))
        links += [_link(name, f"{n}/fabric", "nvlink", shape.fabric_rate) for name in names]
    elif shape.fabric == "pairs":
        for a, b in zip(names[::2], names[1::2], strict=False):
            links.append(_link(a, b, "nvlink", shape.fabric_rate))
    elif shape.fabric == "ring" and shape.gpus > 2:
        for a, b in zip(names, [*names[1:], names[0]], strict=True):
            links.append(_link(a, b, "nvlink", shape.fabric_rate))


def _network(
    rng: random.Random, hosts: int, nics: int, others: list[Device], links: list[Link]
) -> None:
    rate = rng.choice((3e9, 12e9, 25e9, 50e9))
    leaves = rng.choice((1, nics))
    uplink = rate * rng.choice((0.5, 1.0, 2.0)) * nics
    for i in range(leaves):
        others.append(Device(f"net:leaf{i}", "fabric_switch", node=-1))
    if leaves > 1:
        others.append(Device("net:spine", "fabric_switch", node=-1))
        links += [_link(f"net:leaf{i}", "net:spine", "infiniband", uplink) for i in range(leaves)]
    for node in range(hosts):
        for i in range(nics):
            links.append(_link(f"n{node}/nic{i}", f"net:leaf{i % leaves}", "infiniband", rate))


def _link(a: str, b: str, kind: LinkKind, bytes_per_s: float) -> Link:
    return Link(a, b, kind, bandwidth_bytes_per_s=bytes_per_s, source="random")
