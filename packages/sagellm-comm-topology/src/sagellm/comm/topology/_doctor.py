"""What is missing in what was read, why it matters, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from sagellm.core.protocols import Device, TopologyFragment, TopologyInfo

from ._words import some
from .detector import Detection
from .graph import TopologyGraph

__all__ = ["Finding", "Visit", "examine"]

_SLOW_S = 0.1
_MOST_PAIRS = 64


@dataclass(frozen=True, slots=True)
class Visit:
    """What one detector gave, in numbers."""

    detector: str
    devices: int
    links: int
    pairs: int
    elapsed_s: float

    @classmethod
    def of(cls, fragment: TopologyFragment) -> Visit:
        """The numbers of a fragment."""
        counts = (len(fragment.devices), len(fragment.links), len(fragment.pairs))
        return cls(fragment.source, *counts, fragment.elapsed_s)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        severity: `error` when choices rest on nothing, `warning` when on less than they could,
            `note` when it is only worth knowing.
        message: What is so, with the values.
        next_step: What to do; "" when there is nothing.

    """

    severity: Literal["error", "warning", "note"]
    message: str
    next_step: str = ""


def examine(info: TopologyInfo, detection: Detection) -> list[Finding]:
    """Findings about a detection, the worst first."""
    found = [
        *_accelerators(info),
        *_paths(info),
        *_peers(info),
        *_networks(info),
        *_slow(detection),
        *(Finding("warning", w) for w in info.warnings),
    ]
    order = ("error", "warning", "note")
    return sorted(dict.fromkeys(found), key=lambda f: order.index(f.severity))


def _accelerators(info: TopologyInfo) -> list[Finding]:
    found: list[Finding] = []
    if not info.accelerators:
        return [Finding("note", "no accelerator was found", "expected on a machine of CPUs alone")]
    silent = [d.id for d in info.accelerators if d.vendor == "nvidia" and d.uuid is None]
    if silent:
        found.append(
            Finding(
                "warning",
                f"the NVIDIA driver did not speak of {some(silent)}: NVLinks are unknown",
                "pip install 'sagellm-comm-topology[nvidia]', and check that nvidia-smi works",
            )
        )
    nodes = [d for d in info.devices if d.kind == "numa"]
    homeless = [d.id for d in info.accelerators if not d.numa_nodes]
    if homeless and len(nodes) != 1:
        found.append(
            Finding(
                "warning",
                f"the NUMA node of {some(homeless)} is unknown",
                "in a virtual machine name the host's tree: NCCL_TOPO_FILE=FILE",
            )
        )
    hidden = [d.id for d in info.accelerators if d.visible_index is None]
    if hidden:
        found.append(Finding("note", f"hidden from this process: {some(hidden)}"))
    return found


def _paths(info: TopologyInfo) -> list[Finding]:
    graph = TopologyGraph(info)
    unknown = [
        f"{a.id} - {b.id}"
        for a, b in _pairs(info.accelerators)
        if graph.path(a.id, b.id).kind is None
    ]
    if not unknown:
        return []
    return [
        Finding(
            "error",
            f"nothing says how these are joined: {some(unknown)}",
            "run `show --tools`, or import what the vendor's tool prints",
        )
    ]


def _peers(info: TopologyInfo) -> list[Finding]:
    refused: dict[str, list[str]] = {}
    for pair in info.pairs:
        word = pair.peer.get("read")
        if word and word != "OK":
            refused.setdefault(word, []).append(f"{pair.a} - {pair.b}")
    return [
        Finding(
            "note",
            f"no peer access ({word}): {some(pairs)}; copies go through the host",
            "IOMMU and ACS settings decide on most machines (TNS, CNS); GNS is the GPU's own",
        )
        for word, pairs in sorted(refused.items())
    ]


def _networks(info: TopologyInfo) -> list[Finding]:
    down = [
        d.attrs.get("ib") or d.attrs.get("netdev") or d.id
        for d in info.devices
        if d.kind == "nic"
        and (d.attrs.get("ib_state", "ACTIVE") != "ACTIVE" or d.attrs.get("operstate") == "down")
    ]
    return [Finding("note", f"ports that are down: {some(down)}")] if down else []


def _slow(detection: Detection) -> list[Finding]:
    return [
        Finding(
            "note",
            f"{f.source} took {f.elapsed_s * 1e3:.0f} ms",
            "nvidia-smi -pm 1 keeps the driver awake" if f.source == "nvml" else "",
        )
        for _, f in detection.fragments
        if f.elapsed_s > _SLOW_S
    ]


def _pairs(devices: Sequence[Device]) -> list[tuple[Device, Device]]:
    return list(combinations(devices[:_MOST_PAIRS], 2))
