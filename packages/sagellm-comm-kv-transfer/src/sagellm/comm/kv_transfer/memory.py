"""Bytes of tensors, reached without copying: views for the kernel to read and fill."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Extent", "Slab", "TensorExtent", "bytes_of", "storage_of"]

Ints = NDArray[np.int64]
Views = list[memoryview]


def storage_of(tensor: Tensor) -> memoryview:
    """The whole storage beneath a CPU tensor, writable."""
    import torch

    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return _view(flat.numpy())


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable."""
    import torch

    return _view(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def _view(array: NDArray[np.uint8]) -> memoryview:
    return memoryview(cast("bytearray", array))  # numpy 1's stubs do not call arrays buffers


class Extent(Protocol):
    """The memory of one side of one transfer, as layers of numbered units.

    A unit is a block (or the part of one that moves) or a page of plain tensors. Both sides of
    a transfer agree on the number of units of each layer and on the bytes of each.
    """

    @property
    def layers(self) -> int:
        """Number of layers."""
        ...

    def units(self, layer: int) -> int:
        """Units of a layer; 0 when nothing of it moves."""
        ...

    def unit_bytes(self, layer: int) -> int:
        """Bytes of its largest unit."""
        ...

    def span_bytes(self, layer: int, first: int, count: int) -> int:
        """Bytes of consecutive units."""
        ...

    def views(self, layer: int, first: int, count: int) -> Views:
        """Memory of consecutive units in wire order, neighbours joined."""
        ...

    def unit_views(self, layer: int, first: int, count: int) -> list[Views]:
        """Memory of each of consecutive units."""
        ...

    def dtype(self, layer: int) -> str:
        """Torch dtype name of the elements."""
        ...


@dataclass(frozen=True, slots=True)
class Slab:
    """Where the units of one layer lie: unit `b` has run r at `b * steps[r] + offsets[r]`.

    Attributes:
        stores: Memory of each storage.
        store: Index into `stores`, per run.
        offsets: Bytes, per run.
        lengths: Bytes, per run.
        steps: Bytes from one block to the next, per run.

    """

    stores: tuple[memoryview, ...]
    store: Ints
    offsets: Ints
    lengths: Ints
    steps: Ints

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit."""
        return int(self.lengths.sum())

    def views(self, blocks: Ints) -> Views:
        """Memory of these blocks, runs that touch joined."""
        offsets = (blocks[:, None] * self.steps + self.offsets).ravel()
        if not len(offsets):
            return []
        lengths = np.tile(self.lengths, len(blocks))
        ends = offsets + lengths
        cut = offsets[1:] != ends[:-1]
        if len(self.stores) > 1:
            store = np.tile(self.store, len(blocks))
            cut |= store[1:] != store[:-1]
        starts = np.concatenate(([0], np.flatnonzero(cut) + 1))
        stops = np.append(starts[1:], len(offsets)) - 1
        spans = zip(offsets[starts].tolist(), ends[stops].tolist(), strict=True)
        if len(self.stores) == 1:
            memory = self.stores[0]
            return [memory[a:b] for a, b in spans]
        stores = self.stores
        return [stores[s][a:b] for s, (a, b) in zip(store[starts].tolist(), spans, strict=True)]

    def unit_views(self, blocks: Ints) -> list[Views]:
        """Memory of each of these blocks."""
        runs = list(zip(self.store.tolist(), self.offsets.tolist(), self.lengths.tolist(),
                        self.steps.tolist(), strict=True))  # fmt: skip
        if len(runs) == 1:
            s, offset, length, step = runs[0]
            memory = self.stores[s]
            starts = (blocks * step + offset).tolist()
            return [[memory[a : a + length]] for a in starts]
        return [
            [
                self.stores[s][(a := b * step + offset) : a + length]
                for s, offset, length, step in runs
            ]
            for b in blocks.tolist()
        ]


class TensorExtent:
    """Plain tensors, one after another, cut into pages.

    Args:
        tensors: Contiguous CPU tensors; kept alive by this object.
        page_bytes: Bytes of every page but the last.

    """

    layers = 1

    def __init__(self, tensors: Sequence[Tensor], page_bytes: int) -> None:
        self._views = [bytes_of(t) for t in tensors if t.numel()]
        self._starts = [0, *itertools.accumulate(len(v) for v in self._views)]
        self._page = page_bytes
        self._total = self._starts[-1]
        dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors}
        self._dtype = dtypes.pop() if len(dtypes) == 1 else "uint8"

    def units(self, layer: int) -> int:
        """Pages."""
        return -(-self._total // self._page)

    def unit_bytes(self, layer: int) -> int:
        """Bytes of a full page."""
        return min(self._page, self._total)

    def span_bytes(self, layer: int, first: int, count: int) -> int:
        """Bytes of consecutive pages."""
        return min((first + count) * self._page, self._total) - first * self._page

    def views(self, layer: int, first: int, count: int) -> Views:
        """Memory of consecutive pages."""
        return self._between(first * self._page, min((first + count) * self._page, self._total))

    def unit_views(self, layer: int, first: int, count: int) -> list[Views]:
        """Memory of each of consecutive pages."""
        return [self.views(layer, first + i, 1) for i in range(count)]

    def dtype(self, layer: int) -> str:
        """The tensors' dtype, `uint8` when they differ."""
        return self._dtype

    def _between(self, start: int, stop: int) -> Views:
        found: Views = []
        at = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            base, view = self._starts[at], self._views[at]
            piece = view[start - base : stop - base]
            found.append(piece)
            start += len(piece)
            at += 1
        return found
