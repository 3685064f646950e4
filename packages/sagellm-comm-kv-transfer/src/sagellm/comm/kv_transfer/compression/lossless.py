"""`lossless` and `lossless-fast`: exponents are coded, signs and mantissas are noise and stay.

A float is rotated left by one bit, which puts the exponent's first eight bits into its top byte
and the sign below the mantissa. The planes of bytes are then coded each in the way that pays;
a payload is, from the top plane down, `mode u8 | bytes u32 | bytes` per plane.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from sagellm.comm.kv_transfer.memory import bytes_of
from sagellm.core.protocols import CodecSpec, IntegrityError, KVCodec

from .codec import SectionCodec, dtype_name
from .entropy import Bytes, deflate, inflate
from .frame import ITEM_BYTES, Payload
from .generic import importable
from .layout import CHUNK_TOKENS, Section

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LOSSLESS", "LOSSLESS_FAST", "FastLosslessCodec", "LosslessCodec"]

_PLANE = struct.Struct("<BI")
_RAW, _HUFFMAN, _NIBBLES = range(3)
_COUNT = struct.Struct("<I")
_FLOATS = {"float16", "bfloat16", "float32", "float64"}
_SAMPLE = 1 << 14


class LosslessCodec(KVCodec, SectionCodec):
    """The same bits back: 1.5x on bfloat16, where nothing lossless reaches more than 1.56x.

    Exponents are coded as distances from their channel's largest of 256 tokens, two to a byte.
    """

    _nibbles = True

    def __init__(self) -> None:
        self._held: dict[str, Bytes] = {}

    def encode(self, block: memoryview, *, dtype: str) -> bytes:
        """A block of values of which only the type is known."""
        values = np.frombuffer(block, np.uint8)
        name = dtype if len(values) % ITEM_BYTES.get(dtype, 1) == 0 else "uint8"
        return self._pack(values, name, 1)

    def decode(self, frame: memoryview, out: memoryview, *, dtype: str) -> None:
        """Decode into `out`."""
        name = dtype if len(out) % ITEM_BYTES.get(dtype, 1) == 0 else "uint8"
        self._unpack(frame, np.frombuffer(out, np.uint8), name, 1)

    def pack(self, x_THD: Tensor, section: Section) -> Payload:
        """The section's planes."""
        values = np.frombuffer(bytes_of(x_THD.contiguous()), np.uint8)
        return self._pack(values, dtype_name(x_THD.dtype), x_THD.shape[1] * x_THD.shape[2])

    def unpack(self, payload: memoryview, out_THD: Tensor, section: Section) -> None:
        """Decode into `out_THD`."""
        into = out_THD.contiguous()
        name, channels = dtype_name(out_THD.dtype), out_THD.shape[1] * out_THD.shape[2]
        self._unpack(payload, np.frombuffer(bytes_of(into), np.uint8), name, channels)
        if into is not out_THD:
            out_THD.copy_(into)

    def _pack(self, values: Bytes, dtype: str, channels: int) -> bytes:
        width = ITEM_BYTES.get(dtype, 1)
        planes = self._split(values, width, turned=dtype in _FLOATS)
        coded = []
        for i in reversed(range(width)):
            plane = planes[i]
            top = i == width - 1
            mode, data = _RAW, cast("bytes", plane.data)
            if top and self._nibbles and dtype in ("bfloat16", "float32"):
                found = _nibbles_of(plane, channels)
                if found is not None:
                    mode, data = _NIBBLES, found
            if mode == _RAW and (top or _shrinks(plane)):
                found = deflate(plane)
                if len(found) < len(plane):
                    mode, data = _HUFFMAN, found
            coded += [_PLANE.pack(mode, len(data)), data]
        return b"".join(coded)

    def _unpack(self, payload: memoryview, out: Bytes, dtype: str, channels: int) -> None:
        width = ITEM_BYTES.get(dtype, 1)
        count, at = len(out) // width, 0
        words = out.view(f"<u{width}")
        wider = self._room("wider", count, words.dtype)
        for i in reversed(range(width)):
            if len(payload) < at + _PLANE.size:
                raise IntegrityError(f"a lossless section of {len(payload)} bytes ends early")
            mode, length = _PLANE.unpack_from(payload, at)
            at += _PLANE.size
            data = payload[at : at + length]
            at += length
            if mode == _RAW and len(data) == count:
                plane = np.frombuffer(data, np.uint8)
            elif mode == _HUFFMAN:
                plane = inflate(data, count)
            elif mode == _NIBBLES:
                plane = _from_nibbles(data, count, channels)
            else:
                raise IntegrityError(f"plane {i}: mode {mode}, {len(data)} bytes, {count} values")
            if i == width - 1:
                np.copyto(words, plane)
                continue
            np.left_shift(words, words.dtype.type(8), out=words)
            np.bitwise_or(words, plane, out=words)
        if at != len(payload):
            raise IntegrityError(f"a lossless section of {len(payload)} bytes; planes end at {at}")
        if dtype in _FLOATS:
            np.left_shift(words, words.dtype.type(8 * width - 1), out=wider)
            np.right_shift(words, words.dtype.type(1), out=words)
            np.bitwise_or(words, wider, out=words)

    def _split(self, values: Bytes, width: int, *, turned: bool) -> list[Bytes]:
        """Planes of bytes, the lowest first; floats are rotated left by one bit before."""
        if width == 1:
            return [values]
        words = values.view(f"<u{width}")
        shifted = self._room("wider", len(words), words.dtype)
        if turned:
            rotated = self._room("rotated", len(words), words.dtype)
            np.left_shift(words, words.dtype.type(1), out=rotated)
            np.right_shift(words, words.dtype.type(8 * width - 1), out=shifted)
            words = np.bitwise_or(rotated, shifted, out=rotated)
        planes = self._room("planes", width * len(words), np.dtype(np.uint8)).reshape(width, -1)
        for i, plane in enumerate(planes):
            part = np.right_shift(words, words.dtype.type(8 * i), out=shifted) if i else words
            np.copyto(plane, part, casting="unsafe")
        return list(planes)

    def _room(self, name: str, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:  # Any: unsigned
        """A buffer that is kept from call to call."""
        held = self._held.get(name)
        nbytes = count * dtype.itemsize
        if held is None or len(held) < nbytes:
            held = self._held[name] = np.empty(nbytes, np.uint8)
        return held[:nbytes].view(dtype)


class FastLosslessCodec(LosslessCodec):
    """Exponents are coded as they are: hardly larger, and faster."""

    _nibbles = False


def _shrinks(plane: Bytes) -> bool:
    """Whether a sample of a plane can be coded in less."""
    sample = plane[:_SAMPLE]
    return len(deflate(sample)) < 0.97 * len(sample)


def _nibbles_of(plane: Bytes, channels: int) -> bytes | None:
    """Distances from the channels' maxima, two to a byte; None when too many are far."""
    tops, below = [], np.empty(len(plane) + len(plane) % 2, np.uint8)
    below[-1] = 0
    rows = plane.reshape(-1, channels)
    distance = below[: len(plane)].reshape(-1, channels)
    for t in range(0, len(rows), CHUNK_TOKENS):
        chunk = rows[t : t + CHUNK_TOKENS]
        top = chunk.max(0)
        np.subtract(top, chunk, out=distance[t : t + CHUNK_TOKENS])
        tops.append(top.tobytes())
    far = np.flatnonzero(below[: len(plane)] >= 15)
    if len(far) * 8 > len(plane):
        return None
    strays = plane[far].tobytes()
    np.minimum(below, 15, out=below)
    low, high = below.reshape(2, -1)
    return b"".join([*tops, _COUNT.pack(len(far)), strays, deflate(low | high << 4)])


def _from_nibbles(data: memoryview, count: int, channels: int) -> Bytes:
    rows = count // channels
    at = -(-rows // CHUNK_TOKENS) * channels
    if len(data) < at + _COUNT.size:
        raise IntegrityError(f"a plane of {len(data)} bytes lacks its {at} maxima")
    tops = np.frombuffer(data, np.uint8, at).reshape(-1, channels)
    (strays,) = _COUNT.unpack_from(data, at)
    at += _COUNT.size
    if strays > count or at + strays > len(data):
        raise IntegrityError(f"{strays} escapes in a plane of {count} values")
    both = inflate(data[at + strays :], (count + 1) // 2)
    below: Bytes = np.empty(2 * len(both), np.uint8)
    np.bitwise_and(both, 15, out=below[: len(both)])
    np.right_shift(both, 4, out=below[len(both) :])
    below = below[:count]
    far = np.flatnonzero(below == 15)
    if len(far) != strays:
        raise IntegrityError(f"{strays} escapes in a plane that has room for {len(far)}")
    distance = below.reshape(-1, channels)
    for i, t in enumerate(range(0, rows, CHUNK_TOKENS)):
        chunk = distance[t : t + CHUNK_TOKENS]
        np.subtract(tops[i], chunk, out=chunk)
    below[far] = np.frombuffer(data, np.uint8, strays, at)
    return below


_probe = importable("zstandard", "pip install zstandard")
LOSSLESS = CodecSpec("lossless", True, _probe, lambda: LosslessCodec, "pip install zstandard")
LOSSLESS_FAST = CodecSpec(
    "lossless-fast", True, _probe, lambda: FastLosslessCodec, "pip install zstandard"
)
