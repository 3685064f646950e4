"""A program of `torch.distributed` on a group of ours whose ranks die, differ, or are late."""

import os
import pickle
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from shm_ranks import await_mark, ended, engines, failure, forked, leftovers, mark

from sagellm.comm.collective_ops import register_c10d_backend

SIZE = 3


@pytest.fixture
def children(rank_pools):
    """Runs a function in a forked child of every rank; what each gave, None of one that died."""
    pool = rank_pools(SIZE)

    def run(fn, *args):
        return pool.run(in_child, pool.store_path(), fn, *args, timeout_s=60.0)

    return run


def in_child(rank, size, meet, fn, *args):
    found = Path(f"{meet}.result.{rank}")
    pid = forked(lambda: found.write_bytes(pickle.dumps(fn(rank, size, meet, *args))))
    how = ended(pid, 50.0)
    assert how in (0, -signal.SIGKILL), how
    return pickle.loads(found.read_bytes()) if found.exists() else None


def start(rank, size, meet, timeout_s=20.0):
    register_c10d_backend()
    dist.init_process_group(
        "sagellm", init_method=f"file://{meet}", rank=rank, world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    assert dist.group.WORLD.backend.name == "shm"


# -- a rank dies ----------------------------------------------------------------------------


def dies(meet):
    mark(meet, "dying", repr(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_all_reduce(rank, size, meet):
    start(rank, size, meet)
    x = torch.ones(1 << 20)
    dist.all_reduce(x)
    if rank == 1:
        threading.Timer(0.02, dies, (meet,)).start()

    def forever():
        while True:
            dist.all_reduce(x)

    found = failure(forever)
    again = failure(lambda: dist.barrier())
    return found[0] - float(await_mark(meet, "dying")), found[1:4], again[1]


def test_a_rank_killed_in_all_reduce_is_named_to_the_others_at_once(children):
    first, victim, last = children(killed_in_all_reduce)

    assert victim is None
    for seconds, (kind, text, lost), again in (first, last):
        assert (kind, lost, again) == ("PeerLostError", 1, "PeerLostError"), text
        assert "rank 1" in text
        assert seconds < 2, text


# -- ranks differ ---------------------------------------------------------------------------


def differ(rank, size, meet):
    start(rank, size, meet)
    x, odd = torch.ones(8), rank == 1

    def same(g):
        dist.all_reduce(x, group=g)

    calls = {
        "op": (same, lambda g: dist.broadcast(x, 0, group=g)),
        "dtype": (same, lambda g: dist.all_reduce(x.int(), group=g)),
        "size": (same, lambda g: dist.all_reduce(x[:6], group=g)),
        "reduction": (same, lambda g: dist.all_reduce(x, dist.ReduceOp.MAX, group=g)),
        "late": (
            lambda g: dist.all_reduce(x, group=g, async_op=True).wait(),
            lambda g: dist.all_gather([torch.ones(8) for _ in range(size)], x, group=g),
        ),
    }
    found = {}
    for name, pair in calls.items():
        g = dist.new_group()
        _, kind, text, _, said = failure(lambda pair=pair, g=g: pair[odd](g))
        found[name] = kind, text, said
    return found


def test_ranks_that_differ_hear_of_both_calls(children):
    words = {
        "op": ("all_reduce", "broadcast"),
        "dtype": ("float32", "int32"),
        "size": ("32 bytes", "24 bytes"),
        "reduction": ("sum", "max"),
        "late": ("all_reduce", "all_gather"),
    }
    for found in children(differ):
        for name, (kind, text, said) in found.items():
            assert kind == "CollectiveMismatchError", (name, text)
            assert sorted(said) == [0, 1, 2], (name, text)
            assert all(word in text for word in words[name]), (name, text)


# -- a rank is late -------------------------------------------------------------------------


def late(rank, size, meet, how):
    start(rank, size, meet, 0.5 if how == "init" else 20.0)
    g = dist.new_group(timeout=timedelta(seconds=0.5)) if how == "new_group" else dist.group.WORLD
    dist.all_reduce(torch.ones(4), group=g)
    if how == "later":
        g._set_default_timeout(timedelta(seconds=0.5))
    if rank == 1:
        await_mark(meet, "told.0", "told.2")
        return None
    begun = time.monotonic()
    ended_at, kind, text, *_ = failure(lambda: dist.all_reduce(torch.ones(4), group=g))
    mark(meet, f"told.{rank}")
    return ended_at - begun, kind, text


@pytest.mark.parametrize("how", ["init", "new_group", "later"])
def test_a_late_rank_is_named_at_the_deadline_that_torch_was_given(children, how):
    first, _, last = children(late, how)

    for seconds, kind, text in (first, last):
        assert kind == "CommTimeoutError", text
        assert "rank 1" in text
        assert 0.4 < seconds < 2.5, text


# -- a rank forks ---------------------------------------------------------------------------


def refused(calls):
    for name, call in calls.items():
        kind, text = failure(call)[1:3]
        assert kind == "ConfigError", name
        assert "forked child" in text, (name, text)


def calls_of(g, x, registered, size):
    """Every way into a group's transport."""
    y, parts = torch.ones(4), [torch.empty(4) for _ in range(size)]
    return {
        "all_reduce": lambda: dist.all_reduce(x, group=g),
        "registered": lambda: dist.all_reduce(registered, group=g),
        "registered, without torch": lambda: g.backend.all_reduce(registered),
        "max": lambda: dist.all_reduce(x, dist.ReduceOp.MAX, group=g),
        "all_gather": lambda: dist.all_gather(parts, y, group=g),
        "into": lambda: dist.all_gather_into_tensor(torch.empty(4 * size), y, group=g),
        "reduce_scatter": lambda: dist.reduce_scatter(y, parts, group=g),
        "broadcast": lambda: dist.broadcast(y, 0, group=g),
        "barrier": lambda: dist.barrier(group=g),
        "late": lambda: dist.all_reduce(x, group=g, async_op=True).wait(),
        "late all_gather": lambda: dist.all_gather(parts, y, group=g, async_op=True).wait(),
        "send": lambda: dist.send(y, 1, group=g),
        "isend": lambda: dist.isend(y, 1, group=g).wait(),
        "recv": lambda: dist.recv(y, 1, group=g),
        "irecv": lambda: dist.irecv(y, 1, group=g).wait(),
        "anybody": lambda: dist.recv(y, None, group=g),
    }


def future_is_refused(work):
    with pytest.raises(ValueError, match="forked child"):
        work.get_future().wait()


def forks(rank, size, meet):
    start(rank, size, meet)
    for engine in engines():
        register_c10d_backend(f"sagellm_{engine}", options={"engine": engine})
        g = dist.new_group(backend=f"sagellm_{engine}")
        x, registered = torch.ones(4), torch.ones(4)
        handle = g.backend.register(registered)
        for y in (x, registered):
            dist.all_reduce(y, group=g)
        if rank == 0:  # nothing is queued: all ways are the short ones
            child = forked(lambda g=g, x=x, y=registered: refused(calls_of(g, x, y, size)))
            assert ended(child) == 0, engine
        dist.all_reduce(x, group=g, async_op=True).get_future().wait()
        if rank == 0:
            pending = dist.all_reduce(x, group=g, async_op=True)
            assert ended(forked(lambda work=pending: future_is_refused(work))) == 0, engine
            mark(meet, f"{engine} forked")
            pending.wait()
        else:
            await_mark(meet, f"{engine} forked")
            dist.all_reduce(x, group=g)
        handle.release()
        assert x.tolist() == [float(size**3)] * 4


def test_a_forked_child_is_refused_every_call_and_harms_nobody(children):
    children(forks)


# -- the end --------------------------------------------------------------------------------


def destroyed(rank, size, meet):
    def held():
        return len(os.listdir("/proc/self/fd")), *leftovers()

    before = held()
    for turn in range(2):
        start(rank, size, f"{meet}.{turn}")
        part = dist.new_group([0, 2])
        for g in (dist.group.WORLD, part):
            if g is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.all_reduce(torch.ones(4), group=g)
                dist.all_reduce(torch.ones(4), group=g, async_op=True).get_future().wait()
        busy = held()
        dist.destroy_process_group()
        del g, part
    return before, busy, held()


def test_destroying_the_groups_releases_what_they_held(children):
    for before, busy, after in children(destroyed):
        assert after == before
        assert all(during != idle for during, idle in zip(busy, before, strict=True))
