"""The short way of shm, registered and symmetric tensors, and calls behind a queue."""

import gc
import threading

import pytest
import torch
from shm_ranks import join, on_group, same

from sagellm.core.protocols import CommError, CommTimeoutError, ConfigError, ResourceError

SIZE = 4


@pytest.fixture
def pool(rank_pools):
    return rank_pools(SIZE)


def symmetric_tensors(b):
    plain = [torch.full((300_000,), b.rank + 1.5), torch.full((77,), b.rank + 1.5)]
    for x in plain:
        s = b.empty(x.shape, x.dtype)
        s.copy_(x)
        same(b.all_reduce(s), b.all_reduce(x.clone()))
        view = s[16:]
        view.copy_(x[16:])
        same(b.all_reduce(view), b.all_reduce(x[16:].clone()))
        if b.rank:  # not symmetric on every rank: staged on all
            s = x.clone()
        else:
            s.copy_(x)
        same(b.all_reduce(s), b.all_reduce(x.clone()))
    del s, view
    gc.collect()
    used = b._shm.arena.used_bytes
    with pytest.raises(ResourceError, match="larger arena_bytes"):
        b.empty((1 << 40,), torch.uint8)
    return used


def test_symmetric_tensors_give_the_same_bits_and_go_with_their_last_view(pool, meet):
    assert pool.run(on_group, meet, symmetric_tensors) == [0] * SIZE


def both_ways_agree(b):
    remove = None
    results = []
    for _ in range(2):
        found = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool):
            x = ((torch.arange(1000) * (b.rank + 3)) % 7).to(dtype)
            ops = ["sum", "max"] + ["avg"] * dtype.is_floating_point
            found += [b.all_reduce(x.clone(), op) for op in ops]
            found.append(b.all_gather_into_tensor(torch.empty(4000, dtype=dtype), x))
            found.append(b.reduce_scatter_tensor(torch.empty(250, dtype=dtype), x))
            found.append(b.broadcast(x.clone(), 2))
        results.append(found)
        remove = b.add_hook(before=lambda call: None)  # the general way from here on
    remove()
    for short, general in zip(*results, strict=True):
        same(short, general)
    calls = b.get_stats().ops
    assert calls["all_reduce"].calls == 2 * 13
    assert calls["all_gather_into_tensor"].calls == 10
    assert calls["all_gather_into_tensor"].bytes == 2 * 1000 * (4 + 2 + 2 + 4 + 1)
    assert b.get_bandwidth_stats().busbw_bytes_per_s["reduce_scatter_tensor"] > 0
    b.reset_stats()
    b.barrier()
    assert {op: s.calls for op, s in b.get_stats().ops.items() if s.calls} == {"barrier": 1}


def registered_tensors(b):
    x, out, part = torch.full((512,), 1.0), torch.empty(512 * b.size), torch.empty(512)
    handles = [b.register(t) for t in (x, out, part, x)]
    for step in range(3):
        same(b.all_reduce(x.fill_(b.rank + step)), torch.full((512,), 6.0 + 4 * step))
        x.fill_(b.rank)
        b.all_gather_into_tensor(out, x)
        same(out, torch.arange(4.0).repeat_interleave(512))
        same(b.reduce_scatter_tensor(part, out), torch.full((512,), 4.0 * b.rank))
        work = b.all_reduce(x.fill_(1), async_op=True)
        b.all_reduce(out.fill_(1))  # behind the queue
        same(work.wait(), torch.full((512,), 4.0))
        same(out[:4], torch.full((4,), 4.0))
    assert b.get_stats().ops["all_reduce"].calls == 9
    for handle in (*handles, handles[0]):
        handle.release()
    assert not b._hot._kept
    assert not b._hot._prepared
    with pytest.raises(ConfigError, match="contiguous"):
        b.register(torch.ones(4, 4).t())


def moved_storage_is_refused_and_harms_nobody(b):
    x = torch.ones(512)
    handle = b.register(x)
    if b.engine == "native":  # the Python engine keeps the memory that it was given
        x.data = torch.ones(512)
        with pytest.raises(ConfigError, match="has changed"):
            b.all_reduce(x)
    handle.release()
    same(b.all_reduce(x), torch.full((512,), 4.0))


def odd_tensors_take_the_general_way(b):
    x = torch.tensor([1 + 2j]).conj().imag  # its minus sign is a flag, not bits
    same(b.all_reduce(x.clone()), torch.tensor([-8.0]))
    flagged = torch.tensor([complex(1, b.rank + 1)]).conj()
    out = torch.empty(b.size, dtype=flagged.dtype)
    b.all_gather_into_tensor(out, flagged)
    same(out, torch.tensor([complex(1, -r - 1) for r in range(b.size)]))
    same(b.all_reduce(flagged.imag, "max"), torch.tensor([-1.0]))
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        same(b.all_reduce(parameter).data, torch.full((3,), 4.0))
    grad = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        b.all_reduce(grad)
    same(grad.detach(), torch.full((3,), 4.0))
    with b.coalesce():
        b.all_reduce(y := torch.ones(2))
        b.all_reduce(z := torch.ones(2, 3).t())
    same(y, torch.full((2,), 4.0))
    same(z, torch.full((3, 2), 4.0))


@pytest.mark.parametrize(
    "case",
    [
        both_ways_agree,
        registered_tensors,
        moved_storage_is_refused_and_harms_nobody,
        odd_tensors_take_the_general_way,
    ],
    ids=lambda f: f.__name__,
)
def test_the_short_way(pool, meet, case):
    pool.run(on_group, meet, case)


def late_peers(rank, size, meet, kind):
    with join(rank, size, meet) as b:
        x = torch.ones(4)
        handle = b.register(x)
        b.all_reduce(x)
        b.timeout_s = 0.5
        calls = {
            "barrier": b.barrier,
            "plain": lambda: b.all_reduce(torch.ones(4)),
            "registered": lambda: b.all_reduce(x),
        }
        never_sent = torch.empty(1)
        call = calls[kind] if rank == 0 else lambda: b.recv(never_sent, 0)
        with pytest.raises(CommError) as failed:
            call()
        handle.release()
        return type(failed.value) is CommTimeoutError


@pytest.mark.parametrize("kind", ["barrier", "plain", "registered"])
def test_a_new_deadline_counts_for_every_way(pool, meet, kind):
    assert pool.run(late_peers, meet, kind, timeout_s=15)[0]


def async_calls_run_in_order(b):
    others = threading.enumerate()
    xs = [torch.full((1000 * (i + 1),), float(b.rank)) for i in range(10)]
    works = [b.all_reduce(x, async_op=True) for x in xs]
    b.barrier()
    assert all(w.done() for w in works)
    for x in xs:
        same(x, torch.full_like(x, 6.0))
    started = [t.name for t in threading.enumerate() if t not in others]
    assert [name.startswith("sagellm-comm-shm") for name in started] == [True]


def test_async_calls_keep_their_order_and_sync_ones_go_behind_them(pool, meet):
    pool.run(on_group, meet, async_calls_run_in_order)
