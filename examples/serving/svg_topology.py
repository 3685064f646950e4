"""The topology of a run as an SVG: who sends KV to whom, and the machine beneath."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from sagellm.core.protocols import Device, TopologyInfo
from serving.messages import Job, Ready
from serving.svg_timeline import svg_text

_WIDTH = 1000
_CARD_W, _CARD_H, _CARD_GAP = 300, 62, 16
_BLUE, _ORANGE, _GREY = "#3b6fb6", "#d9822b", "#66727f"
_KIND_COLOUR = {"gpu": "#3f8f5f", "npu": "#8a5fb0", "nic": "#2f8f9d"}
_KINDS = {
    "pci_root": "PCI root",
    "pci_switch": "PCI switch",
    "fabric_switch": "fabric switch",
    "cxl_mem": "CXL memory",
}
_CHIP_W, _CHIP_H, _CHIP_GAP = 212, 44, 12


@dataclass(frozen=True, slots=True)
class Flow:
    """KV that went from one rank to another."""

    source: int
    target: int
    nbytes: int
    path: str


def write_topology(
    path: Path,
    job: Job,
    ready: Mapping[int, Ready],
    flows: Sequence[Flow],
    topology: TopologyInfo,
) -> None:
    """Draw the ranks with the KV that flowed between them, above the devices of the host."""
    parts = [svg_text(24, 36, "Disaggregated serving: the job", size=19, weight=600)]
    bottom = _job(parts, job, ready, flows)
    host = topology.hostname or "this host"
    title = f"The machine: {host}, {topology.num_devices} accelerators"
    parts.append(svg_text(24, bottom + 52, title, size=19, weight=600))
    bottom = _machine(parts, bottom + 72, topology)
    height = bottom + 24
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="system-ui, sans-serif" font-size="13">\n'
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{_GREY}"/></marker>'
        "</defs>\n"
        '<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _job(parts: list[str], job: Job, ready: Mapping[int, Ready], flows: Sequence[Flow]) -> float:
    top, most = 60, max(job.tp_prefill, job.tp_decode)
    inner = most * _CARD_H + (most - 1) * _CARD_GAP
    height = inner + 84
    at: dict[int, tuple[float, float]] = {}
    sides = (
        ("prefill", job.prefill_ranks, 24.0, _BLUE),
        ("decode", job.decode_ranks, _WIDTH - 24.0 - _CARD_W - 32, _ORANGE),
    )
    for role, ranks, left, colour in sides:
        parts.append(
            _box(left, top, _CARD_W + 32, height, fill="#f7f9fb", stroke=colour, radius=12)
        )
        title = f"{role}, tensor parallel over {len(ranks)}"
        parts.append(svg_text(left + 16, top + 27, title, fill=colour, size=14, weight=600))
        first = ready[ranks[0]]
        how = (
            f"all_reduce: {first.backend}, {first.algorithm}"
            if len(ranks) > 1
            else "a group of one"
        )
        parts.append(svg_text(left + 16, top + height - 16, how, fill=_GREY, size=12))
        used = len(ranks) * _CARD_H + (len(ranks) - 1) * _CARD_GAP
        y = top + 42 + (inner - used) / 2
        for rank in ranks:
            at[rank] = (left + 16, y)
            _rank_card(parts, rank, ready[rank], left + 16, y, colour)
            y += _CARD_H + _CARD_GAP
    for flow in flows:
        _arrow(parts, at[flow.source], at[flow.target], flow)
    return top + height


def _rank_card(parts: list[str], rank: int, ready: Ready, x: float, y: float, colour: str) -> None:
    parts.append(_box(x, y, _CARD_W, _CARD_H, fill="#ffffff", stroke=colour, radius=8))
    heads = ", ".join(map(str, ready.kv_heads))
    parts.append(svg_text(x + 14, y + 25, f"rank {rank}", weight=600))
    parts.append(svg_text(x + _CARD_W - 14, y + 25, f"KV heads {heads}", anchor="end"))
    held = f"{ready.parameter_bytes / 1e6:.1f} MB of {ready.parameter_bytes_total / 1e6:.1f} MB"
    parts.append(svg_text(x + 14, y + 46, f"parameters {held}", fill=_GREY, size=12))


def _arrow(
    parts: list[str], source: tuple[float, float], target: tuple[float, float], flow: Flow
) -> None:
    x1, y1 = source[0] + _CARD_W + 2, source[1] + _CARD_H / 2
    x2, y2 = target[0] - 4, target[1] + _CARD_H / 2
    bend = (x2 - x1) / 2
    width = 1.5 if flow.nbytes == 0 else 2.5
    parts.append(
        f'<path d="M{x1:.1f} {y1:.1f} C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} '
        f'{x2:.1f} {y2:.1f}" fill="none" stroke="{_GREY}" stroke-width="{width}" '
        'marker-end="url(#tip)"/>'
    )
    label = f"KV {flow.nbytes / 1e6:.1f} MB · {flow.path}"
    at_x, at_y = (x1 + x2) / 2, (y1 + y2) / 2
    w = 7.0 * len(label) + 12
    parts.append(_box(at_x - w / 2, at_y - 11, w, 22, fill="#ffffff", stroke="#d5dbe1", radius=11))
    parts.append(svg_text(at_x, at_y + 4.5, label, anchor="middle", size=12))


def _machine(parts: list[str], top: float, topology: TopologyInfo) -> float:
    homes = {d.id: d for d in topology.devices if d.kind == "numa"}
    inside: dict[str, list[Device]] = {home: [] for home in homes}
    loose: list[Device] = []
    by_number = {home.rsplit(":", 1)[-1]: home for home in homes}
    for device in topology.devices:
        if device.kind == "numa":
            continue
        home = by_number.get(str(device.numa_nodes[0])) if device.numa_nodes else None
        home = home or _above(device.id, topology, homes)
        (inside[home] if home else loose).append(device)
    for home, devices in inside.items():
        cpus = homes[home].cpulist
        memory = homes[home].memory_bytes
        title = f"NUMA node {home.rsplit(':', 1)[-1]}"
        title += f" · CPUs {cpus}" if cpus else ""
        title += f" · {memory / 2**30:.0f} GiB" if memory else ""
        top = _shelf(parts, top, title, devices)
    if loose:
        top = _shelf(parts, top, "no NUMA node stated", loose)
    named = [link for link in topology.links if link.kind not in ("pcie", "host_bridge")]
    for link in named[:40]:
        speed = link.bandwidth_bytes_per_s
        rate = f", {speed / 1e9:.1f} GB/s each way" if speed else ""
        line = f"{link.a} — {link.b}: {link.kind} x{link.count}{rate}"
        parts.append(svg_text(40, top + 14, line, fill=_GREY, size=12))
        top += 20
    return top


def _above(device_id: str, topology: TopologyInfo, homes: Mapping[str, Device]) -> str | None:
    """The NUMA node that a device hangs under, however many bridges are between."""
    seen, edge = {device_id}, [device_id]
    while edge:
        at = edge.pop()
        if at in homes:
            return at
        for link in topology.links:
            if link.kind in ("pcie", "host_bridge") and at in (link.a, link.b):
                other = link.b if link.a == at else link.a
                if other not in seen:
                    seen.add(other)
                    edge.append(other)
    return None


def _shelf(parts: list[str], top: float, title: str, devices: Sequence[Device]) -> float:
    per_row = int((_WIDTH - 48 - 32 + _CHIP_GAP) // (_CHIP_W + _CHIP_GAP))
    rows = -(-len(devices) // per_row)
    height = 44 + rows * (_CHIP_H + _CHIP_GAP) + (4 if rows else 0)
    parts.append(_box(24, top, _WIDTH - 48, height, fill="#f7f9fb", stroke="#c3cbd3", radius=12))
    parts.append(svg_text(40, top + 27, title, size=14, weight=600))
    for i, device in enumerate(devices):
        x = 40 + i % per_row * (_CHIP_W + _CHIP_GAP)
        y = top + 42 + i // per_row * (_CHIP_H + _CHIP_GAP)
        colour = _KIND_COLOUR.get(device.kind, _GREY)
        parts.append(_box(x, y, _CHIP_W, _CHIP_H, fill="#ffffff", stroke=colour, radius=6))
        kind = _KINDS.get(device.kind, device.kind.upper())
        what = device.model or device.vendor or ""
        parts.append(svg_text(x + 10, y + 18, _short(device.id, 26), size=12, weight=600))
        label = f"{kind} · {what}" if what else kind
        parts.append(svg_text(x + 10, y + 34, _short(label, 32), fill=colour, size=11))
    return top + height + 12


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _box(x: float, y: float, w: float, h: float, *, fill: str, stroke: str, radius: float) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{radius}" '
        f'fill="{escape(fill)}" stroke="{escape(stroke)}" stroke-width="1.4"/>'
    )
