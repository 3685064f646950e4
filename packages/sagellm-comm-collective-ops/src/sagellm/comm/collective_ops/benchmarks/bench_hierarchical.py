"""What hosts gain by speaking through leaders: 2 hosts of 2 ranks over a shaped link.

The hosts are network namespaces, the link between them a veth pair with tbf at 1 Gbit/s in each
direction. The peer is gloo's own ring over all four ranks, `flat_gloo`, in the same namespaces.
Needs root.
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

from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Missing, Ratio, Row

from ._netns import ShapedHosts, enter_namespace, why_not
from ._ranks import RankProcesses, serve

RATE = "1gbit"
ORDERS = {"contiguous": (0, 1, 2, 3), "interleaved": (0, 2, 1, 3)}
NAMES = ("flat_gloo", "hier", "hier_bf16", "hier_int8")
GOALS = {
    ("hier", "interleaved"): 2.7,
    ("hier", "contiguous"): 1.3,
    ("hier_bf16", "interleaved"): 5.0,
    ("hier_bf16", "contiguous"): 2.5,
}


def cases(quick: bool) -> Sequence[dict[str, Any]]:
    sizes = (1 << 20,) if quick else (1 << 12, 1 << 20, 4 << 20, 16 << 20)
    return [{"ranks": order, "nbytes": n, "link": RATE} for order in ORDERS for n in sizes]


def rank_process(rank: int, folder: str, pipe: Connection, pids: tuple[int, int]) -> None:
    host = rank // 2
    enter_namespace(pids[host])
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) > 1:  # each host has its part of the machine, for all contenders alike
        os.sched_setaffinity(0, cpus[host::2])
    os.environ.update(GLOO_SOCKET_IFNAME=ShapedHosts.interfaces[host], OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    from sagellm.comm.collective_ops import GlooBackend, HierBackend

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=4,
        timeout=timedelta(seconds=60),
    )
    world = GlooBackend(timeout_s=60)
    calls: dict[tuple[str, str], Callable[[torch.Tensor], object]] = {}
    for order, ranks in ORDERS.items():
        flat = world.split(ranks, order)
        assert flat is not None
        group = flat.process_group
        calls[order, "flat_gloo"] = functools.partial(dist.all_reduce, group=group)
        for wire in ("none", "bf16", "int8"):
            options = {"wire": wire, "allow_lossy": wire != "none"}
            hier = HierBackend(None, group, timeout_s=60, options=options)
            assert hier.hosts == tuple(
                tuple(i for i in range(4) if ranks[i] // 2 == h) for h in range(2)
            )
            calls[order, "hier" if wire == "none" else f"hier_{wire}"] = hier.all_reduce
    tensors: dict[int, torch.Tensor] = {}

    def call_for(name: str, case: Mapping[str, Any]) -> tuple[Callable[[], object], int]:
        nbytes = int(case["nbytes"])
        x = tensors.setdefault(nbytes, torch.empty(nbytes // 4)).zero_()
        call = calls[str(case["ranks"]), name]
        return lambda: call(x), 10 if nbytes < 1 << 16 else 2 if nbytes < 1 << 22 else 1

    serve(pipe, dist.barrier, call_for)


@functools.cache
def _world() -> RankProcesses | Missing:
    reason = why_not()
    if reason is not None:
        return Missing(reason)
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    hosts = stack.enter_context(ShapedHosts(RATE))
    processes = RankProcesses(4, rank_process, hosts.pids)
    stack.callback(processes.close)
    return processes


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    world = _world()
    if isinstance(world, Missing):
        yield dict.fromkeys(NAMES, world)
    else:
        yield {name: functools.partial(world.time, name, case) for name in NAMES}


def ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    medians = {(str(row.case), row.contender): row.median for row in rows}
    for row in rows:
        if row.contender == "flat_gloo":
            continue
        flat = medians[str(row.case), "flat_gloo"]
        value = flat / row.median if flat and row.median else None
        in_range = (1 << 20) <= int(row.case["nbytes"]) <= (16 << 20)
        goal = GOALS.get((row.contender, str(row.case["ranks"]))) if in_range else None
        yield Ratio(f"flat_gloo/{row.contender}", row.case, value, goal)


main = Benchmark(
    "hierarchical",
    contenders,
    cases=cases,
    ratios=ratios,
    repeats=5,
    distributions=("torch", "sagellm-comm-collective-ops"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
