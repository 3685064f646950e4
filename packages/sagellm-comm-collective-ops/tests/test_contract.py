"""What every backend promises, over threads (mock) and over processes (gloo, shm)."""

import asyncio
import inspect

import pytest
import torch

from sagellm.comm.collective_ops import MockWorld, fused_all_reduce
from sagellm.comm.collective_ops._shm.engines import available_engines
from sagellm.core.protocols import (
    ConfigError,
    KVBlock,
    P2POp,
    ReduceOp,
    UnsupportedOperationError,
)


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def mine(b, n=4, dtype=torch.float32):
    """A tensor that differs on every rank and in every element."""
    return (torch.arange(n) + 1 + 10 * b.rank).to(dtype)


def everyones(b, n=4, dtype=torch.float32):
    return [(torch.arange(n) + 1 + 10 * r).to(dtype) for r in range(b.size)]


# -- reductions ---------------------------------------------------------------------------


def case_all_reduce_returns_x_itself(b):
    x = mine(b)
    assert b.all_reduce(x) is x
    same(x, sum(everyones(b)))


def case_all_reduce_every_reduction(b):
    xs = torch.stack(everyones(b, dtype=torch.int64))
    wanted = {
        "sum": xs.sum(0),
        "min": xs.amin(0),
        "max": xs.amax(0),
        "product": xs.prod(0),
    }
    for op, value in wanted.items():
        same(b.all_reduce(mine(b, dtype=torch.int64), op), value)
    bits = list(xs)
    for op, fold in (
        ("band", torch.bitwise_and),
        ("bor", torch.bitwise_or),
        ("bxor", torch.bitwise_xor),
    ):
        value = bits[0]
        for other in bits[1:]:
            value = fold(value, other)
        same(b.all_reduce(mine(b, dtype=torch.int64), ReduceOp(op)), value)
    same(b.all_reduce(mine(b), "avg"), sum(everyones(b)) / b.size)


def case_all_reduce_takes_torch_reduce_op(b):
    import torch.distributed as dist

    same(b.all_reduce(mine(b), dist.ReduceOp.MAX), everyones(b)[-1])


def case_all_reduce_every_dtype(b):
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    integers = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
    for dtype in floats + integers:
        same(b.all_reduce(mine(b, dtype=dtype)), sum(everyones(b)).to(dtype))


def case_bool_and_uint8_reduce_without_overflow_of_meaning(b):
    x = torch.tensor([True, b.rank == 0, False])
    same(b.all_reduce(x), torch.tensor([True, True, False]))
    x = torch.tensor([True, b.rank == 0, False])
    same(b.all_reduce(x, "min"), torch.tensor([True, False, False]))
    x = torch.full((2,), 200, dtype=torch.uint8)
    same(b.all_reduce(x), torch.full((2,), (200 * b.size) % 256, dtype=torch.uint8))


def case_avg_of_integers_is_refused(b):
    with pytest.raises(ConfigError, match="avg needs a floating dtype, got int64"):
        b.all_reduce(mine(b, dtype=torch.int64), "avg")
    with pytest.raises(ConfigError, match="band needs an integer"):
        b.all_reduce(mine(b), "band")


def case_complex_is_refused_by_name(b):
    with pytest.raises(UnsupportedOperationError, match="complex64"):
        b.all_reduce(torch.zeros(2, dtype=torch.complex64))


def case_reduce_leaves_the_sum_on_dst(b):
    x = mine(b)
    assert b.reduce(x, b.size - 1) is x
    if b.rank == b.size - 1:
        same(x, sum(everyones(b)))


def case_reduce_scatter_both_forms(b):
    xs = [mine(b) * (i + 1) for i in range(b.size)]
    wanted = sum(everyones(b)) * (b.rank + 1)
    same(b.reduce_scatter(xs), wanted)
    same(xs[0], mine(b))
    out = torch.empty(4)
    assert b.reduce_scatter_tensor(out, torch.cat(xs)) is out
    same(out, wanted)
    got = b.reduce_scatter([x.bfloat16() for x in xs], "max")
    same(got.float(), everyones(b)[-1] * (b.rank + 1))


# -- moving -------------------------------------------------------------------------------


def case_all_gather_both_forms(b):
    for got, wanted in zip(b.all_gather(mine(b)), everyones(b), strict=True):
        same(got, wanted)
    out = torch.empty(4 * b.size)
    assert b.all_gather_into_tensor(out, mine(b)) is out
    same(out, torch.cat(everyones(b)))


def case_all_gather_keeps_shape_and_dtype(b):
    x = torch.full((2, 3), bool(b.rank))
    got = b.all_gather(x)
    assert [g.shape for g in got] == [x.shape] * b.size
    same(got[1], torch.ones(2, 3, dtype=torch.bool))


def case_all_to_all_single_even(b):
    out = torch.empty(2 * b.size)
    x = torch.arange(2.0 * b.size) + 100 * b.rank
    assert b.all_to_all_single(out, x) is out
    wanted = [torch.arange(2.0) + 2 * b.rank + 100 * r for r in range(b.size)]
    same(out, torch.cat(wanted))


def case_all_to_all_single_uneven(b):
    in_splits = [b.rank + i for i in range(b.size)]
    out_splits = [r + b.rank for r in range(b.size)]
    x = torch.full((sum(in_splits), 2), float(b.rank))
    out = torch.empty(sum(out_splits), 2)
    b.all_to_all_single(out, x, out_splits, in_splits)
    same(out[:, 0], torch.cat([torch.full((n,), float(r)) for r, n in enumerate(out_splits)]))


def case_all_to_all_of_uneven_shapes(b):
    xs = [torch.full((i + 1, b.rank), float(b.rank)) for i in range(b.size)]
    got = b.all_to_all(xs)
    assert [tuple(g.shape) for g in got] == [(b.rank + 1, r) for r in range(b.size)]
    for r, part in enumerate(got):
        same(part, torch.full((b.rank + 1, r), float(r)))


def case_broadcast_from_every_root(b):
    for root in range(b.size):
        x = mine(b)
        assert b.broadcast(x, root) is x
        same(x, everyones(b)[root])


def case_gather_and_scatter(b):
    root = b.size - 1
    got = b.gather(mine(b), root)
    if b.rank == root:
        same(torch.stack(got), torch.stack(everyones(b)))
        assert b.scatter(torch.empty(4), got, root).tolist() == mine(b).tolist()
    else:
        assert got is None
        same(b.scatter(torch.empty(4), None, root), mine(b))


# -- point to point -----------------------------------------------------------------------


def case_send_and_recv_with_tags(b):
    if b.rank == 0:
        first, second = torch.ones(3), torch.full((3,), 2.0)
        works = [b.send(first, 1, 7, async_op=True), b.send(second, 1, 8, async_op=True)]
        assert works[0].wait() is first
        works[1].wait()
    elif b.rank == 1:
        second = b.recv(torch.empty(3), 0, 8)
        first = b.recv(torch.empty(3), 0, 7)
        same(torch.stack([first, second])[:, 0], torch.tensor([1.0, 2.0]))


def case_batch_p2p_ring_cannot_deadlock(b):
    right, left = (b.rank + 1) % b.size, (b.rank - 1) % b.size
    x, y = torch.full((1000,), float(b.rank)), torch.empty(1000)
    works = b.batch_p2p([P2POp("send", x, right), P2POp("recv", y, left)])
    assert [w.wait() is t for w, t in zip(works, (x, y), strict=True)] == [True, True]
    same(y, torch.full((1000,), float(left)))


def case_kv_blocks_describe_themselves(b):
    blocks = [
        KVBlock(torch.arange(6.0).view(2, 3), layer=4, index=9),
        KVBlock(torch.tensor([True, False]), layer=5),
        KVBlock(torch.arange(3, dtype=torch.int64)),
        KVBlock(torch.empty(0, 7, dtype=torch.bfloat16), index=1),
    ]
    if b.rank == 0:
        b.send_kv_blocks(blocks, 1)
        b.send_kv_blocks([], 1)
    elif b.rank == 1:
        late = b.recv_kv_blocks(0, async_op=True)
        assert list(b.recv_kv_blocks(0)) == []
        got = late.wait()
        assert [(g.layer, g.index) for g in got] == [(4, 9), (5, -1), (-1, -1), (-1, 1)]
        for g, w in zip(got, blocks, strict=True):
            same(g.tensor, w.tensor)


def case_large_kv_blocks_travel_one_by_one(b):
    block = torch.arange(400_000.0).view(4, -1)
    if b.rank == 1:
        work = b.send_kv_blocks([block, block.t()], 0, async_op=True)
        assert len(work.wait()) == 2
    elif b.rank == 0:
        got = b.recv_kv_blocks(1)
        same(got[0].tensor, block)
        same(got[1].tensor, block.t())
        assert b.get_stats().ops["recv_kv_blocks"].bytes >= 2 * block.nbytes


# -- forms --------------------------------------------------------------------------------


def case_async_gives_the_same_results(b):
    x = mine(b)
    works = {
        "all_reduce": b.all_reduce(x, async_op=True),
        "all_gather": b.all_gather(mine(b), async_op=True),
        "reduce_scatter": b.reduce_scatter([mine(b)] * b.size, async_op=True),
        "all_to_all": b.all_to_all([mine(b)] * b.size, async_op=True),
        "broadcast": b.broadcast(mine(b), 0, async_op=True),
        "reduce": b.reduce(mine(b), 0, async_op=True),
        "gather": b.gather(mine(b), 0, async_op=True),
        "scatter": b.scatter(
            torch.empty(4), everyones(b) if b.rank == 0 else None, 0, async_op=True
        ),
        "barrier": b.barrier(async_op=True),
    }
    got = {name: work.wait() for name, work in works.items()}
    assert got["all_reduce"] is x
    same(x, sum(everyones(b)))
    same(torch.stack(got["all_gather"]), torch.stack(everyones(b)))
    same(got["reduce_scatter"], sum(everyones(b)))
    same(torch.stack(got["all_to_all"]), torch.stack(everyones(b)))
    same(got["broadcast"], everyones(b)[0])
    same(got["scatter"], mine(b))
    assert (got["gather"] is None) == (b.rank != 0)
    assert got["barrier"] is None
    assert all(w.done() and w.exception() is None for w in works.values())
    assert works["all_reduce"].result() is x
    assert b.get_stats().in_flight == 0


def case_a_work_can_be_awaited_and_has_a_future(b):
    async def go():
        return await b.all_reduce(torch.ones(2), async_op=True)

    same(asyncio.run(go()), torch.full((2,), float(b.size)))
    future = b.all_reduce(torch.ones(2), async_op=True).get_future()
    same(future.wait(), torch.full((2,), float(b.size)))


def case_inference_tensors(b):
    with torch.inference_mode():
        same(b.all_reduce(mine(b)), sum(everyones(b)))
        same(torch.stack(b.all_gather(mine(b))), torch.stack(everyones(b)))
        same(b.broadcast(mine(b), 0), everyones(b)[0])
        out = torch.empty(4 * b.size)
        same(b.all_gather_into_tensor(out, mine(b)), torch.cat(everyones(b)))


def case_non_contiguous_tensors_are_copied_and_counted(b):
    before = b.get_stats().ops.get("all_reduce")
    x = torch.arange(6.0).view(2, 3).t()
    same(b.all_reduce(x), torch.arange(6.0).view(2, 3).t() * b.size)
    assert b.get_stats().ops["all_reduce"].copies == (before.copies if before else 0) + 1
    out = torch.empty(b.size, 4).t()
    b.all_gather_into_tensor(out, torch.arange(4.0))
    same(out.reshape(-1), torch.arange(4.0).repeat(b.size))
    y = torch.zeros(4, 2)[:, 0]
    if b.rank == 0:
        b.send(torch.arange(8.0)[::2], 1)
    elif b.rank == 1:
        same(b.recv(y, 0), torch.tensor([0.0, 2.0, 4.0, 6.0]))


def case_zero_dimensional_and_empty_tensors(b):
    same(b.all_reduce(torch.tensor(1.0)), torch.tensor(float(b.size)))
    same(torch.stack(b.all_gather(torch.tensor(b.rank))), torch.arange(b.size))
    assert b.all_reduce(torch.empty(0)).numel() == 0
    assert [t.shape for t in b.all_gather(torch.empty(0, 2))] == [(0, 2)] * b.size
    assert b.broadcast(torch.empty(0), 0, async_op=True).done()


def case_coalesce_finishes_at_its_end(b):
    x, y = mine(b), mine(b)
    with b.coalesce():
        b.all_reduce(x)
        b.all_reduce(y, "max")
    same(x, sum(everyones(b)))
    same(y, everyones(b)[-1])


def case_fused_equals_unfused(b):
    sizes = [3, 1, 500, 40, 7]
    xs = [mine(b, n) for n in sizes] + [mine(b, 5, torch.int64), torch.empty(0)]
    wanted = [b.all_reduce(x.clone()) for x in xs]
    fused_all_reduce(b, xs, bucket_bytes=600)
    for got, value in zip(xs, wanted, strict=True):
        same(got, value)


# -- the group ----------------------------------------------------------------------------


def case_split_orders_ranks_as_asked(b):
    order = list(reversed(range(b.size)))
    with b.split(order, "mirror") as mirror:
        assert mirror.global_ranks == tuple(order)
        assert mirror.rank == b.size - 1 - b.rank
        same(mirror.broadcast(mine(b), 0), everyones(b)[-1])


def case_disjoint_splits(b):
    first, rest = b.split([0]), b.split(list(range(1, b.size)))
    ours = first if b.rank == 0 else rest
    assert (first is None) == (b.rank != 0)
    assert ours.all_reduce(torch.ones(1)).item() == ours.size
    ours.close()


def case_split_refuses_bad_ranks(b):
    for bad in ([], [0, 0], [b.size]):
        with pytest.raises(ConfigError):
            b.split(bad)


def case_hooks_see_calls_and_take_over(b):
    from sagellm.core.protocols import CompletedWork

    seen = []
    remove = b.add_hook(
        before=lambda call: seen.append(("before", call.op, call.nbytes)),
        after=lambda call, seconds, error: seen.append(("after", call.op, seconds >= 0, error)),
    )
    b.all_reduce(torch.ones(4))
    remove()
    b.all_reduce(torch.ones(4))
    assert seen == [("before", "all_reduce", 16), ("after", "all_reduce", True, None)]
    remove = b.add_hook(
        take_over=lambda call: CompletedWork(None) if call.op == "barrier" else None
    )
    b.barrier()
    remove()


def case_bad_arguments_are_refused_before_anything_is_sent(b):
    x = torch.ones(4)
    refused = [
        (lambda: b.broadcast(x, b.size), f"src {b.size} is not in 0..{b.size - 1}"),
        (lambda: b.send(x, b.rank), "is this rank itself"),
        (lambda: b.all_reduce([1.0]), "not a torch.Tensor"),
        (lambda: b.all_reduce(x, "mean"), "not one of sum, avg"),
        (lambda: b.all_reduce(x.expand(3, 4)), "expanded"),
        (lambda: b.all_reduce(x.to_sparse()), "layout"),
        (lambda: b.all_reduce(x.to("meta")), "on meta"),
        (lambda: b.all_gather_into_tensor(torch.empty(3), x), "3 elements, expected"),
        (lambda: b.all_gather_into_tensor(torch.empty(4 * b.size).int(), x), "int32, expected"),
        (lambda: b.reduce_scatter([x]), "1 tensors"),
        (lambda: b.all_to_all_single(torch.empty(1 + b.size), torch.empty(1 + b.size)), "evenly"),
        (lambda: b.all_to_all_single(x, x, [4] * b.size, [4] * b.size), "sum to its 4 rows"),
        (lambda: b.barrier(timeout_s=-1), "above 0"),
        (lambda: b.send(x, (b.rank + 1) % b.size, -1), "tag -1"),
    ]
    for call, text in refused:
        with pytest.raises(ConfigError, match=text):
            call()
    if b.rank == 0:
        with pytest.raises(ConfigError, match="root of scatter"):
            b.scatter(x, None, 0)
    same(b.all_reduce(torch.ones(1)), torch.tensor([float(b.size)]))


def case_stats_count_calls_bytes_and_time(b):
    b.reset_stats()
    for _ in range(3):
        b.all_reduce(torch.ones(256))
    b.all_gather(torch.ones(256))
    stats = b.get_stats()
    assert (stats.rank, stats.size, stats.backend) == (b.rank, b.size, b.name)
    ops = stats.ops["all_reduce"]
    assert (ops.calls, ops.errors, ops.bytes) == (3, 0, 3 * 1024)
    assert 0 < ops.p50_us <= ops.p99_us
    bandwidth = b.get_bandwidth_stats()
    alg, bus = bandwidth.algbw_bytes_per_s, bandwidth.busbw_bytes_per_s
    factor = 2 * (b.size - 1) / b.size
    assert bus["all_reduce"] == pytest.approx(alg["all_reduce"] * factor)
    assert bus["all_gather"] == pytest.approx(alg["all_gather"] * factor / 2)


def case_memory_and_explain(b):
    x = b.empty((2, 3), torch.int32)
    assert (x.shape, x.dtype, x.device.type) == ((2, 3), torch.int32, b.device_type)
    b.register(x).release()
    choice = b.explain("all_reduce", 1024)
    assert choice.backend == b.name
    assert choice.reason


CASES = [found for name, found in list(globals().items()) if name.startswith("case_")]


@pytest.fixture(
    params=[
        *("mock-2", "mock-3", "gloo-2", "gloo-3", "native-2", "native-3", "python-2", "python-3"),
        "hier-3",
    ]
)
def on_every_rank(request, gloo_pools, shm_pools, hier_pools):
    kind, size = request.param.split("-")
    if kind == "hier":
        return hier_pools([[0, 2], [1]]).run
    if kind in ("native", "python"):
        if kind not in available_engines():
            pytest.skip(f"no {kind} engine here")
        return shm_pools(int(size), kind).run
    if kind == "gloo":
        return gloo_pools(int(size)).run
    world = MockWorld(int(size), timeout_s=20)
    return lambda fn: world.run(fn)


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__.removeprefix("case_"))
def test_backend(case, on_every_rank):
    assert list(inspect.signature(case).parameters) == ["b"]
    on_every_rank(case)
