"""Ranks that differ, and memory that is not there: an error with names and figures on all."""

import resource

import pytest
import torch
from shm_ranks import failure, join

SIZE = 3


@pytest.fixture
def pool(rank_pools):
    return rank_pools(SIZE)


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
