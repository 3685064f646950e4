"""The command that explains the path between two devices."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sagellm.comm.topology.graph import TopologyGraph
from sagellm.core.protocols import Path

from ._source import Commands, device_id, read_topology

__all__ = ["add_commands"]

_SCHEMA = "sagellm.topology.explain/1"


def add_commands(commands: Commands, source: argparse.ArgumentParser) -> None:
    """Add `explain`."""
    explain = commands.add_parser("explain", parents=[source], help="the path between two devices")
    explain.add_argument("a", help="device id, or a name such as GPU0, eth0, mlx5_0")
    explain.add_argument("b")
    explain.add_argument("--json", action="store_true")
    explain.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> int:
    info = read_topology(args)
    graph = TopologyGraph(info)
    a, b = device_id(info, args.a), device_id(info, args.b)
    path = graph.path(a, b)
    others = {"widest": graph.widest(a, b), "shortest": graph.shortest(a, b)}
    others = {k: p for k, p in others.items() if p.kind and p.devices != path.devices}
    if args.json:
        told = {**_as_json(path), **{k: _as_json(p) for k, p in others.items()}}
        print(json.dumps({"schema": _SCHEMA, **told}, indent=1))
        return 0
    from rich.console import Console

    console = Console(markup=False)
    console.print(_headline(path), highlight=False, soft_wrap=True)
    if path.links:
        console.print(_table(path))
    for name, other in others.items():
        console.print(
            f"{name} way: {' -> '.join(other.devices)} ({other.kind}, {_speed(other)})",
            style="dim", highlight=False, soft_wrap=True,
        )  # fmt: skip
    return 0


def _as_json(path: Path) -> dict[str, Any]:  # Any: JSON
    links = [{"a": x.a, "b": x.b, "kind": x.kind, "count": x.count,
              "bandwidth_bytes_per_s": x.bandwidth_bytes_per_s, "source": x.source,
              "confidence": x.confidence} for x in path.links]  # fmt: skip
    return {
        "a": path.a, "b": path.b, "class": path.kind, "hops": path.hops,
        "bottleneck_bytes_per_s": path.bottleneck_bytes_per_s, "links": links,
    }  # fmt: skip


def _headline(path: Path) -> str:
    if path.kind is None:
        return f"{path.a} - {path.b}: unknown; no source says how they are joined"
    if path.hops is None:
        return f"{path.a} - {path.b}: {path.kind}; no source names the links between them"
    return f"{path.a} - {path.b}: {path.kind}, {path.hops} hops, {_speed(path)}"


def _speed(path: Path) -> str:
    width = path.bottleneck_bytes_per_s
    return "unknown bandwidth" if width is None else f"{width / 1e9:.1f} GB/s each way"


def _table(path: Path) -> object:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("from", "to", "link"):
        table.add_column(name, no_wrap=True)
    table.add_column("each way", justify="right", no_wrap=True)
    table.add_column("who says so", overflow="fold")
    for here, link in zip(path.devices, path.links, strict=False):
        there = link.b if link.a == here else link.a
        lanes = f" x{link.count}" if link.count > 1 else ""
        rate = link.bandwidth_bytes_per_s
        narrowest = rate is not None and rate == path.bottleneck_bytes_per_s
        table.add_row(
            here, there, link.kind + lanes, f"{rate / 1e9:.1f} GB/s" if rate else "?",
            f"{link.source}, {link.confidence}", style="bold" if narrowest else "",
        )  # fmt: skip
    return table
