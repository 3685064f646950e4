"""Fewer bits on the wire: the stated error bound, what is not finite, and who chooses."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sagellm.comm.collective_ops import MockWorld, create_comm_backend
from sagellm.comm.collective_ops._wire_choice import WireRates, choose_wire
from sagellm.comm.collective_ops._wire_codec import BLOCK, TINY, WIRES, make_codec
from sagellm.comm.collective_ops.quantized import LossyCollectives, error_bound
from sagellm.core.protocols import ConfigError

MAGNITUDES = [0.0, 1e-45, 1e-40, TINY, 1e-20, 0.37, 1.0, 4096.0, 1e4]
LARGE = [1e20, 1e34]


def numbers(seed, n, magnitudes):
    """Blocks of very different size beside each other, and single outliers within a block."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.tensor(magnitudes, dtype=torch.float64)
    blocks = scale[torch.randint(len(magnitudes), (-(-n // 64) + 1,), generator=g)]
    x = torch.rand(n, dtype=torch.float64, generator=g) * 2 - 1
    x *= blocks.repeat_interleave(64)[:n]
    if n > 3:
        x[torch.randint(n, (1,), generator=g)] *= 100
    return x.float()


def bounds(inputs, wire, n, average=False):
    """`error_bound` of every element, from each rank's largest magnitude in its block."""
    if wire != "int8":
        each = torch.stack([x.abs() for x in inputs]).T.tolist()
        return torch.tensor(
            [error_bound(wire, a, average=average) for a in each], dtype=torch.float64
        )
    size = len(inputs)
    part = math.ceil(math.ceil(n / size) / BLOCK) * BLOCK
    padded = torch.zeros(size, part * size)
    padded[:, :n] = torch.stack(inputs)
    each = padded.view(size, -1, BLOCK).abs().amax(2).T.tolist()
    found = torch.tensor([error_bound(wire, a, average=average) for a in each], dtype=torch.float64)
    return found.repeat_interleave(BLOCK)[:n]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.sampled_from([1, 2, 15, 255, 256, 257, 1000, 3000]),
    size=st.integers(2, 3),
    wire=st.sampled_from(WIRES),
    magnitudes=st.lists(st.sampled_from(MAGNITUDES), min_size=1, max_size=4),
    large=st.booleans(),
    op=st.sampled_from(["sum", "avg"]),
)
def test_error_stays_within_the_stated_bound(seed, n, size, wire, magnitudes, large, op):
    scales = magnitudes + LARGE if large and wire != "fp16" else magnitudes
    if wire == "fp16":
        scales = [min(s, 100.0) for s in scales]
    inputs = [numbers(seed + r, n, scales) for r in range(size)]
    exact = sum(x.double() for x in inputs)
    bound = bounds(inputs, wire, n, op == "avg")

    def body(b):
        lossy = LossyCollectives(b, wire, allow_lossy=True)
        x = inputs[b.rank].clone()
        assert lossy.all_reduce(x, op) is x
        return x

    results = MockWorld(size, timeout_s=20).run(body)
    for x in results[1:]:
        assert torch.equal(x, results[0])
    share = size if op == "avg" else 1
    missed = (results[0].double() - exact / share).abs() - bound
    worst = int(missed.argmax())
    assert missed[worst] <= 0, (worst, results[0][worst], exact[worst] / share, bound[worst])


@pytest.mark.parametrize("wire", WIRES)
def test_zeros_stay_zeros(wire):
    def body(b):
        x = torch.zeros(700)
        x[0] = b.rank
        return LossyCollectives(b, wire, allow_lossy=True).all_reduce(x)[256:].count_nonzero()

    assert MockWorld(3, timeout_s=5).run(body) == [0, 0, 0]


def test_int8_never_wraps_at_the_largest_magnitude():
    """127.5 rounds to 128, which is -128 in eight bits."""
    codec = make_codec("int8")
    for seed in range(200):
        x = numbers(seed, BLOCK, [0.37 + seed])
        wire, back = torch.empty(codec.wire_bytes(BLOCK), dtype=torch.uint8), torch.empty(BLOCK)
        codec.encode(wire, x)
        codec.decode(back, wire)
        top = x.abs().argmax()
        assert torch.isclose(back[top], x[top], rtol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_makes_its_whole_block_nan_in_int8(bad):
    def body(b):
        x = torch.ones(BLOCK * 4)
        if b.rank == 1:
            x[BLOCK + 3] = bad
            x[3 * BLOCK] = bad
        return LossyCollectives(b, "int8", allow_lossy=True).all_reduce(x)

    for x in MockWorld(2, timeout_s=5).run(body):
        blocks = x.view(4, BLOCK).isnan()
        assert [bool(b.all()) for b in blocks] == [False, True, False, True]
        assert [bool(b.any()) for b in blocks] == [False, True, False, True]


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
def test_casts_keep_infinities_and_nan_where_they_are(wire):
    def body(b):
        x = torch.ones(40)
        if b.rank == 0:
            x[1], x[30] = math.inf, math.nan
        return LossyCollectives(b, wire, allow_lossy=True).all_reduce(x)

    for x in MockWorld(2, timeout_s=5).run(body):
        assert x[1] == math.inf
        assert x[30].isnan()
        assert x.isfinite().sum() == 38


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_strides_and_dtypes_are_the_callers(wire, dtype):
    def body(b):
        lossy = LossyCollectives(b, wire, allow_lossy=True)
        x = torch.full((5, 7), b.rank + 1.0, dtype=dtype).t()
        assert lossy.all_reduce(x) is x
        out = torch.empty(3, 5, dtype=dtype).t()
        rows = torch.arange(2.0).repeat_interleave(15).to(dtype)
        assert lossy.reduce_scatter_tensor(out, rows) is out
        gathered = torch.empty(2, 2, 3, dtype=dtype)
        lossy.all_gather_into_tensor(gathered, torch.full((3, 2), float(b.rank), dtype=dtype).t())
        assert lossy.all_reduce(torch.empty(0, dtype=dtype)).numel() == 0
        return x.unique().tolist(), out.unique().tolist(), gathered[1].unique().tolist()

    found = MockWorld(2, timeout_s=5).run(body)
    for rank, (x, out, gathered) in enumerate(found):
        assert x == pytest.approx([3.0], rel=1e-2)
        assert out == pytest.approx([2.0 * rank], rel=1e-2)
        assert gathered == pytest.approx([1.0], rel=1e-2)


def test_reduce_scatter_and_all_gather_round_once():
    def body(b):
        lossy = LossyCollectives(b, "bf16", allow_lossy=True)
        x = torch.full((32,), 1.0 + 2**-7 * b.rank)
        out = lossy.reduce_scatter_tensor(torch.empty(16), x)
        gathered = lossy.all_gather_into_tensor(torch.empty(2), torch.tensor([1 + 2.0**-12]))
        return out.unique().tolist(), gathered.tolist()

    assert MockWorld(2, timeout_s=5).run(body) == [([2 + 2.0**-7], [1.0, 1.0])] * 2


@pytest.mark.parametrize("op", ["max", "product"])
def test_other_reductions_and_dtypes_are_sent_as_they_are(op):
    def body(b):
        lossy = LossyCollectives(b, "int8", allow_lossy=True)
        x = torch.full((300,), 1.0 + 2**-20 * b.rank)
        lossy.all_reduce(x, op)
        y = lossy.all_reduce(torch.full((300,), 123456789 + b.rank))
        return x[0].item(), y[0].item()

    assert MockWorld(2, timeout_s=5).run(body) == [(1.0 + 2**-20, 246913579)] * 2


def test_bytes_on_the_wire_are_a_quarter():
    def body(b):
        sizes = []
        b.add_hook(before=lambda call: sizes.append((call.op, call.nbytes)))
        LossyCollectives(b, "int8", allow_lossy=True).all_reduce(torch.ones(1 << 14))
        return sizes

    half = (1 << 13) + 4 * (1 << 13) // BLOCK
    wanted = [("all_to_all_single", 2 * half), ("all_gather_into_tensor", half)]
    assert MockWorld(2, timeout_s=5).run(body) == [wanted] * 2


def test_memory_is_used_again():
    def body(b):
        made = []
        real = b.empty
        b.empty = lambda shape, dtype: made.append(shape) or real(shape, dtype)
        lossy = LossyCollectives(b, "int8", allow_lossy=True)
        for _ in range(4):
            lossy.all_reduce(torch.ones(1000))
        return len(made)

    assert MockWorld(2, timeout_s=5).run(body) == [2, 2]


# -- the choice -----------------------------------------------------------------------------

SPEEDS = {"bf16": 20e9, "fp16": 20e9, "int8": 4e9}


def taken(link_bytes_per_s, nbytes, op="all_reduce"):
    rates = WireRates(link_bytes_per_s, 100e-6, SPEEDS, SPEEDS)
    return choose_wire(op, nbytes, 2, rates, WIRES, "x")


def test_choice_follows_the_link():
    assert taken(0.125e9, 16 << 20).algorithm == "int8"
    assert taken(3e9, 16 << 20).algorithm == "bf16"
    assert taken(40e9, 16 << 20).algorithm == "none"
    assert taken(0.125e9, 64).algorithm == "none"
    choice = taken(0.125e9, 16 << 20)
    assert set(choice.rejected) == {"none", "bf16", "fp16"}
    assert "0.125 GB/s link" in choice.reason


def test_auto_takes_nothing_lossy_unless_allowed():
    lossy = LossyCollectives(create_comm_backend("mock"), "auto")
    choice = lossy.explain("all_reduce", 1 << 24)
    assert (choice.algorithm, "not allowed" in choice.reason) == ("none", True)


def test_auto_is_agreed_between_ranks():
    def body(b):
        link = 1e6 if b.rank == 0 else 1e12  # rank 0's counts
        lossy = LossyCollectives(b, "auto", allow_lossy=True, link_bytes_per_s=link)
        x = torch.full((1 << 16,), 1.0 / 3)
        lossy.all_reduce(x)
        return lossy.explain("all_reduce", 1 << 22).algorithm, x

    first, second = MockWorld(2, timeout_s=5).run(body)
    assert (first[0], second[0]) == ("int8", "int8")
    assert torch.equal(first[1], second[1])


def test_bad_options_are_refused_by_name():
    backend = create_comm_backend("mock")
    with pytest.raises(ConfigError, match="wire 'int4' is not one of auto, none, bf16, fp16, int8"):
        LossyCollectives(backend, "int4")
    with pytest.raises(ConfigError, match="allow_lossy=True allows it"):
        LossyCollectives(backend, "bf16")
    with pytest.raises(ConfigError, match="link_bytes_per_s must be above 0"):
        LossyCollectives(backend, link_bytes_per_s=0)


def test_over_gloo_as_over_threads(gloo_pools):
    for outcome in gloo_pools(2).run(over_gloo):
        assert outcome <= 1.0


def over_gloo(b):
    worst = 0.0
    for wire in WIRES:
        inputs = [numbers(r, 5000, [1.0, 50.0]) for r in range(b.size)]
        x = inputs[b.rank].clone()
        LossyCollectives(b, wire, allow_lossy=True).all_reduce(x)
        missed = (x.double() - sum(y.double() for y in inputs)).abs()
        worst = max(worst, float((missed / bounds(inputs, wire, 5000)).max()))
    return worst
