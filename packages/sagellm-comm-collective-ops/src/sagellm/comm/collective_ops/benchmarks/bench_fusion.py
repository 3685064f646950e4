"""What fusing buys: 200 tensors of 4-64 KiB, two ranks, over gloo and over shared memory.

`gloo_per_tensor` is torch's own synchronous all_reduce of each tensor; `gloo_one_cat` is what torch
can do at best: all of them concatenated, reduced in one call, and copied back. `gloo_fused` is
`fused_all_reduce` of the list, `gloo_added` the same tensors queued one by one in a
`FusedAllReduce`, `gloo_in_bucket` tensors that live in its buckets. Over shared memory
`shm-ENGINE_fused` must not lose against `shm-ENGINE_per_tensor`; `added` is reported.

Each contender's results are compared once a case. `scheduling` is `rr` (SCHED_RR for all alike:
goals are judged there) or `normal`; a quick run has one of them, `rr` if `--priority` was given.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from sagellm.comm.collective_ops._shm.engines import ENGINES, available_engines
from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Missing, Ratio, Row

from ._ranks import RankProcesses, Timed, serve
from ._runs import distinct, judged, medians, over, schedulings

TENSORS = 200
GLOO = ("gloo_per_tensor", "gloo_one_cat", "gloo_fused", "gloo_added", "gloo_in_bucket")
WAYS = ("per_tensor", "fused", "added")
SHM = tuple(f"shm-{engine}_{way}" for engine in ENGINES for way in WAYS)


def cases(quick: bool) -> Sequence[dict[str, Any]]:
    shape = {"tensors": TENSORS, "kib": "4-64", "ranks": 2}
    return [{**shape, "scheduling": scheduling} for scheduling in schedulings(quick)]


def rank_process(rank: int, folder: str, pipe: Connection, engines: Sequence[str]) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    from sagellm.comm.collective_ops import (
        FusedAllReduce,
        GlooBackend,
        ShmBackend,
        fused_all_reduce,
    )

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    gloo = GlooBackend(timeout_s=60)
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1024, 16384, (TENSORS,), generator=generator).tolist()
    tensors = [torch.zeros(n) for n in counts]
    at_home = FusedAllReduce(gloo)
    homes = [at_home.empty((n,), torch.float32) for n in counts]

    def each(call: Callable[[torch.Tensor], object]) -> None:
        for x in tensors:
            call(x)

    def one_cat() -> None:
        flat = torch.cat(tensors)
        dist.all_reduce(flat)
        for x, part in zip(tensors, torch.split(flat, counts), strict=True):
            x.copy_(part)

    def all_of(fuser: FusedAllReduce, xs: Sequence[torch.Tensor]) -> None:
        for x in xs:
            fuser.add(x)
        fuser.flush()

    calls: dict[str, Callable[[], object]] = {
        "gloo_per_tensor": lambda: each(dist.all_reduce),
        "gloo_one_cat": one_cat,
        "gloo_fused": lambda: fused_all_reduce(gloo, tensors),
        "gloo_added": functools.partial(all_of, FusedAllReduce(gloo), tensors),
        "gloo_in_bucket": lambda: all_of(at_home, homes),
    }
    for engine in engines:
        shm = ShmBackend(timeout_s=60, options={"engine": engine})
        calls[f"shm-{engine}_per_tensor"] = functools.partial(each, shm.all_reduce)
        calls[f"shm-{engine}_fused"] = functools.partial(fused_all_reduce, shm, tensors)
        calls[f"shm-{engine}_added"] = functools.partial(all_of, FusedAllReduce(shm), tensors)

    def timed_for(name: str, case: Mapping[str, Any]) -> Timed:
        xs = homes if name == "gloo_in_bucket" else tensors

        def fill() -> None:
            for i, x in enumerate(xs):
                x.fill_((i + 1) * (rank + 1))

        def wrong() -> str:
            for i, x in enumerate(xs):
                if not bool((x == 3 * (i + 1)).all()):
                    return f"tensor {i} is {x[x != 3 * (i + 1)][0].item()!r}, not {3 * (i + 1)}"
            return ""

        return Timed(calls[name], fill, wrong, 5 if name.startswith("shm") else 1)

    serve(pipe, dist.barrier, timed_for)


@functools.cache
def _ranks() -> tuple[RankProcesses, list[str]]:
    engines = [engine for engine in ENGINES if engine in available_engines()]
    ranks = RankProcesses(2, rank_process, engines)
    atexit.register(ranks.close)
    return ranks, [*GLOO, *(f"shm-{engine}_{way}" for engine in engines for way in WAYS)]


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    ranks, there = _ranks()
    absent = Missing("this engine of shm does not work here")
    yield {**dict.fromkeys((*GLOO, *SHM), absent), **ranks.measured(there, case)}


def ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    shm = [
        (f"shm-{e}_per_tensor", f"shm-{e}_{way}", goal)
        for e in ENGINES
        for way, goal in (("fused", 1.0), ("added", None))
    ]
    for case in distinct(rows):
        times = medians(rows, case)
        for peer, ours, goal in (
            ("gloo_per_tensor", "gloo_fused", 4.5),
            ("gloo_per_tensor", "gloo_added", None),
            ("gloo_per_tensor", "gloo_in_bucket", None),
            ("gloo_one_cat", "gloo_fused", None),
            ("gloo_one_cat", "gloo_in_bucket", None),
            *shm,
        ):
            yield over(case, times, peer, ours, judged(case, goal))


main = Benchmark(
    "fusion",
    contenders,
    cases=cases,
    ratios=ratios,
    repeats=9,
    distributions=("torch", "sagellm-comm-collective-ops"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
