"""Ranks for a command: those that torchrun started, or processes of our own on this host."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sagellm.comm.collective_ops.factory import create_comm_backend
from sagellm.core.protocols import (
    BackendUnavailableError,
    CommBackendProtocol,
    ConfigError,
    DistributedRuntimeError,
)
from sagellm.core.protocols.testing.rank_pool import RankFailedError, RankPool

__all__ = ["Made", "is_launched", "make_backends", "run_ranks"]

Made = tuple[dict[str, CommBackendProtocol], dict[str, str]]
"""Backends by name, and why the others could not be made."""


def is_launched() -> bool:
    """Whether torchrun or its like started this process as one rank of several."""
    return bool(os.environ.get("RANK")) and bool(os.environ.get("WORLD_SIZE"))


def run_ranks(
    fn: Callable[..., Any], *args: object, ranks: int | None, timeout_s: float
) -> list[Any] | None:  # Any: whatever `fn` returns
    """What `fn(*args)` returned on every rank of a gloo world, by rank; None but on rank 0.

    Under torchrun the ranks are its own and `ranks` must not contradict them. Otherwise they are
    processes of this host that end with this one.

    Raises:
        ConfigError: `ranks` is not possible.
        DistributedRuntimeError: A rank failed; the message has its error.

    """
    if is_launched():
        size = int(os.environ["WORLD_SIZE"])
        if ranks not in (None, size):
            raise ConfigError(f"--ranks {ranks}, but torchrun started {size}; leave --ranks out")
        return _as_launched(fn, args, timeout_s)
    size = 2 if ranks is None else ranks
    if size < 1:
        raise ConfigError(f"--ranks {size} must be at least 1")
    with RankPool(size) as pool:
        try:
            return pool.run(_as_worker, pool.store_path(), timeout_s, fn, args, timeout_s=timeout_s)
        except RankFailedError as e:
            raise DistributedRuntimeError(_last_lines(str(e))) from None


def _last_lines(text: str) -> str:
    """What the ranks' tracebacks end with, once each: the reader wants the error, not the path."""
    ends = [line for line in text.splitlines() if line and not line.startswith((" ", "Traceback"))]
    return "\n".join(dict.fromkeys(ends)) or text


def _as_launched(fn: Callable[..., Any], args: tuple[object, ...], timeout_s: float) -> list[Any]:
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    try:
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, fn(*args))
        return results if dist.get_rank() == 0 else []
    finally:
        if made:
            dist.destroy_process_group()


def _as_worker(
    rank: int,
    size: int,
    store: str,
    timeout_s: float,
    fn: Callable[..., object],
    args: tuple[object, ...],
) -> object:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        return fn(*args)
    finally:
        dist.destroy_process_group()


def make_backends(names: list[str], device: str, timeout_s: float) -> Made:
    """Backends over the default group, made in the same order on every rank.

    Whether one could be made is agreed: if it failed on any rank, no rank uses it.
    """
    where = torch.device(device)
    if where.type != "cpu":
        api: Any = getattr(torch, where.type)  # torch.cuda, torch.npu, …
        local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        api.set_device(local % api.device_count())
        where = torch.device(where.type, api.current_device())
    made: dict[str, CommBackendProtocol] = {}
    failed: dict[str, str] = {}
    for name in names:
        backend, why = None, ""
        try:
            backend = create_comm_backend(name, device=where, timeout_s=timeout_s)
            if backend.size != dist.get_world_size():
                why = f"{name} made a group of {backend.size}; it does not span processes"
        except (BackendUnavailableError, ConfigError, DistributedRuntimeError) as e:
            why = str(e)
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, why)
        wrong = {rank: answer for rank, answer in enumerate(answers) if answer}
        if wrong:
            rank = min(wrong)
            failed[name] = f"rank {rank}: {wrong[rank]}"
            if backend is not None:
                backend.close()
        elif backend is not None:
            made[name] = backend
    return made, failed
