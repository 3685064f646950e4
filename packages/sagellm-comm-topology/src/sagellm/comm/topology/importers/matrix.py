"""`nvidia-smi topo -m` and `-p2p`, `mx-smi topo -m`, `npu-smi info -t topo`, and their cousins.

All print devices against devices with a link class in each cell. Which maker's tool it was shows
in the labels, the classes and the legend.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from sagellm.comm.topology._numbers import whole_number
from sagellm.comm.topology._sysfs import normal_bdf
from sagellm.core.protocols import (
    Device,
    DeviceKind,
    Link,
    LinkKind,
    Pair,
    PathClass,
    SwitchDomain,
    TopologyFragment,
)

from ._fabric import Bundle, join_switch, most_nvlinks, switched
from ._table import ACCELERATOR, Table, read_tables
from ._text import numa_numbers

__all__ = ["maker", "nic_device", "read_matrix"]

_PATHS: Mapping[str, PathClass] = {
    "PIX": "PIX", "PXB": "PXB", "PHB": "PHB", "NODE": "NODE", "SYS": "SYS", "SOC": "SYS",
}  # fmt: skip
_VIA: Mapping[str, LinkKind] = {"PCIE": "pcie", "ETH": "ethernet"}
_FABRICS: Mapping[str, LinkKind] = {
    "NV": "nvlink", "MT": "mtlink", "MLK": "mlulink", "MXLK": "metaxlink", "MX": "metaxlink",
    "XGMI": "xgmi", "HCCS": "hccs", "HCCS_SW": "hccs", "SIO": "sio", "UB": "ub", "XL": "xpulink",
    "IX": "ixlink", "C2C": "c2c",
}  # fmt: skip
_PEER = frozenset(("OK", "CNS", "GNS", "TNS", "NS", "DR"))
_MOST_LANES = 1 << 16
_UNKNOWN = frozenset(("NA", "N/A", "?", "-", "U", "UNK", "UNKNOWN"))
_SELF = frozenset(("X", "0"))
_FABRIC = re.compile(r"^(C2C|[A-Z]+(?:_SW)?)(\d*)$")
_LEGEND = re.compile(r"^\s*((?:NIC|HCA)\d+)\s*[:=]\s*([\w.\-:,]+)\s*$", re.IGNORECASE)
_OWN = re.compile(r"^Vendor of (accelerators|(?:GPU|NPU)\d+): (\S+)$")  # of our own matrix
_CPUS = re.compile(r"^\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*$")

_LABEL_MAKERS = {
    "NPU": "huawei", "PHY-ID": "huawei", "MLU": "cambricon", "XPU": "kunlunxin", "HCU": "hygon",
    "DCU": "hygon", "GCU": "enflame",
}  # fmt: skip
_MAKERS = (
    ("metax", re.compile(r"MetaX|\bmx-smi\b", re.IGNORECASE)),
    ("mthreads", re.compile(r"\bMT\d|MTLink|mthreads|Moore Threads", re.IGNORECASE)),
    ("iluvatar", re.compile(r"iluvatar|\bixsmi\b|\bIX-ML\b", re.IGNORECASE)),
    ("hygon", re.compile(r"\bhy-smi\b|\bHCU\b", re.IGNORECASE)),
    ("amd", re.compile(r"\bROCm\b|\brocm-smi\b|\bamd-smi\b|\bXGMI\d*\b", re.IGNORECASE)),
    ("cambricon", re.compile(r"\bMLK\d|MLU-Link|\bcnmon\b", re.IGNORECASE)),
    ("nvidia", re.compile(r"\bNV[#\d]|nvidia|NVLink", re.IGNORECASE)),
)


def maker(lines: Sequence[str], labels: Sequence[str]) -> str | None:
    """Whose tool printed the lines; None when nothing in them tells."""
    match = next(filter(None, map(ACCELERATOR.match, labels)), None)
    by_label = _LABEL_MAKERS.get(match[1].upper()) if match else None
    if by_label:
        return by_label
    text = "\n".join(lines)
    return next((vendor for vendor, pattern in _MAKERS if pattern.search(text)), None)


@dataclass(slots=True)
class _Reading:
    """What has been gathered from the tables so far."""

    source: str
    ours: bool = False
    devices: dict[str, Device] = field(default_factory=dict)
    pairs: dict[tuple[str, str], Pair] = field(default_factory=dict)
    bundles: dict[LinkKind, list[Bundle]] = field(default_factory=dict)
    through_switch: dict[LinkKind, list[Bundle]] = field(default_factory=dict)
    cells: dict[tuple[str, str], str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_matrix(
    lines: Sequence[str], *, source: str = "", vendor: str | None = None
) -> TopologyFragment | None:
    """What the tables in the lines say; None when there is no such table.

    Args:
        lines: Plain lines of the tool's output.
        source: Name for links and warnings; "" is the tool's.
        vendor: Maker of the accelerators; None finds it in the text.

    """
    tables = [t for t in read_tables(lines) if t.rows]
    if not tables:
        return None
    own = {m[1]: None if m[2] == "?" else m[2] for line in lines if (m := _OWN.match(line))}
    found = vendor or (None if own else maker(lines, tables[0].labels))
    reading = _Reading(source or ("matrix" if own else _tool(found)), ours=bool(own))
    if found is None and not own:
        # The layout is nvidia-smi's; tools of others that copy it say so in a legend.
        found = "nvidia"
        reading.warnings.append("no word names the maker; the layout is that of nvidia-smi")
    legend = {m[1].upper(): m[2] for line in lines if (m := _LEGEND.match(line))}
    for table in tables:
        reading.warnings += table.warnings
        vendors = {x: found or own.get(x, own.get("accelerators")) for x in table.labels}
        _read(table, vendors, legend, reading)
    return _finish(reading, most_nvlinks(lines))


def _tool(vendor: str | None) -> str:
    tools = {"huawei": "npu-smi", "metax": "mx-smi", "mthreads": "mthreads-gmi", "amd": "rocm-smi",
             "cambricon": "cnmon", "iluvatar": "ixsmi", "kunlunxin": "xpu-smi",
             "hygon": "hy-smi"}  # fmt: skip
    return tools.get(vendor or "", "nvidia-smi")


def _read(
    table: Table,
    vendors: Mapping[str, str | None],
    legend: Mapping[str, str],
    reading: _Reading,
) -> None:
    ids: dict[str, str] = {}
    for label in table.labels:
        device = _device(label, vendors[label], legend, ours=reading.ours)
        ids[label] = device.id
        known = reading.devices.get(device.id, device)
        reading.devices[device.id] = _with_tail(known, table.tails.get(label, {}), reading)
        _check_self(table, label, reading)
    for a, b in combinations(table.labels, 2):
        cell = _agreed(table, a, b, reading)
        if cell is None or cell in _UNKNOWN:
            continue
        key = (ids[a], ids[b])
        if cell in _PEER:
            _note(reading, key, peer={"read": cell})
            continue
        before = reading.cells.setdefault(key, cell)
        if before != cell:
            reading.warnings.append(f"{a} - {b}: {before} in one table, {cell} in a later one")
            if (before in _PATHS) == (cell in _PATHS):
                continue  # of two answers to one question the first is believed
        if cell in _PATHS:
            _note(reading, key, path=_PATHS[cell])
        elif cell in _VIA:
            _note(reading, key, via=_VIA[cell])
        elif (
            (match := _FABRIC.match(cell))
            and match[1] in _FABRICS
            and (count := whole_number(match[2] or "1", most=_MOST_LANES))
        ):
            kind = _FABRICS[match[1]]
            through = match[1].endswith("_SW")
            where = reading.through_switch if through else reading.bundles
            where.setdefault(kind, []).append((*key, count))
        else:
            reading.warnings.append(f"{a} - {b}: class {cell} is not known; left out")


def _check_self(table: Table, label: str, reading: _Reading) -> None:
    row = table.rows.get(label)
    cell = (row[table.labels.index(label)] if row else None) or "X"
    if cell.upper() not in _SELF | _UNKNOWN | _PEER:
        reading.warnings.append(f"{label}: {cell} stands where a device meets itself; left out")


def _device(label: str, vendor: str | None, legend: Mapping[str, str], *, ours: bool) -> Device:
    match = ACCELERATOR.match(label)
    if match is None:
        name = legend.get(label.upper(), label)
        bdf = normal_bdf(name)
        return Device(bdf, "nic", bdf=bdf) if bdf else nic_device(name)
    whose = match[1].lower()
    if ours or vendor is None:
        gpu = whose == "gpu"
    else:
        gpu = vendor in ("nvidia", "amd", "metax", "mthreads", "iluvatar", "intel", "biren")
    kind: DeviceKind = "gpu" if gpu else "npu"
    index = whole_number(match[2])
    return Device(f"{vendor or whose}:{index}", kind, vendor=vendor, index=index)


_INTERFACE = re.compile(r"^(?:eth|en[opsx]|wl|bond|ib\d|ibp|veth|br)")


def nic_device(name: str, **facts: str) -> Device:
    """A NIC of which only the name is known: a net interface, else an RDMA device."""
    if _INTERFACE.match(name):
        return Device(f"net:{name}", "nic", attrs={"netdev": name, **facts})
    return Device(f"ib:{name}", "nic", attrs={"ib": name, **facts})


def _with_tail(device: Device, tail: Mapping[str, str], reading: _Reading) -> Device:
    if not tail:
        return device
    cpus = tail.get("cpu", "").rstrip(",")
    if cpus and cpus not in ("N/A", "?") and not _CPUS.match(cpus):
        reading.warnings.append(f"{device.id}: CPU affinity {cpus[:40]!r} is no list of CPUs")
        cpus = ""
    own = numa_numbers(tail.get("own", ""))
    return replace(
        device,
        cpulist=device.cpulist or (cpus if _CPUS.match(cpus) else None),
        numa_nodes=device.numa_nodes or numa_numbers(tail.get("numa", "").rstrip(",")),
        attrs={**device.attrs, **({"memory_numa": str(own[0])} if own else {})},
    )


def _agreed(table: Table, a: str, b: str, reading: _Reading) -> str | None:
    """The cell of a pair, from either row; the upper row is believed when they differ."""
    cells = []
    for row, column in ((a, b), (b, a)):
        cell = table.rows[row][table.labels.index(column)] if row in table.rows else None
        if cell and cell.upper() in _SELF:
            reading.warnings.append(f"{row} - {column}: {cell} is for a device and itself")
            cell = None
        cells.append(cell.upper() if cell else None)
    first, second = cells
    if first and second and first != second:
        reading.warnings.append(f"{a} - {b}: {first} in one row, {second} in the other")
    if first in _UNKNOWN and second:
        return second
    return first or second


def _note(
    reading: _Reading,
    key: tuple[str, str],
    *,
    path: PathClass | None = None,
    via: LinkKind | None = None,
    peer: Mapping[str, str] | None = None,
) -> None:
    known = reading.pairs.get(key) or Pair(*key, source=reading.source)
    reading.pairs[key] = replace(
        known,
        path=known.path or path,
        via=known.via or via,
        peer={**known.peer, **(peer or {})},
    )


def _finish(reading: _Reading, most: int) -> TopologyFragment:
    devices = dict(reading.devices)
    links: list[Link] = []
    domains: list[SwitchDomain] = []
    for kind, bundles in reading.bundles.items():
        parts = switched(kind, bundles, reading.source, most)
        devices.update((d.id, d) for d in parts[0])
        links += parts[1]
        domains += parts[2]
    for kind, bundles in reading.through_switch.items():
        members = {end: n for a, b, n in bundles for end in (a, b)}
        parts = join_switch(kind, members, reading.source, "stated")
        devices.update((d.id, d) for d in parts[0])
        links += parts[1]
        domains += parts[2]
    nodes = sorted({n for d in reading.devices.values() for n in d.numa_nodes})
    for n in nodes:
        devices[f"numa:{n}"] = Device(f"numa:{n}", "numa", numa_nodes=(n,))
    return TopologyFragment(
        reading.source,
        tuple(devices.values()),
        tuple(links),
        tuple(domains),
        tuple(dict.fromkeys(reading.warnings)),
        pairs=tuple(reading.pairs.values()),
    )
