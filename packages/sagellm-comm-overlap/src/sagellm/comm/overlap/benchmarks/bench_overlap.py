"""How much communication `schedule` hides, against serial code and bare asynchronous handles.

One step is k chunks: compute chunk i, then communicate it. Compute is `sleep` (a device that
leaves the host's cores alone) or `matmul` (real work on a core). Communication is `link` (a
modelled wire: one transfer after another, no core used) or `gloo` (a real all_reduce between
two processes over loopback, which needs cores itself).

    eff_saved = (Tc + Tm - T) / Tm        bound_ratio = LB / T
    LB = tc + (k - 1) max(tc, tm) + tm    with tc = Tc / k, tm = Tm / k

Tc and Tm are measured in the same run, one lane at a time; Tc of `matmul` in seconds of its own
thread, because on a busy machine the wall time of a load that runs alone is anybody's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sagellm.comm.overlap import OverlapManager
from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Ratio, Row
from sagellm.core.protocols.testing import RankPool, torch_group

COMPUTE_S = 0.040
LINK_S = 0.036
MATMUL_SIZE = 256
GLOO_ELEMENTS = 4 * 1024 * 1024
WAYS = ("schedule", "handles", "serial", "compute alone", "comm alone")

Step = Callable[[], Any]  # a chunk of compute, or what issues one and returns its handle


def timed_step(
    way: str, manager: OverlapManager, computes: Sequence[Step], comms: Sequence[Step]
) -> float:
    """Seconds of one step done in one way."""
    if way == "schedule":
        start = time.perf_counter()
        manager.schedule(computes, comms).wait()
        return time.perf_counter() - start
    if way == "compute alone":
        return _alone(computes)
    start = time.perf_counter()
    handles = []
    for compute, comm in zip(computes, comms, strict=True):
        if way != "comm alone":
            compute()
        handle = comm()
        if way == "handles":
            handles.append(handle)
        else:
            _wait(handle)
    for handle in handles:
        _wait(handle)
    return time.perf_counter() - start


def _alone(computes: Sequence[Step]) -> float:
    wall, own = time.perf_counter(), time.thread_time()
    for compute in computes:
        compute()
    wall, own = time.perf_counter() - wall, time.thread_time() - own
    return own if own > wall / 10 else wall  # a sleep uses next to none of its thread's time


def _wait(handle: Future[None] | dist.Work) -> None:
    if isinstance(handle, Future):
        handle.result()
    else:
        handle.wait()


def compute_steps(kind: str, chunks: int, rounds: int) -> list[Step]:
    """Chunks of compute; `rounds` matrix products in all."""
    if kind == "sleep":
        return [lambda: time.sleep(COMPUTE_S / chunks)] * chunks
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE)
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(max(rounds // chunks, 1)):
            torch.mm(a, a, out=out)

    return [multiply] * chunks


def calibrated_rounds() -> int:
    """Matrix products that take about `COMPUTE_S` of this core's own time."""
    torch.set_num_threads(1)
    multiply = compute_steps("matmul", 1, 50)[0]
    multiply()
    start = time.thread_time()
    multiply()
    return max(int(50 * COMPUTE_S / max(time.thread_time() - start, 1e-6)), 1)


def gloo_step(
    rank: int, size: int, store: str, way: str, kind: str, chunks: int, rounds: int
) -> float:
    """One rank's seconds for a step whose communication is an all_reduce between processes."""
    torch.set_num_threads(1)
    parts = list(torch.ones(GLOO_ELEMENTS).chunk(chunks))
    computes = compute_steps(kind, chunks, rounds)
    comms = [partial(dist.all_reduce, part, async_op=True) for part in parts]
    with torch_group(rank, size, store), OverlapManager(device="cpu") as manager:
        timed_step("schedule", manager, computes, comms)  # threads, connections and pages are warm
        dist.barrier()
        return timed_step(way, manager, computes, comms)


@contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    """The ways of doing one step."""
    kind, wire, chunks = case["compute"], case["comm"], case["chunks"]
    rounds = calibrated_rounds() if kind == "matmul" else 0
    if wire == "gloo":
        with RankPool(2) as pool:
            arguments = (kind, chunks, rounds)

            def on_ranks(way: str) -> float:
                return max(pool.run(gloo_step, pool.store_path(), way, *arguments))

            yield {way: partial(on_ranks, way) for way in WAYS}
        return
    with ThreadPoolExecutor(1) as link, OverlapManager(device="cpu") as manager:
        computes = compute_steps(kind, chunks, rounds)
        comms: list[Step] = [lambda: link.submit(time.sleep, LINK_S / chunks)] * chunks
        yield {way: partial(timed_step, way, manager, computes, comms) for way in WAYS}


def cases(quick: bool) -> list[dict[str, Any]]:
    """What to measure."""
    chosen: list[dict[str, Any]] = [
        {"compute": kind, "comm": "link", "chunks": chunks}
        for kind in ("sleep", "matmul")
        for chunks in ((8,) if quick else (2, 4, 8, 16))
    ]
    gloo = [("sleep", 4), ("matmul", 4)]
    return chosen + [{"compute": kind, "comm": "gloo", "chunks": k} for kind, k in gloo]


def ratios(rows: Sequence[Row]) -> Iterable[Ratio]:
    """Saved share, distance from the bound and speed-up, per case and way."""
    by_case: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(tuple(row.case.values()), {})[row.contender] = row
    for named in by_case.values():
        case = named["serial"].case
        seconds = {name: row.median or 0.0 for name, row in named.items()}
        chunks = case["chunks"]
        load, comm = seconds["compute alone"], seconds["comm alone"]
        bound = (load + comm + (chunks - 1) * max(load, comm)) / chunks
        easy = case["compute"] == "sleep" and case["comm"] == "link" and chunks >= 8
        for way in ("schedule", "handles"):
            took = seconds[way]
            judged = easy and way == "schedule"
            saved = (load + comm - took) / comm
            yield Ratio(f"eff_saved {way}", case, saved, 0.7 if judged else None)
            yield Ratio(f"bound_ratio {way}", case, bound / took, 0.95 if judged else None)
        yield Ratio("serial/schedule", case, seconds["serial"] / seconds["schedule"])
        yield Ratio("handles/schedule", case, seconds["handles"] / seconds["schedule"])


main = Benchmark(
    "overlap",
    contenders,
    cases=cases,
    ratios=ratios,
    distributions=("sagellm-comm-overlap", "torch"),
).main


if __name__ == "__main__":
    raise SystemExit(main())
