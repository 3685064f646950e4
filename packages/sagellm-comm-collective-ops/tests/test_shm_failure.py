"""A rank that dies, stops, or gives up: every other rank is told, in time, and whom."""

import os
import signal
import threading
import time

import pytest
import torch
from shm_ranks import (
    SLACK_S,
    await_mark,
    ended,
    failure,
    forked,
    join,
    leftovers,
    mark,
    settled,
)

from sagellm.comm.collective_ops._shm import meeting, transport

DEADLINE_S = 1.0
MEETING_S = 2.0  # long enough for two ranks to find each other on a busy machine
SIZE = 3


@pytest.fixture
def pool(rank_pools):
    return rank_pools(SIZE)


def dies(meet, how):
    """In the victim: leave word of when, and go."""
    mark(meet, "dying", repr(time.monotonic()))
    os.kill(os.getpid(), how)


def again_and_again(call):
    while True:
        call()


def goes_soon(meet, how):
    threading.Timer(0.02, dies, (meet, how)).start()


def victim(phase, rank, size, meet, how):
    """Be rank 1 until the phase in which it dies or stops."""
    if phase == "meeting":
        meeting._Crowd.gather = lambda self, plan: dies(meet, how)
    b = join(rank, size, meet)
    b.barrier()
    x = torch.ones(1 << 20)
    if phase == "idle":
        b.all_reduce(torch.ones(4))
    elif phase == "small":
        goes_soon(meet, how)
        again_and_again(lambda: b.all_reduce(torch.ones(4)))
    elif phase == "large":
        goes_soon(meet, how)
        again_and_again(lambda: b.all_reduce(x))
    elif phase == "symmetric":
        y = b.empty(x.shape, x.dtype)
        goes_soon(meet, how)
        again_and_again(lambda: b.all_reduce(y))
    elif phase == "queue":
        works = [b.all_reduce(x, async_op=True) for _ in range(20)]
        works[0].wait()
    elif phase == "split":
        b.split([0, 1, 2])
    elif phase == "close":
        transport.Messages.close = lambda self: dies(meet, how)
        b.close()
    dies(meet, how)


def survive(phase, rank, size, meet, timeout_s):
    """In the other ranks: what the phase's call raises."""
    if phase == "meeting":
        return failure(lambda: join(rank, size, meet, timeout_s=timeout_s))
    b = join(rank, size, meet)
    b.barrier()
    x, small = torch.ones(1 << 20), torch.ones(4)
    if phase == "idle":
        b.all_reduce(small)
    b.timeout_s = timeout_s
    if phase == "idle":
        found = failure(lambda: b.all_reduce(small))
    elif phase == "small":
        found = failure(lambda: again_and_again(lambda: b.all_reduce(small)))
    elif phase == "large":
        found = failure(lambda: again_and_again(lambda: b.all_reduce(x)))
    elif phase == "symmetric":
        y = b.empty(x.shape, x.dtype)
        found = failure(lambda: again_and_again(lambda: b.all_reduce(y)))
    elif phase == "queue":
        works = [b.all_reduce(x, async_op=True) for _ in range(21)]
        found = failure(lambda: [work.wait() for work in works])
    elif phase == "recv":
        found = failure(lambda: b.recv(small, 1))
    elif phase == "send":
        found = failure(lambda: b.send(x, 1))
    elif phase == "split":
        b.split([0, 1, 2]).close()
        found = failure(lambda: b.split([2, 1, 0]))
    else:
        found = failure(lambda: (b.barrier(), b.barrier()))
    b.close()
    return found


def a_rank_goes(rank, size, meet, phase, how, timeout_s):
    before = leftovers()
    if rank == 1:
        pid = forked(lambda: victim(phase, rank, size, meet, how))
        fate = ended(pid)
        if fate == "stopped":
            await_mark(meet, "told.0", "told.2")
            os.kill(pid, signal.SIGKILL)
            ended(pid)
        return fate
    found = survive(phase, rank, size, meet, timeout_s)
    mark(meet, f"told.{rank}")
    seconds = found[0] - float(await_mark(meet, "dying"))
    return seconds, *found[1:4], before, settled(before)


PHASES = [
    "meeting",
    "idle",
    "small",
    "large",
    "symmetric",
    "queue",
    "recv",
    "send",
    "split",
    "close",
]


@pytest.mark.parametrize("phase", PHASES)
def test_killed_rank_is_named_to_the_others_at_once_and_nothing_is_left(pool, meet, phase):
    first, fate, last = pool.run(a_rank_goes, meet, phase, signal.SIGKILL, 20.0)

    assert fate == -signal.SIGKILL
    for seconds, kind, text, lost, before, after in (first, last):
        assert kind == "PeerLostError", text
        assert seconds < SLACK_S, text
        assert "rank 1" in text
        assert lost == 1, text
        assert after == before


@pytest.mark.parametrize("phase", PHASES)
def test_stopped_rank_is_named_to_the_others_at_the_deadline(pool, meet, phase):
    first, fate, last = pool.run(a_rank_goes, meet, phase, signal.SIGSTOP, DEADLINE_S)

    assert fate == "stopped"
    for seconds, kind, text, _, before, after in (first, last):
        assert kind == "CommTimeoutError", text
        assert seconds < DEADLINE_S + SLACK_S, text
        assert "rank 1" in text
        assert after == before


def the_second_aborts(rank, size, meet):
    b = join(rank, size, meet)
    b.barrier()
    if rank == 1:
        b.abort("out of patience")
    found = failure(b.barrier)
    b.close()
    return found[1:4]


def test_abort_reaches_every_rank_with_its_reason(pool, meet):
    first, second, third = pool.run(the_second_aborts, meet)

    assert second[0] == "DistributedRuntimeError"
    for kind, text, lost in (first, third):
        assert kind == "PeerLostError"
        assert "rank 1 (global 1) left the group: aborted: out of patience" in text
        assert lost == 1


def the_second_waits_and_is_interrupted(rank, size, meet):
    b = join(rank, size, meet)
    b.barrier()
    if rank == 1:

        def interrupt(signum, frame):
            raise KeyboardInterrupt

        old = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            b.all_reduce(torch.ones(4))
        except KeyboardInterrupt:
            mark(meet, "interrupted")
        finally:
            signal.signal(signal.SIGALRM, old)
    else:
        await_mark(meet, "interrupted")
    found = failure(b.barrier)
    b.close()
    return found[1:3]


def test_interrupt_in_a_call_ends_the_group_and_tells_the_others(pool, meet):
    first, second, third = pool.run(the_second_waits_and_is_interrupted, meet)

    assert "KeyboardInterrupt" in second[1]
    for kind, text in (first, third):
        assert kind == "PeerLostError", text
        assert "KeyboardInterrupt" in text


def closed_by_one(rank, size, meet):
    b = join(rank, size, meet)
    b.barrier()
    if rank == 1:
        b.close()
        return "closed", ""
    found = failure(lambda: (b.barrier(), b.barrier()))
    b.close()
    return found[1:3]


def test_rank_that_closed_is_lost_to_the_others(pool, meet):
    first, _, third = pool.run(closed_by_one, meet)

    for kind, text in (first, third):
        assert kind == "PeerLostError", text
        assert "rank 1" in text


def late_rank(rank, size, meet):
    """Rank 1 comes to nobody; each of the others is alone when its time is over, or both are."""
    if rank == 1:
        await_mark(meet, "told.0", "told.2")
        return None
    mark(meet, f"here.{rank}")
    await_mark(meet, "here.0", "here.2")  # so that both wait at the same time
    found = failure(lambda: join(rank, size, meet, timeout_s=MEETING_S))
    mark(meet, f"told.{rank}")
    return found[1:3]


def test_rank_that_never_comes_is_named(pool):
    first, _, third = pool.run(late_rank, pool.store_path())

    for kind, text in (first, third):
        assert kind == "CommTimeoutError"
        assert f"no sign of rank 1 of 3 within {float(MEETING_S)} s" in text


def a_bug_in_a_call(rank, size, meet):
    b = join(rank, size, meet)
    if rank == 1:

        def broken(call):
            raise ZeroDivisionError("a bug")

        b.add_hook(before=broken)
        with pytest.raises(ZeroDivisionError):
            b.barrier()
        b.close()
        return "PeerLostError", "a bug"
    found = failure(b.barrier)
    b.close()
    return found[1:3]


def test_error_in_a_hook_reaches_the_others(pool, meet):
    for kind, text in pool.run(a_bug_in_a_call, meet):
        assert kind == "PeerLostError", text
        assert "a bug" in text
