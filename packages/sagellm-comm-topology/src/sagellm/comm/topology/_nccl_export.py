"""A topology as the XML that NCCL and RCCL read from `NCCL_TOPO_FILE`.

They fill what is missing from the live machine: attributes that are not known are left out, and a
skeleton leaves the GPUs' and NICs' own elements out too, which is what a virtual machine needs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import quoteattr

from sagellm.core.protocols import ConfigError, Device, Link, TopologyInfo

from ._numbers import number, whole_number
from ._sysfs import pcie_bytes_per_s
from ._words import some
from ._xml_text import xml_text

__all__ = ["to_nccl_xml"]

_log = logging.getLogger(__name__)

_MOST_DEPTH = 128  # of bridges above each other; a bus has 256 numbers, and ours reads 200 elements
_LINKS = frozenset(("pcie", "host_bridge", "socket", "nvlink", "xgmi", "c2c"))
_CLASSES = {"gpu": "0x030200", "npu": "0x120000", "nic": "0x020000", "pci_switch": "0x060400",
            "fabric_switch": "0x068000"}  # fmt: skip
_SPEEDS = (2.5, 5.0, 8.0, 16.0, 32.0, 64.0)
_WIDTHS = (16, 8, 4, 2, 1, 32)
_VENDOR_IDS = {"nvidia": "0x10de", "amd": "0x1002"}


def to_nccl_xml(info: TopologyInfo, *, skeleton: bool = False) -> str:
    """NCCL's topology file of one host.

    What the format has no words for is left out and logged as a warning: links of other fabrics,
    and an unknown place, which NCCL takes for one processor that all such devices are below.

    Args:
        info: What is known of the host.
        skeleton: Write CPUs and PCI functions alone.

    Raises:
        ConfigError: The topology is of several hosts, an accelerator has no bus address, by
            which alone NCCL knows it, or a chain of bridges has no end in sight.

    """
    if info.num_nodes > 1:
        raise ConfigError(f"NCCL's file describes one host, not {info.num_nodes}: export each")
    nameless = [d.id for d in info.accelerators if d.bdf is None]
    if nameless:
        raise ConfigError(
            f"no bus address is known of {some(nameless)}, and NCCL's file names devices by "
            "nothing else: read them together with what tells it (`import --live`, `lspci -nn`)"
        )
    return _Writer(info, skeleton=skeleton).text()


@dataclass(slots=True)
class _Vertex:
    """A PCI function or a host bridge with what hangs below it."""

    device: Device
    bandwidth: float | None = None
    children: list[_Vertex] = field(default_factory=list)


class _Writer:
    def __init__(self, info: TopologyInfo, *, skeleton: bool) -> None:
        self._info = info
        self._skeleton = skeleton
        self._devices = {d.id: d for d in info.devices}
        self._links: dict[str, list[Link]] = {}
        for link in info.links:
            self._links.setdefault(link.a, []).append(link)
            self._links.setdefault(link.b, []).append(link)
        self._nodes = {d.numa_nodes[0] for d in info.devices if d.kind == "numa" and d.numa_nodes}
        self._lines: list[str] = []
        self._placed: set[str] = set()

    def text(self) -> str:
        below: dict[int, list[_Vertex]] = {node: [] for node in self._nodes}
        for root in (d for d in self._info.devices if d.kind == "pci_root"):
            below.setdefault(self._node(root), []).extend(self._tree(root, None).children)
        for device in self._info.devices:
            if device.kind in ("gpu", "npu", "nic") and device.id not in self._placed:
                node = self._known(device.numa_nodes)
                below.setdefault(node, []).append(_Vertex(device))
        self._tell(below.get(-1, ()))
        amd = any(d.vendor == "amd" for d in self._info.accelerators)
        # RCCL refuses files of another version than its own.
        version = 2 if amd or any(x.kind == "xgmi" for x in self._info.links) else 1
        self._open(0, "system", {"version": str(version)})
        for node, vertices in sorted(below.items()):
            self._cpu(node, vertices)
        self._lines.append("</system>")
        return "\n".join(self._lines) + "\n"

    def _known(self, nodes: tuple[int, ...]) -> int:
        """The first NUMA node; -1, as NCCL writes unknown ones, if the machine has no such."""
        here = [n for n in nodes if n in self._nodes or not self._nodes]
        return here[0] if here else -1

    def _tell(self, homeless: Sequence[_Vertex]) -> None:
        """Warn of what the file cannot say."""
        if len(homeless) > 1:
            _log.warning(
                "the place of %s is unknown, and NCCL will take them for neighbours below one "
                "processor (numaid -1)",
                some([v.device.id for v in homeless]),
            )
        lost = Counter(x.kind for x in self._info.links if x.kind not in _LINKS)
        for kind, count in sorted(lost.items()):
            _log.warning("NCCL's file has no word for %s links: %d left out", kind, count)
        for domain in self._info.domains:
            if not domain.members:
                _log.warning("%s is left out: nothing says which devices are on it", domain.id)

    def _other(self, link: Link, one: str) -> str:
        return link.a if link.b == one else link.b

    def _node(self, root: Device) -> int:
        """NUMA node of a host bridge; NCCL writes -1 for an unknown one."""
        for link in self._links.get(root.id, ()):
            numa = self._devices.get(self._other(link, root.id))
            if link.kind == "host_bridge" and numa is not None and numa.numa_nodes:
                return numa.numa_nodes[0]
        return self._known(root.numa_nodes)

    def _tree(self, device: Device, bandwidth: float | None, depth: int = 0) -> _Vertex:
        if depth > _MOST_DEPTH:
            raise ConfigError(f"more than {_MOST_DEPTH} bridges are above {device.id}")
        self._placed.add(device.id)
        vertex = _Vertex(device, bandwidth)
        for link in self._links.get(device.id, ()):
            child = self._devices.get(self._other(link, device.id))
            if link.kind == "pcie" and child is not None and child.id not in self._placed:
                vertex.children.append(self._tree(child, link.bandwidth_bytes_per_s, depth + 1))
        vertex.children.sort(key=lambda v: v.device.id)
        return vertex

    def _cpu(self, node: int, vertices: list[_Vertex]) -> None:
        numa = self._devices.get(f"numa:{node}")
        attrs = {"numaid": str(node)}
        if numa is not None:
            mask = _mask(numa.cpulist)
            if mask or numa.attrs.get("cpuless"):
                attrs["affinity"] = mask or "0"
            for name in ("arch", "vendor", "familyid", "modelid"):
                if value := numa.attrs.get(f"cpu_{name}"):
                    attrs[name] = value
        self._element(1, "cpu", attrs, vertices)

    def _element(
        self,
        depth: int,
        tag: str,
        attrs: dict[str, str],
        below: Sequence[_Vertex],
        inner: Sequence[str] = (),
    ) -> None:
        if not below and not inner:
            self._lines.append("  " * depth + _tag(tag, attrs, closed=True))
            return
        self._open(depth, tag, attrs)
        self._lines += inner
        for vertex in sorted(below, key=lambda v: v.device.id):
            self._vertex(depth + 1, vertex)
        self._lines.append("  " * depth + f"</{tag}>")

    def _open(self, depth: int, tag: str, attrs: dict[str, str]) -> None:
        self._lines.append("  " * depth + _tag(tag, attrs, closed=False))

    def _vertex(self, depth: int, vertex: _Vertex) -> None:
        device = vertex.device
        if device.bdf is None:
            if device.kind == "nic" and not self._skeleton:
                self._lines += self._nets(device, depth)
            for child in vertex.children:  # of a bridge that has no address to be named by
                self._vertex(depth, child)
            return
        known = device.attrs
        speed, width = known.get("max_link_speed"), known.get("max_link_width")
        if not (speed and width):
            speed, width = _speed_width(vertex.bandwidth)
        attrs = {
            "busid": device.bdf,
            "class": known.get("pci_class") or _CLASSES.get(device.kind, "0x088000"),
            "vendor": known.get("pci_vendor") or _VENDOR_IDS.get(device.vendor or "") or "",
            "device": known.get("pci_device") or "",
            "link_speed": speed or "",
            "link_width": width or "",
        }
        attrs = {k: v for k, v in attrs.items() if v}
        inner = [] if self._skeleton else self._inner(device, depth + 1)
        self._element(depth, "pci", attrs, vertex.children, inner)

    def _inner(self, device: Device, depth: int) -> list[str]:
        if device.kind == "nic":
            return self._nets(device, depth)
        if device.kind not in ("gpu", "npu") or device.index is None:
            return []
        attrs = {"dev": str(device.index)}
        attrs |= {k: v for k in ("sm", "gcn", "rank") if (v := device.attrs.get(k))}
        ways = [way for link in self._links.get(device.id, ()) for way in self._ways(device, link)]
        if not ways:
            return ["  " * depth + _tag("gpu", attrs, closed=True)]
        return [
            "  " * depth + _tag("gpu", attrs, closed=False),
            *("  " * (depth + 1) + way for way in ways),
            "  " * depth + "</gpu>",
        ]

    def _ways(self, device: Device, link: Link) -> list[str]:
        """Elements of one link out of a GPU."""
        other = self._devices.get(self._other(link, device.id))
        if other is None:
            return []
        if link.kind == "c2c":
            speed = link.bandwidth_bytes_per_s
            each = str(round(speed / link.count / 1e6)) if speed else ""
            attrs = {"bw": each, "count": str(link.count)}
            return [_tag("c2c", {k: v for k, v in attrs.items() if v}, closed=True)]
        if link.kind not in ("nvlink", "xgmi"):
            return []
        if other.kind == "fabric_switch":
            known = sorted(
                d.bdf for d in self._info.devices if d.kind == "fabric_switch" and d.bdf is not None
            )
            targets = known or ["ffff:ff:00.0"]
            share, rest = divmod(link.count, len(targets))
            counts = {t: share + (i < rest) for i, t in enumerate(targets)}
            into = "0x068000"
        elif other.kind == "numa":
            counts, into = {"0000:00:00.0": link.count}, "0x068001"
        elif other.bdf is not None:
            counts = {other.bdf: link.count}
            into = other.attrs.get("pci_class") or _CLASSES[other.kind]
        else:
            return []
        return [
            _tag(link.kind, {"target": t, "count": str(n), "tclass": into}, closed=True)
            for t, n in counts.items()
            if n
        ]

    def _nets(self, device: Device, depth: int) -> list[str]:
        # A card's RDMA names stand for its ports; without any its net interfaces do.
        listed = device.attrs.get("ib") or device.attrs.get("netdev") or ""
        names = [n for n in listed.split(",") if n]
        down = device.attrs.get("netdev_down", "").split(",")
        names = [n for n in names if n not in down] or names
        if not names:
            return []
        port = number(device.attrs.get("port_bytes_per_s")) or 0.0
        share = int(port) // 125_000 // len(names)
        lines = ["  " * depth + "<nic>"]
        for name in names:
            attrs = {"name": name, "speed": str(share)} if share else {"name": name}
            lines.append("  " * (depth + 1) + _tag("net", attrs, closed=True))
        return [*lines, "  " * depth + "</nic>"]


def _tag(name: str, attrs: dict[str, str], *, closed: bool) -> str:
    words = "".join(f" {key}={quoteattr(xml_text(value))}" for key, value in attrs.items())
    return f"<{name}{words}{'/' if closed else ''}>"


def _mask(cpulist: str | None) -> str:
    """A list of CPUs as 32-bit words in hexadecimal, highest first; "" when unknown."""
    mask = 0
    for part in (cpulist or "").split(","):
        first, _, last = part.partition("-")
        low, high = (whole_number(x, most=(1 << 16) - 1) for x in (first, last or first))
        if low is not None and high is not None and low <= high:
            mask |= (1 << high + 1) - (1 << low)
    words: list[str] = []
    while mask:
        words.insert(0, f"{mask & 0xFFFFFFFF:08x}")
        mask >>= 32
    return ",".join(words)


def _speed_width(bandwidth: float | None) -> tuple[str | None, str | None]:
    """The link that has a bandwidth, as NCCL writes it; the widest if several have."""
    for width in _WIDTHS if bandwidth else ():
        for speed in _SPEEDS:
            candidate = pcie_bytes_per_s(f"{speed} GT/s", str(width))
            if candidate and bandwidth and abs(candidate - bandwidth) < 0.01 * bandwidth:
                return f"{speed} GT/s PCIe", str(width)
    return None, None
