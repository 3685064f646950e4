"""Topology files of NCCL and RCCL, whole dumps and the PCI skeletons that clouds ship.

A `cpu` is a NUMA node with one host bridge for all below it: host bridges are not told apart
there. Skeletons have no `gpu`: their links are unknown, and live data adds them by bus address.
"""

from __future__ import annotations

from dataclasses import replace

from sagellm.comm.topology._numbers import whole_number
from sagellm.comm.topology._sysfs import gt_per_s, normal_bdf, pcie_bytes_per_s
from sagellm.comm.topology._vendors import CPU_VENDORS, VENDORS, role
from sagellm.core.protocols import (
    Device,
    DeviceKind,
    IntegrityError,
    Link,
    LinkKind,
    SwitchDomain,
    TopologyFragment,
)

from ._fabric import join_switch, socket_links
from ._text import cpu_mask_list
from ._xml import Element
from .matrix import nic_device

__all__ = ["read_nccl", "split_hosts"]

_FABRIC: dict[str, LinkKind] = {"nvlink": "nvlink", "xgmi": "xgmi"}
_SLOWEST_SWITCH = 8.0  # GT/s; no switch above accelerators is of an older generation
_FASTEST_PORT = 10_000_000  # Mb/s
_NVSWITCH, _CPU_BRIDGE = "0x068000", "0x068001"


def read_nccl(system: Element, *, source: str = "") -> TopologyFragment:
    """What a `system` element of one host says.

    Raises:
        IntegrityError: It is a file of NCCL's graphs and not of a topology.

    """
    if system.tag == "graphs":
        raise IntegrityError(
            "a file of NCCL graphs (rings that were chosen) holds no topology; "
            "NCCL_TOPO_DUMP_FILE writes one"
        )
    return _Reading(source or ("rccl-xml" if _has(system, "xgmi") else "nccl-xml")).read(system)


def split_hosts(system: Element) -> list[Element]:
    """The element once for each host that its processors belong to, in the file's order."""
    hosts: dict[str, list[Element]] = {}
    for cpu in system.named("cpu"):
        hosts.setdefault(cpu.attrs.get("host_hash", ""), []).append(cpu)
    if len(hosts) < 2:
        return [system]
    return [Element(system.tag, system.attrs, cpus) for cpus in hosts.values()]


class _Reading:
    def __init__(self, source: str) -> None:
        self._source = source
        self._devices: dict[str, Device] = {}
        self._links: list[Link] = []
        self._bundles: dict[tuple[str, str, LinkKind], int] = {}
        self._into_switch: dict[str, int] = {}
        self._classless: list[str] = []
        self._fabrics: list[tuple[str, str, Element]] = []
        self._idle: list[str] = []
        self._warnings: list[str] = []

    def read(self, system: Element) -> TopologyFragment:
        for number, cpu in enumerate(system.named("cpu")):
            self._cpu(cpu, number)
        for bdf, numa, element in self._fabrics:
            self._fabric(bdf, numa, element)
        nodes = [d.id for d in self._devices.values() if d.kind == "numa"]
        self._links += socket_links(nodes, self._source, self._warnings)
        self._links += [
            Link(a, b, kind, n, source=self._source) for (a, b, kind), n in self._bundles.items()
        ]
        domains: list[SwitchDomain] = []
        if self._into_switch:
            made, links, domains = join_switch("nvlink", self._into_switch, self._source, "stated")
            self._devices.update((d.id, d) for d in made)
            self._links += links
        gpus = [d for d in self._devices.values() if d.kind in ("gpu", "npu")]
        if self._idle:
            self._warnings.append(
                f"{', '.join(self._idle[:4])}: a speed below {_SLOWEST_SWITCH} GT/s with faster "
                f"devices beneath is not believed ({len(self._idle)} bridges)"
            )
        if self._classless:
            self._warnings.append(
                f"{len(self._classless)} PCI functions without a class: "
                "only a live machine tells what they are"
            )
        if gpus and all(d.index is None for d in gpus):
            self._warnings.append("no <gpu> elements: links between GPUs are unknown")
        return TopologyFragment(
            self._source,
            tuple(self._devices.values()),
            tuple(self._links),
            tuple(domains),
            tuple(dict.fromkeys(self._warnings)),
        )

    def _cpu(self, cpu: Element, number: int) -> None:
        text = cpu.attrs.get("numaid", "")
        node = whole_number(text, most=99_999)
        root = f"pci-cpu:{number if node is None else node}"
        numa = "" if node is None else f"numa:{node}"
        self._devices[root] = Device(root, "pci_root", numa_nodes=() if node is None else (node,))
        if node is None:
            self._warnings.append(f"cpu {number} has no NUMA node ({text or 'nothing'!r})")
        else:
            cpus = cpu_mask_list(cpu.attrs.get("affinity"))
            known = ("arch", "vendor", "familyid", "modelid")
            maker = CPU_VENDORS.get(cpu.attrs.get("vendor", ""))
            attrs = {f"cpu_{k}": v for k in known if (v := cpu.attrs.get(k))}
            if cpus == "":
                attrs["cpuless"] = "yes"
            self._devices[numa] = Device(
                numa, "numa", vendor=maker, numa_nodes=(node,), cpulist=cpus or None, attrs=attrs
            )
            self._links.append(Link(root, numa, "host_bridge", source=self._source))
        for child in cpu.children:
            if child.tag == "pci":
                self._pci(child, root, node, numa)
            elif child.tag == "nic":
                self._nets(child, root, node, None)

    def _pci(self, pci: Element, above: str, node: int | None, numa: str) -> float | None:
        """Add a function and all below it; gives its transfer rate."""
        bdf = normal_bdf(pci.attrs.get("busid", ""))
        if bdf is None:
            self._warnings.append(f"bus address {pci.attrs.get('busid', '')[:40]!r} is none")
            return None
        speed, width = pci.attrs.get("link_speed"), pci.attrs.get("link_width")
        rate, bandwidth = gt_per_s(speed), pcie_bytes_per_s(speed, width)
        below = [self._pci(c, bdf, node, numa) for c in pci.named("pci")]
        if rate and rate < _SLOWEST_SWITCH and any(r and r > rate for r in below):
            # The speed of an idle port. (Above cards with a switch of their own less is usual.)
            self._idle.append(bdf)
            rate = bandwidth = speed = None
        kind = self._kind(pci)
        if kind is None:
            self._classless.append(bdf)
        else:
            self._devices[bdf] = self._function(pci, bdf, kind, node, speed)
        self._links.append(
            Link(bdf, above, "pcie", bandwidth_bytes_per_s=bandwidth, source=self._source)
        )
        for gpu in pci.named("gpu"):
            self._gpu(gpu, bdf, numa)
        for nic in pci.named("nic"):
            self._nets(nic, above, node, bdf)
        return rate

    def _kind(self, pci: Element) -> DeviceKind | None:
        if pci.named("gpu"):
            named = role(_class(pci), pci.attrs.get("vendor"), on_root_bus=False)
            return named if named in ("gpu", "npu") else "gpu"
        if pci.named("nic"):
            return "nic"
        if pci.named("pci"):
            return "pci_switch"
        code = _class(pci)
        base, sub = code >> 16, code >> 8
        if sub == 0x0604:
            return "pci_switch"
        if sub == 0x0680:
            return "fabric_switch"
        if base == 0x03 and "vendor" not in pci.attrs:
            return "gpu"
        return role(code, pci.attrs.get("vendor"), on_root_bus=False) if code else None

    def _function(
        self, pci: Element, bdf: str, kind: DeviceKind, node: int | None, speed: str | None
    ) -> Device:
        vendor = pci.attrs.get("vendor", "").lower()
        vendor = "" if vendor in ("0xffff", "0x0000") else vendor
        attrs = {
            "pci_class": pci.attrs.get("class"),
            "pci_vendor": vendor,
            "pci_device": pci.attrs.get("device") if vendor else None,
            "max_link_speed": speed,
            "max_link_width": pci.attrs.get("link_width") if speed else None,
        }
        maker = VENDORS.get(vendor, vendor) or None
        if maker is None and kind == "gpu":
            amd = _has(pci, "xgmi") or any("gcn" in g.attrs for g in pci.named("gpu"))
            maker = "amd" if amd else "nvidia" if _has(pci, "nvlink") else None
        nodes = () if node is None or kind == "pci_switch" else (node,)
        return Device(
            bdf,
            kind,
            vendor=maker,
            bdf=bdf,
            numa_nodes=nodes,
            attrs={k: v for k, v in attrs.items() if v},
        )

    def _gpu(self, gpu: Element, bdf: str, numa: str) -> None:
        device = self._devices[bdf]
        facts = {k: v for k in ("sm", "gcn", "rank") if (v := gpu.attrs.get(k))}
        self._devices[bdf] = replace(
            device,
            index=whole_number(gpu.attrs.get("dev"), most=99_999),
            attrs={**device.attrs, **facts},
        )
        self._fabrics += [(bdf, numa, child) for child in gpu.children]

    def _fabric(self, bdf: str, numa: str, element: Element) -> None:
        """One way out of a GPU, once all functions are known."""
        count = _number(element, "count") or 1
        if element.tag == "c2c":
            speed = _number(element, "bw")
            if numa:
                self._links.append(
                    Link(bdf, numa, "c2c", count, speed * 1e6 * count if speed else None,
                         source=self._source)
                )  # fmt: skip
            return
        kind = _FABRIC.get(element.tag)
        if kind is None:
            return
        target = normal_bdf(element.attrs.get("target", ""))
        into = element.attrs.get("tclass", "").lower()
        known = self._devices.get(target or "")
        if into == _NVSWITCH or (known is not None and known.kind == "fabric_switch"):
            self._into_switch[bdf] = self._into_switch.get(bdf, 0) + count
            if target is not None and known is None:
                switch = Device(target, "fabric_switch", vendor="nvidia", bdf=target)
                self._devices[target] = switch
        elif into == _CPU_BRIDGE and numa:
            self._links.append(Link(bdf, numa, kind, count, source=self._source))
        elif known is None or target is None or target == bdf:
            where = "itself" if target == bdf else f"unknown {element.attrs.get('target', '')[:40]}"
            self._warnings.append(f"{bdf}: {count} {kind} to {where}; left out")
        else:
            key = (min(bdf, target), max(bdf, target), kind)
            self._bundles[key] = max(self._bundles.get(key, 0), count)

    def _nets(self, nic: Element, above: str, node: int | None, bdf: str | None) -> None:
        """The ports of a NIC: of a PCI function, or of none."""
        names = [n.attrs.get("name", "") for n in nic.named("net")]
        speeds = [_number(n, "speed") or 0 for n in nic.named("net")]
        if max(speeds, default=0) > _FASTEST_PORT:
            told = f"{max(speeds)} Mb/s of {', '.join(names)}"
            self._warnings.append(f"{told} is more than any port has: its rate is unknown")
        total = sum(speed for speed in speeds if speed <= _FASTEST_PORT)
        facts = {"port_bytes_per_s": str(total * 125_000)} if total else {}
        for name in dict.fromkeys(n for n in names if n):
            device = nic_device(name, **facts)
            if bdf is not None:
                mine = self._devices[bdf]
                label = "netdev" if "netdev" in device.attrs else "ib"
                joined = ",".join(x for x in (mine.attrs.get(label), name) if x)
                self._devices[bdf] = replace(mine, attrs={**mine.attrs, **facts, label: joined})
                continue
            nodes = () if node is None else (node,)
            self._devices[device.id] = replace(device, numa_nodes=nodes)
            self._links.append(Link(device.id, above, "pcie", source=self._source))


def _class(pci: Element) -> int:
    try:
        return int(pci.attrs.get("class", ""), 16) & 0xFFFFFF
    except ValueError:
        return 0


def _number(element: Element, name: str) -> int | None:
    return whole_number(element.attrs.get(name), most=999_999_999) or None


def _has(element: Element, tag: str) -> bool:
    return any(c.tag == tag or _has(c, tag) for c in element.children)
