"""Turning the tensor lists of torch's calls into the flat buffers of ours, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sagellm.core.protocols import UnsupportedOperationError
from sagellm.core.protocols.process_group import TorchObject

__all__ = ["addends", "copy_parts", "flat_like", "joined", "known", "lists"]

_KNOWN = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    }
)  # fmt: skip


_BY_ITEM_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def known(x: Tensor) -> Tensor:
    """`x` itself, or a view of its elements as a type that every backend moves.

    What is moved needs no meaning: complex numbers, float8, unsigned integers. Rows stay rows.
    """
    if x.dtype in _KNOWN:
        return x
    if x.dtype.is_complex:
        return torch.view_as_real(x.resolve_conj())
    return x.view(_BY_ITEM_BYTES.get(x.element_size(), x.dtype))


def addends(x: Tensor, op: str) -> Tensor:
    """`x` itself, or a view of complex numbers as the pairs that sums and averages are taken of.

    Raises:
        UnsupportedOperationError: Complex numbers have no such reduction.

    """
    if not x.dtype.is_complex:
        return x
    if op not in ("sum", "avg"):
        kind = str(x.dtype).removeprefix("torch.")
        raise UnsupportedOperationError(f"no backend has {op} of {kind}; reduce with sum or avg")
    return torch.view_as_real(x)


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
        into, moved = known(target), known(part)
        into.copy_(moved.view(into.shape) if moved.is_contiguous() else moved.reshape(into.shape))
