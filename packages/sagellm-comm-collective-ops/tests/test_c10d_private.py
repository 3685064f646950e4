"""Groups that are split from a private transport, of which a member may stay away."""

import time

import pytest
import torch
import torch.distributed as dist

from sagellm.comm.collective_ops._c10d import libraries
from sagellm.comm.collective_ops._c10d.libraries import GroupPlan
from sagellm.comm.collective_ops._c10d.private import PrivateTransport
from sagellm.core.protocols import CommTimeoutError
from sagellm.core.protocols.process_group import RawCall

SIZE = 2


def one_stays_away(rank, size, meet, absent):
    store = dist.FileStore(meet, size)
    whole = PrivateTransport(GroupPlan(store, rank, size, tuple(range(size)), 20.0, "whole"))
    ranks = list(range(size))
    for turn in range(3):
        if turn == 1:
            if rank != absent:
                with pytest.raises(CommTimeoutError, match="not formed"):
                    whole.split(ranks, "part", 0.3)
                store.set("told", "")
            store.wait(["told"])
        part = whole.split(ranks, "part", 20.0)
        x = torch.full((3,), float(rank + turn))
        part.issue(RawCall("all_reduce", [], [x])).wait(20)
        assert x.tolist() == [1.0 + 2 * turn] * 3
        part.close()
    whole.close()


@pytest.mark.parametrize("absent", range(SIZE))
def test_a_split_that_failed_keeps_no_later_one_from_working(rank_pools, absent):
    pool = rank_pools(SIZE)
    pool.run(one_stays_away, pool.store_path(), absent)


def one_comes_late(rank, size, meet, late):
    """Whether the late rank had its end when this one got its own."""
    store = dist.FileStore(meet, size)
    plan = GroupPlan(store, rank, size, tuple(range(size)), 20.0, "late")
    make = libraries.c10d.ProcessGroupGloo

    def slow(*args):
        made = make(*args)  # by now the other rank's call has all it needs from this one
        time.sleep(0.3)
        store.set("here", "")
        return made

    with pytest.MonkeyPatch.context() as patch:
        if rank == late:
            patch.setattr(libraries.c10d, "ProcessGroupGloo", slow)
        group = libraries.library_group("gloo", "cpu", plan)
    libraries.forget_group(group)
    return store.check(["here"])


@pytest.mark.parametrize("late", range(SIZE))
def test_no_rank_has_a_group_before_every_rank_has_it(rank_pools, late):
    pool = rank_pools(SIZE)

    assert pool.run(one_comes_late, pool.store_path(), late) == [True] * SIZE
