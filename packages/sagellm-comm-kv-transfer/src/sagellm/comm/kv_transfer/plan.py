"""From two layouts to what each side reads or writes: resharding as strided runs.

Two nodes may hold different parts of the sharded axis (prefill on two ranks, decode on one).
What both hold is an interval of that axis; each side finds its bytes in its own memory and the
wire carries them in the common order of the axes. Nothing is staged: a slice of the heads of a
block is a short list of (offset, length) in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import (
    Axis,
    CacheGroup,
    ConfigError,
    DistributedRuntimeError,
    KVLayout,
    LayoutMismatchError,
)

__all__ = [
    "Part",
    "Runs",
    "check_layouts",
    "check_parts",
    "check_sound",
    "coverage_gap",
    "held_part",
    "shared_parts",
    "slab_runs",
    "wanted_part",
]

_WHOLE = ""
Ints = NDArray[np.int64]


class Part(NamedTuple):
    """An interval of a group's sharded axis, counted over all shards; axis `""` is the whole."""

    axis: str
    first: int
    stop: int


class Runs(NamedTuple):
    """Contiguous byte stretches of one block, in wire order (offsets from the block's start)."""

    offsets: Ints
    lengths: Ints


def inner_axes(group: CacheGroup) -> tuple[Axis, ...]:
    """Axes of one block of one layer, in memory order; `block_shape` has their lengths."""
    return tuple(axis for axis in group.axes if axis not in ("block", "layer"))


def check_sound(layout: KVLayout) -> None:
    """Check that a layout makes sense by itself; a peer's may say anything.

    Raises:
        ConfigError: It does not.

    """
    names = [g.name for g in layout.groups]
    if len(set(names)) != len(names):
        raise ConfigError(f"cache groups {names} are not named apart")
    for group in layout.groups:
        if group.axes.count("block") != 1 or len(set(group.axes)) != len(group.axes):
            raise ConfigError(
                f"group {group.name!r}: axes {group.axes} need `block` once, no repeats"
            )
        inner = inner_axes(group)
        if len(inner) != len(group.block_shape) or any(n < 1 for n in group.block_shape):
            raise ConfigError(
                f"group {group.name!r}: block_shape {list(group.block_shape)} needs a length "
                f"for each of axes {list(inner)}"
            )
        shard = group.shard
        if shard is not None and (
            shard.axis not in inner or not 0 <= shard.rank < shard.size or shard.replicas < 1
        ):
            raise ConfigError(f"group {group.name!r}: {shard} does not fit axes {list(inner)}")


def held_part(group: CacheGroup, axis: str) -> Part:
    """What a node holds of an axis."""
    if axis == _WHOLE:
        return Part(axis, 0, 1)
    length = group.block_shape[[str(a) for a in inner_axes(group)].index(axis)]
    rank = group.shard.rank if group.shard is not None and group.shard.axis == axis else 0
    return Part(axis, rank * length, (rank + 1) * length)


def _full_shape(group: CacheGroup) -> tuple[int, ...]:
    """`block_shape` as it would be without sharding."""
    shape = list(group.block_shape)
    if group.shard is not None:
        shape[inner_axes(group).index(group.shard.axis)] *= group.shard.size
    return tuple(shape)


def _sharded_axes(*groups: CacheGroup) -> set[str]:
    return {g.shard.axis for g in groups if g.shard is not None and g.shard.size > 1}


def check_layouts(ours: KVLayout, theirs: KVLayout) -> None:
    """Check that blocks of one layout can become blocks of the other.

    Raises:
        LayoutMismatchError: They cannot; the message says where they differ and holds both.

    """

    def refuse(why: str) -> LayoutMismatchError:
        return LayoutMismatchError(
            f"KV layouts do not fit: {why}", ours=ours.describe(), theirs=theirs.describe()
        )

    if ours.version != theirs.version:
        raise refuse(f"layout version {ours.version} and {theirs.version}")
    if ours.model != theirs.model:
        raise refuse(f"model {ours.model!r} and {theirs.model!r}")
    if [g.name for g in ours.groups] != [g.name for g in theirs.groups]:
        raise refuse("cache groups differ")
    for a, b in zip(ours.groups, theirs.groups, strict=True):
        for what, x, y in (
            ("kind", a.kind, b.kind),
            ("layers", len(a.layers), len(b.layers)),
            ("layer names", a.layers, b.layers),
            ("dtype", a.dtype, b.dtype),
            ("page_tokens", a.page_tokens, b.page_tokens),
            ("tensors per layer", a.parts, b.parts),
            ("order of axes", inner_axes(a), inner_axes(b)),
        ):
            if x != y:
                raise refuse(f"group {a.name!r}: {what} {x!r} and {y!r}")
        if len(_sharded_axes(a, b)) > 1:
            raise refuse(f"group {a.name!r}: sharded along different axes")
        if _full_shape(a) != _full_shape(b):
            shapes = f"{list(_full_shape(a))} and {list(_full_shape(b))}"
            raise refuse(f"group {a.name!r}: blocks of {shapes} over all shards")


def shared_parts(ours: KVLayout, theirs: KVLayout) -> dict[str, Part]:
    """What both nodes hold, per group; groups of which they share nothing are absent."""
    shared = {}
    for a, b in zip(ours.groups, theirs.groups, strict=True):
        axis = next(iter(_sharded_axes(a, b)), _WHOLE)
        x, y = held_part(a, axis), held_part(b, axis)
        first, stop = max(x.first, y.first), min(x.stop, y.stop)
        if first < stop:
            shared[a.name] = Part(axis, first, stop)
    return shared


def check_parts(layout: KVLayout, parts: Mapping[str, Part], peer: int) -> None:
    """Check that a peer asks for no more than is held here.

    Raises:
        DistributedRuntimeError: It does, which no honest peer would.

    """
    groups: dict[str, CacheGroup] = {g.name: g for g in layout.groups}
    for name, part in parts.items():
        group = groups.get(name)
        if group is not None and part.axis in ("", *inner_axes(group)):
            held = held_part(group, part.axis)
            if held.first <= part.first < part.stop <= held.stop:
                continue
        raise DistributedRuntimeError(f"node {peer} asks for {name!r} {part}, not held here")


def wanted_part(group: CacheGroup, parts: Iterable[Part]) -> Part:
    """All that a group holds, along the axis that these parts of it are cut along.

    Raises:
        ConfigError: They are cut along different axes.

    """
    axes = {p.axis for p in parts} | _sharded_axes(group)
    axes.discard(_WHOLE)
    if len(axes) > 1:
        raise ConfigError(
            f"group {group.name!r}: its senders are sharded along different axes, {sorted(axes)}"
        )
    return held_part(group, next(iter(axes), _WHOLE))


def coverage_gap(wanted: Part, granted: list[Part]) -> list[tuple[int, int]]:
    """Intervals of `wanted` that no granted part covers; the whole covers everything.

    Raises:
        ConfigError: A part is of another axis, which says nothing of this one.

    >>> coverage_gap(Part("head", 0, 4), [Part("head", 1, 2), Part("head", 2, 3)])
    [(0, 1), (3, 4)]
    """
    if any(p.axis == _WHOLE for p in granted):
        return []
    if any(p.axis != wanted.axis for p in granted):
        raise ConfigError(f"{granted} are not along the axis of {wanted}")
    gaps, at = [], wanted.first
    for part in sorted(granted, key=lambda p: p.first):
        if part.first > at:
            gaps.append((at, min(part.first, wanted.stop)))
        at = max(at, part.stop)
    if at < wanted.stop:
        gaps.append((at, wanted.stop))
    return gaps


def slab_runs(group: CacheGroup, part: Part, strides: Mapping[str, int], item_bytes: int) -> Runs:
    """Where a part of a block lies, as few stretches as its strides allow.

    Args:
        group: The group, as held here.
        part: Interval of the sharded axis, within what is held here.
        strides: Bytes between neighbours along each inner axis.
        item_bytes: Size of one element.

    """
    axes, shape = inner_axes(group), list(group.block_shape)
    start = 0
    if part.axis != _WHOLE:
        at = [str(a) for a in axes].index(part.axis)
        start = (part.first - held_part(group, part.axis).first) * strides[part.axis]
        shape[at] = part.stop - part.first
    length, inner = item_bytes, len(axes)
    while inner and (shape[inner - 1] == 1 or strides[axes[inner - 1]] == length):
        inner -= 1
        length *= shape[inner]
    offsets = np.full(1, start, dtype=np.int64)
    for axis, count in zip(axes[:inner], shape[:inner], strict=True):
        steps = np.arange(count, dtype=np.int64) * strides[axis]
        offsets = (offsets[:, None] + steps).ravel()
    return Runs(offsets, np.full(len(offsets), length, dtype=np.int64))
