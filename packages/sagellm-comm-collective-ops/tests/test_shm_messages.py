"""Messages over shared memory: rings, tags, order, and what a receiver has to hold."""

import pytest
import torch
from shm_ranks import on_group, same

from sagellm.core.protocols import P2POp

SIZE = 4


@pytest.fixture
def pool(rank_pools):
    return rank_pools(SIZE)


def every_order_of_tags(b):
    generator = torch.Generator().manual_seed(7)
    sizes = [1, 3000, 70_000, 300_000, 2_000_000, 5]
    if b.rank == 0:
        works = [
            b.send(torch.full((n,), float(tag)), 1, tag, async_op=True)
            for tag, n in enumerate(sizes)
        ]
        for work in works:
            work.wait()
    elif b.rank == 1:
        for tag in torch.randperm(len(sizes), generator=generator).tolist():
            same(b.recv(torch.empty(sizes[tag]), 0, tag), torch.full((sizes[tag],), float(tag)))


def messages_of_one_tag_keep_their_order(b):
    count = 300
    if b.rank == 0:
        works = [
            b.send(torch.full((i % 40 + 1,), float(i)), 2, 5, async_op=True) for i in range(count)
        ]
        assert all(w.wait() is not None for w in works)
    elif b.rank == 2:
        for i in range(count):
            same(b.recv(torch.empty(i % 40 + 1), 0, 5), torch.full((i % 40 + 1,), float(i)))


def everyone_sends_to_everyone_at_once(b):
    others = [r for r in range(b.size) if r != b.rank]
    out = {r: torch.empty(400_000) for r in others}
    ops = [P2POp("send", torch.full((400_000,), float(b.rank)), r) for r in others]
    ops += [P2POp("recv", out[r], r) for r in others]
    for work in b.batch_p2p(ops):
        work.wait()
    for r in others:
        same(out[r], torch.full((400_000,), float(r)))


def a_message_overtakes_collectives(b):
    x = torch.ones(1_500_000)
    work = None
    if b.rank == 0:
        work = b.send(x, 3, async_op=True)
    elif b.rank == 3:
        work = b.recv(x.mul_(0), 0, async_op=True)
    for _ in range(3):
        b.all_reduce(torch.ones(10))
    if work is not None:
        same(work.wait(), torch.ones(1_500_000))


def unexpected_messages_are_bounded(b):
    if b.rank == 0:
        works = [b.send(torch.full((4096,), float(i)), 1, i, async_op=True) for i in range(300)]
        b.barrier()
        for work in works:
            work.wait()
        return None
    b.barrier()
    if b.rank != 1:
        return None
    same(b.recv(torch.empty(4096), 0, 299), torch.full((4096,), 299.0))
    held = sum(
        a.payload.nbytes
        for kept in b._shm._messages._peers[0].arrived.values()
        for a in kept
        if a.payload is not None
    )
    for i in reversed(range(299)):
        same(b.recv(torch.empty(4096), 0, i), torch.full((4096,), float(i)))
    return held


def inference_tensors_travel(b):
    with torch.inference_mode():
        x, big = torch.full((3,), float(b.rank)), torch.full((500_000,), float(b.rank))
        if b.rank < 2:
            works = [b.send(x, 1 - b.rank, async_op=True), b.send(big, 1 - b.rank, async_op=True)]
            got = torch.empty(500_000)
            same(b.recv(torch.empty(3), 1 - b.rank), torch.full((3,), 1.0 - b.rank))
            b.recv(got, 1 - b.rank)
            same(got, torch.full((500_000,), 1.0 - b.rank))
            for work in works:
                work.wait()
        work = b.all_reduce(big, async_op=True)
    same(work.wait(), torch.full((500_000,), 6.0))


MESSAGES = [
    every_order_of_tags,
    messages_of_one_tag_keep_their_order,
    everyone_sends_to_everyone_at_once,
    a_message_overtakes_collectives,
    inference_tensors_travel,
]


@pytest.mark.parametrize("case", MESSAGES, ids=lambda f: f.__name__)
def test_messages(pool, meet, case):
    pool.run(on_group, meet, case)


def test_unexpected_messages_hold_little_memory_at_the_receiver(pool, meet):
    held = pool.run(on_group, meet, unexpected_messages_are_bounded)[1]

    assert 0 < held <= 1 << 20
