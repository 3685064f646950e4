"""The shapes that ranks tell each other before an all-to-all of uneven parts, and their limits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sagellm.core.protocols.errors import IntegrityError

__all__ = ["MAX_PART_BYTES", "MAX_PART_DIMS", "part_row", "read_part_rows"]

MAX_PART_DIMS = 8
MAX_PART_BYTES = 64 << 30
"""Most that one rank accepts in one call, from all ranks together."""


def part_row(shape: Sequence[int], itemsize: int) -> list[int]:
    """One part as it is told: element bytes, number of dimensions, extents, zeros.

    >>> part_row((2, 3), 4)
    [4, 2, 2, 3, 0, 0, 0, 0, 0, 0]
    """
    return [itemsize, len(shape), *shape, *[0] * (MAX_PART_DIMS - len(shape))]


def read_part_rows(rows: Sequence[Sequence[int]], itemsize: int) -> list[tuple[int, ...]]:
    """The shape that each rank announces for this one; `rows` came from the peers.

    Raises:
        IntegrityError: A row is not what `part_row` writes for elements of `itemsize` bytes, or
            all parts together are beyond `MAX_PART_BYTES`.

    """
    shapes = []
    total = 0
    for rank, (width, dims, *extents) in enumerate(rows):
        if width != itemsize:
            raise IntegrityError(
                f"rank {rank} announces elements of {width} bytes, this rank has {itemsize}"
            )
        possible = 0 <= dims <= MAX_PART_DIMS and not any(extents[dims:])
        if not possible or any(not 0 <= n <= MAX_PART_BYTES for n in extents[:dims]):
            raise IntegrityError(
                f"rank {rank} announces {dims} dimensions {list(extents)}, which is no shape"
            )
        shapes.append(tuple(extents[:dims]))
        total += math.prod(extents[:dims]) * itemsize
        if total > MAX_PART_BYTES:
            raise IntegrityError(
                f"ranks 0..{rank} announce {total} bytes, more than {MAX_PART_BYTES}"
            )
    return shapes
