"""Works that a rank waits for, in a forked child that inherits them."""

import pytest
import torch
from shm_ranks import await_mark, ended, failure, forked, join, mark

from sagellm.core.protocols.testing import RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as made:
        yield made


def a_child_inherits_works(rank, size, meet):
    with join(rank, size, meet) as b:
        large = torch.full((1_000_000,), float(rank))
        x, y, z = torch.zeros(3), torch.zeros(3), torch.ones(3)
        if rank == 1:
            await_mark(meet, "child is gone")
            sent = [b.send(torch.arange(3.0), 0, async_op=True), b.send(z, 0, 9, async_op=True)]
            sent.append(b.send_kv_blocks([z], 0, async_op=True))
            assert b.recv(torch.zeros_like(large), 0, 5).sum() == 0
            b.all_reduce(torch.ones(3))
            for work in sent:
                work.wait()
            b.barrier()
            return None
        works = {
            "recv": b.recv(x, 1, async_op=True),
            "send": b.send(large, 1, 5, async_op=True),
            "blocks": b.recv_kv_blocks(1, async_op=True),
            "anybody": b.recv_any_source(y, 9),
            "queued": b.all_reduce(z, async_op=True),
        }

        def child():
            for name, work in works.items():
                assert work.done(), name
                assert "forked child" in failure(lambda work=work: work.wait(5))[2], name
                assert "forked child" in str(work.exception()), name
            with pytest.raises(ValueError, match="forked child"):
                works["queued"].get_future().wait()

        assert ended(forked(child)) == 0
        mark(meet, "child is gone")
        for work in works.values():
            work.wait()
        b.barrier()
        return x.tolist(), y.tolist(), z.tolist()


def test_what_the_parent_waits_for_fails_in_its_child(pool):
    done = pool.run(a_child_inherits_works, pool.store_path())[0]
    assert done == ([0.0, 1.0, 2.0], [1.0] * 3, [2.0] * 3)
