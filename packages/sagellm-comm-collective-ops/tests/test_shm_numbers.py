"""Numbers of calls: alike whichever way a call came, and counted from the last reset on."""

import threading

import pytest
import torch
from shm_ranks import await_mark, engines, join, mark

from sagellm.core.protocols import CommTimeoutError
from sagellm.core.protocols.testing import RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as made:
        yield made


@pytest.fixture(params=engines())
def meet(pool, request):
    return f"{pool.store_path()}.{request.param}"


WAYS = {
    "short": lambda b, x: b.all_reduce(x),
    "general": lambda b, x: b.reduce(x, 0),
}


def third_call_fails(rank, size, meet):
    found = []
    for statistics in (True, False):
        for way, call in WAYS.items():
            name = f"{way}-{statistics}"
            with join(rank, size, meet, name=name, statistics=statistics) as b:
                x = torch.ones(4)
                b.all_reduce(x)
                b.all_gather_into_tensor(torch.empty(8), x)
                if rank == 1:
                    await_mark(meet, name)
                    continue
                b.timeout_s = 0.2
                with pytest.raises(CommTimeoutError):
                    call(b, x)
                record = b._recorded()
                found.append((record.records()[-1].collective, record.position().collective))
                mark(meet, name)
    return found


def test_a_failed_call_has_one_number_whichever_way_it_came(pool, meet):
    assert pool.run(third_call_fails, meet)[0] == [(3, 3)] * 4


def reset_beside_calls(rank, size, meet):
    with join(rank, size, meet) as b:
        x, engine = torch.ones(4), b._shm.engine
        b.register(x)
        made, over, wrong = [0], threading.Event(), []

        def watch():
            while not over.is_set():
                before = made[0]
                engine.reset_totals()
                counted = sum(t.calls for t in engine.totals())
                if counted > made[0] - before + 1:
                    wrong.append((counted, made[0] - before))

        watcher = threading.Thread(target=watch)
        if rank == 0:
            watcher.start()
        for _ in range(5_000):
            b.all_reduce(x)
            made[0] += 1
        over.set()
        if rank == 0:
            watcher.join(20)
        b.reset_stats()
        left = b.get_stats().details
        b.all_reduce(x)
        return wrong, left, [d.calls for d in b.get_stats().details]


def test_a_reset_beside_a_running_call_takes_all_calls_before_it(pool, meet):
    for wrong, left, counts in pool.run(reset_beside_calls, meet):
        assert (wrong[:3], left, counts) == ([], (), [1])
