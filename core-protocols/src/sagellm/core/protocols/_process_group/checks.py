"""Argument checks of the tensor backends: everything here raises before a byte is sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sagellm.core.protocols.errors import ConfigError

from .shim import dtype_name

__all__ = ["check_peer", "check_rank", "check_same", "check_splits", "check_tensor"]


def check_rank(what: str, rank: int, size: int) -> int:
    """Return `rank` when it is one of the group's."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < size:
        raise ConfigError(f"{what} {rank!r} is not in 0..{size - 1}")
    return rank


def check_peer(what: str, peer: int, rank: int, size: int) -> int:
    """Return `peer` when it is another rank of the group."""
    if check_rank(what, peer, size) == rank:
        raise ConfigError(f"{what} {peer} is this rank itself; copy the tensor instead")
    return peer


def check_tensor(what: str, x: Tensor, device_type: str, *, written: bool = False) -> Tensor:
    """Return `x` when it is a dense tensor on the backend's device type."""
    if not isinstance(x, torch.Tensor):
        raise ConfigError(f"{what} is a {type(x).__name__}, not a torch.Tensor")
    if x.layout != torch.strided:
        raise ConfigError(f"{what} has layout {x.layout}; pass a dense tensor")
    if x.device.type != device_type:
        raise ConfigError(f"{what} is on {x.device}; this backend takes {device_type} tensors")
    if (
        written
        and 0 in x.stride()
        and any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True))
    ):
        raise ConfigError(f"{what} of shape {tuple(x.shape)} is expanded: its elements overlap")
    return x


def check_same(what: str, x: Tensor, like: Tensor, *, numel: int) -> None:
    """Check that `x` has `like`'s dtype and `numel` elements."""
    if x.dtype != like.dtype:
        raise ConfigError(f"{what} is {dtype_name(x.dtype)}, expected {dtype_name(like.dtype)}")
    if x.numel() != numel:
        raise ConfigError(f"{what} has {x.numel()} elements, expected {numel}")


def check_splits(what: str, splits: Sequence[int] | None, x: Tensor, size: int) -> list[int]:
    """The rows of `x` for each rank: `splits` itself, or an even split."""
    rows = x.shape[0] if x.dim() else 0
    if x.dim() == 0:
        raise ConfigError(f"{what} is 0-dimensional; all_to_all splits along dimension 0")
    if splits is None:
        if rows % size:
            raise ConfigError(f"{what} has {rows} rows, which {size} ranks do not divide evenly")
        return [rows // size] * size
    if len(splits) != size or any(n < 0 for n in splits) or sum(splits) != rows:
        raise ConfigError(
            f"splits {list(splits)} of {what} must be {size} counts that sum to its {rows} rows"
        )
    return list(splits)
