"""Blocks of a device as one side of a transfer: through pinned halves. Unverified on hardware."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sagellm.core.protocols import MemoryRuns, UnsupportedOperationError

from ._block_table import BlockTable
from ._device import wait_for
from ._device_staging import DeviceStaging, Half, Rows
from .memory import Ints, Slab, Views
from .plan import Part
from .pool import PoolExtent, RegisteredPool

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceExtent", "Gathered", "extent_of"]


def extent_of(pool: RegisteredPool, blocks: BlockTable, parts: Mapping[str, Part]) -> PoolExtent:
    """One side of a transfer, wherever the pool is."""
    if pool.staging is not None:
        return DeviceExtent(pool, blocks, parts, pool.staging)
    return PoolExtent(pool, blocks, parts)


class DeviceExtent(PoolExtent):
    """Blocks of a pool on a device, or parts of them.

    Its memory has no views; frames of it are gathered to, or landed from, pinned halves.

    Args:
        pool: The pool.
        blocks: Ids per group, in the order of the tokens.
        parts: What of each group moves.
        staging: The pool's.

    """

    def __init__(
        self,
        pool: RegisteredPool,
        blocks: BlockTable,
        parts: Mapping[str, Part],
        staging: DeviceStaging,
    ) -> None:
        super().__init__(pool, blocks, parts)
        self.staging = staging

    def views(self, layer: int, first: int, count: int) -> Views:
        """Nothing that the host could reach."""
        raise UnsupportedOperationError(f"blocks on {self.staging.device} have no host memory")

    def unit_views(self, layer: int, first: int, count: int) -> list[Views]:
        """Nothing that the host could reach."""
        raise UnsupportedOperationError(f"blocks on {self.staging.device} have no host memory")

    def runs(self, layer: int, first: int, count: int) -> MemoryRuns:
        """Nothing that the host could reach."""
        raise UnsupportedOperationError(f"blocks on {self.staging.device} have no host memory")

    def ids(self, layer: int, first: int, count: int) -> Ints:
        """Consecutive blocks of a layer."""
        return self.block_table[self._names[layer]][first : first + count]

    def rows(self, layer: int) -> Rows:
        """The runs of a layer's blocks."""
        name = self._names[layer]
        return _rows(self._slab(layer), self.pool.storages, self.pool.num_blocks[name])

    def gather(self, layer: int, first: int, count: int, *, wait: bool) -> Gathered | None:
        """Begin to bring blocks to the host; None when no half is free and nobody shall wait.

        Raises:
            CommTimeoutError: No half became free in time.

        """
        nbytes = self.span_bytes(layer, first, count)
        half = self.staging.to_send(max(nbytes, self.staging.half_bytes), wait=wait)
        if half is None:
            return None
        try:
            half.fill(self.staging.outgoing, self.rows(layer), self.ids(layer, first, count))
        except BaseException:
            self.staging.sent(half)
            raise
        return Gathered(self.staging, half, self.unit_bytes(layer))


class Gathered:
    """A frame's blocks on their way to the host. Close it: until then the half is not free.

    Args:
        staging: Whose half it is.
        half: Where they come.
        unit_bytes: Of one block.

    """

    def __init__(self, staging: DeviceStaging, half: Half, unit_bytes: int) -> None:
        self._staging = staging
        self._half = half
        self._unit = unit_bytes

    def wait(self) -> None:
        """Block until they are there.

        Raises:
            CommTimeoutError: They are not, in time.
            DistributedRuntimeError: The device has failed.

        """
        event = self._half.event
        assert event is not None, "filled"
        wait_for(event, self._staging.timeout_s, f"blocks of {self._staging.device}")

    def views(self, layer: int, first: int, count: int) -> Views:
        """Their memory."""
        return [self._half.memory[: count * self._unit]]

    def unit_views(self, layer: int, first: int, count: int) -> list[Views]:
        """Memory of each."""
        return self._half.units(count, self._unit)

    def close(self) -> None:
        """Give the half back, once the device no longer reads the blocks."""
        self._staging.sent(self._half)


def _rows(slab: Slab, storages: Mapping[int, torch.UntypedStorage], blocks: int) -> Rows:
    """Views of every run of a layer's blocks, in the widest elements that fit it."""
    import torch

    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    columns = (slab.store, slab.offsets, slab.lengths, slab.steps)
    runs = list(zip(*(c.tolist() for c in columns), strict=True))
    wide = math.gcd(8, *(n for _, *sizes in runs for n in sizes))
    found = []
    for store, offset, length, step in runs:
        storage = storages[int(slab.bases[store])]
        view = torch.empty(0, dtype=kinds[wide], device=storage.device)
        shape, strides = (blocks, length // wide), (step // wide, 1)
        found.append(view.set_(storage, offset // wide, shape, strides))
    return found
