"""Registered KV memory: its shape checked once, its blocks leased while they move."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from sagellm.core.protocols import (
    BlockIds,
    CacheGroup,
    ConfigError,
    KVLayout,
    MemoryRuns,
    ReadyEvent,
    UnsupportedOperationError,
)

from ._apart import check_apart, overlaps
from ._block_table import BlockTable, block_table
from ._coded_request import AUTO, CodecRequest
from ._device import device_of
from ._device_staging import DeviceStaging
from ._segment import Segment
from .memory import Ints, Slab, Views, storage_of, torch_dtype
from .plan import Part, check_sound, inner_axes, slab_runs

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PoolExtent", "RegisteredPool"]

_ALIGN = 4096


class RegisteredPool:
    """Tensors that hold KV blocks, with who reads and writes which. Thread-safe.

    The tensors stay the caller's; they must live and stay where they are until `unregister`.

    Args:
        layout: What the axes mean.
        tensors: By the layout's names.
        segment: Shared memory that they lie in, to be given back by `close`.
        half_bytes: Of the pinned buffers that blocks of a device go through, unless one block
            is larger.

    Raises:
        ConfigError: Names, shapes, dtypes or strides do not fit the layout, memory is shared, or
            the tensors are on several devices.

    """

    def __init__(
        self,
        layout: KVLayout,
        tensors: Mapping[str, Tensor],
        segment: Segment | None = None,
        half_bytes: int = 16 << 20,
    ) -> None:
        check_sound(layout)
        expected = [name for group in layout.groups for name in group.tensor_names]
        if missing := sorted(set(expected) - set(tensors)):
            raise ConfigError(f"the layout needs tensors {missing}, which were not given")
        if extra := sorted(set(tensors) - set(expected)):
            raise ConfigError(f"tensors {extra} are not in the layout; it has {expected}")
        device = device_of(tensors.values())
        self._layout = layout
        self._segment = segment
        self._tensors: Mapping[str, Tensor] = MappingProxyType(dict(tensors))
        self._num_blocks = {g.name: _check_group(g, tensors) for g in layout.groups}
        check_apart(tensors)
        self._where = [(g, i) for g in layout.groups for i in range(len(g.layers))]
        self.group_names = tuple(g.name for g, _ in self._where)
        """Group of each layer of the layout."""
        self.storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors.values()
        }
        """Memory beneath its tensors by address."""
        self.staging = None if device is None else DeviceStaging(device, half_bytes)
        """What blocks of a device go through; None in host memory."""
        self._memory = dict.fromkeys(self.storages, memoryview(b""))
        if device is None:
            self._memory = {t.untyped_storage().data_ptr(): storage_of(t) for t in tensors.values()}
        self._slabs: dict[tuple[int, Part], Slab] = {}
        self._lock = threading.Lock()
        self._leases: dict[object, tuple[str, BlockTable, BlockTable]] = {}
        self._written = {n: np.zeros(c, dtype=bool) for n, c in self._num_blocks.items()}

    @classmethod
    def allocate(
        cls, layout: KVLayout, num_blocks: int | Mapping[str, int], copy_workers: int | None = 0
    ) -> RegisteredPool:
        """A pool in shared memory, zeroed, every page of it there, with processes to fill it.

        Raises:
            ConfigError: The layout or the numbers make no sense.
            ResourceError: There is not that much memory.
            UnsupportedOperationError: This system cannot share memory.

        """
        check_sound(layout)
        places: list[tuple[str, CacheGroup, list[int], int, int]] = []
        size = 0
        for group, count in _counts(layout, num_blocks):
            lengths = dict(zip(inner_axes(group), group.block_shape, strict=True))
            shape = [{**lengths, "block": count, "layer": len(group.layers)}[a] for a in group.axes]
            nbytes = math.prod(shape) * torch_dtype(group.dtype).itemsize
            for name in group.tensor_names:
                places.append((name, group, shape, size, nbytes))
                size += -(-nbytes // _ALIGN) * _ALIGN
        segment = Segment(size, f"a pool of {num_blocks} blocks")
        try:
            if copy_workers is None:
                segment.start_sharing_worker()
            elif copy_workers:
                segment.start_workers(copy_workers)
            segment.seal()
            return cls(layout, _tensors_in(segment, places), segment)
        except BaseException:
            segment.close()
            raise

    def close(self) -> None:
        """Give allocated memory back; the caller's own tensors are left alone. Idempotent.

        The memory goes when the last tensor over it does. Nothing may be leased.
        """
        if self.staging is not None:
            self.staging.close()
        if self._segment is None:
            return
        self._tensors = MappingProxyType({})
        self.storages.clear()
        self._memory.clear()
        self._slabs.clear()
        self._segment.close()

    @property
    def layout(self) -> KVLayout:
        """Its layout."""
        return self._layout

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors by the layout's names."""
        return self._tensors

    @property
    def num_blocks(self) -> Mapping[str, int]:
        """Blocks per cache group."""
        return MappingProxyType(self._num_blocks)

    def mark(self) -> ReadyEvent | None:
        """An event behind what the caller's stream does with it now; None in host memory."""
        return None if self.staging is None else self.staging.device.mark()

    def follow(self) -> None:
        """Write nothing of a device before what the caller's stream does with it now."""
        if self.staging is not None:
            self.staging.incoming.follow()

    def check_codec(self, codec: CodecRequest | None) -> None:
        """Refuse a codec that is asked for by name, where the host cannot reach the values.

        Raises:
            UnsupportedOperationError: The blocks are on a device.

        """
        if self.staging is None or codec is None or not codec.required:
            return
        if codec.codec not in (AUTO, "none"):
            raise UnsupportedOperationError(
                f"codec {codec.codec!r} cannot reach blocks on {self.staging.device}: "
                "send without one"
            )

    @property
    def leases(self) -> int:
        """Transfers that still read or write it."""
        return len(self._leases)

    def lease_holders(self) -> list[str]:
        """Names of those transfers."""
        with self._lock:
            return sorted(name for name, *_ in self._leases.values())

    def group_of(self, layer: int) -> CacheGroup:
        """The group of a layer of the layout."""
        return self._where[layer][0]

    def layer_tensors(self, layer: int) -> list[Tensor]:
        """Views of one layer of the layout, one per tensor that it has, without a layer axis."""
        group, index = self._where[layer]
        if "layer" in group.axes:
            axis = group.axes.index("layer")
            return [self._tensors[n].select(axis, index) for n in group.tensor_names]
        name = group.layers[index]
        return [self._tensors[n] for n in ([f"{name}.{p}" for p in group.parts] or [name])]

    def lease(
        self,
        holder: object,
        name: str,
        *,
        written: BlockTable | None = None,
        read: BlockTable | None = None,
        sole: bool = False,
    ) -> None:
        """Note that a transfer writes, or reads, these blocks.

        Args:
            holder: The transfer.
            name: What it is called in messages.
            written: Blocks that nobody else may write meanwhile.
            read: Blocks that it reads.
            sole: Whether nobody may read what is written, either: a peer has chosen it.

        Raises:
            ConfigError: Another transfer in flight stands against it.

        """
        written, read = written or {}, read or {}
        with self._lock:
            for group, ids in written.items():
                if self._written[group][ids].any():
                    taken = ids[self._written[group][ids]][:8].tolist()
                    raise ConfigError(
                        f"{name}: blocks {taken} of group {group!r} are already the destination "
                        "of another transfer in flight"
                    )
            if sole:
                self._check_unread(name, written)
            for group, ids in written.items():
                self._written[group][ids] = True
            self._leases[holder] = (name, written, read)

    def _check_unread(self, name: str, written: BlockTable) -> None:
        for reader, _, read in self._leases.values():
            for group, ids in read.items():
                if (taken := np.intersect1d(ids, written[group])).size:
                    raise ConfigError(
                        f"{name}: blocks {taken[:8].tolist()} of group {group!r} were named as "
                        f"destination by the sender, while {reader} reads them"
                    )

    def release(self, holder: object) -> None:
        """End a transfer's lease. Idempotent."""
        with self._lock:
            _, written, _ = self._leases.get(holder, ("", {}, {}))
            for group, ids in written.items():
                self._written[group][ids] = False
            self._leases.pop(holder, None)  # last: an interrupted call may be repeated

    def as_table(
        self, blocks: BlockIds | Mapping[str, BlockIds], *, unique: bool, what: str = "blocks"
    ) -> BlockTable:
        """Ids per group of this pool's blocks; see `block_table`."""
        return block_table(self._num_blocks, blocks, unique=unique, what=what)

    def as_foreign_table(self, blocks: BlockIds | Mapping[str, BlockIds]) -> BlockTable:
        """Ids per group of a peer's pool, whose size is not known here.

        Raises:
            ConfigError: Not integers, negative, or of an unknown group.

        """
        names = list(self._num_blocks)
        limits = dict.fromkeys(names, 1 << 62)
        return block_table(limits, blocks, unique=False, what="blocks of the peer")

    def slab(self, layer: int, part: Part) -> Slab:
        """Where a part of each block of a layer lies."""
        key = (layer, part)
        if (found := self._slabs.get(key)) is None:
            if len(self._slabs) > 4096:
                self._slabs.clear()
            found = self._slabs[key] = self._make_slab(layer, part)
        return found

    def _make_slab(self, layer: int, part: Part) -> Slab:
        group, index = self._where[layer]
        if "layer" in group.axes:
            names = group.tensor_names
        elif group.parts:
            names = tuple(f"{group.layers[index]}.{p}" for p in group.parts)
        else:
            names = (group.layers[index],)
        stores: list[int] = []
        columns: list[tuple[Ints, Ints, Ints, Ints]] = []
        for name in names:
            tensor = self._tensors[name]
            item = tensor.element_size()
            strides: dict[str, int] = {
                a: s * item for a, s in zip(group.axes, tensor.stride(), strict=True)
            }
            runs = slab_runs(group, part, strides, item)
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in stores:
                stores.append(pointer)
            base = int(tensor.storage_offset()) * item + index * strides.get("layer", 0)
            like = np.ones_like(runs.offsets)
            columns.append(
                (
                    like * stores.index(pointer),
                    runs.offsets + base,
                    runs.lengths,
                    like * strides["block"],
                )
            )
        store, offsets, lengths, steps = (np.concatenate(c) for c in zip(*columns, strict=True))
        memory, bases = tuple(self._memory[p] for p in stores), np.array(stores, dtype=np.int64)
        return Slab(memory, bases, store, offsets, lengths, steps)


class PoolExtent:
    """Blocks of a pool, or parts of them: one side of a transfer.

    Args:
        pool: The pool.
        blocks: Ids per group, in the order of the tokens.
        parts: What of each group moves.

    Attributes:
        pool: As given.
        block_table: As given.
        parts: As given.

    """

    def __init__(self, pool: RegisteredPool, blocks: BlockTable, parts: Mapping[str, Part]) -> None:
        self.pool = pool
        self.block_table = blocks
        self.parts = dict(parts)
        self._names = pool.group_names
        self._slabs: dict[int, Slab] = {}
        self.layers = len(self._names)

    def _slab(self, layer: int) -> Slab:
        if (found := self._slabs.get(layer)) is None:
            found = self._slabs[layer] = self.pool.slab(layer, self.parts[self._names[layer]])
        return found

    def units(self, layer: int) -> int:
        """Blocks of the layer that move."""
        name = self._names[layer]
        return len(self.block_table[name]) if name in self.parts else 0

    def measure(self) -> tuple[list[int], int]:
        """Blocks of each layer that move, and the bytes of all."""
        counts = [len(self.block_table[n]) if n in self.parts else 0 for n in self._names]
        return counts, sum([n * self._slab(i).unit_bytes for i, n in enumerate(counts) if n])

    def unit_bytes(self, layer: int) -> int:
        """Bytes of one block that move."""
        return self._slab(layer).unit_bytes if self._names[layer] in self.parts else 0

    def span_bytes(self, layer: int, first: int, count: int) -> int:
        """Bytes of consecutive blocks."""
        return count * self.unit_bytes(layer)

    def views(self, layer: int, first: int, count: int) -> Views:
        """Memory of consecutive blocks, neighbours joined."""
        ids = self.block_table[self._names[layer]]
        return self._slab(layer).views(ids[first : first + count])

    def runs(self, layer: int, first: int, count: int) -> MemoryRuns:
        """Addresses of consecutive blocks, neighbours joined."""
        ids = self.block_table[self._names[layer]]
        return self._slab(layer).runs(ids[first : first + count])

    def unit_views(self, layer: int, first: int, count: int) -> list[Views]:
        """Memory of each block."""
        ids = self.block_table[self._names[layer]]
        return self._slab(layer).unit_views(ids[first : first + count])

    def dtype(self, layer: int) -> str:
        """The group's dtype."""
        return self.pool.group_of(layer).dtype


def _counts(layout: KVLayout, num_blocks: int | Mapping[str, int]) -> list[tuple[CacheGroup, int]]:
    """Blocks of each group."""
    names = [g.name for g in layout.groups]
    many = num_blocks if isinstance(num_blocks, Mapping) else dict.fromkeys(names, num_blocks)
    if set(many) != set(names):
        raise ConfigError(f"num_blocks is for {sorted(many)}, the layout has groups {names}")
    if any(n < 1 for n in many.values()):
        raise ConfigError(f"num_blocks is {dict(many)}; every group needs at least one block")
    return [(g, many[g.name]) for g in layout.groups]


def _tensors_in(
    segment: Segment, places: Iterable[tuple[str, CacheGroup, list[int], int, int]]
) -> dict[str, Tensor]:
    import torch

    return {
        name: torch.from_numpy(segment.memory[at : at + nbytes])
        .view(torch_dtype(group.dtype))
        .view(shape)
        for name, group, shape, at, nbytes in places
    }


def _check_group(group: CacheGroup, tensors: Mapping[str, Tensor]) -> int:
    """Blocks of the group; raises when its tensors do not fit it."""
    inner = inner_axes(group)
    counts: dict[str, int] = {}
    for name in group.tensor_names:
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != group.dtype:
            raise ConfigError(f"{name!r} is {dtype}, the layout says {group.dtype}")
        lengths = dict(zip(group.axes, tensor.shape, strict=False))
        want = {**dict(zip(inner, group.block_shape, strict=True)), "layer": len(group.layers)}
        if tensor.dim() != len(group.axes) or any(
            lengths[a] != want[a] for a in group.axes if a != "block"
        ):
            raise ConfigError(
                f"{name!r} has shape {list(tensor.shape)}; axes {list(group.axes)} with "
                f"block_shape {list(group.block_shape)} do not fit"
            )
        if overlaps(zip(tensor.shape, tensor.stride(), strict=True)):
            raise ConfigError(f"{name!r}: its strides {tensor.stride()} make elements overlap")
        counts[name] = lengths["block"]
    if len(set(counts.values())) > 1:
        raise ConfigError(f"group {group.name!r}: tensors differ in blocks: {counts}")
    return next(iter(counts.values()))
