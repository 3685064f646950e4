"""Combining ranks' elements in rank order: numpy for what it has, torch for 16-bit floats.

Elements are always combined as ((x0 + x1) + x2) + …: the bits do not depend on the rank, the
algorithm or the chunk. 16-bit floats are added in float32 and rounded once; for two ranks
the sum of two of them rounds the same in either type.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["Array", "Fold", "fold_of", "moved", "quiet", "typed"]

Array: TypeAlias = Any
"""A flat `numpy.ndarray`, or a `Tensor` for 16-bit floats."""

Fold: TypeAlias = Callable[[Sequence[Array], Array], None]
"""`fold(operands, out)`: the operands combined in their order, `out` may be one of them."""

NUMPY_TYPES: dict[torch.dtype, type] = {
    torch.uint8: np.uint8,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bool: np.bool_,
}

_NUMPY: dict[str, Callable[..., object]] = {
    "sum": np.add,
    "avg": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "product": np.multiply,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}
"""On bool numpy's sum is `or` and its product is `and`, as torch has them."""

_TORCH: dict[str, Callable[..., object]] = {
    "sum": torch.add,
    "avg": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
    "product": torch.mul,
}


def quiet(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` without numpy's warnings of overflow, whatever the caller has set. Not reentrant."""
    if int(np.__version__.split(".")[0]) < 2:

        @functools.wraps(fn)
        def guarded(*args: object) -> object:
            with np.errstate(all="ignore"):
                return fn(*args)

        return guarded
    # numpy 2 keeps the setting in a context variable: entering a context costs 20 ns
    context = contextvars.copy_context()
    context.run(np.seterr, all="ignore")
    return functools.partial(context.run, fn)


def typed(x: Tensor) -> Array:
    """The elements of a contiguous tensor, flat, sharing its memory."""
    if x.requires_grad:
        x = x.detach()
    if x.dtype in NUMPY_TYPES:
        array = x.numpy()
        return array if array.ndim == 1 else array.reshape(-1)
    if x.is_inference() and not torch.is_inference_mode_enabled():
        x = torch.from_numpy(x.view(torch.int16).numpy()).view(x.dtype)
    return x if x.dim() == 1 else x.view(-1)


def moved(x: Tensor) -> Array:
    """As `typed`, where elements are only moved: 16-bit floats as integers."""
    if x.dtype not in NUMPY_TYPES:
        x = x.detach().view(torch.int16)
    return typed(x)


def fold_of(op: str, dtype: torch.dtype, world: int, scratch: Callable[..., Array]) -> Fold:
    """The function that combines `world` operands of `dtype` by `op`.

    Args:
        op: A word of `layout.REDUCTIONS`.
        dtype: A type of `layout.DTYPES`.
        world: Ranks.
        scratch: `scratch(count, dtype, i)` is memory for `count` elements, another for every `i`.

    """
    if dtype not in NUMPY_TYPES:
        return _fold_16_bit(op, world, scratch)
    combine = _NUMPY[op]
    divide = op == "avg"

    def fold_two(operands: Sequence[Array], out: Array) -> None:
        combine(operands[0], operands[1], out=out)

    def fold(operands: Sequence[Array], out: Array) -> None:
        last = world - 1
        total = operands[0]
        if last > 1:
            # `out` may be an operand that is not consumed yet
            partial = scratch(out.size, dtype, 0)
            for i in range(1, last):
                combine(total, operands[i], out=partial)
                total = partial
        combine(total, operands[last], out=out)
        if divide:
            np.divide(out, world, out=out)

    return fold_two if world == 2 and not divide else fold


def _fold_16_bit(op: str, world: int, scratch: Callable[..., Array]) -> Fold:
    combine = _TORCH[op]
    exact = op in ("min", "max")
    divide = op == "avg"

    @functools.lru_cache(16)
    def floats(count: int, index: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.from_numpy(scratch(count, torch.float32, index))

    def fold_once(operands: Sequence[Array], out: Array) -> None:
        combine(operands[0], operands[1], out=out)

    def fold(operands: Sequence[Array], out: Array) -> None:
        count = out.numel()
        total = floats(count, 0)
        term = floats(count, 1)
        total.copy_(operands[0])
        for operand in operands[1:]:
            term.copy_(operand)
            combine(total, term, out=total)
        if divide:
            total.div_(world)
        out.copy_(total)

    return fold_once if world == 2 and (exact or not divide) else fold
