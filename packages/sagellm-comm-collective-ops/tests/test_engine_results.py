"""Every engine on a bare segment: results, bit for bit, of every operation and type."""

import itertools

import pytest
import torch
from shm_harness import (
    BARRIER,
    ENGINES,
    LONG_S,
    SIZES,
    TYPES,
    VARIANTS,
    engine_of,
    in_order,
    reductions,
    values,
)

from sagellm.comm.collective_ops._shm.choice import SYMMETRIC_BYTES
from sagellm.comm.collective_ops._shm.engine import EngineFailure
from sagellm.core.protocols import ReduceOp
from sagellm.core.protocols.process_group import RawCall

variants = pytest.mark.parametrize("variant", VARIANTS)


def drawn(ops):
    """The first with every size, the others with one each."""
    first, *others = ops
    return [*((first, n) for n in SIZES), *zip(others, itertools.cycle(SIZES))]


def reduce_everything(backend, folder, variant, algorithm):
    rank, size = backend.rank, backend.size
    overrides = algorithm and [("all_reduce", 0, 1 << 40, algorithm)]
    with engine_of(backend, folder, variant, algorithms=overrides) as engine:
        for dtype in TYPES:
            for op, n in drawn(reductions(dtype)):
                xs = [values(r, n * size, dtype, n) for r in range(size)]
                want = in_order(xs, op)

                x = xs[rank].clone()
                engine.run(RawCall("all_reduce", [], [x], reduce_op=op))
                assert torch.equal(x, want), (dtype, op, n)

                x, root = xs[rank].clone(), n % size
                engine.run(RawCall("reduce", [], [x], reduce_op=op, peer=root))
                assert torch.equal(x, want if rank == root else xs[rank]), (dtype, op, n)

                out = torch.empty(n, dtype=dtype)
                engine.run(RawCall("reduce_scatter", [xs[rank]], [out], reduce_op=op))
                assert torch.equal(out, want[rank * n : rank * n + n]), (dtype, op, n)


@pytest.mark.parametrize(
    ("size", "algorithm"), [(2, None), (3, None), (3, "two_shot"), (4, "two_shot")]
)
@variants
def test_reductions_equal_those_in_rank_order(gloo_pools, folder, variant, size, algorithm):
    gloo_pools(size).run(reduce_everything, folder(), variant, algorithm)


def move_everything(backend, folder, variant):
    rank, size = backend.rank, backend.size
    with engine_of(backend, folder, variant) as engine:
        for dtype, n in itertools.product([*TYPES, torch.complex128], (1, 1100)):
            kind = torch.float64 if dtype.is_complex else dtype
            xs = [values(r, n, kind, n).to(dtype) for r in range(size)]
            wide = [values(r, n * size, kind, n).to(dtype) for r in range(size)]
            root = n % size

            out = torch.empty(n * size, dtype=dtype)
            engine.run(RawCall("all_gather", [xs[rank]], [out]))
            assert torch.equal(out, torch.cat(xs))

            x = xs[rank].clone()
            engine.run(RawCall("broadcast", [], [x], peer=root))
            assert torch.equal(x, xs[root])

            outs = [torch.empty(n, dtype=dtype) for _ in xs] if rank == root else []
            engine.run(RawCall("gather", [xs[rank]], outs, peer=root))
            assert all(map(torch.equal, outs, xs if rank == root else []))

            out = torch.empty(n, dtype=dtype)
            engine.run(RawCall("scatter", xs if rank == root else [], [out], peer=root))
            assert torch.equal(out, xs[rank])

            out = torch.empty(n * size, dtype=dtype)
            engine.run(RawCall("all_to_all", [wide[rank]], [out]))
            assert torch.equal(out, torch.cat([w.chunk(size)[rank] for w in wide]))

            gives = [[(n + a + 2 * b) % (n + 2) for b in range(size)] for a in range(size)]
            sent = [values(r, sum(gives[r]), kind, n).to(dtype) for r in range(size)]
            takes = [gives[r][rank] for r in range(size)]
            out = torch.empty(sum(takes), dtype=dtype)
            call = RawCall(
                "all_to_all", [sent[rank]], [out], in_splits=gives[rank], out_splits=takes
            )
            engine.run(call)
            split = [s.split(g)[rank] for s, g in zip(sent, gives, strict=True)]
            assert torch.equal(out, torch.cat(split))

            engine.run(BARRIER)


@pytest.mark.parametrize("size", [2, 3])
@variants
def test_moves_carry_any_type_of_any_length(gloo_pools, folder, variant, size):
    gloo_pools(size).run(move_everything, folder(), variant)


def reduce_in_arenas(backend, folder, variant):
    rank, size = backend.rank, backend.size
    with engine_of(backend, folder, variant) as engine:
        for n, dtype in itertools.product((20000, 70001), (torch.float32, torch.bfloat16)):
            xs = [values(r, n, dtype, n) for r in range(size)]
            at = engine.meeting.layout.arena(rank) + 64 * rank
            arena = torch.frombuffer(engine.meeting.memory, dtype=dtype, count=n, offset=at)
            for elsewhere in (None, 0, size - 1):
                x = torch.empty(n, dtype=dtype) if rank == elsewhere else arena
                x.copy_(xs[rank])
                engine.run(RawCall("all_reduce", [], [x], reduce_op="sum"))
                assert torch.equal(x, in_order(xs, "sum")), (n, dtype, elsewhere)
                used = engine.records()[-1].algorithm
                assert (used == "symmetric") == (elsewhere is None and x.nbytes > SYMMETRIC_BYTES)


@pytest.mark.parametrize("size", [2, 3])
@variants
def test_symmetric_tensors_are_reduced_in_place_if_all_ranks_have_one(
    gloo_pools, folder, variant, size
):
    gloo_pools(size).run(reduce_in_arenas, folder(), variant)


def prepared_again_and_again(backend, folder, variant, statistics):
    rank, size = backend.rank, backend.size
    with engine_of(backend, folder, variant, statistics=statistics) as engine:
        for n, dtype in itertools.product((5, 300, 5003), (torch.float32, torch.bfloat16)):
            xs = [values(r, n * size, dtype, n) for r in range(size)]
            want = in_order(xs, "sum")
            x, out, whole = xs[rank].clone(), torch.empty(n, dtype=dtype), torch.empty_like(xs[0])
            part = torch.empty(n, dtype=dtype)
            reduce = engine.prepare("all_reduce", x, x, "sum", LONG_S)
            scatter = engine.prepare("reduce_scatter", xs[rank], out, "sum", LONG_S)
            gather = engine.prepare("all_gather", part, whole, "none", LONG_S)
            for turn in range(3):
                x.copy_(xs[rank])
                reduce()
                assert torch.equal(x, want)
                scatter()
                assert torch.equal(out, want[rank * n : rank * n + n])
                part.copy_(xs[rank][turn : turn + n])
                gather()
                assert torch.equal(whole, torch.cat([y[turn : turn + n] for y in xs]))
                engine.run(RawCall("broadcast", [], [part], peer=turn % size))


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("size", [2, 3])
@variants
def test_prepared_calls_see_the_contents_of_the_moment(
    gloo_pools, folder, variant, size, statistics
):
    gloo_pools(size).run(prepared_again_and_again, folder(), variant, statistics)


def take_shortcuts(backend, folder, variant):
    rank, size = backend.rank, backend.size
    with engine_of(backend, folder, variant) as engine:
        for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64):
            adds = not dtype.is_complex
            kind = dtype if adds else torch.float64
            cast = engine.shortcut("broadcast", dtype, root=size - 1, timeout_s=LONG_S)
            gather = engine.shortcut("all_gather", dtype, timeout_s=LONG_S)
            options = {"reduce_op": ReduceOp.SUM, "timeout_s": LONG_S}
            reduce = engine.shortcut("all_reduce", dtype, **options) if adds else None
            scatter = engine.shortcut("reduce_scatter", dtype, **options) if adds else None
            for n in (4, 300, 5002, 4):
                xs = [values(r, n * size, kind, n).to(dtype) for r in range(size)]
                x, out = xs[rank].view(2, -1).clone(), torch.empty(n * size * size, dtype=dtype)
                gather(x, out)
                assert torch.equal(out, torch.cat(xs))
                if adds:
                    part, want = torch.empty(n, dtype=dtype), in_order(xs, "sum")
                    scatter(x, part)
                    assert torch.equal(part, want[rank * n : rank * n + n])
                    reduce(x, x)
                    assert torch.equal(x.view(-1), want)
                    x.copy_(xs[rank].view(2, -1))
                cast(x, x)
                assert torch.equal(x.view(-1), xs[-1])
        backend.barrier()
        engine.close()
        with pytest.raises(EngineFailure, match="closed"):
            cast(x, x)


@pytest.mark.parametrize("size", [2, 3])
@variants
def test_shortcuts_serve_plain_tensors_of_any_size(gloo_pools, folder, variant, size):
    gloo_pools(size).run(take_shortcuts, folder(), variant)


def specials(rank, dtype):
    """All 16-bit patterns, and as many of wider types, shifted so that different ones meet."""
    bits = torch.arange(1 << 16, dtype=torch.int32).roll(1237 * rank)
    if dtype.itemsize == 2:
        return bits.to(torch.int16).view(dtype)
    wide = bits.to(torch.int64) << (8 * dtype.itemsize - 16) | rank
    return wide.to(torch.int32 if dtype.itemsize == 4 else torch.int64).view(dtype)


def same_bits(a, b):
    nan = a.isnan()
    assert torch.equal(nan, b.isnan())
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    assert torch.equal(a.view(kind)[~nan], b.view(kind)[~nan])


def reduce_specials(backend, folder):
    with (
        engine_of(backend, folder, "native") as native,
        engine_of(backend, folder, "python") as python,
    ):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for op in reductions(dtype):
                one = specials(backend.rank, dtype)
                other = one.clone()
                native.run(RawCall("all_reduce", [], [one], reduce_op=op))
                python.run(RawCall("all_reduce", [], [other], reduce_op=op))
                if op not in ("min", "max"):  # of 0 and -0 either is the smaller
                    same_bits(one, other)
                assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), (dtype, op)


@pytest.mark.parametrize("size", [2, 3])
def test_both_engines_give_the_same_bits(gloo_pools, folder, size):
    if len(ENGINES) < 2:
        pytest.skip("one engine on this machine")
    gloo_pools(size).run(reduce_specials, folder())
