"""The calls of a process group on CPU tensors, done by one of our backends."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sagellm.comm.collective_ops._shm.hot import HotPath
from sagellm.comm.collective_ops.shm_backend import ShmBackend
from sagellm.core.protocols import (
    CommBackendProtocol,
    ConfigError,
    UnsupportedOperationError,
    Work,
)
from sagellm.core.protocols.process_group import TorchObject

from .facade import Facade, alias_older_names
from .names import is_async, one, reduction, root_of, seconds_of
from .shapes import addends, copy_parts, flat_like, joined, known, lists
from .works import BackendWork, Completer, DoneWork

__all__ = ["CpuGroup"]

_SUM = hash(dist.ReduceOp.SUM)
_STRIDED = torch.strided

Run = Callable[[bool], Any]  # Any: the operation's result, or its Work


class CpuGroup(Facade):
    """A torch process group whose CPU calls run on a backend of ours.

    Synchronous calls run in the caller's thread and return a finished work; asynchronous ones
    are the backend's. Sends and receives never block: their works do. Errors are the backend's,
    with the deadline that the group was made with.

    Args:
        backend: Does the work; closed with the group.
        library: Name that `dist.get_backend` gives.
        store: The group's store.
        release: Ends the backend; called once.
        reason: Why this backend serves the group.

    """

    def __init__(
        self,
        backend: CommBackendProtocol,
        library: str,
        store: TorchObject,
        release: Callable[[], None],
        reason: str = "asked for",
    ) -> None:
        super().__init__(backend.rank, backend.size, library, store)
        self._backend = backend
        self.reason = reason
        self._hot = backend.hot if isinstance(backend, ShmBackend) else HotPath()
        self._done = DoneWork()
        self._completer = Completer()
        self._coalesced: list[BackendWork] | None = None
        # destroy_process_group of torch 2.6 tells only NCCL and Gloo: what it drops is released.
        self._release = weakref.finalize(self, _release, release, self._completer)
        self._release.atexit = False  # a process that ends needs no goodbye

    @property
    def backend(self) -> CommBackendProtocol:
        """What does the work: its statistics, `explain` and hooks."""
        return self._backend

    # -- reductions -----------------------------------------------------------------------

    def allreduce(self, tensors: TorchObject, opts: TorchObject = None) -> TorchObject:
        """Reduce the tensor in place. The shortest path of a whole program lies here."""
        try:
            (x,) = tensors
            go = self._hot.sums[x.dtype]
            if (
                opts.asyncOp
                or self._coalesced is not None
                or hash(opts.reduceOp) != _SUM
                or go is None
                or type(x) is not Tensor
                or not (x.is_cpu and x.is_contiguous() and x.nbytes)
                or x.is_neg()
                or x.layout is not _STRIDED
            ):
                return self._all_reduce(tensors, opts)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return self._all_reduce(tensors, opts)
        try:
            go(x, x)
        except BaseException as e:
            assert isinstance(self._backend, ShmBackend)
            self._backend.short_call_failed("all_reduce", x, e)
        return self._done

    def _all_reduce(self, tensors: TorchObject, opts: TorchObject) -> TorchObject:
        given, op = one(tensors, "all_reduce"), reduction(opts)
        x = addends(given, op)
        return self._go(opts, lambda late: self._backend.all_reduce(x, op, async_op=late), [given])

    def allreduce_coalesced(self, tensors: TorchObject, opts: TorchObject = None) -> TorchObject:
        op = reduction(opts)
        backend = self._backend
        runs = [
            lambda late, x=x: backend.all_reduce(x, op, async_op=late)
            for x in [addends(given, op) for given in tensors]
        ]
        return self._go_all(opts, runs, tensors)

    def reduce(self, tensors: TorchObject, opts: TorchObject = None) -> TorchObject:
        given, dst, op = one(tensors, "reduce"), root_of(opts), reduction(opts)
        x = addends(given, op)
        return self._go(opts, lambda late: self._backend.reduce(x, dst, op, async_op=late), [given])

    def reduce_scatter(
        self, outs: TorchObject, ins: TorchObject, opts: TorchObject = None
    ) -> TorchObject:
        out, parts = one(outs, "reduce_scatter"), one_list(ins, "reduce_scatter")
        op = reduction(opts)
        if any(part.numel() != out.numel() for part in parts):
            return self._reduce_scatter_uneven(out, parts, op, opts)
        return self.reduce_scatter_single(out, joined(parts), opts)

    def _reduce_scatter_uneven(
        self, out: Tensor, parts: list[Tensor], op: str, opts: TorchObject
    ) -> TorchObject:
        """Parts of several sizes: one reduction to each rank."""
        if len(parts) != self._size or parts[self._rank].numel() != out.numel():
            raise ConfigError(
                f"reduce_scatter needs {self._size} parts, the one of rank {self._rank} with "
                f"{out.numel()} elements; got {[part.numel() for part in parts]}"
            )
        copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        backend = self._backend
        runs = [
            lambda late, x=x, dst=dst: backend.reduce(x, dst, op, async_op=late)
            for dst, x in enumerate([addends(copy, op) for copy in copies])
        ]
        return self._go_all(opts, runs, [out], lambda: copy_parts([out], [copies[self._rank]]))

    def reduce_scatter_single(
        self, out: Tensor, x: Tensor, opts: TorchObject = None
    ) -> TorchObject:
        op = reduction(opts)
        target, source = addends(out, op), addends(x, op)

        def run(late: bool) -> TorchObject:
            return self._backend.reduce_scatter_tensor(target, source, op, async_op=late)

        return self._go(opts, run, [out])

    def reduce_scatter_single_coalesced(
        self, outs: Sequence[Tensor], ins: Sequence[Tensor], opts: TorchObject = None
    ) -> TorchObject:
        op, backend = reduction(opts), self._backend
        runs = [
            lambda late, out=out, x=x: backend.reduce_scatter_tensor(out, x, op, async_op=late)
            for out, x in [(addends(o, op), addends(x, op)) for o, x in zip(outs, ins, strict=True)]
        ]
        return self._go_all(opts, runs, outs)

    # -- moves ----------------------------------------------------------------------------

    def all_gather_single(self, out: Tensor, x: Tensor, opts: TorchObject = None) -> TorchObject:
        target, source = known(out), known(x)

        def run(late: bool) -> TorchObject:
            return self._backend.all_gather_into_tensor(target, source, async_op=late)

        return self._go(opts, run, [out])

    def all_gather_single_coalesced(
        self, outs: Sequence[Tensor], ins: Sequence[Tensor], opts: TorchObject = None
    ) -> TorchObject:
        backend = self._backend
        pairs = [(known(o), known(x)) for o, x in zip(outs, ins, strict=True)]
        runs = [
            lambda late, o=o, x=x: backend.all_gather_into_tensor(o, x, async_op=late)
            for o, x in pairs
        ]
        return self._go_all(opts, runs, outs)

    def allgather(
        self, outs: TorchObject, ins: TorchObject, opts: TorchObject = None
    ) -> TorchObject:
        targets, x = one_list(outs, "all_gather"), one(ins, "all_gather")
        if len(targets) != self._size:
            raise ConfigError(f"all_gather needs {self._size} outputs, got {len(targets)}")
        if any(target.numel() != x.numel() for target in targets):
            return self._all_gather_uneven(targets, x, opts)
        run, finish = self._gathering(targets, x)
        return self._go(opts, run, targets, finish)

    def _gathering(self, targets: Sequence[Tensor], x: Tensor) -> tuple[Run, Callable[[], None]]:
        source = known(x)
        flat = flat_like(source, self._size)

        def run(late: bool) -> TorchObject:
            return self._backend.all_gather_into_tensor(flat, source, async_op=late)

        return run, lambda: copy_parts(targets, flat.chunk(self._size) if x.numel() else ())

    def _all_gather_uneven(
        self, targets: list[Tensor], x: Tensor, opts: TorchObject
    ) -> TorchObject:
        """Parts of several sizes: one broadcast from each rank."""
        if targets[self._rank].numel() != x.numel():
            raise ConfigError(
                f"output {self._rank} of all_gather has {targets[self._rank].numel()} elements, "
                f"the input of rank {self._rank} {x.numel()}"
            )
        copy_parts([targets[self._rank]], [x])
        backend = self._backend
        moved = [known(target) for target in targets]
        runs = [
            lambda late, x=x, src=src: backend.broadcast(x, src, async_op=late)
            for src, x in enumerate(moved)
        ]
        return self._go_all(opts, runs, targets)

    def allgather_coalesced(
        self, outs: TorchObject, ins: TorchObject, opts: TorchObject = None
    ) -> TorchObject:
        """Gather several tensors; `outs[r][i]` receives rank r's `ins[i]`."""
        made = [self._gathering([row[i] for row in outs], x) for i, x in enumerate(ins)]
        everything = [x for row in outs for x in row]
        return self._go_all(
            opts,
            [run for run, _ in made],
            everything,
            lambda: [finish() for _, finish in made],
        )

    def all_to_all_single(
        self,
        out: Tensor,
        x: Tensor,
        out_splits: Sequence[int] = (),
        in_splits: Sequence[int] = (),
        opts: TorchObject = None,
    ) -> TorchObject:
        theirs, ours = list(out_splits) or None, list(in_splits) or None
        target, source = known(out), known(x)

        def run(late: bool) -> TorchObject:
            return self._backend.all_to_all_single(target, source, theirs, ours, async_op=late)

        return self._go(opts, run, [out])

    def alltoall(
        self, outs: TorchObject, ins: TorchObject, opts: TorchObject = None
    ) -> TorchObject:
        targets, sources = lists(outs), lists(ins)
        if not len(targets) == len(sources) == self._size:
            raise ConfigError(
                f"all_to_all needs {self._size} inputs and outputs, got {len(sources)} and "
                f"{len(targets)}"
            )
        x = joined([known(source) for source in sources])
        ours = [known(source).numel() for source in sources]
        theirs = [known(target).numel() for target in targets]
        out = x.new_empty(sum(theirs))

        def run(late: bool) -> TorchObject:
            return self._backend.all_to_all_single(out, x, theirs, ours, async_op=late)

        return self._go(opts, run, targets, lambda: copy_parts(targets, torch.split(out, theirs)))

    def broadcast(self, tensors: TorchObject, opts: TorchObject = None) -> TorchObject:
        x, src = one(tensors, "broadcast"), root_of(opts)
        moved = known(x)

        def run(late: bool) -> TorchObject:
            return self._backend.broadcast(moved, src, async_op=late)

        return self._go(opts, run, [x])

    def gather(self, outs: TorchObject, ins: TorchObject, opts: TorchObject = None) -> TorchObject:
        return self._gather_into(lists(outs), one(ins, "gather"), opts)

    def gather_single(self, out: Tensor, x: Tensor, opts: TorchObject = None) -> TorchObject:
        root = self._rank == root_of(opts)
        return self._gather_into(list(out.view(-1).chunk(self._size)) if root else [], x, opts)

    def _gather_into(self, targets: list[Tensor], x: Tensor, opts: TorchObject) -> TorchObject:
        dst, source = root_of(opts), known(x)
        if self._rank == dst and len(targets) != self._size:
            raise ConfigError(f"gather needs {self._size} outputs on rank {dst}")
        kept: list[Any] = []

        def run(late: bool) -> TorchObject:
            found = self._backend.gather(source, dst, async_op=late)
            kept.append(found)
            return found

        def finish() -> None:
            parts = kept[0].result() if isinstance(kept[0], Work) else kept[0]
            if parts is not None:
                copy_parts(targets, parts)

        return self._go(opts, run, targets or [x], finish)

    def scatter(self, outs: TorchObject, ins: TorchObject, opts: TorchObject = None) -> TorchObject:
        out, src = one(outs, "scatter"), root_of(opts)
        parts = [known(x) for x in lists(ins)] if self._rank == src else None
        target = known(out)

        def run(late: bool) -> TorchObject:
            return self._backend.scatter(target, parts, src, async_op=late)

        return self._go(opts, run, [out])

    # -- point to point -------------------------------------------------------------------

    def send(self, tensors: TorchObject, dst: int, tag: int = 0) -> TorchObject:
        x = one(tensors, "send")
        return self._track([self._backend.send(known(x), dst, tag, async_op=True)], [x])

    def recv(self, tensors: TorchObject, src: int, tag: int = 0) -> TorchObject:
        x = one(tensors, "recv")
        work = self._backend.recv(known(x), src, tag, async_op=True)
        return self._track([work], [x], source=lambda: src)

    def recv_anysource(self, tensors: TorchObject, tag: int = 0) -> TorchObject:
        x = one(tensors, "recv")
        offered = getattr(self._backend, "recv_any_source", None)
        if offered is not None:
            work = offered(known(x), tag)
            return self._track([work], [x], source=lambda: int(work.source))
        inner = self._backend.process_group
        if inner is None:
            raise UnsupportedOperationError(
                f"{self._backend.name} has no recv without a source; name the source"
            )
        return inner.recv_anysource([known(x)], tag)

    # -- the group ------------------------------------------------------------------------

    def barrier(self, opts: TorchObject = None) -> TorchObject:
        limit = seconds_of(opts)
        return self._go(opts, lambda late: self._backend.barrier(limit, async_op=late), [])

    def monitored_barrier(
        self, timeout: timedelta | None = None, wait_all_ranks: bool = False
    ) -> None:
        """Return once all ranks have come; a `CommTimeoutError` names the missing ones."""
        self._backend.barrier(None if timeout is None else timeout.total_seconds())

    def _start_coalescing(self, device: TorchObject) -> None:
        if self._coalesced is not None:
            raise ConfigError(f"calls are being coalesced on group {self._label} already")
        self._coalesced = []

    def _end_coalescing(self, device: TorchObject) -> TorchObject:
        works, self._coalesced = self._coalesced or [], None
        tensors = [x for work in works for x in work.result()]
        waits = [inner for work in works for inner in work.works]

        def finish() -> None:
            for work in works:
                work.wait()

        return BackendWork(waits, tensors, finish, self._completer)

    def set_timeout(self, timeout: timedelta) -> None:
        """Replace the deadline of later calls."""
        self._backend.timeout_s = timeout.total_seconds()  # type: ignore[attr-defined]  # all of ours have it

    _set_default_timeout = set_timeout

    def abort(self) -> None:
        """Fail what is in flight here and at the peers."""
        self._backend.abort("abort of its torch process group")

    def shutdown(self) -> None:
        """Close the backend. Safe more than once."""
        self._release()

    _shutdown = shutdown

    # -- around a call --------------------------------------------------------------------

    def _go(
        self,
        opts: TorchObject,
        run: Run,
        tensors: Sequence[Tensor],
        finish: Callable[[], object] | None = None,
    ) -> TorchObject:
        return self._go_all(opts, [run], tensors, finish)

    def _go_all(
        self,
        opts: TorchObject,
        runs: Sequence[Run],
        tensors: Sequence[Tensor],
        finish: Callable[[], object] | None = None,
    ) -> TorchObject:
        if self._coalesced is None and not is_async(opts):
            for run in runs:
                run(False)
            if finish is not None:
                finish()
            return self._done
        return self._track([run(True) for run in runs], tensors, finish, ordered=True)

    def _track(
        self,
        works: Sequence[Any],  # Any: works differ by operation
        tensors: Sequence[Tensor],
        finish: Callable[[], object] | None = None,
        *,
        ordered: bool = False,
        source: Callable[[], int] | None = None,
    ) -> BackendWork:
        completer = self._completer if ordered else None
        work = BackendWork(works, tensors, finish, completer, source)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work


def one_list(tensors: TorchObject, call: str) -> list[Tensor]:
    """The list of tensors of a call that takes a list of lists of which there is one."""
    if len(tensors) != 1:
        raise ConfigError(f"{call} takes one list of tensors per rank, got {len(tensors)}")
    return list(tensors[0])


def _release(release: Callable[[], None], completer: Completer) -> None:
    completer.close()
    release()


alias_older_names(CpuGroup)
