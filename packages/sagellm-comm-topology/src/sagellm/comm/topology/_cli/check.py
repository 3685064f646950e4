"""Commands that compare and examine: diff, doctor."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from sagellm.comm.topology._diff import differences
from sagellm.comm.topology._doctor import Finding, Visit, examine
from sagellm.comm.topology.detector import (
    Detection,
    installed_detectors,
    make_context,
    run_detectors,
)
from sagellm.comm.topology.merge import merge
from sagellm.comm.topology.visibility import apply_visibility
from sagellm.core.protocols import ConfigError, TopologyInfo

from ._source import Commands, check_tree, named_topology, read_files

__all__ = ["add_commands"]

_DIFF, _DOCTOR = "sagellm.topology.diff/1", "sagellm.topology.doctor/1"


def add_commands(commands: Commands, source: argparse.ArgumentParser) -> None:
    """Add `diff` and `doctor`."""
    diff = commands.add_parser(
        "diff",
        help="what differs between two topologies",
        description="Exit code 0 when nothing differs, 1 when something does.",
    )
    diff.add_argument("a", help="a file, the root of a recorded tree, or `live`")
    diff.add_argument("b", help="the same")
    diff.add_argument("--json", action="store_true")
    diff.set_defaults(run=_diff)
    doctor = commands.add_parser(
        "doctor",
        parents=[source],
        help="what could not be read here, why it matters, what to do",
        description="Exit code 1 when something that matters could not be read.",
    )
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)


def _diff(args: argparse.Namespace) -> int:
    left, right = named_topology(args.a), named_topology(args.b)
    found = differences(left, right)
    same = left.fingerprint == right.fingerprint
    if args.json:
        document = {"schema": _DIFF, "same_structure": same,
                    "differences": [asdict(d) for d in found]}  # fmt: skip
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
        return int(bool(found))
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False)
    if found:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        sides = (Path(args.a).name, Path(args.b).name)
        sides = sides if len(set(sides)) == 2 else (args.a, args.b)
        for name in ("", "which", "fact", *sides):
            table.add_column(Text(name), overflow="fold")
        for d in found:
            left_text = Text(d.left or "-", style="red" if d.left else "dim")
            right_text = Text(d.right or "-", style="green" if d.right else "dim")
            table.add_row(d.what, Text(d.name), d.fact, left_text, right_text)
        console.print(table)
    words = "the structure is the same" if same else "the structure differs"
    console.print(f"{len(found)} differences; {words}", highlight=False)
    return int(bool(found))


def _doctor(args: argparse.Namespace) -> int:
    info, detection = _examined(args)
    visits = [Visit.of(f) for _, f in detection.fragments]
    findings = examine(info, detection)
    if args.json:
        document = {"schema": _DOCTOR, "detectors": [asdict(v) for v in visits],
                    "findings": [asdict(f) for f in findings]}  # fmt: skip
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        _print(visits, findings)
    return int(any(f.severity == "error" for f in findings))


def _examined(args: argparse.Namespace) -> tuple[TopologyInfo, Detection]:
    """What is there, and who said it; a file has no detectors."""
    if args.source and not Path(args.source).is_dir():
        return read_files([args.source]), Detection((), ())
    check_tree(args.source)
    if args.deadline is not None and not args.deadline > 0:
        raise ConfigError(f"--deadline must be above 0, not {args.deadline}")
    # A recorded tree is another machine's: what this shell hides is not hidden there.
    environ: dict[str, str] | None = {} if args.source else None
    context = make_context(
        root=args.source or "/",
        environ=environ,
        deadline_s=20.0 if args.deadline is None else args.deadline,
        allow_commands=args.tools,
    )
    detection = run_detectors(installed_detectors(), context)
    info = merge(detection.fragments, warnings=detection.warnings)
    return apply_visibility(info, context.environ), detection


def _print(visits: list[Visit], findings: list[Finding]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("detector", style="bold", no_wrap=True)
    for name in ("devices", "links", "pairs", "ms"):
        table.add_column(name, justify="right")
    for v in sorted(visits, key=lambda v: (-v.devices - v.links, v.detector)):
        style = None if v.devices or v.links or v.pairs else "dim"
        counts = (str(v.devices), str(v.links), str(v.pairs), f"{v.elapsed_s * 1e3:.1f}")
        table.add_row(v.detector, *counts, style=style)
    if visits:
        console.print(table)
    styles = {"error": "bold red", "warning": "yellow", "note": "cyan"}
    for f in findings:
        console.print(f"{f.severity}: ", style=styles[f.severity], end="")
        console.print(f.message, markup=False, highlight=False)
        if f.next_step:
            console.print(f"   -> {f.next_step}", markup=False, highlight=False)
    if not findings:
        console.print("nothing is missing", style="green")
