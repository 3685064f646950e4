"""For tests of engines alone: a segment, a socket between every two ranks, and reference sums."""

import contextlib
import mmap
import os
import socket
import time

import torch

from sagellm.comm.collective_ops._shm.layout import DTYPES, Layout
from sagellm.comm.collective_ops._shm.python_engine import PythonEngine

TYPES = [getattr(torch, name) for name in DTYPES]
_COMBINE = {
    "sum": torch.add,
    "avg": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
    "product": torch.mul,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}

LONG_S = 20.0
SLOT = 4096
ARENA = 1 << 20


class Meeting:
    """Rank processes that share a folder share a segment; `close` or leaving the block ends it.

    Attributes:
        memory: The segment.
        sockets: One to each peer, by rank.

    """

    def __init__(self, folder, rank, layout, timeout_s=20.0):
        self.rank, self.layout = rank, layout
        self.sockets = {}
        path = f"{folder}.segment"
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, layout.total_bytes)
        self.memory = mmap.mmap(fd, layout.total_bytes)
        os.close(fd)
        deadline = time.monotonic() + timeout_s
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}.{rank}")
            listener.listen(64)
            listener.settimeout(timeout_s)
            for lower in range(rank):
                peer = socket.socket(socket.AF_UNIX)
                while True:
                    try:
                        peer.connect(f"{folder}.{lower}")
                        break
                    except (FileNotFoundError, ConnectionRefusedError):
                        if time.monotonic() > deadline:
                            raise
                        os.sched_yield()
                peer.sendall(bytes([rank]))
                self.sockets[lower] = peer
            while len(self.sockets) < layout.world - 1:
                peer, _ = listener.accept()
                self.sockets[peer.recv(1)[0]] = peer

    def engine(self, make, **options):
        options.setdefault("polls", 50)
        fds = {rank: peer.fileno() for rank, peer in self.sockets.items()}
        return make(self.memory, self.layout, self.rank, fds, **options)

    def close(self):
        for peer in self.sockets.values():
            peer.close()
        with contextlib.suppress(BufferError):  # views of it are still about
            self.memory.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def values(rank, n, dtype, salt=0):
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    if dtype is torch.bool:
        return torch.randint(0, 2, (n,), generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(n, generator=generator).to(dtype)
    info = torch.iinfo(dtype)
    return torch.randint(info.min // 2, info.max // 2, (n,), generator=generator).to(dtype)


def in_order(xs, op):
    wide = torch.float32 if xs[0].dtype in (torch.float16, torch.bfloat16) else xs[0].dtype
    total = xs[0].to(wide)
    for x in xs[1:]:
        total = _COMBINE[op](total, x.to(wide))
    return (total / len(xs) if op == "avg" else total).to(xs[0].dtype)


def reductions(dtype):
    if dtype.is_floating_point:
        return ("sum", "avg", "min", "max", "product")
    return ("sum", "min", "max", "product", "band", "bor", "bxor")


@contextlib.contextmanager
def engine_of(backend, folder, slot=SLOT, **options):
    """A Python engine on its own segment; the sockets stay open until all ranks are done."""
    with Meeting(folder, backend.rank, Layout(backend.size, slot, ARENA)) as meeting:
        engine = meeting.engine(PythonEngine, **options)
        engine.meeting = meeting
        yield engine
        backend.barrier()
        engine.close()
