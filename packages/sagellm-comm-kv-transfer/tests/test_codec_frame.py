"""Frames: what they say, and that nothing false gets through."""

import os
import random
import resource
import struct

import pytest
import torch
import xxhash
from codec_data import CODECS, cache, half, layout, same_bits

from sagellm.comm.kv_transfer.compression import Compressor, Decoder
from sagellm.comm.kv_transfer.compression.frame import ENTRY_BYTES, Header, split
from sagellm.core.protocols import (
    ConfigError,
    IntegrityError,
    LayoutMismatchError,
    ResourceError,
)

MUTANTS = int(os.environ.get("SAGELLM_KV_FUZZ_MUTANTS", "4000"))


def frame_of(codec="quant", **fields):
    rope = half()
    x = cache(1, 40, 2, 16, rope=rope)
    return bytes(Compressor(codec, workers=1).encode(x, layout(rope=rope, **fields)))


def resealed(frame):
    """The frame with every checksum recomputed, as a hostile sender would."""
    if len(frame) < 16:
        return frame
    frame = bytearray(frame)
    _, length, count = struct.unpack_from("<QII", frame)
    at = 16 + length
    if at + 8 > len(frame):
        return bytes(frame)
    digest = xxhash.xxh3_64_intdigest(frame[:at])
    struct.pack_into("<Q", frame, at, digest)
    at += 8
    payload = at + count * ENTRY_BYTES
    for i in range(count):
        if at + ENTRY_BYTES > len(frame):
            break
        (nbytes,) = struct.unpack_from("<I", frame, at)
        struct.pack_into(
            "<Q", frame, at + 8, xxhash.xxh3_64_intdigest(frame[payload : payload + nbytes], seed=i)
        )
        entry = xxhash.xxh3_64_intdigest(frame[at : at + 16], seed=digest ^ i)
        struct.pack_into("<Q", frame, at + 16, entry)
        at, payload = at + ENTRY_BYTES, payload + nbytes
    return bytes(frame)


def mutant(frame, source):
    data = bytearray(frame)
    for _ in range(source.choice((1, 1, 2, 5))):
        if not data:
            break
        at = source.randrange(len(data) if source.random() < 0.5 else min(len(data), 400))
        match source.randrange(6):
            case 0:
                data[at] ^= 1 << source.randrange(8)
            case 1:
                data[at] = source.randrange(256)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + source.randrange(1, 9)]
            case 4:
                data[at:at] = source.randbytes(source.randrange(1, 9))
            case 5:
                wild = source.choice((0, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
                data[at : at + 4] = wild.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.timeout(max(120, MUTANTS // 500))
def test_no_mutant_crashes_misleads_or_fills_memory():
    source = random.Random(20)
    compressor = Compressor("none", workers=1, max_bytes=1 << 20)
    frames = [frame_of(name) for name in CODECS]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decoded = 0

    for number in range(MUTANTS):
        original = frames[number // 2 % len(frames)]
        data = mutant(original, source)
        if hostile := number % 2 == 0:
            data = resealed(data)
        try:
            out = compressor.decode(data)
        except (IntegrityError, LayoutMismatchError, ResourceError):
            continue
        decoded += 1
        assert hostile or data == original, f"mutant {number} was not noticed"
        header = Header.parse(memoryview(data))
        assert tuple(out.shape) == header.geometry.shape
        assert out.nbytes <= 1 << 20

    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < (1 << 20) + (64 << 20)
    assert decoded > MUTANTS // 100


def test_a_frame_says_what_it_holds():
    frame = frame_of(first_layer=3, first_position=70, model="m")

    header, sections = split(memoryview(frame))

    assert header.dtype == "bfloat16"
    assert header.codings[0].name == "quant"
    assert header.geometry.shape == (1, 2, 40, 2, 16)
    got = header.geometry.layout
    assert (got.first_layer, got.first_position, got.model) == (3, 70, "m")
    assert got.rope == half()
    assert len(sections) == 2
    assert len(frame) < 3000


@pytest.mark.parametrize("codec", CODECS)
def test_sections_decode_alone_and_in_any_order(codec):
    x = cache(3, 300, 2, 16)
    compressor = Compressor(codec, workers=1)
    frame = memoryview(compressor.encode(x, layout()))
    want = compressor.decode(frame)
    _, sections = split(frame)
    out = torch.zeros_like(x)

    decoder = Decoder(Header.parse(frame), out)
    for i in reversed(range(len(sections))):
        decoder.section(i, *sections[i])

    assert len(sections) == 6
    assert same_bits(out, want)


def test_a_stream_of_sections_is_the_frame():
    x = cache()
    compressor = Compressor("lossless")
    encoder = compressor.encoder(x, layout())

    parts = [(entry, bytes(payload)) for entry, payload in encoder]

    joined = encoder.header.data + b"".join(e for e, _ in parts) + b"".join(p for _, p in parts)
    assert joined == bytes(compressor.encode(x, layout()))


def test_a_section_of_another_frame_or_place_is_refused():
    x = cache()
    compressor = Compressor("none", workers=1)
    header, sections = split(memoryview(compressor.encode(x, layout())))
    other = compressor.encoder(x, layout(first_position=1)).header
    decoder = Decoder(header, torch.empty_like(x))
    entry = compressor.encoder(x, layout()).section(0)[0]

    with pytest.raises(IntegrityError, match="another section"):
        header.entry(1, memoryview(entry))
    with pytest.raises(IntegrityError, match="another section"):
        other.entry(0, memoryview(entry))
    with pytest.raises(IntegrityError, match="changed on the way"):
        decoder.section(1, *sections[0])


def test_values_that_do_not_fit_the_receiver_are_refused_before_they_are_decoded():
    compressor = Compressor("none", max_bytes=100)
    frame = frame_of()

    with pytest.raises(ResourceError, match="`max_bytes` allows 100"):
        compressor.decode(frame)
    with pytest.raises(LayoutMismatchError, match="does not fit `out`"):
        compressor.decode(frame, torch.empty(1, 2, 40, 2, 16))
    with pytest.raises(LayoutMismatchError, match="another layout"):
        compressor.decode(
            frame, torch.empty(1, 2, 40, 2, 16, dtype=torch.bfloat16), layout=layout()
        )


@pytest.mark.parametrize("codec", ["quant", "lossless", "lossless-fast", "zstd", "zstd-planes"])
@pytest.mark.parametrize("size", [1 << 28, 1 << 40, 16])
def test_zstd_frames_that_lie_about_their_size_are_refused(codec, size):
    # a frame of one block of repeated bytes whose header declares `size`
    lie = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + b"\x03\x00\x10\x41"
    frame = frame_of(codec)
    header, sections = split(memoryview(frame))
    entry, payload = sections[0]
    start = payload.tobytes().find(b"\x28\xb5\x2f\xfd")
    swapped = payload.tobytes()[:start] + lie
    if codec.startswith("lossless"):  # the lengths of both planes stand before them
        swapped = swapped[:1] + struct.pack("<I", len(swapped) - 10) + swapped[5:]
    first = header.payload_offset
    data = bytearray(frame[:first] + swapped + frame[first + entry.nbytes :])
    struct.pack_into("<I", data, len(header.data), len(swapped))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    assert start >= 0
    with pytest.raises(IntegrityError, match=r"zstd frame|does not hold|bytes of"):
        Compressor("none", workers=1).decode(resealed(bytes(data)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def test_a_codec_that_is_not_installed_is_named():
    frame = frame_of().replace(b"\xa5quant", b"\xa5quanX")

    with pytest.raises(IntegrityError, match="'quanX'"):
        Compressor("none").decode(resealed(frame))


def test_a_shape_larger_than_the_sections_that_came_is_refused():
    x = torch.zeros(2, 2, 512, 8, 64, dtype=torch.bfloat16)
    frame = bytes(Compressor("zstd").encode(x, layout()))
    header, _ = split(memoryview(frame))

    for short in (frame[: len(header.data)], frame[: header.payload_offset - 1], frame[:-1]):
        with pytest.raises(IntegrityError):
            Compressor("none").decode(short)


@pytest.mark.parametrize(
    ("shape", "fields", "said"),
    [
        ((2, 2, 8, 2), {}, "does not have axes"),
        ((2, 3, 8, 2, 4), {}, "kv axis has length 3"),
        ((2, 2, 8, 2, 4), {"tokens": 9}, "9 tokens in a tensor for 8"),
        ((2, 2, 8, 2, 4), {"rope": half(8)}, "RoPE over 8 channels of heads of 4"),
        ((1, 2, 1, 1, 1 << 23), {}, "one token takes"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(shape, fields, said):
    with pytest.raises(ConfigError, match=said):
        Compressor("none").encode(torch.zeros(shape, dtype=torch.bfloat16), layout(**fields))


@pytest.mark.parametrize("fields", [{"axes": ("token",)}, {"axes": ("token", "dim", "dim")},
                                    {"axes": ("token", "dim", "x")}, {"kind": "q"},
                                    {"first_position": -1}])  # fmt: skip
def test_layouts_without_sense_are_refused(fields):
    with pytest.raises(ConfigError):
        layout(**fields)


def test_options_that_a_codec_lacks_are_refused():
    for codec, options in [("quant", {"step": 99.0}), ("zstd", {"level": 99}), ("int8", {"k": "x"}),
                           ("quant", {"bits": 4}), ("none", {"step": 1.0})]:  # fmt: skip
        with pytest.raises(ConfigError):
            Compressor(codec, **options)
