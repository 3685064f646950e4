"""Mapping memory files where large pages fit: copies of scattered blocks miss the TLB less."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGE_PAGE", "gather_pages", "map_file"]

LARGE_PAGE = 2 << 20
_MAP_FIXED, _MADV_COLLAPSE = 0x10, 25  # Linux; the second since 6.1
_FAILED = ctypes.c_void_p(-1).value


def map_file(fd: int, nbytes: int, *, writable: bool) -> NDArray[np.uint8]:
    """A shared mapping of a memory file, at a multiple of a large page if it is that large.

    It lasts as long as an array over it does.

    Raises:
        OSError: The limit of address space is reached.

    """
    return np.asarray(_Mapping(fd, nbytes, writable))


def gather_pages(memory: NDArray[np.uint8]) -> None:
    """Put a mapped file into large pages, as far as the kernel can; its bytes stay."""
    _libc("madvise", ctypes.c_int)(memory.ctypes.data, memory.nbytes, _MADV_COLLAPSE)


class _Mapping:
    """Owner of a mapping. Python's own cannot say where it wants to lie."""

    def __init__(self, fd: int, nbytes: int, writable: bool) -> None:
        unmap, map_ = _libc("munmap", ctypes.c_int), _libc("mmap", ctypes.c_void_p)
        self._unmap, self._nbytes, self._address = unmap, nbytes, 0
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        room = size + (LARGE_PAGE if nbytes >= LARGE_PAGE else 0)
        start = _address(map_(None, room, 0, private, -1, 0))
        begin = -(-start // LARGE_PAGE) * LARGE_PAGE if room > size else start
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            _address(map_(begin, nbytes, prot, mmap.MAP_SHARED | _MAP_FIXED, fd, 0))
        except OSError:
            unmap(start, room)
            raise
        for low, high in ((start, begin), (begin + size, start + room)):
            if low < high:
                unmap(low, high - low)
        self._address = begin
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (begin, not writable),
        }

    def __del__(self) -> None:
        if self._address:
            self._unmap(self._address, self._nbytes)


def _address(found: int | None) -> int:
    if found is None or found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


@functools.cache
def _libc(name: str, result: Any) -> Callable[..., Any]:  # noqa: ANN401 - a ctypes type
    call = getattr(ctypes.CDLL(None, use_errno=True), name)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    call.argtypes = {
        "mmap": (pointer, size, number, number, number, ctypes.c_long),
        "munmap": (pointer, size),
        "madvise": (pointer, size, number),
    }[name]
    call.restype = result
    found: Callable[..., Any] = call
    return found
