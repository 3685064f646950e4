"""What every codec keeps to, whatever tensors it is given."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from codec_data import AXES, CODECS, cache, half, layout, same_bits

from sagellm.comm.kv_transfer.compression import (
    Compressor,
    TensorLayout,
    section_codec_spec,
)
from sagellm.comm.kv_transfer.compression.frame import split
from sagellm.core.protocols import LayoutMismatchError

LOSSLESS = [n for n in CODECS if section_codec_spec(n).lossless]
LOSSY = [n for n in CODECS if n not in LOSSLESS]
LARGE_MIB = int(os.environ.get("SAGELLM_KV_LARGE_MIB", "256"))


def coded(name, x, **fields):
    with Compressor(name, workers=1) as compressor:
        frame = compressor.encode(x, layout(**fields))
        return frame, compressor.decode(frame)


def coding_names(frame):
    header, sections = split(memoryview(frame))
    return [header.codings[entry.coding].name for entry, _ in sections]


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int8",
              "uint8", "int16", "int32", "int64"],
)  # fmt: skip
def test_lossless_codecs_give_every_dtype_back(name, dtype):
    x = (cache(1, 260, 3, 10) * 8).to(getattr(torch, dtype))

    _, out = coded(name, x)

    assert same_bits(out, x)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lossless_codecs_give_every_bit_pattern_back(name, dtype):
    random = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 256, (1, 2, 300, 2, 32), generator=random, dtype=torch.uint8)
    x = bits.view(dtype)  # NaNs with payloads, infinities, denormals, both zeros

    _, out = coded(name, x)

    assert torch.equal(out.view(torch.uint8), bits)


@pytest.mark.parametrize(
    ("name", "most"), [("quant", 0.1), ("fp8", 0.04), ("int8", 0.02), ("int4", 0.15)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lossy_codecs_stay_close(name, most, dtype):
    x = cache(2, 300, 2, 32, dtype=dtype)

    frame, out = coded(name, x)

    assert set(coding_names(frame)) == {name}
    assert 0 < error(out, x) < most
    assert len(frame) < x.nbytes / 1.7


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 1, 1), (1, 2, 0, 2, 16), (0, 2, 9, 2, 16), (3, 2, 1, 2, 32),
              (1, 2, 257, 3, 32), (1, 2, 255, 1, 224), (2, 2, 513, 5, 32)],
)  # fmt: skip
def test_odd_shapes(name, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()

    _, out = coded(name, x)

    assert out.shape == x.shape
    assert not x.numel() or error(out, x) < 0.2


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [0.0, -1.5, 3e38, 1e-30])
def test_blocks_of_one_value_come_back_and_are_small(name, value):
    x = torch.full((1, 2, 256, 2, 32), value, dtype=torch.bfloat16)

    frame, out = coded(name, x)

    assert torch.equal(out, x) or (name in LOSSY and error(out, x) < 0.03)
    if name in ("quant", "lossless", "zstd"):
        assert len(frame) < x.nbytes / 8


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("where", ["one value", "a token", "a channel"])
def test_outliers_of_a_hundred_times_come_back_and_leave_the_rest_within_reach(name, where):
    x = cache(1, 300, 2, 32)
    at = {"one value": (0, slice(None), 7, 1, 3), "a token": (0, slice(None), 7),
          "a channel": (0, slice(None), slice(None), 1, 3)}[where]  # fmt: skip
    x[at] *= 100

    _, out = coded(name, x)

    assert same_bits(out, x) or (name in LOSSY and error(out, x) < 0.2)
    assert error(out[at], x[at]) < 0.05 or name == "int4"  # sixteen levels


@pytest.mark.parametrize("name", CODECS)
def test_one_compressor_takes_tensors_of_mixed_dtypes_in_turn(name):
    xs = [cache(1, 40, 2, 16, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float16)]
    xs.append((xs[0] * 8).to(torch.int8))
    with Compressor(name, workers=1) as compressor:
        for x in [*xs, *reversed(xs)]:
            alone, want = coded(name, x)
            frame = compressor.encode(x, layout())
            assert frame == alone
            assert same_bits(compressor.decode(frame), want)
            with pytest.raises(LayoutMismatchError, match="does not fit `out`"):
                compressor.decode(frame, torch.zeros(x.shape, dtype=torch.float64))


@pytest.mark.parametrize("name", CODECS)
def test_strides_change_nothing(name):
    x = cache(2, 300, 2, 32)
    frame, want = coded(name, x)
    strided = x.permute(4, 0, 3, 2, 1).contiguous().permute(1, 4, 3, 2, 0)
    other = torch.full((2, 2, 300, 2, 64), 7.0, dtype=x.dtype)

    with Compressor(name, workers=1) as compressor:
        assert compressor.encode(strided, layout()) == frame
        compressor.decode(frame, other[..., ::2])

    assert same_bits(other[..., ::2], want)
    assert bool((other[..., 1::2] == 7).all())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "axes",
    [
        ("block", "kv", "token", "head", "dim"),
        ("kv", "block", "head", "token", "dim"),
        ("kv", "block", "token", "head", "dim"),
    ],
    ids="-".join,
)
def test_padding_of_the_last_page_is_neither_read_nor_written(name, axes):
    tokens, page = 300, 16
    x = cache(1, tokens, 2, 32)
    rows = torch.full((2, 19 * page, 2, 32), float("nan"), dtype=x.dtype)
    rows[:, :tokens] = x[0]
    canonical = ("kv", "block", "token", "head", "dim")
    pages = rows.view(2, 19, page, 2, 32).permute([canonical.index(a) for a in axes]).contiguous()
    out = torch.full_like(pages, 5.0)
    plain, want = coded(name, x)

    with Compressor(name, workers=1) as compressor:
        frame = compressor.encode(pages, TensorLayout(axes, tokens=tokens))
        compressor.decode(frame, out)

    got = out.permute([axes.index(a) for a in canonical]).reshape(rows.shape)
    assert coding_names(frame) == coding_names(plain)
    assert same_bits(got[:, :tokens], want[0])
    assert bool((got[:, tokens:] == 5).all())


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_sections_with_wild_values_are_lossless_and_the_others_are_not(name, bad):
    x = cache(2, 300, 2, 32)
    x[1, 1, 17, 0, 3] = bad

    frame, out = coded(name, x)

    names = coding_names(frame)
    assert names[:3] == [name] * 3
    assert names[3] == "lossless"
    assert same_bits(out[1, 1], x[1, 1])


FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("name", "options"),
    [("quant", {"step": 2.0}), ("quant", {}), ("quant", {"per_channel": True}), ("fp8", {}),
     ("int8", {}), ("int4", {})],
)  # fmt: skip
@pytest.mark.parametrize("rope", [None, half(16)])
def test_values_up_to_the_largest_stay_finite(name, options, dtype, rope):
    kind = getattr(torch, dtype)
    top = min(torch.finfo(kind).max, torch.finfo(torch.float32).max)
    x = cache(1, 300, 2, 16, rope=rope, dtype=torch.float64)
    x = (x / x.abs().amax() * 3 * top).clamp(-top, top).to(kind)
    with Compressor(name, workers=1, **options) as coder:
        out = coder.decode(coder.encode(x, layout(rope=rope)))

    assert bool(torch.isfinite(x.double()).all())
    assert bool(torch.isfinite(out.double()).all())


@pytest.mark.parametrize("name", CODECS)
def test_the_same_bits_on_every_run_with_any_number_of_workers(name):
    rope = half(32)
    x = cache(4, 1100, 2, 32, rope=rope)
    frames = []
    for workers in (1, 2, 5):
        with Compressor(name, workers=workers) as compressor:
            frames += [bytes(compressor.encode(x, layout(rope=rope))) for _ in range(2)]
            out = compressor.decode(frames[-1])

    assert len(set(frames)) == 1
    with Compressor(name, workers=1) as compressor:
        assert same_bits(compressor.decode(frames[0]), out)


def test_eight_threads_at_once_do_as_one():
    rope = half(32)
    xs = [cache(2, 300 + 7 * i, 2, 32, rope=rope, seed=i) for i in range(8)]
    shared = {n: Compressor(n, workers=2) for n in ("quant", "lossless", "zstd-planes", "int4")}
    want = [{n: bytes(c.encode(x, layout(rope=rope))) for n, c in shared.items()} for x in xs]
    failures = []

    def work(x, frames):
        for name, compressor in shared.items():
            for _ in range(3):
                frame = bytes(compressor.encode(x, layout(rope=rope)))
                out = compressor.decode(frame)
                if frame != frames[name] or out.shape != x.shape:
                    failures.append(name)

    threads = [threading.Thread(target=work, args=a) for a in zip(xs, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for compressor in shared.values():
        compressor.close()

    assert not failures
    assert not any(t.is_alive() for t in threads)
    assert not [t for t in threading.enumerate() if t.name.startswith("sagellm-codec")]


def test_tensors_that_are_not_coded_are_named():
    compressor = Compressor("none")
    with pytest.raises(Exception, match="complex64"):
        compressor.encode(torch.zeros(1, 2, 3, 1, 4, dtype=torch.complex64), layout())
    with pytest.raises(Exception, match="meta"):
        compressor.encode(torch.zeros(1, 2, 3, 1, 4, device="meta"), layout())


def test_frames_hold_kinds_of_their_own():
    x = cache(2, 300, 2, 32)
    with Compressor("quant", workers=1) as compressor:
        both = compressor.decode(compressor.encode(x, layout()))
        for kind, index in (("k", 0), ("v", 1)):
            axes = tuple(a for a in AXES if a != "kv")
            frame = compressor.encode(x[:, index], TensorLayout(axes, kind=kind))
            assert same_bits(compressor.decode(frame), both[:, index])


LARGE = """
import resource, sys, torch
from sagellm.comm.kv_transfer.compression import Compressor, RopeSpec, TensorLayout
mib, name = int(sys.argv[1]), sys.argv[2]
rows = torch.randn(1, 2, 1024, 8, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
x = rows.expand(mib // 4, 2, 1024, 8, 128)  # takes no memory of its own
layout = TensorLayout(("layer", "kv", "token", "head", "dim"), rope=RopeSpec.of(128))
with Compressor(name, workers=2, max_bytes=4 << 30) as compressor:
    compressor.decode(compressor.encode(x[:1], layout))
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    before = peak()
    frame = compressor.encode(x, layout)
    encoded = peak() - before - len(frame)
    out = compressor.decode(frame)
    decoded = peak() - before - len(frame) - out.nbytes
assert out.shape == x.shape and out.nbytes == mib << 20
print(encoded, decoded)
"""


@pytest.mark.timeout(max(120, LARGE_MIB // 4 + 30))
@pytest.mark.parametrize("name", ["quant", "lossless"])
def test_a_large_tensor_takes_no_more_memory_than_stated(name):
    arguments = [sys.executable, "-c", LARGE, str(LARGE_MIB), name]

    seconds = max(110, LARGE_MIB // 4)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=seconds)

    assert done.returncode == 0, done.stderr
    encoded, decoded = map(int, done.stdout.split())
    assert encoded <= 2 * (64 << 20)
    assert decoded <= 2 * (64 << 20)
