"""`quant`: its bound, its rates, and RoPE."""

import math

import pytest
import torch
from codec_data import cache, half, layout, rotated

from sagellm.comm.kv_transfer.compression import Compressor, RopeSpec
from sagellm.comm.kv_transfer.compression.auto import quant_within
from sagellm.comm.kv_transfer.compression.frame import split
from sagellm.comm.kv_transfer.compression.quant import QuantCodec
from sagellm.core.protocols import ConfigError

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
STEPS = (1 / 32, 1 / 16, 1 / 4, 1.0, 2.0)


def round_trip(x, step=0.25, **fields):
    with Compressor("quant", workers=1, step=step) as compressor:
        frame = compressor.encode(x, layout(**fields))
        return frame, compressor.decode(frame)


def codings(frame):
    header, sections = split(memoryview(frame))
    return {header.codings[e.coding].name for e, _ in sections}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("tokens", [7, 256, 700])
def test_no_value_moves_by_more_than_half_a_step(step, tokens):
    x = cache(2, tokens, 2, 16, dtype=torch.float32)

    frame, out = round_trip(x, step)

    assert codings(frame) == {"quant"}
    for first in range(0, tokens, 256):
        chunk, got = (t[:, :, first : first + 256] for t in (x, out))
        sigma = chunk.std(2, correction=0, keepdim=True)
        k = 0.7 * step * sigma[:, 0]
        v = 1.4 * step * sigma[:, 1].square().mean(-1, keepdim=True).sqrt()
        # scales are sent in eighths of an octave, means in bfloat16
        for bound, kv in ((k, 0), (v, 1)):
            off = (got - chunk)[:, kv].abs()
            assert bool((off <= bound / 2 * 2 ** (1 / 16) + 1e-4).all())


def uneven(tokens, dtype, seed):
    """K and V [1, kv, token, head, dim] whose channels have little in common."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, tokens, 4, 32, generator=rng, dtype=torch.float64)
    x *= torch.randn(1, 2, 1, 4, 32, generator=rng, dtype=torch.float64).mul(2).exp()
    x += torch.randn(1, 2, 1, 4, 32, generator=rng, dtype=torch.float64).mul(10)
    x[..., 0, 0] = 3.0
    x[..., 0, 1] = 0.0
    x[:, :, tokens // 2, 0, 1] = 1.0  # a single one
    x[..., 0, 2] = 1 + (torch.arange(tokens) % 2) / 128  # between two means in bfloat16
    x[..., 0, 3] = torch.randn(tokens, generator=rng, dtype=torch.float64) * 1e-3 + 5
    x[:, :, ::7, 1] *= 20
    return x.to(dtype)


def worst(x, out):
    """The largest error of K and of V, less what rounding does, per deviation of its channel."""
    found = [0.0, 0.0]
    for first in range(0, x.shape[2], 256):
        a, b = (t[:, :, first : first + 256].double() for t in (x, out))
        sigma = a.std(2, correction=0, keepdim=True)
        off = (b - a).abs() - ROUNDING[x.dtype] * torch.maximum(a.abs(), b.abs())
        assert bool((off[(sigma == 0).expand_as(off)] <= 0).all())
        units = torch.where(sigma > 0, off / sigma, 0.0)
        found = [max(old, float(units[:, kv].max())) for kv, old in enumerate(found)]
    return found


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("error", [1 / 256, 1 / 32, 0.25, 1.0, 8.0])
@pytest.mark.parametrize("tokens", [5, 256, 700])
def test_an_error_that_is_asked_for_bounds_every_channel(dtype, error, tokens):
    coding = quant_within(error)
    used = set()
    for seed in range(2):
        x = uneven(tokens, dtype, seed)
        with Compressor.of(coding) as compressor:
            frame = compressor.encode(x, layout())
            out = compressor.decode(frame)

        used |= codings(frame)
        k, v = worst(x, out)
        assert k <= 0.75 * error
        assert v <= error
    if tokens > 5 and error >= 1 / 32 and dtype != torch.float32:
        assert used == {"quant"}  # else what it asks for may take all bits that there are


def test_steps_of_heads_do_not_bound_channels():
    x = uneven(256, torch.bfloat16, 0)
    with Compressor("quant", step=0.5, v=1.0) as compressor:
        out = compressor.decode(compressor.encode(x, layout()))

    assert worst(x, out)[1] > 1.0  # what the test above would see


def off_in_steps(x, step):
    """The largest errors of K and V in halves of steps of what spreads, and the codecs used."""
    frame, out = round_trip(x, step)
    found = []
    for kv, factor, dims in ((0, 0.7, (0,)), (1, 1.4, (0, 2))):
        most = 0.0
        for a, b in zip(x[0, kv].double().split(256), out[0, kv].double().split(256), strict=True):
            centred = a - a.mean(0)
            sigma = centred.square().mean(dims, keepdim=True).sqrt()
            most = max(most, float(((a - b).abs() / (sigma * factor * step / 2)).max()))
        found.append(most)
    return found, codings(frame)


@pytest.mark.parametrize("step", [1 / 16, 1 / 4])
@pytest.mark.parametrize(
    ("mean", "scale"),
    [(0, 1), (30, 1), (100, 1), (300, 1), (1000, 1), (3000, 1), (0, 1e-3), (0, 1e-5), (0, 1e-8)],
)
def test_the_bound_holds_for_far_means_and_small_values(mean, scale, step):
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(1, 2, 512, 4, 32, generator=rng)
    x = (x + mean * torch.rand(4, 32, generator=rng)) * scale

    (k, v), used = off_in_steps(x, step)

    # exponents are rounded to 1/8 of an octave; the last bit of float32 is 1e-3 of a step then
    assert max(k, v) <= 2 ** (1 / 16) * 1.02 + mean * 2**-23 / step * 6
    assert used == ({"quant"} if 1e-4 < scale and mean < 1000 else used)
    assert scale > 1e-4 or used == {"lossless"}


@pytest.mark.parametrize(("mean", "scale"), [(1e6, 1.0), (1e4, 1e-3), (0.0, 1.0)])
def test_float64_keeps_the_bound(mean, scale):
    x = torch.randn(1, 2, 300, 2, 16, dtype=torch.float64) * scale + mean

    (k, v), _ = off_in_steps(x, 1 / 4)

    assert max(k, v) <= 2 ** (1 / 16) * 1.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_blocks_of_a_value_that_bfloat16_lacks_come_back(dtype):
    x = torch.full((1, 2, 512, 4, 32), 0.1, dtype=dtype)

    _, out = round_trip(x, 1.0)

    assert torch.equal(out, x)


def test_means_that_bfloat16_cannot_tell_from_deviations_are_lossless():
    x = torch.randn(1, 2, 256, 2, 16) * 1e-4 + 7.001
    with Compressor.of(quant_within(0.25)) as compressor:
        frame = compressor.encode(x, layout())

    assert codings(frame) == {"lossless"}


@pytest.mark.parametrize("step", STEPS)
def test_smaller_steps_cost_bits_and_gain_quality(step):
    x = cache(1, 512, 4, 64)

    frame, out = round_trip(x, step)
    other, worse = round_trip(x, step * 1.5)

    assert len(other) < len(frame)
    assert (worse - x).float().norm() > (out - x).float().norm()


def test_steps_below_a_sixteenth_use_escapes_and_keep_the_bound():
    x = cache(1, 256, 4, 16, dtype=torch.float32)
    x[0, 0, 5] *= 30

    frame, out = round_trip(x, 1 / 32)

    assert codings(frame) == {"quant"}
    sigma = x.std(2, correction=0, keepdim=True)
    assert bool(((out - x)[0, 0].abs() <= 0.7 / 32 * sigma[0, 0] * 0.53).all())


def test_outliers_of_one_channel_cost_the_others_nothing():
    x = cache(1, 512, 2, 32, dtype=torch.float32)
    frame, out = round_trip(x)
    wild = x.clone()
    wild[:, 0, ..., 3] *= 128

    other, got = round_trip(wild)

    assert abs(len(other) - len(frame)) < 0.01 * len(frame)
    quiet = [i for i in range(32) if i != 3]
    assert torch.equal(got[:, 0, ..., quiet], out[:, 0, ..., quiet])


@pytest.mark.parametrize(
    "rope",
    [
        half(32),
        half(32, interleaved=True),
        RopeSpec.of(16),
        RopeSpec(tuple(f / 4 for f in half(32).inv_freq)),
    ],
    ids=["half-split", "interleaved", "partial", "scaled"],
)
@pytest.mark.parametrize("position", [0, 100_003])
def test_rope_is_undone_and_redone(rope, position):
    x = cache(2, 600, 2, 32, rope=rope, position=position, dtype=torch.float32)

    frame, out = round_trip(x, rope=rope, first_position=position)
    plain, _ = round_trip(x)

    # before RoPE the channels' means take most of the energy
    assert codings(frame) == {"quant"}
    keys, got = x[:, 0], out[:, 0]
    unroped = torch.stack([rotated(k, _back(rope), position) for k in keys])
    sigma = unroped.std(1, correction=0, keepdim=True)
    assert float((got - keys).norm() / (sigma.expand_as(keys)).norm()) < 0.7 * 0.25 / math.sqrt(11)
    assert len(frame) <= len(plain) * 1.01


def _back(rope):
    return RopeSpec(tuple(-f for f in rope.inv_freq), rope.interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_wrong_rope_convention_is_noticed(interleaved):
    right = half(32, interleaved=interleaved)
    x = cache(4, 300, 2, 32, rope=right)

    round_trip(x, rope=right)
    for wrong in (
        half(32, interleaved=not interleaved),
        half(32, theta=3.0, interleaved=interleaved),
    ):
        with pytest.raises(ConfigError, match="keys contradict the layout's RoPE"):
            round_trip(x, rope=wrong)
    with pytest.raises(ConfigError, match=r"none -?0"):
        round_trip(cache(4, 300, 2, 32, seed=3), rope=right)


def test_a_wrong_order_of_axes_is_noticed():
    rope = half(32)
    x = cache(2, 300, 80, 32, rope=rope).transpose(2, 3).contiguous()

    with pytest.raises(ConfigError, match="seem to be in the wrong order"):
        round_trip(x, rope=rope)
    with pytest.raises(ConfigError, match="seem to be in the wrong order"):
        round_trip(x[:, :, :2], rope=rope)
    round_trip(x.transpose(2, 3), rope=rope)


def test_noise_and_short_keys_pass_the_check():
    rope = half(32)
    noise = torch.randn(4, 2, 300, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()

    round_trip(noise, rope=rope)
    round_trip(cache(1, 5, 2, 32), rope=rope)


def test_one_object_takes_sections_of_any_size_in_turn():
    x = cache(1, 700, 4, 64)
    codec = QuantCodec()
    with Compressor("quant", workers=1) as compressor:
        for tokens in (700, 3, 256, 511):
            part = x[:, :, :tokens]
            encoder = compressor.encoder(part, layout())
            section = encoder.header.geometry.section(0)
            alone = bytes(QuantCodec().pack(part[0, 0], section))
            assert bytes(codec.pack(part[0, 0], section)) == alone
