"""What each collective leaves in each rank's outputs, computed in rank order."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sagellm.core.protocols import ReduceOp
from sagellm.core.protocols.process_group import RawCall

__all__ = ["outcome", "traffic"]

_HALF = (torch.float16, torch.bfloat16)

Results = dict[int, list[Tensor]]
"""New contents of every rank's outputs."""


def combine(parts: list[Tensor], op: ReduceOp) -> Tensor:
    """The reduction of `parts` in rank order; halves are summed in float32 and rounded once."""
    dtype = parts[0].dtype
    wide = [p.float() if dtype in _HALF else p for p in parts]
    total = wide[0].clone()
    for part in wide[1:]:
        if op in (ReduceOp.SUM, ReduceOp.AVG):
            total = total + part
        elif op is ReduceOp.PRODUCT:
            total = total * part
        elif op is ReduceOp.MIN:
            total = torch.minimum(total, part)
        elif op is ReduceOp.MAX:
            total = torch.maximum(total, part)
        elif op is ReduceOp.BAND:
            total = total & part
        elif op is ReduceOp.BOR:
            total = total | part
        else:
            total = total ^ part
    if op is ReduceOp.AVG:
        total = total / len(parts)
    return total.to(dtype)


def outcome(op: str, calls: Mapping[int, RawCall], data: Mapping[int, list[Tensor]]) -> Results:
    """For each rank, the new contents of its `outputs`.

    Args:
        op: Primitive operation.
        calls: Every rank's call.
        data: Every rank's contribution: its inputs, or its outputs for in-place operations.

    """
    ranks = range(len(calls))
    first = calls[0]
    reduction = first.reduce_op or ReduceOp.SUM
    root = first.peer or 0
    if op == "all_reduce":
        total = combine([data[r][0] for r in ranks], reduction)
        return {r: [total] for r in ranks}
    if op == "reduce":
        total = combine([data[r][0] for r in ranks], reduction)
        return {r: [total] if r == root else [data[r][0]] for r in ranks}
    if op == "all_gather":
        everything = torch.cat([data[r][0].reshape(-1) for r in ranks])
        return {r: [everything] for r in ranks}
    if op == "reduce_scatter":
        total = combine([data[r][0].reshape(-1) for r in ranks], reduction)
        return {r: [part] for r, part in enumerate(total.chunk(len(calls)))}
    if op == "broadcast":
        return {r: [data[root][0]] for r in ranks}
    if op == "gather":
        return {r: [data[s][0] for s in ranks] if r == root else [] for r in ranks}
    if op == "scatter":
        return {r: [data[root][r]] for r in ranks}
    if op == "all_to_all":
        rows = {
            r: torch.split(data[r][0], _splits(calls[r], data[r][0], len(calls))) for r in ranks
        }
        return {r: [torch.cat([rows[s][r] for s in ranks])] for r in ranks}
    return {r: [] for r in ranks}  # barrier


def _splits(call: RawCall, x: Tensor, size: int) -> list[int]:
    return list(call.in_splits) or [x.shape[0] // size] * size


def traffic(op: str, nbytes: int, size: int) -> tuple[int, int]:
    """Steps and bytes one rank sends when `op` runs as a ring (trees for rooted operations).

    >>> traffic("all_reduce", 1000, 4)
    (6, 1500)
    """
    if op == "all_reduce":
        return 2 * (size - 1), 2 * (size - 1) * nbytes // size
    if op in ("reduce_scatter", "all_to_all"):
        return size - 1, (size - 1) * nbytes // size
    if op in ("all_gather", "gather", "scatter"):
        return size - 1, (size - 1) * nbytes
    if op in ("broadcast", "reduce"):
        return math.ceil(math.log2(size)) if size > 1 else 0, nbytes
    if op == "send":
        return 1, nbytes
    return 0 if op == "recv" or size == 1 else math.ceil(math.log2(size)), 0
