"""Memory that a transport may read and write as it lies: what a call's tensors are brought into."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_plain", "plain", "tangled"]


def is_plain(x: Tensor) -> bool:
    """Whether `x` is contiguous and its memory holds its elements as they read."""
    return x.is_contiguous() and not x.is_neg() and not x.is_conj()


def plain(x: Tensor, *, copied: bool = False) -> Tensor:
    """`x` itself if it is plain and need not be `copied`, else a plain copy."""
    if is_plain(x) and not copied:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def tangled(part: Tensor, whole: Tensor, at: int | None = None) -> bool:
    """Whether two plain tensors, one read and one written, share memory as no call allows.

    `part` may be the bytes of `whole` from `at` on: a call may have its input in its output, or
    the other way round, where this rank's own part of it belongs.
    """
    offset = part.data_ptr() - whole.data_ptr()
    return -part.nbytes < offset < whole.nbytes and offset != at
