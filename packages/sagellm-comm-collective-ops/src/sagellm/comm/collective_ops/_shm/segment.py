"""The memory that the ranks of one host share: a memfd, its header, and its mapping."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct

from sagellm.core.protocols import IntegrityError, ResourceError
from sagellm.core.protocols.host_limits import room_bytes

from . import layout as words
from .forks import release_in_children
from .layout import MAGIC, VERSION, Layout

__all__ = ["Segment", "reserve"]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_HEADER = struct.Struct("<8q")
_PROT_NONE, _MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_NORESERVE = 0, 0x02, 0x20, 0x4000
_MAP_FIXED_NOREPLACE = 0x100000


class Segment:
    """One rank's mapping of the group's segment; `create` or `attach` makes it.

    The memory belongs to the processes that map it: it has no name, and is gone with the last
    of them. A forked child has no access: its descriptor and mapping are taken away.

    Attributes:
        memory: The mapping. Tensors over it keep it alive after `close`.
        layout: Where everything lies.

    """

    def __init__(self, fd: int, layout: Layout) -> None:
        self.layout = layout
        try:
            self.memory = mmap.mmap(fd, layout.total_bytes)
        except (OSError, ValueError) as e:
            raise ResourceError(
                f"{layout.total_bytes} bytes of address space for the shared segment: {e}; "
                f"pass a smaller arena_bytes ({layout.arena_bytes} for each of "
                f"{layout.world} ranks), or raise the limit of `ulimit -v`"
            ) from e
        self.fd = fd
        self._file = _identity(fd)
        self.memory.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):
            self.memory.madvise(mmap.MADV_DONTDUMP)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        release_in_children(self)

    @classmethod
    def create(cls, layout: Layout, nonce: int) -> Segment:
        """A new segment with its header written.

        Raises:
            ResourceError: The machine, or a limit of this process, has no room for it.

        """
        need = layout.arena_offset
        fd = os.memfd_create("sagellm-comm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            reserve(fd, 0, need, "the shared segment", total=layout.total_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            os.pwrite(fd, _header(layout, nonce), 0)
            return cls(fd, layout)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, layout: Layout, nonce: int) -> Segment:
        """The segment behind a received descriptor, which becomes this object's.

        Raises:
            IntegrityError: It is not the segment that was announced.

        """
        try:
            cls._check(fd, layout, nonce)
            return cls(fd, layout)
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def _check(fd: int, layout: Layout, nonce: int) -> None:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size != layout.total_bytes:
            raise IntegrityError(
                f"the segment received has {os.fstat(fd).st_size} bytes and seals {seals:#x}, "
                f"announced were {layout.total_bytes} bytes that cannot shrink"
            )
        wanted = _header(layout, nonce)
        found = os.pread(fd, len(wanted), 0)
        if found != wanted:
            raise IntegrityError("the header of the segment received is not the one announced")

    def grow(self, offset: int, nbytes: int, what: str) -> None:
        """Reserve pages of the arena.

        Raises:
            ResourceError: There is no room for them.

        """
        reserve(self.fd, offset, nbytes, what)

    def shrink(self, offset: int, nbytes: int) -> None:
        """Give pages of the arena back; their contents become zeros."""
        if self.fd >= 0:
            _fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, nbytes)

    def close(self) -> None:
        """Unmap, unless tensors of the arena are still alive: then when the last one dies."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        with contextlib.suppress(BufferError):
            self.memory.close()

    def after_fork(self) -> None:
        """In a child: no mapping (MADV_DONTFORK), nobody else's in its place, no descriptor."""
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED_NOREPLACE
        held = _libc().mmap(self.base, self.layout.total_bytes, _PROT_NONE, flags, -1, 0)
        if held != self.base:
            # The range has a new owner already: never unmap it.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.memory))
        _drop(self._file)


def reserve(fd: int, offset: int, nbytes: int, what: str, *, total: int = 0) -> None:
    """Back `nbytes` of a memfd with memory, so that no later access can fail.

    Raises:
        ResourceError: With figures, and what to do.

    """
    room = room_bytes()
    detail = f"{nbytes} bytes for {what} cannot be reserved"
    advice = "free memory, or pass smaller slot_bytes"
    if room is not None and nbytes > room:
        raise ResourceError(f"{detail}: {room} bytes are available here; {advice}")
    try:
        if total:
            os.ftruncate(fd, total)
        _fallocate(fd, _KEEP_SIZE, offset, nbytes)
    except OSError as e:
        left = "unknown" if room is None else str(room)
        raise ResourceError(
            f"{detail}: {e.strerror}; {left} bytes are available here; {advice}, or raise the "
            f"limits of memory and file size (`ulimit -f`) of this process"
        ) from e


def _header(layout: Layout, nonce: int) -> bytes:
    first = _HEADER.pack(
        MAGIC,
        VERSION,
        layout.world,
        layout.slot_bytes,
        layout.arena_bytes,
        layout.data_offset,
        layout.arena_offset,
        layout.mailbox_bytes,
    )
    return first.ljust(words.H_NONCE, b"\0") + struct.pack("<q", nonce)


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _drop(file: tuple[int, int]) -> None:
    """Let every descriptor of a file be one of /dev/null: the numbers stay taken."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for name in os.listdir("/proc/self/fd"):  # mmap has a descriptor of its own
        with contextlib.suppress(OSError):
            if _identity(int(name)) == file:
                os.dup2(null, int(name), inheritable=False)
    os.close(null)


_c: ctypes.CDLL | None = None


def _libc() -> ctypes.CDLL:
    global _c
    if _c is None:
        _c = ctypes.CDLL(None, use_errno=True)
        _c.mmap.restype = ctypes.c_void_p
        flags = [ctypes.c_int] * 3
        _c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *flags, ctypes.c_long]
        _c.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    return _c


def _fallocate(fd: int, mode: int, offset: int, nbytes: int) -> None:
    if nbytes and _libc().fallocate(fd, mode, offset, nbytes):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
