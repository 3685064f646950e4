"""CXL memory out of `/sys/bus/cxl` and `/sys/bus/dax`: sizes, and the NUMA node it appears as."""

from __future__ import annotations

import re

from sagellm.core.protocols import (
    DetectionContext,
    Device,
    Link,
    TopologyFragment,
)

from ._sysfs import Tree, normal_bdf

__all__ = ["CxlDetector"]

_CXL = "/sys/bus/cxl/devices"
_DAX = "/sys/bus/dax/devices"
_MOST_WAYS = 16


class CxlDetector:
    """Reads CXL memory devices; a machine without any gives an empty fragment."""

    def detect(self, ctx: DetectionContext) -> TopologyFragment:
        """What the kernel says of CXL memory, never raising; see `Detector`."""
        tree = Tree(ctx.root)
        names = tree.names(_CXL) or []
        warnings: list[str] = []
        devices: dict[str, Device] = {}
        for name in names:
            if re.fullmatch(r"mem\d+", name):
                devices[name] = _memory(tree, name, warnings)
        links: dict[tuple[str, str], Link] = {}
        for region, node in _online_regions(tree) if devices else ():
            for name in _members(tree, region):
                device = devices.get(name)
                if device is not None:
                    key = (device.id, f"numa:{node}")
                    links[key] = Link(*key, "cxl", source="sysfs-cxl")
        return TopologyFragment(
            "sysfs-cxl", tuple(devices.values()), tuple(links.values()), warnings=tuple(warnings)
        )


def _memory(tree: Tree, name: str, warnings: list[str]) -> Device:
    folder = f"{_CXL}/{name}"
    target = tree.target(folder) or ""
    owners = [a for part in target.split("/") if (a := normal_bdf(part))]
    bdf = owners[-1] if owners else None
    sizes = {kind: _number(tree.read(f"{folder}/{kind}/size")) for kind in ("ram", "pmem")}
    known = [size for size in sizes.values() if size is not None]
    if not known:
        warnings.append(f"the size of {name} is unreadable")
    numa = _number(tree.read(f"{folder}/numa_node"))
    attrs = {"cxl": name}
    serial = tree.read(f"{folder}/serial")
    if serial:
        attrs["serial"] = serial
    attrs |= {f"{kind}_bytes": str(size) for kind, size in sizes.items() if size}
    return Device(
        bdf or f"cxl:{name}",
        "cxl_mem",
        bdf=bdf,
        numa_nodes=() if numa is None else (numa,),
        memory_bytes=sum(known) if known else None,
        attrs=attrs,
    )


def _online_regions(tree: Tree) -> list[tuple[str, int]]:
    """Regions whose memory the kernel shows as a NUMA node, with that node."""
    found: list[tuple[str, int]] = []
    for name in tree.names(_DAX) or ():
        match = re.search(r"/(region\d+)(?:/|$)", tree.target(f"{_DAX}/{name}") or "")
        node = _number(tree.read(f"{_DAX}/{name}/target_node"))
        if match is not None and node is not None:
            found.append((match[1], node))
    return found


def _members(tree: Tree, region: str) -> list[str]:
    """Memory devices that a region interleaves: its decoders name their endpoints."""
    members: list[str] = []
    for way in range(_MOST_WAYS):
        decoder = tree.read(f"{_CXL}/{region}/target{way}")
        if not decoder or not re.fullmatch(r"decoder[\d.]+", decoder):
            break
        folder = (tree.target(f"{_CXL}/{decoder}") or "").rpartition("/")[0]
        memory = (tree.target(f"{folder}/uport") or "").rpartition("/")[2]
        if memory and memory not in members:
            members.append(memory)
    return members


def _number(text: str | None) -> int | None:
    """A number in decimal or hexadecimal; None for what is none, or below zero."""
    try:
        value = int(text or "", 0)
    except ValueError:
        return None
    return value if 0 <= value < 1 << 60 else None
