"""Two processes of one host, one of which is stopped or killed while blocks are copied."""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from sagellm.comm.kv_transfer import KVTransferChannel, KVTransferSettings
from sagellm.core.protocols import CacheGroup, KVLayout, KVTransferError, TransferKey
from sagellm.core.protocols.testing.rank_pool import torch_group

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")

BLOCKS = 24
KEY = TransferKey("request")


def allocate(channel, value):
    names = ("layer0", "layer1")
    group = CacheGroup("kv", "kv", names, ("block", "token", "dim"), (64, 256), "float32", 64)
    pool = channel.allocate(KVLayout((group,), "test"), BLOCKS)
    for tensor in pool.tensors.values():
        tensor.fill_(value)
    return dict(pool.tensors)


def caught_in_the_middle(rank, size, path, whom, how, checksum):
    """Rank 1 copies from rank 0, and sends a signal after the first stretch."""
    from sagellm.comm.kv_transfer.transports import _shm_link

    settings = KVTransferSettings(checksum=checksum, transport="shm")
    real = _shm_link.mover
    with torch_group(rank, size, path, timeout_s=20):
        store = dist.distributed_c10d._get_default_store()
        store.set(f"pid{rank}", str(os.getpid()))
        pids = [int(store.get(f"pid{r}")) for r in range(size)]
        try:
            with KVTransferChannel(settings=settings) as channel:
                tensors = allocate(channel, 1.0 + rank)

                def mover(sources, addresses):
                    move = real(sources, addresses)

                    def strike(low, high):
                        if _shm_link.mover is real:
                            return move(low, high)
                        move(low, low + 1)
                        _shm_link.mover = real
                        store.set("struck", repr(time.monotonic()))
                        os.kill(pids[whom], how)
                        time.sleep(0.3)  # a thread may run on until its process has stopped
                        return move(low + 1, high)

                    return strike

                dist.barrier()
                if rank == 0:
                    return send(channel, tensors, pids, whom, how)
                _shm_link.mover = mover
                return receive(channel, tensors, pids, whom, how)
        finally:
            _shm_link.mover = real


def send(channel, tensors, pids, whom, how):
    handle = channel.transfer(range(0, BLOCKS, 2), 1, key=KEY, deadline_s=2.0)
    try:
        handle.wait(20)
        cause = "landed"
    except KVTransferError as e:
        cause = e.cause
    for tensor in tensors.values():
        tensor.fill_(99.0)  # the blocks are ours again
    if (whom, how) == (1, signal.SIGSTOP):
        os.kill(pids[1], signal.SIGCONT)
    return cause


def receive(channel, tensors, pids, whom, how):
    into = range(1, BLOCKS, 2)
    handle = channel.receive(KEY, into, source_node=0, deadline_s=8.0)
    try:
        handle.wait(20)
        cause = "landed"
    except KVTransferError as e:
        cause = e.cause
    if (whom, how) == (0, signal.SIGSTOP):
        os.kill(pids[0], signal.SIGCONT)
    there = [t.clone() for t in tensors.values()]
    right = all(bool((t[list(into)] == 1.0).all()) for t in there)
    others = all(bool((t[0::2] == 2.0).all()) for t in there)
    channel.drain(5)
    same = all(torch.equal(a, b) for a, b in zip(there, tensors.values(), strict=True))
    return cause, right, others, same, channel._engine.pool.leases


@pytest.mark.parametrize("checksum", [True, False])
def test_a_receiver_that_was_stopped_never_lands_what_was_given_back(rank_pools, checksum):
    pool = rank_pools(4)
    job = pool.submit(caught_in_the_middle, pool.store_path(), 1, signal.SIGSTOP, checksum, ranks=2)

    sent, (cause, right, others, same, leases) = job.wait(40)

    assert sent == "comm_timeout"
    assert cause in ("comm_timeout", "peer_lost")
    assert (right, others, same, leases) == (False, True, True, 0)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_what_lands_from_a_sender_in_trouble_is_right(rank_pools, how):
    pool = rank_pools(4)
    job = pool.submit(caught_in_the_middle, pool.store_path(), 0, how, False, ranks=2)

    outcomes = job.outcomes(40)

    assert not outcomes[1].error, outcomes[1].error
    cause, right, others, same, leases = outcomes[1].result
    assert cause in ("landed", "peer_lost", "comm_timeout")
    assert right or cause != "landed"
    assert (others, same, leases) == (True, True, 0)


def test_a_sender_learns_of_a_receiver_killed_in_the_middle_of_a_copy(rank_pools):
    pool = rank_pools(4)
    job = pool.submit(caught_in_the_middle, pool.store_path(), 1, signal.SIGKILL, True, ranks=2)

    outcomes = job.outcomes(40)

    assert not outcomes[0].error, outcomes[0].error
    assert outcomes[0].result == "peer_lost"
