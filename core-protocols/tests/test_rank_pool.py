"""Jobs on pools: results, failures, deaths, deadlines, and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from sagellm.core.protocols.errors import CommTimeoutError, ConfigError, PeerLostError
from sagellm.core.protocols.testing import RankFailedError, RankPool, ThreadRanks, torch_group


def double(rank, size, value):
    return rank, size, value * 2


def pid(rank, size):
    return os.getpid()


def fail_on(rank, size, which):
    if rank == which:
        raise PeerLostError(f"rank {rank} gave up")
    return rank


def hang(rank, size, which):
    if rank == which:
        threading.Event().wait()
    return rank


def exit_now(rank, size):
    os._exit(7)


def unpicklable(rank, size):
    return threading.Lock()


def total(rank, size, path):
    import torch
    import torch.distributed as dist

    with torch_group(rank, size, path):
        x = torch.tensor([float(rank + 1)])
        dist.all_reduce(x)
        return x.item()


@pytest.fixture(scope="module")
def pool():
    with RankPool(2, preload=()) as pool:
        yield pool


def test_every_rank_gets_its_rank_and_the_arguments(pool):
    assert pool.run(double, 21) == [(0, 2, 42), (1, 2, 42)]


def test_workers_live_on_between_jobs(pool):
    assert pool.run(pid) == pool.run(pid) == list(pool.pids)


def test_a_failure_names_the_rank_and_carries_its_exception(pool):
    with pytest.raises(RankFailedError, match=r"1 of 2 ranks failed \(1\)") as caught:
        pool.run(fail_on, 1)

    assert "gave up" in str(caught.value)
    assert isinstance(caught.value.outcomes[1].exception, PeerLostError)
    assert caught.value.outcomes[0].result == 0


def test_a_rank_that_hangs_is_killed_with_its_stack_and_replaced(pool):
    before = pool.pids

    with pytest.raises(RankFailedError, match="still running") as caught:
        pool.run(hang, 1, timeout_s=0.5)

    assert "in hang" in str(caught.value)
    assert isinstance(caught.value.outcomes[1].exception, CommTimeoutError)
    assert pool.run(pid)[0] == before[0]
    assert pool.run(pid)[1] != before[1]


def test_a_rank_that_dies_says_how(pool):
    with pytest.raises(RankFailedError, match="exited with code 7"):
        pool.run(exit_now)


def test_a_killed_rank_leaves_the_others_outcome(pool):
    job = pool.submit(hang, 1)
    pool.kill(1)

    first, second = job.outcomes(10)

    assert first.result == 0
    assert "SIGKILL" in second.error


def test_a_result_that_cannot_travel_is_reported(pool):
    with pytest.raises(RankFailedError, match="lock"):
        pool.run(unpicklable)


def test_a_subset_of_ranks(pool):
    assert pool.submit(double, 1, ranks=1).wait() == [(0, 1, 2)]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p: p.run(lambda rank, size: rank), "top of a module"),
        (lambda p: p.submit(double, 1, ranks=3), "3 ranks of a pool of 2"),
        (lambda p: RankPool(0), "at least one"),
    ],
)
def test_bad_arguments_are_refused(pool, call, match):
    with pytest.raises(ConfigError, match=match):
        call(pool)


def test_a_closed_pool_is_refused_and_leaves_no_process():
    pool = RankPool(1, preload=())
    pids = pool.run(pid)
    pool.close()
    pool.close()

    with pytest.raises(ConfigError, match="closed"):
        pool.run(pid)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_workers_die_with_the_parent():
    script = (
        "import threading\n"
        "from sagellm.core.protocols.testing import RankPool\n"
        "pool = RankPool(1, preload=())\n"
        "print(pool.pids[0], flush=True)\n"
        "threading.Event().wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())

    parent.send_signal(signal.SIGKILL)
    parent.wait()

    # The child holds the other end of our stdout pipe: end of file means that it is gone.
    assert parent.stdout.read() == ""
    parent.stdout.close()
    assert child > 0


def test_a_torch_group_meets_over_a_file(rank_pool):
    assert rank_pool.run(total, rank_pool.store_path(), timeout_s=60) == [3.0, 3.0]


def test_threads_are_ranks_too():
    with ThreadRanks(3) as ranks:
        assert ranks.run(double, 1) == [(0, 3, 2), (1, 3, 2), (2, 3, 2)]
        assert ranks.store_path() != ranks.store_path()


def test_a_thread_that_fails_or_hangs_is_reported():
    with pytest.raises(RankFailedError, match="gave up"):
        ThreadRanks(2).run(fail_on, 0)
    with pytest.raises(RankFailedError, match="in hang"):
        ThreadRanks(2).run(hang, 0, timeout_s=0.2)
