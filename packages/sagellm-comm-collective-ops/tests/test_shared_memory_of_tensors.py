"""Calls on tensors that share memory, and on tensors that do not read as they lie."""

import pytest
import torch
from shm_ranks import engines

from sagellm.comm.collective_ops import HierBackend, ShmBackend
from sagellm.core.protocols import P2POp

SIZE = 3
KINDS = ["gloo", "hier", *engines()]
SLOT = 4096


def on_kind(gloo, kind, check, *args):
    """Run a check on a backend of one kind."""
    if kind == "gloo":
        check(gloo, *args)
        return
    shm = {"engine": kind, "slot_bytes": SLOT}
    hier = {"hosts": [[0, 2], [1]]}
    make, options = (HierBackend, hier) if kind == "hier" else (ShmBackend, shm)
    with make(timeout_s=10, options=options) as b:
        check(b, *args)
        b.barrier()


def values(rank, n, dtype=torch.float32):
    return (torch.arange(n) * 7 % 13 + 10 * rank).to(dtype)


def overlap_everything(b):
    for n in (5, 4096, 3000):  # in one step; in several, whole and broken ones
        for place in range(2 * SIZE - 1):
            gather(b, n, place * n // 2)
            scatter_sums(b, n, place * n // 2)
        scatter_sums(b, n, 1)
        exchange(b, n)
        scatter_from(b, n)


def gather(b, n, at):
    wanted = torch.cat([values(r, n) for r in range(SIZE)])
    for way in (b.all_gather_into_tensor, late(b.all_gather_into_tensor)):
        out = torch.zeros(SIZE * n)
        x = out[at : at + n]
        x.copy_(values(b.rank, n))
        assert torch.equal(way(out, x), wanted), (n, at)


def late(call):
    return lambda *args, **more: call(*args, async_op=True, **more).wait()


def scatter_sums(b, n, at):
    wanted = sum(values(r, SIZE * n) for r in range(SIZE))[b.rank * n : (b.rank + 1) * n]
    for way in (b.reduce_scatter_tensor, late(b.reduce_scatter_tensor)):
        x = values(b.rank, SIZE * n)
        out = x[at : at + n]
        assert torch.equal(way(out, x), wanted), (n, at)


def exchange(b, n):
    wanted = torch.cat([values(r, SIZE * n)[b.rank * n : (b.rank + 1) * n] for r in range(SIZE)])
    for shift in (0, 1, n):
        room = torch.zeros(SIZE * n + shift)
        x, out = room[: SIZE * n], room[shift:]
        x.copy_(values(b.rank, SIZE * n))
        assert torch.equal(b.all_to_all_single(out, x), wanted)


def scatter_from(b, n):
    for part in range(SIZE):
        xs = [values(r, n) for r in range(SIZE)]
        out = b.scatter(xs[part], xs if b.rank == 1 else None, 1)
        assert torch.equal(out, values(b.rank, n)), (n, part)


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_that_shares_memory_with_an_input_gets_what_another_would(gloo_pools, kind):
    gloo_pools(SIZE).run(on_kind, kind, overlap_everything)


def overlap_registered(b):
    n = 3000
    for at in (0, n, 2 * n):
        whole = torch.zeros(SIZE * n)
        part = whole[at : at + n]
        kept = [b.register(whole), b.register(part)]
        part.copy_(values(b.rank, n))
        b.all_gather_into_tensor(whole, part)
        assert torch.equal(whole, torch.cat([values(r, n) for r in range(SIZE)]))
        wanted = SIZE * values(b.rank, n)
        assert torch.equal(b.reduce_scatter_tensor(part, whole), wanted)
        for registration in kept:
            registration.release()


@pytest.mark.parametrize("kind", engines())
def test_registered_tensors_may_share_memory(gloo_pools, kind):
    gloo_pools(SIZE).run(on_kind, kind, overlap_registered)


# -- tensors that do not read as they lie ---------------------------------------------------

VIEWS = {
    "negated": lambda n: torch.zeros(n)._neg_view(),
    "conjugated": lambda n: torch.zeros(n, dtype=torch.complex64).conj(),
}


def write_everything(b, view):
    make = VIEWS[view]
    n, after, before = 4, (b.rank + 1) % SIZE, (b.rank - 1) % SIZE
    dtype = make(1).dtype
    unit = 1 + 2j if dtype.is_complex else 1
    every = [values(r, SIZE * n, dtype) * unit for r in range(SIZE)]
    cut = slice(b.rank * n, (b.rank + 1) * n)
    mine = make(SIZE * n).copy_(every[b.rank])  # is read as it reads, too
    assert torch.equal(b.all_gather_into_tensor(make(SIZE * SIZE * n), mine), torch.cat(every))
    pieces = torch.cat([x[cut] for x in every])
    assert torch.equal(b.all_to_all_single(make(SIZE * n), mine), pieces)
    assert torch.equal(b.broadcast(make(n).copy_(every[b.rank][:n]), 2), every[2][:n])
    parts = list(mine.split(n)) if b.rank == 1 else None
    assert torch.equal(b.scatter(make(n), parts, 1), every[1][cut])
    for way in (b.recv, late(b.recv)):
        sent = b.send(mine, after, async_op=True)
        assert torch.equal(way(make(SIZE * n), before), every[before])
        sent.wait()
    got = make(SIZE * n)
    for work in b.batch_p2p([P2POp("send", mine, after), P2POp("recv", got, before)]):
        work.wait()
    assert torch.equal(got, every[before])
    work = b.send_kv_blocks([mine], after, async_op=True)
    assert torch.equal(b.recv_kv_blocks(before)[0].tensor, every[before])
    work.wait()
    if not dtype.is_complex:
        assert torch.equal(b.reduce_scatter_tensor(make(n), mine), sum(every)[cut])
        assert torch.equal(b.all_reduce(mine), sum(every))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", KINDS)
def test_views_that_negate_or_conjugate_are_written_as_they_read(gloo_pools, kind, view):
    gloo_pools(SIZE).run(on_kind, kind, write_everything, view)
