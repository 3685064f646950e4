"""What fusing buys: 200 tensors of 4-64 KiB, two ranks, over gloo and over shared memory.

`gloo_per_tensor` is torch's own all_reduce of each tensor. `gloo_fused` copies into buckets and
back, `gloo_in_bucket` reduces tensors that live in the buckets. Over shared memory fusing must not
lose against `shm_per_tensor`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Ratio, Row

from ._ranks import RankProcesses, serve

TENSORS = 200
NAMES = (
    "gloo_per_tensor", "gloo_fused", "gloo_in_bucket", "shm_per_tensor", "shm_fused",
)  # fmt: skip


def rank_process(rank: int, folder: str, pipe: Connection) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    from sagellm.comm.collective_ops import FusedAllReduce, GlooBackend, create_comm_backend

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    gloo, shm = GlooBackend(timeout_s=60), create_comm_backend("shm", timeout_s=60)
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1024, 16384, (TENSORS,), generator=generator).tolist()
    tensors = [torch.zeros(n) for n in counts]
    fused, fused_shm = FusedAllReduce(gloo), FusedAllReduce(shm)
    at_home = FusedAllReduce(gloo)
    homes = [at_home.empty((n,), torch.float32) for n in counts]

    def each(call: Callable[[torch.Tensor], object]) -> None:
        for x in tensors:
            call(x)

    def all_of(fuser: FusedAllReduce, xs: Sequence[torch.Tensor]) -> None:
        for x in xs:
            fuser.add(x)
        fuser.flush()

    calls: dict[str, Callable[[], None]] = {
        "gloo_per_tensor": lambda: each(dist.all_reduce),
        "gloo_fused": lambda: all_of(fused, tensors),
        "gloo_in_bucket": lambda: all_of(at_home, homes),
        "shm_per_tensor": lambda: each(shm.all_reduce),
        "shm_fused": lambda: all_of(fused_shm, tensors),
    }

    def call_for(name: str, case: Mapping[str, Any]) -> tuple[Callable[[], object], int]:
        return calls[name], 3 if name.startswith("shm") else 1

    serve(pipe, dist.barrier, call_for)


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    ranks = RankProcesses(2, rank_process)
    try:
        yield {name: functools.partial(ranks.time, name, case) for name in NAMES}
    finally:
        ranks.close()


def ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    times = {row.contender: row.median or 0.0 for row in rows}
    for peer, ours, goal in (
        ("gloo_per_tensor", "gloo_fused", 4.5),
        ("gloo_per_tensor", "gloo_in_bucket", None),
        ("shm_per_tensor", "shm_fused", 1.0),
    ):
        value = times[peer] / times[ours] if times[ours] else None
        yield Ratio(f"{peer}/{ours}", rows[0].case, value, goal)


main = Benchmark(
    "fusion",
    contenders,
    cases=[{"tensors": TENSORS, "kib": "4-64", "ranks": 2}],
    ratios=ratios,
    repeats=9,
    distributions=("torch", "sagellm-comm-collective-ops"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
