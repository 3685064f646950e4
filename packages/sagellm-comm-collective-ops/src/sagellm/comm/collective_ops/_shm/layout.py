"""The segment that the ranks of one host share: where everything lies, and the rules of its use.

`_native.c` repeats these numbers; a test compares them. All words are native 64-bit integers.

    page 0                 header: magic, version, shape of the segment, nonce, poison word
    CONTROL                one control block of 256 bytes per rank
    data_offset            two slots of `slot_bytes` per rank, rank by rank
    mailbox_offset         a line per rank, then a ring of `mailbox_bytes` per ordered pair of ranks
    arena_offset           one arena of `arena_bytes` per rank, for symmetric tensors

Rules of the flag protocol. Every rank counts steps; all ranks take the same steps in the same
order. At step s a rank

1. waits until every peer has published step s - 1: they have then read everything of step s - 2,
   whose slot is used again;
2. writes its own slot `s % 2`, and the signature of its call into the words of that parity;
3. publishes s: a store with release order into `SEQUENCE`;
4. waits until the peers whose data it needs have published s (in the first step of a call: all
   peers, whose signatures it then compares with its own);
5. reads the peers' slots `s % 2`. It publishes s + 1 only after that.

Each rule holds for every operation: relying on the waits of an operation before is wrong as soon
as operations are mixed. A symmetric tensor is read and written where it lies, between two steps
that every rank waits for.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CAUSES", "CONTROL", "CONTROL_BYTES", "MAGIC", "PAGE", "VERSION", "Layout"]

MAGIC = 0x3153_4D48_5347_4153
VERSION = 1
PAGE = 4096
CONTROL = PAGE
CONTROL_BYTES = 256
MAX_RANKS = 64

# header words, as byte offsets
H_NONCE = 64
H_POISON = 128
"""0, or cause << 32 | (rank that failed) + 1. Written once, by compare-and-swap or by one rank."""

# control block words, as indices of 64-bit words
SEQUENCE = 0
SIGNATURE = (1, 4)
"""Per parity: packed call, bytes, number of the call."""
SYMMETRIC = (8, 10)
"""Per parity: offset + 1 of the input and of the output in this rank's arena; 0 is staged."""
REASON = 128
"""Byte offset in the control block of 128 bytes of UTF-8, zero-terminated: why it poisoned."""

CAUSES = ("", "aborted", "mismatch", "timeout", "lost", "error", "closed")
"""Poison causes by number."""

OPS = (
    "barrier",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
)
"""Operations by their number in a signature."""
DTYPES = (
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "bool",
)
"""Element types that reductions know, by number. Moves count bytes and use `uint8`' number 0 only
for what is not in the list; the signature carries the number + 1, 0 for other types."""
REDUCTIONS = ("none", "sum", "avg", "min", "max", "product", "band", "bor", "bxor")

# packed call, the first signature word
# bits 0-7 op, 8-15 dtype + 1, 16-23 reduction, 24-31 flags, 32-47 root + 1
F_UNEVEN = 2


def pack(op: int, dtype: int, reduction: int, flags: int, root: int) -> int:
    """The first signature word; `root` is -1 where there is none, `dtype` -1 where unknown."""
    return op | (dtype + 1) << 8 | reduction << 16 | flags << 24 | (root + 1) << 32


def describe(packed: int, nbytes: int, call: int) -> str:
    """A signature in words: `all_reduce #3 sum float32 1024 bytes`."""
    op = OPS[packed & 0xFF] if packed & 0xFF < len(OPS) else "?"
    dtype, reduction, root = packed >> 8 & 0xFF, packed >> 16 & 0xFF, packed >> 32 & 0xFFFF
    words = [f"#{call} {op}"]
    if 0 < dtype <= len(DTYPES):
        words.append(DTYPES[dtype - 1])
    if op != "barrier":
        words.append("uneven" if packed >> 24 & F_UNEVEN else f"{nbytes} bytes")
    if 0 < reduction < len(REDUCTIONS):
        words.append(REDUCTIONS[reduction])
    if root:
        words.append(f"root {root - 1}")
    return " ".join(words)


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in the segment of one group.

    Attributes:
        world: Ranks.
        slot_bytes: Bytes of one slot; a multiple of 4096.
        arena_bytes: Address space of one rank's arena; a multiple of 4096, may be 0.
        mailbox_bytes: Bytes of one ring between two ranks; a multiple of 4096, 0 without
            send and recv.

    """

    world: int
    slot_bytes: int
    arena_bytes: int
    mailbox_bytes: int = 0

    @property
    def data_offset(self) -> int:
        """Where slots begin."""
        return (CONTROL + self.world * CONTROL_BYTES + PAGE - 1) // PAGE * PAGE

    @property
    def mailbox_offset(self) -> int:
        """Where the mailboxes begin: one page of lines, then the rings."""
        return self.data_offset + self.world * 2 * self.slot_bytes

    @property
    def arena_offset(self) -> int:
        """Where arenas begin; everything before is reserved when the segment is made."""
        if not self.mailbox_bytes:
            return self.mailbox_offset
        return self.mailbox_offset + PAGE + self.world * self.world * self.mailbox_bytes

    @property
    def total_bytes(self) -> int:
        """Address space of the segment."""
        return self.arena_offset + self.world * self.arena_bytes

    def control(self, rank: int) -> int:
        """Byte offset of a rank's control block."""
        return CONTROL + rank * CONTROL_BYTES

    def slot(self, rank: int, parity: int) -> int:
        """Byte offset of one of a rank's slots."""
        return self.data_offset + (2 * rank + parity) * self.slot_bytes

    def state(self, rank: int) -> int:
        """Byte offset of a rank's line in the mailboxes: a word that says how it left."""
        return self.mailbox_offset + 64 * rank

    def mailbox(self, src: int, dst: int) -> int:
        """Byte offset of the ring that `src` writes and `dst` reads."""
        return self.mailbox_offset + PAGE + (src * self.world + dst) * self.mailbox_bytes

    def arena(self, rank: int) -> int:
        """Byte offset of a rank's arena."""
        return self.arena_offset + rank * self.arena_bytes
