"""The frame: what codecs write, and all that a receiver needs to check before it believes it.

    "SKVC" | version u8 | 3 x 0 | bytes of the description u32 | sections u32
    description (msgpack: codecs with options, dtype, shape, layout, tokens per section)
    xxh3_64 of all before
    per section: bytes u32 | codec u8 | 3 x 0 | xxh3_64 of the payload | xxh3_64 of this entry
    payloads, in the order of the entries

Little-endian. The hash of an entry is seeded with the frame's and the section's index, the hash
of a payload with the entry's index, so that no section passes for another. The hashes detect
damage; they do not authenticate. A section is never larger than its values.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import xxhash

from sagellm.core.protocols import ConfigError, IntegrityError
from sagellm.core.protocols.kv_layout import Axis

from .layout import Geometry, Kind, TensorLayout
from .rope import RopeSpec

__all__ = [
    "ENTRY_BYTES",
    "ITEM_BYTES",
    "Coding",
    "Entry",
    "Header",
    "Option",
    "Payload",
    "split",
]

MAGIC = b"SKVC"
VERSION = 1
_PREFIX = struct.Struct("<4sB3xII")
_ENTRY = struct.Struct("<IB3xQ")
_HASH = struct.Struct("<Q")
ENTRY_BYTES = _ENTRY.size + _HASH.size
_MAX_DESCRIPTION = 1 << 16
_MAX_SECTIONS = 1 << 24
ITEM_BYTES = {
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4,
    "int64": 8,
}  # fmt: skip

Option: TypeAlias = bool | int | float | str
"""Value of an option of a codec."""

Payload: TypeAlias = bytes | bytearray | memoryview
"""A section's coded values."""


class Coding(msgspec.Struct, frozen=True):
    """A codec that sections of a frame were written with.

    Attributes:
        name: Name of the codec.
        options: What it was made with.

    """

    name: str
    options: dict[str, Option] = {}

    @property
    def key(self) -> tuple[object, ...]:
        """Hashable; tells `1`, `1.0` and `True` apart, which compare equal."""
        return (self.name, *sorted((k, type(v).__name__, v) for k, v in self.options.items()))


class _Rope(msgspec.Struct, frozen=True):
    inv_freq: tuple[float, ...]
    interleaved: bool


class _Description(msgspec.Struct, frozen=True):
    codings: tuple[Coding, ...]
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    kind: Kind
    tokens: int
    span: int
    first_layer: int
    first_position: int
    rope: _Rope | None
    model: str
    join: int = 1  # layers of a section


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Description)


@dataclass(frozen=True, slots=True)
class Entry:
    """What the table says of one section.

    Attributes:
        nbytes: Of its payload.
        coding: Index into the frame's codecs.
        checksum: xxh3_64 of the payload, seeded with the section's index.

    """

    nbytes: int
    coding: int
    checksum: int


class Header:
    """The checked first part of a frame: enough to allocate, and to decode any section alone.

    Args:
        geometry: Shape, layout and sections.
        dtype: torch's name of the elements' type.
        codings: Codecs that sections may use; at most 255.

    """

    def __init__(self, geometry: Geometry, dtype: str, codings: Sequence[Coding]) -> None:
        if geometry.sections > _MAX_SECTIONS:
            raise ConfigError(f"{geometry.sections} sections; a frame has at most {_MAX_SECTIONS}")
        self.geometry, self.dtype, self.codings = geometry, dtype, tuple(codings)
        g, layout = geometry, geometry.layout
        rope = layout.rope
        turned = _Rope(rope.inv_freq, rope.interleaved) if rope else None
        body = _encoder.encode(
            _Description(
                self.codings, dtype, g.shape, layout.axes, layout.kind, g.tokens, g.span,
                layout.first_layer, layout.first_position, turned, layout.model, g.join,
            )
        )  # fmt: skip
        if len(body) > _MAX_DESCRIPTION:
            raise ConfigError(f"a frame's description of {len(body)} bytes; is `model` too long?")
        data = _PREFIX.pack(MAGIC, VERSION, len(body), g.sections) + body
        self.digest = xxhash.xxh3_64_intdigest(data)
        self.data = data + _HASH.pack(self.digest)

    @classmethod
    def parse(cls, frame: memoryview) -> Header:
        """The header at the beginning of a frame; allocates less than 1 MiB.

        Raises:
            IntegrityError: Truncated, damaged, of another version, or it contradicts itself.

        """
        if len(frame) < _PREFIX.size + _HASH.size:
            raise IntegrityError(f"{len(frame)} bytes are no frame; the shortest header has 24")
        magic, version, length, sections = _PREFIX.unpack_from(frame)
        if magic != MAGIC:
            raise IntegrityError(f"a frame begins with {MAGIC!r}, not {bytes(magic)!r}")
        if version != VERSION:
            raise IntegrityError(f"frame version {version}; this release reads {VERSION}")
        end = _PREFIX.size + length
        if length > _MAX_DESCRIPTION or end + _HASH.size > len(frame):
            raise IntegrityError(f"a description of {length} bytes in a frame of {len(frame)}")
        digest = xxhash.xxh3_64_intdigest(frame[:end])
        if _HASH.unpack_from(frame, end)[0] != digest:
            raise IntegrityError("the header's checksum does not fit: it was changed on the way")
        try:
            header = cls._of(_decoder.decode(frame[_PREFIX.size : end]))
        except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as e:
            raise IntegrityError(f"the frame's description cannot be used: {e}") from None
        if header.geometry.sections != sections or len(header.data) != end + _HASH.size:
            raise IntegrityError(
                f"{sections} sections announced, its shape has {header.geometry.sections}"
            )
        header.digest = digest
        return header

    @classmethod
    def _of(cls, d: _Description) -> Header:
        if d.dtype not in ITEM_BYTES:
            raise ConfigError(f"dtype {d.dtype!r} is unknown")
        if not 1 <= len(d.codings) <= 255 or d.span < 1:
            raise ConfigError(f"{len(d.codings)} codecs, {d.span} tokens per section")
        rope = RopeSpec(d.rope.inv_freq, d.rope.interleaved) if d.rope else None
        layout = TensorLayout(
            d.axes, d.kind, d.tokens, d.first_layer, d.first_position, rope, d.model
        )
        geometry = Geometry(d.shape, layout, ITEM_BYTES[d.dtype], d.span, d.join)
        return cls(geometry, d.dtype, d.codings)

    @property
    def payload_offset(self) -> int:
        """Where the payloads begin in a frame."""
        return len(self.data) + self.geometry.sections * ENTRY_BYTES

    def seal(self, index: int, coding: int, payload: Payload) -> bytes:
        """The entry of a section, for the table."""
        checksum = xxhash.xxh3_64_intdigest(payload, seed=index)
        entry = _ENTRY.pack(memoryview(payload).nbytes, coding, checksum)
        return entry + _HASH.pack(xxhash.xxh3_64_intdigest(entry, seed=self.digest ^ index))

    def entry(self, index: int, data: memoryview) -> Entry:
        """What an entry says, checked against the section's size.

        Raises:
            IntegrityError: Damaged, of another frame or section, or larger than its values.

        """
        if len(data) != ENTRY_BYTES:
            raise IntegrityError(f"an entry of {len(data)} bytes; they have {ENTRY_BYTES}")
        body = data[: _ENTRY.size]
        want = _HASH.unpack_from(data, _ENTRY.size)[0]
        if xxhash.xxh3_64_intdigest(body, seed=self.digest ^ index) != want:
            raise IntegrityError(f"the table's entry {index} is damaged or of another section")
        nbytes, coding, checksum = _ENTRY.unpack(body)
        raw = self.geometry.section_bytes(index)
        if nbytes > raw or coding >= len(self.codings):
            raise IntegrityError(
                f"section {index} claims {nbytes} bytes for {raw} of values, codec {coding} of "
                f"{len(self.codings)}"
            )
        return Entry(nbytes, coding, checksum)


def split(frame: memoryview) -> tuple[Header, list[tuple[Entry, memoryview]]]:
    """A whole frame's header and its sections, every size checked, payloads not yet.

    Allocates a few hundred bytes per section that the frame really has.

    Raises:
        IntegrityError: Truncated, damaged or contradictory.

    """
    header = Header.parse(frame)
    count, at = header.geometry.sections, header.payload_offset
    if at > len(frame):
        raise IntegrityError(f"a frame of {len(frame)} bytes is too short for {count} entries")
    table = frame[len(header.data) : at]
    found = []
    for i in range(count):
        entry = header.entry(i, table[i * ENTRY_BYTES : (i + 1) * ENTRY_BYTES])
        found.append((entry, frame[at : at + entry.nbytes]))
        at += entry.nbytes
    if at != len(frame):
        raise IntegrityError(f"the sections end at byte {at}, the frame has {len(frame)}")
    return header, found
