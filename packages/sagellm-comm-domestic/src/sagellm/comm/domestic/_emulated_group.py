"""A c10d library that refuses what a vendor's would, and lets gloo do the rest."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar, TypeAlias

import torch
from torch._C import _distributed_c10d as c10d
from torch.utils import _pytree as pytree

from ._emulated_tensor import EmulatedTensor, raw_of
from .vendor_spec import VendorSpec

__all__ = ["EmulatedGroup", "group_class"]

_Torch: TypeAlias = Any
"""torch's C++ objects of process groups have no useful types."""

_METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
    "recv": "recv",
    "barrier": "barrier",
}
_GLOO_NAMES = {
    "all_gather_single": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "all_to_all_single": "alltoall_base",
}
"""torch >= 2.13 calls the first names on a group; its gloo backend has the second."""

_ASKED = frozenset({"send", "recv", "reduce_scatter"})
"""Works of gloo whose `is_completed` stays False until somebody waits."""


class _Work(c10d.Work):
    """Gloo's work; its tensors alias the emulated ones, so nothing is copied back."""

    def __init__(self, inner: _Torch) -> None:
        super().__init__()
        self._inner = inner

    def wait(self, timeout: timedelta | None = None) -> bool:
        return bool(self._inner.wait() if timeout is None else self._inner.wait(timeout))

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return bool(self._inner.is_completed())


class _AskedWork(_Work):
    """Gloo learns that some works are over only inside `wait`, as no device does: a thread asks."""

    def __init__(self, inner: _Torch) -> None:
        super().__init__(inner)
        self._over = threading.Event()
        self._error: Exception | None = None
        threading.Thread(target=self._block, name="emulated-device", daemon=True).start()

    def _block(self) -> None:
        try:
            self._inner.wait()
        except Exception as e:  # kept for wait()
            self._error = e
        self._over.set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._over.wait(None if timeout is None else timeout.total_seconds())
        if self._error is not None:
            raise self._error
        return self._over.is_set()

    def is_completed(self) -> bool:
        return self._over.is_set()


class _BatchWork(c10d.Work):
    def __init__(self, works: list[_Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta | None = None) -> bool:
        return all([work.wait(timeout) for work in self._works])

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


class _Options:
    """What a vendor's own options class holds."""

    def __init__(self) -> None:
        self.hccl_config: dict[str, int | str] = {}
        self.is_high_priority_stream = False


class EmulatedGroup(c10d.ProcessGroup):
    """A process group of an emulated library; `calls` records what torch asked of it."""

    Options = _Options
    row: ClassVar[VendorSpec]

    def __init__(
        self, store: _Torch, rank: int, size: int, timeout: timedelta, options: _Options | None
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg,unused-ignore]  # not in torch 2.13
        self._gloo: _Torch = c10d.ProcessGroupGloo(store, rank, size, timeout)
        self._batch: list[_Work] | None = None
        self._store, self._name = store, ""
        self.options = options
        self.calls: list[str] = []

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(self.row.device)]

    def getBackendName(self) -> str:  # noqa: N802  # c10d's name
        return self.row.c10d_name

    def _get_backend(self, device: torch.device) -> _Torch:
        return self

    # torch keeps these in the C++ library of a group, which a Python group does not have.
    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> _Torch:
        return self._name

    def get_group_store(self) -> _Torch:
        return self._store

    def get_hccl_comm_name(self, rank: int, init_comm: bool = True) -> str:
        return f"emulated_{self.row.c10d_name}_{id(self):x}"

    def _start_coalescing(self, device: torch.device) -> None:
        self._batch = []

    def _end_coalescing(self, device: torch.device) -> _BatchWork:
        works, self._batch = self._batch or [], None
        return _BatchWork(works)

    def shutdown(self) -> None:
        return None

    def abort(self) -> None:
        """Break the connections: a gloo receive that times out closes them all."""
        if self.size() > 1:
            with contextlib.suppress(RuntimeError):
                work = self._gloo.recv([torch.empty(1)], (self.rank() + 1) % self.size(), 0x5A6F)
                work.wait(timedelta(milliseconds=1))

    def _run(self, method: str, args: tuple[object, ...]) -> _Work:
        self.calls.append(method)
        _refuse(self.row, _METHODS[method], args)
        start = getattr(self._gloo, _GLOO_NAMES.get(method, method))
        inner = start(*pytree.tree_map(raw_of, args))
        work = _AskedWork(inner) if _METHODS[method] in _ASKED else _Work(inner)
        if self._batch is not None:
            self._batch.append(work)
        return work


def _method(name: str) -> Callable[..., _Work]:
    def call(self: EmulatedGroup, *args: object, **named: object) -> _Work:
        return self._run(name, (*args, *named.values()))

    return call


for _name in _METHODS:
    setattr(EmulatedGroup, _name, _method(_name))


def group_class(row: VendorSpec) -> type[EmulatedGroup]:
    """The group class of one vendor, under the name the vendor gives it."""
    path = row.options_path or f":ProcessGroup{row.c10d_name.upper()}"
    return type(path.partition(":")[2].split(".")[0], (EmulatedGroup,), {"row": row})


def _refuse(row: VendorSpec, operation: str, args: tuple[object, ...]) -> None:
    """Say no where the vendor would, in its words."""
    reduces = "reduce" in operation
    for tensor in pytree.tree_leaves(args):
        if not isinstance(tensor, torch.Tensor):
            continue
        if not isinstance(tensor, EmulatedTensor):
            raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
        known = row.reduce_dtypes if reduces else row.move_dtypes
        if known and str(tensor.dtype).removeprefix("torch.") not in known:
            raise RuntimeError(f"{row.library} {operation}: Unsupported data type {tensor.dtype}")
    op = getattr(args[-1], "reduceOp", None) if args and reduces else None
    for member in ("SUM", "AVG", "MIN", "MAX", "PRODUCT", "BAND", "BOR", "BXOR"):
        if op == getattr(c10d.ReduceOp, member) and member.lower() not in row.reduce_ops:
            raise RuntimeError(f"Cannot use ReduceOp.{member} with {row.library}")
