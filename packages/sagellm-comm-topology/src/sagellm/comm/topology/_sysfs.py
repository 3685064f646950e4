"""Reads from a live or recorded file tree, where anything may be missing or unreadable."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from ._numbers import number, whole_number

__all__ = ["BDF", "Tree", "gt_per_s", "normal_bdf", "pcie_bytes_per_s"]

BDF = re.compile(r"^([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}):([0-9a-fA-F]{2})\.([0-7])$")

_READ_LIMIT_BYTES = 4096

# Payload share of the line code: 8b/10b, 128b/130b, and the 242 of 256 bytes of a PCIe 6 flit.
_LINE_CODE = {2.5: 0.8, 5.0: 0.8, 8.0: 128 / 130, 16.0: 128 / 130, 32.0: 128 / 130, 64.0: 242 / 256}


@lru_cache(maxsize=8192)
def normal_bdf(text: str) -> str | None:
    """PCI address in lower case with the shortest domain of at least four digits.

    >>> normal_bdf("00000000:17:00.0"), normal_bdf("10000:00:04.0"), normal_bdf("eth0")
    ('0000:17:00.0', '10000:00:04.0', None)
    """
    match = BDF.match(text.strip())
    if match is None:
        return None
    domain, bus, device, function = match.groups()
    return f"{int(domain, 16):04x}:{bus.lower()}:{device.lower()}.{function}"


def gt_per_s(text: str | None) -> float | None:
    """Transfers per second in 10^9, out of `32.0 GT/s PCIe`; None for `Unknown`."""
    match = re.match(r"\s*([0-9.]+)\s*GT/s", text or "")
    return number(match[1]) if match else None


def pcie_bytes_per_s(speed: str | None, width: str | None) -> float | None:
    """Payload bytes per second and direction of a PCIe link; None when either is unknown.

    >>> round(pcie_bytes_per_s("32.0 GT/s PCIe", "16") / 1e9, 1)
    63.0
    """
    rate = gt_per_s(speed)
    lanes = whole_number(width) or 0
    if rate not in _LINE_CODE or not 1 <= lanes <= 32:  # width reads 0 or 255 when unknown
        return None
    return rate * 1e9 * lanes * _LINE_CODE[rate] / 8


class Tree:
    """Files below one root. Nothing here raises: what cannot be read is None or empty.

    Args:
        root: `/` for the live machine, or the folder of a recorded one.

    """

    def __init__(self, root: Path) -> None:
        self._root = os.fspath(root).rstrip("/")

    def read(self, path: str, limit_bytes: int = _READ_LIMIT_BYTES) -> str | None:
        """Stripped text of a file, at most its first `limit_bytes`; None if unreadable."""
        try:
            fd = os.open(self._root + path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError):
            return None
        try:
            return os.read(fd, limit_bytes).decode("utf-8", "replace").strip()
        except OSError:  # EINVAL of a net device that is down, EISDIR, …
            return None
        finally:
            os.close(fd)

    def names(self, path: str) -> list[str] | None:
        """Sorted names in a folder; None when there is no such folder or it is closed to us."""
        try:
            return sorted(os.listdir(self._root + path))
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Whether the entry is there, a dangling link included."""
        return os.path.lexists(self._root + path)

    def target(self, path: str) -> str | None:
        """Where the symlink points, as a path below the root; None if it is no such link.

        One step, by its text: links of sysfs are relative and single, so that this costs one
        system call and cannot loop.
        """
        try:
            text = os.readlink(self._root + path)
        except OSError:
            return None
        if os.path.isabs(text):
            return os.path.normpath(text)
        joined = os.path.normpath(os.path.join(os.path.dirname(path), text))
        return joined if joined.startswith("/") else None
