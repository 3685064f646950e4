"""`serve`: a node that takes what is sent to it, into memory or into files."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sagellm.core.protocols import ConfigError, KVTransferError, ResourceError
from sagellm.core.protocols.show import bytes_text, print_json, print_line

from .live import Live
from .node import FilePart, add_node_arguments, block_layout, open_channel, positive_bytes

if TYPE_CHECKING:
    from sagellm.comm.kv_transfer import KVTransferChannel
    from sagellm.comm.kv_transfer.transfer import TransferHandle

__all__ = ["Folder", "add_serve", "serve"]

_WAITING = 8
_FOREVER_S = 1e8
_TICK_S = 0.1
_MAX_OPEN = 64


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument(
        "--listen", default="127.0.0.1:0",
        help="host:port, port 0 for any free one; default 127.0.0.1:0",
    )  # fmt: skip
    parser.add_argument("--advertise", help="host that peers are told; for a wildcard host")
    add_node_arguments(parser, 0)
    parser.add_argument(
        "--output", help="folder for files that are sent; without it they are dropped"
    )
    parser.add_argument(
        "--max-file-bytes", type=positive_bytes, default=16 << 30,
        help="refuse to store files larger than this, default 16G",
    )  # fmt: skip
    parser.add_argument(
        "--pool-blocks", type=int, default=0, help="have a pool of so many blocks, default none"
    )
    parser.add_argument("--block-bytes", type=positive_bytes, default=64 << 10, help="default 64k")
    parser.add_argument("--transfers", type=int, help="end after so many transfers")
    parser.add_argument("--idle-s", type=float, help="end after so long without any")


def serve(arguments: argparse.Namespace) -> int:
    """Run it; the exit code."""
    import torch  # noqa: F401 - it takes seconds, which nobody should wait for who sends

    host, _, port = arguments.listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--listen {arguments.listen!r} is not host:port")
    if arguments.pool_blocks < 0:
        raise ConfigError(f"--pool-blocks {arguments.pool_blocks} is negative")
    for name in ("transfers", "idle_s"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is not positive")
    with contextlib.ExitStack() as stack:
        folder = None
        if arguments.output is not None:
            folder = stack.enter_context(Folder(arguments.output, arguments.max_file_bytes))
        channel = stack.enter_context(
            open_channel(arguments, host=host, port=int(port), advertise=arguments.advertise)
        )
        if arguments.pool_blocks:
            channel.allocate(block_layout(arguments.block_bytes), arguments.pool_blocks)
        if arguments.json:
            print_json({"node": channel.node_id, "address": channel.address})
        else:
            print_line(f"node {channel.node_id} at {channel.address}; stop it with Ctrl-C")
        live = stack.enter_context(Live("receive", quiet=arguments.json))
        try:
            _take(channel, folder, live, arguments)
        finally:
            stack.callback(_summary, live, arguments.json)
    return 1 if live.failures else 0


def _summary(live: Live, as_json: bool) -> None:
    if as_json:
        print_json(live.report())
    else:
        print_line(live.line())


def _take(
    channel: KVTransferChannel, folder: Folder | None, live: Live, arguments: argparse.Namespace
) -> None:
    waiting: list[TransferHandle] = []
    last = time.monotonic()
    while arguments.transfers is None or live.transfers < arguments.transfers:
        while len(waiting) < _WAITING:
            waiting.append(channel.receive(None, deadline_s=_FOREVER_S, adopt=True))
        if arguments.interrupted:
            raise KeyboardInterrupt
        select.select([channel.fileno()], [], [], _TICK_S)
        channel.poll()
        for handle in [h for h in waiting if h.done()]:
            waiting.remove(handle)
            last = time.monotonic()
            _ended(handle, folder, live)
        moving = sum(h.progress.bytes_done for h in waiting)
        if moving:
            last = time.monotonic()
        live.show(moving)
        if arguments.idle_s is not None and time.monotonic() - last > arguments.idle_s:
            return


def _ended(handle: TransferHandle, folder: Folder | None, live: Live) -> None:
    try:
        handle.wait(0.0)
        part = FilePart.of(handle.key)
        if folder is not None and part is not None:
            folder.write(part, [b.tensor.numpy().tobytes() for b in handle.blocks])
    except KVTransferError as e:
        live.failed(e.cause)
        print_line(f"{handle.key.id}: {e}")
    except (ResourceError, OSError) as e:
        live.failed("storage")
        print_line(f"{handle.key.id}: {e}")
    else:
        live.landed(handle.metrics)


class Folder:
    """Files as they come, part by part; those that never became whole are removed at the end.

    Args:
        path: Where; it is there already.
        max_file_bytes: Larger files are refused.

    Raises:
        ConfigError: There is no such folder, or nobody may write to it.

    """

    def __init__(self, path: str, max_file_bytes: int) -> None:
        self._path = Path(path)
        self._limit = max_file_bytes
        self._open: dict[str, _Growing] = {}
        if not self._path.is_dir() or not os.access(self._path, os.W_OK):
            raise ConfigError(f"--output {path} is no folder that can be written to")

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exc: object) -> None:
        for growing in self._open.values():
            growing.drop()
        self._open = {}

    def write(self, part: FilePart, pieces: list[bytes]) -> None:
        """Put a part into its file; the last one gives the file its name.

        Raises:
            ResourceError: The file is larger than what was allowed, or too many have begun.
            OSError: The disk is full, for one.

        """
        data = b"".join(pieces)
        if part.size > self._limit or part.offset + len(data) > part.size:
            raise ResourceError(
                f"{part.name}: {len(data)} bytes at {part.offset} of {part.size}; files of at "
                f"most {bytes_text(self._limit)} are stored (--max-file-bytes)"
            )
        growing = self._open.get(part.run)
        if growing is None:
            if len(self._open) >= _MAX_OPEN:
                raise ResourceError(f"{part.name}: {_MAX_OPEN} files have begun and none ended")
            growing = self._open[part.run] = _Growing(self._path, part)
        growing.write(part.offset, data)
        if growing.missing <= 0:
            del self._open[part.run]
            growing.finish()


class _Growing:
    """A file that is not whole yet, under a name of its own."""

    def __init__(self, folder: Path, part: FilePart) -> None:
        self._target = folder / part.name
        self._path = folder / f".{part.name}.{part.run}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        self._seen: set[int] = set()
        self.missing = part.size

    def write(self, offset: int, data: bytes) -> None:
        """Write, once for each offset."""
        if offset in self._seen:
            return
        self._seen.add(offset)
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written
        self.missing -= len(data)

    def finish(self) -> None:
        """Give it its name, over an older file of that name."""
        os.close(self._descriptor)
        os.replace(self._path, self._target)

    def drop(self) -> None:
        """Remove it."""
        os.close(self._descriptor)
        self._path.unlink(missing_ok=True)
