"""`lossless` and `lossless-fast`: exponents are coded, signs and mantissas are noise and stay.

A float is rotated left by one bit, which puts the exponent's first eight bits into its top byte
and the sign below the mantissa. The planes of bytes are then coded each in the way that pays;
a payload is `mode u8 | bytes u32` per plane from the top one down, then their bytes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

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
_TILE_BYTES = 1 << 18  # what is worked on at a time stays in a core's second-level cache
_FAR = 15
_MOST_FAR = 64  # a plane has one escape in so many values at most

Words = NDArray[Any]  # Any: unsigned integers as wide as the values


class LosslessCodec(KVCodec, SectionCodec):
    """The same bits back: 1.5x on bfloat16, where nothing lossless reaches more than 1.56x.

    Exponents are coded as distances from their channel's largest of 256 tokens, two to a byte.
    """

    _by_channel = True

    def __init__(self) -> None:
        self._held: dict[str, Bytes] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers that it keeps from call to call."""
        return sum(held.nbytes for held in self._held.values())

    def encode(self, block: memoryview, *, dtype: str) -> bytes:
        """A block of values of which only the type is known."""
        values = np.frombuffer(block, np.uint8)
        name = dtype if len(values) % ITEM_BYTES.get(dtype, 1) == 0 else "uint8"
        return bytes(self._pack(values, name, 1))

    def decode(self, frame: memoryview, out: memoryview, *, dtype: str) -> None:
        """Decode into `out`."""
        name = dtype if len(out) % ITEM_BYTES.get(dtype, 1) == 0 else "uint8"
        self._unpack(frame, np.frombuffer(out, np.uint8), name, 1)

    def pack(self, x_THD: Tensor, section: Section) -> Payload:
        """The section's planes."""
        values = np.frombuffer(bytes_of(x_THD.contiguous()), np.uint8)
        return self._pack(values, dtype_name(x_THD.dtype), self._channels(x_THD))

    def unpack(self, payload: memoryview, out_THD: Tensor, section: Section) -> None:
        """Decode into `out_THD`."""
        into = out_THD.contiguous()
        values = np.frombuffer(bytes_of(into), np.uint8)
        self._unpack(payload, values, dtype_name(out_THD.dtype), self._channels(out_THD))
        if into is not out_THD:
            out_THD.copy_(into)

    def _channels(self, x_THD: Tensor) -> int:
        """Values of a row whose columns have a largest exponent each; 1: rows have no columns."""
        return x_THD.shape[1] * x_THD.shape[2] if self._by_channel else 1

    def _pack(self, values: Bytes, dtype: str, channels: int) -> memoryview:
        """The payload; valid until the next call."""
        width = ITEM_BYTES.get(dtype, 1)
        count = len(values) // width
        head = _PLANE.size * width
        room = self._room("planes", head + len(values))
        planes = room[head:].reshape(width, count)
        self._split(values.view(f"<u{width}"), planes, turned=dtype in _FLOATS)
        coded: list[tuple[int, bytes | None]] = []
        for i, plane in enumerate(planes):
            mode, data = _RAW, None
            if i == 0 and dtype in ("bfloat16", "float32"):
                data = self._nibbles_of(plane, channels)
                mode = _NIBBLES if data is not None else _RAW
            if data is None and (i == 0 or _shrinks(plane)):
                mode, data = _HUFFMAN, deflate(plane)
            if data is not None and len(data) >= count:
                mode, data = _RAW, None
            coded.append((mode, data))
        heads = b"".join(_PLANE.pack(m, count if d is None else len(d)) for m, d in coded)
        top = coded[0][1]
        if all(data is None for _, data in coded[1:]):  # the others stay where they are
            start = count - len(top) if top is not None else 0
            room[start : start + head] = np.frombuffer(heads, np.uint8)
            if top is not None:
                room[start + head : head + count] = np.frombuffer(top, np.uint8)
            return room[start:].data
        parts = [p.data if d is None else d for p, (_, d) in zip(planes, coded, strict=True)]
        return memoryview(b"".join([heads, *parts]))

    def _unpack(self, payload: memoryview, out: Bytes, dtype: str, channels: int) -> None:
        width = ITEM_BYTES.get(dtype, 1)
        count, at = len(out) // width, _PLANE.size * width
        if len(payload) < at:
            raise IntegrityError(f"a lossless section of {len(payload)} bytes ends early")
        planes = []
        for i in range(width):
            mode, length = _PLANE.unpack_from(payload, i * _PLANE.size)
            data = payload[at : at + length]
            at += length
            if mode == _RAW and len(data) == count:
                plane = np.frombuffer(data, np.uint8)
            elif mode == _HUFFMAN:
                plane = inflate(data, count, self._room(f"plane {i}", count))
            elif mode == _NIBBLES:
                plane = self._from_nibbles(data, self._room(f"plane {i}", count), channels)
            else:
                raise IntegrityError(f"plane {i}: mode {mode}, {len(data)} bytes, {count} values")
            planes.append(plane)
        if at != len(payload):
            raise IntegrityError(f"a lossless section of {len(payload)} bytes; planes end at {at}")
        self._join(planes, out.view(f"<u{width}"), turned=dtype in _FLOATS)

    def _split(self, words: Words, planes: Bytes, *, turned: bool) -> None:
        """Write the planes, the top one first; floats are rotated left by one bit before."""
        width = words.itemsize
        bits = words.dtype.type(8 * width - 1)
        for at in range(0, len(words), _TILE_BYTES // width):
            w = words[at : at + _TILE_BYTES // width]
            part = self._room("part", w.nbytes).view(words.dtype)
            if turned:
                rotated = self._room("rotated", w.nbytes).view(words.dtype)
                np.right_shift(w, bits, out=part)
                np.add(w, w, out=rotated)
                w = np.bitwise_or(rotated, part, out=rotated)
            for i, plane in enumerate(planes):
                shift = words.dtype.type(8 * (width - 1 - i))
                source = np.right_shift(w, shift, out=part) if shift else w
                np.copyto(plane[at : at + len(w)], source, casting="unsafe")

    def _join(self, planes: list[Bytes], words: Words, *, turned: bool) -> None:
        """The inverse of `_split`."""
        width = words.itemsize
        one = words.dtype.type(1)
        for at in range(0, len(words), _TILE_BYTES // width):
            w = words[at : at + _TILE_BYTES // width]
            part, rotated = (
                self._room(name, w.nbytes).view(words.dtype) for name in ("part", "rotated")
            )
            np.copyto(rotated, planes[0][at : at + len(w)])
            for plane in planes[1:]:
                np.copyto(part, plane[at : at + len(w)])
                _add(part, rotated, 8, rotated)
            if turned:
                np.right_shift(rotated, one, out=part)
                _add(part, rotated, 8 * width - 1, w)
            else:
                np.copyto(w, rotated)

    def _nibbles_of(self, plane: Bytes, channels: int) -> bytes | None:
        """Distances from the largest values, two to a byte; None when too many are far."""
        count = len(plane)
        below = self._room("below", count + count % 2)
        below[-1:] = 0
        tops, places, strays, found = [], [], [], 0
        step = _group(channels)
        for at in range(0, count, step):
            group, distance = (x[at : min(at + step, count)] for x in (plane, below))
            rows = group.reshape(-1, channels)
            top = rows.max(0) if channels > 1 else group.max(keepdims=True)
            np.subtract(top, rows, out=distance.reshape(-1, channels))
            tops.append(top.tobytes())
            if distance.max() < _FAR:
                continue
            far = np.flatnonzero(distance >= _FAR)
            found += len(far)
            if found * _MOST_FAR > count:
                return None
            strays.append(group[far].tobytes())
            places.append((far + at).astype("<u4").tobytes())
            distance[far] = 0
        both = _add_pairs(below.reshape(2, -1), self._room("pairs", len(below) // 2))
        return b"".join([*tops, _COUNT.pack(found), *places, *strays, deflate(both)])

    def _from_nibbles(self, data: memoryview, out: Bytes, channels: int) -> Bytes:
        """The plane in `out`."""
        count, step = len(out), _group(channels)
        at = -(-count // step) * channels
        if len(data) < at + _COUNT.size:
            raise IntegrityError(f"a plane of {len(data)} bytes lacks its {at} maxima")
        tops = np.frombuffer(data, np.uint8, at).reshape(-1, channels)
        (found,) = _COUNT.unpack_from(data, at)
        at += _COUNT.size
        if found * _MOST_FAR > count or at + 5 * found > len(data):
            raise IntegrityError(f"{found} escapes in a plane of {count} values")
        places = np.frombuffer(data, "<u4", found, at)
        if found and (int(places[-1]) >= count or (places[1:] <= places[:-1]).any()):
            raise IntegrityError(f"escapes out of order or beyond the {count} values of a plane")
        strays = np.frombuffer(data, np.uint8, found, at + 4 * found)
        half = (count + 1) // 2
        both = inflate(data[at + 5 * found :], half, self._room("pairs", half))
        np.bitwise_and(both, 15, out=out[:half])
        np.right_shift(both[: count - half], 4, out=out[half:])
        for top, start in zip(tops, range(0, count, step), strict=True):
            rows = out[start : start + step].reshape(-1, channels)
            np.subtract(top, rows, out=rows)
        out[places] = strays
        return out

    def _room(self, name: str, nbytes: int) -> Bytes:
        """A buffer that is kept from call to call."""
        held = self._held.get(name)
        if held is None or len(held) < nbytes:
            held = self._held[name] = np.empty(nbytes, np.uint8)
        return held[:nbytes]


class FastLosslessCodec(LosslessCodec):
    """Distances from the largest of many values of any channel: hardly larger, and faster."""

    _by_channel = False


def _group(channels: int) -> int:
    """Values that share their largest exponents."""
    return CHUNK_TOKENS * channels if channels > 1 else _TILE_BYTES // 2


def _shrinks(plane: Bytes) -> bool:
    """Whether a sample of a plane can be coded in less."""
    sample = plane[:_SAMPLE]
    return len(deflate(sample)) < 0.97 * len(sample)


def _add(low: Words, high: Words, shift: int, out: Words) -> None:
    """`low` + `high` shifted left, in one call that numpy does not have."""
    import torch

    signed = f"<i{low.itemsize}"
    a, b, c = (torch.from_numpy(x.view(signed)) for x in (low, high, out))
    top = 8 * low.itemsize - 1
    torch.add(a, b, alpha=-(1 << top) if shift == top else 1 << shift, out=c)


def _add_pairs(halves: Bytes, out: Bytes) -> Bytes:
    import torch

    low, high = (torch.from_numpy(x) for x in halves)
    torch.add(low, high, alpha=16, out=torch.from_numpy(out))
    return out


_probe = importable("zstandard", "pip install zstandard")
LOSSLESS = CodecSpec("lossless", True, _probe, lambda: LosslessCodec, "pip install zstandard")
LOSSLESS_FAST = CodecSpec(
    "lossless-fast", True, _probe, lambda: FastLosslessCodec, "pip install zstandard"
)
