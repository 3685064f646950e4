"""A process group that hands every call to another one, and lets hooks see or replace it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sagellm.core.protocols import CommCall, DistributedRuntimeError, Work
from sagellm.core.protocols.process_group import TorchObject, abort_group

from .facade import Facade, alias_older_names
from .names import ENTRY_POINTS, EntryPoint, is_async, method_of, root_of, tensors_in
from .works import BackendWork, DoneWork, OwnWork

__all__ = ["CallHooks", "GroupCall", "WrappingGroup"]


class GroupCall(NamedTuple):
    """One finished call, as a recorder is given it.

    Attributes:
        op: Name in `torch.distributed`, such as `all_gather_into_tensor`.
        nbytes: Bytes of this rank's input; of its output for a receive.
        dtype: Of the first tensor; None without one.
        shape: Of the first tensor.
        group: Name of the group.
        seconds: From the call until it was waited for, the wait for slower ranks included.
        error: Class of what it failed with; empty after success.

    """

    op: str
    nbytes: int
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    group: str
    seconds: float
    error: str = ""


class Record(Protocol):
    """Takes finished calls: a list, a deque, anything that has `append`."""

    def append(self, call: GroupCall, /) -> object:
        """Take one."""
        ...


Before = Callable[[CommCall], object]
After = Callable[[CommCall, float, BaseException | None], object]
TakeOver = Callable[[CommCall], Work[Any] | None]  # Any: the result is in the call's tensors


@dataclass(frozen=True, slots=True)
class CallHooks:
    """What is done around every call of a wrapped group; see `wrap_process_group`."""

    record: Record | None = None
    before: Before | None = None
    after: After | None = None
    take_over: TakeOver | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return any(h is not None for h in (self.record, self.before, self.after, self.take_over))

    @property
    def wants_calls(self) -> bool:
        """Whether any hook but the recorder is there."""
        return not (self.before is None and self.after is None and self.take_over is None)


class WrappingGroup(Facade):
    """A torch process group around another one; see `wrap_process_group`.

    Args:
        inner: Does the work.
        hooks: What is done around it.
        library: Name that `dist.get_backend` gives; None is the inner group's.
        owned: Whether `shutdown` ends the inner group.

    """

    def __init__(
        self,
        inner: TorchObject,
        hooks: CallHooks,
        *,
        library: str | None = None,
        owned: bool = False,
    ) -> None:
        store = None
        if hasattr(inner, "get_group_store"):
            store = inner.get_group_store()
        super().__init__(inner.rank(), inner.size(), library or inner.name(), store)
        self._inner, self._hooks, self._owned = inner, hooks, owned
        self._methods: dict[str, Callable[..., Any]] = {}
        self._dead: DistributedRuntimeError | None = None
        self._sequence = 0

    @property
    def inner(self) -> TorchObject:
        """The group that does the work."""
        return self._inner

    def _get_backend(self, device: torch.device) -> TorchObject:
        backend = self._inner._get_backend(device)
        # Torch looks here for NCCL's coalescing, which would pass hooks by.
        return self if torch.device(device).type == "cpu" else backend

    def _start_coalescing(self, device: TorchObject) -> None:
        self._inner._start_coalescing(device)

    def _end_coalescing(self, device: TorchObject) -> TorchObject:
        return self._inner._end_coalescing(device)

    def set_timeout(self, timeout: timedelta) -> None:
        """Replace the deadline of later calls."""
        for device in self._inner._device_types or [torch.device("cpu")]:
            self._inner._get_backend(device)._set_default_timeout(timeout)

    _set_default_timeout = set_timeout

    def abort(self) -> None:
        """Fail what is in flight here and at the peers."""
        for device in self._inner._device_types or [torch.device("cpu")]:
            abort_group(self._inner, torch.device(device), self._rank, self._size)

    def shutdown(self) -> None:
        """End the inner group if it is ours."""
        end = getattr(self._inner, "shutdown", None)
        if self._owned and end is not None:
            self._owned = False
            end()

    _shutdown = shutdown

    # -- around a call --------------------------------------------------------------------

    def _pass(
        self, entry: EntryPoint, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TorchObject:
        if self._dead is not None:
            raise DistributedRuntimeError(f"{entry.op} on group {self._label}: {self._dead}")
        method = self._methods.get(entry.name)
        if method is None:
            method = self._methods[entry.name] = method_of(self._inner, entry)
        hooks = self._hooks
        call: CommCall | None = None
        start = time.perf_counter()
        work: TorchObject = None
        if hooks.wants_calls:
            call = self._call(entry, args, kwargs)
            try:
                if hooks.before is not None:
                    hooks.before(call)
                taken = None if hooks.take_over is None else hooks.take_over(call)
            except BaseException as e:
                self._die(entry.op, "before", e)
                raise
            if taken is not None:
                work = BackendWork([taken], _written(entry, args))
        try:
            if work is None:
                work = method(*args, **kwargs)
            options = kwargs.get("opts", args[-1] if args else None)
            if work is not None and is_async(options):
                return _WatchedWork(self, entry, args, call, start, work)
            if work is not None:
                work.wait()
        except Exception as e:
            self._over(entry, args, call, start, e)
            raise
        self._over(entry, args, call, start, None)
        return DoneWork(_written(entry, args)) if work is None else work

    def _over(
        self,
        entry: EntryPoint,
        args: tuple[Any, ...],
        call: CommCall | None,
        start: float,
        error: BaseException | None,
    ) -> None:
        """Tell the recorder and the `after` hook of a call that has ended."""
        seconds = time.perf_counter() - start
        hooks = self._hooks
        try:
            if hooks.record is not None:
                hooks.record.append(_record(entry, args, self._label, seconds, error))
            if hooks.after is not None and call is not None:
                hooks.after(call, seconds, error)
        except BaseException as e:
            self._die(entry.op, "after", e)
            raise

    def _die(self, op: str, phase: str, error: BaseException) -> None:
        """A hook failed: this rank will make no more calls, so let no peer wait for it."""
        if self._dead is None:
            self._dead = DistributedRuntimeError(
                f"dead since the {phase} hook of {op} raised {type(error).__name__}: {error}"
            )
            self.abort()

    def _call(self, entry: EntryPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CommCall:
        sent = tensors_in(args[entry.inputs]) if entry.inputs is not None else ()
        written = sent if entry.inputs == entry.outputs else _written(entry, args)
        tensors = sent if written is sent else (*sent, *written)
        options = kwargs.get("opts", args[-1] if args else None)
        kind = type(options)  # asking the type is cheap; an attribute that is not there costs 1 us
        op = None
        if options is not None and hasattr(kind, "reduceOp"):
            op = options.reduceOp
        peer = None
        if hasattr(kind, "rootRank"):
            peer = root_of(options)
        elif entry.name in ("send", "recv"):
            peer = int(args[1])
        self._sequence += 1
        return CommCall(
            op=entry.op,
            sequence=self._sequence - 1,
            nbytes=sum(x.nbytes for x in sent or written),
            dtype=_dtype_name(tensors[0].dtype) if tensors else "",
            group=self._label,
            rank=self._rank,
            size=self._size,
            reduce_op=None if op is None else _reduction_name(op),
            peer=peer,
            tensors=tensors,
        )


class _WatchedWork(OwnWork):
    """An asynchronous call: it is over for the hooks once somebody has waited for it."""

    def __init__(
        self,
        group: WrappingGroup,
        entry: EntryPoint,
        args: tuple[Any, ...],
        call: CommCall | None,
        start: float,
        work: TorchObject,
    ) -> None:
        super().__init__()
        self._group, self._entry, self._args = group, entry, args
        self._call, self._start, self._work = call, start, work
        self._told = False

    def _tell(self, error: BaseException | None) -> None:
        if not self._told:
            self._told = True
            self._group._over(self._entry, self._args, self._call, self._start, error)

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._let_go()
        limited = timeout is not None and timeout.total_seconds() > 0
        try:
            done = self._work.wait(timeout) if limited else self._work.wait()
        except Exception as e:
            self._tell(e)
            raise
        self._tell(None)
        return bool(done)

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())

    def is_success(self) -> bool:
        return bool(self._work.is_success())

    def exception(self) -> BaseException | None:
        error: BaseException | None = self._work.exception()
        return error

    def result(self) -> list[Tensor]:
        return list(_written(self._entry, self._args))

    def source_rank(self) -> int:
        ask = getattr(self._work, "source_rank", None) or self._work._source_rank
        return int(ask())

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[Any]:  # torch fixes the value type per backend
        self._let_go()

        def tell(future: torch.futures.Future[Any]) -> TorchObject:
            value = future.value()  # raises what the call failed with
            self._tell(None)
            return value

        chained: torch.futures.Future[Any] = self._work.get_future().then(tell)
        return chained


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_reduction_names: dict[int, str] = {}


def _reduction_name(op: TorchObject) -> str:
    """`sum` and so on: by hash, since operations of torch are not equal to their like."""
    name = _reduction_names.get(hash(op))
    if name is None:
        name = _reduction_names[hash(op)] = str(op.op).rpartition(".")[2].lower()
    return name


def _written(entry: EntryPoint, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tensors_in(args[entry.outputs]) if entry.outputs is not None and args else ()


def _record(
    entry: EntryPoint,
    args: tuple[Any, ...],
    group: str,
    seconds: float,
    error: BaseException | None,
) -> GroupCall:
    place = entry.outputs if entry.inputs is None else entry.inputs
    payload = args[place] if place is not None and len(args) > place else ()
    text = "" if error is None else type(error).__name__
    if type(payload) is list and len(payload) == 1 and isinstance(payload[0], Tensor):
        payload = payload[0]
    if isinstance(payload, Tensor):
        shape = tuple(payload.shape)
        return GroupCall(entry.op, payload.nbytes, payload.dtype, shape, group, seconds, text)
    tensors = tensors_in(payload)
    if not tensors:
        return GroupCall(entry.op, 0, None, (), group, seconds, text)
    nbytes = sum(x.nbytes for x in tensors)
    first = tensors[0]
    return GroupCall(entry.op, nbytes, first.dtype, tuple(first.shape), group, seconds, text)


def _passing(entry: EntryPoint) -> Callable[..., Any]:
    def call(self: WrappingGroup, *args: TorchObject, **kwargs: TorchObject) -> TorchObject:
        return self._pass(entry, args, kwargs)

    call.__name__ = entry.name
    return call


for _entry in ENTRY_POINTS:
    setattr(WrappingGroup, _entry.name, _passing(_entry))
alias_older_names(WrappingGroup)
