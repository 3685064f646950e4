"""Collectives other than all_reduce, and the ways to them: adapter, backend, torch program.

Three kinds of cases, of two ranks on one host:

with `op` and `nbytes` only
    What the adapter costs. `torch/ours`: gloo called by torch over gloo through our backend; 1
    means that checks, hooks, counting and deadlines are free. `mock` shows the in-process backend
    and says nothing about wires.
`measure` is `time`
    all_gather and reduce_scatter; `nbytes` is one rank's part. `gloo/X` and `mpi/X` (the better
    of MPICH and Open MPI) for X = `shm-native registered`, …; see `bench_all_reduce` for names.
`measure` is `program`
    `gloo/c10d-native`, `gloo/c10d-python`: unmodified `dist.all_reduce` over gloo, over the same
    program after `register_c10d_backend("sagellm")` with `shm` on that engine.

Goals of the last two kinds hold for `scheduling` `rr` (SCHED_RR for all contenders alike).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Ratio, Row

from . import _adapter
from ._ours import ENGINES, variants
from ._runs import MPIS, KiB, MiB, distinct, judged, measured, medians, of_engine, over, schedulings

_GOALS = {KiB: (18.0, 60.0), MiB: (3.0, 5.0)}
_PROGRAM_GOALS = (15.0, 20.0)


def cases(quick: bool) -> Sequence[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = list(_adapter.cases(quick))
    shape = {"dtype": "float32", "ranks": 2}
    for scheduling in schedulings(quick):
        how = {**shape, "scheduling": scheduling}
        found += [
            {"op": op, "measure": "time", "nbytes": nbytes, **how}
            for op in ("all_gather", "reduce_scatter")
            for nbytes in (KiB, MiB)
        ]
        found.append({"op": "all_reduce", "measure": "program", "nbytes": KiB, **how})
    return found


def contenders(case: Case) -> AbstractContextManager[Contenders]:
    if "measure" not in case:
        return _adapter.contenders(case)
    if case["measure"] == "program":
        return measured(case, ["gloo", *(f"c10d-{engine}" for engine in ENGINES)])
    return measured(case, ["gloo", *MPIS, *variants("registered", "plain")])


def ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    for case in distinct(rows):
        times = medians(rows, case)
        if "measure" not in case:
            yield from _adapter.ratios(case, times)
        elif case["measure"] == "program":
            for engine in ENGINES:
                goal = judged(case, of_engine(engine, _PROGRAM_GOALS))
                yield over(case, times, "gloo", f"c10d-{engine}", goal)
        else:
            yield from _of_times(case, times)


def _of_times(case: Case, times: Mapping[str, float | None]) -> Iterator[Ratio]:
    for engine in ENGINES:
        for way in ("registered", "plain"):
            goal = of_engine(engine, _GOALS[case["nbytes"]])
            name = f"shm-{engine} {way}"
            met = judged(case, goal) if way == "registered" or case["nbytes"] > KiB else None
            yield over(case, times, "gloo", name, met)
            yield over(case, times, "mpi", name)


main = Benchmark(
    "collectives",
    contenders,
    cases=cases,
    ratios=ratios,
    distributions=("torch", "sagellm-comm-collective-ops", "mpi4py", "mpich", "openmpi"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
