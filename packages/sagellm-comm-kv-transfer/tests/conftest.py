"""Channels that are closed, layouts and tensors to move, a proxy that damages bytes."""

import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferChannel
from sagellm.core.protocols import CacheGroup, KVLayout, Shard
from sagellm.core.protocols.testing.pytest_plugin import (
    rank_pool as rank_pool,
    rank_pools as rank_pools,
)

sys.path.append(str(Path(__file__).parent))  # helpers lie beside the tests


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def channel():
    """Makes channels, and closes them."""
    made = []

    def make(*args, **kwargs):
        made.append(KVTransferChannel(*args, **kwargs))
        return made[-1]

    yield make
    for c in made:
        c.close()


@pytest.fixture
def layout():
    """Makes a layout of one group, kv_BSHPD, of which this node holds a shard of the heads."""

    def make(heads=4, tp=1, rank=0, layers=3, page=4, dim=8, dtype="float32", model="m", **kw):
        replicas = max(1, tp // heads)
        parts = tp // replicas
        shard = Shard("head", rank // replicas, parts, replicas) if tp > 1 else None
        return KVLayout(
            (
                CacheGroup(
                    name="kv",
                    kind="kv",
                    layers=tuple(f"layer{i}" for i in range(layers)),
                    axes=kw.get("axes", ("block", "kv", "head", "token", "dim")),
                    block_shape=kw.get("block_shape", (2, heads // parts, page, dim)),
                    dtype=dtype,
                    page_tokens=page,
                    shard=shard,
                ),
            ),
            model=model,
        )

    return make


@pytest.fixture
def tensors():
    """Makes tensors for such a layout, random."""

    def make(layout, blocks=10):
        group = layout.groups[0]
        shape = (blocks, *group.block_shape)
        return {n: torch.randn(shape).to(getattr(torch, group.dtype)) for n in group.layers}

    return make


@pytest.fixture
def pair(channel, layout, tensors):
    """Two channels with equal layouts: (sender, its tensors, receiver, its tensors)."""

    def make(blocks=10, sender=None, receiver=None, **kw):
        out, into = channel(**(sender or {})), channel(**(receiver or {}))
        a, b = tensors(layout(**kw), blocks), tensors(layout(**kw), blocks)
        out.register(layout(**kw), a)
        into.register(layout(**kw), b)
        return out, a, into, b

    return make


class Proxy:
    """Forwards one address byte by byte, except those that it flips."""

    def __init__(self, target):
        self.target = target
        self.flip = lambda position, data: data
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            host, port = self.target.rsplit(":", 1)
            far = socket.create_connection((host, int(port)))
            self._sockets += [near, far]
            for a, b, forward in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(a, b, forward), daemon=True).start()

    def _pump(self, a, b, forward):
        position = 0
        while True:
            try:
                data = bytearray(a.recv(1 << 16))
                if not data:
                    b.shutdown(socket.SHUT_WR)
                    return
                if forward:
                    data = self.flip(position, data)
                    position += len(data)
                b.sendall(data)
            except OSError:
                return

    def close(self):
        for s in self._sockets:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            s.close()


@pytest.fixture
def proxy():
    made = []

    def make(target):
        made.append(Proxy(target))
        return made[-1]

    yield make
    for p in made:
        p.close()


@pytest.fixture
def eventually():
    """Waits until something is true, and fails when it does not become so."""

    def wait(condition, timeout_s=5.0):
        end = time.monotonic() + timeout_s
        tick = threading.Event()
        while not condition():
            assert time.monotonic() < end, "it did not become true in time"
            tick.wait(0.005)

    return wait
