"""Blocks on their way as tensors that codecs understand: [block, kv, token, head, dim], in place.

What is no K, V or latent (recurrent state, scales, opaque bytes, plain tensors) is a matrix of
its elements, which only lossless codecs may touch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ._coded_request import CodecRequest
from .compression import TensorLayout
from .compression.frame import ITEM_BYTES
from .compression.layout import MAX_SECTION_BYTES, Geometry
from .memory import Extent, Views, torch_dtype
from .plan import held_part, inner_axes
from .pool import PoolExtent

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm.core.protocols import CacheGroup

__all__ = ["MAX_PIECE_BYTES", "CodedUnits", "codable", "is_values", "is_whole"]

MAX_PIECE_BYTES = 16 << 20
"""Values of one frame; a block larger than this is never coded."""

_WIDEST = 256


def is_values(extent: Extent, layer: int) -> bool:
    """Whether a layer holds K, V or latents, which codecs may round."""
    if not isinstance(extent, PoolExtent):
        return False
    group = extent.pool.group_of(layer)
    return (
        group.kind in ("kv", "mla")
        and {"token", "dim"} <= set(group.axes)
        and group.dtype in ITEM_BYTES
        and len(group.parts) in (0, 2)
        and not (group.parts and "kv" in group.axes)
        and _kinds_are_told(group)
    )


def _kinds_are_told(group: CacheGroup) -> bool:
    """Whether it is known which half is K."""
    if not group.parts:
        return True
    first, second = group.parts
    return first[:1].lower() == "k" and second[:1].lower() == "v"


def codable(extent: Extent, layer: int) -> bool:
    """Whether frames can hold blocks of a layer."""
    if isinstance(extent, PoolExtent) and extent.pool.staging is not None:
        return False  # the host cannot reach the values
    if not 0 < extent.unit_bytes(layer) <= MAX_PIECE_BYTES:
        return False
    if not is_values(extent, layer):
        return True
    assert isinstance(extent, PoolExtent), "only blocks of pools are values"
    group = extent.pool.group_of(layer)
    size = dict(zip(inner_axes(group), group.block_shape, strict=True))
    row = size.get("head", 1) * size["dim"] * ITEM_BYTES[group.dtype]
    return row <= MAX_SECTION_BYTES and size.get("kv", 2) == 2


def is_whole(geometry: Geometry) -> bool:
    """Whether a frame holds every value of its tensor, padding included."""
    rows = geometry.layers * geometry.kvs * geometry.tokens
    return rows * geometry.row_bytes == geometry.raw_bytes


@dataclass(frozen=True, slots=True)
class CodedUnits:
    """Consecutive units of a layer, as a frame codes them; both sides see the same shape.

    Attributes:
        extent: Whose.
        layer: Of the layout.
        first: First unit.
        count: Units.

    """

    extent: Extent
    layer: int
    first: int
    count: int

    def layout(self, request: CodecRequest) -> TensorLayout:
        """What the tensor's dimensions mean."""
        if not is_values(self.extent, self.layer):
            return TensorLayout(("token", "dim"))
        extent = self.extent
        assert isinstance(extent, PoolExtent), "only blocks of pools are values"
        group = extent.pool.group_of(self.layer)
        axes = ("block", *inner_axes(group))
        page = dict(zip(inner_axes(group), group.block_shape, strict=True))["token"]
        if group.parts:
            axes = ("kv", *axes)
        tokens, start = None, self.first * page
        if request.num_tokens is not None:
            tokens = min(max(0, request.num_tokens - start), self.count * page)
        rope = request.rope if group.kind == "kv" and "kv" in axes else None
        return TensorLayout(
            axes,
            first_layer=self.layer,
            first_position=request.first_position + start,
            rope=rope,
            tokens=tokens,
            model=extent.pool.layout.model[:256],
        )

    def load(self) -> Tensor:
        """The values, in place where they lie in one piece; else a copy."""
        if not is_values(self.extent, self.layer):
            return _flat(_joined(self._views()), self.extent.dtype(self.layer))
        return self._gather()[0]

    @contextmanager
    def target(self, *, whole: bool) -> Iterator[Tensor]:
        """Where values are decoded to; they are in the blocks once the context ends well.

        Args:
            whole: Whether all of it will be written; else what is there stays.

        """
        import torch

        if not is_values(self.extent, self.layer):
            views = self._views()
            if len(views) == 1:
                yield _flat(views[0], self.extent.dtype(self.layer))
                return
            held = memoryview(bytearray(sum(map(len, views))))
            yield _flat(held, self.extent.dtype(self.layer))
            at = 0
            for view in views:
                view[:] = held[at : at + len(view)]
                at += len(view)
            return
        sources, ids = self._sources()
        if len(sources) == 1 and _consecutive(ids):
            yield sources[0][int(ids[0]) : int(ids[0]) + self.count]
            return
        if whole:
            one = (len(ids), *sources[0].shape[1:])
            shape = one if len(sources) == 1 else (len(sources), *one)
            out = torch.empty(shape, dtype=sources[0].dtype)
        else:
            out = self._gather()[0].clone()
        yield out
        index = torch.from_numpy(ids)
        for i, source in enumerate(sources):
            source[index] = out if len(sources) == 1 else out[i]

    def _gather(self) -> tuple[Tensor, bool]:
        """The values, and whether they are a copy."""
        import torch

        sources, ids = self._sources()
        if len(sources) == 1 and _consecutive(ids):
            return sources[0][int(ids[0]) : int(ids[0]) + self.count], False
        index = torch.from_numpy(ids)
        parts = [s.index_select(0, index) for s in sources]
        return (parts[0] if len(parts) == 1 else torch.stack(parts)), True

    def _sources(self) -> tuple[list[Tensor], np.ndarray[tuple[int], np.dtype[np.int64]]]:
        """Views [block, inner axes], cut to the part that moves, and the ids in them."""
        extent = self.extent
        assert isinstance(extent, PoolExtent), "only blocks of pools are values"
        group = extent.pool.group_of(self.layer)
        axes = [str(a) for a in group.axes if a != "layer"]
        order = [axes.index("block"), *(axes.index(str(a)) for a in inner_axes(group))]
        part = extent.parts[group.name]
        found = []
        for tensor in extent.pool.layer_tensors(self.layer):
            view = tensor.detach().permute(order)
            if part.axis:
                at = 1 + [str(a) for a in inner_axes(group)].index(part.axis)
                start = part.first - held_part(group, part.axis).first
                view = view.narrow(at, start, part.stop - part.first)
            found.append(view)
        ids = extent.block_table[group.name][self.first : self.first + self.count]
        return found, np.ascontiguousarray(ids)

    def _views(self) -> Views:
        return self.extent.views(self.layer, self.first, self.count)


def _consecutive(ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> bool:
    return bool(len(ids)) and bool((np.diff(ids) == 1).all())


def _joined(views: Views) -> memoryview:
    return views[0] if len(views) == 1 else memoryview(bytearray().join(views))


def _flat(data: memoryview, dtype: str) -> Tensor:
    """Bytes as a matrix of their elements."""
    import torch

    item = ITEM_BYTES.get(dtype, 0)
    if not item or len(data) % item:
        dtype, item = "uint8", 1
    count = len(data) // item
    width = next(w for w in (_WIDEST, 64, 16, 4, 1) if count % w == 0)
    return torch.frombuffer(data, dtype=torch_dtype(dtype)).view(count // width, width)
