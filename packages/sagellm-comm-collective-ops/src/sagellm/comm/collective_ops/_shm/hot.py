"""The short way from a method to the engine, for calls that need nothing else.

A call is hot when it is synchronous, the group is alive, no hook listens, nothing is queued, and
its tensors are plain, dense and contiguous. Everything here answers "done" or "not by me".
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sagellm.core.protocols import ConfigError, ReduceOp
from sagellm.core.protocols.process_group import RawCall, tangled

from .engine import Shortcut
from .layout import DTYPES
from .transport import ShmTransport

__all__ = ["HotPath"]

_INTEGERS = {"uint8", "int8", "int16", "int32", "int64"}


def _reductions() -> Iterator[tuple[str, torch.dtype]]:
    for name in DTYPES:
        for op in ReduceOp:
            if op is ReduceOp.AVG and (name in _INTEGERS or name == "bool"):
                continue
            if op in (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR) and name not in _INTEGERS:
                continue
            yield str(op), getattr(torch, name)


_REDUCTIONS = frozenset(_reductions())


class _Shortcuts(dict[torch.dtype, Any]):  # Any: a Shortcut or None
    """Shortcuts of one operation, each made when its element type is first asked for."""

    def __init__(self, hot: HotPath, op: str, reduction: str, root: int) -> None:
        super().__init__()
        self._hot, self._key = hot, (op, reduction, root)

    def __missing__(self, dtype: torch.dtype) -> Shortcut | None:
        op, reduction, root = self._key
        made = self[dtype] = self._hot.make(op, dtype, reduction, root)
        return made


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
        sums: Shortcuts of all_reduce's sum by element type; empty while calls are not hot.

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
        self._allowed = True
        self._shortcuts: dict[tuple[str, str, int], dict[torch.dtype, Shortcut]] = {}
        self.sums: Mapping[torch.dtype, Shortcut | None] = {}
        self._hot = False
        self._changing = threading.Lock()  # a thread that drains the queue makes calls hot, too
        self._barrier = RawCall("barrier", timeout_s=timeout_s)
        if transport is not None:
            transport.on_change = self._update
            self._update()

    def retime(self, timeout_s: float) -> None:
        """Make calls from now on with another deadline."""
        with self._changing:
            self._timeout_s = timeout_s
            self._barrier.timeout_s = timeout_s
            self._shortcuts.clear()
            self._pairs.clear()
            self._prepared.clear()
            for x, _ in self._kept.values():
                self._prepare(x)
        self._update()

    # -- whether ----------------------------------------------------------------------------

    def allow(self, allowed: bool) -> None:
        """Say whether calls may be hot at all."""
        self._allowed = allowed
        self._update()

    def stop(self) -> None:
        """No call is hot any more."""
        self._transport = None
        self._update()

    def after_fork(self) -> None:
        """In a forked child: stop, whoever holds this object."""
        self._changing = threading.Lock()  # a thread that the child does not have may hold the old
        self.stop()

    def _update(self, busy: bool | None = None) -> None:
        with self._changing:
            transport = self._transport
            self._hot = (
                transport is not None
                and self._allowed
                and not (transport.busy if busy is None else busy)
            )
            self.ready = self._prepared if self._hot else {}
            self.sums = self._kind("all_reduce", "sum") if self._hot else {}

    def _kind(self, op: str, reduction: str = "", root: int = -1) -> dict[torch.dtype, Shortcut]:
        """Shortcuts of one operation by element type: a dictionary that fills itself."""
        key = (op, reduction, root)
        found = self._shortcuts.get(key)
        if found is None:
            found = self._shortcuts[key] = _Shortcuts(self, op, reduction, root)
        return found

    def make(self, op: str, dtype: torch.dtype, reduction: str, root: int) -> Shortcut | None:
        """A shortcut of the engine, None where the general way has to decide."""
        if reduction and (reduction, dtype) not in _REDUCTIONS:
            return None
        assert self._transport is not None
        return self._transport.engine.shortcut(
            op,
            dtype,
            ReduceOp(reduction) if reduction else None,
            None if root < 0 else root,
            timeout_s=self._timeout_s,
        )

    # -- calls ------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, op: str) -> bool:
        """Run it if it is hot."""
        if not self._hot or type(x) is not Tensor:
            return False
        if op == "sum":
            shortcuts = self.sums
        elif isinstance(op, str):
            shortcuts = self._kind("all_reduce", op)
        else:
            return False
        go = shortcuts[x.dtype]
        if go is None or not _plain(x):
            return False
        go(x, x)
        return True

    def all_reduce_each(self, xs: Sequence[Tensor], start: int, op: str) -> int:
        """Run those from `start` on; the index of the first that is not hot."""
        if not isinstance(op, str):
            return start
        shortcuts = self._kind("all_reduce", op)
        for i in range(start, len(xs)):
            x = xs[i]
            if not self._hot or type(x) is not Tensor:
                return i
            go = shortcuts[x.dtype]
            if go is None or not _plain(x):
                return i
            go(x, x)
        return len(xs)

    def broadcast(self, x: Tensor, src: int) -> bool:
        """Run it if it is hot."""
        if not self._hot or type(x) is not Tensor or type(src) is not int:
            return False
        if not 0 <= src < self._size or not _plain(x):
            return False
        self._kind("broadcast", root=src)[x.dtype](x, x)
        return True

    def pair(self, op: str, out: Tensor, x: Tensor, reduction: str) -> bool:
        """Run an all_gather (without `reduction`) or a reduce_scatter if it is hot."""
        if not self._hot or type(x) is not Tensor or type(out) is not Tensor:
            return False
        if self._kept and reduction in ("", "sum"):
            ready = self._pairs.get((op, id(out), id(x)))
            if ready is None:
                ready = self._prepare_pair(op, out, x)
            if ready is not None:
                ready()
                return True
        if not isinstance(reduction, str) or x.dtype is not out.dtype:
            return False
        if not _plain(x) or not _plain(out):
            return False
        small, large = (x, out) if op == "all_gather" else (out, x)
        if small.nbytes * self._size != large.nbytes:
            return False
        go = self._kind(op, reduction)[x.dtype]
        if go is None:
            return False
        return go(x, out)

    def barrier(self) -> bool:
        """Run it if it is hot."""
        if not self._hot:
            return False
        assert self._transport is not None
        self._transport.engine.run(self._barrier)
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
        if kept is None:
            self._prepare(x)
        return _Registered(self, x)

    def _prepare(self, x: Tensor) -> None:
        transport = self._transport
        if transport is not None and ("sum", x.dtype) in _REDUCTIONS and x.numel():
            prepare = transport.engine.prepare
            self._prepared[id(x)] = prepare("all_reduce", x, x, "sum", self._timeout_s)

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
        if op == "reduce_scatter" and ("sum", x.dtype) not in _REDUCTIONS:
            return None
        assert self._transport is not None
        if tangled(small, large, self._transport.rank * small.nbytes):
            return None
        reduction = "none" if op == "all_gather" else "sum"
        ready = self._transport.engine.prepare(op, x, out, reduction, self._timeout_s)
        self._pairs[op, id(out), id(x)] = ready
        return ready


def _plain(x: Tensor) -> bool:
    try:
        if not (x.is_cpu and x.is_contiguous()) or x.is_neg():
            return False
    except RuntimeError:  # a layout without strides
        return False
    return x.nbytes > 0 and x.layout is torch.strided and not x.is_conj()
