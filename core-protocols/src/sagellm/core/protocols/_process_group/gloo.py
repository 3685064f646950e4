"""What gloo cannot do itself, put into calls that it can; nothing here changes a result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .transport import RawCall

__all__ = ["gloo_call"]

_MOVES = frozenset({"all_gather", "all_to_all", "broadcast", "gather", "scatter"})
_KNOWN = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    }
)
"""Element types that gloo moves in every release from torch 2.6 to 2.15."""


def gloo_call(call: RawCall, rank: int, size: int) -> tuple[RawCall, Callable[[], object] | None]:
    """The call to make in place of `call`, and what is left to do once it is done.

    Other element types travel as bytes: gloo fails them in mid-call, and the group with them.
    Its `reduce_scatter` is an `all_reduce` of a copy (torch 2.6 to 2.13) whose work neither
    reports its end before somebody waits nor keeps a deadline; the same `all_reduce`, started
    here, does both.
    """
    if call.op == "reduce_scatter":
        buffer = call.inputs[0].reshape(-1).clone()
        out = call.outputs[0]

        def finish() -> object:
            return out.copy_(buffer.view(size, -1)[rank].view(out.shape))

        return replace(call, op="all_reduce", inputs=[], outputs=[buffer]), finish
    tensors = call.inputs or call.outputs
    if call.op in _MOVES and tensors and tensors[0].dtype not in _KNOWN:
        by_row = bool(call.in_splits or call.out_splits)
        inputs = [_bytes(x, by_row) for x in call.inputs]
        outputs = [_bytes(x, by_row) for x in call.outputs]
        return replace(call, inputs=inputs, outputs=outputs), None
    return call, None


def _bytes(x: Tensor, by_row: bool) -> Tensor:
    """The memory of contiguous `x` as bytes; `by_row` keeps dimension 0, which splits count."""
    flat = x.as_strided((x.numel(),), (1,)).view(torch.uint8)
    return flat.view(x.shape[0], math.prod(x.shape[1:]) * x.itemsize) if by_row else flat
