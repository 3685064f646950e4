"""Who sends what to whom, for the simulator: the messages of each algorithm, step by step.

The steps are those of `sagellm.comm.collective_ops` schedules; payloads are counted as the cost
model counts them (`nbytes` as nccl-tests do). Steps that are alike are one phase with repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sagellm.core.protocols import ConfigError

from .simulator import Message, Phase

__all__ = ["SCHEDULES", "schedule"]

Hosts = Sequence[Sequence[int]]
"""Ranks of each host, in order."""

_Builder = Callable[[int, float, Hosts], list[Phase]]


def schedule(op: str, algorithm: str, nbytes: int, hosts: Hosts) -> list[Phase]:
    """The phases of one call; none for a single rank.

    Args:
        op: Operation.
        algorithm: One of `SCHEDULES[op]`.
        nbytes: Payload as nccl-tests count it.
        hosts: Ranks of each host; all ranks from 0 up are in one of them.

    Raises:
        ConfigError: Unknown operation or algorithm; the message lists the known ones.

    """
    if op not in SCHEDULES:
        raise ConfigError(f"unknown op {op!r}; known: {', '.join(SCHEDULES)}")
    if algorithm not in SCHEDULES[op]:
        known = ", ".join(SCHEDULES[op])
        raise ConfigError(f"no schedule {algorithm!r} of {op} to simulate; known: {known}")
    size = sum(map(len, hosts))
    if size < 2:
        return []
    phases = SCHEDULES[op][algorithm](size, float(nbytes), hosts)
    return [p for p in phases if p.messages and p.repeats]


def _shift(ranks: Sequence[int], by: int, nbytes: float, *, reduce: bool = False) -> list[Message]:
    n = len(ranks)
    return [Message(ranks[i], ranks[(i + by) % n], nbytes, reduce) for i in range(n)]


def _circle(groups: Hosts, nbytes: float, *, reduce: bool) -> list[Phase]:
    """Rings in several groups at once, `nbytes` shared by the members of each."""
    longest = max(map(len, groups))
    phases = []
    for length in sorted({len(g) for g in groups}):
        # Groups of one size take equally many steps; longer ones go on alone.
        going = [g for g in groups if len(g) >= length and len(g) > 1]
        done = max((len(g) for g in groups if len(g) < length), default=1)
        messages = [m for g in going for m in _shift(g, 1, nbytes / len(g), reduce=reduce)]
        phases.append(Phase(tuple(messages), length - done))
    return phases if longest > 1 else []


def _ring(n: int, nbytes: float, *, reduce: bool) -> list[Phase]:
    return _circle([range(n)], nbytes, reduce=reduce)


def _ring_all_reduce(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return [*_ring(n, nbytes, reduce=True), *_ring(n, nbytes, reduce=False)]


def _ring_reduce_scatter(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return _ring(n, nbytes, reduce=True)


def _ring_all_gather(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return _ring(n, nbytes, reduce=False)


def _chain(lines: Hosts, nbytes: float) -> list[Phase]:
    """Pipelines of as many pieces as each line has ranks, from its first rank to its last."""
    longest = max(map(len, lines))
    phases = []
    for step in range(2 * longest - 2):
        phases.append(
            Phase(
                tuple(
                    Message(line[at], line[at + 1], nbytes / len(line))
                    for line in lines
                    for at in range(len(line) - 1)
                    if 0 <= step - at < len(line)
                )
            )
        )
    return phases


def _ring_broadcast(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return _chain([range(n)], nbytes)


def _ring_all_to_all(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return [Phase(tuple(_shift(range(n), 1, nbytes * (n - k) / n))) for k in range(1, n)]


def _levels(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Parent and child of a binomial tree by level, from the root down."""
    n, levels = len(ranks), []
    half = 1 << max(0, (n - 1).bit_length() - 1)
    while half:
        starts = range(0, n - half, 2 * half)
        levels.append([(ranks[at], ranks[at + half]) for at in starts])
        half >>= 1
    return levels


def _tree_broadcast(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return _down(range(n), nbytes)


def _down(ranks: Sequence[int], nbytes: float) -> list[Phase]:
    return [Phase(tuple(Message(a, b, nbytes) for a, b in level)) for level in _levels(ranks)]


def _tree_all_reduce(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    up = [
        Phase(tuple(Message(b, a, nbytes, True) for a, b in level))
        for level in reversed(_levels(range(n)))
    ]
    return [*up, *_down(range(n), nbytes)]


def _power(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def _fold(n: int, nbytes: float) -> list[Phase]:
    """Ranks beyond the power of two hand their payload to the rank a power of two below."""
    p = _power(n)
    return [Phase(tuple(Message(r, r - p, nbytes, True) for r in range(p, n)))]


def _unfold(n: int, nbytes: float) -> list[Phase]:
    p = _power(n)
    return [Phase(tuple(Message(r - p, r, nbytes) for r in range(p, n)))]


def _pairs_at(p: int, distance: int, nbytes: float, *, reduce: bool = False) -> Phase:
    return Phase(tuple(Message(r, r ^ distance, nbytes, reduce) for r in range(p)))


def _distances(p: int) -> list[int]:
    return [1 << k for k in range(p.bit_length() - 1)]


def _doubling_all_reduce(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    p = _power(n)
    rounds = [_pairs_at(p, d, nbytes, reduce=True) for d in _distances(p)]
    return [*_fold(n, nbytes), *rounds, *_unfold(n, nbytes)]


def _halve(p: int, nbytes: float) -> list[Phase]:
    return [_pairs_at(p, d, nbytes * d / p, reduce=True) for d in reversed(_distances(p))]


def _double(p: int, nbytes: float) -> list[Phase]:
    return [_pairs_at(p, d, nbytes * d / p) for d in _distances(p)]


def _halving_all_reduce(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    p = _power(n)
    return [*_fold(n, nbytes), *_halve(p, nbytes), *_double(p, nbytes), *_unfold(n, nbytes)]


def _halving_reduce_scatter(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return [*_fold(n, nbytes), *_halve(_power(n), nbytes), *_unfold(n, nbytes / n)]


def _doubling_all_gather(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    p = _power(n)
    first = Phase(tuple(Message(r, r - p, nbytes / n) for r in range(p, n)))
    return [first, *_double(p, nbytes), *_unfold(n, nbytes * (n - 1) / n)]


def _bruck_all_to_all(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    """Round k sends what has bit k set in its distance, to the rank 2^k further on."""
    phases, step = [], 1
    while step < n:
        blocks = sum(1 for distance in range(n) if distance & step)
        phases.append(Phase(tuple(_shift(range(n), step, nbytes * blocks / n))))
        step <<= 1
    return phases


def _pairwise_all_to_all(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return [Phase(tuple(_shift(range(n), k, nbytes / n))) for k in range(1, n)]


def _all_pairs(n: int, nbytes: float, *, reduce: bool = False) -> list[Phase]:
    return [
        Phase(tuple(m for k in range(1, n) for m in _shift(range(n), k, nbytes, reduce=reduce)))
    ]


def _direct_all_reduce(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return _all_pairs(n, nbytes, reduce=True)


def _direct_parts(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return _all_pairs(n, nbytes / n)


def _direct_reduce_scatter(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return _all_pairs(n, nbytes / n, reduce=True)


def _two_shot_all_reduce(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return [*_all_pairs(n, nbytes / n, reduce=True), *_all_pairs(n, nbytes / n)]


def _direct_broadcast(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return [Phase(tuple(Message(0, r, nbytes) for r in range(1, n)))]


def _p2p(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return [Phase((Message(0, n - 1, nbytes),))]


def _hierarchical_all_reduce(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    """Reduce-scatter in hosts, all-reduce of each part across hosts, all-gather in hosts."""
    parts = min(map(len, hosts))
    ragged = any(len(h) != parts for h in hosts)
    if ragged:  # leaders alone talk to other hosts
        inner = _circle(hosts, nbytes, reduce=True)
        gather = [Phase(tuple(Message(r, h[0], nbytes / len(h)) for h in hosts for r in h[1:]))]
        leaders = [[h[0] for h in hosts]]
        scatter = [Phase(tuple(Message(h[0], r, nbytes / len(h)) for h in hosts for r in h[1:]))]
        outer = [
            *_circle(leaders, nbytes, reduce=True),
            *_circle(leaders, nbytes, reduce=False),
        ]
        return [*inner, *gather, *outer, *scatter, *_circle(hosts, nbytes, reduce=False)]
    columns = [[h[i] for h in hosts] for i in range(parts)]
    return [
        *_circle(hosts, nbytes, reduce=True),
        *_circle(columns, nbytes / parts, reduce=True),
        *_circle(columns, nbytes / parts, reduce=False),
        *_circle(hosts, nbytes, reduce=False),
    ]


def _hierarchical_broadcast(n: int, nbytes: float, hosts: Hosts) -> list[Phase]:
    return [*_down([h[0] for h in hosts], nbytes), *_chain(hosts, nbytes)]


SCHEDULES: Mapping[str, Mapping[str, _Builder]] = {
    "all_reduce": {
        "direct": _direct_all_reduce,
        "halving_doubling": _halving_all_reduce,
        "hierarchical": _hierarchical_all_reduce,
        "recursive_doubling": _doubling_all_reduce,
        "ring": _ring_all_reduce,
        "tree": _tree_all_reduce,
        "two_shot": _two_shot_all_reduce,
    },
    "all_gather": {
        "direct": _direct_parts,
        "recursive_doubling": _doubling_all_gather,
        "ring": _ring_all_gather,
    },
    "reduce_scatter": {
        "direct": _direct_reduce_scatter,
        "halving_doubling": _halving_reduce_scatter,
        "ring": _ring_reduce_scatter,
    },
    "broadcast": {
        "direct": _direct_broadcast,
        "hierarchical": _hierarchical_broadcast,
        "ring": _ring_broadcast,
        "tree": _tree_broadcast,
    },
    "all_to_all": {
        "direct": _direct_parts,
        "pairwise": _pairwise_all_to_all,
        "recursive_doubling": _bruck_all_to_all,
        "ring": _ring_all_to_all,
    },
    "p2p": {"direct": _p2p},
}
"""Operation to the schedules that can be simulated."""
