"""The PCI tree of one host as nested bars and cards, hung from its NUMA nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sagellm.core.protocols import Device, Link, Pair

from ._numbers import number
from ._svg_canvas import (
    BAR_H,
    CARD_H,
    CARD_W,
    FILL,
    GAP,
    LINE,
    ROW,
    STACK,
    Canvas,
    Node,
    about,
    about_link,
    rate,
    short,
    stroke,
)  # fmt: skip
from ._svg_text import clip, width_of

__all__ = ["card_width", "draw_tree", "groups", "lowest", "measure", "place"]

_DEEPEST = 64  # devices below each other in one tree; a deeper chain is drawn in pieces
_MARGIN = 8  # between the words of a card and its edges


def groups(
    devices: dict[str, Device], links: Iterable[Link], pairs: Iterable[Pair] = ()
) -> list[tuple[Device | None, list[Node]]]:
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

    def grow(device: Device, link: Link | None, deep: int = 0) -> Node:
        used.add(device.id)
        node = Node(device, link)
        for other, edge in sorted(pci.get(device.id, ()), key=lambda e: e[0]):
            if other in used:
                continue
            if deep == _DEEPEST:
                told = {"chain": f"goes on to {other}, drawn apart"}
                node.device = replace(device, attrs={**device.attrs, **told})
                break
            node.children.append(grow(devices[other], edge, deep + 1))
        stack(node)
        return node

    trees: dict[str | None, list[Node]] = {}
    near = _near(devices, pairs)
    roots = [d for d in devices.values() if d.kind == "pci_root"]
    for top in roots:
        trees.setdefault(home.get(top.id), []).append(grow(top, None))
    for device in devices.values():
        # Switches of a fabric that hang from nothing are told with its bar.
        if device.id in used or device.kind in ("numa", "fabric_switch"):
            continue
        local = [f"numa:{n}" for n in device.numa_nodes or near.get(device.id, ())]
        at = next((n for n in devices if n.rpartition("/")[2] in local), None)
        trees.setdefault(at, []).append(grow(device, None))
    numas = [d for d in devices.values() if d.kind == "numa"]
    found: list[tuple[Device | None, list[Node]]] = [
        (d, _stacked(trees.pop(d.id, []))) for d in numas
    ]
    rest = _stacked([tree for group in trees.values() for tree in group])
    return [*found, (None, rest)] if rest else found


def _near(devices: dict[str, Device], pairs: Iterable[Pair]) -> dict[str, tuple[int, ...]]:
    """NUMA nodes of what is said to be in the node of a device whose own is known."""
    found: dict[str, tuple[int, ...]] = {}
    for pair in pairs:
        if pair.path not in ("PIX", "PXB", "PHB", "NODE"):
            continue
        for one, other in ((pair.a, pair.b), (pair.b, pair.a)):
            if one in devices and other in devices and devices[other].numa_nodes:
                found.setdefault(one, devices[other].numa_nodes)
    return found


def stack(node: Node) -> None:
    """Put leaves that are no accelerators below each other: machines have many NICs."""
    node.children = _stacked(node.children)


def _stacked(nodes: list[Node]) -> list[Node]:
    leaves = [
        c for c in nodes if not c.children and c.device.kind not in ("gpu", "npu", "pci_root")
    ]
    if len(leaves) < 2:
        return nodes
    rest = [c for c in nodes if c not in leaves]
    columns = [leaves[i : i + STACK] for i in range(0, len(leaves), STACK)]
    return [*rest, *(replace(column[0], stack=column[1:]) for column in columns)]


def card_width(devices: Iterable[Device]) -> float:
    """One width for all cards in which the words of most fit: wide machines are drawn narrow."""
    needed = CARD_W[0] - 2.0 * _MARGIN
    for device in devices:
        if device.kind not in ("pci_root", "pci_switch", "numa", "fabric_switch", "display"):
            head, sub = card_words(device)
            needed = max(needed, width_of(head, 12, bold=True), width_of(sub, 10))
    return min(CARD_W[1], needed + 2 * _MARGIN)


def measure(node: Node, canvas: Canvas) -> None:
    for child in node.children:
        measure(child, canvas)
    inner = sum(c.w for c in node.children) + GAP * max(0, len(node.children) - 1)
    node.w = max(canvas.card_w, inner)


def place(node: Node, x: float, y: float, canvas: Canvas) -> None:
    node.x, node.y = x, y
    canvas.at[node.device.id] = node
    for i, card in enumerate(node.stack, 1):
        card.x, card.y = x, y + i * (CARD_H + 6)
        canvas.at[card.device.id] = card
    # Accelerators hang lowest, so that their fabric passes below the cards beside them.
    deepest = max((len(c.stack) for c in node.children), default=0)
    for child in node.children:
        drop = deepest * (CARD_H + 6) if child.device.kind in ("gpu", "npu") else 0
        place(child, x, y + ROW + drop, canvas)
        x += child.w + GAP


def is_bar(node: Node) -> bool:
    return node.device.kind in ("pci_root", "pci_switch")


def height(node: Node) -> float:
    return BAR_H if is_bar(node) else CARD_H


def lowest(node: Node) -> float:
    mine = node.y + height(node) + len(node.stack) * (CARD_H + 6)
    return max([mine, *(lowest(c) for c in node.children)])


def draw_tree(canvas: Canvas, node: Node) -> None:
    draw_card(canvas, node)
    for card in node.stack:
        draw_card(canvas, card)
    for child in node.children:
        link = child.link
        assert link is not None
        x, y = child.x + child.w / 2, child.y
        if not is_bar(child):
            x = child.x + canvas.card_w / 2
        canvas.line(
            f"M{x:.1f} {node.y + BAR_H:.1f}V{y:.1f}",
            LINE.get(link.kind, "#4a5568"),
            stroke(link.bandwidth_bytes_per_s),
            about_link(link),
            dashed=link.confidence == "inferred",
        )
        if link.bandwidth_bytes_per_s:
            words = rate(link.bandwidth_bytes_per_s)
            canvas.cards.append(
                canvas.text(x + 6, y - 8, words, size=10, anchor="start", halo=FILL["numa"])
            )
        draw_tree(canvas, child)


def draw_card(canvas: Canvas, node: Node) -> None:
    device, fill = node.device, FILL.get(node.device.kind, "#718096")
    if is_bar(node):
        canvas.cards.append(canvas.box(node.x, node.y, node.w, BAR_H, fill, about(device), r=5))
        name = "host bridge" if device.kind == "pci_root" else device.attrs.get("role", "switch")
        brief, room = short(device.id), node.w - 2 * _MARGIN
        words = [f"{name.replace('_', ' ')} {brief}", f"{name.split()[-1]} {brief}"]
        fits = next((w for w in words if width_of(w, 11) <= room), clip(brief, room))
        canvas.cards.append(canvas.text(node.x + node.w / 2, node.y + 17, fits, fill="#ffffff"))
        return
    canvas.cards.append(canvas.box(node.x, node.y, canvas.card_w, CARD_H, fill, about(device)))
    middle, room = node.x + canvas.card_w / 2, canvas.card_w - 2 * _MARGIN
    head, sub = card_words(device)
    canvas.cards.append(
        canvas.text(
            middle,
            node.y + 19,
            clip(head, room, 12, bold=True),
            size=12,
            fill="#ffffff",
            bold=True,
        )
    )
    canvas.cards.append(
        canvas.text(middle, node.y + 35, clip(sub, room, 10), size=10, fill="#f7fafc")
    )


def card_words(device: Device) -> tuple[str, str]:
    attrs = device.attrs
    if device.kind == "nic":
        names = (attrs.get("ib") or attrs.get("netdev") or device.vendor or "NIC").split(",")
        name = names[0] if len(names) == 1 else f"{names[0]} +{len(names) - 1}"
        port = number(attrs.get("port_bytes_per_s"))
        where = short(device.id) if device.bdf else attrs.get("link_layer", "NIC")
        return name, f"{port * 8 / 1e9:g} Gb/s" if port else where
    if device.kind in ("gpu", "npu"):
        position = device.visible_index if device.visible_index is not None else device.index
        label = f"{device.kind.upper()}{'' if position is None else f' {position}'}"
        where = short(device.id) if device.bdf else ""
        return label, _model(device) or f"{device.vendor or ''} {where}".strip()
    name = "switch" if device.kind == "fabric_switch" else device.kind.replace("_", " ")
    return name, short(device.id)


def _model(device: Device) -> str:
    """The model without the maker's name before it."""
    model, vendor = device.model or "", device.vendor or ""
    told = model.lower().startswith(f"{vendor.lower()} ")
    return model[len(vendor) + 1 :] if vendor and told else model
