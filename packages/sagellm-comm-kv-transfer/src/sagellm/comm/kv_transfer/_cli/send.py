"""`send`: a file or random blocks to a node, with progress."""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from sagellm.core.protocols import CommTimeoutError, ConfigError, KVTransferError, TransferKey
from sagellm.core.protocols.show import print_json, print_line

from .live import Live
from .node import (
    FilePart,
    add_node_arguments,
    add_peer_arguments,
    block_layout,
    open_channel,
    positive_bytes,
    transfer_name,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm.comm.kv_transfer import KVTransferChannel
    from sagellm.comm.kv_transfer.transfer import TransferHandle

__all__ = ["add_send", "send"]

_Starts: TypeAlias = "Callable[[], Iterator[TransferHandle]]"

_PART_BYTES = 16 << 20
_IN_FLIGHT = 4
_TICK_S = 0.1


def add_send(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_peer_arguments(parser)
    add_node_arguments(parser, None)
    parser.add_argument("--file", help="file to send; without it, random blocks")
    parser.add_argument("--blocks", type=int, default=1024, help="random blocks, default 1024")
    parser.add_argument(
        "--block-bytes", type=positive_bytes, default=64 << 10, help="size of each, default 64k"
    )
    parser.add_argument(
        "--into-pool", action="store_true",
        help="write the blocks into random blocks of the peer's pool (`serve --pool-blocks`)",
    )  # fmt: skip


def send(arguments: argparse.Namespace) -> int:
    """Run it; the exit code."""
    import torch  # noqa: F401 - it takes seconds, which are not the transfer's

    if arguments.blocks <= 0:
        raise ConfigError(f"--blocks {arguments.blocks} is not positive")
    if arguments.file is not None and arguments.into_pool:
        raise ConfigError("--file and --into-pool exclude each other")
    total = arguments.blocks * arguments.block_bytes
    if arguments.file is not None:
        total = _size_of(arguments.file)
    with (
        open_channel(arguments, host=arguments.host) as channel,
        Live("send", total, quiet=arguments.json) as live,
    ):
        if arguments.into_pool:
            start = _into_pool(channel, arguments)
        elif arguments.file is not None:
            start = _of_file(channel, arguments, total)
        else:
            start = _of_blocks(channel, arguments)
        channel.connect(arguments.peer, arguments.timeout_s)
        live.begin()
        error = _drive(channel, arguments.peer, start(), live)
    if arguments.json:
        print_json({**live.report(), "error": None if error is None else str(error)})
    else:
        print_line(live.line())
    if error is not None:
        raise error
    return 0


def _drive(
    channel: KVTransferChannel, peer: int, starts: Iterator[TransferHandle], live: Live
) -> KVTransferError | None:
    """A few transfers at a time, in order; the first error ends it."""
    flying: list[TransferHandle] = []
    while True:
        while len(flying) < _IN_FLIGHT and (handle := next(starts, None)) is not None:
            flying.append(handle)
        if not flying:
            return None
        first = flying[0]
        try:
            first.wait(_TICK_S)
        except KVTransferError as e:
            live.failed(e.cause)
            for handle in flying[1:]:
                handle.cancel()
            return e
        except CommTimeoutError:
            live.show(sum(h.progress.bytes_done for h in flying), channel.path(peer))
            continue
        live.landed(flying.pop(0).metrics)


def _size_of(path: str) -> int:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as e:
        raise ConfigError(f"--file {path}: {e.strerror or e}") from e
    if not size:
        raise ConfigError(f"--file {path} is empty: there is nothing to send")
    return size


def _of_file(channel: KVTransferChannel, arguments: argparse.Namespace, size: int) -> _Starts:
    import numpy as np
    import torch

    run, name = secrets.token_hex(6), os.path.basename(arguments.file)
    # mode c: torch takes no memory that cannot be written, and nobody writes this
    data = torch.from_numpy(np.memmap(arguments.file, np.uint8, mode="c", shape=(size,)))

    def start() -> Iterator[TransferHandle]:
        for offset in range(0, size, _PART_BYTES):
            key = FilePart(run, offset, size, name).key()
            yield _push(channel, arguments, data[offset : offset + _PART_BYTES], key)

    return start


def _of_blocks(channel: KVTransferChannel, arguments: argparse.Namespace) -> _Starts:
    """The same random bytes in every part: making more would take longer than sending them."""
    import torch

    block_bytes = arguments.block_bytes
    per_part = max(1, min(arguments.blocks, _PART_BYTES // block_bytes))
    data = torch.randint(0, 256, (per_part, block_bytes), dtype=torch.uint8)
    run = transfer_name("blocks")

    def start() -> Iterator[TransferHandle]:
        for i, first in enumerate(range(0, arguments.blocks, per_part)):
            count = min(per_part, arguments.blocks - first)
            yield _push(channel, arguments, data[:count], TransferKey(f"{run}-{i}"))

    return start


def _push(
    channel: KVTransferChannel, arguments: argparse.Namespace, data: Tensor, key: TransferKey
) -> TransferHandle:
    return channel.transfer([data], arguments.peer, key=key, deadline_s=arguments.timeout_s)


def _into_pool(channel: KVTransferChannel, arguments: argparse.Namespace) -> _Starts:
    """Random blocks of a pool of ours into random blocks of theirs, in one transfer."""
    import numpy as np

    pool = channel.allocate(block_layout(arguments.block_bytes), arguments.blocks)
    pool.tensors["blocks"].random_(0, 256)
    order = np.random.default_rng()

    def start() -> Iterator[TransferHandle]:
        yield channel.transfer(
            order.permutation(arguments.blocks),
            arguments.peer,
            key=TransferKey(transfer_name("pool")),
            dst_blocks=order.permutation(arguments.blocks),
            deadline_s=arguments.timeout_s,
        )

    return start
