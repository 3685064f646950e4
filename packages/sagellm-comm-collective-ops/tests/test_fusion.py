"""Buckets: when they are sent, and that members behave as works."""

import asyncio

import pytest
import torch

from sagellm.comm.collective_ops import FusedAllReduce, MockWorld, create_comm_backend
from sagellm.core.protocols import CommTimeoutError, ConfigError


def on_two(fn):
    return MockWorld(2, timeout_s=5).run(fn)


def test_bucket_is_sent_by_bytes_count_dtype_and_demand():
    def body(b):
        fused = FusedAllReduce(b, bucket_bytes=64, max_tensors=3)
        sent = []
        for x in (torch.ones(16), *[torch.ones(1)] * 3, torch.ones(1), torch.ones(1).int()):
            fused.add(x)
            sent.append(fused.buckets_sent)
        work = fused.add(torch.ones(1).int())
        assert not work.done()
        assert work.wait().item() == 2
        sent.append(fused.buckets_sent)
        fused.flush()
        fused.flush()
        return sent

    assert on_two(body) == [[1, 1, 1, 2, 2, 3, 4]] * 2


def test_reductions_do_not_share_a_bucket():
    def body(b):
        x, y = torch.full((2,), b.rank + 1.0), torch.full((2,), b.rank + 1.0)
        with FusedAllReduce(b) as fused:
            fused.add(x, "sum")
            fused.add(y, "max")
        return x.tolist(), y.tolist()

    assert on_two(body) == [([3.0, 3.0], [2.0, 2.0])] * 2


def test_member_is_a_work():
    def body(b):
        fused = FusedAllReduce(b)
        x, y = torch.ones(2), torch.ones(3)
        first, second = fused.add(x), fused.add(y)
        assert first.exception() is None

        async def go():
            return await first

        assert asyncio.run(go()) is x
        assert second.synchronize() is y
        assert second.result() is y
        assert second.get_future().wait() is y
        assert first.done()
        return fused.buckets_sent

    assert on_two(body) == [1, 1]


def test_failure_of_a_bucket_reaches_its_members():
    world = MockWorld(2, timeout_s=0.2)
    fused = FusedAllReduce(world.backend(0))
    work = fused.add(torch.ones(2))
    with pytest.raises(CommTimeoutError, match="no sign of rank 1"):
        fused.flush()
    assert isinstance(work.exception(), CommTimeoutError)


def test_block_that_fails_sends_nothing():
    backend = create_comm_backend("mock")
    fused = FusedAllReduce(backend)

    def block():
        with fused:
            fused.add(torch.ones(2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert fused.buckets_sent == 0


def test_bounds_are_checked():
    with pytest.raises(ConfigError, match="must be at least 1"):
        FusedAllReduce(create_comm_backend("mock"), bucket_bytes=0)
