"""What the adapter costs: gloo through our backend against torch.distributed's own calls.

Two ranks on loopback, in processes of each case. `torch/ours` is raw time over ours.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sagellm.core.protocols.bench import Case, Contenders, Ratio

RANKS = 2
GOAL = 0.85
"""Share of raw gloo's speed that the adapter should keep."""


def cases(quick: bool) -> Sequence[dict[str, Any]]:
    sizes = (1 << 10, 1 << 20) if quick else (1 << 10, 1 << 16, 1 << 20, 1 << 24)
    ops = ("all_reduce", "all_gather") if quick else ("all_reduce", "all_gather", "broadcast")
    return [{"op": op, "nbytes": n, "ranks": RANKS} for op in ops for n in sizes]


def _calls(op: str, nbytes: int, rank: int) -> dict[str, Callable[[int], object]]:
    """A call per contender; the argument picks one of several buffers."""
    import torch
    import torch.distributed as dist

    from sagellm.comm.collective_ops import GlooBackend
    from sagellm.core.protocols.process_group import ProcessGroupBackend

    ours: ProcessGroupBackend = GlooBackend()
    xs = [torch.full((nbytes // 4,), float(rank)) for _ in range(4)]
    outs = [torch.empty(RANKS * nbytes // 4) for _ in range(4)]
    raw_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    if op == "all_reduce":
        return {
            "ours": lambda i: ours.all_reduce(xs[i], "max"),
            "torch": lambda i: dist.all_reduce(xs[i], dist.ReduceOp.MAX),
        }
    if op == "all_gather":
        return {
            "ours": lambda i: ours.all_gather_into_tensor(outs[i], xs[i]),
            "torch": lambda i: raw_gather(outs[i], xs[i]),
        }
    return {
        "ours": lambda i: ours.broadcast(xs[i], 0),
        "torch": lambda i: dist.broadcast(xs[i], 0),
    }


def _rank(rank: int, folder: str, op: str, nbytes: int, pipe: Connection) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    calls = _calls(op, nbytes, rank)
    rounds = max(3, min(50, (4 << 20) // nbytes))
    pipe.send("ready")
    while (name := pipe.recv()) != "":
        call = calls[name]
        dist.barrier()
        start = time.perf_counter()
        for i in range(rounds):
            call(i % 4)
        pipe.send((time.perf_counter() - start) / rounds)
    dist.destroy_process_group()


def _mock(op: str, nbytes: int) -> float:
    import torch

    from sagellm.comm.collective_ops import MockBackend, MockWorld

    rounds = max(3, min(20, (1 << 20) // nbytes))

    def body(backend: MockBackend) -> float:
        x = torch.full((nbytes // 4,), float(backend.rank))
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
        return (time.perf_counter() - start) / rounds

    return max(MockWorld(RANKS).run(body))


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    op, nbytes = str(case["op"]), int(case["nbytes"])
    spawn = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="sagellm-bench-") as folder:
        pipes, processes = [], []
        for rank in range(RANKS):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_rank, args=(rank, str(Path(folder)), op, nbytes, theirs), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)

        def answers() -> list[Any]:
            for pipe in pipes:
                if not pipe.poll(120):
                    raise TimeoutError(f"a rank of {op} over {nbytes} bytes did not answer")
            return [pipe.recv() for pipe in pipes]

        def run(name: str) -> float:
            for pipe in pipes:
                pipe.send(name)
            return float(max(answers()))

        try:
            answers()
            yield {
                "ours": lambda: run("ours"),
                "torch": lambda: run("torch"),
                "mock": lambda: _mock(op, nbytes),
            }
            for pipe in pipes:
                pipe.send("")
            for process in processes:
                process.join(30)
        finally:
            for process in processes:
                process.kill()


def ratios(case: Case, times: Mapping[str, float | None]) -> Iterator[Ratio]:
    raw, ours = times["torch"], times["ours"]
    yield Ratio("torch/ours", case, raw / ours if raw and ours else None, GOAL)
