"""How KV memory is laid out: cache groups, axes, shards, and the ids of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from .comm_types import KVBlock

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "Axis",
    "BlockIds",
    "Blocks",
    "CacheGroup",
    "CacheKind",
    "KVLayout",
    "Shard",
]


CacheKind = Literal["kv", "mla", "state", "scale", "opaque"]
"""What a group caches: K and V, MLA's latent, recurrent state, quantisation scales, or bytes."""


Axis = Literal["block", "layer", "kv", "token", "head", "dim"]
"""Meaning of one dimension of a pool tensor; `kv` has length 2, K first."""


BlockIds: TypeAlias = "NDArray[np.integer] | Sequence[int]"
"""Block ids in the order of the tokens they hold."""


Blocks: TypeAlias = "BlockIds | Mapping[str, BlockIds] | Sequence[KVBlock | Tensor]"
"""Block ids of the only cache group, ids per group, or plain tensors that are wrapped."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of an axis this node holds.

    Attributes:
        axis: The sharded axis, usually `head`.
        rank: This node's part, from 0.
        size: Number of parts.
        replicas: Nodes that hold the same part (KV heads replicated beyond their number).

    """

    axis: Axis
    rank: int
    size: int
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose caches share a block table, a page size and a shape.

    Attributes:
        name: Name of the group, unique in the layout.
        kind: What it caches.
        layers: Layer names, in order of computation.
        axes: Meaning of every dimension of a pool tensor. With `layer` among them one tensor,
            keyed by the group's name, holds all layers; else there is a tensor per layer.
        block_shape: Lengths of the axes other than `block` (and, where the pool tensor's axes
            include it, `layer`), as held *here*, after sharding.
        dtype: torch dtype name without the prefix.
        page_tokens: Tokens per block; None where a block is not a span of tokens.
        parts: Names of the tensors of one layer when it has several (`("k", "v")`); each is
            then keyed `layer.part`.
        shard: Which part of which axis this node holds; None when it holds all.

    """

    name: str
    kind: CacheKind
    layers: tuple[str, ...]
    axes: tuple[Axis, ...]
    block_shape: tuple[int, ...]
    dtype: str
    page_tokens: int | None = None
    parts: tuple[str, ...] = ()
    shard: Shard | None = None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Keys that `register` expects in its mapping for this group."""
        if "layer" in self.axes:
            return tuple(f"{self.name}.{p}" for p in self.parts) or (self.name,)
        if self.parts:
            return tuple(f"{layer}.{part}" for layer in self.layers for part in self.parts)
        return self.layers


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How one node's KV memory is laid out; compared when two nodes meet.

    Attributes:
        groups: Cache groups; layer i of the layout is the i-th of all groups' layers in order.
        model: Fingerprint of the model and of everything that changes what its cache means.
        version: Of this structure.

    """

    groups: tuple[CacheGroup, ...]
    model: str = ""
    version: int = 1

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers; their positions are what `send_layer` and `wait_layer` take."""
        return tuple(layer for group in self.groups for layer in group.layers)

    def describe(self) -> str:
        """One line with every field that must fit the peer's."""
        groups = "; ".join(
            f"{g.name}: {g.kind} {len(g.layers)} layers {g.dtype} {'x'.join(g.axes)}"
            f" {list(g.block_shape)} page_tokens={g.page_tokens}"
            + (f" {g.shard.axis} {g.shard.rank}/{g.shard.size}" if g.shard else "")
            for g in self.groups
        )
        return f"model={self.model or '-'} [{groups}]"
