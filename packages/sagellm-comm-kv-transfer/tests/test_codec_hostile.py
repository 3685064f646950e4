"""What a hostile sender can name in a frame: options, codecs, shapes and scales."""

import os
import random
import struct
import subprocess
import sys
import threading

import pytest
import torch
from codec_data import cache, layout

from sagellm.comm.kv_transfer.compression import Compressor, Decoder, compressor
from sagellm.comm.kv_transfer.compression.frame import Coding, Header
from sagellm.core.protocols import ConfigError, IntegrityError


def decoded(frame_of, codings, x, payload=None, index=0, number=0):
    """A section under a header that names other codings, with true checksums."""
    header = Header(frame_of.header.geometry, frame_of.header.dtype, codings)
    if payload is None:
        payload = bytes(frame_of.section(index)[1])
    entry = header.entry(index, memoryview(header.seal(index, number, payload)))
    out = torch.zeros_like(x)
    Decoder(header, out).section(index, entry, memoryview(payload))
    return out


def encoder(name, x, **options):
    return Compressor(name, workers=1, **options).encoder(x, layout())


@pytest.mark.parametrize(
    ("name", "good", "options"),
    [
        ("int8", {"k": "group", "v": "group", "group": 1}, {"group": 1.0}),
        ("int8", {"k": "group", "v": "group", "group": 1}, {"group": True}),
        ("int4", {"k": "group", "v": "group", "group": 16}, {"group": 16.0}),
        ("zstd", {"level": 1}, {"level": 1.0}),
        ("zstd", {"level": 1}, {"level": True}),
        ("lz4", {"acceleration": 1}, {"acceleration": 1.0}),
        ("quant", {"step": 1}, {"step": True}),
        ("quant", {"per_channel": True}, {"per_channel": 1}),
    ],
)
def test_an_option_of_another_type_is_refused_and_good_frames_stay_good(name, good, options):
    x = cache(1, 40, 2, 16, dtype=torch.float32).round()
    sender = encoder(name, x, **good)
    kept = bytes(sender.section(0)[1])
    bad = Coding(name, {**good, **options})

    with pytest.raises(IntegrityError, match="is not of type"):
        decoded(sender, (bad,), x, kept)
    with pytest.raises(ConfigError, match="is not of type"):
        Compressor.of(bad)
    out = decoded(sender, (Coding(name, good),), x, kept)

    assert torch.count_nonzero(out)


def test_groups_that_do_not_divide_heads_are_refused_before_anything_is_coded():
    x = cache(1, 40, 2, 16)
    sender = encoder("int8", x)
    bad = Coding("int8", {"k": "group", "group": 7})

    with pytest.raises(ConfigError, match="groups of 7"):
        Compressor.of(bad).encoder(x, layout())
    with pytest.raises(IntegrityError, match="groups of 7"):
        decoded(sender, (bad,), x)


@pytest.mark.parametrize("error", [TypeError, ValueError, OverflowError, RuntimeError, IndexError])
def test_whatever_a_codec_trips_over_is_damage(monkeypatch, error):
    from sagellm.comm.kv_transfer.compression.plain import NoneCodec

    def trip(*_):
        raise error("odd")

    x = cache(1, 40, 2, 16)
    sender = encoder("none", x)
    monkeypatch.setattr(NoneCodec, "unpack", trip)

    with pytest.raises(IntegrityError, match=rf"section 0 .*{error.__name__}: odd"):
        decoded(sender, sender.header.codings, x)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0xFF80, 0xBF80, 0x0000, 0x8000])
def test_scales_that_nobody_writes_are_refused(name, bits):
    x = cache(1, 300, 2, 16)
    sender = encoder(name, x)
    for index in (0, 1):  # by channel, whose last scales are those of a cut of their own; by token
        good = bytes(sender.section(index)[1])
        decoded(sender, sender.header.codings, x, good, index)
        for at in (0, 2 * 16 * 2 - 2):
            payload = good[:at] + bits.to_bytes(2, "little") + good[at + 2 :]
            with pytest.raises(IntegrityError, match="not finite or not positive"):
                decoded(sender, sender.header.codings, x, payload, index)


def test_minima_that_are_not_finite_are_refused():
    x = cache(1, 256, 2, 16)
    sender = encoder("int4", x)
    good = bytes(sender.section(0)[1])
    payload = good[:64] + b"\x80\x7f" + good[66:]

    with pytest.raises(IntegrityError, match="not finite"):
        decoded(sender, sender.header.codings, x, payload)


@pytest.mark.parametrize("code", [b"\x7f", b"\xff"])
def test_codes_of_fp8_that_are_no_numbers_are_refused(code):
    x = cache(1, 256, 2, 16)
    sender = encoder("fp8", x)
    good = bytes(sender.section(0)[1])

    with pytest.raises(IntegrityError, match="no number"):
        decoded(sender, sender.header.codings, x, good[:-1] + code)


def test_wide_rows_take_no_more_room_than_their_values():
    script = """
import resource, torch
from sagellm.comm.kv_transfer.compression import Compressor, TensorLayout
x = torch.randn(1, 1 << 20)
coder = Compressor("quant", workers=1)
coder.encode(x[:, :64], TensorLayout(("token", "dim")))
with open("/proc/self/statm") as f:
    used = int(f.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20),) * 2)
out = coder.decode(coder.encode(x, TensorLayout(("token", "dim"))))
assert bool(out.isfinite().all())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=100)

    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.parametrize(
    "codings",
    [
        [Coding("quant", {"step": 0.25 + i / 100}) for i in range(12)],
        [Coding("int4", {"group": 1 + i}) for i in range(12)],
    ],
)
def test_many_codings_share_the_room_of_a_worker(codings):
    x = torch.randn(1, 1, 1 << 14, 1, 256).to(torch.float8_e5m2).bfloat16().expand(1, 2, -1, 1, -1)
    kept = []

    def work():  # a thread's codecs go with it
        for coding in codings:
            Compressor.of(coding).encode(x, layout())
            held = compressor._bench()._codecs.values()
            kept.append(sum(codec.held_bytes for codec in held))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(100)

    assert len(kept) == len(codings)
    assert min(kept) > 1 << 20
    assert max(kept) < 20 << 20


def test_escapes_of_lossless_must_rise():
    x = cache(1, 300, 2, 16)
    x[0, 0, 3, 0, 1] = x[0, 0, 9, 1, 4] = 1e-20
    sender = encoder("lossless", x)
    good = bytes(sender.section(0)[1])
    at = 2 * 5 + 2 * 32  # heads of planes, maxima of two chunks
    assert int.from_bytes(good[at : at + 4], "little") >= 2
    first = good[at + 4 : at + 8]
    for payload in (good[: at + 8] + first + good[at + 12 :],
                    good[: at + 4] + good[at + 8 : at + 12] + first + good[at + 12 :]):  # fmt: skip
        with pytest.raises(IntegrityError, match="out of order"):
            decoded(sender, sender.header.codings, x, payload)
    decoded(sender, sender.header.codings, x, good)


NUMBERS = (0, 1, 3, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1)
NAMES = ("quant", "int8", "int4", "fp8", "lossless", "lossless-fast", "zstd", "none", "lz4", "x")
KEYS = ("step", "k", "v", "group", "level", "acceleration", "per_channel", "self", "inner")
VALUES = (True, False, 0, 1, 8, 8.0, 7, 32.5, -1, 2**63, 0.25, 1.0, 1e300, float("nan"), "",
          "group", "token", "channel")  # fmt: skip
MUTANTS = int(os.environ.get("SAGELLM_KV_FUZZ_MUTANTS", "4000")) // 2


def mangled(payload, source):
    data = bytearray(payload)
    for _ in range(source.choice((0, 1, 1, 2, 4))):
        if len(data) < 8:
            break
        at = source.randrange(min(len(data) - 4, source.choice((24, 1 << 30))))
        match source.randrange(5):
            case 0:
                struct.pack_into("<I", data, at, source.choice(NUMBERS))
            case 1:
                data[at] = source.randrange(256)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + source.randrange(1, 50)]
            case 4:
                data[at:at] = source.randbytes(source.randrange(1, 9))
    return bytes(data)


def some_coding(source):
    if source.random() < 0.2:  # all but the one whose frame must stay good
        return Coding("int8", {"group": 8.0, "k": "group", "v": "group"})
    chosen = source.sample(KEYS, source.randrange(4))
    return Coding(source.choice(NAMES), {key: source.choice(VALUES) for key in chosen})


@pytest.mark.timeout(max(120, MUTANTS // 250))
def test_no_coding_and_no_payload_does_worse_than_be_refused():
    source = random.Random(7)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e5m2)
    seeds = []
    for name in ("quant", "int8", "int4", "fp8", "lossless", "lossless-fast", "zstd-planes"):
        for dtype in dtypes:
            x = cache(1, source.choice((1, 40, 300)), 2, 24, dtype=torch.float32).to(dtype)
            frame = encoder(name, x)
            payloads = [frame.section(i)[1] for i in range(2)]
            seeds.append((x, frame, [bytes(p) for p in payloads]))
    x = cache(1, 300, 2, 16, dtype=torch.float32)
    with Compressor("int8", workers=1, k="group", v="group", group=8) as good:
        frame = good.encode(x, layout())
        want = good.decode(frame)
        refused = 0

        for number in range(MUTANTS):
            y, sender, payloads = source.choice(seeds)
            index = source.randrange(2)
            codings = sender.header.codings
            if source.random() < 0.5:
                codings = (some_coding(source), *codings)
            payload = mangled(payloads[index], source)[
                : sender.header.geometry.section_bytes(index)
            ]
            try:
                decoded(sender, codings, y, payload, index)
            except IntegrityError:
                refused += 1
            if number % 50 == 0:
                assert torch.equal(good.decode(frame), want), number

    assert MUTANTS // 4 < refused < MUTANTS
