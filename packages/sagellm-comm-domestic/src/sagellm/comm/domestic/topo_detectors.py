"""Detectors of domestic links for the topology package, from vendors' command-line tools.

They run only where commands are allowed, for a command costs 0.3-2 s. Ascend's and MetaX's forms
were seen in public outputs; the others are known from descriptions and are experimental. None was
run on the device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sagellm.core.protocols import (
    DetectionContext,
    Detector,
    DetectorSpec,
    Device,
    DeviceKind,
    Link,
    LinkKind,
    TopologyFragment,
)
from sagellm.core.protocols.detection import ask_tool

from .topo_table import LinkTable, parse_bus_table, parse_link_table

__all__ = ["ASCEND", "KUNLUN", "METAX", "MOORE_THREADS", "ToolTable", "TopologyToolDetector"]

_COMMAND_PRECEDENCE = 40
_PATHS = frozenset({"PIX", "PXB", "PHB", "NODE", "SYS"})
_UNKNOWN = frozenset({"NA", "N/A", "-"})


@dataclass(frozen=True, slots=True)
class ToolTable:
    """How one vendor's tool prints its matrix.

    Attributes:
        tool: The command.
        topology: Its arguments for the matrix.
        overview: Its arguments for a table with PCI addresses.
        places: Where the command is when it is not on PATH, below the root.
        vendor: Lower-case vendor as the topology names it: `huawei`, `mthreads`, `kunlunxin`, ….
        kind: Kind of its devices.
        name: Pattern of a row's name; the group is the index.
        fabric: Pattern of a code to the link it stands for; a group is the number of links.
        experimental: Whether the form is known from descriptions alone.

    """

    tool: str
    topology: tuple[str, ...]
    overview: tuple[str, ...]
    vendor: str
    kind: DeviceKind
    name: str
    fabric: tuple[tuple[str, LinkKind], ...]
    places: tuple[str, ...] = ()
    experimental: bool = False


class TopologyToolDetector:
    """Runs one vendor's tool and reads its matrix; a `Detector`."""

    def __init__(self, table: ToolTable) -> None:
        self.table = table

    def detect(self, ctx: DetectionContext) -> TopologyFragment:
        """Devices and fabric links by the tool; empty without the tool or without permission.

        Classes of PCI paths (`PIX`, `SYS`) are no links of their own: they and codes that are
        not known stay in the devices' `attrs` as `path.<peer>`.
        """
        started = ctx.clock()
        table = self.table
        if not ctx.allow_commands:
            return TopologyFragment(table.tool)
        warnings: list[str] = []
        printed = ask_tool(ctx, table.tool, table.topology, warnings, places=table.places)
        if printed is None:
            return TopologyFragment(
                table.tool, warnings=tuple(warnings), elapsed_s=ctx.clock() - started
            )
        matrix = parse_link_table(printed.stdout, table.name)
        if not matrix.names:
            warnings.append(
                f"{table.tool} printed no link matrix: {printed.first_line}; "
                f"links of {table.vendor} are unknown"
            )
            addresses = {}
        else:
            overview = ask_tool(ctx, table.tool, table.overview, warnings, places=table.places)
            addresses = parse_bus_table(overview.stdout) if overview else {}
        if table.experimental and matrix.names:
            warnings.append(f"reading {table.tool} is experimental")
        warnings += [f"{table.tool}: {problem}" for problem in matrix.problems]
        devices, ids = _devices(table, matrix, addresses, warnings)
        links = _links(table, matrix, ids, warnings)
        return TopologyFragment(
            source=table.tool,
            devices=tuple(devices),
            links=tuple(links),
            warnings=tuple(warnings),
            elapsed_s=ctx.clock() - started,
        )


def _index(table: ToolTable, name: str) -> int | None:
    match = re.fullmatch(table.name, name)
    digits = re.search(r"\d+$", name)
    return int(digits.group()) if match and digits else None


def _devices(
    table: ToolTable,
    matrix: LinkTable,
    addresses: dict[int, tuple[str, str | None]],
    warnings: list[str],
) -> tuple[list[Device], dict[str, str]]:
    devices: list[Device] = []
    ids: dict[str, str] = {}
    nameless: list[str] = []
    for name in matrix.names:
        index = _index(table, name)
        address, model = addresses.get(-1 if index is None else index, (None, None))
        if address is None:
            nameless.append(name)
        # Without an address the tool's own number stands in; it counts slots, not visibility.
        ids[name] = address or f"{table.tool}:{name}"
        extra = matrix.extra.get(name, {})
        cpus = extra.get("CPU Affinity", "")
        nodes = extra.get("Node Affinity", extra.get("NUMA Affinity", ""))
        attrs = {
            f"path.{other}": code
            for (row, other), code in matrix.cells.items()
            if row == name and _fabric(table, code) is None
        }
        devices.append(
            Device(
                id=ids[name],
                kind=table.kind,
                vendor=table.vendor,
                model=model,
                bdf=address,
                numa_nodes=tuple(int(n) for n in nodes.split(",") if n.isdigit()),
                cpulist=cpus if re.fullmatch(r"[\d,-]+", cpus) and cpus != "-" else None,
                index=index,
                attrs=attrs,
            )
        )
    if nameless:
        warnings.append(
            f"{table.tool} gave no PCI address for {', '.join(nameless)}: they cannot be joined "
            f"with what other sources say of them"
        )
    return devices, ids


def _fabric(table: ToolTable, code: str) -> tuple[LinkKind, int] | None:
    for pattern, kind in table.fabric:
        match = re.fullmatch(pattern, code)
        if match:
            count = next((g for g in match.groups() if g), "1")
            return kind, max(1, int(count))
    return None


def _links(
    table: ToolTable, matrix: LinkTable, ids: dict[str, str], warnings: list[str]
) -> list[Link]:
    links: list[Link] = []
    odd: set[str] = set()
    for (row, column), code in matrix.cells.items():
        if column not in ids:
            continue
        fabric = _fabric(table, code)
        back = matrix.cells.get((column, row))
        if fabric is None:
            if code not in _PATHS and code not in _UNKNOWN and code != "X":
                odd.add(code)
            continue
        if back is not None and back != code:
            warnings.append(f"{table.tool}: {row}-{column} is {code} one way and {back} back")
        if (ids[column], ids[row]) in {(link.a, link.b) for link in links}:
            continue
        kind, count = fabric
        links.append(Link(ids[row], ids[column], kind, count=count, source=table.tool))
    if odd:
        listed = ", ".join(sorted(odd))
        warnings.append(f"{table.tool}: codes {listed} are not known and were kept in attrs")
    return links


_ASCEND_TABLE = ToolTable(
    tool="npu-smi",
    topology=("info", "-t", "topo"),
    overview=("info",),
    vendor="huawei",
    kind="npu",
    name=r"(?:NPU|Phy-ID)\d+",
    fabric=((r"HCCS(?:_SW)?", "hccs"), (r"SIO", "sio")),
)
_METAX_TABLE = ToolTable(
    tool="mx-smi",
    topology=("topo", "-m"),
    overview=(),
    vendor="metax",
    kind="gpu",
    name=r"GPU\d+",
    fabric=((r"MX(\d*)", "metaxlink"),),
    places=("opt/maca/bin/mx-smi", "opt/mxdriver/bin/mx-smi"),
)
_MOORE_THREADS_TABLE = ToolTable(
    tool="mthreads-gmi",
    topology=("topo", "-m"),
    overview=(),
    vendor="mthreads",
    kind="gpu",
    name=r"GPU\d+",
    fabric=((r"MT(\d+)", "mtlink"),),
    experimental=True,
)
_KUNLUN_TABLE = ToolTable(
    tool="xpu-smi",
    topology=("topo", "-m"),
    overview=(),
    vendor="kunlunxin",
    kind="npu",
    name=r"XPU\d+",
    fabric=((r"XL(\d*)", "xpulink"),),
    experimental=True,
)


def _spec(table: ToolTable, vendors: tuple[str, ...] = ()) -> DetectorSpec:
    def load() -> Detector:
        return TopologyToolDetector(table)

    return DetectorSpec(table.tool, _COMMAND_PRECEDENCE, load, vendors)


ASCEND = _spec(_ASCEND_TABLE, ("0x19e5",))
METAX = _spec(_METAX_TABLE)
MOORE_THREADS = _spec(_MOORE_THREADS_TABLE)
KUNLUN = _spec(_KUNLUN_TABLE)
