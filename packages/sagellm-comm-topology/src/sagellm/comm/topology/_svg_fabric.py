"""Accelerator fabrics below the cards they join: switches and meshes as bars, wires as arcs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sagellm.core.protocols import Device, Link

from ._svg_canvas import (
    BAR_H,
    CARD_H,
    FABRIC_LINE,
    FILL,
    Canvas,
    about,
    about_link,
    rate,
    short,
    stroke,
)  # fmt: skip
from ._svg_text import width_of
from .graph import FABRIC_KINDS

__all__ = ["draw_fabric"]

_CAPTIONS = 5  # more kinds of wires are told by pointing at them
_MESH = 6  # more arcs than these members have are a tangle


def draw_fabric(
    canvas: Canvas, devices: dict[str, Device], links: Iterable[Link], low: float
) -> float:
    """Draw what joins accelerators; gives how far down it reaches."""
    fabric = [x for x in links if x.kind in FABRIC_KINDS]
    wires = [x for x in fabric if x.a in canvas.at and x.b in canvas.at]
    meshes = _meshes(wires)
    arcs = [x for x in wires if not any(x in mesh for mesh in meshes)]
    reached = max([low, *(_arc(canvas, link) for link in arcs)])
    reached = _captions(canvas, arcs, reached)
    for mesh in meshes:
        members = list(dict.fromkeys(end for x in mesh for end in (x.a, x.b)))
        words = f"{mesh[0].kind} full mesh: {len(members)} members, {len(mesh)} wires"
        tip = f"{words}\nevery pair has a wire of its own\n{about_link(mesh[0])}"
        reached = _bar(
            canvas, members, mesh[0], _with_rate(words, mesh[0]), tip, reached, open_=True
        )
    for bar in devices.values():
        spokes = [x for x in fabric if bar.id in (x.a, x.b)]
        if bar.kind != "fabric_switch" or bar.bdf is not None or not spokes:
            continue
        members = [x.b if x.a == bar.id else x.a for x in spokes]
        members = [m for m in members if m in canvas.at]
        if not members:
            continue
        boxes = sum(d.kind == "fabric_switch" and d.bdf is not None for d in devices.values())
        words = f"{short(bar.id)}: {len(members)} members"
        words += f", {boxes} switches" if boxes else ""
        tip = f"{about(bar)}\n{about_link(spokes[0])}"
        reached = _bar(canvas, members, spokes[0], _with_rate(words, spokes[0]), tip, reached)
    return reached + (10 if fabric else 0)


def _with_rate(words: str, link: Link) -> str:
    lanes = f", x{link.count} each" if link.count > 1 else ""
    speed = link.bandwidth_bytes_per_s
    return f"{words}{lanes}" + (f", {rate(speed)} each" if speed else "")


def _meshes(wires: Sequence[Link]) -> list[list[Link]]:
    """Wires of one kind and width that join every pair of many members."""
    found: list[list[Link]] = []
    alike: dict[tuple[object, ...], list[Link]] = {}
    for link in wires:
        key = (link.kind, link.count, link.bandwidth_bytes_per_s, link.confidence)
        alike.setdefault(key, []).append(link)
    for group in alike.values():
        near: dict[str, set[str]] = {}
        for link in group:
            near.setdefault(link.a, {link.a}).add(link.b)
            near.setdefault(link.b, {link.b}).add(link.a)
        cliques = {frozenset(n) for n in near.values()}
        for members in cliques:
            if len(members) >= _MESH and all(near[m] == members for m in members):
                found.append([x for x in group if x.a in members])
    return sorted(found, key=lambda mesh: mesh[0].a)


def _arc(canvas: Canvas, link: Link) -> float:
    a, b = sorted((canvas.at[link.a], canvas.at[link.b]), key=lambda n: n.x)
    x0, x1 = a.x + canvas.card_w / 2, b.x + canvas.card_w / 2
    y0, y1 = a.y + CARD_H, b.y + CARD_H
    sag = min(26 + (x1 - x0) * 0.09, 110.0)
    canvas.line(
        f"M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 + sag:.1f} {x1:.1f} {y1 + sag:.1f} {x1:.1f} {y1:.1f}",
        FABRIC_LINE,
        stroke(link.bandwidth_bytes_per_s, link.count),
        about_link(link),
        dashed=link.confidence == "inferred",
    )
    return max(y0, y1) + sag * 0.8


def _captions(canvas: Canvas, arcs: Sequence[Link], low: float) -> float:
    """What the arcs are, a line for each kind and width of them."""
    alike: dict[tuple[object, ...], list[Link]] = {}
    for link in arcs:
        key = (link.kind, link.count, link.bandwidth_bytes_per_s, link.confidence)
        alike.setdefault(key, []).append(link)
    left, y = min((canvas.at[x.a].x for x in arcs), default=0.0), low + 8
    for group in list(alike.values())[:_CAPTIONS]:
        link, many = group[0], "" if len(group) == 1 else f"{len(group)} of them, "
        speed = link.bandwidth_bytes_per_s
        width = f"{rate(speed)} each way" if speed else "bandwidth unknown"
        words = f"{link.kind} x{link.count}: {many}{width}"
        canvas.line(
            f"M{left:.1f} {y + 9:.1f}h26", FABRIC_LINE, stroke(speed, link.count),
            about_link(link), dashed=link.confidence == "inferred",
        )  # fmt: skip
        canvas.cards.append(canvas.text(left + 36, y + 13, words, anchor="start"))
        canvas.grow(left + 36 + width_of(words, 11), y)
        y += 20
    return y if arcs else low


def _bar(
    canvas: Canvas,
    members: Sequence[str],
    link: Link,
    words: str,
    tip: str,
    low: float,
    *,
    open_: bool = False,
) -> float:
    """A bar below its members with a line to each; an open one is no device."""
    ends = [canvas.at[m] for m in members]
    y = low + 34
    left = min(n.x for n in ends)
    width = max(n.x for n in ends) + canvas.card_w - left
    for node in ends:
        x = node.x + canvas.card_w / 2
        canvas.line(
            f"M{x:.1f} {node.y + CARD_H:.1f}V{y:.1f}",
            FABRIC_LINE,
            stroke(link.bandwidth_bytes_per_s, link.count),
            tip,
            dashed=link.confidence == "inferred",
        )
    fill, ink = ("#fffaf0", "#744210") if open_ else (FILL["fabric_switch"], "#ffffff")
    line = FABRIC_LINE if open_ else "none"
    canvas.cards.append(canvas.box(left, y, width, BAR_H, fill, tip, line=line, r=5))
    wide = width_of(words, 11)
    if wide + 16 <= width:
        canvas.cards.append(canvas.text(left + width / 2, y + 17, words, fill=ink))
        return y + BAR_H
    canvas.cards.append(canvas.text(left, y + BAR_H + 15, words, anchor="start"))
    canvas.grow(left + wide, y)
    return y + BAR_H + 20
