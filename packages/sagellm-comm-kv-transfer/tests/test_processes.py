"""Channels in processes of their own, which meet through torch's store and may be killed."""

import os
import select
import signal
import time

import pytest
import torch
import torch.distributed as dist

from sagellm.comm.kv_transfer import KVTransferChannel
from sagellm.core.protocols import (
    CacheGroup,
    KVLayout,
    KVTransferError,
    Shard,
    TransferKey,
)
from sagellm.core.protocols.testing.rank_pool import torch_group

BLOCKS, HEADS, LAYERS = 64, 4, 4
KEY = TransferKey("request")


def layout(tp, rank, page=64):
    shape = (2, HEADS // tp, page, 64)
    names = tuple(f"layer{i}" for i in range(LAYERS))
    group = CacheGroup(
        "kv",
        "kv",
        names,
        ("block", "kv", "head", "token", "dim"),
        shape,
        "float32",
        page,
        shard=Shard("head", rank, tp) if tp > 1 else None,
    )
    return KVLayout((group,), "test")


def cache(tp, rank, seed):
    """Whole caches are alike for a seed; a shard is a slice of the whole."""
    generator = torch.Generator().manual_seed(seed)
    heads = slice(rank * HEADS // tp, (rank + 1) * HEADS // tp)
    return {
        f"layer{i}": torch.randn(BLOCKS, 2, HEADS, 64, 64, generator=generator)[
            :, :, heads
        ].contiguous()
        for i in range(LAYERS)
    }


def push_through_store(rank, size, path):
    with torch_group(rank, size, path):
        with KVTransferChannel() as channel:
            assert channel.node_id == rank
            data = cache(1, 0, seed=rank)
            channel.register(layout(1, 0), data)
            ids = list(range(0, BLOCKS, 2))
            into = list(range(BLOCKS - 1, 0, -2))
            if rank == 0:
                channel.transfer(ids, target_node=1, key=KEY).wait(30)
                dist.barrier()
                return True
            channel.receive(KEY, into).wait(30)
            dist.barrier()
            want = cache(1, 0, seed=0)
            return all(torch.equal(data[n][into], want[n][ids]) for n in want)


def test_two_ranks_meet_through_the_default_store(rank_pools):
    pool = rank_pools(4)
    assert pool.submit(push_through_store, pool.store_path(), ranks=2).wait(30) == [True, True]


def without_a_group(rank, size, port):
    """What a program under torchrun sees before it has made a process group."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        with KVTransferChannel() as channel:
            if rank == 0:
                sent = channel.transfer([torch.arange(5)], target_node=1)
                sent.wait(30)
                got = channel.receive(None).wait(30)
                return channel.node_id, got.blocks[0].tensor.tolist()
            got = channel.receive(None).wait(30)
            channel.transfer([got.blocks[0].tensor * 2], target_node=0).wait(30)
            return channel.node_id, got.blocks[0].tensor.tolist()
    finally:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]


def test_torchrun_environment_is_enough(rank_pools):
    from sagellm.core.protocols.ports import SagePorts

    port = SagePorts().reserve("store").release()

    job = rank_pools(4).submit(without_a_group, port, ranks=2)

    assert job.wait(30) == [(0, [0, 2, 4, 6, 8]), (1, list(range(5)))]


def die_in_the_middle(rank, size, path):
    """Ranks 0 and 1 prefill, rank 2 decodes; rank 1 is killed between two layers."""
    with torch_group(rank, size, path, timeout_s=20):
        store = dist.distributed_c10d._get_default_store()
        with KVTransferChannel() as channel:
            if rank == 2:
                channel.register(layout(1, 0), cache(1, 0, seed=9))
                handle = channel.receive(KEY, range(BLOCKS), source_node=[0, 1])
                handle.wait_layer(1, 20)
            else:
                channel.register(layout(2, rank), cache(2, rank, seed=0))
                stream = channel.begin(KEY, 2, range(BLOCKS))
                for i in range(LAYERS - rank * 2):
                    stream.send_layer(i)
                handle = stream.transfer
                if rank == 0:
                    stream.seal(1)
            if rank == 2:
                store.set("landed", "1")
            if rank == 1:
                store.wait(["landed"])
                store.set("died", repr(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                handle.wait(20)
            except KVTransferError as e:
                seconds = time.monotonic() - float(store.get("died"))
                select.select([channel], [], [], 10)  # the handle ends a moment before
                (done,) = channel.poll()
                return e.cause, str(e), seconds, len(done.invalid_blocks), done.blocks_safe
    return None


def test_every_survivor_learns_of_a_killed_prefill_rank(rank_pools):
    pool = rank_pools(4)
    job = pool.submit(die_in_the_middle, pool.store_path(), ranks=3)

    outcomes = job.outcomes(60)

    assert "signal 9" in outcomes[1].error
    for rank, invalid in ((0, 0), (2, BLOCKS)):
        assert not outcomes[rank].error, outcomes[rank].error
        cause, message, seconds, count, safe = outcomes[rank].result
        assert cause == "peer_lost"
        assert "node 1" in message
        assert seconds < 2
        assert (count, safe) == (invalid, True)


def die_receiving(rank, size, path):
    """Rank 1 decodes, and is killed while rank 0 pushes more than sockets hold."""
    with torch_group(rank, size, path, timeout_s=20):
        store = dist.distributed_c10d._get_default_store()
        with KVTransferChannel() as channel:
            channel.register(layout(1, 0), cache(1, 0, seed=0))
            if rank == 1:
                handle = channel.receive(KEY, range(BLOCKS))
                handle.wait_layer(0, 20)
                store.set("died", repr(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)
            stream = channel.begin(KEY, 1, range(BLOCKS))
            stream.send_layer(0)
            try:
                stream.transfer.wait(20)
            except KVTransferError as e:
                return e.cause, time.monotonic() - float(store.get("died"))
    return None


def test_a_sender_learns_of_a_killed_decode_rank(rank_pools):
    pool = rank_pools(4)
    job = pool.submit(die_receiving, pool.store_path(), ranks=2)

    outcomes = job.outcomes(60)

    assert not outcomes[0].error, outcomes[0].error
    cause, seconds = outcomes[0].result
    assert cause == "peer_lost"
    assert seconds < 2


@pytest.mark.parametrize("tp_decode", [1, 2])
@pytest.mark.parametrize("tp_prefill", [1, 2])
def test_prefill_ranks_feed_decode_ranks(rank_pools, tp_prefill, tp_decode):
    pool = rank_pools(4)
    ranks = tp_prefill + tp_decode

    job = pool.submit(disaggregated, pool.store_path(), tp_prefill, tp_decode, ranks=ranks)

    assert job.wait(60) == [True] * ranks


def disaggregated(rank, size, path, tp_prefill, tp_decode):
    with torch_group(rank, size, path, timeout_s=30):
        with KVTransferChannel(codec="lz4") as channel:
            src, dst = [5, 3, 9], [8, 0, 1]
            if rank < tp_prefill:
                channel.register(layout(tp_prefill, rank), cache(tp_prefill, rank, seed=0))
                streams = [channel.begin(KEY, tp_prefill + d, src) for d in range(tp_decode)]
                for i in range(LAYERS):
                    for stream in streams:
                        stream.send_layer(i)
                for stream in streams:
                    stream.seal(100).wait(30)
                dist.barrier()
                return True
            mine = rank - tp_prefill
            data = cache(tp_decode, mine, seed=1)
            channel.register(layout(tp_decode, mine), data)
            channel.receive(KEY, dst, source_node=range(tp_prefill)).wait(30)
            dist.barrier()
            want = cache(tp_decode, mine, seed=0)
            return all(torch.equal(data[n][dst], want[n][src]) for n in want)


def stopped_in_the_middle(rank, size, path, stopped):
    """Rank 0 pushes to rank 1; one of them is stopped by a signal while bytes are under way."""
    with torch_group(rank, size, path, timeout_s=60):
        store = dist.distributed_c10d._get_default_store()
        store.set(f"pid{rank}", str(os.getpid()))
        with KVTransferChannel() as channel:
            channel.register(layout(1, 0), cache(1, 0, seed=rank))
            pid = int(store.get(f"pid{stopped}"))
            deadline_s = 1.5
            began = time.monotonic()
            try:
                if rank == 0:
                    stream = channel.begin(KEY, 1, range(BLOCKS), deadline_s=deadline_s)
                    stream.send_layer(0)
                    store.wait(["first"])
                else:
                    handle = channel.receive(KEY, range(BLOCKS), deadline_s=deadline_s)
                    handle.wait_layer(0, 20)
                    store.set("first", "1")
                if rank != stopped:
                    os.kill(pid, signal.SIGSTOP)
                if rank == 0:
                    for i in range(1, LAYERS):  # more than the kernel's buffers hold
                        stream.send_layer(i)
                    handle = stream.transfer  # never sealed: it cannot land in spite of the signal
                handle.wait(20)
            except KVTransferError as e:
                seconds = time.monotonic() - began
                if rank != stopped:
                    os.kill(pid, signal.SIGCONT)
                select.select([channel], [], [], 10)  # the handle ends a moment before
                (done,) = channel.poll()
                # nothing may come late: what is there now stays
                before = [t.clone() for t in channel._engine.pool.tensors.values()]
                dist.barrier()
                after = channel._engine.pool.tensors.values()
                same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
                return (
                    e.cause,
                    seconds - deadline_s,
                    done.blocks_safe,
                    same,
                    channel._engine.pool.leases,
                )
    return None


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_holds_up_nobody_beyond_the_deadline(rank_pools, stopped):
    pool = rank_pools(4)

    outcomes = pool.submit(stopped_in_the_middle, pool.store_path(), stopped, ranks=2).wait(60)

    for rank, (cause, late_s, safe, same, leases) in enumerate(outcomes):
        assert cause in ("comm_timeout", "peer_lost")
        assert (safe, same, leases) == (True, True, 0)
        if rank != stopped:
            assert cause == "comm_timeout"
            assert late_s < 2
