"""Combining hosts' parts where they lie, always in the order of hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sagellm.core.protocols import ReduceOp

__all__ = ["Fold"]

_STEPS: dict[ReduceOp, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: Tensor.add_,
    ReduceOp.AVG: Tensor.add_,
    ReduceOp.MIN: lambda a, b: torch.minimum(a, b, out=a),
    ReduceOp.MAX: lambda a, b: torch.maximum(a, b, out=a),
    ReduceOp.PRODUCT: Tensor.mul_,
    ReduceOp.BAND: Tensor.bitwise_and_,
    ReduceOp.BOR: Tensor.bitwise_or_,
    ReduceOp.BXOR: Tensor.bitwise_xor_,
}


class Fold:
    """One reduction of several tensors; 16-bit floats are added in float32 when there are many."""

    def __init__(self, op: ReduceOp) -> None:
        self._op = op
        self._step = _STEPS[op]

    def over(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        """Leave the reduction of `parts` in `out`."""
        narrow = out.dtype in (torch.float16, torch.bfloat16) and len(parts) > 2
        if narrow and self._op in (ReduceOp.SUM, ReduceOp.PRODUCT):
            wide = parts[0].float()
            for part in parts[1:]:
                self._step(wide, part.float())
            out.copy_(wide)
            return
        out.copy_(parts[0])
        for part in parts[1:]:
            self._step(out, part)
