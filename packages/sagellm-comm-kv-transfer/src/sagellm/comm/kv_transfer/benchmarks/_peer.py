"""The sending process of `bench_transfer`: it does what the measuring process tells it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sagellm.comm.kv_transfer.channel import KVTransferChannel
from sagellm.comm.kv_transfer.memory import bytes_of
from sagellm.comm.kv_transfer.settings import KVTransferSettings
from sagellm.core.protocols import CacheGroup, KVLayout, TransferKey

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KEY", "block_ids", "channel_with", "gloo_group", "layout", "make_pool", "serve"]

KEY = b"only for this benchmark on loopback"


def layout(block_bytes: int) -> KVLayout:
    """One layer of opaque blocks."""
    group = CacheGroup("kv", "opaque", ("layer0",), ("block", "dim"), (block_bytes,), "uint8")
    return KVLayout((group,), "bench")


def make_pool(nbytes: int, block_bytes: int, seed: int) -> Tensor:
    """Twice as many blocks as one transfer moves, random, touched."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (2 * nbytes // block_bytes, block_bytes // 8)
    words = torch.randint(0, 1 << 62, shape, generator=generator)
    return words.view(torch.uint8)


def block_ids(nbytes: int, block_bytes: int, turn: int, side: int) -> NDArray[np.int64]:
    """The random blocks of one side in one transfer."""
    count = nbytes // block_bytes
    rng = np.random.default_rng((turn, side))
    return rng.permutation(2 * count)[:count]


def channel_with(node_id: int, *, checksum: bool, pool: Tensor) -> KVTransferChannel:
    """A channel with the pool registered."""
    settings = KVTransferSettings.load(checksum=checksum)
    channel = KVTransferChannel(node_id=node_id, peers={}, key=KEY, settings=settings)
    channel.register(layout(pool.shape[1]), {"layer0": pool})
    return channel


@contextlib.contextmanager
def gloo_group(rank: int, path: str) -> Iterator[None]:
    """A gloo group of the two processes."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=FileStore(path, 2), rank=rank, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


def serve(pipe: Connection, case: dict[str, Any], store: str) -> None:
    """Send as told until the pipe closes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    nbytes, block_bytes = case["nbytes"], case["block_bytes"]
    pool = make_pool(nbytes, block_bytes, seed=1)
    flat = bytes_of(pool)[:nbytes]
    with contextlib.ExitStack() as stack:
        stack.enter_context(gloo_group(0, store))
        channels = {
            name: stack.enter_context(channel_with(0, checksum=on, pool=pool))
            for name, on in (("checked", True), ("unchecked", False))
        }
        addresses = pipe.recv()
        for name, address in addresses.items():
            if name in channels:
                channels[name].add_peer(1, address)
        host, port = addresses["socket"].rsplit(":", 1)
        sock = stack.enter_context(socket.create_connection((host, int(port))))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        while True:
            try:
                what, turn = pipe.recv()
            except EOFError:
                return
            ids = block_ids(nbytes, block_bytes, turn, 0)
            if what in channels:
                key = TransferKey(f"{what}-{turn}")
                channels[what].transfer(ids, 1, key=key).wait()
            elif what == "socket":
                sock.sendall(flat)
            elif what == "gloo":
                dist.send(pool.index_select(0, torch.from_numpy(ids)), 1)
