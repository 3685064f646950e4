"""`rocm-smi --showtopo` and Hygon's `hy-smi --showtopo`: link types and NUMA nodes.

Weights and hops follow from the types, and are not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

from sagellm.comm.topology._numbers import whole_number
from sagellm.core.protocols import Device, Pair, TopologyFragment

from ._fabric import Bundle, switched
from ._table import ACCELERATOR, Table, read_tables
from ._text import numa_numbers

__all__ = ["looks_like_rocm", "read_rocm"]

_FACT = re.compile(
    r"^\s*(GPU|HCU|DCU)\s*\[?(\d+)\]?\s*:\s*\(Topology\)\s*(Numa (?:Node|Affinity))\s*:?\s*(\S+)",
    re.IGNORECASE,
)
_SECTION = re.compile(r"link type", re.IGNORECASE)


def looks_like_rocm(lines: Sequence[str]) -> bool:
    """Whether the lines have a section or a fact of these tools."""
    return any(_FACT.match(x) or re.search(r"[=-]\s*Link Type between two", x) for x in lines)


def read_rocm(
    lines: Sequence[str], *, source: str = "", vendor: str | None = None
) -> TopologyFragment | None:
    """What the sections say; None when there is none of them."""
    warnings: list[str] = []
    tables = list(read_tables(lines))
    facts = [m for line in lines if (m := _FACT.match(line))]
    labels = list(dict.fromkeys(x for t in tables for x in t.labels))
    labels += [x for x in dict.fromkeys(f"{m[1]}{m[2]}" for m in facts) if x not in labels]
    if not labels:
        return None
    found = vendor or ("amd" if labels[0].upper().startswith("GPU") else "hygon")
    source = source or ("rocm-smi" if found == "amd" else "hy-smi")
    ids = {x: f"{found}:{m[2]}" for x in labels if (m := ACCELERATOR.match(x))}
    numa = _numa(facts, warnings)
    devices = {
        name: Device(
            name,
            "gpu" if found == "amd" else "npu",
            vendor=found,
            numa_nodes=numa.get(label, ()),
            index=whole_number(name.rpartition(":")[2]),
        )
        for label, name in ids.items()
    }
    bundles: list[Bundle] = []
    pairs: list[Pair] = []
    kinds = next((t for t in tables if _SECTION.search(t.title)), None)
    if kinds is None:
        warnings.append("no table of link types: how devices are joined is unknown")
    else:
        warnings += kinds.warnings
    for a, b in combinations(ids, 2):
        cell = _cell(kinds, a, b) if kinds else None
        if cell == "XGMI":
            bundles.append((ids[a], ids[b], 1))
        elif cell == "PCIE":
            pairs.append(Pair(ids[a], ids[b], via="pcie", source=source))
        elif cell and cell not in ("N/A", "NA", "?", "-", "UNKNOWN"):
            warnings.append(f"{a} - {b}: link type {cell} is not known; left out")
    _, links, _ = switched("xgmi", bundles, source)
    nodes = sorted({n for d in devices.values() for n in d.numa_nodes})
    return TopologyFragment(
        source,
        (*devices.values(), *(Device(f"numa:{n}", "numa", numa_nodes=(n,)) for n in nodes)),
        tuple(links),
        warnings=tuple(dict.fromkeys(warnings)),
        pairs=tuple(pairs),
    )


def _numa(facts: Sequence[re.Match[str]], warnings: list[str]) -> dict[str, tuple[int, ...]]:
    """NUMA node by label; the affinity serves where no node is told."""
    nodes: dict[str, tuple[int, ...]] = {}
    for wanted in ("numa node", "numa affinity"):
        for m in facts:
            label = f"{m[1]}{m[2]}"
            told = numa_numbers(m[4]) if len(m[4]) < 6 else ()  # 4294967295 is -1
            if m[3].lower() != wanted or not told:
                continue
            if label in nodes and nodes[label] != told:
                warnings.append(
                    f"{label}: NUMA node {nodes[label][0]} but affinity {told[0]}; "
                    "the node is believed"
                )
            nodes.setdefault(label, told)
    return nodes


def _cell(table: Table, a: str, b: str) -> str | None:
    for row, column in ((a, b), (b, a)):
        if row in table.rows and column in table.labels:
            cell = table.rows[row][table.labels.index(column)]
            if cell:
                return cell.upper()
    return None
