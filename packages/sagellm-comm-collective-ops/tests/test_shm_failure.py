"""A rank that dies, stops, or does something else: every other rank is told, in time, and whom."""

import os
import resource
import signal
import threading
import time

import pytest
import torch
from shm_ranks import await_mark, ended, engines, failure, forked, join, mark

from sagellm.comm.collective_ops._shm import meeting, transport
from sagellm.core.protocols.testing.rank_pool import RankPool

SIZE = 3


@pytest.fixture(scope="module")
def pool():
    with RankPool(SIZE) as made:
        yield made


@pytest.fixture(params=engines())
def meet(pool, request):
    """Where the ranks of one test meet, with one of the engines."""
    return f"{pool.store_path()}.{request.param}"


def dies(meet, how):
    """In the victim: leave word of when, and go."""
    mark(meet, "dying", repr(time.monotonic()))
    os.kill(os.getpid(), how)


def victim(phase, rank, size, meet, how):
    """Be rank 1 until the phase in which it dies or stops."""
    if phase == "meeting":
        meeting._Crowd.gather = lambda self, plan: dies(meet, how)
    b = join(rank, size, meet)
    b.barrier()
    if phase == "one_shot":
        b.all_reduce(torch.ones(4))
    elif phase == "large":
        x = torch.ones(1 << 20)
        b.all_reduce(x)
        ender = threading.Timer(0.02, dies, (meet, how))
        ender.start()
        while True:
            b.all_reduce(x)
    elif phase == "split":
        b.split([0, 1, 2])
    elif phase == "close":
        transport.Messages.close = lambda self: dies(meet, how)
        b.close()
    dies(meet, how)


def survivor(phase, rank, size, meet, timeout_s):
    """The other ranks: what the phase's call raises."""
    if phase == "meeting":
        return failure(lambda: join(rank, size, meet, timeout_s=timeout_s))
    b = join(rank, size, meet)
    b.timeout_s = timeout_s
    b._hot = type(b._hot)(b._shm, size, timeout_s)
    b.barrier()
    x = torch.ones(1 << 20)
    if phase == "one_shot":
        b.all_reduce(torch.ones(4))
        found = failure(lambda: b.all_reduce(torch.ones(4)))
    elif phase == "large":

        def forever():
            while True:
                b.all_reduce(x)

        found = failure(forever)
    elif phase == "recv":
        found = failure(lambda: b.recv(torch.ones(4), 1))
    elif phase == "send":
        found = failure(lambda: b.send(x, 1))
    elif phase == "async":
        work = b.all_reduce(x, async_op=True)
        found = failure(work.wait)
    elif phase == "split":
        b.split([0, 1, 2]).close()
        found = failure(lambda: b.split([2, 1, 0]))
    else:
        found = failure(lambda: (b.barrier(), b.barrier()))
    b.close()
    return found


def a_rank_goes(rank, size, meet, phase, how, timeout_s):
    if rank == 1:
        pid = forked(lambda: victim(phase, rank, size, meet, how))
        fate = ended(pid)
        if fate == "stopped":
            await_mark(meet, "told.0", "told.2")
            os.kill(pid, signal.SIGKILL)
            ended(pid)
        return fate
    found = survivor(phase, rank, size, meet, timeout_s)
    mark(meet, f"told.{rank}")
    return found[0] - float(await_mark(meet, "dying")), *found[1:4]


PHASES = ["meeting", "one_shot", "large", "recv", "send", "async", "split", "close"]


@pytest.mark.parametrize("phase", PHASES)
def test_killed_rank_is_named_to_the_others_at_once(pool, meet, phase):
    first, fate, last = pool.run(a_rank_goes, meet, phase, signal.SIGKILL, 20.0)

    assert fate == -signal.SIGKILL
    for seconds, kind, text, lost in (first, last):
        assert kind == "PeerLostError", text
        assert seconds < 2, text
        assert "rank 1" in text
        assert lost == 1, text


@pytest.mark.parametrize("phase", [p for p in PHASES if p != "close"])
def test_stopped_rank_is_named_to_the_others_at_the_deadline(pool, meet, phase):
    first, fate, last = pool.run(a_rank_goes, meet, phase, signal.SIGSTOP, 0.7)

    assert fate == "stopped"
    for seconds, kind, text, _ in (first, last):
        assert kind == "CommTimeoutError", text
        assert seconds < 2.7, text
        assert "rank 1" in text


# -- different calls ------------------------------------------------------------------------


def calls_of(b, case, odd):
    x = torch.ones(8)
    out = torch.empty(8 * b.size)
    usual, other = {
        "op": (lambda: b.all_reduce(x), lambda: b.broadcast(x, 0)),
        "dtype": (lambda: b.all_reduce(x), lambda: b.all_reduce(x.int())),
        "size": (lambda: b.all_reduce(x), lambda: b.all_reduce(x[:6])),
        "reduction": (lambda: b.all_reduce(x), lambda: b.all_reduce(x, "max")),
        "root": (lambda: b.broadcast(x, 0), lambda: b.broadcast(x, 2)),
        "order": (
            lambda: (b.barrier(), b.all_gather_into_tensor(out, x)),
            lambda: (b.all_gather_into_tensor(out, x), b.barrier()),
        ),
        "large": (lambda: b.all_reduce(torch.ones(1 << 19)), lambda: b.all_reduce(x)),
        "async": (lambda: b.all_reduce(x, async_op=True).wait(), lambda: b.barrier()),
    }[case]
    return other if odd else usual


def a_rank_differs(rank, size, meet, case):
    b = join(rank, size, meet)
    b.all_reduce(torch.ones(2))
    found = failure(calls_of(b, case, rank == 1))
    again = failure(b.barrier)
    b.close()
    return found, again


@pytest.mark.parametrize(
    ("case", "usual", "other"),
    [
        ("op", "all_reduce float32 32 bytes sum", "broadcast float32 32 bytes root 0"),
        ("dtype", "all_reduce float32 32 bytes sum", "all_reduce int32 32 bytes sum"),
        ("size", "all_reduce float32 32 bytes sum", "all_reduce float32 24 bytes sum"),
        ("reduction", "all_reduce float32 32 bytes sum", "all_reduce float32 32 bytes max"),
        ("root", "broadcast float32 32 bytes root 0", "broadcast float32 32 bytes root 2"),
        ("order", "barrier", "all_gather float32 32 bytes"),
        ("large", "all_reduce float32 2097152 bytes sum", "all_reduce float32 32 bytes sum"),
        ("async", "all_reduce float32 32 bytes sum", "barrier"),
    ],
)
def test_different_calls_are_named_on_every_rank(pool, meet, case, usual, other):
    for (_, kind, text, _, calls), again in pool.run(a_rank_differs, meet, case):
        assert kind == "CollectiveMismatchError", text
        assert usual in calls[0], calls
        assert other in calls[1], calls
        assert usual in text
        assert other in text
        assert again[1] == "CollectiveMismatchError"
        assert "is dead since" in again[2]


def messages_differ(rank, size, meet):
    b = join(rank, size, meet)
    found = None
    if rank == 0:
        b.send(torch.ones(2), 1)
        found = failure(b.barrier)
    elif rank == 1:
        found = failure(lambda: b.recv(torch.ones(3), 0))
    else:
        found = failure(b.barrier)
    b.close()
    return found[1:3]


def test_message_of_another_size_is_refused(pool):
    first, second, third = pool.run(messages_differ, pool.store_path())

    assert second[0] == "CollectiveMismatchError"
    assert "recv from rank 0, tag 0, 12 bytes met a send of 8 bytes" in second[1]
    for kind, text in (first, third):
        assert kind == "PeerLostError"
        assert "rank 1" in text
        assert "8 bytes" in text


# -- memory -----------------------------------------------------------------------------------


def no_room_on_the_first_rank(rank, size, meet):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        return failure(lambda: join(rank, size, meet))[1:3]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_memory_that_cannot_be_reserved_is_an_error_on_every_rank(pool):
    for kind, text in pool.run(no_room_on_the_first_rank, pool.store_path()):
        assert kind == "ResourceError", text
        assert "bytes for the shared segment cannot be reserved" in text
        assert "slot_bytes" in text


def more_than_the_machine_has(rank, size, meet):
    return failure(lambda: join(rank, size, meet, slot_bytes=1 << 44))[1:3]


def test_more_memory_than_the_machine_has_is_refused_before_it_is_touched(pool):
    for kind, text in pool.run(more_than_the_machine_has, pool.store_path()):
        assert kind == "ResourceError", text
        assert "bytes are available here" in text


def options_differ(rank, size, meet):
    return failure(lambda: join(rank, size, meet, slot_bytes=4096 * (1 + rank)))[1:3]


def test_different_options_are_named_on_every_rank(pool):
    for kind, text in pool.run(options_differ, pool.store_path()):
        assert kind == "ConfigError"
        assert "option slot_bytes is 4096 on rank 0 and 8192 on rank 1" in text


# -- one rank gives up --------------------------------------------------------------------------


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
    if rank == 1:
        await_mark(meet, "told.0", "told.2")
        return None
    found = failure(lambda: join(rank, size, meet, timeout_s=0.4))
    mark(meet, f"told.{rank}")
    return found[1:3]


def test_rank_that_never_comes_is_named(pool):
    first, _, third = pool.run(late_rank, pool.store_path())

    for kind, text in (first, third):
        assert kind == "CommTimeoutError"
        assert "no sign of rank 1 of 3 within 0.4 s" in text


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
