"""Which algorithm runs: a pure function of what all ranks of a call know alike."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ALGORITHMS", "Override", "choose"]

ALGORITHMS = ("direct", "one_shot", "two_shot", "symmetric")

Override = tuple[str, int, int, str]
"""`(op, low_bytes, high_bytes, algorithm)`: for sizes in `[low_bytes, high_bytes)`."""

ONE_SHOT_BYTES = 32 * 1024
"""Longest tensor that more than two ranks each add whole; two ranks do so for a whole slot."""

SYMMETRIC_BYTES = 64 * 1024
"""Symmetric tensors are reduced where they lie from this size on: below, a copy is cheaper than
a second synchronisation."""


def choose(
    op: str,
    nbytes: int,
    world: int,
    slot_bytes: int,
    *,
    symmetric: bool = False,
    overrides: Sequence[Override] = (),
) -> str:
    """The algorithm for `nbytes` on every rank.

    Args:
        op: Name in `layout.OPS`.
        nbytes: Bytes of the second signature word.
        world: Ranks.
        slot_bytes: Size of a slot.
        symmetric: Whether every rank's tensor lies in its arena.
        overrides: The first that fits decides, where its algorithm can run.

    """
    if op != "all_reduce":
        return "direct"
    for name, low, high, algorithm in overrides:
        if name == op and low <= nbytes < high:
            if algorithm in ("one_shot", "two_shot") or (algorithm == "symmetric" and symmetric):
                return algorithm
    if symmetric and nbytes >= SYMMETRIC_BYTES:
        return "symmetric"
    return "one_shot" if nbytes <= (slot_bytes if world == 2 else ONE_SHOT_BYTES) else "two_shot"
