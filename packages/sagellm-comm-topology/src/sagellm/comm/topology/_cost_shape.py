"""What a group looks like: equal for groups that are joined alike, whatever their names and order.

The text reads `2x4 8*gpu LINK@4.5e+11*12 NET@5e+10*16`: two hosts of four ranks, eight GPUs, and of
the pairs of members so many of each class and bottleneck. Every pair counts, so that two NVLink
pairs behind two sockets and four GPUs on one switch are told apart though their best and worst
pairs may be equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

from ._cost_rows import MOST_NAME
from .graph import TopologyGraph

__all__ = ["MOST_PAIRED", "shape_of"]

MOST_PAIRED = 64
"""Of larger groups pairs within a host count, and neighbouring hosts by their first members."""


def shape_of(graph: TopologyGraph, members: Sequence[str]) -> str:
    """The text, at most 256 characters; a hash stands for what is longer.

    Args:
        graph: Whose devices the members are.
        members: Their ids, each once.

    Raises:
        ConfigError: An id is unknown.

    """
    order = {d.id: i for i, d in enumerate(graph.info.devices)}
    devices = sorted((graph.device(name) for name in members), key=lambda d: order[d.id])
    hosts: dict[int, list[str]] = {}
    for d in devices:
        hosts.setdefault(d.node, []).append(d.id)
    layout = Counter(map(len, hosts.values()))
    kinds = Counter(f"{d.kind}:{d.model}" if d.model else d.kind for d in devices)
    joined: Counter[str] = Counter()
    for a, b in _pairs([hosts[node] for node in sorted(hosts)]):
        path = graph.path(a, b)
        width = path.bottleneck_bytes_per_s
        joined[f"{path.kind or '?'}@{'?' if width is None else f'{width:.3g}'}"] += 1
    first = "+".join(f"{count}x{ranks}" for ranks, count in sorted(layout.items()))
    text = " ".join([
        first,
        *(f"{count}*{kind}".replace(" ", "_") for kind, count in sorted(kinds.items())),
        *(f"{way}*{count}" for way, count in sorted(joined.items())),
    ])  # fmt: skip
    return text if len(text) <= MOST_NAME else f"{first[:64]} #{_hash(text)}"


def _pairs(hosts: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    if sum(map(len, hosts)) <= MOST_PAIRED:
        yield from combinations([name for host in hosts for name in host], 2)
        return
    for host in hosts:
        yield from combinations(host, 2) if len(host) <= MOST_PAIRED else pairwise(host)
    yield from pairwise([host[0] for host in hosts])


def _hash(text: str) -> str:
    from hashlib import blake2b  # brings a cryptography library: not at import

    return blake2b(text.encode(), digest_size=16).hexdigest()
