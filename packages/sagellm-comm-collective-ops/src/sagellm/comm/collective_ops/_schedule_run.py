"""One rank's part of a schedule, on tensors, over anything that can send and receive.

The order in which elements are combined is fixed by the schedule alone: what a step brings to a
chunk is folded, with what is there, in ascending order of the ranks it comes from. Both ends of an
exchange therefore compute the same expression, and every schedule of this package leaves the same
bits on every rank and in every run. Sums, averages and products of 16-bit floats over more than
two ranks are carried in float32, on the wire too, and rounded once at the end; `avg` divides there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sagellm.core.protocols import ConfigError, ReduceOp

from ._schedule_data import Move, Schedule, bounds

__all__ = ["Exchange", "execute"]

Exchange = Callable[[list[tuple[Move, Tensor]]], None]
"""Starts all sends and receives of contiguous bytes, and returns when all are done."""

_HALF = (torch.float16, torch.bfloat16)
_ROUNDING = (ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PRODUCT)
_FOLDS: dict[ReduceOp, Callable[..., Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVG: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}


def execute(
    schedule: Schedule,
    rank: int,
    inputs: Tensor | None,
    output: Tensor,
    exchange: Exchange,
    op: ReduceOp = ReduceOp.SUM,
    in_splits: Sequence[int] = (),
    out_splits: Sequence[int] = (),
) -> None:
    """Do this rank's steps and leave the result in `output`.

    Args:
        schedule: The same on every rank.
        rank: This one.
        inputs: What is read, unchanged; None where `output` is both.
        output: What is written.
        exchange: Moves the bytes of one step.
        op: Reduction.
        in_splits: Of `all_to_all`, elements for each rank; empty splits evenly.
        out_splits: Of `all_to_all`, elements from each rank.

    """
    with torch.no_grad():
        if schedule.op == "all_to_all":
            assert inputs is not None
            source, target = inputs.reshape(-1), _flat(output)
            ours = _edges(source.numel(), schedule.size, in_splits)
            theirs = _edges(target.numel(), schedule.size, out_splits)
            if ours[rank + 1] - ours[rank] != theirs[rank + 1] - theirs[rank]:
                raise ConfigError(
                    f"rank {rank} sends itself {ours[rank + 1] - ours[rank]} elements and "
                    f"expects {theirs[rank + 1] - theirs[rank]}"
                )
            target[theirs[rank] : theirs[rank + 1]].copy_(source[ours[rank] : ours[rank + 1]])
            for step in schedule.steps[rank]:
                _step(step, rank, source, ours, target, theirs, exchange, op)
            _leave(target, output)
            return
        wide = _wide(output.dtype, op, schedule)
        if schedule.op == "reduce_scatter":
            assert inputs is not None
            buffer = inputs.reshape(-1).to(wide, copy=True)
        elif schedule.op == "all_gather":
            assert inputs is not None
            buffer = _flat(output)
            n = inputs.numel()
            buffer[rank * n : (rank + 1) * n].copy_(inputs.reshape(-1))
        else:
            buffer = _flat(output).to(wide)
        edges = bounds(buffer.numel(), schedule.chunks)
        for step in schedule.steps[rank]:
            _step(step, rank, buffer, edges, buffer, edges, exchange, op)
        if op is ReduceOp.AVG and schedule.op in ("all_reduce", "reduce", "reduce_scatter"):
            buffer.div_(schedule.size)
        if schedule.op == "reduce_scatter":
            buffer = buffer[edges[rank] : edges[rank + 1]]
        _leave(buffer, output)


def check_reduction(op: ReduceOp, dtype: torch.dtype) -> None:
    """Refuse a reduction that has no meaning for a dtype.

    Raises:
        ConfigError: It has none.

    """
    floating = dtype.is_floating_point or dtype.is_complex
    if op is ReduceOp.AVG and not floating:
        raise ConfigError(f"avg needs a floating dtype, got {dtype}")
    if op in (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR) and floating:
        raise ConfigError(f"{op} needs an integer or bool dtype, got {dtype}")


def _step(
    step: Sequence[Move],
    rank: int,
    source: Tensor,
    ours: Sequence[int],
    target: Tensor,
    theirs: Sequence[int],
    exchange: Exchange,
    op: ReduceOp,
) -> None:
    sending = [(ours[m.start], ours[m.stop]) for m in step if m.kind == "send" and source is target]
    messages: list[tuple[Move, Tensor]] = []
    folds: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    for move in step:
        if move.kind == "send":
            part = source[ours[move.start] : ours[move.stop]]
        else:
            first, last = theirs[move.start], theirs[move.stop]
            place = target[first:last]
            part = place
            if move.reduce:
                part = torch.empty_like(place)
                folds.setdefault((first, last), []).append((move.peer, part))
            elif any(first < b and a < last for a, b in sending):
                part = torch.empty_like(place)
                copies.append((place, part))
        if part.numel():
            messages.append((move, part.view(torch.uint8)))
    exchange(messages)
    for place, part in copies:
        place.copy_(part)
    fold = _FOLDS[op]
    for (first, last), parts in folds.items():
        own = target[first:last]
        _fold(fold, own, [p for _, p in sorted([*parts, (rank, own)], key=lambda p: p[0])])


def _fold(fold: Callable[..., Tensor], own: Tensor, operands: list[Tensor]) -> None:
    """Combine from left to right into `own`, which is one of the operands."""
    total = operands[0]
    for operand in operands[1:-1]:
        # Into what came: `own` may still be needed further right.
        total = fold(total, operand, out=operand if total is own else total)
    fold(total, operands[-1], out=own)


def _wide(dtype: torch.dtype, op: ReduceOp, schedule: Schedule) -> torch.dtype:
    reducing = schedule.op in ("all_reduce", "reduce", "reduce_scatter")
    if reducing and dtype in _HALF and op in _ROUNDING and schedule.size > 2:
        return torch.float32
    return dtype


def _flat(x: Tensor) -> Tensor:
    """The elements of `x` in order: its own memory where that is contiguous."""
    return x.view(-1) if x.is_contiguous() else x.reshape(-1)


def _leave(buffer: Tensor, output: Tensor) -> None:
    if buffer.data_ptr() != output.data_ptr() or buffer.dtype != output.dtype:
        output.copy_(buffer.view(output.shape))


def _edges(numel: int, size: int, splits: Sequence[int]) -> tuple[int, ...]:
    if not splits:
        return bounds(numel, size)
    edges = tuple(accumulate(splits, initial=0))
    if len(splits) != size or edges[-1] != numel:
        raise ConfigError(f"splits {list(splits)} of {numel} elements for {size} ranks")
    return edges
