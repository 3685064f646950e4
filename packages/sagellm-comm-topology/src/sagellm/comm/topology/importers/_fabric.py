"""What a matrix of direct links says of the fabric behind it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from sagellm.core.protocols import Confidence, Device, Link, LinkKind, SwitchDomain

__all__ = ["Bundle", "FabricParts", "join_switch", "most_nvlinks", "socket_links", "switched"]

Bundle = tuple[str, str, int]
"""Two device ids and the number of links that a source prints for the pair."""

FabricParts = tuple[list[Device], list[Link], list[SwitchDomain]]

# No GPU so far has more NVLinks than the last number. An even count to every peer that adds up to
# more can only lead through switches; a smaller sum may be wires (H100 boards of four have six to
# each).
_MOST_NVLINKS = 18
_NVLINKS = {"P100": 4, "V100": 6, "A100": 12, "A800": 12}
_MODEL = re.compile(rf"\b(?:Tesla |NVIDIA )*({'|'.join(_NVLINKS)})\b")
_MOST_SOCKETS = 256


def most_nvlinks(lines: Iterable[str]) -> int:
    """How many NVLinks a GPU has at most, by the one model that the lines name, if any."""
    models = {m for line in lines for m in _MODEL.findall(line[:512])}
    return _NVLINKS[models.pop()] if len(models) == 1 else _MOST_NVLINKS


def switched(
    kind: LinkKind, bundles: Iterable[Bundle], source: str, most: int = _MOST_NVLINKS
) -> FabricParts:
    """Links of one kind as wires, or as ways into a switch where wires cannot be it.

    Args:
        kind: Of the links.
        bundles: Pairs of devices with their number of links.
        source: Who says so.
        most: Links that one device can have.

    """
    counts = {(min(a, b), max(a, b)): n for a, b, n in bundles}
    links: list[Link] = []
    devices: list[Device] = []
    domains: list[SwitchDomain] = []
    for members in _components(counts):
        pairs = {k: n for k, n in counts.items() if k[0] in members}
        lanes = next(iter(pairs.values()))
        even = set(pairs.values()) == {lanes}
        complete = len(pairs) == len(members) * (len(members) - 1) // 2
        too_many = lanes * (len(members) - 1) > most
        if kind == "nvlink" and len(members) > 2 and even and complete and too_many:
            parts = join_switch(
                kind, dict.fromkeys(members, lanes), source, "inferred", number=len(domains)
            )
            devices += parts[0]
            links += parts[1]
            domains += parts[2]
        else:
            links += [Link(a, b, kind, n, source=source) for (a, b), n in pairs.items()]
    return devices, links, domains


def join_switch(
    kind: LinkKind,
    lanes: Mapping[str, int],
    source: str,
    confidence: Confidence,
    *,
    number: int = 0,
) -> FabricParts:
    """A fabric vertex with its members; `lanes` is how many links each has into it."""
    name = f"{kind}-switch" + (str(number) if number else "")
    links = [Link(m, name, kind, n, source=source, confidence=confidence) for m, n in lanes.items()]
    domain = SwitchDomain(name, kind, tuple(lanes), confidence=confidence)
    return [Device(name, "fabric_switch")], links, [domain]


def socket_links(nodes: Sequence[str], source: str, warnings: list[str]) -> list[Link]:
    """Ways between all NUMA nodes: that there are some is a conclusion."""
    if len(nodes) > _MOST_SOCKETS:
        warnings.append(f"{len(nodes)} NUMA nodes; only the first {_MOST_SOCKETS} are joined")
    return [
        Link(a, b, "socket", source=source, confidence="inferred")
        for a, b in combinations(nodes[:_MOST_SOCKETS], 2)
    ]


def _components(counts: Mapping[tuple[str, str], int]) -> list[list[str]]:
    near: dict[str, list[str]] = {}
    for a, b in counts:
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    found: list[list[str]] = []
    seen: set[str] = set()
    for start in near:
        if start in seen:
            continue
        members, todo = [start], [start]
        seen.add(start)
        while todo:
            for other in near[todo.pop()]:
                if other not in seen:
                    seen.add(other)
                    members.append(other)
                    todo.append(other)
        found.append(members)
    return found
