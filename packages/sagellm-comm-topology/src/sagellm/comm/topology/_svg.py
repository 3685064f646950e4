"""A drawing of a topology: hosts, NUMA nodes, host bridges, switches, accelerators, NICs, links.

The PCI tree hangs from its NUMA node; accelerator fabrics run below the cards they join. Line
width follows bandwidth, a dashed line was inferred, and every shape tells more when pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from html import escape

from sagellm.core.protocols import Device, Link, TopologyInfo

from .graph import FABRIC_KINDS, NETWORK_KINDS

__all__ = ["render_svg"]

_CARD_W, _CARD_H, _GAP = 116, 46, 14
_PAD, _BAR_H, _ROW = 18, 26, 64
_MAX_HOSTS = 4
_STACK = 4

_FILL = {
    "gpu": "#2f855a", "npu": "#b7472a", "nic": "#2b6cb0", "pci_switch": "#805ad5",
    "pci_root": "#4a5568", "fabric_switch": "#b7791f", "cxl_mem": "#718096", "numa": "#edf2f7",
}  # fmt: skip
_LINE = {
    "pcie": "#4a5568", "host_bridge": "#4a5568", "socket": "#a0aec0", "c2c": "#319795",
    "cxl": "#718096",
}  # fmt: skip
_FABRIC_LINE, _NETWORK_LINE = "#b7791f", "#2b6cb0"
_FONT = "font-family='Inter,Segoe UI,Helvetica,Arial,sans-serif'"


@dataclass(slots=True)
class _Node:
    """One vertex of the drawn tree; `stack` are cards drawn below each other in one column."""

    device: Device
    link: Link | None = None
    children: list[_Node] = field(default_factory=list)
    stack: list[_Node] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0
    w: float = _CARD_W


class _Canvas:
    """Collects shapes in layers, so that lines lie below cards."""

    def __init__(self) -> None:
        self.back: list[str] = []
        self.lines: list[str] = []
        self.cards: list[str] = []
        self.at: dict[str, _Node] = {}
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
            f"<g><title>{escape(tip)}</title><rect x='{x:.1f}' y='{y:.1f}' width='{w:.1f}' "
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
    ) -> str:
        """One line of text."""
        weight = " font-weight='600'" if bold else ""
        return (
            f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' fill='{fill}' "
            f"text-anchor='{anchor}'{weight}>{escape(words)}</text>"
        )

    def line(self, path: str, colour: str, width: float, tip: str, *, dashed: bool = False) -> None:
        """A line with a tooltip; dashed means inferred."""
        dash = " stroke-dasharray='6 4'" if dashed else ""
        self.lines.append(
            f"<g><title>{escape(tip)}</title><path d='{path}' fill='none' stroke='{colour}' "
            f"stroke-width='{width:.1f}' stroke-linecap='round'{dash}/></g>"
        )


def render_svg(info: TopologyInfo) -> str:
    """The topology as a self-contained SVG image; it needs no font, script or style from outside.

    Of more than four hosts the first four are drawn and the others counted.
    """
    canvas = _Canvas()
    canvas.cards.append(canvas.text(_PAD, 28, _title(info), size=16, anchor="start", bold=True))
    y = 44.0
    hosts = sorted({d.node for d in info.devices if d.node >= 0})
    for host in hosts[:_MAX_HOSTS]:
        y = _draw_host(canvas, info, host, y, named=len(hosts) > 1) + _GAP
    if not hosts:
        canvas.cards.append(canvas.text(_PAD, y + 16, "no devices were found", anchor="start"))
        y += 30
    if len(hosts) > _MAX_HOSTS:
        more = f"… and {len(hosts) - _MAX_HOSTS} more hosts"
        canvas.cards.append(canvas.text(_PAD, y + 16, more, size=13, anchor="start"))
        y += 30
    y = _draw_networks(canvas, info, y)
    y = _draw_legend(canvas, y)
    width, height = max(canvas.width + _PAD, 620.0), y
    body = "\n".join((*canvas.back, *canvas.lines, *canvas.cards))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0f} {height:.0f}' "
        f"width='{width:.0f}' height='{height:.0f}' {_FONT} role='img'>"
        f"<title>{escape(_title(info))}</title>"
        f"<rect width='100%' height='100%' fill='#ffffff'/>\n{body}\n</svg>\n"
    )


def _title(info: TopologyInfo) -> str:
    hosts = f"{info.num_nodes} hosts" if info.num_nodes > 1 else info.hostname or "this host"
    count = info.num_devices
    nics = sum(d.kind == "nic" for d in info.devices)
    return (
        f"{hosts}: {count} accelerator{'' if count == 1 else 's'}, "
        f"{nics} NIC{'' if nics == 1 else 's'}"
    )


def _draw_host(canvas: _Canvas, info: TopologyInfo, host: int, top: float, *, named: bool) -> float:
    devices = {d.id: d for d in info.devices if d.node == host}
    links = [x for x in info.links if x.a in devices and x.b in devices]
    x, y = float(_PAD), top + _PAD + (18 if named else 0)
    bottom, boxes = y, {}
    for numa, trees in _groups(devices, links):
        for tree in trees:
            _measure(tree)
        inner = sum(t.w for t in trees) + _GAP * max(0, len(trees) - 1)
        width = max(inner, 190.0) + 2 * _PAD
        left, low = x + _PAD + (width - 2 * _PAD - inner) / 2, y + 52.0
        for tree in trees:
            _place(tree, left, y + 58, canvas)
            left += tree.w + _GAP
            low = max(low, _low(tree))
        boxes[numa.id if numa else ""] = (x, width)
        _draw_numa(canvas, numa, x, y, width, low + _PAD - y)
        for tree in trees:
            _draw_tree(canvas, tree)
        x += width + 2 * _GAP
        bottom = max(bottom, low + _PAD)
    _draw_sockets(canvas, links, boxes, y)
    bottom = _draw_fabric(canvas, info, devices, links, bottom)
    if named:
        canvas.cards.append(
            canvas.text(_PAD + 8, top + 20, f"host n{host}", size=13, anchor="start", bold=True)
        )
    frame = canvas.box(
        _PAD / 2, top, x - 2 * _GAP, bottom + _PAD / 2 - top, "#fbfcfe", line="#cbd5e0"
    )
    canvas.back.insert(0, frame)
    canvas.grow(x - _GAP, bottom + _PAD)
    return bottom + _PAD / 2


def _groups(
    devices: dict[str, Device], links: Iterable[Link]
) -> list[tuple[Device | None, list[_Node]]]:
    """NUMA nodes with the trees that hang from them; last the trees of unknown locality."""
    pci: dict[str, list[tuple[str, Link]]] = {}
    home: dict[str, str] = {}
    for link in links:
        if link.kind in ("pcie", "cxl"):
            pci.setdefault(link.a, []).append((link.b, link))
            pci.setdefault(link.b, []).append((link.a, link))
        elif link.kind == "host_bridge":
            numa, root = (link.a, link.b) if devices[link.a].kind == "numa" else (link.b, link.a)
            home.setdefault(root, numa)
    used: set[str] = set()

    def grow(device: Device, link: Link | None) -> _Node:
        used.add(device.id)
        node = _Node(device, link)
        for other, edge in sorted(pci.get(device.id, ()), key=lambda e: e[0]):
            if other not in used:
                node.children.append(grow(devices[other], edge))
        _stack(node)
        return node

    trees: dict[str | None, list[_Node]] = {}
    roots = [d for d in devices.values() if d.kind == "pci_root"]
    for top in roots:
        trees.setdefault(home.get(top.id), []).append(grow(top, None))
    for device in devices.values():
        fabric_only = device.kind == "fabric_switch" and device.bdf is None
        if device.id in used or device.kind == "numa" or fabric_only:
            continue
        local = [f"numa:{n}" for n in device.numa_nodes]
        near = next((n for n in devices if n.rpartition("/")[2] in local), None)
        trees.setdefault(near, []).append(grow(device, None))
    numas = [d for d in devices.values() if d.kind == "numa"]
    found: list[tuple[Device | None, list[_Node]]] = [(d, trees.pop(d.id, [])) for d in numas]
    rest = [tree for group in trees.values() for tree in group]
    return [*found, (None, rest)] if rest else found


def _stack(node: _Node) -> None:
    """Put leaves that are no accelerators below each other: machines have many NICs."""
    leaves = [c for c in node.children if not c.children and c.device.kind not in ("gpu", "npu")]
    if len(leaves) < 2:
        return
    rest = [c for c in node.children if c not in leaves]
    columns = [leaves[i : i + _STACK] for i in range(0, len(leaves), _STACK)]
    node.children = [*rest, *(replace(column[0], stack=column[1:]) for column in columns)]


def _measure(node: _Node) -> None:
    for child in node.children:
        _measure(child)
    inner = sum(c.w for c in node.children) + _GAP * max(0, len(node.children) - 1)
    node.w = max(float(_CARD_W), inner)


def _place(node: _Node, x: float, y: float, canvas: _Canvas) -> None:
    node.x, node.y = x, y
    canvas.at[node.device.id] = node
    for i, card in enumerate(node.stack, 1):
        card.x, card.y = x, y + i * (_CARD_H + 6)
        canvas.at[card.device.id] = card
    # Accelerators hang lowest, so that their fabric passes below the cards beside them.
    deepest = max((len(c.stack) for c in node.children), default=0)
    for child in node.children:
        drop = deepest * (_CARD_H + 6) if child.device.kind in ("gpu", "npu") else 0
        _place(child, x, y + _ROW + drop, canvas)
        x += child.w + _GAP


def _is_bar(node: _Node) -> bool:
    return node.device.kind in ("pci_root", "pci_switch")


def _height(node: _Node) -> float:
    return _BAR_H if _is_bar(node) else _CARD_H


def _low(node: _Node) -> float:
    mine = node.y + _height(node) + len(node.stack) * (_CARD_H + 6)
    return max([mine, *(_low(c) for c in node.children)])


def _draw_tree(canvas: _Canvas, node: _Node) -> None:
    _draw_card(canvas, node)
    for card in node.stack:
        _draw_card(canvas, card)
    for child in node.children:
        link = child.link
        assert link is not None
        x, y = child.x + child.w / 2, child.y
        if not _is_bar(child):
            x = child.x + _CARD_W / 2
        canvas.line(
            f"M{x:.1f} {node.y + _BAR_H:.1f}V{y:.1f}",
            _LINE.get(link.kind, "#4a5568"),
            _stroke(link.bandwidth_bytes_per_s),
            _about_link(link),
            dashed=link.confidence == "inferred",
        )
        if link.bandwidth_bytes_per_s:
            words = f"{link.bandwidth_bytes_per_s / 1e9:.0f} GB/s"
            canvas.cards.append(
                canvas.text(x + 6, y - 8, words, size=9, fill="#4a5568", anchor="start")
            )
        _draw_tree(canvas, child)


def _draw_card(canvas: _Canvas, node: _Node) -> None:
    device, fill = node.device, _FILL.get(node.device.kind, "#718096")
    if _is_bar(node):
        canvas.cards.append(canvas.box(node.x, node.y, node.w, _BAR_H, fill, _about(device), r=5))
        name = "host bridge" if device.kind == "pci_root" else device.attrs.get("role", "switch")
        words = f"{name.replace('_', ' ')} {_short(device.id)}"
        fits = _clip(words, node.w)
        canvas.cards.append(canvas.text(node.x + node.w / 2, node.y + 17, fits, fill="#ffffff"))
        return
    canvas.cards.append(canvas.box(node.x, node.y, _CARD_W, _CARD_H, fill, _about(device)))
    middle = node.x + _CARD_W / 2
    head, sub = _card_words(device)
    canvas.cards.append(
        canvas.text(middle, node.y + 19, _clip(head, _CARD_W), size=12, fill="#ffffff", bold=True)
    )
    canvas.cards.append(
        canvas.text(middle, node.y + 35, _clip(sub, _CARD_W), size=10, fill="#e2e8f0")
    )


def _card_words(device: Device) -> tuple[str, str]:
    attrs = device.attrs
    if device.kind == "nic":
        name = attrs.get("ib") or attrs.get("netdev") or device.vendor or "NIC"
        port = attrs.get("port_bytes_per_s")
        rate = f"{int(port) * 8 / 1e9:g} Gb/s" if port else _short(device.id)
        return name, rate
    if device.kind in ("gpu", "npu"):
        number = device.visible_index if device.visible_index is not None else device.index
        label = f"{device.kind.upper()}{'' if number is None else f' {number}'}"
        return label, device.model or f"{device.vendor or ''} {_short(device.id)}".strip()
    return device.kind.replace("_", " "), _short(device.id)


def _draw_numa(
    canvas: _Canvas, numa: Device | None, x: float, y: float, w: float, h: float
) -> None:
    if numa is None:
        tip, name, sub = "no source says which NUMA node these are local to", "NUMA unknown", ""
    else:
        tip = _about(numa)
        name = f"NUMA {numa.numa_nodes[0] if numa.numa_nodes else _short(numa.id)}"
        cpus = f"CPUs {numa.cpulist}" if numa.cpulist else "no CPUs"
        memory = f"{numa.memory_bytes / 2**30:.0f} GiB" if numa.memory_bytes is not None else ""
        sub = ", ".join(p for p in (cpus, memory) if p)
    canvas.back.append(
        canvas.box(x, y, w, h, _FILL["numa"], tip, line="#cbd5e0", dashed=numa is None)
    )
    canvas.cards.append(canvas.text(x + 12, y + 20, name, size=13, anchor="start", bold=True))
    canvas.cards.append(
        canvas.text(x + 12, y + 36, _clip(sub, w), size=10, fill="#4a5568", anchor="start")
    )


def _draw_sockets(
    canvas: _Canvas, links: Iterable[Link], boxes: dict[str, tuple[float, float]], y: float
) -> None:
    for link in links:
        ends = sorted(boxes[n] for n in (link.a, link.b) if n in boxes)
        if link.kind != "socket" or len(ends) < 2:
            continue
        (x0, w0), (x1, _) = ends
        span = x1 - x0 - w0
        lift = 14 if span <= 2 * _GAP else 0
        path = f"M{x0 + w0:.1f} {y + lift + 8:.1f}H{x1:.1f}"
        if not lift:  # over the boxes between
            path = f"M{x0 + w0 - 12:.1f} {y:.1f}q6 -12 12 -12H{x1:.1f}q6 0 12 12"
        canvas.line(path, _LINE["socket"], _stroke(link.bandwidth_bytes_per_s), _about_link(link))


def _draw_fabric(
    canvas: _Canvas, info: TopologyInfo, devices: dict[str, Device], links: list[Link], low: float
) -> float:
    """Switched fabrics as bars below the host, direct links as arcs below the cards."""
    fabric = [x for x in links if x.kind in FABRIC_KINDS]
    bars = [d for d in devices.values() if d.kind == "fabric_switch" and d.bdf is None]
    direct = [x for x in fabric if x.a in canvas.at and x.b in canvas.at]
    depth = 0.0
    for link in direct:
        a, b = sorted((canvas.at[link.a], canvas.at[link.b]), key=lambda n: n.x)
        x0, x1 = a.x + _CARD_W / 2, b.x + _CARD_W / 2
        y0, y1 = a.y + _CARD_H, b.y + _CARD_H
        sag = min(26 + (x1 - x0) * 0.09, 110.0)
        depth = max(depth, max(y0, y1) + sag * 0.8 - low)
        path = (
            f"M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 + sag:.1f} {x1:.1f} {y1 + sag:.1f} {x1:.1f} {y1:.1f}"
        )
        canvas.line(
            path,
            _FABRIC_LINE,
            _stroke(link.bandwidth_bytes_per_s, link.count),
            _about_link(link),
            dashed=link.confidence == "inferred",
        )
    low += max(depth, 0.0)
    for bar in bars:
        spokes = [x for x in fabric if bar.id in (x.a, x.b)]
        ends = [canvas.at[n] for x in spokes for n in (x.a, x.b) if n in canvas.at]
        if not ends:
            continue
        y = low + 34
        left = min(n.x for n in ends)
        width = max(n.x for n in ends) + _CARD_W - left
        for link in spokes:
            node = canvas.at[link.b if link.a == bar.id else link.a]
            x = node.x + _CARD_W / 2
            canvas.line(
                f"M{x:.1f} {node.y + _CARD_H:.1f}V{y:.1f}",
                _FABRIC_LINE,
                _stroke(link.bandwidth_bytes_per_s, link.count),
                _about_link(link),
                dashed=link.confidence == "inferred",
            )
        canvas.cards.append(
            canvas.box(left, y, width, _BAR_H, _FILL["fabric_switch"], _about(bar), r=5)
        )
        words = f"{_short(bar.id)}: {len(spokes)} members"
        rate = spokes[0].bandwidth_bytes_per_s
        words += f", {rate / 1e9:.0f} GB/s each" if rate else ""
        canvas.cards.append(canvas.text(left + width / 2, y + 17, words, fill="#ffffff"))
        low = y + _BAR_H
    return low + (10 if fabric else 0)


def _draw_networks(canvas: _Canvas, info: TopologyInfo, y: float) -> float:
    """Networks between hosts as bars across the bottom."""
    for network in (d for d in info.devices if d.node < 0):
        spokes = [x for x in info.links if network.id in (x.a, x.b) and x.kind in NETWORK_KINDS]
        shown = sum(x.a in canvas.at or x.b in canvas.at for x in spokes)
        width = max(canvas.width - 2 * _PAD, 400.0)
        canvas.cards.append(canvas.box(_PAD, y, width, _BAR_H, _NETWORK_LINE, _about(network), r=5))
        words = f"{network.id.removeprefix('net:')} network: {len(spokes)} ports"
        words += f" ({shown} of them drawn)" if shown < len(spokes) else ""
        canvas.cards.append(canvas.text(_PAD + width / 2, y + 17, words, fill="#ffffff"))
        y += _BAR_H + 8
    return y


def _draw_legend(canvas: _Canvas, y: float) -> float:
    x = float(_PAD)
    y += 14
    for kind, words in (
        ("gpu", "GPU"), ("npu", "NPU"), ("nic", "NIC"), ("pci_switch", "PCIe switch"),
        ("pci_root", "host bridge"), ("fabric_switch", "accelerator fabric"),
    ):  # fmt: skip
        canvas.cards.append(canvas.box(x, y, 12, 12, _FILL[kind], words, r=3))
        canvas.cards.append(canvas.text(x + 18, y + 10, words, size=10, anchor="start"))
        x += 30 + 6.2 * len(words)
    note = "wider line: more bandwidth, dashed: inferred"
    canvas.cards.append(canvas.text(x, y + 10, note, size=10, fill="#718096", anchor="start"))
    canvas.grow(x + 5.2 * len(note), y)
    return y + 30


def _stroke(bandwidth: float | None, count: int = 1) -> float:
    """Line width: thin when the bandwidth is unknown, then by its logarithm."""
    if bandwidth is None:
        return 1.2 + 0.6 * math.log2(max(count, 1))
    return min(7.0, max(1.5, 1.4 * math.log10(bandwidth / 1e8)))


def _about(device: Device) -> str:
    lines = [device.id, f"{device.kind} {device.vendor or ''} {device.model or ''}".strip()]
    if device.numa_nodes:
        lines.append(f"NUMA {', '.join(map(str, device.numa_nodes))}")
    if device.cpulist:
        lines.append(f"CPUs {device.cpulist}")
    return "\n".join([*lines, *(f"{k}: {v}" for k, v in sorted(device.attrs.items()))])


def _about_link(link: Link) -> str:
    lanes = f" x{link.count}" if link.count > 1 else ""
    rate = link.bandwidth_bytes_per_s
    speed = f"{rate / 1e9:.1f} GB/s each way" if rate else "bandwidth unknown"
    return f"{link.a} - {link.b}\n{link.kind}{lanes}, {speed}\n{link.source}, {link.confidence}"


def _short(name: str) -> str:
    """An id without its host and without the domain 0000."""
    return name.rpartition("/")[2].removeprefix("pci").removeprefix("0000:")


def _clip(words: str, width: float) -> str:
    room = max(4, int((width - 12) / 6.4))
    return words if len(words) <= room else words[: room - 1] + "…"
