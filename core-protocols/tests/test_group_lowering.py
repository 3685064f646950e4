"""What a library lacks: lowered by a rule, counted, or refused by name."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from sagellm.core.protocols import (  # noqa: E402
    Lowering,
    UnsupportedOperationError,
)
from sagellm.core.protocols._process_group.lowering import CALL_RULES  # noqa: E402


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_reductions_the_library_lacks_are_lowered_and_counted(ranks):
    def body(b):
        same(b.all_reduce(torch.full((3,), b.rank + 1.0), "avg"), torch.full((3,), 1.5))
        flags = torch.tensor([b.rank == 0, False, True])
        same(b.all_reduce(flags), torch.tensor([True, False, True]))
        same(b.reduce_scatter([torch.full((2,), 200, dtype=torch.uint8)] * 2)[0].item(), 144)
        half = b.all_reduce(torch.ones(2, dtype=torch.bfloat16), "avg", async_op=True).wait()
        assert half.dtype == torch.bfloat16
        stats = b.get_stats().ops
        return stats["all_reduce"].lowered, stats["reduce_scatter"].lowered

    assert ranks(2).run(body) == [(4, 1)] * 2


def test_what_no_rule_covers_is_refused_by_name_before_sending(ranks):
    def body(b):
        with pytest.raises(UnsupportedOperationError, match="gloo has no band: the library says"):
            b.all_reduce(torch.ones(2, dtype=torch.int32), "band")
        with pytest.raises(UnsupportedOperationError, match="gloo has no bor"):
            b.all_reduce(torch.ones(2, dtype=torch.int32), "bor")
        with pytest.raises(UnsupportedOperationError, match="gloo has no int8"):
            b.all_reduce(torch.ones(2, dtype=torch.int8))
        with pytest.raises(UnsupportedOperationError, match="gloo has no float64"):
            b.broadcast(torch.ones(2, dtype=torch.float64), 0)
        return b.all_reduce(torch.ones(1)).item()

    assert ranks(2).run(body) == [2.0, 2.0]


LOWERED_OPS = {
    "all_gather": "list_all_gather_by_broadcast",
    "all_to_all_single": "all_to_all_by_all_gather",
    "barrier": "barrier_by_all_reduce",
    "gather": "gather_by_all_gather",
    "reduce": "reduce_by_all_reduce",
    "reduce_scatter": "reduce_scatter_by_all_reduce",
    "scatter": "scatter_by_broadcast",
}


def test_whole_operations_are_lowered(ranks, spec):
    assert set(LOWERED_OPS.values()) == set(CALL_RULES)
    poor = replace(
        spec,
        capabilities=replace(spec.capabilities, ops=spec.capabilities.ops - set(LOWERED_OPS)),
        lowering=tuple(Lowering(op, rule, "a test") for op, rule in LOWERED_OPS.items()),
    )

    def body(b):
        x = torch.arange(2.0) + 10 * b.rank
        everyone = [torch.arange(2.0) + 10 * r for r in range(3)]
        for got, wanted in zip(b.all_gather(x), everyone, strict=True):
            same(got, wanted)
        out = torch.empty(3)
        same(
            b.all_to_all_single(out, torch.arange(3.0) + 10 * b.rank),
            torch.tensor([0.0, 10.0, 20.0]) + b.rank,
        )
        assert b.barrier() is None
        got = b.gather(x, 2)
        assert (got is None) == (b.rank != 2)
        if got:
            same(torch.stack(got), torch.stack(everyone))
        same(b.scatter(torch.empty(2), everyone if b.rank == 1 else None, 1), x)
        y = x.clone()
        b.reduce(y, 0)
        same(y, sum(everyone) if b.rank == 0 else x)
        same(b.reduce_scatter([x, x, x]), sum(everyone))
        with pytest.raises(UnsupportedOperationError, match="needs even splits"):
            b.all_to_all_single(torch.empty(3), torch.ones(3), [1, 1, 1], [1, 1, 1])
        assert b.explain("gather", 8).algorithm == "gather_by_all_gather"
        return b.get_stats().ops["gather"].lowered

    assert ranks(3).run(body, spec=poor) == [1] * 3


def test_unknown_rule_is_refused(ranks, spec):
    odd = replace(
        spec,
        capabilities=replace(spec.capabilities, ops=spec.capabilities.ops - {"gather"}),
        lowering=(Lowering("gather", "by_magic", "a test"),),
    )
    with pytest.raises(UnsupportedOperationError, match="'by_magic', which is not one of"):
        ranks(2).run(lambda b: b.gather(torch.ones(1), 0), spec=odd)


ODD = [torch.int16, torch.uint16, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", ODD, ids=str)
def test_element_types_gloo_does_not_know_travel_as_bytes(ranks, dtype, spec):
    anything = replace(spec, capabilities=replace(spec.capabilities, move_dtypes=frozenset()))
    width = torch.empty(0, dtype=dtype).itemsize

    def body(b):
        everyone = [
            (torch.arange(4 * width, dtype=torch.uint8) + 64 * r).view(dtype) for r in range(2)
        ]
        x = everyone[b.rank]

        def equal(got, *wanted):
            same(torch.cat(list(got)).view(torch.uint8), torch.cat(wanted).view(torch.uint8))

        equal(b.all_gather(x), *everyone)
        equal([b.broadcast(x.clone(), 1)], everyone[1])
        equal(b.gather(x, 0) or everyone, *everyone)
        equal([b.scatter(x.clone(), everyone if b.rank == 0 else None, 0)], x)
        out = torch.empty_like(x)
        equal([b.all_to_all_single(out, x)], *(e[2 * b.rank : 2 * b.rank + 2] for e in everyone))
        parts = [x[:1], x[1:]]
        equal(
            b.all_to_all(parts),
            *([e[:1] for e in everyone] if b.rank == 0 else [e[1:] for e in everyone]),
        )

    uneven = replace(anything, capabilities=replace(anything.capabilities, uneven=True))
    ranks(2).run(body, spec=uneven)
