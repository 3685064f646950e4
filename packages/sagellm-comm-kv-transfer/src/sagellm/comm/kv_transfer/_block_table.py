"""Which blocks of each cache group: ids as callers give them, checked once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import BlockIds, ConfigError

from .memory import Ints

__all__ = ["BlockTable", "block_table"]

BlockTable = dict[str, Ints]
"""Block ids per cache group."""


def block_table(
    limits: Mapping[str, int],
    blocks: BlockIds | Mapping[str, BlockIds],
    *,
    unique: bool,
    what: str = "blocks",
) -> BlockTable:
    """The ids per group, checked against what there is.

    Args:
        limits: Blocks of each group.
        blocks: Ids of the only group, or ids per group; groups left out have none.
        unique: Whether one block may come only once, as for destinations.
        what: Name of the argument in messages.

    Raises:
        ConfigError: Not integers, unknown group, out of range, or repeated.

    """
    names = list(limits)
    if type(blocks) is np.ndarray and len(names) == 1:  # the most frequent
        return {names[0]: _ids(blocks, names[0], limits[names[0]], unique, what)}
    if isinstance(blocks, Mapping):
        if unknown := sorted(set(blocks) - set(names)):
            raise ConfigError(f"{what}: no cache groups {unknown}; the layout has {names}")
        given: Mapping[str, BlockIds] = blocks
    elif len(names) == 1:
        given = {names[0]: blocks}
    else:
        raise ConfigError(f"{what}: the layout has groups {names}; give ids as a dict per group")
    return {n: _ids(given.get(n, ()), n, limits[n], unique, what) for n in names}


def _ids(blocks: BlockIds, name: str, limit: int, unique: bool, what: str) -> Ints:
    if type(blocks) is list and len(blocks) == 1 and type(blocks[0]) is int:
        if 0 <= blocks[0] < limit:
            return np.array(blocks, dtype=np.int64)
    if type(blocks) is np.ndarray and blocks.shape == (1,) and type(blocks.item()) is int:
        if 0 <= blocks.item() < limit:
            return blocks.astype(np.int64)
    raw: NDArray[np.generic] = np.asarray(blocks)
    if raw.size == 0:
        return np.zeros(0, dtype=np.int64)
    if raw.ndim != 1 or raw.dtype.kind not in "iu":
        raise ConfigError(
            f"{what}: block ids are a flat sequence of integers, "
            f"not {raw.dtype} of shape {list(raw.shape)}"
        )
    ids = raw.astype(np.int64)
    if (low := int(ids.min())) < 0 or (high := int(ids.max())) >= limit:
        bad = low if low < 0 else high
        raise ConfigError(f"{what}: block {bad} of group {name!r} is not in 0..{limit - 1}")
    if unique and _repeats(ids, limit):
        values, counts = np.unique(ids, return_counts=True)
        raise ConfigError(
            f"{what}: blocks {values[counts > 1][:8].tolist()} of group {name!r} come twice; "
            "a destination is written once"
        )
    return ids


def _repeats(ids: Ints, limit: int) -> bool:
    """Whether an id comes twice; without sorting, which took half a millisecond of 4096."""
    seen = np.zeros(limit, dtype=bool)
    seen[ids] = True
    return int(np.count_nonzero(seen)) != len(ids)
