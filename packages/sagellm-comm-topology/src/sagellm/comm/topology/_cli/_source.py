"""Which topology a command looks at: this machine, a recorded tree, or a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from sagellm.comm.topology.export import column_labels, from_json
from sagellm.comm.topology.manager import TopologyManager
from sagellm.core.protocols import TopologyInfo

__all__ = ["Commands", "byte_count", "device_id", "read_topology", "source_parser"]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a group of commands adds its parsers."""


def source_parser() -> argparse.ArgumentParser:
    """A parent parser with the options that choose a topology."""
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "--from", dest="source", metavar="PATH",
        help="an exported JSON file, or the root of a recorded /sys tree, instead of this machine",
    )  # fmt: skip
    source.add_argument("--deadline", type=float, default=1.0, metavar="SECONDS")
    return source


def read_topology(args: argparse.Namespace) -> TopologyInfo:
    """The topology that the options of `source_parser` choose."""
    if args.source and Path(args.source).is_file():
        return from_json(Path(args.source).read_bytes())
    manager = TopologyManager(root=args.source or "/")
    return manager.detect(deadline_s=args.deadline)


def device_id(info: TopologyInfo, name: str) -> str:
    """A device id for an id, a label such as GPU0, or the name of an interface."""
    if info.find(name) is not None:
        return name
    nics = [d for d in info.devices if d.kind == "nic"]
    shown = [*info.accelerators, *nics]
    for label, device in zip(column_labels(shown), shown, strict=True):
        names = {label, *device.attrs.get("netdev", "").split(","), device.attrs.get("ib", "")}
        if name in names - {""}:
            return device.id
    return name


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
