"""What leaders send to each other: the tensor as it is, or fewer bits of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sagellm.comm.collective_ops.quantized import LossyCollectives
from sagellm.core.protocols import CommBackendProtocol, ReduceOp, Work

__all__ = ["Wire", "finish"]


def finish(work: object, end: float) -> Tensor:
    """The result of a started call, waited for until `end` on the monotonic clock."""
    assert isinstance(work, Work)
    result = work.wait(max(0.001, end - time.monotonic()))
    assert isinstance(result, Tensor)
    return result


class Wire:
    """All_reduce among the ranks that speak for their hosts, in the format that is allowed.

    Two hosts that cast need no more than the library's own all_reduce of the cast numbers: their
    sum is rounded once, as it would be anyway. More hosts exchange parts and add in float32.

    Args:
        group: The ranks that speak for hosts.
        lossy: Chooses the format; its backend is `group`.

    """

    def __init__(self, group: CommBackendProtocol, lossy: LossyCollectives) -> None:
        self.group = group
        self._lossy = lossy

    def start(self, x: Tensor, op: ReduceOp, end: float) -> Callable[[], object]:
        """Begin reducing `x`; the call that ends it. Every rank of the group begins alike."""
        cast = self._cast(x, op)
        if cast is not None:
            small = x.to(cast)
            work = self.group.all_reduce(small, op, async_op=True)
            return lambda: x.copy_(finish(work, end))
        if self._lossy.takes("all_reduce", x, op) is not None:
            self._lossy.all_reduce(x, op)
            return lambda: x
        work = self.group.all_reduce(x, op, async_op=True)
        return lambda: finish(work, end)

    def _cast(self, x: Tensor, op: ReduceOp) -> torch.dtype | None:
        if self.group.size != 2 or op is not ReduceOp.SUM:
            return None
        wire = self._lossy.takes("all_reduce", x, op)
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(wire or "")
