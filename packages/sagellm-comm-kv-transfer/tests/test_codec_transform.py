"""`transform`: its bound, what it refuses, and bases that somebody has made up."""

import random
import threading

import numpy as np
import pytest
import torch
from basis_data import DIM, HEADS, LAYERS, ROPE, correlated, fitted
from codec_data import half, layout, same_bits

from sagellm.comm.kv_transfer.compression import Compressor, RopeSpec
from sagellm.comm.kv_transfer.compression.basis import LIMIT, Basis, BasisInfo
from sagellm.comm.kv_transfer.compression.basis_fit import BasisFit
from sagellm.comm.kv_transfer.compression.basis_store import BASES
from sagellm.comm.kv_transfer.compression.frame import split
from sagellm.comm.kv_transfer.compression.transform import turn_keys
from sagellm.comm.kv_transfer.compression.transform_code import decode_rows, encode_rows
from sagellm.core.protocols import (
    CommError,
    ConfigError,
    IntegrityError,
    LayoutMismatchError,
)


def coded(basis, x, step=0.25, workers=1, **fields):
    with Compressor("transform", workers=workers, basis=basis.fingerprint, step=step) as c:
        frame = c.encode(x, layout(**{"rope": ROPE, **fields}))
        return frame, c.decode(frame)


def names(frame):
    header, sections = split(memoryview(frame))
    return [header.codings[entry.coding].name for entry, _ in sections]


def before_rope(x, rope=ROPE, position=0):
    x = x.float().clone()
    for layer in x:
        turn_keys(layer[0], rope, position, undo=True)
    return x


@pytest.mark.parametrize("join", [1, 2, LAYERS])
@pytest.mark.parametrize("step", [1 / 32, 0.25, 1.0])
def test_no_value_moves_further_than_promised(bases, join, step):
    x = correlated(500, 1, position=77)

    frame, out = coded(bases[join], x, step, first_position=77)

    assert set(names(frame)) == {"transform"}
    moved = (before_rope(out, position=77) - before_rope(x, position=77)).abs()
    for layer in range(LAYERS):
        at = slice(layer % join * HEADS * DIM, (layer % join + 1) * HEADS * DIM)
        for index, kind in enumerate("kv"):
            weight = bases[join].part(kind, layer).weight[at].view(HEADS, DIM)
            assert bool((moved[layer, index] * weight <= LIMIT * step * 1.001 + 1e-4).all())
    sigma = before_rope(x).std(2, keepdim=True)
    assert bool((moved <= bases[join].bound(step) * sigma * 1.2).all())
    assert float(moved.square().mean().sqrt()) < 0.4 * step * float(sigma.max())


def test_what_moves_together_costs_little_and_more_so_across_layers(bases):
    x = correlated(1024, 2).bfloat16()
    with Compressor("quant", workers=1, step=0.25) as quant:
        plain = quant.encode(x, layout(rope=ROPE))

    sizes = [len(coded(bases[join], x)[0]) for join in (1, 2, LAYERS)]

    assert sizes[0] < 0.8 * len(plain)
    assert sizes[0] > sizes[1] > sizes[2]


def test_larger_steps_cost_fewer_bits(bases):
    x = correlated(600, 3)

    found = [coded(bases[1], x, step) for step in (0.1, 0.2, 0.4, 0.8)]

    sizes, errors = [len(f) for f, _ in found], [float((o - x).norm()) for _, o in found]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


@pytest.mark.parametrize("join", [1, LAYERS])
@pytest.mark.parametrize("tokens", [0, 1, 255, 257, 900])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_number_of_tokens(bases, join, tokens, dtype):
    x = correlated(max(tokens, 1), 4).to(dtype)[:, :, :tokens]

    _, out = coded(bases[join], x)

    assert out.dtype == dtype
    assert out.shape == x.shape
    assert not tokens or float((out - x).float().norm() / x.float().norm()) < 0.15


@pytest.mark.parametrize("join", [1, LAYERS])
def test_strides_pages_and_padding(bases, join):
    x = correlated(300, 5).bfloat16()
    _, want = coded(bases[join], x)
    axes = ("layer", "block", "kv", "head", "token", "dim")
    pages = torch.full((LAYERS, 19, 2, HEADS, 16, DIM), float("nan"), dtype=x.dtype)
    rows = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 4), value=float("nan"))
    pages.copy_(rows.view(LAYERS, 2, 19, 16, HEADS, DIM).permute(0, 2, 1, 4, 3, 5))
    out = torch.full_like(pages, 5.0)

    with Compressor("transform", workers=2, basis=bases[join].fingerprint) as c:
        c.decode(c.encode(pages, layout(axes=axes, tokens=300, rope=ROPE)), out)

    got = out.permute(0, 2, 1, 4, 3, 5).reshape(rows.shape)
    assert same_bits(got[:, :, :300], want)
    assert bool((got[:, :, 300:] == 5).all())


@pytest.mark.parametrize("join", [1, LAYERS])
def test_some_layers_alone_and_sections_alone(bases, join):
    x = correlated(300, 6)
    frame, want = coded(bases[join], x)
    header, sections = split(memoryview(frame))
    out = torch.zeros_like(x)
    with Compressor("transform", basis=bases[join].fingerprint) as c:
        from sagellm.comm.kv_transfer.compression import Decoder

        decoder = Decoder(header, out)
        for index in reversed(range(len(sections))):
            decoder.section(index, *sections[index])
        assert torch.equal(out, want)
        if join > 1:
            with pytest.raises(ConfigError, match="sections of 4 layers"):
                c.encode(x[:1], layout(rope=ROPE))
            return
        part = c.decode(c.encode(x[2:], layout(rope=ROPE, first_layer=2)))
    assert torch.equal(part, want[2:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_wild_sections_are_coded_otherwise_and_the_rest_is_not(bases, bad):
    x = correlated(300, 7)
    x[1, 1, 17, 0, 3] = bad

    frame, out = coded(bases[1], x)

    found = names(frame)
    assert found[3] == "lossless"
    assert set(found[:3] + found[4:]) == {"transform"}
    assert same_bits(out[1, 1], x[1, 1])


def test_values_unlike_the_calibration_are_coded_otherwise(bases):
    random_ = torch.Generator().manual_seed(0)
    noise = 50 * torch.randn(LAYERS, 2, 300, HEADS, DIM, generator=random_)
    noise[2:] *= 1e4

    frame, out = coded(bases[1], noise)

    assert names(frame) == ["quant"] * 4 + ["lossless"] * 4
    assert 0 < float((out - noise)[:2].norm() / noise[:2].norm()) < 0.15
    assert same_bits(out[2:], noise[2:])


@pytest.mark.parametrize("size", [0.1, 0.3, 1.0])
def test_the_bound_holds_for_text_that_is_unlike_the_calibration(bases, size):
    x = correlated(300, 11)
    x += size * x[:, :, :, :, torch.randperm(DIM, generator=torch.Generator().manual_seed(1))]

    frame, out = coded(bases[1], x)

    moved = (before_rope(out) - before_rope(x)).abs()
    found = names(frame)
    for layer in range(LAYERS):
        for index, kind in enumerate("kv"):
            weight = bases[1].part(kind, layer).weight.view(HEADS, DIM)
            held = bool((moved[layer, index] * weight <= LIMIT * 0.25 * 1.01).all())
            assert held or found[2 * layer + index] == "quant"


@pytest.mark.parametrize(
    ("fields", "take"),
    [
        ({"model": "another"}, slice(None)),
        ({"rope": None}, slice(None)),
        ({"rope": half(DIM, theta=500.0)}, slice(None)),
        ({"rope": half(DIM, interleaved=True)}, slice(None)),
        ({"first_layer": 1}, slice(None)),
    ],
)
def test_tensors_of_another_model_are_refused_and_both_are_named(bases, fields, take):
    x = correlated(80, 8)[:, :, take]

    with pytest.raises(LayoutMismatchError, match="4 layers, 2 heads of 16") as e:
        coded(bases[1], x, **fields)

    assert bases[1].fingerprint[:12] in str(e.value)
    assert str(fields.get("model", "layers")) in e.value.theirs
    with pytest.raises(LayoutMismatchError, match="3 heads of 16"):
        coded(bases[1], torch.zeros(4, 2, 80, 3, 16))


def test_a_frame_needs_its_basis(bases):
    basis, x = fitted(model="n"), correlated(80, 9)
    BASES.put(basis)
    frame, want = coded(basis, x)
    BASES.drop(basis.fingerprint)
    plain = Compressor("none", workers=1)

    def elsewhere():  # the thread that encoded still holds it
        try:
            found.append(plain.decode(frame))
        except CommError as e:
            found.append(e)

    for expect in (IntegrityError, torch.Tensor):
        found = []
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(30)
        assert isinstance(found[0], expect), found
        BASES.put(basis.data)
    BASES.drop(basis.fingerprint)
    assert torch.equal(found[0], want)
    with pytest.raises(ConfigError, match="no basis 'abc' here"):
        Compressor("transform", basis="abc")
    with pytest.raises(ConfigError, match="basis"):
        Compressor("transform")
    with pytest.raises(ConfigError, match="step 9"):
        Compressor("transform", basis=bases[1].fingerprint, step=9.0)


def test_the_same_bits_from_any_thread(bases):
    x = correlated(900, 10).bfloat16()
    want, out = coded(bases[2], x)
    found = []

    def work(workers):
        for _ in range(3):
            frame, got = coded(bases[2], x, workers=workers)
            found.append(frame == want and same_bits(got, out))

    threads = [threading.Thread(target=work, args=(1 + i % 2,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert found == [True] * 24


def test_the_same_windows_give_the_same_basis_and_files_come_back(tmp_path, bases):
    path = tmp_path / "basis.safetensors"
    bases[2].save(path)

    again = Basis.load(path)

    assert fitted(2).data == bases[2].data == again.data
    assert again.fingerprint == bases[2].fingerprint
    assert again.info.tokens == 1200
    assert again.info.rope == ROPE
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = load_file(path)
    assert tensors["k.1.matrix"].shape == (2 * HEADS * DIM,) * 2
    assert torch.equal(tensors["v.0.mean"], again.part("v", 1).mean)


def test_queries_decide_which_keys_are_coded_finely(bases):
    fit = BasisFit(BasisInfo("m", LAYERS, HEADS, DIM, 1, "float32", "", 0, ROPE.inv_freq))
    for seed in (0, 1):
        x = correlated(400, seed)
        q = torch.ones(LAYERS, 400, 2 * HEADS, DIM)
        q[..., 3::8] *= 6  # both channels of a pair
        fit.add(x[:, 0], x[:, 1], q)

    weight = fit.finish("").part("k", 0).weight.view(HEADS, DIM)

    assert float(weight[0, 3] / weight[0, 2]) == pytest.approx(6)
    with pytest.raises(ConfigError, match="queries or none"):
        fit.add(x[:, 0], x[:, 1])


def test_outlier_channels_of_keys_change_little():
    def kl(scale):
        fit = BasisFit(BasisInfo("m", LAYERS, HEADS, DIM, 1, "float32", "", 0, ROPE.inv_freq))
        for seed in (0, 1):
            x = correlated(400, seed)
            fit.add(x[:, 0] * scale, x[:, 1], torch.ones(LAYERS, 400, HEADS, DIM) / scale)
        basis = fit.finish("")
        BASES.put(basis)
        x = correlated(400, 5)
        x[:, 0] *= scale
        frame, out = coded(basis, x)
        BASES.drop(basis.fingerprint)
        return len(frame), (out - x)[:, 0] / scale

    scale = torch.ones(DIM)
    scale[[3, 11]] = 64.0
    (size, error), (other, turned) = kl(torch.ones(DIM)), kl(scale)

    assert other == pytest.approx(size, rel=0.01)
    assert float(turned.norm()) == pytest.approx(float(error.norm()), rel=0.03)


def test_calibration_refuses_what_cannot_be_fitted():
    info = BasisInfo("m", LAYERS, HEADS, DIM, 1, "float32", "", 0)
    x = correlated(50, 0, rope=None)
    fit = BasisFit(info)
    with pytest.raises(ConfigError, match="not finite"):
        fit.add(x[:, 0] * float("nan"), x[:, 1])
    with pytest.raises(ConfigError, match="want"):
        fit.add(x[:2, 0], x[:2, 1])
    with pytest.raises(ConfigError, match="at least two"):
        BasisFit(info).finish("")
    for fields, words in (
        ((LAYERS, HEADS, DIM, 3), "must divide"),
        ((80, 8, 128, 80), "join fewer layers"),
    ):
        with pytest.raises(ConfigError, match=words):
            BasisFit(BasisInfo("m", *fields, "float32", "", 0))


def test_channels_that_never_move_are_no_trouble():
    fit = BasisFit(BasisInfo("m", LAYERS, HEADS, DIM, LAYERS, "float32", "", 0))
    for seed in (0, 1):
        x = correlated(300, seed, rope=None)
        x[..., 5] = 2.0
        x[1] = 0.0
        fit.add(x[:, 0], x[:, 1])
    basis = fit.finish("")
    BASES.put(basis)

    frame, out = coded(basis, x, rope=None)

    BASES.drop(basis.fingerprint)
    assert set(names(frame)) == {"transform"}
    assert float((out - x).abs()[..., 5].max()) < 0.3
    assert float((out - x)[1].abs().max()) < 0.6


@pytest.mark.parametrize("seed", range(20))
def test_rows_come_back_whatever_they_hold(seed):
    source = np.random.default_rng(seed)
    rows, tokens = int(source.integers(1, 60)), int(source.integers(1, 300))
    ratio = np.sort(np.exp(source.normal(-1, 2, rows)).astype(np.float32))[::-1].copy()
    q = np.rint(source.standard_t(4, (rows, tokens)) * ratio[:, None])
    q = q.clip(-32767, 32767).astype(np.int16)
    if seed == 0:
        q[:] = 0
    if seed == 1:
        q[0, :2] = 32767, -32767

    payload = encode_rows(q, ratio)

    assert payload is None or np.array_equal(decode_rows(memoryview(payload), tokens, ratio), q)
    assert payload is not None or seed > 1


def test_no_mutant_of_a_section_crashes_or_fills_memory(bases):
    source = random.Random(4)
    part = bases[1].part("k", 0)
    ratio = part.deviation / np.float32(0.25)
    codes = np.rint(np.random.default_rng(0).normal(0, 1, (len(ratio), 64)) * ratio[:, None])
    payload = encode_rows(codes.astype(np.int16), ratio)
    for _ in range(4000):
        changed = bytearray(payload)
        for _ in range(source.choice((1, 2, 4))):
            at = source.randrange(len(changed) if source.random() < 0.5 else 92)
            changed[at] = source.randrange(256)
        try:
            out = decode_rows(memoryview(bytes(changed)), 64, ratio)
        except IntegrityError:
            continue
        assert out.shape == codes.shape


def test_rope_specs_are_compared_as_they_are_stored(bases):
    with pytest.raises(LayoutMismatchError):
        coded(bases[1], correlated(80, 0), rope=RopeSpec(tuple(f + 1e-9 for f in ROPE.inv_freq)))
