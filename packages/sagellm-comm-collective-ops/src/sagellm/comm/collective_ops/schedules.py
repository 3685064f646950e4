"""Ring, tree, doubling, halving and direct schedules as data, and what runs them.

A `Schedule` says for every rank which chunks it sends to whom and receives from whom, step by
step. `check_schedule` proves one without moving a byte; `run_schedule` executes one over any
backend's sends and receives, for any dtype, reduction and size. The order in which elements are
combined follows from the schedule alone, so that all ranks and all runs get the same bits; what
16-bit floats are carried in is said at `run_schedule`.

>>> report = check_schedule(make_schedule("all_reduce", "ring", 4))
>>> report.depth, report.sent_chunks
(6, (6, 6, 6, 6))
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from sagellm.core.protocols import CommBackendProtocol, ConfigError, P2POp, ReduceOp

from ._schedule_check import ScheduleReport as ScheduleReport, check_schedule as check_schedule
from ._schedule_data import Move as Move, Schedule as Schedule
from ._schedule_plans import PLANS
from ._schedule_run import check_reduction, execute

__all__ = [
    "Move",
    "Schedule",
    "ScheduleReport",
    "check_schedule",
    "make_schedule",
    "run_schedule",
    "schedule_algorithms",
]

SCHEDULE_TAG = 0x5C0D
"""Tag of the messages of schedules; messages of one's own take another."""


def schedule_algorithms(op: str) -> tuple[str, ...]:
    """The algorithms that there are schedules of for `op`; none for an operation without any.

    >>> schedule_algorithms("all_gather")
    ('ring', 'recursive_doubling', 'direct')
    """
    return tuple(PLANS.get(op, ()))


def make_schedule(
    op: str, algorithm: str, size: int, *, root: int = 0, order: Sequence[int] | None = None
) -> Schedule:
    """The schedule of an operation by an algorithm, for any number of ranks.

    Args:
        op: `all_reduce`, `all_gather`, `reduce_scatter`, `broadcast`, `reduce`, `all_to_all`.
        algorithm: One of `schedule_algorithms(op)`.
        size: Ranks.
        root: Of `broadcast` and `reduce`.
        order: Ranks as a ring passes them, say sorted by host; None is rank order. Only `ring`
            heeds it.

    Raises:
        ConfigError: Unknown operation or algorithm, or ranks that do not fit; the message lists
            what exists.

    """
    if op not in PLANS:
        raise ConfigError(f"no schedules of {op!r}; there are some of {', '.join(PLANS)}")
    if algorithm not in PLANS[op]:
        known = ", ".join(PLANS[op])
        raise ConfigError(f"no schedule {algorithm!r} of {op}; there are {known}")
    if size < 1:
        raise ConfigError(f"a schedule needs at least one rank, got size={size}")
    if not 0 <= root < size:
        raise ConfigError(f"root {root} is not in 0..{size - 1}")
    ring = tuple(range(size)) if order is None else tuple(order)
    if sorted(ring) != list(range(size)):
        raise ConfigError(f"order {list(ring)} is not an order of the ranks 0..{size - 1}")
    return _made(op, algorithm, size, root, ring)


@lru_cache(maxsize=256)
def _made(op: str, algorithm: str, size: int, root: int, order: tuple[int, ...]) -> Schedule:
    return PLANS[op][algorithm](size, root, order)


def run_schedule(
    backend: CommBackendProtocol,
    schedule: Schedule,
    x: Tensor,
    op: str | ReduceOp = "sum",
    *,
    out: Tensor | None = None,
    in_splits: Sequence[int] | None = None,
    out_splits: Sequence[int] | None = None,
) -> Tensor:
    """Do this rank's part of a schedule over the backend's `batch_p2p`, and return the result.

    Blocks. Every rank of the group makes this call with the same schedule. `all_reduce`,
    `broadcast` and `reduce` work in place in `x`; the others fill `out`, as the methods
    `all_gather_into_tensor`, `reduce_scatter_tensor` and `all_to_all_single` do, and leave `x`
    alone. What a step brings to a chunk is folded in ascending order of the ranks it comes from.
    Sums, averages and products of float16 and bfloat16 over more than two ranks are carried in
    float32, on the wire too, and rounded once.

    Args:
        backend: Its `size` is the schedule's.
        schedule: From `make_schedule`, or one that `check_schedule` accepted.
        x: Any shape, dtype and strides.
        op: Reduction, for those operations that reduce.
        out: For `all_gather`, `reduce_scatter` and `all_to_all`.
        in_splits: Of `all_to_all`, rows of `x` for each rank; None splits evenly.
        out_splits: Of `all_to_all`, rows of `out` from each rank.

    Raises:
        ConfigError: Sizes that do not fit, before anything is sent.

    """
    if schedule.size != backend.size:
        raise ConfigError(f"a schedule of {schedule.size} ranks on a group of {backend.size}")
    reduction = ReduceOp.of(op)
    if schedule.op in ("all_reduce", "reduce", "reduce_scatter"):
        check_reduction(reduction, x.dtype)
    target = _output(schedule, x, out)
    source = None if target is x else x.contiguous()

    def exchange(messages: list[tuple[Move, Tensor]]) -> None:
        ops = [P2POp(m.kind, part, m.peer, SCHEDULE_TAG) for m, part in messages]
        for work in backend.batch_p2p(ops):
            work.wait()

    execute(
        schedule,
        backend.rank,
        source,
        target,
        exchange,
        reduction,
        _elements(schedule, in_splits, x),
        _elements(schedule, out_splits, target),
    )
    return target


def _output(schedule: Schedule, x: Tensor, out: Tensor | None) -> Tensor:
    if schedule.op in ("all_reduce", "broadcast", "reduce"):
        if out is not None:
            raise ConfigError(f"{schedule.op} works in place; it takes no out")
        return x
    if out is None:
        raise ConfigError(f"{schedule.op} needs out")
    wanted = {
        "all_gather": (out.numel(), x.numel() * schedule.size),
        "reduce_scatter": (out.numel() * schedule.size, x.numel()),
    }.get(schedule.op, (0, 0))
    if wanted[0] != wanted[1] or out.dtype != x.dtype:
        raise ConfigError(
            f"{schedule.op} over {schedule.size} ranks: x has {x.numel()} elements of {x.dtype}, "
            f"out {out.numel()} of {out.dtype}"
        )
    return out


def _elements(schedule: Schedule, splits: Sequence[int] | None, x: Tensor) -> list[int]:
    if splits is None:
        if schedule.op == "all_to_all" and x.shape[0] % schedule.size:
            raise ConfigError(
                f"{x.shape[0]} rows cannot be split evenly among {schedule.size} ranks"
            )
        return []
    row = x[0].numel() if x.dim() and x.shape[0] else 1
    return [rows * row for rows in splits]
