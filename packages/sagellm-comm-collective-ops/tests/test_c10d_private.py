"""Groups that are split from a private transport, of which a member may stay away."""

import pytest
import torch
import torch.distributed as dist

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
