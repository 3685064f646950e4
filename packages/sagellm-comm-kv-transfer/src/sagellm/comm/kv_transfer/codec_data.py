"""What codecs need besides a frame, such as a calibrated basis, from one node to another, once.

    give(sender, 1, basis.fingerprint, basis.data)       # on node 0; again: nothing is sent
    take(receiver, fingerprint, 0, BASES.put)            # on node 1

It goes as any other transfer: checked, bounded by `max_bounce_bytes`, with a deadline.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from sagellm.core.protocols import ConfigError, IntegrityError, TransferKey

from .channel import KVTransferChannel
from .memory import bytes_of
from .transfer import TransferHandle

__all__ = ["give", "take"]

_given: weakref.WeakKeyDictionary[KVTransferChannel, dict[tuple[int, str], TransferHandle]] = (
    weakref.WeakKeyDictionary()
)


def _key(name: str) -> TransferKey:
    if not name or len(name) > 128:
        raise ConfigError(f"{name[:40]!r} names no data of a codec: use 1 to 128 characters")
    return TransferKey(f"codec-data/{name}")


def give(
    channel: KVTransferChannel, node: int, name: str, data: bytes, *, deadline_s: float = 60.0
) -> TransferHandle:
    """Send data to a node that takes it, unless it was sent over this channel before.

    Args:
        channel: Ours.
        node: Who gets it.
        name: Says which data; equal names have equal contents.
        data: All of it, not empty.
        deadline_s: As of any transfer.

    Returns:
        The transfer, or the earlier one that has not failed.

    Raises:
        ConfigError: No name, no data, or an unknown node.

    """
    import torch

    key, sent = _key(name), _given.setdefault(channel, {})
    if not data:
        raise ConfigError(f"no data under the name {name!r}")
    earlier = sent.get((node, name))
    if earlier is not None and earlier.exception() is None:
        return earlier
    attempt = 0 if earlier is None else earlier.key.attempt + 1
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    key = TransferKey(key.id, attempt)
    handle = channel.transfer([tensor], node, key=key, codec="none", deadline_s=deadline_s)
    sent[node, name] = handle
    return handle


def take(
    channel: KVTransferChannel,
    name: str,
    node: int,
    put: Callable[[bytes], object],
    *,
    attempt: int = 0,
    deadline_s: float = 60.0,
) -> None:
    """Receive data that a node gives, and keep it with `put`; blocks.

    Raises:
        KVTransferError: It did not come.
        IntegrityError: What came is not one piece of bytes; or what `put` raises.

    """
    key = TransferKey(_key(name).id, attempt)
    blocks = channel.receive(key, source_node=node, deadline_s=deadline_s).wait().blocks
    if len(blocks) != 1 or str(blocks[0].tensor.dtype) != "torch.uint8":
        raise IntegrityError(f"node {node} gave {len(blocks)} tensors as {name!r}, not bytes")
    put(bytes(bytes_of(blocks[0].tensor)))
