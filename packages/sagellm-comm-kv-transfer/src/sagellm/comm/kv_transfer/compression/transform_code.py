"""Integers of components whose spread is known beforehand, in as many bytes as they deserve.

Rows fall in spread, so bands of rows are coded alike: a byte per code, two codes, five codes of
-1..1, and below that the gaps between codes that are not zero. All pass through Huffman coding,
whose whole bits would otherwise cost most where there is least to say. What a band cannot hold
follows as an escape.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import IntegrityError

from .entropy import deflate, inflate

__all__ = ["LARGEST", "decode_rows", "encode_rows"]

LARGEST = 32767
_CUTS = (2.0, 0.45, 0.3, 0.15, 0.08)  # deviations in steps where bands meet
_LIMITS = (127, 7, 1, 127, 127, 127)
_PACKED = (1, 2, 5)  # codes per byte of the dense bands
_ENTRY = np.dtype([("raw", "<u4"), ("coded", "<u4")])
_STREAMS = 3 + 2 * 3 + 2
_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)
_DIGITS = ((np.arange(256)[:, None] // _POWERS) % 3 - 1).astype(np.int8)
_HEAD = struct.Struct("<B3x")
_VERSION = 1

Codes = NDArray[np.int16]
Bytes = NDArray[np.uint8]


def encode_rows(q_CT: Codes, ratio_C: NDArray[np.float32]) -> bytes | None:
    """The coded rows.

    Args:
        q_CT: Codes of -32767..32767, [components, tokens], contiguous.
        ratio_C: Deviation of each row in steps, falling; the decoder has it too.

    Returns:
        None where so many codes are escapes that the spread cannot be what was foreseen.

    """
    tokens = q_CT.shape[1]
    flat = q_CT.reshape(-1)
    streams: list[Bytes] = []
    far: list[NDArray[np.int64]] = []
    for band, (first, last) in enumerate(_bands(ratio_C)):
        codes = flat[first * tokens : last * tokens]
        limit = _LIMITS[band]
        strays = np.flatnonzero((codes > limit) | (codes < -limit))
        if len(strays):
            far.append(strays + first * tokens)
            codes = codes.clip(-limit, limit)
        if band < 3:
            streams.append(_pack(codes, _PACKED[band]))
        else:
            at = np.flatnonzero(codes)
            streams += [_gaps(at), codes[at].astype(np.int8).view(np.uint8)]
    places = np.concatenate(far) if far else np.empty(0, np.int64)
    if len(places) * 16 > len(flat):
        return None
    streams += [_gaps(places), flat[places].astype("<i2").view(np.uint8)]
    table = np.zeros(_STREAMS, _ENTRY)
    coded = []
    for entry, stream in zip(table, streams, strict=True):
        body = deflate(np.ascontiguousarray(stream)) if len(stream) else b""
        entry["raw"], entry["coded"] = len(stream), len(body)
        coded.append(body)
    return b"".join([_HEAD.pack(_VERSION), table.tobytes(), *coded])


def decode_rows(payload: memoryview, tokens: int, ratio_C: NDArray[np.float32]) -> Codes:
    """The codes [components, tokens] that `encode_rows` has coded.

    Raises:
        IntegrityError: They are not; nothing larger than the codes was allocated.

    """
    count = len(ratio_C) * tokens
    at = _HEAD.size + _STREAMS * _ENTRY.itemsize
    if len(payload) < at or bytes(payload[: _HEAD.size]) != _HEAD.pack(_VERSION):
        raise IntegrityError(f"{len(payload)} bytes are no section of transform")
    table = np.frombuffer(payload, _ENTRY, _STREAMS, _HEAD.size)
    if at + int(table["coded"].sum(dtype=np.int64)) != len(payload):
        raise IntegrityError(f"streams do not add up to the {len(payload)} bytes of a section")
    bodies = []
    for coded in table["coded"].tolist():
        bodies.append(payload[at : at + coded])
        at += coded
    raws: list[int] = table["raw"].tolist()

    def stream(index: int, most: int, exactly: int | None = None) -> Bytes:
        size = raws[index]
        if size > most or (exactly is not None and size != exactly):
            raise IntegrityError(f"stream {index} of a section claims {size} bytes of {most}")
        if not size:
            if len(bodies[index]):
                raise IntegrityError(f"stream {index} of a section is not empty")
            return np.empty(0, np.uint8)
        return inflate(bodies[index], size)

    flat = np.zeros(count, np.int16)
    for band, (first, last) in enumerate(_bands(ratio_C)):
        codes = flat[first * tokens : last * tokens]
        n = len(codes)
        if band < 3:
            size = -(-n // _PACKED[band])
            _unpack(stream(band, size, size), _PACKED[band], codes)
            continue
        index = 3 + 2 * (band - 3)
        where = _places(stream(index, n + n // 255 + 1), n)
        codes[where] = stream(index + 1, n, len(where)).view(np.int8)
    where = _places(stream(9, count + count // 255 + 1), count)
    flat[where] = stream(10, 2 * count, 2 * len(where)).view("<i2")
    return flat.reshape(-1, tokens)


def _bands(ratio_C: NDArray[np.float32]) -> list[tuple[int, int]]:
    """First and last row of each band."""
    ends = [int((ratio_C >= cut).sum()) for cut in _CUTS]
    return list(zip([0, *ends], [*ends, len(ratio_C)], strict=True))


def _pack(codes: Codes, per_byte: int) -> Bytes:
    if per_byte == 1:
        return codes.astype(np.int8).view(np.uint8)
    padded = np.pad(codes, (0, -len(codes) % per_byte)).astype(np.int8)
    groups = padded.reshape(-1, per_byte)
    if per_byte == 2:
        low, high = (groups + np.int8(8)).view(np.uint8).T
        return np.asarray(low | high << np.uint8(4))
    digits = (groups + np.int8(1)).view(np.uint8)
    return np.asarray((digits * _POWERS).sum(1, dtype=np.uint8))


def _unpack(packed: Bytes, per_byte: int, codes: Codes) -> None:
    if per_byte == 1:
        codes[:] = packed.view(np.int8)
        return
    if per_byte == 2:
        groups = np.stack([packed & 15, packed >> 4], 1).astype(np.int8) - np.int8(8)
    else:
        groups = _DIGITS.take(packed, 0)
    codes[:] = groups.reshape(-1)[: len(codes)]


def _gaps(places: NDArray[np.int64]) -> Bytes:
    """Zeros before each place, in bytes; 255 says that there are 255 and more to come."""
    zeros = np.diff(places, prepend=-1) - 1
    longer = zeros // 255
    out = np.full(int(longer.sum()) + len(zeros), 255, np.uint8)
    out[np.cumsum(longer + 1) - 1] = zeros % 255
    return out


def _places(gaps: Bytes, count: int) -> NDArray[np.int64]:
    after = np.cumsum(gaps + (gaps < 255).astype(np.int64), dtype=np.int64)
    found: NDArray[np.int64] = after[gaps < 255] - 1
    if len(gaps) and (gaps[-1] == 255 or found[-1] >= count):
        raise IntegrityError(f"codes beyond the {count} of their band")
    return found
