"""Who takes part, and the figures that are judged."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sagellm.core.protocols.bench import Contenders, Missing, Ratio, Row
from sagellm.core.protocols.netns import ShapedHosts

from ._pair import Pair
from ._worker import Spec

__all__ = ["HOST", "PEERS", "best", "fastest", "figure", "medians", "ours", "run_pairs"]

HOST = "CPU host, loopback"
"""Stands beside every figure: links of a network and their devices are unverified here."""

_HERE = __package__ or ""
_TCP = {"UCX_TLS": "tcp"}
_NIXL = f"{_HERE}._engines:Nixl"

PEERS: Mapping[str, Spec] = {
    "memcpy, one thread": Spec(f"{_HERE}._plain:Memcpy"),
    "one plain socket": Spec(f"{_HERE}._plain:PlainSocket"),
    "gloo, block by block": Spec(f"{_HERE}._plain:Gloo"),
    "gloo, gathered": Spec(f"{_HERE}._plain:GlooGathered"),
    "ZeroMQ": Spec(f"{_HERE}._plain:ZeroMQ"),
    "Mooncake, tcp": Spec(f"{_HERE}._engines:Mooncake", noisy=True),
    "NIXL": Spec(_NIXL, {"progress_thread": True}, spins=True),
    "NIXL, no progress thread": Spec(_NIXL, {"progress_thread": False}),
    "NIXL, tcp": Spec(_NIXL, {"progress_thread": True}, _TCP, spins=True),
    "NIXL, tcp, no progress thread": Spec(_NIXL, {"progress_thread": False}, _TCP),
}


def ours(transport: str, *, hog: bool = False, **settings: object) -> Spec:
    """The channel over one path."""
    return Spec(f"{_HERE}._ours:Channel", {"transport": transport, "settings": settings}, hog=hog)


@contextlib.contextmanager
def run_pairs(
    specs: Mapping[str, Spec],
    case: Mapping[str, Any],
    measure: Callable[[Pair], float],
    hosts: ShapedHosts | None = None,
) -> Iterator[Contenders]:
    """All of them started, each a call that measures one sample."""
    with contextlib.ExitStack() as stack:
        named: dict[str, Callable[[], float | None] | Missing] = {}
        for name, spec in specs.items():
            pair = stack.enter_context(Pair(spec, case, hosts))
            named[name] = pair.missing or _call(measure, pair)
        yield named


def _call(measure: Callable[[Pair], float], pair: Pair) -> Callable[[], float]:
    return lambda: measure(pair)


def medians(rows: Sequence[Row], **where: object) -> dict[str, dict[str, float]]:
    """Medians of the cases that have these values: case, contender, median."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.median is not None and all(row.case.get(k) == v for k, v in where.items()):
            found.setdefault(str(dict(row.case)), {})[row.contender] = row.median
    return found


def best(*names: str) -> Callable[[Mapping[str, float]], float | None]:
    """The best of several settings of one library, where bigger is better."""
    return lambda case: max((case[n] for n in names if n in case), default=None)


def fastest(*names: str) -> Callable[[Mapping[str, float]], float | None]:
    """The best of several uses of one library, where smaller is better."""
    return lambda case: min((case[n] for n in names if n in case), default=None)


def figure(
    path: str,
    against: str,
    goal: float,
    pairs: Iterable[tuple[float | None, float | None]],
    *,
    over: str = "median",
) -> Ratio:
    """One row of the table of figures: ours over theirs, over all cases.

    Args:
        path: What was measured.
        against: What with.
        goal: What the ratio should reach at least.
        pairs: Ours and theirs in each case, None where a side is missing.
        over: `median` of the cases, or the `worst`.

    """
    ratios = [a / b for a, b in pairs if a is not None and b]
    pick = min if over == "worst" else statistics.median
    case = {"path": path, "against": against, "over": over, "at_least": goal, "where": HOST}
    name = f"{path} / {against}{', worst case' if over == 'worst' else ''}"
    return Ratio(name, case, pick(ratios) if ratios else None, goal)
