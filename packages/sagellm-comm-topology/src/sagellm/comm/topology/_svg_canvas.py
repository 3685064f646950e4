"""Shapes, colours and words that the parts of the drawing share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape

from sagellm.core.protocols import Device, Link

from ._xml_text import xml_text

__all__ = [
    "BAR_H", "CARD_H", "CARD_W", "FABRIC_LINE", "FILL", "GAP", "LINE", "NETWORK_LINE", "PAD",
    "ROW", "STACK", "Canvas", "Node", "about", "about_link", "rate", "short", "stroke",
]  # fmt: skip

CARD_W, CARD_H, GAP = (76, 150), 46, 14  # the narrowest and the widest card
PAD, BAR_H, ROW = 18, 26, 64
STACK = 4

FILL = {
    "gpu": "#2f855a", "npu": "#b7472a", "nic": "#2b6cb0", "pci_switch": "#805ad5",
    "pci_root": "#4a5568", "fabric_switch": "#b7791f", "cxl_mem": "#718096", "numa": "#edf2f7",
}  # fmt: skip
LINE = {
    "pcie": "#4a5568", "host_bridge": "#4a5568", "socket": "#a0aec0", "c2c": "#319795",
    "cxl": "#718096",
}  # fmt: skip
FABRIC_LINE, NETWORK_LINE = "#b7791f", "#2b6cb0"


@dataclass(slots=True)
class Node:
    """One vertex of the drawn tree; `stack` are cards drawn below each other in one column."""

    device: Device
    link: Link | None = None
    children: list[Node] = field(default_factory=list)
    stack: list[Node] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0
    w: float = 0.0


class Canvas:
    """Collects shapes in layers, so that lines lie below cards.

    Args:
        card_w: Width of the cards.

    """

    def __init__(self, card_w: float = CARD_W[1]) -> None:
        self.card_w = card_w
        self.back: list[str] = []
        self.lines: list[str] = []
        self.cards: list[str] = []
        self.at: dict[str, Node] = {}
        self.width = 0.0
        self.height = 0.0

    def grow(self, x: float, y: float) -> None:
        self.width, self.height = max(self.width, x), max(self.height, y)

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str,
        tip: str = "",
        *,
        line: str = "none",
        r: int = 8,
        dashed: bool = False,
    ) -> str:
        """A rounded rectangle with a tooltip."""
        dash = " stroke-dasharray='5 4'" if dashed else ""
        return (
            f"<g><title>{_escaped(tip)}</title><rect x='{x:.1f}' y='{y:.1f}' width='{w:.1f}' "
            f"height='{h:.1f}' rx='{r}' fill='{fill}' stroke='{line}'{dash}/></g>"
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 11,
        fill: str = "#1a202c",
        anchor: str = "middle",
        bold: bool = False,
        halo: str = "",
    ) -> str:
        """One line of text, to be read over lines where it has a halo of the ground's colour."""
        weight = " font-weight='bold'" if bold else ""
        glow = f" stroke='{halo}' stroke-width='3' paint-order='stroke'" if halo else ""
        return (
            f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' fill='{fill}' "
            f"text-anchor='{anchor}'{weight}{glow}>{_escaped(words)}</text>"
        )

    def dot(self, x: float, y: float, colour: str) -> None:
        """Where a line ends on something that has no card of its own."""
        self.lines.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{colour}'/>")

    def line(self, path: str, colour: str, width: float, tip: str, *, dashed: bool = False) -> None:
        """A line with a tooltip; dashed means inferred."""
        dash = " stroke-dasharray='6 4'" if dashed else ""
        self.lines.append(
            f"<g><title>{_escaped(tip)}</title><path d='{path}' fill='none' stroke='{colour}' "
            f"stroke-width='{width:.1f}' stroke-linecap='round'{dash}/></g>"
        )


def _escaped(words: str) -> str:
    return escape(xml_text(words))


def stroke(bandwidth: float | None, count: int = 1) -> float:
    """Line width: thin when the bandwidth is unknown, then by its logarithm."""
    if bandwidth is None:
        return 1.2 + 0.6 * math.log2(max(count, 1))
    return min(7.0, max(1.5, 1.4 * math.log10(bandwidth / 1e8)))


def about(device: Device) -> str:
    lines = [device.id, f"{device.kind} {device.vendor or ''} {device.model or ''}".strip()]
    if device.numa_nodes:
        lines.append(f"NUMA {', '.join(map(str, device.numa_nodes))}")
    if device.cpulist:
        lines.append(f"CPUs {device.cpulist}")
    return "\n".join([*lines, *(f"{k}: {v}" for k, v in sorted(device.attrs.items()))])


def about_link(link: Link) -> str:
    lanes = f" x{link.count}" if link.count > 1 else ""
    rate = link.bandwidth_bytes_per_s
    speed = f"{rate / 1e9:.1f} GB/s each way" if rate else "bandwidth unknown"
    return f"{link.a} - {link.b}\n{link.kind}{lanes}, {speed}\n{link.source}, {link.confidence}"


def short(name: str) -> str:
    """An id without its host and without the domain 0000."""
    return name.rpartition("/")[2].removeprefix("pci").removeprefix("-").removeprefix("0000:")


def rate(bytes_per_s: float) -> str:
    """A bandwidth in two or more digits.

    >>> rate(63e9), rate(250e6)
    ('63 GB/s', '0.25 GB/s')
    """
    value = bytes_per_s / 1e9
    return f"{value:.0f} GB/s" if value >= 9.95 else f"{value:.2g} GB/s"
