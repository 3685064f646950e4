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
import socket
import struct
import sys

import numpy as np
import xxhash

__all__: list[str] = []

HEAD = struct.Struct("<5Q")
MAP, UNMAP, COPY = range(3)
_TICK = struct.pack("ll", 1, 0)


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


def _mapped(fd: int, nbytes: int, *, writable: bool) -> tuple[memoryview, int]:
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    mapped = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=prot)
    os.close(fd)
    memory = np.frombuffer(mapped, dtype=np.uint8)
    return memoryview(memory), int(memory.ctypes.data)  # type: ignore[arg-type]  # numpy 1's stubs


def main() -> None:
    """Serve until the parent closes its end, or is gone."""
    parent = os.getppid()
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TICK)
    target, base = _mapped(int(sys.argv[2]), int(sys.argv[3]), writable=True)
    sock.sendall(b"r")
    sources: dict[int, tuple[memoryview, int]] = {}
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
            columns = array.array("Q")
            columns.frombytes(_receive(sock, 8 * (4 * a + 4 * b + 4 * c), parent))
            bad = _copy(columns, (a, b, c), d != 0, target, base, sources)
            sock.sendall(struct.pack("<Q", len(bad)) + array.array("Q", bad).tobytes())


def _copy(
    columns: array.array[int],
    counts: tuple[int, int, int],
    check: bool,
    target: memoryview,
    base: int,
    sources: dict[int, tuple[memoryview, int]],
) -> list[int]:
    """Copy batches of stretches; positions of units that are not what they should be."""
    stretches, batches, units = counts
    rows = columns.tolist()
    which, offsets, to, sizes = (rows[i * stretches : (i + 1) * stretches] for i in range(4))
    at = 4 * stretches
    starts = {number: address for number, (_, address) in sources.items()}
    move, digest = ctypes.memmove, xxhash.xxh3_64_intdigest
    bad = []
    cells = rows[at + 4 * batches :]
    place, length, seed, total = (cells[i * units : (i + 1) * units] for i in range(4))
    for i in range(at, at + 4 * batches, 4):
        low, high, first, last = rows[i : i + 4]
        for k in range(low, high):
            move(base + to[k], starts[which[k]] + offsets[k], sizes[k])
        if check:
            for k in range(first, last):
                if digest(target[place[k] : place[k] + length[k]], seed[k]) != total[k]:
                    bad.append(k)
    return bad


if __name__ == "__main__":
    main()
