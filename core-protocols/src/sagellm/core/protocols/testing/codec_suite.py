"""The contract of `KVCodec`: what goes in comes out, sizes are right, and rubbish is refused."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sagellm.core.protocols.errors import IntegrityError
from sagellm.core.protocols.kv_plugins import KVCodec

from .contract import Check, Report, Skipped, run_local, select
from .targets import factory_of, name_of, resolve

__all__ = ["check_codec", "codec_checks"]

_GUARD = b"\xa5" * 64
_DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "uint8": 1}


@dataclass(frozen=True, slots=True)
class Codec:
    """What a check gets: fresh codecs, and what their spec says of them.

    Attributes:
        make: A new codec.
        lossless: Whether it gives the same bits back.
        compresses: Whether it makes frames smaller; None where no spec says.

    """

    make: Callable[[], KVCodec]
    lossless: bool
    compresses: bool | None


def _blocks(item_bytes: int) -> dict[str, bytes]:
    """Blocks like those of a KV cache, and their extremes; sizes fit every dtype."""
    source = random.Random(7)
    n = 4096
    smooth = b"".join(struct.pack("<e", source.gauss(0.0, 1.0)) for _ in range(n))
    return {
        "zeros": bytes(n),
        "random": source.randbytes(n),
        "like activations": smooth,
        "one element": source.randbytes(item_bytes),
        "odd length": source.randbytes(item_bytes * 1023),
        "repetitive": bytes(range(16)) * (n // 16),
        "large": (source.randbytes(n) + bytes(n)) * 64,
    }


def _decode(codec: KVCodec, frame: bytes, size: int, dtype: str) -> bytes:
    """Decode between guards, so that a byte too far shows."""
    room = bytearray(_GUARD + b"\xee" * size + _GUARD)
    codec.decode(memoryview(frame), memoryview(room)[64 : 64 + size], dtype=dtype)
    if room[:64] != _GUARD or room[64 + size :] != _GUARD:
        raise AssertionError("decode wrote outside the memory that it was given")
    return bytes(room[64 : 64 + size])


def _round_trip(c: Codec) -> None:
    for dtype, item_bytes in _DTYPES.items():
        codec = c.make()
        for what, block in _blocks(item_bytes).items():
            frame = bytes(codec.encode(memoryview(block), dtype=dtype))
            found = _decode(codec, frame, len(block), dtype)
            if c.lossless and found != block:
                wrong = sum(a != b for a, b in zip(found, block, strict=True))
                raise AssertionError(
                    f"{wrong} of {len(block)} bytes of a {what} block of {dtype} changed"
                )


def _input_unchanged(c: Codec) -> None:
    for what, block in _blocks(2).items():
        held = bytearray(block)
        c.make().encode(memoryview(held), dtype="float16")
        if held != block:
            raise AssertionError(f"encode changed its input ({what})")


def _read_only(c: Codec) -> None:
    codec = c.make()
    block = _blocks(2)["like activations"]
    frame = codec.encode(memoryview(block).toreadonly(), dtype="float16")
    _decode(codec, bytes(frame), len(block), "float16")


def _reuse(c: Codec) -> None:
    """Frames stay as they were when the codec is used again."""
    codec = c.make()
    blocks = list(_blocks(2).values())
    frames = [codec.encode(memoryview(b), dtype="float16") for b in blocks]
    again = [bytes(f) for f in frames]
    for block, frame in zip(blocks, again, strict=True):
        if c.lossless and _decode(codec, frame, len(block), "float16") != block:
            raise AssertionError("a frame changed when the codec was used again")


def _expansion(c: Codec) -> None:
    """Random bytes do not shrink; a frame may be a little larger, not more."""
    block = random.Random(1).randbytes(1 << 16)
    frame = c.make().encode(memoryview(block), dtype="uint8")
    limit = len(block) + len(block) // 64 + 256
    if len(frame) > limit:
        raise AssertionError(f"{len(block)} random bytes became {len(frame)}, more than {limit}")


def _refused(c: Codec, frame: bytes, size: int, what: str) -> None:
    try:
        _decode(c.make(), frame, size, "float16")
    except IntegrityError:
        return
    except Exception as e:
        raise AssertionError(f"{what} raised {type(e).__name__}, not IntegrityError: {e}") from e
    raise AssertionError(f"{what} was decoded without an error")


def _wrong_size(c: Codec) -> None:
    block = _blocks(2)["repetitive"]
    frame = bytes(c.make().encode(memoryview(block), dtype="float16"))
    _refused(c, frame, len(block) * 2, "a frame of half the block's size")
    _refused(c, frame, len(block) // 2, "a frame of twice the block's size")


def _truncated(c: Codec) -> None:
    block = _blocks(2)["like activations"]
    frame = bytes(c.make().encode(memoryview(block), dtype="float16"))
    for length in {0, 1, len(frame) // 2, len(frame) - 1}:
        _refused(c, frame[:length], len(block), f"a frame cut to {length} of {len(frame)} bytes")


def _rubbish(c: Codec) -> None:
    """Frames from nowhere: an IntegrityError or some values, but no crash and no stray write."""
    source = random.Random(3)
    size = 512
    for _ in range(100):
        frame = source.randbytes(source.randrange(1, 700))
        try:
            _decode(c.make(), frame, size, "float16")
        except IntegrityError:
            continue


def _shrinks(c: Codec) -> None:
    block = bytes(1 << 16)
    frame = c.make().encode(memoryview(block), dtype="float16")
    if c.compresses is None and len(frame) >= len(block):
        raise Skipped("64 KiB of zeros stay as large, and no spec says whether it compresses")
    if c.compresses is False:
        if len(frame) < len(block):
            raise AssertionError(f"64 KiB of zeros shrink to {len(frame)}, yet it only copies")
    elif len(frame) > len(block) // 2:
        raise AssertionError(f"64 KiB of zeros only shrink to {len(frame)} bytes")


def codec_checks() -> list[Check]:
    """Every check of the suite, in a stable order."""
    return [
        Check("what goes in comes out", _round_trip),
        Check("the input stays as it is", _input_unchanged),
        Check("read-only memory can be encoded", _read_only),
        Check("frames outlive the next call", _reuse),
        Check("random bytes hardly grow", _expansion),
        Check("zeros shrink, if anything does", _shrinks),
        Check("a block of another size is refused", _wrong_size),
        Check("a truncated frame is refused", _truncated),
        Check("rubbish does no harm", _rubbish),
    ]


def check_codec(
    target: object, *, only: Sequence[str] = (), timeout_s: float | None = None
) -> Report:
    """Run the suite on a codec.

    Args:
        target: `module:attribute`, the name of an entry point, or the class, function or spec.
        only: Patterns of checks' names; empty runs all.
        timeout_s: Longest time for one check; None is the check's own.

    """
    found = resolve("codec", target)
    argument = Codec(
        factory_of(found), getattr(found, "lossless", True), getattr(found, "compresses", None)
    )
    return run_local(
        "codec", name_of(target), select(codec_checks(), only), argument, timeout_s=timeout_s
    )
