"""Files that a user names: regular ones, and no more of them than is read."""

from __future__ import annotations

import os
import stat

__all__ = ["MAX_BYTES", "read_regular"]

MAX_BYTES = 64 << 20
"""Largest file that is read."""


def read_regular(path: str) -> bytes:
    """Bytes of a regular file; a pipe or a device is refused without waiting for it.

    Raises:
        OSError: It cannot be read, is no regular file, or is too large.

    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(f"{path} is no regular file")
        if facts.st_size > MAX_BYTES:
            raise OSError(f"{path} has {facts.st_size} bytes, more than the {MAX_BYTES} read")
        return file.read(MAX_BYTES)
