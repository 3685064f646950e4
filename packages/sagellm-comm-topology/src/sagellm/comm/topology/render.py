"""A topology for people: a table for the terminal, and a drawing."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sagellm.core.protocols import Device, TopologyInfo

from ._numbers import number
from ._svg import render_svg as render_svg
from .export import column_labels, pair_label
from .graph import TopologyGraph

__all__ = ["bytes_text", "render_matrix", "render_svg", "render_table"]

_STYLES = {
    "LINK": "bold green", "C2C": "bold green", "PIX": "green", "PXB": "cyan", "PHB": "yellow",
    "NODE": "yellow", "SYS": "red", "NET": "magenta",
}  # fmt: skip
_KIND_NAMES = {"pci_root": "bridge", "pci_switch": "switch", "fabric_switch": "fabric"}
_MATRIX_LIMIT = 24
_BLOCK = 12  # columns that a terminal of 80 characters holds


def bytes_text(count: float | None) -> str:
    """A number of bytes for people; `?` when unknown.

    >>> bytes_text(80 << 30), bytes_text(None)
    ('80.0 GiB', '?')
    """
    if count is None:
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def render_table(info: TopologyInfo) -> Table:
    """One row for each device: what it is, where it is, and its way to the host.

    Column `#` is the number by which this process sees an accelerator. Unknown facts are `?`.
    Ids of hosts after a `gather` begin with `n<node>/`.
    """
    graph = TopologyGraph(info)
    hosts = f"{info.num_nodes} hosts: " if info.num_nodes > 1 else ""
    hosts = hosts or (f"{info.hostname}: " if info.hostname else "")
    count = info.num_devices
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=Text(f"{hosts}{count} accelerator{'' if count == 1 else 's'}"),
        caption=Text(f"fingerprint {info.fingerprint}") if info.fingerprint else None,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("device", style="bold", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("what it is", min_width=18, overflow="fold")
    table.add_column("NUMA", justify="right", no_wrap=True)
    table.add_column("CPUs", min_width=6, overflow="fold")
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("link", justify="right", no_wrap=True)
    table.add_column("#", justify="right", no_wrap=True)
    for device in info.devices:
        numa = ",".join(map(str, device.numa_nodes)) or "?"
        if device.kind in ("pci_switch", "fabric_switch") and not device.numa_nodes:
            numa = ""
        has_memory = device.kind in ("gpu", "npu", "numa", "cxl_mem")
        cells = (
            device.id,
            _KIND_NAMES.get(device.kind, device.kind),
            describe(device),
            numa,
            device.cpulist or "",
            bytes_text(device.memory_bytes) if has_memory else "",
            _widest_link(graph, device),
            _visible(device),
        )
        table.add_row(*map(Text, cells))  # never markup: words of other programs are in them
    return table


def render_matrix(info: TopologyInfo) -> RenderableType:
    """The path class of every pair of accelerators and NICs, coloured, in blocks of columns.

    Of more than 24 devices the first 24 are shown and the others counted.
    """
    graph = TopologyGraph(info)
    shown = [*info.accelerators, *(d for d in info.devices if d.kind == "nic")]
    cut = shown[:_MATRIX_LIMIT]
    labels = column_labels(cut)
    blocks: list[RenderableType] = []
    for first in range(0, len(cut), _BLOCK):
        columns = cut[first : first + _BLOCK]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("", style="bold", no_wrap=True)
        for label in labels[first : first + _BLOCK]:
            table.add_column(label, justify="center", no_wrap=True)
        for label, row in zip(labels, cut, strict=True):
            cells: list[RenderableType] = [label]
            for column in columns:
                kind = graph.path(row.id, column.id).kind or ""
                cells.append(Text(pair_label(graph, row, column), style=_STYLES.get(kind, "dim")))
            table.add_row(*cells)
        blocks.append(table)
    if len(cut) < len(shown):
        blocks.append(f"{len(shown) - len(cut)} more devices are not shown")
    return Group(*blocks)


def describe(device: Device) -> str:
    """Vendor, model and names in one line."""
    attrs = device.attrs
    parts = [
        device.vendor,
        device.model,
        attrs.get("ib"),
        attrs.get("netdev"),
        attrs.get("role", "").replace("_", " "),
    ]
    if device.kind == "nic":
        parts.append(attrs.get("link_layer"))
        state = attrs.get("ib_state") or attrs.get("operstate")
        parts.append(state.lower() if state else None)
    if attrs.get("cpuless"):
        parts.append("memory only")
    if attrs.get("mig_mode"):
        parts.append("MIG")
    return " ".join(p for p in parts if p)


def _widest_link(graph: TopologyGraph, device: Device) -> str:
    """The device's port or fastest link, per direction."""
    if device.kind == "nic":
        port = number(device.attrs.get("port_bytes_per_s"))
        return f"{port * 8 / 1e9:g} Gb/s" if port else "?"
    if device.kind not in ("gpu", "npu", "pci_switch"):
        return ""
    rates = [x.bandwidth_bytes_per_s for x in graph.links_of(device.id) if x.bandwidth_bytes_per_s]
    return f"{max(rates) / 1e9:.1f} GB/s" if rates else "?"


def _visible(device: Device) -> str:
    if device.kind not in ("gpu", "npu"):
        return ""
    return "hidden" if device.visible_index is None else str(device.visible_index)
