"""Ranks for a command: those that torchrun started, or processes of our own on this host."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sagellm.comm.collective_ops._groups import find_source
from sagellm.comm.collective_ops.factory import create_comm_backend
from sagellm.core.protocols import (
    BackendUnavailableError,
    CommBackendProtocol,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
)
from sagellm.core.protocols.ports import SagePorts
from sagellm.core.protocols.testing.rank_pool import RankFailedError, RankPool

__all__ = ["Made", "Meeting", "is_launched", "make_backends", "run_ranks"]

Made = tuple[dict[str, CommBackendProtocol], dict[str, str]]
"""Backends by name, and why the others could not be made."""


def is_launched() -> bool:
    """Whether torchrun or its like started this process as one rank of several."""
    return bool(os.environ.get("RANK")) and bool(os.environ.get("WORLD_SIZE"))


def run_ranks(
    fn: Callable[..., Any], *args: object, ranks: int | None, deadline_s: float, timeout_s: float
) -> list[Any]:  # Any: whatever `fn` returns
    """What `fn(meeting, *args)` returned on every rank, by rank; empty but on rank 0.

    What it returns is plain JSON. `deadline_s` is for meeting, `timeout_s` for all of it.

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
        return _as_launched(fn, args, deadline_s)
    size = 2 if ranks is None else ranks
    if size < 1:
        raise ConfigError(f"--ranks {size} must be at least 1")
    with RankPool(size) as pool:
        port = SagePorts().reserve("collective_store", host="127.0.0.1").release()
        try:
            return pool.run(_as_worker, port, deadline_s, fn, args, timeout_s=timeout_s)
        except RankFailedError as e:
            raise DistributedRuntimeError(_last_lines(str(e))) from None


def _last_lines(text: str) -> str:
    """What the ranks' tracebacks end with, once each: the reader wants the error, not the path."""
    ends = [line for line in text.splitlines() if line and not line.startswith((" ", "Traceback"))]
    return "\n".join(dict.fromkeys(ends)) or text


def _as_launched(fn: Callable[..., Any], args: tuple[object, ...], timeout_s: float) -> list[Any]:
    meeting = _meet(timeout_s)
    try:
        results = meeting.gather(fn(meeting, *args))
        return results if meeting.rank == 0 else []
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _as_worker(
    rank: int,
    size: int,
    port: int,
    timeout_s: float,
    fn: Callable[..., object],
    args: tuple[object, ...],
) -> object:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    meeting = _meet(timeout_s)
    try:
        result = fn(meeting, *args)
        meeting.gather(None)  # rank 0 has the store: it leaves last
        return result
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Meeting:
    """Where ranks tell each other things, whatever backends they make; JSON over the store."""

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float) -> None:  # noqa: ANN401 - torch's
        self.rank = rank
        self.size = size
        self._store = store
        self._timeout = timedelta(seconds=timeout_s)
        self._turn = 0

    def gather(self, value: object) -> list[Any]:
        """What every rank gave, by rank.

        Raises:
            CommTimeoutError: Some rank gave nothing in time.

        """
        self._turn += 1
        keys = [f"sagellm/cli/{self._turn}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(value))
        try:
            self._store.wait(keys, self._timeout)
        except (RuntimeError, ValueError) as e:  # torch's DistStoreError among them
            here = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise CommTimeoutError(f"no word of ranks {here} in {self._timeout}: {e}") from e
        return [json.loads(self._store.get(key)) for key in keys]


def _meet(timeout_s: float) -> Meeting:
    source = find_source(None, timeout_s)
    if source.store is None:
        raise ConfigError("RANK is set, but there is no store; start with torchrun")
    return Meeting(source.store, source.rank, source.size, timeout_s)


def make_backends(
    meeting: Meeting,
    names: list[str],
    device: str,
    timeout_s: float,
    options: Mapping[str, Any] | None = None,  # Any: each option has its own type
) -> Made:
    """Backends over all ranks, made in the same order on every rank.

    Whether one could be made is agreed: if it failed on any rank, no rank uses it.
    """
    where = torch.device(device)
    if where.type != "cpu":
        api: Any = getattr(torch, where.type)  # torch.cuda, torch.npu, …
        local = int(os.environ.get("LOCAL_RANK", meeting.rank))
        api.set_device(local % api.device_count())
        where = torch.device(where.type, api.current_device())
    made: dict[str, CommBackendProtocol] = {}
    failed: dict[str, str] = {}
    for name in names:
        backend, why = None, ""
        try:
            backend = create_comm_backend(name, device=where, timeout_s=timeout_s, options=options)
            if backend.size != meeting.size:
                why = f"{name} made a group of {backend.size}; it does not span processes"
        except (BackendUnavailableError, ConfigError, DistributedRuntimeError) as e:
            why = str(e)
        wrong = {rank: answer for rank, answer in enumerate(meeting.gather(why)) if answer}
        if wrong:
            rank = min(wrong)
            failed[name] = f"rank {rank}: {wrong[rank]}"
            if backend is not None:
                backend.close()
        elif backend is not None:
            made[name] = backend
    return made, failed
