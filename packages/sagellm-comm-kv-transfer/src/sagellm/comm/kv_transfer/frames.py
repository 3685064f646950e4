"""Frames of a data connection: which blocks follow, and how to check them.

A frame is a fixed header, a table with one entry per block, and the payload: the blocks' bytes
in the order of their positions, all of one layer. Entries hold the xxh3 of the block's bytes
in memory, seeded with where it belongs, so that swapped blocks are caught. The payload of a
frame of sections is as `compression.frame` says, and the table has one more entry, the digest of
its front. Where the receiver reads the sender's memory, the payload is a reference to the bytes.
The header holds a digest of the table and is sealed with a key of the link and the direction, so
that frames of another connection are no frames here.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from sagellm.core.protocols import IntegrityError

__all__ = [
    "HEADER_BYTES",
    "MAX_UNITS",
    "REF",
    "SEALED",
    "SECTIONS",
    "Header",
    "block_sum",
    "block_sums",
]

MAX_UNITS = 4096
"""Blocks in one frame at most; bounds what a header can make a reader allocate."""

REF = 2
"""Flag: the payload is a reference to the bytes."""

SEALED = 8
"""Flag: the transfer is whole, no message seals it; for those that use an invitation."""

SECTIONS = 16
"""Flag: the payload is one codec frame, whose sections hold all the blocks."""

_FIELDS = struct.Struct("<4sBBHIIIIQQ")
_SEAL_BYTES = 8
_MAGIC = b"sKVf"
HEADER_BYTES = _FIELDS.size + _SEAL_BYTES


@dataclass(slots=True)  # frozen, it takes three times as long to make
class Header:
    """What a frame carries.

    Attributes:
        tid: Transfer, on this link.
        layer: Position in the layout's layers.
        first: Position of the first block in the transfer.
        count: Blocks.
        payload_bytes: Bytes after the table.
        flags: `REF` or `SECTIONS`, and `SEALED`.
        table_digest: xxh3 of the table.

    """

    tid: int
    layer: int
    first: int
    count: int
    payload_bytes: int
    flags: int
    table_digest: int = 0

    @property
    def table_bytes(self) -> int:
        """Length of the table."""
        return 8 * self.count + (8 if self.flags & SECTIONS else 0)

    def pack(self, table: bytes, key: bytes = b"") -> bytes:
        """Header and table; the key is that of this direction of the link."""
        head = _FIELDS.pack(
            _MAGIC,
            1,
            self.flags,
            0,
            self.tid,
            self.layer,
            self.first,
            self.count,
            self.payload_bytes,
            xxhash.xxh3_64_intdigest(table),
        )
        return head + _seal(head, key) + table

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, key: bytes = b"") -> Header:
        """The header in these bytes.

        Raises:
            IntegrityError: They are none, were changed on the way, or are of another link.

        """
        magic, version, flags, _, tid, layer, first, count, payload, table = _FIELDS.unpack_from(
            data
        )
        seal = bytes(data[_FIELDS.size : HEADER_BYTES])
        if magic != _MAGIC or not hmac.compare_digest(seal, _seal(data[: _FIELDS.size], key)):
            raise IntegrityError("a data frame's header is damaged")
        if version != 1 or not 0 < count <= MAX_UNITS:
            raise IntegrityError(f"a data frame of version {version} with {count} blocks")
        if flags & ~SEALED not in (0, REF, SECTIONS):
            raise IntegrityError(f"a data frame with flags {flags:#x}")
        return cls(tid, layer, first, count, payload, flags, table)


def _seal(head: bytes | bytearray | memoryview, key: bytes) -> bytes:
    return hashlib.blake2b(head, key=key, digest_size=_SEAL_BYTES).digest()


def block_sum(views: Iterable[memoryview], layer: int, position: int) -> int:
    """xxh3 of one block's bytes, seeded with where it belongs."""
    digest = xxhash.xxh3_64(seed=(layer << 32) + position)
    for view in views:
        digest.update(view)
    return digest.intdigest()


def block_sums(blocks: Sequence[Sequence[memoryview]], layer: int, first: int) -> list[int]:
    """`block_sum` of consecutive blocks."""
    seed, one = (layer << 32) + first, xxhash.xxh3_64_intdigest
    return [
        one(views[0], seed + i) if len(views) == 1 else block_sum(views, layer, first + i)
        for i, views in enumerate(blocks)
    ]
