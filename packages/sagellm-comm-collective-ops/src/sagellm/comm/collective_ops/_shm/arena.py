"""Symmetric tensors: pieces of this rank's arena, which peers read and write where they lie."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from sagellm.core.protocols import ConfigError, ResourceError

from .layout import PAGE
from .segment import Segment

__all__ = ["Arena"]

_ALIGNMENT = 64


class Arena:
    """Gives out this rank's arena and takes it back when the last view of a tensor has died.

    Pages come with the tensors that lie on them, and go with the last one.
    """

    def __init__(self, segment: Segment, rank: int) -> None:
        self._segment = segment
        self._start = segment.layout.arena(rank)
        self._bytes = segment.layout.arena_bytes
        self._free: list[tuple[int, int]] = [(0, self._bytes)] if self._bytes else []
        self._tenants: dict[int, int] = {}  # tensors on each page
        self._dead: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def used_bytes(self) -> int:
        """Address space in use, rounded up to the alignment."""
        with self._lock:
            self._collect()
            return self._bytes - sum(size for _, size in self._free)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in the arena.

        Raises:
            ResourceError: The arena, or the machine, has no room for it.

        """
        dims = tuple(shape)
        if any(n < 0 for n in dims):
            raise ConfigError(f"shape {dims} has a negative size")
        count = math.prod(dims)
        if count == 0:
            return torch.empty(dims, dtype=dtype)
        size = -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._collect()
            offset = self._take(size)
        # torch keeps this view alive for as long as any tensor over it, and nothing else does.
        start = self._start + offset
        view = memoryview(self._segment.memory)[start : start + size]
        weakref.finalize(view, self._bury, offset, size).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=count).view(dims)

    def close(self) -> None:
        """Give nothing out any more, and leave what is out to its owners."""
        self._closed = True

    def _take(self, size: int) -> int:
        for index, (offset, room) in enumerate(self._free):
            if room >= size:
                break
        else:
            largest = max((room for _, room in self._free), default=0)
            raise ResourceError(
                f"{size} bytes do not fit into the arena of {self._bytes} bytes, whose largest gap "
                f"has {largest}; drop symmetric tensors, or pass a larger arena_bytes on all ranks"
            )
        pages = _pages(offset, size)
        fresh = [p for p in pages if p not in self._tenants]
        if fresh:
            first, last = fresh[0], fresh[-1]
            start = self._start + first * PAGE
            self._segment.grow(start, (last - first + 1) * PAGE, "a symmetric tensor")
        if room == size:
            del self._free[index]
        else:
            self._free[index] = (offset + size, room - size)
        for page in (pages[0], pages[-1]):
            self._tenants[page] = self._tenants.get(page, 0) + 1
        return offset

    def _bury(self, offset: int, size: int) -> None:
        """Run by the garbage collector, perhaps in the middle of anything: only note it."""
        self._dead.append((offset, size))
        if not self._closed and self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        while self._dead and not self._closed:
            offset, size = self._dead.popleft()
            pages = _pages(offset, size)
            for page in (pages[0], pages[-1]):
                self._tenants[page] -= 1
                if not self._tenants[page]:
                    del self._tenants[page]
            keep_first, keep_last = pages[0] in self._tenants, pages[-1] in self._tenants
            first = pages[0] + keep_first
            last = pages[-1] - keep_last
            if first <= last:
                self._segment.shrink(self._start + first * PAGE, (last - first + 1) * PAGE)
            self._merge(offset, size)

    def _merge(self, offset: int, size: int) -> None:
        self._free = sorted([*self._free, (offset, size)])
        joined: list[tuple[int, int]] = []
        for start, room in self._free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + room)
            else:
                joined.append((start, room))
        self._free = joined


def _pages(offset: int, size: int) -> range:
    return range(offset // PAGE, (offset + size - 1) // PAGE + 1)
