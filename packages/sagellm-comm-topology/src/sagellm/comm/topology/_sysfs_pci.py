"""Accelerators, NICs, switches and host bridges out of `/sys/bus/pci`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from sagellm.core.protocols import (
    DetectionContext,
    DetectorSpec,
    Device,
    DeviceKind,
    Link,
    TopologyFragment,
)

from ._numbers import whole_number
from ._pcitree import vertices_above
from ._sysfs import Tree, normal_bdf, pcie_bytes_per_s
from ._vendors import VENDORS, role
from ._words import some

__all__ = ["SPEC", "PciDetector"]

_DEVICES = "/sys/bus/pci/devices"
_ROOT = re.compile(r"^pci([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2})$")
_BRIDGE = 0x0604


@dataclass(slots=True)
class _Function:
    """One PCI function: where it is and what it says of itself."""

    bdf: str
    folder: str
    root: str | None
    above: tuple[str, ...]  # addresses from the host bridge down, itself left out
    class_code: int | None
    vendor: str | None
    device: str | None
    driver: str | None


class PciDetector:
    """Reads the PCI tree; the same machine gives the same fragment."""

    def detect(self, ctx: DetectionContext) -> TopologyFragment:
        """What the PCI tree says, never raising; see `Detector`."""
        tree = Tree(ctx.root)
        names = tree.names(_DEVICES)
        if names is None:
            return TopologyFragment(
                "sysfs-pci",
                warnings=(f"{_DEVICES} cannot be listed: PCI devices and paths are unknown",),
            )
        warnings: list[str] = []
        functions = {f.bdf: f for f in (_read(tree, name) for name in names) if f is not None}
        unread = sorted(f.bdf for f in functions.values() if f.class_code is None)
        if unread:
            warnings.append(f"PCI class unreadable, left out: {some(unread)}")
        nameless = [f.bdf for f in functions.values() if f.vendor is None and _may_compute(f)]
        if nameless:
            warnings.append(f"maker unreadable, perhaps an accelerator: {some(nameless)}")
        builder = _Builder(tree, functions)
        late = builder.add_endpoints(ctx)
        if late:
            warnings.append(f"deadline reached with {late} PCI functions unread")
        if builder.rootless:
            warnings.append(f"no place in the PCI tree, paths unknown: {some(builder.rootless)}")
        builder.add_roots()
        return TopologyFragment(
            "sysfs-pci",
            devices=tuple(builder.devices.values()),
            links=tuple(builder.links.values()),
            warnings=tuple(warnings),
        )


SPEC = DetectorSpec("sysfs-pci", 60, PciDetector)
"""The PCI detector as its entry point offers it."""


class _Builder:
    """Turns functions into vertices and edges, sharing switches and host bridges."""

    def __init__(self, tree: Tree, functions: dict[str, _Function]) -> None:
        self._tree = tree
        self._functions = functions
        self._bandwidth: dict[str, float | None] = {}
        self._virtual: dict[str, list[str]] = {}
        self._root_numa: dict[str, set[int]] = {}
        self._root_vendors: dict[str, set[str]] = {}
        self.devices: dict[str, Device] = {}
        self.links: dict[tuple[str, str], Link] = {}
        self.rootless: list[str] = []

    def add_endpoints(self, ctx: DetectionContext) -> int:
        """Add every function that matters; returns how many the deadline cut off."""
        wanted = [(f, kind) for f in self._functions.values() if (kind := self._role(f))]
        shared = Counter(f.above[-1] for f, _ in wanted if f.above)
        for done, (function, kind) in enumerate(wanted):
            if ctx.clock() > ctx.deadline_s:
                return len(wanted) - done
            self._add_endpoint(function, kind, shared)
        return 0

    def add_roots(self) -> None:
        """Add the host bridges that were met, joined to the NUMA nodes their devices name."""
        for f in self._functions.values():
            if f.root in self._root_vendors and f.vendor:
                self._root_vendors[f.root].add(f.vendor)
        for root, vendors in self._root_vendors.items():
            nodes = sorted(self._root_numa.get(root, ()))
            self.devices[root] = Device(
                root,
                "pci_root",
                numa_nodes=tuple(nodes),
                attrs={"pci_vendors": ",".join(sorted(vendors))},
            )
            for node in nodes:
                self._link(root, f"numa:{node}", None, "host_bridge")

    def _role(self, f: _Function) -> DeviceKind | None:
        if f.class_code is None:
            return None
        kind = role(f.class_code, f.vendor, on_root_bus=not f.above)
        owner = self._physical_function(f) if kind == "nic" else None
        if owner is not None:
            self._virtual.setdefault(owner, []).append(f.bdf)
            return None
        return kind

    def _physical_function(self, f: _Function) -> str | None:
        """The function that a virtual one belongs to, if it is here to stand for it."""
        link = self._tree.target(f"{f.folder}/physfn")
        owner = normal_bdf(link.rpartition("/")[2]) if link else None
        return owner if owner in self._functions else None

    def _add_endpoint(self, f: _Function, kind: DeviceKind, shared: Counter[str]) -> None:
        node = whole_number(self._tree.read(f"{f.folder}/numa_node"))  # -1 when unknown
        # With node -1 the kernel lists every CPU as local: that is not knowledge.
        cpulist = self._tree.read(f"{f.folder}/local_cpulist") if node is not None else None
        attrs = {
            "pci_class": f"0x{f.class_code:06x}",
            "pci_vendor": f.vendor,
            "pci_device": f.device,
            "driver": f.driver,
            "max_link_speed": self._tree.read(f"{f.folder}/max_link_speed"),
            "max_link_width": self._tree.read(f"{f.folder}/max_link_width"),
            "virtual_functions": ",".join(sorted(self._virtual.get(f.bdf, ()))),
        }
        self.devices[f.bdf] = Device(
            f.bdf,
            kind,
            vendor=VENDORS.get(f.vendor or "", f.vendor),
            bdf=f.bdf,
            numa_nodes=() if node is None else (node,),
            cpulist=cpulist or None,
            attrs={k: v for k, v in attrs.items() if v},
        )
        if f.root is None:
            self.rootless.append(f.bdf)
            return
        self._root_vendors.setdefault(f.root, set())
        if node is not None:
            self._root_numa.setdefault(f.root, set()).add(node)
        self._join(f, shared)

    def _join(self, f: _Function, shared: Counter[str]) -> None:
        """Walk up from a function to its host bridge, adding what is on the way."""
        assert f.root is not None
        below, port_above = f.bdf, f.above[-1] if f.above else None
        bridges = [self._is_bridge(b) for b in f.above]
        for i, is_root_port in vertices_above(bridges, shared[f.above[-1]] if f.above else 0):
            bridge = f.above[i]
            self._add_switch(bridge, is_root_port=is_root_port)
            self._link(below, bridge, self._pair_bandwidth(below, port_above))
            below, port_above = bridge, f.above[i - 1] if i else None
        self._link(below, f.root, self._pair_bandwidth(below, port_above))

    def _is_bridge(self, bdf: str) -> bool:
        f = self._functions.get(bdf)
        # A bridge that cannot be read is still a bridge: something is behind it.
        return f is None or f.class_code is None or f.class_code >> 8 == _BRIDGE

    def _add_switch(self, bdf: str, *, is_root_port: bool) -> None:
        if bdf in self.devices:
            return
        f = self._functions.get(bdf)
        attrs = {"role": "root_port" if is_root_port else "switch"}
        if f is not None and f.vendor:
            attrs["pci_vendor"] = f.vendor
        vendor = VENDORS.get(f.vendor or "", f.vendor) if f else None
        self.devices[bdf] = Device(bdf, "pci_switch", vendor=vendor, bdf=bdf, attrs=attrs)

    def _pair_bandwidth(self, *ports: str | None) -> float | None:
        """What two ports can do together: the lesser maximum, as idle links report less."""
        known = [b for port in ports if port and (b := self._max_bandwidth(port))]
        return min(known) if known else None

    def _max_bandwidth(self, bdf: str) -> float | None:
        if bdf not in self._bandwidth:
            f = self._functions.get(bdf)
            if f is None:
                self._bandwidth[bdf] = None
            else:
                self._bandwidth[bdf] = pcie_bytes_per_s(
                    self._tree.read(f"{f.folder}/max_link_speed"),
                    self._tree.read(f"{f.folder}/max_link_width"),
                )
        return self._bandwidth[bdf]

    def _link(
        self, a: str, b: str, bandwidth: float | None, kind: Literal["pcie", "host_bridge"] = "pcie"
    ) -> None:
        if (a, b) not in self.links:
            self.links[a, b] = Link(a, b, kind, bandwidth_bytes_per_s=bandwidth, source="sysfs-pci")


def _read(tree: Tree, name: str) -> _Function | None:
    bdf = normal_bdf(name)
    if bdf is None:
        return None
    folder = f"{_DEVICES}/{name}"
    target = tree.target(folder)
    root, above = _place((target or "").split("/"), bdf)
    # One read gives class, ids and driver on a live kernel; recorded trees may lack the file.
    uevent = dict(
        line.split("=", 1)
        for line in (tree.read(f"{folder}/uevent") or "").splitlines()
        if "=" in line
    )
    class_code = _hex(uevent.get("PCI_CLASS")) if "PCI_CLASS" in uevent else None
    vendor, _, device = uevent.get("PCI_ID", "").lower().partition(":")
    if class_code is None:
        class_code = _hex(tree.read(f"{folder}/class"))
    return _Function(
        bdf,
        folder,
        root,
        above,
        class_code,
        f"0x{vendor}" if vendor else tree.read(f"{folder}/vendor") or None,
        f"0x{device}" if device else tree.read(f"{folder}/device") or None,
        uevent.get("DRIVER") or None,
    )


def _place(parts: list[str], bdf: str) -> tuple[str | None, tuple[str, ...]]:
    root: str | None = None
    above: list[str] = []
    for part in parts:
        if (address := normal_bdf(part)) is not None:
            above.append(address)
        elif root is None and (match := _ROOT.match(part)):
            root = f"pci{int(match[1], 16):04x}:{match[2].lower()}"
    if not above or above[-1] != bdf:
        return None, ()
    return root, tuple(above[:-1])


def _may_compute(f: _Function) -> bool:
    """Whether a function whose maker is unknown could be an accelerator, by its class."""
    return f.class_code is not None and f.class_code >> 16 == 0x03


def _hex(text: str | None) -> int | None:
    try:
        return int(text or "", 16)
    except ValueError:
        return None
