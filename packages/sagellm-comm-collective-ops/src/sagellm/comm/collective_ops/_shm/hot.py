"""The short way from a method to the engine, for calls that need nothing else.

A call is hot when it is synchronous, the group is alive, no hook listens, nothing is queued, and its
tensors are plain, dense and contiguous. Everything here answers "done" or "not by me".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sagellm.core.protocols import ConfigError, ReduceOp
from sagellm.core.protocols.process_group import RawCall

from .layout import DTYPES
from .transport import ShmTransport

__all__ = ["HotPath"]

_INTEGERS = {"uint8", "int8", "int16", "int32", "int64"}
_PREPARED = ("all_reduce", "all_gather", "reduce_scatter")


def _reductions() -> list[tuple[ReduceOp, torch.dtype]]:
    found = []
    for name in DTYPES:
        for op in ReduceOp:
            if op is ReduceOp.AVG and (name in _INTEGERS or name == "bool"):
                continue
            if op in (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR) and name not in _INTEGERS:
                continue
            found.append((op, getattr(torch, name)))
    return found


class _Registered:
    """A tensor with calls prepared for it, until `release`."""

    def __init__(self, hot: HotPath, x: Tensor) -> None:
        self._hot = hot
        self._x: Tensor | None = x

    def release(self) -> None:
        """Forget the prepared calls and let go of the tensor. Safe more than once."""
        x, self._x = self._x, None
        if x is not None:
            self._hot.forget(x)


class HotPath:
    """Runs hot calls of one group; without a transport nothing is hot.

    Attributes:
        ready: Prepared sums by the id of their registered tensor; empty while calls are not hot.

    """

    def __init__(
        self, transport: ShmTransport | None = None, size: int = 1, timeout_s: float = 0.0
    ) -> None:
        self.ready: dict[int, Callable[[], None]] = {}
        self._prepared: dict[int, Callable[[], None]] = {}
        self._kept: dict[int, tuple[Tensor, int]] = {}
        self._pairs: dict[tuple[str, int, int], Callable[[], None]] = {}
        self._transport = transport
        self._size = size
        self._timeout_s = timeout_s
        self._allowed = transport is not None
        self._run: Callable[[RawCall], None] | None = None
        self._reducing: dict[tuple[str, torch.dtype], RawCall] = {}
        self._barrier = RawCall("barrier", timeout_s=timeout_s)
        self._moving = RawCall("all_gather", timeout_s=timeout_s)
        self._casting = RawCall("broadcast", timeout_s=timeout_s)
        self._scattering = RawCall("reduce_scatter", timeout_s=timeout_s)
        if transport is not None:
            transport.on_change = self._queue_changed
            for op, dtype in _reductions():
                call = RawCall("all_reduce", reduce_op=op, timeout_s=timeout_s)
                self._reducing[str(op), dtype] = call
            self._update()

    # -- whether ----------------------------------------------------------------------------

    def allow(self, allowed: bool) -> None:
        """Say whether calls may be hot at all."""
        self._allowed = allowed and self._transport is not None
        self._update()

    def stop(self) -> None:
        """No call is hot any more."""
        self._transport = None
        self.allow(False)

    def _queue_changed(self, busy: bool) -> None:
        self._update(busy)

    def _update(self, busy: bool | None = None) -> None:
        transport = self._transport
        if transport is None or not self._allowed or (transport.busy if busy is None else busy):
            self._run, self.ready = None, {}
        else:
            self._run, self.ready = transport.engine.run, self._prepared

    # -- calls ------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, op: str) -> bool:
        """Run it if it is hot."""
        run = self._run
        if run is None or type(x) is not Tensor or not isinstance(op, str):
            return False
        call = self._reducing.get((op, x.dtype))
        if call is None or not _plain(x):
            return False
        call.outputs = [x]
        run(call)
        call.outputs = []
        return True

    def broadcast(self, x: Tensor, src: int) -> bool:
        """Run it if it is hot."""
        run = self._run
        if run is None or type(x) is not Tensor or type(src) is not int or not _plain(x):
            return False
        if not 0 <= src < self._size:
            return False
        call = self._casting
        call.outputs, call.peer = [x], src
        run(call)
        call.outputs = []
        return True

    def pair(self, op: str, out: Tensor, x: Tensor, reduction: str) -> bool:
        """Run an all_gather or a reduce_scatter if it is hot."""
        run = self._run
        if run is None or type(x) is not Tensor or type(out) is not Tensor:
            return False
        if self._kept and reduction in ("none", "sum"):
            ready = self._pairs.get((op, id(out), id(x)))
            if ready is None:
                ready = self._prepare_pair(op, out, x)
            if ready is not None:
                ready()
                return True
        if x.dtype is not out.dtype or not _plain(x) or not _plain(out):
            return False
        small, large = (x, out) if op == "all_gather" else (out, x)
        if small.numel() * self._size != large.numel():
            return False
        call = self._moving
        if op == "reduce_scatter":
            known = self._reducing.get((reduction, x.dtype)) if isinstance(reduction, str) else None
            if known is None:
                return False
            call = self._scattering
            call.reduce_op = known.reduce_op
        call.inputs, call.outputs = [x], [out]
        run(call)
        call.inputs, call.outputs = [], []
        return True

    def barrier(self) -> bool:
        """Run it if it is hot."""
        if self._run is None:
            return False
        self._run(self._barrier)
        return True

    # -- registered tensors -----------------------------------------------------------------

    def register(self, x: Tensor) -> _Registered:
        """Prepare the calls on a tensor.

        Raises:
            ConfigError: It is no dense, contiguous CPU tensor.

        """
        if not isinstance(x, Tensor) or (x.numel() and not _plain(x)):
            raise ConfigError("register takes a dense, contiguous CPU tensor")
        kept = self._kept.get(id(x))
        self._kept[id(x)] = (x, 1 if kept is None else kept[1] + 1)
        transport = self._transport
        if kept is None and transport is not None and ("sum", x.dtype) in self._reducing:
            if x.numel():
                prepare = transport.engine.prepare
                self._prepared[id(x)] = prepare("all_reduce", x, x, "sum", self._timeout_s)
        return _Registered(self, x)

    def forget(self, x: Tensor) -> None:
        """Undo one `register`."""
        _, count = self._kept[id(x)]
        if count > 1:
            self._kept[id(x)] = (x, count - 1)
            return
        self._prepared.pop(id(x), None)
        self._pairs = {k: v for k, v in self._pairs.items() if id(x) not in k[1:]}
        del self._kept[id(x)]

    def _prepare_pair(self, op: str, out: Tensor, x: Tensor) -> Callable[[], None] | None:
        if id(x) not in self._kept or id(out) not in self._kept or x.dtype is not out.dtype:
            return None
        small, large = (x, out) if op == "all_gather" else (out, x)
        if small.numel() * self._size != large.numel() or not small.numel():
            return None
        if op == "reduce_scatter" and ("sum", x.dtype) not in self._reducing:
            return None
        assert self._transport is not None
        reduction = "none" if op == "all_gather" else "sum"
        ready = self._transport.engine.prepare(op, x, out, reduction, self._timeout_s)
        self._pairs[op, id(out), id(x)] = ready
        return ready


def _plain(x: Tensor) -> bool:
    return (
        x.is_cpu
        and x.layout is torch.strided
        and x.is_contiguous()
        and not x.is_neg()
        and not x.is_conj()
        and x.numel() > 0
    )
