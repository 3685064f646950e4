"""`python -m sagellm.comm.topology`: look at a machine from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sagellm.core.protocols import CommError, TopologyInfo

from .export import from_json, to_json, to_matrix
from .graph import TopologyGraph
from .manager import TopologyManager


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 2 when the command cannot be carried out."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        info = _topology(args)
        if args.command == "show":
            _show(info, as_json=args.json)
        elif args.command == "export":
            _export(info, args.format, args.output)
        else:
            _explain(info, args.a, args.b, as_json=args.json)
    except (CommError, OSError) as e:
        print(f"{parser.prog}: {e}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sagellm.comm.topology", description="Devices, links and paths."
    )
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "--from", dest="source", metavar="PATH",
        help="an exported JSON file, or the root of a recorded /sys tree, instead of this machine",
    )  # fmt: skip
    source.add_argument("--deadline", type=float, default=1.0, metavar="SECONDS")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", parents=[source], help="print what is there")
    show.add_argument("--json", action="store_true")
    export = commands.add_parser("export", parents=[source], help="write it for others")
    export.add_argument("format", choices=("json", "svg", "matrix"))
    export.add_argument("-o", "--output", type=Path, help="file instead of standard output")
    explain = commands.add_parser("explain", parents=[source], help="the path between two devices")
    explain.add_argument("a", help="device id, or a name such as GPU0, eth0, mlx5_0")
    explain.add_argument("b")
    explain.add_argument("--json", action="store_true")
    return parser


def _topology(args: argparse.Namespace) -> TopologyInfo:
    if args.source and Path(args.source).is_file():
        return from_json(Path(args.source).read_bytes())
    manager = TopologyManager(root=args.source or "/")
    return manager.detect(deadline_s=args.deadline)


def _show(info: TopologyInfo, *, as_json: bool) -> None:
    if as_json:
        print(to_json(info))
        return
    from rich.console import Console  # slow to import, and only people need it

    from .render import render_table

    console = Console()
    console.print(render_table(info))
    for warning in info.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


def _export(info: TopologyInfo, form: str, output: Path | None) -> None:
    if form == "json":
        text = to_json(info)
    elif form == "matrix":
        text = to_matrix(info)
    else:
        from .render import render_svg

        text = render_svg(info)
    if output is None:
        print(text, end="" if text.endswith("\n") else "\n")
    else:
        output.write_text(text, encoding="utf-8")


def _explain(info: TopologyInfo, a: str, b: str, *, as_json: bool) -> None:
    graph = TopologyGraph(info)
    path = graph.path(_resolve(info, a), _resolve(info, b))
    if as_json:
        links = [{"a": x.a, "b": x.b, "kind": x.kind, "count": x.count,
                  "bandwidth_bytes_per_s": x.bandwidth_bytes_per_s, "source": x.source,
                  "confidence": x.confidence} for x in path.links]  # fmt: skip
        print(json.dumps({
            "a": path.a, "b": path.b, "class": path.kind, "hops": path.hops,
            "bottleneck_bytes_per_s": path.bottleneck_bytes_per_s, "links": links,
        }, indent=1))  # fmt: skip
        return
    if path.kind is None:
        print(f"{path.a} - {path.b}: unknown; no source says how they are joined")
        return
    width = path.bottleneck_bytes_per_s
    shown = "unknown bandwidth" if width is None else f"{width / 1e9:.1f} GB/s each way"
    print(f"{path.a} - {path.b}: {path.kind}, {path.hops} hops, {shown}")
    for here, link in zip(path.devices, path.links, strict=False):
        there = link.b if link.a == here else link.a
        lanes = f" x{link.count}" if link.count > 1 else ""
        rate = link.bandwidth_bytes_per_s
        speed = f", {rate / 1e9:.1f} GB/s" if rate else ""
        print(f"  {here} -> {there}: {link.kind}{lanes}{speed} ({link.source}, {link.confidence})")


def _resolve(info: TopologyInfo, name: str) -> str:
    """A device id for an id, a label such as GPU0, or the name of an interface."""
    if info.find(name) is not None:
        return name
    from .export import column_labels

    nics = [d for d in info.devices if d.kind == "nic"]
    shown = [*info.accelerators, *nics]
    for label, device in zip(column_labels(shown), shown, strict=True):
        names = {label, *device.attrs.get("netdev", "").split(","), device.attrs.get("ib", "")}
        if name in names - {""}:
            return device.id
    return name


if __name__ == "__main__":
    sys.exit(main())
