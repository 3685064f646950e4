"""The operations that combine ranks' elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sagellm.core.protocols.comm_types import ReduceOp
from sagellm.core.protocols.work import Work

from .buffers import is_plain, plain, tangled
from .checks import check_rank, check_same, check_tensor
from .core import BackendCore, Started
from .transport import RawCall

__all__ = ["ReducingOps"]


def _nothing() -> None:
    return None


class ReducingOps(BackendCore):
    """all_reduce, reduce and reduce_scatter."""

    def all_reduce(
        self, x: Tensor, op: str | ReduceOp = "sum", *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        return self._reduce_in_place("all_reduce", x, op, None, async_op)

    def reduce(
        self, x: Tensor, dst: int, op: str | ReduceOp = "sum", *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        check_rank("dst", dst, self._size)
        return self._reduce_in_place("reduce", x, op, dst, async_op)

    def _reduce_in_place(
        self, method: str, x: Tensor, op: str | ReduceOp, dst: int | None, async_op: bool
    ) -> Tensor | Work[Tensor]:
        check_tensor("x", x, self._device.type, written=True)
        reduction = ReduceOp.of(op)
        plan = self._reductions.plan(reduction, x.dtype)
        lowered = plan.lowered + self._offered(method)
        alone = self._size == 1 or x.numel() == 0
        copies = 0 if alone or is_plain(x) else 1

        def start(text: str) -> Started:
            buffer = plain(x)
            if buffer.dtype != plan.dtype:
                buffer = buffer.to(plan.dtype)
            call = RawCall(
                method,
                outputs=[buffer],
                reduce_op=plan.op,
                peer=dst,
                timeout_s=self.timeout_s,
                describe=text,
            )
            raws, after = self._issue(method, call)

            def done() -> None:
                after()
                if plan.divide:
                    buffer.div_(self._size)
                if buffer is not x:
                    x.copy_(buffer)

            return raws, done

        return self._run(
            method,
            (x,),
            start,
            lambda: x,
            async_op=async_op,
            local=_nothing if alone else None,
            reduce_op=str(reduction),
            peer=dst,
            copies=copies,
            lowered=lowered,
            in_place=True,
        )

    def reduce_scatter_tensor(
        self, out: Tensor, x: Tensor, op: str | ReduceOp = "sum", *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        return self._reduce_scatter("reduce_scatter_tensor", out, x, op, async_op, 0)

    def reduce_scatter(
        self, xs: Sequence[Tensor], op: str | ReduceOp = "sum", *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        parts = self._check_parts("xs", xs, even=True)
        out = self._scratch(parts[0].shape, parts[0].dtype)
        # Joining is the copy that lets one primitive serve both forms.
        joined = torch.stack(parts)
        return self._reduce_scatter("reduce_scatter", out, joined, op, async_op, 1)

    def _reduce_scatter(
        self,
        method: str,
        out: Tensor,
        x: Tensor,
        op: str | ReduceOp,
        async_op: bool,
        copies: int,
    ) -> Tensor | Work[Tensor]:
        check_tensor("x", x, self._device.type)
        check_tensor("out", out, self._device.type, written=True)
        check_same("x", x, out, numel=self._size * out.numel())
        reduction = ReduceOp.of(op)
        plan = self._reductions.plan(reduction, x.dtype)
        lowered = plan.lowered + self._offered(method)
        alone = self._size == 1 or x.numel() == 0
        direct = is_plain(out) and not tangled(out, x, self._rank * out.nbytes)
        copies += 0 if alone else (not is_plain(x)) + (not direct)

        def start(text: str) -> Started:
            source = plain(x).to(plan.dtype)
            fits = direct and plan.dtype == out.dtype
            target = out if fits else self._scratch(out.shape, plan.dtype)
            call = RawCall(
                "reduce_scatter",
                [source.view(-1)],
                [target.view(-1)],
                reduce_op=plan.op,
                timeout_s=self.timeout_s,
                describe=text,
            )
            raws, after = self._issue(method, call)

            def done() -> None:
                after()
                if plan.divide:
                    target.div_(self._size)
                if target is not out:
                    out.copy_(target)

            return raws, done

        return self._run(
            method,
            (x, out),
            start,
            lambda: out,
            async_op=async_op,
            local=(lambda: out.copy_(x.reshape(out.shape))) if alone else None,
            reduce_op=str(reduction),
            copies=copies,
            lowered=lowered,
            in_place=True,
        )
