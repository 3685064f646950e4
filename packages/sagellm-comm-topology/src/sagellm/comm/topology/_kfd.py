"""AMD GPUs and their xGMI links out of the kernel's compute driver, without any library.

`/sys/class/kfd/kfd/topology/nodes` lists processors first, one for each NUMA node, then GPUs. A
GPU that a container hides is there, but its files are unreadable.
"""

from __future__ import annotations

from collections.abc import Mapping

from sagellm.core.protocols import (
    DetectionContext,
    Device,
    Link,
    Pair,
    TopologyFragment,
)

from ._numbers import whole_number
from ._sysfs import Tree

__all__ = ["KfdDetector"]

_NODES = "/sys/class/kfd/kfd/topology/nodes"
_XGMI = 11  # CRAT link type; 2 is PCIe
_ONE_HOP = 15  # weight of one physical link; what is reached through others weighs a multiple
_MOST_LINKS = 256
_HEAP_FRAME_BUFFERS = (1, 2)


class KfdDetector:
    """Reads the compute driver's nodes; a machine without it gives an empty fragment."""

    def detect(self, ctx: DetectionContext) -> TopologyFragment:
        """What the compute driver says, never raising; see `Detector`."""
        tree = Tree(ctx.root)
        numbers = sorted(
            n for name in tree.names(_NODES) or ()
            if (n := whole_number(name, most=99_999)) is not None
        )  # fmt: skip
        facts = {n: _properties(tree.read(f"{_NODES}/{n}/properties", 8192)) for n in numbers}
        hidden = sum(not f for f in facts.values())
        warnings = (
            [f"{hidden} nodes are unreadable, GPUs of other containers perhaps"] if hidden else []
        )
        gpus: dict[int, Device] = {}
        for n, f in facts.items():
            if f.get("simd_count") and f.get("location_id") is not None:
                gpus[n] = _gpu(tree, n, f, index=len(gpus))
        # Processors are NUMA nodes in the kernel's order: a conclusion, so their links say so.
        hosts = [n for n, f in facts.items() if f.get("cpu_cores_count") and n not in gpus]
        links: dict[tuple[str, str], Link] = {}
        pairs: dict[tuple[str, str], Pair] = {}
        for n, gpu in gpus.items():
            if ctx.clock() > ctx.deadline_s:
                warnings.append(f"deadline reached before the links of {gpu.id}")
                break
            wires, reached = _links(tree, n, gpus, hosts)
            for wire in wires:
                links.setdefault((wire.a, wire.b), wire)
            for pair in reached:
                pairs.setdefault((pair.a, pair.b), pair)
        return TopologyFragment(
            "kfd",
            tuple(gpus.values()),
            tuple(links.values()),
            warnings=tuple(warnings),
            pairs=tuple(pairs.values()),
        )


def _properties(text: str | None) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in (text or "").splitlines():
        key, _, value = line.partition(" ")
        known = whole_number(value, most=(1 << 64) - 1)
        if known is not None:
            found[key] = known
    return found


def _gpu(tree: Tree, node: int, f: Mapping[str, int], index: int) -> Device:
    place = f["location_id"]
    domain = f.get("domain", 0) & 0xFFFFFFFF
    bdf = f"{domain:04x}:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}.{place & 7}"
    unique = f.get("unique_id")
    memory = 0
    for bank in (tree.names(f"{_NODES}/{node}/mem_banks") or ())[:_MOST_LINKS]:
        m = _properties(tree.read(f"{_NODES}/{node}/mem_banks/{bank}/properties"))
        if m.get("heap_type") in _HEAP_FRAME_BUFFERS:
            memory += m.get("size_in_bytes", 0)
    attrs = {"kfd_node": str(node)}
    if f.get("hive_id"):
        attrs["hive"] = f"{f['hive_id']:016x}"
    if f.get("gfx_target_version"):
        attrs["gfx"] = str(f["gfx_target_version"])
    return Device(
        bdf,
        "gpu",
        vendor="amd",
        bdf=bdf,
        uuid=f"GPU-{unique:016x}" if unique else None,
        index=index,
        memory_bytes=memory if 0 < memory < 1 << 60 else None,
        attrs=attrs,
    )


def _links(
    tree: Tree, node: int, gpus: Mapping[int, Device], hosts: list[int]
) -> tuple[list[Link], list[Pair]]:
    """Wires of a GPU, and peers that it reaches through others."""
    found: list[Link] = []
    reached: list[Pair] = []
    for table in ("io_links", "p2p_links"):
        folder = f"{_NODES}/{node}/{table}"
        for name in (tree.names(folder) or ())[:_MOST_LINKS]:
            f = _properties(tree.read(f"{folder}/{name}/properties"))
            other = f.get("node_to", -1)
            if f.get("type") != _XGMI or other == node:
                continue
            speed = f.get("max_bandwidth", 0) * 1e6 or None
            if other in gpus:
                a, b = sorted((gpus[node].id, gpus[other].id))
                if f.get("weight", 0) > _ONE_HOP:
                    reached.append(Pair(a, b, via="xgmi", source="kfd"))
                    continue
                found.append(Link(a, b, "xgmi", 1, speed, source="kfd"))
            elif other in hosts:
                numa = f"numa:{hosts.index(other)}"
                found.append(
                    Link(gpus[node].id, numa, "xgmi", 1, speed, source="kfd", confidence="inferred")
                )
    return found, reached
