"""Every operation of shm in worlds of five to eight ranks, and groups crossed by two threads."""

import threading

import pytest
import torch
from shm_harness import in_order, values
from shm_ranks import ended, forked, join, same

SIZE = 4
REDUCED = ((torch.float32, "sum"), (torch.bfloat16, "avg"), (torch.int64, "product"))


@pytest.fixture
def pool(rank_pools):
    return rank_pools(SIZE)


def every_operation(b, n):
    """`n` elements of each rank for each, in every type that is reduced in another way."""
    rank, size, root = b.rank, b.size, n % b.size
    for dtype, op in REDUCED:
        wide = [values(r, n * size, dtype, n) for r in range(size)]
        xs = [w[:n] for w in wide]
        total = in_order(wide, op)
        same(b.all_reduce(xs[rank].clone(), op), total[:n])
        reduced = b.reduce(xs[rank].clone(), root, op)
        if rank == root:
            same(reduced, total[:n])
        part = b.reduce_scatter_tensor(torch.empty(n, dtype=dtype), wide[rank], op)
        same(part, total[rank * n : rank * n + n])
    same(b.all_gather_into_tensor(xs[0].new_empty(n * size), xs[rank]), torch.cat(xs))
    same(b.broadcast(xs[rank].clone(), root), xs[root])
    gathered = b.gather(xs[rank], root)
    if rank == root:
        same(torch.cat(list(gathered)), torch.cat(xs))
    same(b.scatter(xs[0].new_empty(n), xs if rank == root else None, root), xs[rank])
    mine = torch.cat([w.chunk(size)[rank] for w in wide])
    same(b.all_to_all_single(torch.empty_like(mine), wide[rank]), mine)
    gives = [[(n + a + 2 * c) % (n + 2) for c in range(size)] for a in range(size)]
    sent = [values(r, sum(gives[r]), torch.int64, n) for r in range(size)]
    takes = [gives[r][rank] for r in range(size)]
    mine = torch.cat([s.split(g)[rank] for s, g in zip(sent, gives, strict=True)])
    same(b.all_to_all_single(torch.empty_like(mine), sent[rank], takes, gives[rank]), mine)
    work = b.send(xs[rank], (rank + 1) % size, async_op=True)
    same(b.recv(torch.empty_like(xs[0]), (rank - 1) % size), xs[(rank - 1) % size])
    work.wait()


def one_of_many(rank, size, meet, world):
    """The processes of four ranks fork those of the others, on however few cores there are."""

    def be(r):
        with join(r, world, meet, timeout_s=60.0, slot_bytes=4096) as b:
            for n in (3, 701, 5003):
                every_operation(b, n)
            sub = b.split([r for r in range(world) if r % 2])
            if sub is not None:
                same(sub.all_reduce(torch.ones(3)), torch.full((3,), float(world // 2)))
                sub.close()
            b.barrier()

    pid = forked(lambda: be(size + rank)) if size + rank < world else None
    be(rank)
    return 0 if pid is None else ended(pid, 60.0)


@pytest.mark.parametrize("world", [5, 6, 7, 8])
def test_every_operation_in_large_and_odd_worlds(pool, meet, world):
    assert pool.run(one_of_many, meet, world, timeout_s=90) == [0] * SIZE


def crossed(rank, size, meet):
    one, two = join(rank, size, meet, name="one"), join(rank, size, meet, name="two")
    here, there = (one, two) if rank % 2 else (two, one)
    wrong = []

    def reduce(b, step):
        for _ in range(30):
            x = b.all_reduce(torch.full((step,), float(rank)))
            if x.ne(6.0).any():
                wrong.append(x)

    for step in (10, 90_000):
        thread = threading.Thread(target=reduce, args=(there, step))
        thread.start()
        reduce(here, step)
        thread.join(30)
        assert not thread.is_alive()
    for _ in range(20):  # and from one thread, each rank in its own order
        works = [b.all_reduce(torch.full((90_000,), 1.0), async_op=True) for b in (here, there)]
        for work in works:
            same(work.wait(), torch.full((90_000,), 4.0))
    one.close()
    two.close()
    return len(wrong)


def test_two_groups_used_at_once_in_crossing_orders(pool, meet):
    assert pool.run(crossed, meet) == [0] * SIZE
