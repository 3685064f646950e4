"""NUMA nodes with their CPUs, memory and distances, out of `/sys/devices/system/node`."""

from __future__ import annotations

import re
from itertools import combinations

from sagellm.core.protocols import (
    DetectionContext,
    DetectorSpec,
    Device,
    Link,
    TopologyFragment,
)

from ._numbers import whole_number
from ._sysfs import Tree
from ._vendors import CPU_VENDORS

__all__ = ["SPEC", "NumaDetector", "cpu_count", "cpu_numbers"]

_NODES = "/sys/devices/system/node"
_MOST_CPUS = 1 << 16
_NODE = re.compile(r"^node([0-9]{1,7})$")


def cpu_numbers(cpulist: str | None) -> list[int]:
    """CPUs of a Linux list in its order; parts that are no numbers are passed over.

    >>> cpu_numbers("0-3,8"), cpu_numbers(None)
    ([0, 1, 2, 3, 8], [])
    """
    found: list[int] = []
    for part in (cpulist or "").split(","):
        if len(found) > _MOST_CPUS:
            break
        match = re.match(r"^\s*(\d{1,7})(?:-(\d{1,7}))?\s*$", part)
        if match:
            found += range(int(match[1]), min(int(match[2] or match[1]), _MOST_CPUS) + 1)
    return found


def cpu_count(cpulist: str | None) -> int:
    """Number of CPUs in a Linux list.

    >>> cpu_count("0-3,8"), cpu_count(None)
    (5, 0)
    """
    return len(cpu_numbers(cpulist))


class NumaDetector:
    """Reads NUMA nodes; one without CPUs (a GPU's or CXL memory) is marked so."""

    def detect(self, ctx: DetectionContext) -> TopologyFragment:
        """What the kernel says of NUMA, never raising; see `Detector`."""
        tree = Tree(ctx.root)
        names = tree.names(_NODES)
        if names is None:
            return TopologyFragment(
                "sysfs-numa",
                warnings=(f"{_NODES} cannot be listed: NUMA nodes and affinities are unknown",),
            )
        numbers = sorted(int(m[1]) for name in names if (m := _NODE.match(name)))
        vendor, model = _processor(tree)
        warnings: list[str] = []
        devices = []
        for n in numbers:
            cpulist = tree.read(f"{_NODES}/node{n}/cpulist")
            if cpulist is None:
                warnings.append(f"CPUs of NUMA node {n} are unreadable")
            attrs = {}
            distance = tree.read(f"{_NODES}/node{n}/distance")
            if distance:
                attrs["distances"] = ",".join(distance.split())
            if cpulist == "":
                attrs["cpuless"] = "yes"
            devices.append(
                Device(
                    f"numa:{n}",
                    "numa",
                    vendor=vendor if cpulist else None,
                    model=model if cpulist else None,
                    numa_nodes=(n,),
                    cpulist=cpulist or None,
                    memory_bytes=_memory_bytes(tree.read(f"{_NODES}/node{n}/meminfo")),
                    attrs=attrs,
                )
            )
        links = tuple(
            # The kernel gives distances, not wires: that there is some way is a conclusion.
            Link(f"numa:{a}", f"numa:{b}", "socket", source="sysfs-numa", confidence="inferred")
            for a, b in combinations(numbers, 2)
        )
        return TopologyFragment("sysfs-numa", tuple(devices), links, warnings=tuple(warnings))


SPEC = DetectorSpec("sysfs-numa", 60, NumaDetector)
"""The NUMA detector as its entry point offers it."""


def _memory_bytes(meminfo: str | None) -> int | None:
    match = re.search(r"MemTotal:\s*(\d+)\s*kB", meminfo or "")
    size = whole_number(match[1], most=1 << 50) if match else None
    return None if size is None else size * 1024


def _processor(tree: Tree) -> tuple[str | None, str | None]:
    """Vendor and model of the first CPU; its lines come first, the rest is not read."""
    text = tree.read("/proc/cpuinfo", 2048) or ""
    fields = dict(
        (key.strip(), value.strip())
        for key, colon, value in (line.partition(":") for line in text.splitlines())
        if colon
    )
    maker = fields.get("vendor_id")
    return (CPU_VENDORS.get(maker, maker.lower()) if maker else None), fields.get("model name")
