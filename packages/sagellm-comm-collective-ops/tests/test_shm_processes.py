"""Groups of shm side by side, forks, spawned processes, and more ranks than cores."""

import multiprocessing

import pytest
import torch
from shm_ranks import await_mark, ended, failure, forked, join, leftovers, mark, same

SIZE = 4


@pytest.fixture
def pool(rank_pools):
    return rank_pools(SIZE)


def groups_side_by_side(rank, size, meet):
    first, second = join(rank, size, meet, name="first"), join(rank, size, meet, name="second")
    pair = first.split([rank // 2 * 2, rank // 2 * 2 + 1])
    mirror = second.split(list(reversed(range(size))), name="mirror")
    for step in range(20):
        works = [b.all_reduce(torch.ones(50_000), async_op=True) for b in (first, second)]
        same(pair.all_reduce(torch.full((3,), float(rank))), torch.full((3,), rank // 2 * 4 + 1.0))
        same(
            mirror.broadcast(torch.full((2,), float(rank + step)), 0), torch.full((2,), 3.0 + step)
        )
        for work in works:
            same(work.wait(), torch.full((50_000,), 4.0))
    assert mirror.global_ranks == (3, 2, 1, 0)
    deeper = mirror.split([0, 2])
    if rank in (1, 3):
        assert deeper.global_ranks == (3, 1)
        same(deeper.all_gather(torch.tensor(rank))[1], torch.tensor(1))
        deeper.close()
    alone = pair.split([pair.rank])
    assert alone.global_ranks == (rank,)
    for b in (pair, mirror, first, second):
        b.close()
    return leftovers()


def test_groups_side_by_side_leave_nothing_behind(pool, meet):
    before = pool.run(leftovers_of)
    assert pool.run(groups_side_by_side, meet) == before


def leftovers_of(rank, size):
    return leftovers()


def two_ranks_in_each_process(rank, size, meet):
    """Eight ranks on however few cores there are: each process forks another rank."""

    def be(r):
        with join(r, 2 * size, meet, timeout_s=60.0) as b:
            for n in (1, 1000, 200_000):
                same(b.all_reduce(torch.full((n,), float(r))), torch.full((n,), 28.0))
            same(torch.stack(b.all_gather(torch.tensor(r))), torch.arange(8))
            b.send(torch.tensor([r]), (r + 1) % 8)
            assert b.recv(torch.tensor([0]), (r - 1) % 8).item() == (r - 1) % 8
            b.barrier()

    pid = forked(lambda: be(size + rank))
    be(rank)
    return ended(pid, 60.0)


def test_more_ranks_than_cores(pool, meet):
    assert pool.run(two_ranks_in_each_process, meet) == [0] * SIZE


def forks_of_a_rank(rank, size, meet):
    b = join(rank, size, meet)
    x = b.empty((100,), torch.float32).fill_(1)
    b.all_reduce(torch.ones(1), async_op=True).wait()
    handle = b.register(torch.ones(4))

    def child():
        for call in (
            lambda: b.all_reduce(torch.ones(1)),
            lambda: b.recv(torch.ones(1), (rank + 1) % size),
            lambda: b.empty((1,), torch.float32),
            lambda: b.split([0, 1, 2, 3]),
        ):
            assert "forked child" in failure(call)[2]
        b.abort("nobody hears this")
        b.close()
        fds, maps, _ = leftovers()
        assert not maps
        assert not [f for f in fds if "memfd" in f]
        if rank == 1:
            mark(meet, "child")
            await_mark(meet, "done")

    pid = forked(child)
    if rank != 1:
        assert ended(pid) == 0
    same(b.all_reduce(x), torch.full((100,), 4.0))
    handle.release()
    if rank == 1:  # leaves, while its child lives on
        await_mark(meet, "child")
        b.close()
        del b, x
        found = ("PeerLostError",)
    else:
        found = failure(lambda: (b.barrier(), b.barrier()))[1:2]
        b.close()
    if rank == 0:
        mark(meet, "done")
    if rank == 1:
        assert ended(pid) == 0
    return found[0]


def test_forked_child_may_not_use_the_group_and_does_not_keep_it_alive(pool, meet):
    assert pool.run(forks_of_a_rank, meet) == ["PeerLostError"] * SIZE


def new_group_in_the_child(rank, size, meet):
    with join(rank, size, meet) as b:

        def child():
            with join(rank, size, f"{meet}-child") as own:
                same(own.all_reduce(torch.ones(3)), torch.full((3,), 4.0))
                own.barrier()

        pid = forked(child)
        same(b.all_reduce(torch.ones(3)), torch.full((3,), 4.0))
        return ended(pid)


def test_forked_children_make_groups_of_their_own(pool):
    assert pool.run(new_group_in_the_child, pool.store_path()) == [0] * SIZE


def in_spawned_process(rank, size, meet, queue):
    with join(rank, size, meet) as b:
        queue.put(b.all_reduce(torch.ones(2)).tolist())


def test_spawned_processes_may_be_ranks(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [
        context.Process(target=in_spawned_process, args=(r, 2, str(tmp_path / "meet"), queue))
        for r in range(2)
    ]
    for process in ranks:
        process.start()
    found = [queue.get(timeout=100) for _ in ranks]  # importing torch on a busy machine
    for process in ranks:
        process.join(10)
    assert found == [[2.0, 2.0]] * 2
