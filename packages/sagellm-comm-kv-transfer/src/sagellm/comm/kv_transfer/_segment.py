"""Memory in files without a name: what this process shares with others on its host.

A segment is one trust domain: whoever gets its descriptor may read all of it and, because it
is sealed, can neither write nor resize it, whatever it does with the descriptor. A read-only
descriptor alone would not do: its holder may open `/proc/self/fd/N` again for writing.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import (
    IntegrityError,
    MemoryRuns,
    ResourceError,
    UnsupportedOperationError,
)
from sagellm.core.protocols.host_limits import room_bytes, usable_cpus

from ._copy_workers import CopyWorkers
from ._mapping import gather_pages, map_file
from .memory import Ints

__all__ = ["Located", "Segment", "View", "have_workers", "locate", "shared_segments"]

logger = logging.getLogger(__name__)

_PAGE = 4096
_WORTH_BYTES = 64 << 20
"""Pools from this size on are worth a process that shares the copying."""
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10  # fcntl.h
_FIXED = _SEAL_SHRINK | _SEAL_GROW
_SEALS = _SEAL_SEAL | _FIXED | _SEAL_FUTURE_WRITE

_ids = itertools.count(1)
_lock = threading.Lock()


class Segment:
    """Memory that peers on this host may map and read. Thread-safe.

    Every page is there once it is made. It is shared only after `seal`. The memory lives as
    long as an array over it does; peers are told to let go when it is closed.

    Args:
        nbytes: Size, rounded up to pages.
        what: Name in messages.

    Raises:
        ResourceError: There is not that much memory; the message says how much there is.
        UnsupportedOperationError: The system has no memory files.

    """

    def __init__(self, nbytes: int, what: str) -> None:
        self.number = next(_ids)
        self.nbytes = max(1, -(-nbytes // _PAGE)) * _PAGE
        self.fd = _reserve(self.nbytes, what)
        try:
            mapped = map_file(self.fd, self.nbytes, writable=True)
        except OSError as e:
            os.close(self.fd)
            raise ResourceError(
                f"{self.nbytes} bytes for {what} cannot be mapped: {e.strerror}; raise the limit "
                "of address space (`ulimit -v`) of this process, or allocate fewer blocks"
            ) from e
        self.memory: NDArray[np.uint8] = mapped
        gather_pages(mapped)
        self.memory[::_PAGE] = 0  # map every page now, not under the first transfer
        self.address = int(self.memory.ctypes.data)
        self.workers: CopyWorkers | None = None
        self._closers: list[Callable[[Segment], None]] = []

    def start_workers(self, count: int, *, shares: bool = False) -> None:
        """Start processes that copy into it, or share that with us; only before it is sealed.

        Raises:
            ResourceError: They cannot be started.

        """
        self.workers = CopyWorkers(self.fd, self.nbytes, count, shares=shares)

    def start_sharing_worker(self) -> None:
        """Start one process to share copying with us, where that helps and as far as it can."""
        if self.nbytes < _WORTH_BYTES or not sys.executable or usable_cpus() < 2:
            return
        try:
            self.start_workers(1, shares=True)
        except ResourceError as e:
            logger.warning("%s; this process copies alone", e)

    def seal(self, *, share: bool = True) -> None:
        """Let nobody resize it, and nobody write it who does not map it yet; then share it."""
        global _shared
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as e:
            raise UnsupportedOperationError(
                f"this kernel cannot seal shared memory ({e.strerror}), which needs Linux 5.1; "
                "register tensors of your own instead"
            ) from e
        if share:
            with _lock:
                _shared = _Index.of([*_shared.segments, self])

    def dup(self) -> int | None:
        """Another descriptor of it; None when it is closed."""
        with _lock:
            return os.dup(self.fd) if self.fd >= 0 else None

    def when_closed(self, callback: Callable[[Segment], None]) -> bool:
        """Call back, once, when it is closed; False when it is closed already."""
        with _lock:
            if self.fd < 0:
                return False
            self._closers.append(callback)
            return True

    def forget(self, callback: Callable[[Segment], None]) -> None:
        """Do not call that back."""
        with _lock:
            if callback in self._closers:
                self._closers.remove(callback)

    def close(self) -> None:
        """Stop sharing it and drop our hold of its memory. Idempotent."""
        global _shared
        with _lock:
            if self.fd < 0:
                return
            fd, self.fd = self.fd, -1
            closers, self._closers = self._closers, []
            _shared = _Index.of([s for s in _shared.segments if s is not self])
        if self.workers is not None:
            self.workers.close()
        os.close(fd)
        self.memory = np.empty(0, dtype=np.uint8)
        for callback in closers:
            callback(self)


class Located(NamedTuple):
    """Runs of memory as places in segments: which of `segments`, and the offset in it."""

    segments: tuple[Segment, ...]
    which: Ints
    offsets: Ints


class _Index(NamedTuple):
    segments: tuple[Segment, ...]
    starts: Ints
    stops: Ints

    @classmethod
    def of(cls, segments: list[Segment]) -> _Index:
        ordered = sorted(segments, key=lambda s: s.address)
        starts = np.array([s.address for s in ordered], dtype=np.int64)
        sizes = np.array([s.nbytes for s in ordered], dtype=np.int64)
        return cls(tuple(ordered), starts, starts + sizes)


_shared = _Index.of([])


def shared_segments() -> tuple[Segment, ...]:
    """All that this process shares."""
    return _shared.segments


def have_workers() -> bool:
    """Whether some shared segment has copy workers that live."""
    return any(s.workers for s in _shared.segments)


def locate(runs: MemoryRuns) -> Located | None:
    """Where runs lie in shared segments; None when one of them does not."""
    index = _shared
    if not index.segments:
        return None
    if len(index.segments) == 1:
        at = np.zeros(len(runs.addresses), dtype=np.int64)
    else:
        at = np.searchsorted(index.starts, runs.addresses, side="right") - 1
        if (at < 0).any():
            return None
    offsets = runs.addresses - index.starts[at]
    if (offsets < 0).any() or (runs.addresses + runs.lengths > index.stops[at]).any():
        return None
    return Located(index.segments, at, offsets)


class View:
    """A peer's segment, mapped for reading.

    `readers` are the copy workers that map it, too.

    Args:
        fd: Of the peer; stays the caller's.
        nbytes: What the peer says of its size.

    Raises:
        IntegrityError: The peer could shrink or empty it under us, or it is another size.

    """

    def __init__(self, fd: int, nbytes: int) -> None:
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as e:
            raise IntegrityError(f"a segment that is no memory file ({e.strerror})") from e
        if seals & (_FIXED | _SEAL_FUTURE_WRITE) != _FIXED | _SEAL_FUTURE_WRITE:
            raise IntegrityError(f"a segment with seals {seals:#x} can be resized under its reader")
        found = os.fstat(fd)
        # a hole would be filled, at our cost, by reading it; sealed as it is, none can be made
        if found.st_size != nbytes or nbytes <= 0 or found.st_blocks * 512 < nbytes:
            raise IntegrityError(
                f"a segment of {found.st_size} bytes, {found.st_blocks * 512} of them there, "
                f"was announced with {nbytes}"
            )
        try:
            mapped = map_file(fd, nbytes, writable=False)
        except OSError as e:
            raise ResourceError(f"a peer's {nbytes} bytes cannot be mapped: {e.strerror}") from e
        self.number = next(_ids)
        self.nbytes = nbytes
        self.fd = os.dup(fd)
        self.readers: set[CopyWorkers] = set()
        self.memory: NDArray[np.uint8] = mapped
        self.memory[::_PAGE].max()
        self.address = int(self.memory.ctypes.data)

    def close(self) -> None:
        """Let go of it; it is unmapped with the last array over it. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        for workers in self.readers:
            workers.forget(self.number)
        self.memory = np.empty(0, dtype=np.uint8)


def _reserve(nbytes: int, what: str) -> int:
    """A descriptor of that much memory, every page of it there."""
    if not hasattr(os, "memfd_create"):
        raise UnsupportedOperationError(
            "shared pools need Linux; register tensors of your own instead"
        )
    room = room_bytes()
    detail = f"{nbytes} bytes for {what} cannot be allocated"
    advice = "allocate fewer blocks, free memory, or raise the limit of the container"
    if room is not None and nbytes > room:
        raise ResourceError(f"{detail}: {room} bytes are available here; {advice}")
    try:
        fd = os.memfd_create("sagellm-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as e:
        raise ResourceError(f"{detail}: {e.strerror}; close descriptors (`ulimit -n`)") from e
    try:
        os.ftruncate(fd, nbytes)
        os.posix_fallocate(fd, 0, nbytes)  # a page that is missing later would be a SIGBUS
    except OSError as e:
        os.close(fd)
        left = "unknown" if room is None else str(room)
        raise ResourceError(
            f"{detail}: {e.strerror}; {left} bytes are available here; {advice} or of file sizes "
            "(`ulimit -f`) of this process"
        ) from e
    return fd
