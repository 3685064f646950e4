"""Clusters that exist only as figures: equal hosts, rails, leaf and spine switches.

For planning and for tests of size; a real cluster comes from `TopologyManager.gather`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sagellm.core.protocols import ConfigError, Device, Link, LinkKind, TopologyInfo

from ._fingerprint import fingerprint

__all__ = ["ClusterShape", "make_cluster"]


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """What a cluster is made of. Bandwidths are bytes per second and direction.

    Attributes:
        nodes: Hosts.
        gpus: Accelerators in each host.
        nics: Network ports in each host, at least 1 and at most `gpus`; GPU i uses port
            `i * nics // gpus`, and port i of every host is rail i.
        fabric_bytes_per_s: Of one GPU into its host's switched fabric; 0 means that there is
            none and GPUs meet on PCIe.
        pcie_bytes_per_s: Of a GPU or NIC to its PCIe switch.
        nic_bytes_per_s: Of a port.
        rack_nodes: Hosts below one set of leaf switches, one leaf per rail.
        oversubscription: How many times the ports of a leaf exceed its way to the spine.

    """

    nodes: int = 1
    gpus: int = 8
    nics: int = 8
    fabric_bytes_per_s: float = 450e9
    pcie_bytes_per_s: float = 63e9
    nic_bytes_per_s: float = 50e9
    rack_nodes: int = 32
    oversubscription: float = 1.0

    def __post_init__(self) -> None:
        counts = (self.nodes, self.gpus, self.nics, self.rack_nodes)
        rates = (self.pcie_bytes_per_s, self.nic_bytes_per_s, self.oversubscription)
        if min(counts) < 1 or self.nics > self.gpus:
            raise ConfigError(
                f"{self.nodes} nodes of {self.gpus} GPUs and {self.nics} ports, "
                f"{self.rack_nodes} in a rack: needs at least 1 of each, and a GPU for each port"
            )
        if not (all(r > 0 for r in rates) and self.fabric_bytes_per_s >= 0):
            raise ConfigError(
                f"bandwidths {rates[:2]} and oversubscription {self.oversubscription} must be "
                f"above 0, that of the fabric ({self.fabric_bytes_per_s}) at least 0"
            )


def make_cluster(shape: ClusterShape) -> TopologyInfo:
    """The topology of a cluster of that shape; GPU g of host n is `n<n>/gpu<g>`."""
    accelerators: list[Device] = []
    others: list[Device] = []
    links: list[Link] = []
    for node in range(shape.nodes):
        _add_host(shape, node, accelerators, others, links)
    if shape.nodes > 1:
        _add_network(shape, others, links)
    info = TopologyInfo(devices=(*accelerators, *others), links=tuple(links), num_nodes=shape.nodes)
    return replace(info, fingerprint=fingerprint(info))


def _add_host(
    shape: ClusterShape,
    node: int,
    accelerators: list[Device],
    others: list[Device],
    links: list[Link],
) -> None:
    n = f"n{node}"
    width = shape.pcie_bytes_per_s
    sockets = 2 if shape.gpus > 1 else 1
    for s in range(sockets):
        others.append(Device(f"{n}/numa:{s}", "numa", numa_nodes=(s,), node=node))
        others.append(Device(f"{n}/root{s}", "pci_root", numa_nodes=(s,), node=node))
        links.append(_link(f"{n}/root{s}", f"{n}/numa:{s}", "host_bridge", 2 * width))
    if sockets == 2:
        links.append(_link(f"{n}/numa:0", f"{n}/numa:1", "socket", 2 * width))
    for i in range(shape.nics):
        s = i * sockets // shape.nics
        others.append(Device(f"{n}/sw{i}", "pci_switch", node=node))
        links.append(_link(f"{n}/sw{i}", f"{n}/root{s}", "pcie", width))
        attrs = {"ib": f"mlx5_{i}", "rail": str(i)}
        others.append(Device(f"{n}/nic{i}", "nic", numa_nodes=(s,), node=node, attrs=attrs))
        links.append(_link(f"{n}/nic{i}", f"{n}/sw{i}", "pcie", width))
    if shape.fabric_bytes_per_s:
        others.append(Device(f"{n}/fabric", "fabric_switch", node=node))
    for g in range(shape.gpus):
        port = g * shape.nics // shape.gpus
        s = port * sockets // shape.nics
        name = f"{n}/gpu{g}"
        accelerators.append(Device(name, "gpu", numa_nodes=(s,), index=g, node=node))
        links.append(_link(name, f"{n}/sw{port}", "pcie", width))
        if shape.fabric_bytes_per_s:
            links.append(_link(name, f"{n}/fabric", "nvlink", shape.fabric_bytes_per_s))


def _add_network(shape: ClusterShape, others: list[Device], links: list[Link]) -> None:
    racks = -(-shape.nodes // shape.rack_nodes)
    uplink = shape.rack_nodes * shape.nic_bytes_per_s / shape.oversubscription
    if racks > 1 or shape.nics > 1:
        others.append(Device("net:spine", "fabric_switch", node=-1))
    for rack in range(racks):
        for rail in range(shape.nics):
            leaf = f"net:leaf{rack}.{rail}"
            others.append(Device(leaf, "fabric_switch", node=-1, attrs={"rack": str(rack)}))
            if racks > 1 or shape.nics > 1:
                links.append(_link(leaf, "net:spine", "infiniband", uplink))
    for node in range(shape.nodes):
        for rail in range(shape.nics):
            leaf = f"net:leaf{node // shape.rack_nodes}.{rail}"
            links.append(_link(f"n{node}/nic{rail}", leaf, "infiniband", shape.nic_bytes_per_s))


def _link(a: str, b: str, kind: LinkKind, bytes_per_s: float) -> Link:
    return Link(a, b, kind, bandwidth_bytes_per_s=bytes_per_s, source="plan")
