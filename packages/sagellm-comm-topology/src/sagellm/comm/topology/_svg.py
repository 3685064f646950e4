"""A drawing of a topology: hosts, NUMA nodes, host bridges, switches, accelerators, NICs, links.

The PCI tree hangs from its NUMA node; accelerator fabrics run below the cards they join. Line
width follows bandwidth, a dashed line was inferred, and every shape tells more when pointed at.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from sagellm.core.protocols import Device, Link, TopologyInfo

from ._svg_canvas import (
    BAR_H,
    FABRIC_LINE,
    FILL,
    GAP,
    LINE,
    NETWORK_LINE,
    PAD,
    Canvas,
    about,
    about_link,
    short,
    stroke,
)  # fmt: skip
from ._svg_fabric import draw_fabric
from ._svg_text import FONT, clip, width_of
from ._svg_tree import card_width, draw_tree, groups, lowest, measure, place
from ._xml_text import xml_text
from .graph import NETWORK_KINDS

__all__ = ["render_svg"]

_MAX_HOSTS = 4
_LEGEND = {
    "gpu": "GPU", "npu": "NPU", "nic": "NIC", "pci_switch": "PCIe switch",
    "pci_root": "host bridge", "fabric_switch": "accelerator fabric", "cxl_mem": "CXL memory",
}  # fmt: skip


def render_svg(info: TopologyInfo) -> str:
    """The topology as a self-contained SVG image; it needs no font, script or style from outside.

    Of more than four hosts the first four are drawn and the others counted.
    """
    hosts = sorted({d.node for d in info.devices if d.node >= 0})
    drawn = set(hosts[:_MAX_HOSTS])
    canvas = Canvas(card_width(d for d in info.devices if d.node in drawn))
    y = 44.0
    for host in hosts[:_MAX_HOSTS]:
        y = _draw_host(canvas, info, host, y, named=len(hosts) > 1) + GAP
    if not hosts:
        canvas.cards.append(canvas.text(PAD, y + 16, "no devices were found", anchor="start"))
        y += 30
    if len(hosts) > _MAX_HOSTS:
        more = f"… and {len(hosts) - _MAX_HOSTS} more hosts"
        canvas.cards.append(canvas.text(PAD, y + 16, more, size=13, anchor="start"))
        y += 30
    y = _draw_networks(canvas, info, y)
    y = _draw_legend(canvas, info, y)
    width, height = max(canvas.width + PAD, 480.0), y
    title = clip(_title(info), width - 2 * PAD, 16, bold=True)
    canvas.cards.append(canvas.text(PAD, 28, title, size=16, anchor="start", bold=True))
    body = "\n".join((*canvas.back, *canvas.lines, *canvas.cards))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0f} {height:.0f}' "
        f"width='{width:.0f}' height='{height:.0f}' {FONT} role='img'>"
        f"<title>{escape(xml_text(_title(info)))}</title>"
        f"<rect width='100%' height='100%' fill='#ffffff'/>\n{body}\n</svg>\n"
    )


def _title(info: TopologyInfo) -> str:
    hosts = f"{info.num_nodes} hosts: " if info.num_nodes > 1 else ""
    hosts = hosts or (f"{info.hostname}: " if info.hostname else "")
    count, nics = info.num_devices, sum(d.kind == "nic" for d in info.devices)
    models = ", ".join(dict.fromkeys(d.model or d.vendor or "?" for d in info.accelerators))
    of = f" ({models})" if models else ""
    return (
        f"{hosts}{count} accelerator{'' if count == 1 else 's'}{of}, "
        f"{nics} NIC{'' if nics == 1 else 's'}"
    )


def _draw_host(canvas: Canvas, info: TopologyInfo, host: int, top: float, *, named: bool) -> float:
    devices = {d.id: d for d in info.devices if d.node == host}
    links = [x for x in info.links if x.a in devices and x.b in devices]
    x, y = float(PAD), top + PAD + (18 if named else 0)
    bottom, boxes = y, {}
    placed = []
    for numa, trees in groups(devices, links, info.pairs):
        for tree in trees:
            measure(tree, canvas)
        inner = sum(t.w for t in trees) + GAP * max(0, len(trees) - 1)
        width = max(inner, 190.0) + 2 * PAD
        left = x + PAD + (width - 2 * PAD - inner) / 2
        bottom = max(bottom, y + 52.0 + PAD)
        for tree in trees:
            place(tree, left, y + 58, canvas)
            left += tree.w + GAP
            bottom = max(bottom, lowest(tree) + PAD)
        boxes[numa.id if numa else ""] = (x, width)
        placed.append((numa, trees))
        x += width + 2 * GAP
    for numa, trees in placed:
        _draw_numa(canvas, numa, *boxes[numa.id if numa else ""], y, bottom - y)
        for tree in trees:
            draw_tree(canvas, tree)
    _draw_sockets(canvas, links, boxes, y)
    _draw_to_processors(canvas, links, boxes, y)
    bottom = draw_fabric(canvas, devices, links, bottom)
    if named:
        canvas.cards.append(
            canvas.text(PAD + 8, top + 20, f"host n{host}", size=13, anchor="start", bold=True)
        )
    frame = canvas.box(PAD / 2, top, x - 2 * GAP, bottom + PAD / 2 - top, "#fbfcfe", line="#cbd5e0")
    canvas.back.insert(0, frame)
    canvas.grow(x - GAP, bottom + PAD)
    return bottom + PAD / 2


def _draw_numa(canvas: Canvas, numa: Device | None, x: float, w: float, y: float, h: float) -> None:
    if numa is None:
        tip, name, sub = "no source says which NUMA node these are local to", "NUMA unknown", ""
    else:
        tip = about(numa)
        name = f"NUMA {numa.numa_nodes[0] if numa.numa_nodes else short(numa.id)}"
        cpus = f"CPUs {numa.cpulist}" if numa.cpulist else ""
        cpus = "no CPUs" if numa.attrs.get("cpuless") else cpus
        memory = f"{numa.memory_bytes / 2**30:.0f} GiB" if numa.memory_bytes is not None else ""
        sub = ", ".join(p for p in (cpus, memory) if p)
    canvas.back.append(
        canvas.box(x, y, w, h, FILL["numa"], tip, line="#cbd5e0", dashed=numa is None)
    )
    canvas.cards.append(canvas.text(x + 12, y + 20, name, size=13, anchor="start", bold=True))
    canvas.cards.append(
        canvas.text(x + 12, y + 36, clip(sub, w - 24, 10), size=10, fill="#4a5568", anchor="start")
    )


def _draw_sockets(
    canvas: Canvas, links: Iterable[Link], boxes: dict[str, tuple[float, float]], y: float
) -> None:
    for link in links:
        ends = sorted(boxes[n] for n in (link.a, link.b) if n in boxes)
        if link.kind != "socket" or len(ends) < 2:
            continue
        (x0, w0), (x1, _) = ends
        span = x1 - x0 - w0
        lift = 14 if span <= 2 * GAP else 0
        path = f"M{x0 + w0:.1f} {y + lift + 8:.1f}H{x1:.1f}"
        if not lift:  # over the boxes between
            path = f"M{x0 + w0 - 12:.1f} {y:.1f}q6 -12 12 -12H{x1:.1f}q6 0 12 12"
        canvas.line(path, LINE["socket"], stroke(link.bandwidth_bytes_per_s), about_link(link))


def _draw_to_processors(
    canvas: Canvas, links: Iterable[Link], boxes: dict[str, tuple[float, float]], y: float
) -> None:
    """Coherent links of accelerators to their NUMA node: up past the host bridge."""
    for link in links:
        ends = [e for e in (link.a, link.b) if e in canvas.at]
        if not ends or not {link.a, link.b} & boxes.keys() or link.kind == "host_bridge":
            continue
        card = canvas.at[ends[0]]
        colour, right = LINE.get(link.kind, FABRIC_LINE), card.x + canvas.card_w - 10
        canvas.dot(right, y + 48, colour)
        canvas.line(
            f"M{right:.1f} {card.y:.1f}V{y + 48:.1f}",
            colour,
            stroke(link.bandwidth_bytes_per_s, link.count),
            about_link(link),
            dashed=link.confidence == "inferred",
        )


def _draw_networks(canvas: Canvas, info: TopologyInfo, y: float) -> float:
    """Networks between hosts as bars across the bottom."""
    for network in (d for d in info.devices if d.node < 0):
        spokes = [x for x in info.links if network.id in (x.a, x.b) and x.kind in NETWORK_KINDS]
        shown = sum(x.a in canvas.at or x.b in canvas.at for x in spokes)
        width = max(canvas.width - 2 * PAD, 400.0)
        canvas.cards.append(canvas.box(PAD, y, width, BAR_H, NETWORK_LINE, about(network), r=5))
        words = f"{network.id.removeprefix('net:')} network: {len(spokes)} ports"
        words += f" ({shown} of them drawn)" if shown < len(spokes) else ""
        words = clip(words, width - 16)
        canvas.cards.append(canvas.text(PAD + width / 2, y + 17, words, fill="#ffffff"))
        y += BAR_H + 8
    return y


def _draw_legend(canvas: Canvas, info: TopologyInfo, y: float) -> float:
    present = {d.kind for d in info.devices}
    x = float(PAD)
    y += 14
    for kind, words in _LEGEND.items():
        if kind not in present:
            continue
        canvas.cards.append(canvas.box(x, y, 12, 12, FILL[kind], words, r=3))
        canvas.cards.append(canvas.text(x + 18, y + 10, words, size=10, anchor="start"))
        x += 34 + width_of(words, 10)
    inferred = any(link.confidence == "inferred" for link in info.links)
    note = "wider line: more bandwidth" + (", dashed: inferred" if inferred else "")
    canvas.cards.append(canvas.text(x, y + 10, note, size=10, fill="#718096", anchor="start"))
    canvas.grow(x + width_of(note, 10), y)
    return y + 30
