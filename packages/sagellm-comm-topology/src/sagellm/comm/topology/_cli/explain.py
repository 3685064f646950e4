"""The command that explains the path between two devices."""

from __future__ import annotations

import argparse
import json

from sagellm.comm.topology.graph import TopologyGraph
from sagellm.core.protocols import Path

from ._source import Commands, device_id, read_topology

__all__ = ["add_commands"]


def add_commands(commands: Commands, source: argparse.ArgumentParser) -> None:
    """Add `explain`."""
    explain = commands.add_parser("explain", parents=[source], help="the path between two devices")
    explain.add_argument("a", help="device id, or a name such as GPU0, eth0, mlx5_0")
    explain.add_argument("b")
    explain.add_argument("--json", action="store_true")
    explain.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> int:
    info = read_topology(args)
    path = TopologyGraph(info).path(device_id(info, args.a), device_id(info, args.b))
    print(_as_json(path) if args.json else _in_words(path))
    return 0


def _as_json(path: Path) -> str:
    links = [{"a": x.a, "b": x.b, "kind": x.kind, "count": x.count,
              "bandwidth_bytes_per_s": x.bandwidth_bytes_per_s, "source": x.source,
              "confidence": x.confidence} for x in path.links]  # fmt: skip
    return json.dumps({
        "a": path.a, "b": path.b, "class": path.kind, "hops": path.hops,
        "bottleneck_bytes_per_s": path.bottleneck_bytes_per_s, "links": links,
    }, indent=1)  # fmt: skip


def _in_words(path: Path) -> str:
    if path.kind is None:
        return f"{path.a} - {path.b}: unknown; no source says how they are joined"
    width = path.bottleneck_bytes_per_s
    shown = "unknown bandwidth" if width is None else f"{width / 1e9:.1f} GB/s each way"
    lines = [f"{path.a} - {path.b}: {path.kind}, {path.hops} hops, {shown}"]
    for here, link in zip(path.devices, path.links, strict=False):
        there = link.b if link.a == here else link.a
        lanes = f" x{link.count}" if link.count > 1 else ""
        rate = link.bandwidth_bytes_per_s
        speed = f", {rate / 1e9:.1f} GB/s" if rate else ""
        lines.append(
            f"  {here} -> {there}: {link.kind}{lanes}{speed} ({link.source}, {link.confidence})"
        )
    return "\n".join(lines)
