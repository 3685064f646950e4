"""The segment as addresses to copy to and as arrays to compute with."""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import TypeAlias

import numpy as np
import torch

from .layout import Layout
from .python_arithmetic import NUMPY_TYPES, Array

__all__ = ["CACHED_VIEWS", "Memory", "move"]

Views: TypeAlias = tuple[tuple[Array, ...], tuple[Array, ...]]

CACHED_VIEWS = 1024
"""Longest cache of views: a call uses one or two, a view costs about 1 us to make."""

move = ctypes.memmove
"""`move(to, from, nbytes)` by address; lets other threads run meanwhile."""


class Memory:
    """Slots and arenas of one segment, and scratch memory of this process.

    Attributes:
        slots: Address of each rank's slot, per parity.
        arenas: Address of each rank's arena.
        part_bytes: Longest of the equal parts that a slot is cut in, one per rank.

    """

    def __init__(self, memory: mmap.mmap, layout: Layout, rank: int) -> None:
        self._memory: mmap.mmap | None = memory
        self._layout = layout
        self._rank = rank
        anchor = np.frombuffer(memory, np.uint8)
        base = int(anchor.ctypes.data)
        ranks = range(layout.world)
        self.slots = tuple(tuple(base + layout.slot(r, parity) for r in ranks) for parity in (0, 1))
        self.arenas = tuple(base + layout.arena(r) for r in ranks)
        self.part_bytes = layout.slot_bytes // layout.world // 64 * 64
        self.views = functools.lru_cache(CACHED_VIEWS)(self._views)
        self.scratch = functools.lru_cache(CACHED_VIEWS)(self._scratch)
        self._buffers: dict[int, bytearray] = {}

    def part(self, nbytes: int) -> int:
        """Bytes of a part when `nbytes` are cut into chunks of `world` parts as equal as can be."""
        world = self._layout.world
        chunks = max(1, -(-nbytes // (world * self.part_bytes)))
        return max(64, (-(-nbytes // (chunks * world)) + 63) // 64 * 64)

    def _views(self, count: int, dtype: torch.dtype, offset: int) -> Views:
        """`count` elements at `offset` in every slot: `views(…)[parity][rank]`."""
        ranks = range(self._layout.world)
        even, odd = (
            tuple(self.array(self._layout.slot(r, parity) + offset, count, dtype) for r in ranks)
            for parity in (0, 1)
        )
        return even, odd

    def in_arena(self, rank: int, offset: int, count: int, dtype: torch.dtype) -> Array:
        """`count` elements at `offset` in an arena."""
        return self.array(self._layout.arena(rank) + offset, count, dtype)

    def array(self, offset: int, count: int, dtype: torch.dtype) -> Array:
        """`count` elements at `offset` in the segment."""
        assert self._memory is not None, "closed"
        if dtype in NUMPY_TYPES:
            return np.frombuffer(self._memory, NUMPY_TYPES[dtype], count, offset)
        with torch.inference_mode(False):
            if count == 0:
                return torch.empty(0, dtype=dtype)
            return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)

    def _scratch(self, count: int, dtype: torch.dtype, index: int) -> Array:
        """Memory of this process, another for every `index`; contents do not outlive a call."""
        nbytes = max(8, count * dtype.itemsize)
        buffer = self._buffers.get(index, b"")
        if len(buffer) < nbytes:
            buffer = self._buffers[index] = bytearray(nbytes)
        return np.frombuffer(buffer, NUMPY_TYPES[dtype], count)

    def arena_offset(self, address: int, nbytes: int) -> int | None:
        """Where in this rank's arena `address` lies, None if these bytes are not all in it."""
        offset = address - self.arenas[self._rank]
        return offset if 0 <= offset <= self._layout.arena_bytes - nbytes else None

    def close(self) -> None:
        """Forget every view; the mapping ends with the last of those that callers hold."""
        self.views.cache_clear()
        self.scratch.cache_clear()
        self._buffers.clear()
        self._memory = None
