"""The basis of codec `transform` on its way to a peer, once, over the channel's own transfers.

give_basis(channel, fingerprint, decode_node)    # where it was calibrated or loaded
take_basis(channel, fingerprint, prefill_node)   # on the other side, meanwhile

channel.transfer(ids, decode_node, codec=CodecRequest("transform", {"basis": fingerprint}))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm.core.protocols import IntegrityError, TransferKey

from .compression.basis import Basis
from .compression.basis_store import BASES, BasisStore
from .memory import bytes_of

if TYPE_CHECKING:
    from .channel import KVTransferChannel
    from .transfer import TransferHandle

__all__ = ["give_basis", "take_basis"]


def give_basis(
    channel: KVTransferChannel, fingerprint: str, peer: int, *, deadline_s: float = 60.0,
    store: BasisStore = BASES,
) -> TransferHandle:  # fmt: skip
    """Push a basis to a node that takes it; returns at once.

    Raises:
        ConfigError: It is not in the store.

    """
    import torch

    data = torch.frombuffer(bytearray(store.data(fingerprint)), dtype=torch.uint8)
    return channel.transfer([data], peer, key=_key(fingerprint), deadline_s=deadline_s)


def take_basis(
    channel: KVTransferChannel, fingerprint: str, peer: int, *, deadline_s: float = 60.0,
    store: BasisStore = BASES,
) -> Basis:  # fmt: skip
    """Wait for a basis that a node gives, check all of it and keep it; none is moved twice.

    Raises:
        IntegrityError: What came is no basis, or another one.
        ResourceError: The store has no room for it.
        CommError: It did not come in time, or the node is gone.

    """
    if fingerprint in store:
        return store.get(fingerprint)
    handle = channel.receive(_key(fingerprint), source_node=peer, deadline_s=deadline_s)
    blocks = handle.wait(deadline_s).blocks
    basis = Basis(b"".join(bytes_of(b.tensor) for b in blocks), max_bytes=store.max_bytes)
    if basis.fingerprint != fingerprint:
        raise IntegrityError(f"basis {basis.fingerprint} came in place of {fingerprint}")
    store.put(basis)
    return basis


def _key(fingerprint: str) -> TransferKey:
    return TransferKey(f"kv-basis/{fingerprint}")
