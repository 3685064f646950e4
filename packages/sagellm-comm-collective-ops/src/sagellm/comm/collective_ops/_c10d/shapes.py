"""Turning the tensor lists of torch's calls into the flat buffers of ours, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sagellm.core.protocols.process_group import TorchObject

__all__ = ["bytes_of", "copy_parts", "flat_like", "joined", "lists"]

_KNOWN = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    }
)  # fmt: skip


def bytes_of(x: Tensor) -> Tensor:
    """`x` itself, or its bytes where the dtype is one that backends need not know.

    Rows stay rows. What is moved needs no meaning: complex numbers, float8, unsigned integers.
    """
    if x.dtype in _KNOWN:
        return x
    if x.dtype.is_complex:
        x = torch.view_as_real(x)
        return x if x.dtype in _KNOWN else x.view(torch.uint8)
    return x.view(torch.uint8) if x.dim() else x.view(1).view(torch.uint8)


def lists(tensors: TorchObject) -> list[Tensor]:
    """The tensors of an argument that may be a list, or a list of one list."""
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        return list(tensors[0])
    return list(tensors)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts end to end, as one flat tensor."""
    return torch.cat([part.reshape(-1) for part in parts])


def flat_like(x: Tensor, times: int) -> Tensor:
    """An uninitialised flat tensor with room for `x` so many times."""
    return torch.empty(times * x.numel(), dtype=x.dtype, device=x.device)


def copy_parts(targets: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Copy each part into its target, whatever their shapes."""
    for target, part in zip(targets, parts, strict=False):
        moved = bytes_of(target)
        moved.copy_(part.view(moved.shape) if part.is_contiguous() else part.reshape(moved.shape))
