"""What the adapter costs: gloo through our backend against torch.distributed's own calls.

Two ranks on loopback; results of both are compared once a case. `torch/ours` is raw time over ours.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from sagellm.core.protocols.bench import Case, Contenders, Ratio

from ._ranks import RankProcesses, Timed, serve

if TYPE_CHECKING:
    from torch import Tensor

RANKS = 2
GOAL = 0.85
"""Share of raw gloo's speed that the adapter should keep."""
NAMES = ("ours", "torch")
_BUFFERS = 4


def cases(quick: bool) -> Sequence[dict[str, Any]]:
    sizes = (1 << 10, 1 << 20) if quick else (1 << 10, 1 << 16, 1 << 20, 1 << 24)
    ops = ("all_reduce", "all_gather") if quick else ("all_reduce", "all_gather", "broadcast")
    return [{"op": op, "nbytes": n, "ranks": RANKS} for op in ops for n in sizes]


def rank_process(rank: int, folder: str, pipe: Connection) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    from sagellm.comm.collective_ops import GlooBackend
    from sagellm.core.protocols.process_group import ProcessGroupBackend

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    ours: ProcessGroupBackend = GlooBackend()
    raw_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    @functools.lru_cache(maxsize=1)
    def buffers(nbytes: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        count = nbytes // 4
        return (
            [torch.empty(count) for _ in range(_BUFFERS)],
            [torch.empty(RANKS * count) for _ in range(_BUFFERS)],
        )

    def timed_for(name: str, case: Mapping[str, Any]) -> Timed:
        op, nbytes = str(case["op"]), int(case["nbytes"])
        xs, outs = buffers(nbytes)
        calls: dict[tuple[str, str], Callable[[int], object]] = {
            ("all_reduce", "ours"): lambda i: ours.all_reduce(xs[i], "max"),
            ("all_reduce", "torch"): lambda i: dist.all_reduce(xs[i], dist.ReduceOp.MAX),
            ("all_gather", "ours"): lambda i: ours.all_gather_into_tensor(outs[i], xs[i]),
            ("all_gather", "torch"): lambda i: raw_gather(outs[i], xs[i]),
            ("broadcast", "ours"): lambda i: ours.broadcast(xs[i], 0),
            ("broadcast", "torch"): lambda i: dist.broadcast(xs[i], 0),
        }
        call = calls[op, name]
        turns = itertools.cycle(range(_BUFFERS))

        def fill() -> None:
            for x, out in zip(xs, outs, strict=True):
                x.fill_(rank + 1)
                out.zero_()

        def wrong() -> str:
            return wrong_part(op, outs[0] if op == "all_gather" else xs[0])

        rounds = max(3, min(50, (4 << 20) // nbytes))
        return Timed(lambda: call(next(turns)), fill, wrong, rounds)

    serve(pipe, dist.barrier, timed_for)


def wrong_part(op: str, result: Tensor) -> str:
    """What is wrong with a result of ranks that gave their number, counted from 1."""
    parts = result.chunk(RANKS)
    wanted = {"all_reduce": [RANKS] * RANKS, "broadcast": [1] * RANKS}.get(op, [1, 2])
    for part, value in zip(parts, wanted, strict=True):
        if not bool((part == value).all()):
            return f"{op} has {part[part != value][0].item()!r} where {value} belongs"
    return ""


def _mock(op: str, nbytes: int) -> float:
    import torch

    from sagellm.comm.collective_ops import MockBackend, MockWorld

    rounds = max(3, min(20, (1 << 20) // nbytes))

    def body(backend: MockBackend) -> float:
        x = torch.full((nbytes // 4,), backend.rank + 1.0)
        out = torch.empty(RANKS * nbytes // 4)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: backend.all_reduce(x, "max"),
            "all_gather": lambda: backend.all_gather_into_tensor(out, x),
            "broadcast": lambda: backend.broadcast(x, 0),
        }
        backend.barrier()
        start = time.perf_counter()
        for _ in range(rounds):
            calls[op]()
        took = (time.perf_counter() - start) / rounds
        wrong = wrong_part(op, out if op == "all_gather" else x)
        if wrong:
            raise ArithmeticError(f"mock: {wrong}")
        return took

    return max(MockWorld(RANKS).run(body))


@functools.cache
def _ranks() -> RankProcesses:
    ranks = RankProcesses(RANKS, rank_process)
    atexit.register(ranks.close)
    return ranks


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    op, nbytes = str(case["op"]), int(case["nbytes"])
    yield {**_ranks().measured(NAMES, case), "mock": lambda: _mock(op, nbytes)}


def ratios(case: Case, times: Mapping[str, float | None]) -> Iterator[Ratio]:
    raw, ours = times["torch"], times["ours"]
    yield Ratio("torch/ours", case, raw / ours if raw and ours else None, GOAL)
