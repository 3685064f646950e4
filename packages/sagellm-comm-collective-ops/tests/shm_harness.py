"""For tests of engines alone: a segment, a socket between every two ranks, and reference sums."""

import contextlib
import mmap
import os
import socket
import time

import pytest
import torch

from sagellm.comm.collective_ops._shm import native_engine
from sagellm.comm.collective_ops._shm.engine import EngineFailure
from sagellm.comm.collective_ops._shm.engines import available_engines, engine_factory
from sagellm.comm.collective_ops._shm.layout import DTYPES, H_POISON, Layout
from sagellm.core.protocols.process_group import RawCall

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
SIZES = (3, 1100, 5003)  # elements: within a slot, above one for most types, several
BARRIER = RawCall("barrier", timeout_s=LONG_S)

ENGINES = list(available_engines())
VARIANTS = [*ENGINES, *(["native-resumed"] if "native" in ENGINES else [])]
"""The engines of this machine; a resumed one gives up every wait at once, to go on later."""


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
def engine_of(backend, folder, variant, **options):
    """An engine on its own segment; the sockets stay open until all ranks are done."""
    name, _, resumed = variant.partition("-")
    before = native_engine.HOLD_NS
    native_engine.HOLD_NS = 1 if resumed else before
    layout = Layout(backend.size, SLOT, ARENA)
    try:
        with Meeting(f"{folder}{name}", backend.rank, layout) as meeting:
            engine = meeting.engine(engine_factory(name), **options)
            engine.meeting = meeting
            yield engine
            backend.barrier()
            engine.close()
    finally:
        native_engine.HOLD_NS = before


def fails(run):
    """Why a call failed, and the rank that it names."""
    with pytest.raises(EngineFailure) as failed:
        run()
    return failed.value.cause, failed.value.rank


def poison_word(engine):
    return int.from_bytes(engine.meeting.memory[H_POISON : H_POISON + 8], "little")


def until(condition, timeout_s=LONG_S):
    """Poll `condition`, which another process or thread brings about."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.001)
