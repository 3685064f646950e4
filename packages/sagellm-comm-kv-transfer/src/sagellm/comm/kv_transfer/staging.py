"""Blocks of a device on their way to the host: gathered there, copied through pinned buffers.

A tool for engines that want blocks in the host's memory; a channel with a pool on a device does
the same by itself. One gather and one copy per chunk replace a copy per block, and while one
buffer is read the next is being filled. Unverified on hardware.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sagellm.core.protocols import BlockIds, ConfigError

from ._device import Device, device_of, wait_for
from ._device_staging import Half
from .frames import MAX_UNITS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HostStaging"]

_BUFFERS = 2
_PATIENCE_S = 60.0


class HostStaging:
    """Reads scattered blocks through two pinned buffers. One reader at a time.

    The blocks stay the caller's and must not change while they are read. What the caller's
    current stream was told to do before `read` is waited for on the device.

    Args:
        blocks: A pool, `[block, …]`, each block contiguous.
        chunk_bytes: What one buffer holds; at least one block.

    Raises:
        ConfigError: The blocks are not contiguous, or a bound is not positive.

    """

    def __init__(self, blocks: Tensor, chunk_bytes: int = 32 << 20) -> None:
        if chunk_bytes <= 0 or blocks.dim() < 2 or not blocks.is_contiguous():
            raise ConfigError(
                f"staging needs a contiguous pool [block, …] and a positive chunk, not shape "
                f"{list(blocks.shape)} with strides {blocks.stride()} and {chunk_bytes} bytes"
            )
        self._blocks = blocks
        block_bytes = blocks[0].numel() * blocks.element_size() if len(blocks) else 1
        self._per_chunk = min(MAX_UNITS, max(1, chunk_bytes // max(1, block_bytes)))
        self._buffers = [self._make_buffer() for _ in range(_BUFFERS)]

    def _make_buffer(self) -> _Buffer:
        shape = (min(self._per_chunk, max(1, len(self._blocks))), *self._blocks.shape[1:])
        if (device := device_of([self._blocks])) is None:
            return _Buffer(self._blocks.new_empty(shape))
        return _DeviceBuffer(self._blocks, shape, device)

    def read(self, ids: BlockIds) -> Iterator[tuple[int, Tensor]]:
        """Position of its first block in `ids` and host memory of each chunk, in order.

        The memory is good until the next one is asked for.

        Raises:
            ConfigError: An id is not one of the pool's.

        """
        import numpy as np
        import torch

        wanted = np.asarray(ids, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self._blocks):
            raise ConfigError(
                f"blocks {wanted.min()}..{wanted.max()} are not all in 0..{len(self._blocks) - 1}"
            )
        where = torch.from_numpy(wanted)
        step = len(self._buffers[0].host)
        starts = range(0, len(wanted), step)
        for turn, first in enumerate(starts[:_BUFFERS]):
            self._buffers[turn].fill(self._blocks, where[first : first + step])
        for turn, first in enumerate(starts):
            buffer = self._buffers[turn % _BUFFERS]
            yield first, buffer.wait()
            if (ahead := turn + _BUFFERS) < len(starts):
                start = starts[ahead]
                buffer.fill(self._blocks, where[start : start + step])


class _Buffer:
    """Host memory that is filled at once."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.count = 0

    def fill(self, blocks: Tensor, ids: Tensor) -> None:
        """Begin to gather these blocks."""
        import torch

        self.count = len(ids)
        torch.index_select(blocks, 0, ids, out=self.host[: self.count])

    def wait(self) -> Tensor:
        """The blocks, in host memory."""
        return self.host[: self.count]


class _DeviceBuffer(_Buffer):
    """A pinned half, and a stream that fills it."""

    def __init__(self, blocks: Tensor, shape: tuple[int, ...], device: Device) -> None:
        self._half = Half(device, math.prod(shape) * blocks.element_size())
        super().__init__(self._half.host.view(blocks.dtype).view(shape))
        self._queue = device.queue()
        self._what = f"blocks of {device}"

    def fill(self, blocks: Tensor, ids: Tensor) -> None:
        self.count = len(ids)
        self._queue.follow()
        self._half.fill(self._queue, [_wide(blocks.flatten(1))], ids.numpy())

    def wait(self) -> Tensor:
        assert self._half.event is not None, "filled"
        wait_for(self._half.event, _PATIENCE_S, self._what)
        return super().wait()


def _wide(rows: Tensor) -> Tensor:
    """The same memory in the largest elements that fit, which copy fastest."""
    import torch

    for dtype in (torch.int64, torch.int32, torch.int16):
        if rows.shape[1] * rows.element_size() % dtype.itemsize == 0:
            return rows.view(dtype) if rows.element_size() <= dtype.itemsize else rows
    return rows.view(torch.uint8)
