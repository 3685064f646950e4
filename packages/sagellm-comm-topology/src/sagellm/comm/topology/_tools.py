"""Detectors that run a vendor's command-line tool, where commands are allowed.

A command costs 0.3-2 s, so that none runs on the default path. Tools print errors on standard
output and end with 0: only what reads as a table counts. The tools of Ascend, MetaX, Moore Threads
and Kunlun have their detectors in `sagellm-comm-domestic`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sagellm.core.protocols import (
    CommandResult,
    DetectionContext,
    IntegrityError,
    TopologyFragment,
)
from sagellm.core.protocols.detection import ask_tool

from ._numbers import whole_number
from ._sysfs import normal_bdf

__all__ = ["TOOLS", "Tool", "ToolDetector"]

_QUERY = ("--query-gpu=index,pci.bus_id,uuid", "--format=csv,noheader")
_CSV = re.compile(r"^\s*(\d+)\s*,\s*([0-9A-Fa-f:.]+)\s*(?:,\s*([\w\-]+))?\s*$")
_BUS = re.compile(r"^\s*\w+\[(\d+)\]\s*:\s*PCI Bus:\s*([0-9A-Fa-f:.]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Tool:
    """How one tool is asked.

    Attributes:
        name: The command.
        vendor: Lower-case maker of its devices.
        tables: Arguments of each run that prints a matrix.
        addresses: Arguments of the run that gives bus addresses; empty without one.

    """

    name: str
    vendor: str
    tables: tuple[tuple[str, ...], ...]
    addresses: tuple[str, ...] = ()


class ToolDetector:
    """Runs a tool and reads its tables; a `Detector`."""

    def __init__(self, tool: Tool) -> None:
        self._tool = tool

    def detect(self, ctx: DetectionContext) -> TopologyFragment:
        """What the tool prints, never raising; empty without the tool or without permission."""
        tool = self._tool
        if not ctx.allow_commands:
            return TopologyFragment(tool.name)
        warnings: list[str] = []
        found: TopologyFragment | None = None
        for arguments in tool.tables:
            printed = ask_tool(ctx, tool.name, arguments, warnings)
            if printed is None:
                break
            fragment = _read(tool, arguments, printed, warnings)
            found = _together(found, fragment) if found and fragment else found or fragment
        if found is None:
            return TopologyFragment(tool.name, warnings=tuple(warnings))
        if tool.addresses:
            printed = ask_tool(ctx, tool.name, tool.addresses, warnings)
            found = _addressed(found, printed.stdout if printed else "", tool.vendor)
        nameless = [d.id for d in found.devices if d.kind in ("gpu", "npu") and d.bdf is None]
        if nameless:
            warnings.append(f"no bus address for {', '.join(nameless)}: known by number alone")
        return replace(found, warnings=(*warnings, *found.warnings))


def _read(
    tool: Tool, arguments: Sequence[str], printed: CommandResult, warnings: list[str]
) -> TopologyFragment | None:
    from .importers import read_fragment  # not needed where no command runs

    try:
        return read_fragment(printed.stdout.encode(), vendor=tool.vendor, source=tool.name)
    except IntegrityError:
        said = " ".join((tool.name, *arguments))
        warnings.append(f"`{said}` printed no table: {printed.first_line}")
        return None


def _together(a: TopologyFragment, b: TopologyFragment) -> TopologyFragment:
    known = {d.id for d in a.devices}
    return replace(
        a,
        devices=(*a.devices, *(d for d in b.devices if d.id not in known)),
        links=(*a.links, *b.links),
        domains=(*a.domains, *b.domains),
        pairs=(*a.pairs, *b.pairs),
        warnings=(*a.warnings, *b.warnings),
    )


def _addressed(found: TopologyFragment, text: str, vendor: str) -> TopologyFragment:
    """The devices with the bus addresses and UUIDs that another run printed."""
    told: dict[int, tuple[str, str | None]] = {}
    for line in text.splitlines():
        match = _CSV.match(line) or _BUS.match(line)
        bdf = normal_bdf(match[2]) if match else None
        index = whole_number(match[1]) if match else None
        if match and bdf and index is not None:
            told[index] = (bdf, match[3] if match.re is _CSV else None)
    devices = tuple(
        replace(d, bdf=told[d.index][0], uuid=d.uuid or told[d.index][1])
        if d.vendor == vendor and d.index in told and d.kind in ("gpu", "npu")
        else d
        for d in found.devices
    )
    return replace(found, devices=devices)


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("nvidia-smi", "nvidia", (("topo", "-m"), ("topo", "-p2p", "r")), _QUERY),
        Tool("rocm-smi", "amd", (("--showtopo",),), ("--showbus",)),
        Tool("hy-smi", "hygon", (("--showtopo",),), ("--showbus",)),
        Tool("ixsmi", "iluvatar", (("topo", "-m"),), _QUERY),
        Tool("cnmon", "cambricon", (("topo", "-m"),)),
    )
}
"""Tools by name."""
