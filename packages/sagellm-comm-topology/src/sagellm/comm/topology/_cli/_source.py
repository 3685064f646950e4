"""Which topology a command looks at: this machine, a recorded tree, or a file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from sagellm.comm.topology._input import MAX_BYTES, read_regular
from sagellm.comm.topology._numbers import whole_number
from sagellm.comm.topology.detector import installed_detectors, make_context, run_detectors
from sagellm.comm.topology.export import column_labels
from sagellm.comm.topology.manager import TopologyManager
from sagellm.comm.topology.visibility import apply_visibility
from sagellm.core.protocols import ConfigError, TopologyFragment, TopologyInfo

__all__ = [
    "Commands",
    "byte_count",
    "check_tree",
    "count_up_to",
    "device_id",
    "named_topology",
    "read_files",
    "read_topology",
    "source_parser",
]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a group of commands adds its parsers."""


def source_parser() -> argparse.ArgumentParser:
    """A parent parser with the options that choose a topology."""
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "--from", dest="source", metavar="PATH",
        help="a file of any format that `import` reads, or the root of a recorded /sys tree, "
        "instead of this machine",
    )  # fmt: skip
    source.add_argument("--tools", action="store_true", help="run vendors' tools too (slow)")
    source.add_argument(
        "--deadline", type=float, metavar="SECONDS", help="longest time (1, with --tools 10)"
    )
    return source


def read_topology(args: argparse.Namespace) -> TopologyInfo:
    """The topology that the options of `source_parser` choose."""
    if args.source and not Path(args.source).is_dir():
        return read_files([args.source])
    check_tree(args.source)
    # A recorded tree is another machine's: what this shell hides is not hidden there.
    environ: dict[str, str] | None = {} if args.source else None
    manager = TopologyManager(root=args.source or "/", environ=environ, allow_commands=args.tools)
    deadline_s = args.deadline if args.deadline is not None else 10.0 if args.tools else 1.0
    return manager.detect(deadline_s=deadline_s)


def check_tree(name: str | None) -> None:
    """Refuse a folder that is no root of a recorded tree; None is this machine.

    Raises:
        ConfigError: There is no `sys` in it.

    """
    if name is not None and not (Path(name) / "sys").is_dir():
        raise ConfigError(f"{name} holds no `sys` folder: it is no root of a recorded machine")


def named_topology(name: str) -> TopologyInfo:
    """The topology of a file, of the root of a recorded tree, or of this machine (`live`)."""
    if name == "live":
        return TopologyManager().detect(deadline_s=10.0)
    if Path(name).is_dir():
        check_tree(name)
        return TopologyManager(root=name, environ={}).detect(deadline_s=10.0)
    return read_files([name])


def read_files(
    names: Sequence[str],
    *,
    form: str | None = None,
    vendor: str | None = None,
    live: bool = False,
) -> TopologyInfo:
    """The topology of one or more files together, the first believed most.

    Args:
        names: Paths; `-` is standard input.
        form: Format of all of them; None tells it by the content.
        vendor: Maker of the accelerators, for text that names none.
        live: Merge with what is found on this machine, believed least.

    """
    # Importers are needed by few commands.
    from sagellm.comm.topology.importers import import_topology, read_fragment
    from sagellm.comm.topology.importers.reader import USER_FILE, is_json, known_format
    from sagellm.comm.topology.merge import merge

    fragments: list[tuple[int, TopologyFragment]] = []
    for i, name in enumerate(names):
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if name == "-" else read_regular(name)
        if len(names) == 1 and not live:
            info = import_topology(data, form=known_format(form), vendor=vendor)
            written = info.num_nodes > 1 or is_json(data, known_format(form))
            return info if written else apply_visibility(info, {})
        fragment = read_fragment(data, form=known_format(form), vendor=vendor)
        fragments.append((USER_FILE + len(names) - i, fragment))
    warnings: tuple[str, ...] = ()
    if live:
        found = run_detectors(installed_detectors(), make_context(deadline_s=10.0))
        fragments += found.fragments
        warnings = found.warnings
    return apply_visibility(merge(fragments, warnings=warnings), os.environ if live else {})


def device_id(info: TopologyInfo, name: str) -> str:
    """A device id for an id, a label such as GPU0, or the name of an interface."""
    if info.find(name) is not None:
        return name
    nics = [d for d in info.devices if d.kind == "nic"]
    shown = [*info.accelerators, *nics]
    for label, device in zip(column_labels(shown), shown, strict=True):
        facts = (device.attrs.get(k, "").split(",") for k in ("netdev", "ib"))
        names = {label, *(name for fact in facts for name in fact)}
        if name in names - {""}:
            return device.id
    return name


def count_up_to(most: int) -> Callable[[str], int]:
    """Reads a number from 1 to `most` on the command line."""

    def read(text: str) -> int:
        count = whole_number(text, most=most)
        if not count:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number from 1 to {most}")
        return count

    return read


def byte_count(text: str) -> int:
    """Bytes out of `4096`, `64K`, `256M` or `1G`; K is 1024.

    Raises:
        argparse.ArgumentTypeError: It is no such number.

    """
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    digits = text.strip().upper().removesuffix("B").removesuffix("I")
    shift = units.get(digits[-1:], 0)
    try:
        count = float(digits[:-1] if shift else digits) * (1 << shift)
    except ValueError:
        count = 0.0
    if not 1 <= count < 1 << 62:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 4096, 64K, 256M or 1G")
    return int(count)
