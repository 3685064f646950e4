"""all_reduce among the processes of one host: ours against gloo, two MPIs and DeepSpeed.

Every contender has rank processes of its own, one asked at a time. Times are medians of many
calls, each from a spin barrier to the end of the slowest rank. The case field `scheduling` is
`rr` (SCHED_RR for all contenders alike: goals are judged there, but for two) or `normal`; a quick
run has one of them, `rr` if `--priority` was given. `measure` says what a row is, and which ratios
it has:

time (fp32 1 KiB-64 MiB, bf16 1 KiB-64 MiB, 2 ranks)
    `gloo/X`, `mpi/X` (the better of MPICH and Open MPI through mpi4py) and `deepspeed/X` for
    each engine, X = `shm-native registered` (registered tensor, no statistics) or `shm-native
    plain` (any tensor, with statistics); goals at 1 KiB are for `registered`. `gloo/X symmetric`
    for tensors of `backend.empty`. `copy/X` at 64 MiB: time in which each of two processes
    copies as many bytes at once, over our time; 1 is one copy per element and rank.
    `handover/X` up to 1 MiB has no goal and tells what the machine allows at the moment: time in
    which both ranks copy the tensor into shared memory, set one flag, and add the other's.
oversubscribed (4 ranks, meant for 2 cores)
    `deepspeed/X`, `mpich/X`; a batch of calls back to back, not single ones. Judged under `normal`,
    which is how programs run: among real-time threads who spins keeps the core for a slice of
    100 ms and who yields does not, so that the ratio under `rr` is a multiple of that slice and
    says nothing of the contender. Peers run as they are by default; neither documents a setting
    for more ranks than cores.
p99 (1 MiB, a thread of the last rank's process that runs Python and never waits)
    `idle/busy X`: 99th percentile without that thread over the one with it. The thread has the
    policy of its rank. Row `X, turn of the busy thread` is the sample's time over its turns (1000
    additions each), and a sample in which it made none fails the launch. Only under `normal`: of
    three real-time threads on two cores the busy one never runs while the ranks spin.
statistics
    `budget/statistics of X`: 0.3 us over what statistics add to a call of a plain tensor. The two
    alternate 200 times for 20 calls; a sample is the median of the 200 differences, and judged is
    the end of the samples' 95 % interval that is further from 0. `resolved/statistics of X` is 0
    where that interval holds 0: then the difference is not resolvable, and the budget's ratio is
    one over an upper bound.
lost
    `budget/naming by X`: 50 ms over the time from SIGKILL of a rank to the error that names it
    on the others; `gloo/X` beside it, whose error names no rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sagellm.core.protocols import DistributedRuntimeError
from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Missing, Ratio, Row

from . import _fleet
from ._ours import ENGINES, variants
from ._pairs import over_added
from ._runs import (
    MPIS,
    KiB,
    MiB,
    Tail,
    difference_sampler,
    distinct,
    judged,
    measured,
    medians,
    of_engine,
    over,
    prepared,
    schedulings,
)

STATISTICS_BUDGET_S = 0.3e-6
_STATISTICS = "plain", "plain, no statistics"
_TURN = "turn of the busy thread"
NAMING_BUDGET_S = 0.05

_GOALS: dict[tuple[str, int, str], tuple[float | None, float]] = {
    # (dtype, bytes, peer): python engine, native engine
    ("float32", KiB, "gloo"): (40, 120),
    ("float32", 64 * KiB, "gloo"): (14, 38),
    ("float32", MiB, "gloo"): (3.5, 7),
    ("float32", 16 * MiB, "gloo"): (2.5, 5.4),
    ("float32", 64 * MiB, "gloo"): (2.5, 5.4),
    ("float32", KiB, "mpi"): (None, 0.9),
    ("float32", 64 * KiB, "mpi"): (1.6, 3),
    ("float32", MiB, "mpi"): (1.3, 2.2),
    ("float32", 16 * MiB, "mpi"): (1.4, 3),
    ("float32", 64 * MiB, "mpi"): (1.4, 3),
    ("float32", KiB, "deepspeed"): (None, 1.5),
    ("float32", 64 * KiB, "deepspeed"): (None, 2),
    ("float32", MiB, "deepspeed"): (None, 1.4),
    ("float32", 16 * MiB, "deepspeed"): (None, 2),
    ("float32", 64 * MiB, "deepspeed"): (None, 2),
    ("bfloat16", KiB, "gloo"): (25, 80),
    ("bfloat16", MiB, "gloo"): (2, 4.5),
    ("bfloat16", 64 * MiB, "gloo"): (2, 5),
    ("bfloat16", KiB, "deepspeed"): (None, 1.5),
    ("bfloat16", MiB, "deepspeed"): (None, 1.2),
    ("bfloat16", 64 * MiB, "deepspeed"): (None, 2),
}
_SYMMETRIC_GOAL = 6.0
_COPY_GOALS = (0.5, 0.8)
_OVERSUBSCRIBED_GOAL = 10.0
_BUSY_GOAL = 1 / 3


def cases(quick: bool) -> Sequence[dict[str, Any]]:
    _fleet.build_peers = not quick
    sizes = {
        "float32": (KiB, MiB) if quick else (KiB, 64 * KiB, MiB, 16 * MiB, 64 * MiB),
        "bfloat16": () if quick else (KiB, MiB, 64 * MiB),
    }
    found = []
    for scheduling in schedulings(quick):

        def case(
            measure: str, nbytes: int, dtype: str = "float32", ranks: int = 2, s: str = scheduling
        ) -> None:
            found.append(
                {
                    "op": "all_reduce",
                    "measure": measure,
                    "dtype": dtype,
                    "nbytes": nbytes,
                    "ranks": ranks,
                    "scheduling": s,
                }
            )

        for dtype, of_dtype in sizes.items():
            for nbytes in of_dtype:
                case("time", nbytes, dtype)
        case("statistics", KiB)
        if scheduling == "normal":
            case("p99", MiB)
        if not quick:
            case("lost", KiB)
            case("oversubscribed", KiB, ranks=4)
    return found


def contenders(case: Case) -> AbstractContextManager[Contenders]:
    return _MEASURES[case["measure"]](case)


def _time(case: Case) -> AbstractContextManager[Contenders]:
    ways = ["registered", "plain"]
    if case["dtype"] == "float32" and case["nbytes"] >= MiB:
        ways.append("symmetric")
    names = ["gloo", *MPIS, "deepspeed", *variants(*ways)]
    if case["nbytes"] >= 64 * MiB:
        names.append("copy")
    if KiB < case["nbytes"] <= MiB:
        names.append("handover")
    return measured(case, names)


def _oversubscribed(case: Case) -> AbstractContextManager[Contenders]:
    return measured(case, ["gloo", *MPIS, "deepspeed", *variants("registered")], each=False)


@contextmanager
def _statistics(case: Case) -> Iterator[Contenders]:
    with prepared(case, variants(*_STATISTICS)) as found:
        named: dict[str, Callable[[], float] | Missing] = {}
        for engine in ENGINES:
            on, off = (f"shm-{engine} {way}" for way in _STATISTICS)
            why = next((s for s in (found[on], found[off]) if isinstance(s, Missing)), None)
            named[f"statistics of shm-{engine}"] = why or difference_sampler(case, on, off)
        yield named


@contextmanager
def _p99(case: Case) -> Iterator[Contenders]:
    with prepared(case, ["gloo", *variants("plain")]) as found:
        named: dict[str, Callable[[], float] | Missing] = {}
        for name, s in found.items():
            tail = s if isinstance(s, Missing) else Tail(case, name)
            named[f"{name}, idle"] = tail if isinstance(tail, Missing) else tail.idle
            named[f"{name}, busy"] = tail if isinstance(tail, Missing) else tail.busy
            named[f"{name}, {_TURN}"] = tail if isinstance(tail, Missing) else tail.busy_turn
        yield named


@contextmanager
def _lost(case: Case) -> Iterator[Contenders]:
    world = int(case["ranks"])
    turns = itertools.count()
    ranks = _fleet.ranks_of("lost", world)
    refused = [why for why in ranks.ask("schedule", policy=case["scheduling"]) if why]

    def naming(variant: str) -> Callable[[], float]:
        def sample() -> float:
            *answers, victim = ranks.ask("lose", variant=variant, turn=next(turns))
            for answer in (*answers, victim):
                if "error" in answer:
                    raise DistributedRuntimeError(f"{variant}: {answer['error']}")
            unnamed = [a["said"] for a in answers if f"rank {world - 1}" not in a["said"]]
            if unnamed and variant != "gloo":
                raise DistributedRuntimeError(f"{variant} names no rank {world - 1}: {unnamed[0]}")
            return float(max(a["at"] for a in answers) - victim["killed"])

        return sample

    def fit(engine: str) -> Callable[[], float] | Missing:
        variant = f"shm-{engine}"
        answers = ranks.ask("lose", variant=variant, turn=next(turns))
        why = next((a["missing"] for a in answers if "missing" in a), "")
        return Missing(why) if why else naming(variant)

    names: dict[str, Callable[[], float] | Missing] = {"gloo": naming("gloo")}
    names |= {f"shm-{engine}": fit(engine) for engine in ENGINES}
    if refused:
        names = dict.fromkeys(names, Missing(refused[0]))
    names["deepspeed"] = Missing("it waits for ever")
    names |= dict.fromkeys(MPIS, Missing("its launcher ends the whole job"))
    try:
        yield names
    finally:
        _fleet.close_all(kind="lost")


_MEASURES: dict[str, Callable[[Case], AbstractContextManager[Contenders]]] = {
    "time": _time,
    "oversubscribed": _oversubscribed,
    "statistics": _statistics,
    "p99": _p99,
    "lost": _lost,
}


def ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    for case in distinct(rows):
        if case["measure"] == "statistics":
            goal = judged(case, 1.0)
            for engine in ENGINES:
                name = f"statistics of shm-{engine}"
                yield from over_added(rows, case, name, [("budget", STATISTICS_BUDGET_S, goal)])
        else:
            yield from _RATIOS[case["measure"]](case, medians(rows, case))


Times = Mapping[str, float | None]


def _ratios_of_times(case: Case, times: Times) -> Iterator[Ratio]:
    for engine in ENGINES:
        for way in ("registered", "plain"):
            counts = way == "registered" or case["nbytes"] > KiB
            for peer in ("gloo", "mpi", "deepspeed"):
                if (peer, case["dtype"]) != ("mpi", "bfloat16"):
                    goals = _GOALS.get((case["dtype"], case["nbytes"], peer), (None, None))
                    goal = judged(case, of_engine(engine, goals)) if counts else None
                    yield over(case, times, peer, f"shm-{engine} {way}", goal)
        name = f"shm-{engine} symmetric"
        if name in times:
            goal = _SYMMETRIC_GOAL if case["nbytes"] >= 16 * MiB else None
            yield over(case, times, "gloo", name, judged(case, goal))
        if "copy" in times and case["dtype"] == "float32":
            goal = of_engine(engine, _COPY_GOALS)
            yield over(case, times, "copy", f"shm-{engine} plain", judged(case, goal))
            yield over(case, times, "copy", name)
        if "handover" in times:
            yield over(case, times, "handover", f"shm-{engine} registered")


def _ratios_of_oversubscribed(case: Case, times: Times) -> Iterator[Ratio]:
    for engine in ENGINES:
        for peer in ("deepspeed", "mpich"):
            name = f"shm-{engine} registered"
            yield over(case, times, peer, name, judged(case, _OVERSUBSCRIBED_GOAL, "normal"))


def _ratios_of_p99(case: Case, times: Times) -> Iterator[Ratio]:
    for name in ("gloo", *variants("plain")):
        idle, busy = times[f"{name}, idle"], times[f"{name}, busy"]
        value = None if idle is None or not busy else idle / busy
        goal = _BUSY_GOAL if name.startswith("shm-native") else None
        yield Ratio(f"idle/busy {name}", case, value, judged(case, goal, "normal"))


def _ratios_of_lost(case: Case, times: Times) -> Iterator[Ratio]:
    for engine in ENGINES:
        seconds = times[f"shm-{engine}"]
        value = NAMING_BUDGET_S / seconds if seconds else None
        yield Ratio(f"budget/naming by shm-{engine}", case, value, judged(case, 1.0))
        yield over(case, times, "gloo", f"shm-{engine}")


_RATIOS: dict[str, Callable[[Case, Times], Iterator[Ratio]]] = {
    "time": _ratios_of_times,
    "oversubscribed": _ratios_of_oversubscribed,
    "p99": _ratios_of_p99,
    "lost": _ratios_of_lost,
}

main = Benchmark(
    "all_reduce",
    contenders,
    cases=cases,
    ratios=ratios,
    distributions=("torch", "mpi4py", "mpich", "openmpi", "deepspeed"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
