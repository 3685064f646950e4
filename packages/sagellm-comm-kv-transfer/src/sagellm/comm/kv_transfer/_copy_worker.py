"""A process that copies and verifies blocks for another, outside its GIL.

It is started by path and imports nothing of this package, so that it is there in a moment and
small. It speaks over the socket whose descriptor is its first argument, with its parent only:
a request is five 64-bit words (what, and four counts or numbers) and the columns they announce.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import runpy
import socket
import struct
import sys
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import xxhash

__all__: list[str] = []

HEAD = struct.Struct("<5Q")
MAP, UNMAP, COPY = range(3)
_TICK = struct.pack("ll", 1, 0)
_MAP_FILE = runpy.run_path(str(Path(__file__).with_name("_mapping.py")))["map_file"]

Mapped: TypeAlias = "tuple[np.ndarray[Any, np.dtype[np.uint8]], int]"


def _receive(sock: socket.socket, size: int, parent: int) -> bytearray:
    data, at = bytearray(size), 0
    while at < size:
        try:
            got = sock.recv_into(memoryview(data)[at:])
        except BlockingIOError:
            if os.getppid() != parent:  # it died, and somebody else holds its end of the socket
                raise SystemExit from None
            continue
        if not got:
            raise SystemExit
        at += got
    return data


def _mapped(fd: int, nbytes: int, *, writable: bool) -> Mapped:
    memory = _MAP_FILE(fd, nbytes, writable=writable)
    os.close(fd)
    memory[:: mmap.PAGESIZE].max()  # every page is mapped now, not under the first job
    return memory, int(memory.ctypes.data)


def main() -> None:
    """Serve until the parent closes its end, or is gone."""
    parent = os.getppid()
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TICK)
    pool, base = _mapped(int(sys.argv[2]), int(sys.argv[3]), writable=True)
    target = memoryview(pool)  # type: ignore[arg-type,unused-ignore]  # numpy 1's stubs
    sock.sendall(b"r")
    sources: dict[int, Mapped] = {}
    while True:
        what, a, b, c, d = HEAD.unpack(_receive(sock, HEAD.size, parent))
        if what == MAP:
            data, fds, _, _ = socket.recv_fds(sock, 1, 1)
            if len(data) != 1 or len(fds) != 1:
                raise SystemExit
            sources[a] = _mapped(fds[0], b, writable=False)
        elif what == UNMAP:
            sources.pop(a, None)
        else:
            columns = np.frombuffer(_receive(sock, 8 * (4 * a + 4 * b + 4 * c), parent), np.uint64)
            bad = _copy(columns, (a, b, c), d != 0, target, base, sources)
            sock.sendall(struct.pack("<Q", len(bad)) + array.array("Q", bad).tobytes())


def _copy(
    columns: np.ndarray[Any, np.dtype[np.uint64]],
    counts: tuple[int, int, int],
    check: bool,
    target: memoryview,
    base: int,
    sources: dict[int, Mapped],
) -> list[int]:
    """Copy batches of stretches; positions of units that are not what they should be."""
    stretches, batches, _ = counts
    at, end = 4 * stretches, 4 * (stretches + batches)
    which, offsets, to, sizes = columns[:at].reshape(4, -1)
    starts = np.zeros_like(offsets)
    for number, (_, address) in sources.items():
        starts[which == number] = address
    rows = list(
        zip(
            (to + np.uint64(base)).tolist(),
            (starts + offsets).tolist(),
            sizes.tolist(),
            strict=True,
        )
    )
    place, length, seed, total = columns[end:].reshape(4, -1).tolist()
    move, digest = ctypes.PyDLL(None).memmove, xxhash.xxh3_64_intdigest
    move.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    move.restype = None
    bad = []
    for low, high, first, last in columns[at:end].reshape(-1, 4).tolist():
        for row in rows[low:high]:
            move(*row)
        if check:
            for k in range(first, last):
                if digest(target[place[k] : place[k] + length[k]], seed[k]) != total[k]:
                    bad.append(k)
    return bad


if __name__ == "__main__":
    main()
