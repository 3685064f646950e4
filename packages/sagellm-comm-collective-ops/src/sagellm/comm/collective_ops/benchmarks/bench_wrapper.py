"""What `wrap_process_group` adds to a call: a group around one that does nothing.

`inner` is the time of `dist.all_reduce` on torch's fake group, which returns at once. The others
are by how much longer a call takes on a group around that one: `passed` without hooks, `recorded`
with a recorder, `hooked` with `before` and `after`. Each sample is the median of differences of
short stretches that alternate. `budget/X` is 10 us over what X adds at most, `target/X` 3 us over
it: the end of the samples' 95 % interval that is further from 0. `resolved/X` is 0 where the
interval holds 0. Each group is proven to pass a call on, to record it, to call its hooks.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Ratio, Row

from ._pairs import differences, over_added

WAYS = ("passed", "recorded", "hooked")
BUDGET_S, TARGET_S = 10e-6, 3e-6
_CALLS, _PAIRS = 20, 100


def groups() -> dict[str, Any]:  # Any: torch's groups have no common type in all versions
    """A group for each contender, over the initialised default group.

    Raises:
        ArithmeticError: One does not do what it is there for.

    """
    import torch
    import torch.distributed as dist

    from sagellm.comm.collective_ops import wrap_process_group

    inner = dist.group.WORLD
    assert inner is not None
    calls = {"before": 0, "after": 0}

    def before(*args: object) -> None:
        calls["before"] += 1

    def after(*args: object) -> None:
        calls["after"] += 1

    recorded: deque[Any] = deque(maxlen=64)
    found = {
        "inner": inner,
        "passed": wrap_process_group(inner, name="passed"),
        "recorded": wrap_process_group(inner, record=recorded, name="recorded"),
        "hooked": wrap_process_group(inner, before=before, after=after, name="hooked"),
    }
    for name, group in found.items():
        x = torch.ones(2)
        dist.all_reduce(x, group=group)
        if x.tolist() != [1.0, 1.0]:
            raise ArithmeticError(f"{name}: the fake group leaves a tensor as it is, not {x}")
    if len(recorded) != 1 or calls != {"before": 1, "after": 1}:
        raise ArithmeticError(f"of one call each, {len(recorded)} recorded and hooks saw {calls}")
    return found


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _added(call: Callable[[], object], inner: Callable[[], object]) -> float:
    return statistics.median(
        differences(lambda: _seconds(call, _CALLS), lambda: _seconds(inner, _CALLS), _PAIRS)
    )


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        x = torch.zeros(int(case["nbytes"]) // 4)
        calls = {
            name: functools.partial(dist.all_reduce, x, group=group)
            for name, group in groups().items()
        }
        inner = calls.pop("inner")
        yield {
            "inner": functools.partial(_seconds, inner, _CALLS * _PAIRS),
            **{name: functools.partial(_added, call, inner) for name, call in calls.items()},
        }
    finally:
        dist.destroy_process_group()


def ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    for way in WAYS:
        budgets = [("budget", BUDGET_S, 1.0), ("target", TARGET_S, None)]
        yield from over_added(rows, rows[0].case, way, budgets)


main = Benchmark(
    "wrapper",
    contenders,
    cases=[{"op": "all_reduce", "nbytes": 1024}],
    ratios=ratios,
    distributions=("torch", "sagellm-comm-collective-ops"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
