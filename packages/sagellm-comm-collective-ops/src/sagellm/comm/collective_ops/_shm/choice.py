"""Which algorithm runs: a pure function of what all ranks of a call know alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sagellm.comm.collective_ops.choice import AlgorithmTable

__all__ = [
    "ALGORITHMS",
    "MEASURING",
    "ONE_SHOT_BYTES",
    "STAGED",
    "SYMMETRIC_BYTES",
    "Override",
    "choose",
    "one_shot_bytes",
    "switch_bytes",
]

ALGORITHMS = ("direct", "one_shot", "two_shot", "symmetric")

Override = tuple[str, int, int, str]
"""`(op, low_bytes, high_bytes, algorithm)`: for sizes in `[low_bytes, high_bytes)`."""

ONE_SHOT_BYTES = 32 * 1024
"""Longest tensor that more than two ranks each add whole; two ranks do so for a whole slot."""

SYMMETRIC_BYTES = 64 * 1024
"""Symmetric tensors are reduced where they lie above this size: below, a copy is cheaper than
a second synchronisation."""


def one_shot_bytes(world: int, slot_bytes: int) -> int:
    """Longest tensor of which every rank adds all."""
    return slot_bytes if world == 2 else min(ONE_SHOT_BYTES, slot_bytes)


STAGED: Mapping[str, tuple[str, ...]] = {"all_reduce": ("one_shot", "two_shot")}
"""What a model or a measurement may choose from."""

MEASURING = {"sizes": tuple(1 << bits for bits in range(12, 23, 2)), "repeats": 31}


def switch_bytes(tables: Sequence[AlgorithmTable], usual: int) -> int:
    """Longest tensor for one_shot by the last table that says anything of it, else the usual one.

    Above the largest size at which one_shot was the faster one, two_shot was. Where that is the
    largest that was measured, and larger ones were to be, the usual one holds above it.
    """
    rules = [rule for table in tables for rule in table.rules if rule.op == "all_reduce"]
    if not rules:
        return usual
    last = max((r for r in rules if r.algorithm == "one_shot"), key=lambda r: r.low, default=None)
    if last is None:
        return 0
    if last.high is None:
        return 1 << 62
    decided = any(r.low >= last.high for r in rules)
    return last.high - 1 if decided else max(last.high - 1, usual)


def choose(
    op: str,
    nbytes: int,
    world: int,
    slot_bytes: int,
    *,
    symmetric: bool = False,
    overrides: Sequence[Override] = (),
    one_shot: int | None = None,
) -> str:
    """The algorithm for `nbytes` on every rank.

    Args:
        op: Name in `layout.OPS`.
        nbytes: Bytes of the second signature word.
        world: Ranks.
        slot_bytes: Size of a slot.
        symmetric: Whether every rank's tensor lies in its arena.
        overrides: The first that fits decides, where its algorithm can run.
        one_shot: Longest tensor for one_shot; None is `one_shot_bytes`.

    """
    if op != "all_reduce":
        return "direct"
    for name, low, high, algorithm in overrides:
        if name == op and low <= nbytes < high:
            if algorithm in ("one_shot", "two_shot") or (algorithm == "symmetric" and symmetric):
                return algorithm
    if symmetric and nbytes > SYMMETRIC_BYTES:
        return "symmetric"
    limit = one_shot_bytes(world, slot_bytes) if one_shot is None else one_shot
    return "one_shot" if nbytes <= limit else "two_shot"
