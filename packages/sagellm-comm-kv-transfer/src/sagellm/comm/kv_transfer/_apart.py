"""Whether tensors have elements in common, on whatever device they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from sagellm.core.protocols import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_apart", "overlaps"]


def overlaps(dims: Iterable[tuple[int, int]]) -> bool:
    """Whether elements of lengths and strides like these lie on each other."""
    reach = 0
    for length, stride in sorted(dims, key=lambda d: d[1]):
        if length > 1:
            if stride <= reach:
                return True
            reach += (length - 1) * stride
    return False


def check_apart(tensors: Mapping[str, Tensor]) -> None:
    """Check that no two tensors have an element in common; they may be interleaved.

    Raises:
        ConfigError: Two of them do.

    """
    near: list[tuple[int, str]] = []
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if not tensor.numel():
            continue
        start = tensor.data_ptr()
        near = [(end, other) for end, other in near if end > start]
        for _, other in near:
            if _share(tensors[other], tensor):
                raise ConfigError(
                    f"{other!r} and {name!r} share memory: a block of one would overwrite the other"
                )
        dims = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((length - 1) * stride for length, stride in dims)
        near.append((start + (last + 1) * tensor.element_size(), name))


class _Elements:
    """Where a tensor's elements are, on any device; nothing reads them."""

    def __init__(self, tensor: Tensor) -> None:
        item = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(tensor.shape),
            "strides": tuple(s * item for s in tensor.stride()),
            "typestr": f"|V{item}",
            "data": (tensor.data_ptr(), True),
        }


def _share(one: Tensor, other: Tensor) -> bool:
    a, b = (np.asarray(_Elements(t)) for t in (one, other))
    try:
        # numpy's stubs allow 0 and -1 only
        return np.shares_memory(a, b, max_work=1_000_000)  # type: ignore[arg-type,unused-ignore]
    except RuntimeError:  # too hard to tell, which no sound layout is
        return True
