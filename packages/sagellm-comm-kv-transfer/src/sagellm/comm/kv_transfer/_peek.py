"""Reading another process's memory, where the kernel lets us."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal

import numpy as np

from sagellm.core.protocols import IntegrityError, MemoryRuns, PeerLostError

from .memory import Ints

__all__ = ["Peek"]

_IOV_MAX = 1024
_CALL_BYTES = 8 << 20
"""Bytes per call, so that a peer that is given up is soon let go."""


class Peek:
    """The memory of one process; of that very process, however soon its number is used again.

    Args:
        pid: The process, as the kernel told us of it.

    Raises:
        PeerLostError: There is no such process here.
        OSError: The kernel does not let us.

    """

    def __init__(self, pid: int) -> None:
        if not hasattr(os, "pidfd_open") or pid <= 0:
            raise OSError(errno.ESRCH, "its process cannot be seen from here")
        self._pid = pid
        self._call = ctypes.CDLL(None, use_errno=True).process_vm_readv
        self._call.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_ulong,
            ctypes.c_void_p,
            ctypes.c_ulong,
            ctypes.c_ulong,
        )
        self._call.restype = ctypes.c_ssize_t
        self._pidfd = os.pidfd_open(pid)

    def read(self, sources: MemoryRuns, addresses: Ints) -> int:
        """Copy runs of its memory to addresses of ours; returns the number of kernel calls.

        Raises:
            PeerLostError: The process has ended.
            IntegrityError: It has no such memory.
            OSError: The kernel does not let us.

        """
        lengths = sources.lengths
        local = np.ascontiguousarray(np.stack((addresses, lengths), axis=1))
        remote = np.ascontiguousarray(np.stack((sources.addresses, lengths), axis=1))
        ends = np.cumsum(lengths)
        at = calls = 0
        while at < len(lengths):
            before = int(ends[at] - local[at, 1])
            enough = int(np.searchsorted(ends, before + _CALL_BYTES, side="right"))
            stop = min(max(at + 1, enough), at + _IOV_MAX)
            moved = self._once(local[at:stop], remote[at:stop])
            calls += 1
            done = int(np.searchsorted(ends, before + moved, side="right"))
            if done < stop:
                part = before + moved - int(ends[done] - local[done, 1])
                local[done] += (part, -part)
                remote[done] += (part, -part)
            at = done
        self.check()
        return calls

    def _once(self, local: Ints, remote: Ints) -> int:
        n = len(local)
        moved = int(self._call(self._pid, local.ctypes.data, n, remote.ctypes.data, n, 0))
        if moved > 0:
            return moved
        code = ctypes.get_errno()
        if code == errno.ESRCH:
            raise PeerLostError(f"process {self._pid} has ended")
        if code == errno.EFAULT or moved == 0:
            raise IntegrityError(f"process {self._pid} refers to memory that it does not have")
        raise OSError(code, os.strerror(code))

    def check(self) -> None:
        """Check that it is the same process still.

        Raises:
            PeerLostError: It has ended.

        """
        try:
            signal.pidfd_send_signal(self._pidfd, 0)
        except ProcessLookupError as e:
            raise PeerLostError(f"process {self._pid} has ended") from e

    def close(self) -> None:
        """Let go of it. Idempotent."""
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
