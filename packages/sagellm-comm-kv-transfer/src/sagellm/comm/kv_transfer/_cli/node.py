"""Channels of the command line: their arguments, their layout, and the names of what they send."""

from __future__ import annotations

import argparse
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sagellm.core.protocols import CacheGroup, ConfigError, KVLayout, TransferKey
from sagellm.core.protocols.show import parse_bytes

if TYPE_CHECKING:
    from sagellm.comm.kv_transfer import KVTransferChannel

__all__ = [
    "FilePart",
    "add_node_arguments",
    "add_peer_arguments",
    "block_layout",
    "open_channel",
    "positive_bytes",
    "transfer_name",
]

_SEPARATOR = "/"
_MAX_NAME_BYTES = 255


def positive_bytes(text: str) -> int:
    """A size of at least one byte, for argparse."""
    size = parse_bytes(text)
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive size")
    return size


def add_node_arguments(parser: argparse.ArgumentParser, node_id: int | None) -> None:
    """What every channel needs; a `node_id` of None is chosen at random."""
    shown = "a random one" if node_id is None else str(node_id)
    parser.add_argument("--node", type=int, default=node_id, help=f"own node id, default {shown}")
    parser.add_argument(
        "--key-file",
        help="file with the shared key, mode 0600; default: the configured one "
        "(SAGELLM_COMM_KV_TRANSFER_KEY_FILE)",
    )
    parser.add_argument(
        "--transport", help="path to take, default: the configured one; see `doctor` for names"
    )
    parser.add_argument(
        "--checksum", action=argparse.BooleanOptionalAction, default=None,
        help="check every block on arrival, default: the configured choice",
    )  # fmt: skip


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    """Whom to reach."""
    parser.add_argument("address", help="where the peer listens, host:port")
    parser.add_argument("--peer", type=int, default=0, help="the peer's node id, default 0")
    parser.add_argument("--host", help="own address to listen on, default loopback")
    parser.add_argument("--timeout-s", type=float, default=30.0, help="deadline of each step")


def open_channel(
    arguments: argparse.Namespace,
    *,
    host: str | None = None,
    port: int = 0,
    advertise: str | None = None,
) -> KVTransferChannel:
    """The channel that the arguments describe.

    Raises:
        ConfigError: They do not fit, or there is no key.

    """
    from sagellm.comm.kv_transfer import KVTransferChannel, KVTransferSettings

    changed = {"transport": arguments.transport, "checksum": arguments.checksum}
    settings = KVTransferSettings.load(**{k: v for k, v in changed.items() if v is not None})
    if arguments.key_file is None and settings.key is None and settings.key_file is None:
        raise ConfigError(
            "a key is needed, which both sides share: --key-file FILE, or set "
            "SAGELLM_COMM_KV_TRANSFER_KEY_FILE. To make one: "
            "(umask 077; head -c 32 /dev/urandom | base64 > FILE)"
        )
    node_id = arguments.node
    if node_id is None:  # a number that no rank has, and no other command either
        node_id = (1 << 20) + secrets.randbelow(1 << 30)
    target = getattr(arguments, "address", None)
    if target is not None and arguments.peer == node_id:
        raise ConfigError(f"--node and --peer are both {node_id}; the peer is another node")
    return KVTransferChannel(
        node_id=node_id,
        peers={arguments.peer: target} if target is not None else {},
        key_file=arguments.key_file,
        host=host,
        port=port,
        advertise=advertise,
        settings=settings,
    )


def block_layout(block_bytes: int) -> KVLayout:
    """Opaque blocks, as `serve` and `send` have them in their pools."""
    group = CacheGroup("blocks", "opaque", ("blocks",), ("block", "dim"), (block_bytes,), "uint8")
    return KVLayout((group,), "sagellm.comm.kv_transfer command line")


def transfer_name(purpose: str) -> str:
    """A name for a transfer that no other has."""
    return f"{purpose}-{secrets.token_hex(6)}"


@dataclass(frozen=True, slots=True)
class FilePart:
    """What one transfer of a file carries, as its key says it.

    Attributes:
        run: Names the `send` that it belongs to.
        offset: Where in the file its bytes begin.
        size: Of the whole file.
        name: Of the file, without folders.

    """

    run: str
    offset: int
    size: int
    name: str

    def key(self) -> TransferKey:
        """The key of the transfer.

        Raises:
            ConfigError: The name is too long, or no name of a file.

        """
        if not _is_name(self.name):
            raise ConfigError(f"{self.name!r} cannot be the name of a file at the receiver")
        fields = ("file", self.run, str(self.offset), str(self.size), self.name)
        return TransferKey(_SEPARATOR.join(fields))

    @classmethod
    def of(cls, key: TransferKey) -> FilePart | None:
        """What a key says; None when it is not of a file, or of one with a dangerous name."""
        kind, _, rest = key.id.partition(_SEPARATOR)
        fields = rest.split(_SEPARATOR)
        if kind != "file" or len(fields) != 4 or not _is_name(fields[3]):
            return None
        run, offset, size, name = fields
        if not run.isalnum() or not (_is_count(offset) and _is_count(size)):
            return None
        return cls(run, int(offset), int(size), name)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 16


def _is_name(name: str) -> bool:
    plain = name == os.path.basename(name) and name not in ("", ".", "..")
    return plain and "\0" not in name and len(os.fsencode(Path(name))) <= _MAX_NAME_BYTES - 32
