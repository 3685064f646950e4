"""What hosts gain by speaking through leaders: 2 hosts of 2 ranks over a shaped link.

The hosts are network namespaces, the link between them a veth pair with tbf at 1 Gbit/s in each
direction. The peer is gloo's own ring over all four ranks, `flat_gloo`, in the same namespaces.
Each contender's results are compared once a case: exactly, but for int8 (see `_BOUNDS`). Goals are
judged where `scheduling` is `rr` (SCHED_RR for all alike); a quick run has one scheduling, `rr` if
`--priority` was given. Needs root.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Missing, Ratio, Row
from sagellm.core.protocols.netns import ShapedHosts, enter_namespace, why_not

from ._ranks import RankProcesses, Timed, serve
from ._runs import distinct, judged, medians, over, schedulings

if TYPE_CHECKING:
    from torch import Tensor

RATE = "1gbit"
ORDERS = {"contiguous": (0, 1, 2, 3), "interleaved": (0, 2, 1, 3)}
NAMES = ("flat_gloo", "hier", "hier_bf16", "hier_int8")
GOALS = {
    ("hier", "interleaved"): 2.7,
    ("hier", "contiguous"): 1.3,
    ("hier_bf16", "interleaved"): 5.0,
    ("hier_bf16", "contiguous"): 2.5,
}

_LARGEST = 7
_BOUNDS = {"hier_int8": _LARGEST * 10 / 100}
"""Error allowed in a sum of integers up to `_LARGEST` times 1, 2, 3, 4: bf16 holds it exactly, int8
in steps of a 127th of the largest. A rank that is left out changes every element by 1 or more."""


def cases(quick: bool) -> Sequence[dict[str, Any]]:
    sizes = (1 << 20,) if quick else (1 << 12, 1 << 20, 4 << 20, 16 << 20)
    return [
        {"ranks": order, "nbytes": n, "link": RATE, "scheduling": scheduling}
        for scheduling in schedulings(quick)
        for order in ORDERS
        for n in sizes
    ]


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

    @functools.lru_cache(maxsize=1)
    def pattern_and_tensor(nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        n = nbytes // 4
        pattern = (torch.arange(_LARGEST) + 1.0).repeat(n // _LARGEST + 1)[:n]
        return pattern, torch.empty(n)

    def timed_for(name: str, case: Mapping[str, Any]) -> Timed:
        nbytes = int(case["nbytes"])
        pattern, x = pattern_and_tensor(nbytes)
        call = calls[str(case["ranks"]), name]

        def fill() -> None:
            torch.mul(pattern, rank + 1, out=x)

        def wrong() -> str:
            return wrong_sum(x, pattern * 10, _BOUNDS.get(name, 0.0))

        rounds = 10 if nbytes < 1 << 16 else 2 if nbytes < 1 << 22 else 1
        return Timed(lambda: call(x), fill, wrong, rounds)

    serve(pipe, dist.barrier, timed_for)


def wrong_sum(x: Tensor, expected: Tensor, bound: float) -> str:
    """Which element is off by more than `bound`, if one is."""
    off = (x - expected).abs()
    at = int(off.argmax())
    if float(off[at]) <= bound:
        return ""
    return f"element {at} is {x[at].item()!r}, not {expected[at].item()!r}"


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
        yield world.measured(NAMES, case)


def ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    for case in distinct(rows):
        times = medians(rows, case)
        in_range = (1 << 20) <= int(case["nbytes"]) <= (16 << 20)
        for name in NAMES[1:]:
            goal = GOALS.get((name, str(case["ranks"]))) if in_range else None
            yield over(case, times, "flat_gloo", name, judged(case, goal))


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
