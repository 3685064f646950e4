"""Where received bytes go: blocks of the pool, or buffers made for one transfer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sagellm.core.protocols import ConfigError, KVBlock, KVLayout, ResourceError

from ._block_table import BlockTable
from ._device_extent import extent_of
from .memory import Extent, Ints, TensorExtent, torch_dtype
from .plan import Part, inner_axes
from .pool import RegisteredPool

if TYPE_CHECKING:
    import torch

    from .wire import TensorInfo

__all__ = ["Destination", "block_ids", "bounce_for_layout", "bounce_for_tensors"]

_MIN_PAGE_BYTES = 4096
_TENSOR_BYTES = 512
"""What a tensor takes besides its elements: a peer may offer a million empty ones."""


class Destination:
    """Blocks of a pool that one receive writes.

    Args:
        pool: Ours, or one made for this transfer.
        table: Ids in it.
        bounce_bytes: Memory made for this transfer.

    """

    def __init__(self, pool: RegisteredPool, table: BlockTable, bounce_bytes: int) -> None:
        self._pool = pool
        self._table = table
        self.bounce_bytes = bounce_bytes
        self.counts = {n: len(ids) for n, ids in table.items()}
        self.group_names = [g.name for g in pool.layout.groups for _ in g.layers]

    @property
    def layout(self) -> KVLayout:
        """Layout of these blocks."""
        return self._pool.layout

    def extent_for(self, parts: Mapping[str, Part]) -> Extent:
        """Memory of these parts of the blocks."""
        return extent_of(self._pool, self._table, parts)

    def blocks(self) -> Sequence[KVBlock]:
        """The buffers, when they were made for this transfer."""
        if not self.bounce_bytes:
            return ()
        index = {layer: i for i, layer in enumerate(self.layout.layers)}
        return [
            KVBlock(self._pool.tensors[name][position], index[layer], position)
            for group in self.layout.groups
            for layer in group.layers
            for name in ([f"{layer}.{p}" for p in group.parts] or [layer])
            for position in range(self.counts[group.name])
        ]


class _TensorDestination(Destination):
    """Plain tensors made for one receive."""

    def __init__(
        self,
        tensors: list[torch.Tensor],
        infos: Sequence[TensorInfo],
        page_bytes: int,
        bounce_bytes: int,
    ) -> None:
        self._tensors = tensors
        self._infos = infos
        self._page_bytes = page_bytes
        self.bounce_bytes = bounce_bytes
        self.counts = {}
        self.group_names = []

    def extent_for(self, parts: Mapping[str, Part]) -> Extent:
        """Memory of the tensors."""
        return TensorExtent(self._tensors, self._page_bytes)

    def blocks(self) -> Sequence[KVBlock]:
        """The tensors, named as the sender named them."""
        return [
            KVBlock(t, i.layer, i.index) for t, i in zip(self._tensors, self._infos, strict=True)
        ]


def block_ids(raw: Mapping[str, bytes]) -> dict[str, Ints]:
    """Block ids as they crossed the wire.

    Raises:
        ConfigError: They are not whole numbers of 8 bytes.

    """
    if any(len(v) % 8 for v in raw.values()):
        raise ConfigError("block ids on the wire are 8 bytes each")
    return {n: np.frombuffer(v, dtype="<i8").astype(np.int64) for n, v in raw.items()}


def bounce_for_tensors(
    infos: Sequence[TensorInfo], page_bytes: int, room: tuple[int, int]
) -> Destination | None:
    """Tensors for what a peer offers; None when there is no room just now.

    Raises:
        ConfigError: The offer makes no sense.
        ResourceError: There will never be room.

    """
    import torch

    if page_bytes < _MIN_PAGE_BYTES or any(d < 0 for i in infos for d in i.shape):
        raise ConfigError("the offer's tensors make no sense")
    dtypes = [torch_dtype(i.dtype) for i in infos]
    size = sum(
        _TENSOR_BYTES + 32 * len(i.shape) + math.prod(i.shape) * d.itemsize
        for i, d in zip(infos, dtypes, strict=True)
    )
    if not _fits(size, room):
        return None
    tensors = [torch.empty(i.shape, dtype=d) for i, d in zip(infos, dtypes, strict=True)]
    return _TensorDestination(tensors, infos, page_bytes, size)


def bounce_for_layout(
    layout: KVLayout, counts: Mapping[str, int], room: tuple[int, int]
) -> Destination | None:
    """A pool of just these many blocks; None when there is no room just now.

    Raises:
        ConfigError: The counts make no sense.
        ResourceError: There will never be room.

    """
    import torch

    wanted = {g.name: counts.get(g.name, 0) for g in layout.groups}
    if any(n < 0 for n in wanted.values()):
        raise ConfigError(f"an offer of {wanted} blocks")
    size = sum(
        len(g.tensor_names) * _TENSOR_BYTES
        + wanted[g.name]
        * len(g.layers)
        * max(1, len(g.parts))
        * math.prod(g.block_shape)
        * torch_dtype(g.dtype).itemsize
        for g in layout.groups
    )
    if not _fits(size, room):
        return None
    groups = tuple(replace(g, axes=("block", *inner_axes(g))) for g in layout.groups)
    flat = replace(layout, groups=groups)
    tensors = {
        name: torch.empty((wanted[g.name], *g.block_shape), dtype=torch_dtype(g.dtype))
        for g in groups
        for name in g.tensor_names
    }
    table = {n: np.arange(c, dtype=np.int64) for n, c in wanted.items()}
    return Destination(RegisteredPool(flat, tensors), table, size)


def _fits(size: int, room: tuple[int, int]) -> bool:
    free, limit = room
    if size > limit:
        raise ResourceError(
            f"{size} bytes without a destination, more than max_bounce_bytes={limit}: "
            "receive them into blocks of a pool"
        )
    return size <= free
