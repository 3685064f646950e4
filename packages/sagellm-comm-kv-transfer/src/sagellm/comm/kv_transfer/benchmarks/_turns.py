"""What all contenders share: two regions of blocks, and which blocks move in which turn."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import CacheGroup, KVLayout

__all__ = ["Blocks", "Ids", "Region", "Turn", "fill", "layout", "pool_blocks", "sums"]

Ids = NDArray[np.int64]
Blocks = NDArray[np.uint8]
"""Memory of a pool, `[block, byte]`."""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def pool_blocks(case: Mapping[str, Any]) -> int:
    """Blocks of a pool: a quarter more than move, so that ids have something to choose from."""
    count: int = case["nbytes"] // case["block_bytes"]
    return count + max(63, count // 4)


def layout(block_bytes: int) -> KVLayout:
    """One layer of opaque blocks."""
    group = CacheGroup("kv", "opaque", ("layer0",), ("block", "dim"), (block_bytes,), "uint8")
    return KVLayout((group,), "bench")


@dataclass(frozen=True, slots=True)
class Turn:
    """One transfer: fresh random blocks on both sides.

    Attributes:
        number: Counts the turns of a pair.
        source: Blocks that are sent.
        target: Where they go, in the same order.

    """

    number: int
    source: Ids
    target: Ids

    @classmethod
    def make(cls, case: Mapping[str, Any], number: int, *, random: bool) -> Turn:
        """The same on both sides, from the number alone."""
        count = case["nbytes"] // case["block_bytes"]
        if not random:
            ids = np.arange(count)
            return cls(number, ids, ids)
        rng = np.random.default_rng((number, case["block_bytes"]))
        total = pool_blocks(case)
        return cls(number, rng.permutation(total)[:count], rng.permutation(total)[:count])


class Region:
    """Memory that several processes map by the name of a process and a descriptor.

    Made once for all contenders of a case, because each with a pool of its own would need
    more memory than a small machine has. Every page is there from the start.
    """

    def __init__(self, nbytes: int) -> None:
        self._descriptor = os.memfd_create("sagellm-bench", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, nbytes)
        self.name = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Let go of it; mappings live on."""
        os.close(self._descriptor)

    @staticmethod
    def open(name: str, block_bytes: int) -> Blocks:
        """Map it, all pages there."""
        descriptor = os.open(name, os.O_RDWR)
        try:
            mapped = mmap.mmap(descriptor, 0, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(descriptor)
        return np.frombuffer(mapped, np.uint8).reshape(-1, block_bytes)


def fill(blocks: Blocks, seed: int) -> None:
    """Bytes that look random, other ones in every block."""
    words = blocks.view(np.uint64)
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 1 << 63, words.shape[1], np.uint64)
    for row, salt in zip(words, rng.integers(1, 1 << 63, len(words), np.uint64), strict=True):
        np.bitwise_xor(noise, salt, out=row)


def sums(blocks: Blocks, ids: Ids) -> list[int]:
    """A checksum of each of these blocks, which knows the order of the bytes."""
    import xxhash

    return [xxhash.xxh3_64_intdigest(blocks[i]) for i in ids.tolist()]
