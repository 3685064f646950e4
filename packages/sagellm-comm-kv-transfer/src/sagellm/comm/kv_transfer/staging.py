"""Blocks of a device on their way to the host: gathered there, copied through pinned buffers.

A tool for engines: a channel refuses device tensors and does not use it by itself. One gather and
one copy per chunk replace a copy per block, and while one buffer is read the next is being filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sagellm.core.protocols import BlockIds, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HostStaging"]

_BUFFERS = 2


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
        self._per_chunk = max(1, chunk_bytes // max(1, block_bytes))
        self._buffers = [self._make_buffer() for _ in range(_BUFFERS)]

    def _make_buffer(self) -> _Buffer:
        shape = (min(self._per_chunk, max(1, len(self._blocks))), *self._blocks.shape[1:])
        if self._blocks.device.type == "cpu":
            return _Buffer(self._blocks.new_empty(shape))
        return _DeviceBuffer(self._blocks, shape)  # pragma: device-only

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
        where = torch.from_numpy(wanted).to(self._blocks.device)
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


class _DeviceBuffer(_Buffer):  # pragma: device-only
    """Pinned host memory, its twin on the device, and a stream that fills the one by the other."""

    def __init__(self, blocks: Tensor, shape: tuple[int, ...]) -> None:
        import torch

        super().__init__(torch.empty(shape, dtype=blocks.dtype, pin_memory=True))
        self._twin = blocks.new_empty(shape)
        self._device: Any = torch.get_device_module(blocks.device)  # torch.cuda, torch.npu, …
        self._stream = self._device.Stream(blocks.device)

    def fill(self, blocks: Tensor, ids: Tensor) -> None:
        import torch

        self.count = len(ids)
        self._stream.wait_stream(self._device.current_stream(blocks.device))
        with self._device.stream(self._stream):
            torch.index_select(blocks, 0, ids, out=self._twin[: self.count])
            self.host[: self.count].copy_(self._twin[: self.count], non_blocking=True)

    def wait(self) -> Tensor:
        self._stream.synchronize()
        return super().wait()
