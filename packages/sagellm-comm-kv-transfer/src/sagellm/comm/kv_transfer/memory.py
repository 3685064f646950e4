"""Bytes of tensors, reached without copying: views for the kernel to read and fill."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import ConfigError, MemoryRuns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Extent", "Slab", "TensorExtent", "bytes_of", "storage_of", "torch_dtype"]

Ints = NDArray[np.int64]
Views = list[memoryview]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ConfigError: torch has none.

    """
    import torch

    found = getattr(torch, name, None) if name.isidentifier() else None
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"torch has no dtype {name!r}")
    return found


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

    def measure(self) -> tuple[list[int], int]:
        """Units of each layer, and the bytes of all."""
        ...

    def views(self, layer: int, first: int, count: int) -> Views:
        """Memory of consecutive units in wire order, neighbours joined."""
        ...

    def runs(self, layer: int, first: int, count: int) -> MemoryRuns:
        """The same memory as addresses."""
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
        bases: Address of each storage.
        store: Index into `stores`, per run.
        offsets: Bytes, per run.
        lengths: Bytes, per run.
        steps: Bytes from one block to the next, per run.
        unit_bytes: Bytes of one unit.
        plain: Storage, offset and step of the only run; None when there are several.

    """

    stores: tuple[memoryview, ...]
    bases: Ints
    store: Ints
    offsets: Ints
    lengths: Ints
    steps: Ints
    unit_bytes: int = field(init=False)
    plain: tuple[memoryview, int, int] | None = field(init=False)

    def __post_init__(self) -> None:
        """Note what is asked for with every small transfer: without numpy's cost per call."""
        object.__setattr__(self, "unit_bytes", int(self.lengths.sum()))
        plain = None
        if len(self.lengths) == 1:
            plain = (self.stores[int(self.store[0])], int(self.offsets[0]), int(self.steps[0]))
        object.__setattr__(self, "plain", plain)

    def views(self, blocks: Ints) -> Views:
        """Memory of these blocks, runs that touch joined."""
        if self.plain is not None and len(blocks) == 1:
            return self._unit(self.plain, blocks[0])
        store, starts, lengths = self._joined(blocks)
        spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        if len(self.stores) == 1:
            memory = self.stores[0]
            return [memory[a:b] for a, b in spans]
        stores = self.stores
        return [stores[s][a:b] for s, (a, b) in zip(store.tolist(), spans, strict=True)]

    def runs(self, blocks: Ints) -> MemoryRuns:
        """Addresses of these blocks, runs that touch joined."""
        store, starts, lengths = self._joined(blocks)
        return MemoryRuns(self.bases[store] + starts, lengths)

    def _joined(self, blocks: Ints) -> tuple[Ints, Ints, Ints]:
        """Storage, offset and length of each run."""
        offsets = (blocks[:, None] * self.steps + self.offsets).ravel()
        if not len(offsets):
            return offsets, offsets, offsets
        ends = offsets + np.tile(self.lengths, len(blocks))
        cut = offsets[1:] != ends[:-1]
        store = np.tile(self.store, len(blocks))
        if len(self.stores) > 1:
            cut |= store[1:] != store[:-1]
        first = np.concatenate(([0], np.flatnonzero(cut) + 1))
        last = np.append(first[1:], len(offsets)) - 1
        return store[first], offsets[first], ends[last] - offsets[first]

    def _unit(self, plain: tuple[memoryview, int, int], block: int) -> Views:
        memory, offset, step = plain
        at = int(block) * step + offset
        return [memory[at : at + self.unit_bytes]]

    def unit_views(self, blocks: Ints) -> list[Views]:
        """Memory of each of these blocks."""
        if (plain := self.plain) is not None:
            return [self._unit(plain, b) for b in blocks.tolist()]
        runs = list(zip(self.store.tolist(), self.offsets.tolist(), self.lengths.tolist(),
                        self.steps.tolist(), strict=True))  # fmt: skip
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
        self._addresses = [t.data_ptr() for t in tensors if t.numel()]
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

    def measure(self) -> tuple[list[int], int]:
        """Pages, and the bytes of all."""
        return [self.units(0)], self._total

    def span_bytes(self, layer: int, first: int, count: int) -> int:
        """Bytes of consecutive pages."""
        return min((first + count) * self._page, self._total) - first * self._page

    def views(self, layer: int, first: int, count: int) -> Views:
        """Memory of consecutive pages."""
        found = self._pieces(first * self._page, (first + count) * self._page)
        return [self._views[i][a:b] for i, a, b in found]

    def runs(self, layer: int, first: int, count: int) -> MemoryRuns:
        """Addresses of consecutive pages."""
        found = list(self._pieces(first * self._page, (first + count) * self._page))
        addresses = [self._addresses[i] + a for i, a, _ in found]
        lengths = [b - a for _, a, b in found]
        return MemoryRuns(np.array(addresses, np.int64), np.array(lengths, np.int64))

    def unit_views(self, layer: int, first: int, count: int) -> list[Views]:
        """Memory of each of consecutive pages."""
        return [self.views(layer, first + i, 1) for i in range(count)]

    def dtype(self, layer: int) -> str:
        """The tensors' dtype, `uint8` when they differ."""
        return self._dtype

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Tensor, and from where to where in it, of a stretch of them all."""
        stop = min(stop, self._total)
        at = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            base, end = self._starts[at], min(self._starts[at + 1], stop)
            yield at, start - base, end - base
            start = end
            at += 1
