"""Commands that look at a machine or a file: show, export, import."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sagellm.comm.topology.export import to_json, to_matrix, to_nccl_xml
from sagellm.core.protocols import TopologyInfo

from ._source import Commands, read_files, read_topology

__all__ = ["add_commands"]

_SCHEMA = "sagellm.topology.export/1"


def add_commands(commands: Commands, source: argparse.ArgumentParser) -> None:
    """Add `show`, `export` and `import`."""
    show = commands.add_parser("show", parents=[source], help="print what is there")
    show.add_argument("--json", action="store_true")
    show.add_argument("--matrix", action="store_true", help="the class of every pair as well")
    show.set_defaults(run=_show)
    export = commands.add_parser("export", parents=[source], help="write it for others")
    export.add_argument("format", choices=("json", "nccl-xml", "matrix", "svg"))
    export.add_argument("-o", "--output", type=Path, help="file instead of standard output")
    export.add_argument(
        "--json", action="store_true", help="tell what was written, or the text itself, in JSON"
    )
    export.add_argument(
        "--skeleton", action="store_true",
        help="nccl-xml: CPUs and PCI functions alone, for NCCL_TOPO_FILE of a virtual machine",
    )  # fmt: skip
    export.set_defaults(run=_export)
    read = commands.add_parser(
        "import",
        help="read what other tools wrote",
        description="Reads NCCL, RCCL and hwloc XML, `topo -m` and `-p2p` of nvidia-smi and its "
        "cousins, nvidia-smi -L, npu-smi, mx-smi, rocm-smi, lspci -nn and our JSON. Of several "
        "files the first is believed most; `-` is standard input.",
    )
    read.add_argument("files", nargs="+", metavar="FILE")
    read.add_argument("--format", help="the format instead of what the content looks like")
    read.add_argument("--vendor", help="maker of the accelerators, for text that names none")
    read.add_argument("--live", action="store_true", help="merge with what is on this machine")
    read.add_argument("--matrix", action="store_true", help="the class of every pair as well")
    read.add_argument("--json", action="store_true")
    read.add_argument("-o", "--output", type=Path, help="write JSON to a file")
    read.set_defaults(run=_import)


def _show(args: argparse.Namespace) -> int:
    _print(read_topology(args), as_json=args.json, matrix=args.matrix)
    return 0


def _import(args: argparse.Namespace) -> int:
    info = read_files(args.files, form=args.format, vendor=args.vendor, live=args.live)
    if args.output is not None:
        args.output.write_text(to_json(info), encoding="utf-8")
        if args.json:
            _tell("json", {"file": str(args.output)})
        return 0
    _print(info, as_json=args.json, matrix=args.matrix)
    return 0


def _print(info: TopologyInfo, *, as_json: bool, matrix: bool) -> None:
    if as_json:
        sys.stdout.write(to_json(info) + "\n")
        return
    from rich.console import Console  # slow to import, and only people need it

    from sagellm.comm.topology.render import render_matrix, render_table

    console = Console(markup=False)
    console.print(render_table(info))
    if matrix:
        console.print(render_matrix(info))
    for warning in info.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


def _export(args: argparse.Namespace) -> int:
    text = _exported(read_topology(args), args.format, skeleton=args.skeleton)
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    if args.json:
        place = {"text": text} if args.output is None else {"file": str(args.output)}
        _tell(args.format, place)
    elif args.output is None:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
    return 0


def _tell(form: str, place: dict[str, str]) -> None:
    print(json.dumps({"schema": _SCHEMA, "format": form, **place}, indent=1))


def _exported(info: TopologyInfo, form: str, *, skeleton: bool) -> str:
    if form == "json":
        return to_json(info)
    if form == "nccl-xml":
        return to_nccl_xml(info, skeleton=skeleton)
    if form == "matrix":
        return to_matrix(info)
    from sagellm.comm.topology.render import render_svg

    return render_svg(info)
