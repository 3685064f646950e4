"""One plan on all ranks of a group: rank 0's order, checked by hash, with a veto for everybody."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sagellm.core.protocols import CollectiveMismatchError, CommBackendProtocol, TaskId

from .scheduler import StaticPlan, graph_digest, plan_in_order, serial_plan

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["agree_on"]


def agree_on(plan: StaticPlan, group: CommBackendProtocol) -> StaticPlan:
    """The plan that all ranks of a group run. Collective: every rank must call it.

    Ranks that run serially veto overlap for all; else rank 0's order is taken.

    Raises:
        CollectiveMismatchError: Ranks brought different graphs, or ended with different plans.

    """
    device = group.device_type
    graph = graph_digest(plan.tasks)
    facts = [*_words(graph), len(plan.tasks), int(plan.serial)]
    told = _gather(group, facts, device)
    _compare({rank: tuple(row[:3]) for rank, row in enumerate(told)}, "different graphs")
    vetoes = [rank for rank, row in enumerate(told) if row[3]]
    kept: dict[str, Any] = {"costs": plan.costs, "candidates": plan.candidates}
    if vetoes:
        why = plan.reason if plan.serial else f"vetoed by ranks {vetoes}"
        agreed = serial_plan(plan.tasks, why, **kept)
    else:
        agreed = _order_of_rank_0(plan, group, device, kept)
    hashes = _gather(group, _words(agreed.digest), device)
    _compare({rank: tuple(row) for rank, row in enumerate(hashes)}, "different plans")
    return agreed


def _order_of_rank_0(
    plan: StaticPlan,
    group: CommBackendProtocol,
    device: str,
    kept: dict[str, Any],  # keyword arguments of StaticPlan
) -> StaticPlan:
    import torch

    if not plan.tasks:
        return plan
    lanes = sorted(plan.order)
    mine = [task for lane in lanes for task in plan.order[lane]]
    flat = torch.tensor(mine, dtype=torch.int64, device=device)
    group.broadcast(flat, 0)
    theirs = [int(task) for task in flat.tolist()]
    order: dict[str, tuple[TaskId, ...]] = {}
    at = 0
    for lane in lanes:
        order[lane] = tuple(theirs[at : at + len(plan.order[lane])])
        at += len(order[lane])
    if order == dict(plan.order):
        return plan
    agreed = plan_in_order(
        plan.tasks, order, reason="order of rank 0, agreed by the group", rule="rank 0", **kept
    )
    return agreed


def _gather(group: CommBackendProtocol, words: list[int], device: str) -> list[list[int]]:
    import torch

    rows = group.all_gather(torch.tensor(words, dtype=torch.int64, device=device))
    return [[int(word) for word in row.tolist()] for row in cast("list[Tensor]", rows)]


def _words(digest: str) -> list[int]:
    raw = bytes.fromhex(digest)
    return [int.from_bytes(raw[at : at + 8], "little", signed=True) for at in (0, 8)]


def _compare(rows: dict[int, tuple[int, ...]], what: str) -> None:
    if len(set(rows.values())) > 1:
        calls = {rank: "/".join(f"{word:x}" for word in row) for rank, row in rows.items()}
        listed = ", ".join(f"rank {rank}: {call}" for rank, call in calls.items())
        raise CollectiveMismatchError(f"ranks hold {what}: {listed}", calls=calls)
