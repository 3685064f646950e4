"""What this node knows of one transfer that it sends, and of one offer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sagellm.core.protocols import BlockIds, CommError, ConfigError, KVBlock, ReadyEvent

from . import wire
from ._block_table import BlockTable
from ._coded_out import CodedOutflow
from ._coded_request import AUTO, CodecRequest
from ._flows import Outflow, Span
from ._limits import Watch
from ._link import Link
from .plan import Part
from .pool import RegisteredPool
from .transfer import TransferHandle

__all__ = ["Offered", "Push", "of_blocks", "of_tensors"]


class Push:
    """One transfer out of this node, to one peer.

    Args:
        handle: What the caller holds.
        target: Node that it goes to.
        pool: Whose blocks; None for plain tensors.
        blocks: Ids per group.
        tensors: Plain tensors, contiguous.
        dst_blocks: Destinations, when known.
        sealed: Whether all layers are queued; a stream is not.
        codec: How its bytes are to be coded; None sends them as they are.

    """

    num_tokens = 0
    offered: Offered | None = None
    link: Link | None = None
    tid = 0
    error: CommError | None = None
    nacked = 0
    room_bytes = 0
    watch: Watch | None = None

    def __init__(
        self,
        handle: TransferHandle,
        target: int,
        *,
        pool: RegisteredPool | None = None,
        blocks: BlockTable | None = None,
        tensors: Sequence[KVBlock] | None = None,
        dst_blocks: BlockTable | None = None,
        sealed: bool = True,
        codec: CodecRequest | None = None,
    ) -> None:
        self.handle = handle
        self.key = handle.key
        self.target = target
        self.pool = pool
        self.blocks = blocks or {}
        self.tensors = tensors
        self.dst_blocks = dst_blocks
        self.sealed = sealed
        self.full_fetch: dict[str, Part] = {}
        self.codec = codec
        self.flow = Outflow(handle, 0) if codec is None else CodedOutflow(handle, 0, codec)
        if pool is not None:
            handle.expect(0, 0, len(pool.group_names))

    def sends_what(self, other: Push) -> bool:
        """Whether both were given the same memory, and the same destinations."""
        return (
            self.tensor_infos() == other.tensor_infos()
            and all(map(_same_bytes, self.tensors or (), other.tensors or ()))
            and _same_tables(self.blocks, other.blocks)
            and _same_tables(self.dst_blocks or {}, other.dst_blocks or {})
        )

    def tensor_infos(self) -> list[wire.TensorInfo] | None:
        """What an offer says of plain tensors; None for blocks of a pool."""
        if self.tensors is None:
            return None
        return [
            wire.TensorInfo(
                tuple(b.tensor.shape),
                str(b.tensor.dtype).removeprefix("torch."),
                b.layer,
                b.index,
            )
            for b in self.tensors
        ]

    def all_spans(self, after: ReadyEvent | None = None) -> list[Span]:
        """Everything it has, layer by layer."""
        if self.pool is None:
            return [Span(0, 0, 1 << 40, after)]
        names = self.pool.group_names
        return [Span(i, 0, len(self.blocks[n]), after) for i, n in enumerate(names)]

    def queue(self, spans: Iterable[Span]) -> None:
        """Send these when they are ready and granted; from any thread."""
        self.flow.queue(spans)
        link = self.link
        if link is not None and self.flow.extent is not None:
            link.writer.add(self.flow)


def of_tensors(
    handle: TransferHandle, target: int, tensors: Sequence[KVBlock], codec: CodecRequest | None
) -> Push:
    """A push of plain tensors.

    Raises:
        ConfigError: Their codec would change them.

    """
    if codec is not None and codec.required and codec.codec != AUTO and not codec.lossless:
        raise ConfigError(f"codec {codec.codec!r} changes values, and plain tensors may hold any")
    return Push(handle, target, tensors=tensors, codec=codec)


def of_blocks(
    handle: TransferHandle,
    target: int,
    pool: RegisteredPool,
    table: BlockTable,
    dst_blocks: BlockIds | Mapping[str, BlockIds] | None,
    sealed: bool,
    codec: CodecRequest | None,
) -> Push:
    """A push of blocks of a pool.

    Raises:
        ConfigError: The destinations do not fit them.
        UnsupportedOperationError: A codec cannot reach them.

    """
    pool.check_codec(codec)
    named = None if dst_blocks is None else pool.as_foreign_table(dst_blocks)
    if named is not None:
        counts = {n: (len(ids), len(named[n])) for n, ids in table.items()}
        if any(a != b for a, b in counts.values()):
            raise ConfigError(f"blocks and dst_blocks differ in number: {counts}")
    return Push(
        handle, target, pool=pool, blocks=table, dst_blocks=named, sealed=sealed, codec=codec
    )


def _same_tables(one: BlockTable, other: BlockTable) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(ids, other[n]) for n, ids in one.items()
    )


def _same_bytes(one: KVBlock, other: KVBlock) -> bool:
    """Whether two blocks of one shape are the same, or copies of the same strided tensor."""
    import torch

    a, b = one.tensor, other.tensor
    if a.data_ptr() == b.data_ptr():
        return True
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


class Offered:
    """Blocks that peers may fetch."""

    def __init__(
        self,
        handle: TransferHandle,
        pool: RegisteredPool,
        blocks: BlockTable,
        num_tokens: int,
        after: ReadyEvent | None,
        codec: CodecRequest | None = None,
    ) -> None:
        self.handle = handle
        self.pool = pool
        self.blocks = blocks
        self.num_tokens = num_tokens
        self.after = after
        self.codec = codec
        self.watch: Watch | None = None
        self.served: set[Push] = set()
        self.error: CommError | None = None
        self.reads: dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
