"""The codec suite passes sound codecs, and catches each seeded bug."""

import zlib

import pytest

from sagellm.core.protocols import CodecSpec, IntegrityError, KVCodec, Probe
from sagellm.core.protocols.errors import BackendUnavailableError
from sagellm.core.protocols.testing import check_codec


class Zlib(KVCodec):
    """Length, then a zlib stream; whole frames are checked."""

    def encode(self, block, *, dtype):
        return zlib.compress(bytes(block), 1)

    def decode(self, frame, out, *, dtype):
        stream = zlib.decompressobj()
        try:
            block = stream.decompress(bytes(frame), len(out) + 1)
        except zlib.error as e:
            raise IntegrityError(f"{len(frame)} bytes are no frame: {e}") from None
        if len(block) != len(out) or not stream.eof or stream.unused_data:
            raise IntegrityError(f"a frame of {len(block)} bytes for a block of {len(out)}")
        out[:] = block


class Plain(KVCodec):
    def encode(self, block, *, dtype):
        return bytes(block)

    def decode(self, frame, out, *, dtype):
        if len(frame) != len(out):
            raise IntegrityError(f"{len(frame)} bytes for a block of {len(out)}")
        out[:] = frame


class WrongSizes(Plain):
    def decode(self, frame, out, *, dtype):
        n = min(len(frame), len(out))
        out[:n] = frame[:n]


class LosesABit(Zlib):
    def encode(self, block, *, dtype):
        copy = bytearray(block)
        copy[-1] &= 0xFE
        return zlib.compress(copy)


class ReusesItsBuffer(Plain):
    buffer = bytearray(1 << 20)

    def encode(self, block, *, dtype):
        self.buffer[: len(block)] = block
        return memoryview(self.buffer)[: len(block)]


class ScribblesOnInput(Plain):
    def encode(self, block, *, dtype):
        frame = bytes(block)
        if not block.readonly:
            block[0] ^= 1
        return frame


class NeedsWritable(Plain):
    def encode(self, block, *, dtype):
        if block.readonly:
            raise ValueError("writable memory, please")
        return bytes(block)


class Grows(Plain):
    def encode(self, block, *, dtype):
        return bytes(block) * 2

    def decode(self, frame, out, *, dtype):
        if len(frame) != 2 * len(out):
            raise IntegrityError("size")
        out[:] = frame[: len(out)]


class RaisesItsOwn(Zlib):
    def decode(self, frame, out, *, dtype):
        out[:] = zlib.decompress(frame)


class Overruns(Plain):
    def decode(self, frame, out, *, dtype):
        super().decode(frame, out, dtype=dtype)
        whole = out.obj
        whole[-1] = 0


class Hangs(Plain):
    def encode(self, block, *, dtype):
        while True:
            pass


def spec(load, lossless=True, available=True, compresses=True):
    probe = lambda: Probe(available, "because")  # noqa: E731
    hint = "pip install toy"
    return CodecSpec("toy", lossless, probe, lambda: load, hint, compresses)


def test_sound_codecs_pass():
    assert check_codec(Zlib).ok(reference=True), check_codec(Zlib).text()
    plain = check_codec(Plain)
    assert plain.ok()
    assert [e.check for e in plain.of("skipped")] == ["zeros shrink, if anything does"]


@pytest.mark.parametrize(
    "bug",
    [WrongSizes, LosesABit, ReusesItsBuffer, ScribblesOnInput, NeedsWritable, Grows, RaisesItsOwn,
     Overruns],
)  # fmt: skip
def test_a_seeded_bug_is_caught(bug):
    assert not check_codec(bug).ok()


def test_a_lossy_codec_may_lose_bits_but_says_so():
    assert check_codec(spec(LosesABit, lossless=False)).ok()
    assert not check_codec(spec(LosesABit)).ok()


def test_a_codec_shrinks_what_it_can_exactly_if_its_spec_says_so():
    assert check_codec(spec(Plain, compresses=False)).ok(reference=True)
    assert not check_codec(spec(Plain)).ok()
    assert not check_codec(spec(Zlib, compresses=False)).ok()


def test_a_codec_that_cannot_work_here_is_no_failure_of_the_contract():
    with pytest.raises(BackendUnavailableError, match=r"toy: because \(pip install toy\)"):
        check_codec(spec(Zlib, available=False))
