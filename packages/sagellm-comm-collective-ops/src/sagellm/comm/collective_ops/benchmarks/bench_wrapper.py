"""What `wrap_process_group` adds to a call: a group around one that does nothing.

`inner` is `dist.all_reduce` on torch's fake group, which returns at once. `passed` is the same
around it without hooks, `recorded` with a recorder, `hooked` with `before` and `after`.
`budget/X` is 10 us over what X adds to `inner`, `target/X` 3 us over it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Ratio, Row

WAYS = ("passed", "recorded", "hooked")
BUDGET_S, TARGET_S = 10e-6, 3e-6
_CALLS = 500


def groups() -> dict[str, Any]:  # Any: torch's groups have no common type in all versions
    """A group for each contender, over the initialised default group."""
    import torch.distributed as dist

    from sagellm.comm.collective_ops import wrap_process_group

    inner = dist.group.WORLD
    assert inner is not None

    def nothing(*args: object) -> None:
        return None

    return {
        "inner": inner,
        "passed": wrap_process_group(inner, name="passed"),
        "recorded": wrap_process_group(inner, record=deque(maxlen=64), name="recorded"),
        "hooked": wrap_process_group(inner, before=nothing, after=nothing, name="hooked"),
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - start) / _CALLS


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        x = torch.zeros(int(case["nbytes"]) // 4)
        yield {
            name: functools.partial(_seconds, functools.partial(dist.all_reduce, x, group=group))
            for name, group in groups().items()
        }
    finally:
        dist.destroy_process_group()


def ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    times = {row.contender: row.median for row in rows}
    inner = times["inner"]
    for way in WAYS:
        took = times[way]
        added = None if took is None or inner is None else max(1e-9, took - inner)
        for name, seconds, goal in (("budget", BUDGET_S, 1.0), ("target", TARGET_S, None)):
            value = None if added is None else seconds / added
            yield Ratio(f"{name}/{way}", rows[0].case, value, goal)


main = Benchmark(
    "wrapper",
    contenders,
    cases=[{"op": "all_reduce", "nbytes": 1024}],
    ratios=ratios,
    distributions=("torch", "sagellm-comm-collective-ops"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
