"""Algorithm bandwidth and bus bandwidth, in one place for all who report them."""

from __future__ import annotations

__all__ = ["busbw_factor"]

_ONE_WAY = frozenset(
    ("broadcast", "reduce", "p2p", "send", "recv", "send_kv_blocks", "recv_kv_blocks")
)


def busbw_factor(op: str, size: int) -> float:
    """What nccl-tests multiply algorithm bandwidth by, to compare it with link speed.

    Args:
        op: Method of a backend or operation of a cost model.
        size: Ranks, from 1; a group of one moves nothing, so that its collectives have 0.

    >>> busbw_factor("all_reduce", 4), busbw_factor("all_gather", 4), busbw_factor("send", 4)
    (1.5, 0.75, 1.0)
    """
    if op in _ONE_WAY:
        return 1.0
    return (2 if op == "all_reduce" else 1) * (size - 1) / size
