"""Kernels code with the same bits as the CPU: on a GPU where there is one, else interpreted."""

import pytest
import torch
from codec_data import cache, half, layout, same_bits

from sagellm.comm.kv_transfer.benchmarks import _gpu_kernels, bench_compression
from sagellm.comm.kv_transfer.compression import Compressor, compressor, fixed, quant
from sagellm.comm.kv_transfer.compression.frame import split
from sagellm.core.protocols.bench import Row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("fp8", "int8", "int4")


@pytest.fixture
def on_device(monkeypatch):
    """What dispatches by device takes every tensor for one of a GPU."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    from sagellm.comm.kv_transfer.compression import _triton_fixed, _triton_quant

    calls = []

    def noted(module, name):
        real = getattr(module, name)
        return lambda *a: (calls.append(name), real(*a))[1]

    def there():
        for module in (fixed, quant, compressor):
            monkeypatch.setattr(module, "runs_kernels", lambda _: True)
        for module, name in (
            (_triton_fixed, "encode"), (_triton_fixed, "decode"), (_triton_quant, "quantise"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, noted(module, name))
        return calls

    return there


def codings(frame):
    header, sections = split(memoryview(frame))
    return [header.codings[entry.coding].name for entry, _ in sections]


# masked lanes of the interpreter compute with infinities
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "tokens", "heads", "dim", "options"),
    [
        (torch.bfloat16, 259, 2, 16, {}),
        (torch.float16, 256, 1, 8, {"k": "token", "v": "channel"}),
        (torch.float32, 3, 3, 10, {"k": "group", "v": "group", "group": 5}),
        (torch.float32, 1, 1, 1, {}),
        (torch.bfloat16, 7, 1, 33, {"k": "token"}),
        (torch.float16, 0, 2, 8, {}),
    ],
)
def test_kernels_write_and_read_the_frames_of_the_cpu(
    on_device, name, dtype, tokens, heads, dim, options
):
    x = cache(1, tokens, heads, dim, dtype=dtype)
    if tokens > 2:
        x[0, 0, 1] = 0  # of either sign
        x[0, 0, 1, 0, 0] = -0.0
        x[0, 1, 2] *= 1e-4  # small codes of fp8 are denormal
    with Compressor(name, workers=1, **options) as coder:
        frame = coder.encode(x, layout())
        want = coder.decode(frame)

        calls = on_device()
        got = coder.encode(x.to(DEVICE), layout())
        out = coder.decode(got, torch.zeros_like(x, device=DEVICE))

    assert got == frame
    assert same_bits(out.cpu(), want)
    if tokens > 1:  # one value takes more than two bytes: its frame is lossless
        assert set(codings(frame)) == {name}
        assert calls == ["encode", "encode", "decode", "decode"]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_kernels_cannot_code_is_lossless(on_device, name, bad):
    x = cache(1, 9, 2, 8)
    x[0, 1, 3, 0, 3] = bad

    calls = on_device()
    with Compressor(name, workers=1) as coder:
        frame = coder.encode(x.to(DEVICE), layout())
        out = coder.decode(frame, torch.zeros_like(x, device=DEVICE))

    assert calls == ["encode", "encode", "decode"]
    assert codings(frame)[1] != name
    assert same_bits(out.cpu()[0, 1], x[0, 1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_kernels_take_scattered_tensors_and_leave_gaps(on_device):
    x = cache(1, 20, 2, 8)
    with Compressor("int8", workers=1) as coder:
        frame = coder.encode(x, layout())
        want = coder.decode(frame)

        on_device()
        strided = x.to(DEVICE).transpose(2, 3).contiguous().transpose(2, 3)
        wide = torch.full((1, 2, 20, 2, 16), 7.0, dtype=x.dtype, device=DEVICE)
        assert coder.encode(strided, layout()) == frame
        coder.decode(frame, wide[..., ::2])

    assert same_bits(wide[..., ::2].cpu(), want)
    assert bool((wide[..., 1::2] == 7).all())


@pytest.mark.parametrize("step", [1 / 32, 1 / 4, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_quantiser_writes_the_codes_of_the_cpu(on_device, step, dtype):
    rope = half(8)
    x = cache(1, 261, 2, 12, rope=rope, dtype=dtype)
    with Compressor("quant", workers=1, step=step) as coder:
        frame = coder.encode(x, layout(rope=rope))
        want = coder.decode(frame)

        calls = on_device()
        got = coder.encode(x.to(DEVICE), layout(rope=rope))
        out = coder.decode(got, torch.zeros_like(x, device=DEVICE)).cpu()

    if DEVICE == "cpu":
        assert got == frame
        assert same_bits(out, want)
    else:  # which adds in another order: a mean may differ, and codes that lie on an edge
        assert (out - want).float().norm() < 0.1 * step * x.float().std() * x.numel() ** 0.5
    assert set(calls) == {"quantise"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lossless", "zstd"])
def test_codecs_without_kernels_go_by_way_of_the_cpu(name):
    if DEVICE == "cpu":
        pytest.skip("needs a CUDA GPU")
    rope = half(16)
    x = cache(2, 300, 2, 16, rope=rope)
    with Compressor(name, workers=2) as coder:
        frame = coder.encode(x, layout(rope=rope))
        there = x.to(DEVICE)
        assert coder.encode(there, layout(rope=rope)) == frame
        out = coder.decode(frame, torch.zeros_like(there))
        assert same_bits(out.cpu(), coder.decode(frame))


def test_the_benchmark_of_kernels_refuses_to_run_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert bench_compression.main(["--gpu", "--quick"]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_kernels_are_judged_by_a_copy_of_the_same_run():
    rows = [
        Row(case, name, (seconds,))
        for case in _gpu_kernels.cases(True)
        for name, seconds in (("int8", 2.0), (_gpu_kernels.COPY, 1.5))
    ]

    found = _gpu_kernels.ratios(rows)

    assert [(r.value, r.goal) for r in found] == [(0.75, 0.7)] * 4
