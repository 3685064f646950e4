"""Schedules: proofs by symbols, and runs over threads and over processes."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sagellm.comm.collective_ops import MockWorld
from sagellm.comm.collective_ops.schedules import (
    Move,
    Schedule,
    check_schedule,
    make_schedule,
    run_schedule,
    schedule_algorithms,
)
from sagellm.core.protocols import ConfigError

OPS = ("all_gather", "all_reduce", "all_to_all", "broadcast", "reduce", "reduce_scatter")
EVERY = [(op, algorithm) for op in OPS for algorithm in schedule_algorithms(op)]
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


# -- proofs -------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "algorithm"), EVERY)
@given(data=st.data(), size=st.integers(1, 17))
@settings(max_examples=25, deadline=None)
def test_every_schedule_is_right_for_any_world_root_and_order(op, algorithm, data, size):
    root = data.draw(st.integers(0, size - 1))
    order = data.draw(st.permutations(range(size)))
    check_schedule(make_schedule(op, algorithm, size, root=root, order=order))


@pytest.mark.parametrize("size", range(1, 18))
def test_every_world_size_costs_what_the_formulas_say(size):
    log = (size - 1).bit_length()
    p = 1 << (size.bit_length() - 1)
    fold = 0 if p == size else 1

    def cost(op, algorithm):
        schedule = make_schedule(op, algorithm, size)
        report = check_schedule(schedule)
        return report.depth, max(report.sent_chunks) / schedule.chunks

    assert cost("all_reduce", "ring") == (2 * (size - 1), 2 * (size - 1) / size)
    assert cost("reduce_scatter", "ring") == (size - 1, (size - 1) / size)
    assert cost("all_gather", "ring") == (size - 1, (size - 1) / size)
    assert cost("all_reduce", "direct")[1] == size - 1
    assert cost("all_reduce", "two_shot")[1] == 2 * (size - 1) / size
    assert cost("all_reduce", "tree")[0] <= 2 * log
    assert cost("broadcast", "tree")[0] == log
    depth, sent = cost("all_reduce", "recursive_doubling")
    assert depth == int(math.log2(p)) + 2 * fold
    assert sent == int(math.log2(p)) + fold
    depth, sent = cost("all_reduce", "halving_doubling")
    assert depth == 2 * int(math.log2(p)) + 2 * fold
    assert sent == 2 * (p - 1) / p + fold
    assert cost("all_to_all", "pairwise")[0] == (size - 1 if size % 2 == 0 or size == 1 else size)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_checker_refuses_a_schedule_with_any_one_move_left_out(data):
    op, algorithm = data.draw(st.sampled_from(EVERY))
    schedule = make_schedule(op, algorithm, data.draw(st.integers(2, 9)))
    busy = [r for r in range(schedule.size) if schedule.steps[r]]
    rank = data.draw(st.sampled_from(busy))
    at = data.draw(st.integers(0, len(schedule.steps[rank]) - 1))
    step = schedule.steps[rank][at]
    gone = data.draw(st.integers(0, len(step) - 1))
    steps = list(schedule.steps[rank])
    steps[at] = step[:gone] + step[gone + 1 :]
    every = list(schedule.steps)
    every[rank] = tuple(steps)
    with pytest.raises(ConfigError):
        check_schedule(replace(schedule, steps=tuple(every)))


def two(first, second, op="all_reduce", chunks=1):
    return Schedule(op, "ours", 2, chunks, (first, second))


SEND = [Move("send", peer, 0, 1) for peer in (0, 1)]
ADD = [Move("recv", peer, 0, 1, reduce=True) for peer in (0, 1)]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (two(((SEND[1],), (ADD[1],)), ((SEND[0],), (ADD[0],))), "never goes on: rank 0 at step 0"),
        (two(((SEND[1], ADD[1]),), ((SEND[0],),)), "rank 1 ends with chunk 0 of|never goes on"),
        (two(((SEND[1], ADD[1]),) * 2, ((SEND[0], ADD[0]),) * 2), "a contribution twice"),
        (two(((SEND[1],),), ((replace(ADD[0], reduce=False),),)), "ends with chunk 0 of 0x1"),
        (two(((SEND[1],),), ((ADD[0],),), "all_gather", 2), "combines chunk 0"),
        (two((), ((SEND[0],),), "broadcast"), "sends chunk 0, which it does not hold"),
        (two(((Move("send", 2, 0, 1),),), ()), "has peer 2 of 2 ranks"),
        (two(((Move("send", 1, 0, 2),),), ()), "names chunks 0-1 of 1"),
        (
            two(((Move("send", 1, 1, 2),),), ((ADD[0],),), "all_reduce", 2),
            "expects chunk 0 and is sent chunk 1",
        ),
        (two(((SEND[1],), (SEND[1],)), ((ADD[0], replace(ADD[0], reduce=False)),)), "two ways|go"),
        (two((), (), "gather"), "no result is known"),
        (Schedule("all_reduce", "ours", 3, 1, ((), ())), "steps of 2 ranks for 3"),
    ],
)
def test_checker_says_what_is_wrong(schedule, words):
    with pytest.raises(ConfigError, match=words):
        check_schedule(schedule)


def test_schedules_that_do_not_exist_are_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"'star' of all_reduce; there are ring, tree"):
        make_schedule("all_reduce", "star", 2)
    with pytest.raises(ConfigError, match="no schedules of 'gather'"):
        make_schedule("gather", "ring", 2)
    with pytest.raises(ConfigError, match="at least one rank"):
        make_schedule("all_reduce", "ring", 0)
    with pytest.raises(ConfigError, match=r"root 2 is not in 0\.\.1"):
        make_schedule("broadcast", "ring", 2, root=2)
    with pytest.raises(ConfigError, match="not an order of the ranks"):
        make_schedule("all_reduce", "ring", 2, order=[0, 0])


# -- runs ---------------------------------------------------------------------------------


def content(rank, n, dtype):
    x = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(rank))
    return x.to(dtype)


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def summed(b, n, dtype):
    xs = [content(r, n, dtype) for r in range(b.size)]
    if dtype is torch.bool:
        return torch.stack(xs).any(0)
    return torch.stack(xs).sum(0).to(dtype)


def run_one(b, op, algorithm, n, dtype):
    root = b.size - 1
    order = [(r * 3 + 1) % b.size for r in range(b.size)] if b.size % 3 else range(b.size)[::-1]
    schedule = make_schedule(
        op, algorithm, b.size, root=root if op in ("broadcast", "reduce") else 0, order=order
    )
    if op in ("all_reduce", "reduce", "broadcast"):
        x = content(b.rank, n, dtype)
        assert run_schedule(b, schedule, x) is x
        if op == "broadcast":
            same(x, content(root, n, dtype))
        elif op == "all_reduce" or b.rank == root:
            same(x, summed(b, n, dtype))
        return
    if op == "all_gather":
        out, x = torch.empty(n * b.size, dtype=dtype), content(b.rank, n, dtype)
        run_schedule(b, schedule, x, out=out)
        same(out, torch.cat([content(r, n, dtype) for r in range(b.size)]))
    else:
        out, x = torch.empty(n, dtype=dtype), content(b.rank, n * b.size, dtype)
        if op == "all_to_all":
            out = torch.empty_like(x)
        run_schedule(b, schedule, x, out=out)
        same(x, content(b.rank, n * b.size, dtype))
        if op == "reduce_scatter":
            same(out, summed(b, n * b.size, dtype).chunk(b.size)[b.rank] if n else out)
        elif n:
            parts = [content(r, n * b.size, dtype).chunk(b.size)[b.rank] for r in range(b.size)]
            same(out, torch.cat(parts))


def run_everything(b, sizes, dtypes):
    for op, algorithm in EVERY:
        for n in sizes:
            for dtype in dtypes:
                run_one(b, op, algorithm, n, dtype)


def run_odds(b):
    """Strides, uneven splits, other reductions, and the rule for 16-bit floats."""
    x = torch.arange(24.0).view(4, 6).t() + b.rank
    run_schedule(b, make_schedule("all_reduce", "ring", b.size), x, "max")
    same(x, torch.arange(24.0).view(4, 6).t() + b.size - 1)
    ours = [(b.rank + i) % 3 for i in range(b.size)]
    theirs = [(r + b.rank) % 3 for r in range(b.size)]
    for algorithm in schedule_algorithms("all_to_all"):
        schedule = make_schedule("all_to_all", algorithm, b.size)
        x = torch.full((sum(ours), 2), float(b.rank))
        out = torch.empty(sum(theirs), 2)
        run_schedule(b, schedule, x, out=out, in_splits=ours, out_splits=theirs)
        rows = [torch.full((n, 2), float(r)) for r, n in enumerate(theirs)]
        same(out, torch.cat(rows))
    bits = []
    for algorithm in schedule_algorithms("all_reduce"):
        x = torch.randn(37, generator=torch.Generator().manual_seed(b.rank))
        half = x.bfloat16()
        run_schedule(b, make_schedule("all_reduce", algorithm, b.size), x, "avg")
        run_schedule(b, make_schedule("all_reduce", algorithm, b.size), half)
        exact = [
            torch.randn(37, generator=torch.Generator().manual_seed(r)).bfloat16().double()
            for r in range(b.size)
        ]
        same(half, sum(exact).float().bfloat16())
        bits.append(x.view(torch.int32).tolist())
    return bits


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8])
def test_schedules_run_over_threads(size):
    MockWorld(size).run(lambda b: run_everything(b, (0, 1, 13), (torch.float32, torch.int8)))


def test_schedules_run_over_threads_for_every_dtype():
    MockWorld(3).run(lambda b: run_everything(b, (5,), DTYPES))


@pytest.mark.parametrize("size", [3, 5])
def test_every_rank_has_the_same_bits(size):
    first, *others = MockWorld(size).run(run_odds)
    assert others == [first] * (size - 1)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_schedules_run_over_processes(gloo_pools, size):
    gloo_pools(size).run(run_everything, (0, 7), (torch.float32, torch.bfloat16, torch.bool))
    first, *others = gloo_pools(size).run(run_odds)
    assert others == [first] * (size - 1)


def test_tensors_that_do_not_fit_are_refused_before_anything_is_sent():
    b = MockWorld(1).backend(0)
    ring = make_schedule("all_reduce", "ring", 1)
    with pytest.raises(ConfigError, match="a schedule of 2 ranks on a group of 1"):
        run_schedule(b, make_schedule("all_reduce", "ring", 2), torch.ones(1))
    with pytest.raises(ConfigError, match="takes no out"):
        run_schedule(b, ring, torch.ones(1), out=torch.ones(1))
    with pytest.raises(ConfigError, match="needs out"):
        run_schedule(b, make_schedule("all_gather", "ring", 1), torch.ones(1))
    with pytest.raises(ConfigError, match="x has 2 elements"):
        run_schedule(b, make_schedule("all_gather", "ring", 1), torch.ones(2), out=torch.ones(1))
    with pytest.raises(ConfigError, match="avg needs a floating dtype"):
        run_schedule(b, ring, torch.ones(1, dtype=torch.int32), "avg")
    with pytest.raises(ConfigError, match="bxor needs an integer"):
        run_schedule(b, ring, torch.ones(1), "bxor")
    with pytest.raises(ConfigError, match=r"splits \[2\] of 1 elements"):
        run_schedule(
            b, make_schedule("all_to_all", "direct", 1), torch.ones(1), out=torch.ones(1),
            in_splits=[2],
        )  # fmt: skip
