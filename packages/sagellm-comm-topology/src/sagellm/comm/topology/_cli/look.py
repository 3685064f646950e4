"""Commands that look at a machine: show, export."""

from __future__ import annotations

import argparse
from pathlib import Path

from sagellm.comm.topology.export import to_json, to_matrix
from sagellm.core.protocols import TopologyInfo

from ._source import Commands, read_topology

__all__ = ["add_commands"]


def add_commands(commands: Commands, source: argparse.ArgumentParser) -> None:
    """Add `show` and `export`."""
    show = commands.add_parser("show", parents=[source], help="print what is there")
    show.add_argument("--json", action="store_true")
    show.set_defaults(run=_show)
    export = commands.add_parser("export", parents=[source], help="write it for others")
    export.add_argument("format", choices=("json", "svg", "matrix"))
    export.add_argument("-o", "--output", type=Path, help="file instead of standard output")
    export.set_defaults(run=_export)


def _show(args: argparse.Namespace) -> int:
    info = read_topology(args)
    if args.json:
        print(to_json(info))
        return 0
    from rich.console import Console  # slow to import, and only people need it

    from sagellm.comm.topology.render import render_table

    console = Console()
    console.print(render_table(info))
    for warning in info.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    return 0


def _export(args: argparse.Namespace) -> int:
    text = _exported(read_topology(args), args.format)
    if args.output is None:
        print(text, end="" if text.endswith("\n") else "\n")
    else:
        args.output.write_text(text, encoding="utf-8")
    return 0


def _exported(info: TopologyInfo, form: str) -> str:
    if form == "json":
        return to_json(info)
    if form == "matrix":
        return to_matrix(info)
    from sagellm.comm.topology.render import render_svg

    return render_svg(info)
