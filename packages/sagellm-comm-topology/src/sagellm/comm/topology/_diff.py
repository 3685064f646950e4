"""What differs between two topologies, device by device and link by link."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sagellm.core.protocols import TopologyInfo

__all__ = ["Difference", "differences"]

_DEVICE_FACTS = ("kind", "vendor", "model", "uuid", "numa_nodes", "cpulist", "index",
                 "visible_index", "memory_bytes")  # fmt: skip
_LINK_FACTS = ("count", "bandwidth_bytes_per_s", "latency_s", "confidence")


@dataclass(frozen=True, slots=True)
class Difference:
    """One fact that differs.

    Attributes:
        what: `device`, `link`, `domain` or `pair`.
        name: Which one.
        fact: What of it; "" when it is there in one topology alone.
        left: Its value in the first topology; None when absent or unknown.
        right: Its value in the second.

    """

    what: str
    name: str
    fact: str
    left: str | None
    right: str | None


_Items = Callable[[TopologyInfo], Mapping[str, Any]]  # Any: devices, links, domains or pairs
_Facts = Callable[[Any], Mapping[str, Any]]
_PARTS: tuple[tuple[str, _Items, _Facts], ...] = (
    (
        "device",
        lambda info: {d.id: d for d in info.devices},
        lambda d: {f: getattr(d, f) for f in _DEVICE_FACTS} | dict(d.attrs),
    ),
    (
        "link",
        lambda info: {f"{x.a} - {x.b} {x.kind}": x for x in info.links},
        lambda x: {f: getattr(x, f) for f in _LINK_FACTS},
    ),
    (
        "domain",
        lambda info: {d.id: d for d in info.domains},
        lambda d: {"members": sorted(d.members), "clique": d.clique, "confidence": d.confidence},
    ),
    (
        "pair",
        lambda info: {f"{p.a} - {p.b}": p for p in info.pairs},
        lambda p: {"path": p.path, "via": p.via} | dict(p.peer),
    ),
)


def differences(left: TopologyInfo, right: TopologyInfo) -> list[Difference]:
    """Every fact in which the second topology is not the first, in a stable order.

    Devices are matched by id, links by their ends and kind. Facts for people (`attrs`) count too;
    who said something and how long it took do not.
    """
    found: list[Difference] = []
    for what, items, facts in _PARTS:
        _compare(what, items(left), items(right), facts, found)
    return found


def _compare(
    what: str,
    left: Mapping[str, Any],
    right: Mapping[str, Any],
    facts: _Facts,
    found: list[Difference],
) -> None:
    for name in sorted(left.keys() | right.keys()):
        if name not in right:
            found.append(Difference(what, name, "", "there", None))
        elif name not in left:
            found.append(Difference(what, name, "", None, "there"))
        else:
            a, b = facts(left[name]), facts(right[name])
            for fact in dict.fromkeys((*a, *b)):
                one, two = _text(a.get(fact)), _text(b.get(fact))
                if one != two:
                    found.append(Difference(what, name, fact, one, two))


def _text(value: object) -> str | None:
    if value is None or value == () or value == "":
        return None
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
