"""Collectives inside one host, over memory that its ranks share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from sagellm.core.protocols import (
    BackendSpec,
    Choice,
    CommCall,
    ConfigError,
    CostModelProtocol,
    CostTable,
    ReduceOp,
    Registration,
    TopologyManagerProtocol,
    Work,
)
from sagellm.core.protocols.observe import observe_settings
from sagellm.core.protocols.process_group import (
    STARTED,
    EngineRow,
    FlightRecorder,
    Record,
    TorchObject,
    Transport,
)

from ._chosen import Chooser
from ._groups import GroupSource
from ._own import OwnBackend
from ._shm.any_source import AnySourceReceive
from ._shm.choice import MEASURING, STAGED
from ._shm.engine import EngineFailure
from ._shm.engines import ENGINES, missing_engines
from ._shm.explain import explain_shm
from ._shm.flight import merge_records
from ._shm.forks import FORKED, release_in_children
from ._shm.hot import HotPath
from ._shm.settings import ShmSettings
from ._shm.transport import ShmTransport, form_transport
from ._specs import SHM
from .choice import NATIVE

__all__ = ["ShmBackend"]

Before = Callable[[CommCall], None]
After = Callable[[CommCall, float, BaseException | None], None]
TakeOver = Callable[[CommCall], Work[Any] | None]  # Any: the operation's result


class ShmBackend(OwnBackend[ShmSettings]):
    """Ranks of one host over shared memory, for CPU tensors.

    Without a group it stands on the initialised default group, else on RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT, else on a world of one. A torch group only tells who the ranks are
    and lends its store: nothing is sent over it. All ranks must be on one host, which is proven,
    not believed. A forked child cannot use the group, nor the tensors of `empty`.

    Results are equal on all ranks, bit for bit, and from run to run: sums are formed in the order
    of the ranks, those of 16-bit floats in float32 when more than two ranks add.

    Args:
        spec: Facts about the backend; None is this package's.
        process_group: Whose ranks to serve.
        device: None is the CPU.
        timeout_s: Deadline of every call, and of meeting the other ranks.
        topology_manager: Not used.
        cost_model: Chooses between `one_shot` and `two_shot`, where it has observed them.
        options: `engine`, `slot_bytes`, `arena_bytes`, `algorithms`, and `calibrate` (measure where
            `two_shot` becomes the faster one, unless `algorithms` names either), alike on all
            ranks; and each rank's own `statistics`, `flight_entries`, `flight_folder`. `statistics`
            False also keeps calls of the short way out of the flight record.

    >>> ShmBackend().size
    1
    """

    default_spec = SHM

    @classmethod
    def _read(cls, spec: BackendSpec, options: Mapping[str, Any]) -> ShmSettings:
        return ShmSettings.of(spec.name, options)

    def _form(
        self,
        source: GroupSource,
        options: Mapping[str, Any],  # Any: each option has its own type
        timeout_s: float,
        cost_model: CostModelProtocol | None,
    ) -> tuple[Transport, CostTable | None]:
        transport = form_transport(
            source.store,
            source.rank,
            source.size,
            name=source.name,
            label=source.name,
            global_ranks=source.global_ranks,
            timeout_s=timeout_s,
            settings=self._settings,
        )
        return transport, None

    @classmethod
    def over_store(
        cls,
        store: TorchObject,
        rank: int,
        size: int,
        *,
        name: str = "shm",
        global_ranks: Sequence[int] | None = None,
        timeout_s: float = 30.0,
        options: Mapping[str, Any] | None = None,  # Any: each option has its own type
        topology_manager: TopologyManagerProtocol | None = None,
        cost_model: CostModelProtocol | None = None,
    ) -> Self:
        """A group of `size` ranks that share a torch store; every one of them makes this call.

        Args:
            store: Any torch store; keys are counted and never used twice.
            rank: This rank.
            size: Ranks.
            name: Of the group; groups of different ranks over one store need different names.
            global_ranks: The job's rank of each member; None numbers them from 0.
            timeout_s: Deadline of every call, and of meeting the other ranks.
            options: As of the constructor.
            topology_manager: As of the constructor.
            cost_model: As of the constructor.

        """
        members = tuple(range(size) if global_ranks is None else global_ranks)
        if not 0 <= rank < size or len(members) != size:
            raise ConfigError(f"rank {rank} of {size} with global ranks {members} cannot be")
        backend = cls.__new__(cls)
        backend._settings = cls._read(SHM, options or {})
        transport = form_transport(
            store,
            rank,
            size,
            name=name,
            label=name,
            global_ranks=members,
            timeout_s=timeout_s,
            settings=backend._settings,
        )
        observe = observe_settings(options or {})
        backend._begin(SHM, transport, timeout_s, topology_manager, cost_model, None, observe)
        return backend

    @classmethod
    def join(cls, rank: int, size: int, meet: str, *, timeout_s: float = 30.0) -> Self:
        """A rank of a group that meets at a file; for the conformance kit."""
        store = FileStore(meet, size)
        return cls.over_store(store, rank, size, timeout_s=timeout_s)

    def _stand_on(self, transport: Transport) -> None:
        self._fallen: Record | None = None
        self._hot = HotPath()
        self._shm = transport if isinstance(transport, ShmTransport) else None

    def _settle(self) -> None:
        shm, settings = self._shm, self._settings
        if shm is None:
            return
        self._hot = HotPath(shm, self._size, self.timeout_s)
        release_in_children(self)
        self._chooser = Chooser((settings.table,), STAGED, None, shm.use, **MEASURING)
        # Overrides go before what is measured, and so would run while that is.
        overridden = any(
            op in STAGED and name in STAGED[op] for op, *_, name in settings.overrides()
        )
        self._chooser.settle(
            self,
            self._transport,
            self._cost_table,
            calibrate=settings.calibrate and not overridden,
            facts=[self.engine, str(settings.slot_bytes)],
        )

    @property
    def timeout_s(self) -> float:
        """Deadline of calls that give none, in seconds; may be set."""
        return self._timeout_s

    @timeout_s.setter
    def timeout_s(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._hot.retime(timeout_s)

    @staticmethod
    def engines() -> dict[str, str]:
        """What may run the calls of groups in this process: `ready`, or why not."""
        missing = missing_engines()
        return {name: missing.get(name, "ready") for name in ENGINES}

    @property
    def engine(self) -> str:
        """What runs the calls: `native`, `python`, or `none` in a world of one."""
        return "none" if self._shm is None else self._shm.engine.name

    # -- the short way --------------------------------------------------------------------
    # Each method asks the hot path for something that can run at once; what it does not know, it
    # leaves to the general way, which checks, tells hooks, copies, and queues.

    def all_reduce(
        self, x: Tensor, op: str | ReduceOp = "sum", *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        if not async_op:
            hot = self._hot
            ready = hot.ready.get(id(x)) if op == "sum" else None
            try:
                if ready is not None:
                    ready()
                    return x
                if hot.all_reduce(x, op):
                    return x
            except BaseException as e:
                self.short_call_failed("all_reduce", x, e)
        return super().all_reduce(x, op, async_op=async_op)

    def all_reduce_each(self, xs: Sequence[Tensor], op: str | ReduceOp = "sum") -> None:
        """`all_reduce` of one after another, for less than a loop over it costs."""
        i = 0
        while i < len(xs):
            try:
                i = self._hot.all_reduce_each(xs, i, op)
            except BaseException as e:
                self.short_call_failed("all_reduce", None, e)
            if i < len(xs):
                super().all_reduce(xs[i], op)
                i += 1

    def all_gather_into_tensor(
        self, out: Tensor, x: Tensor, *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        if not async_op:
            try:
                if self._hot.pair("all_gather", out, x, ""):
                    return out
            except BaseException as e:
                self.short_call_failed("all_gather_into_tensor", x, e)
        return super().all_gather_into_tensor(out, x, async_op=async_op)

    def reduce_scatter_tensor(
        self, out: Tensor, x: Tensor, op: str | ReduceOp = "sum", *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        if not async_op:
            try:
                if self._hot.pair("reduce_scatter", out, x, op):
                    return out
            except BaseException as e:
                self.short_call_failed("reduce_scatter_tensor", x, e)
        return super().reduce_scatter_tensor(out, x, op, async_op=async_op)

    def broadcast(self, x: Tensor, src: int, *, async_op: bool = False) -> Tensor | Work[Tensor]:
        if not async_op:
            try:
                if self._hot.broadcast(x, src):
                    return x
            except BaseException as e:
                self.short_call_failed("broadcast", x, e)
        return super().broadcast(x, src, async_op=async_op)

    def barrier(
        self, timeout_s: float | None = None, *, async_op: bool = False
    ) -> Work[None] | None:
        if timeout_s is None and not async_op:
            try:
                if self._hot.barrier():
                    return None
            except BaseException as e:
                self.short_call_failed("barrier", None, e)
        return super().barrier(timeout_s, async_op=async_op)

    @property
    def hot(self) -> HotPath:
        """The short way, for callers that make its calls themselves; see `short_call_failed`."""
        return self._hot

    def short_call_failed(self, op: str, x: Tensor | None, failure: BaseException) -> NoReturn:
        """Raise what the general way would."""
        if isinstance(failure, ConfigError):  # nothing was sent
            raise failure
        self._hot.stop()
        if isinstance(failure, EngineFailure):
            raise self._failed_in_engine(op, x, failure) from failure
        # An interrupt, or a bug, in the middle of a call: the ranks are apart.
        self.abort(f"{type(failure).__name__} in {op}")
        raise failure

    def _failed_in_engine(self, op: str, x: Tensor | None, failure: EngineFailure) -> Exception:
        if self._dead is not None or self._closed:
            return self._unusable(op)
        detail = "" if x is None else f", {x.nbytes} bytes {str(x.dtype).removeprefix('torch.')}"
        text = f"{op} of group {self.group_name} (rank {self._rank} of {self._size}{detail})"
        if self._counting:
            self._counters.started(op, 0, 0)
            self._counters.failed(op)
        nbytes, dtype = (0, None) if x is None else (x.nbytes, x.dtype)
        fallen = Record(self, op, 0, 0, nbytes, nbytes, dtype, None, None, NATIVE)
        fallen.text, fallen.state = text, STARTED
        self._fallen = fallen
        return self._declare_dead(text, failure)

    def recv_any_source(self, x: Tensor, tag: int = 0) -> AnySourceReceive:
        """Start to fill `x` from whichever rank sends first with this tag; `source` says which."""
        return AnySourceReceive(self, self._shm, x, tag)

    # -- what changes the way -------------------------------------------------------------

    def add_hook(
        self,
        *,
        before: Before | None = None,
        after: After | None = None,
        take_over: TakeOver | None = None,
    ) -> Callable[[], None]:
        remove = super().add_hook(before=before, after=after, take_over=take_over)
        self._hot.allow(not self._hooked())

        def undo() -> None:
            remove()
            self._hot.allow(not self._hooked())

        return undo

    def _hooked(self) -> bool:
        return bool(self._before or self._after or self._take_over)

    def close(self) -> None:
        self._hot.stop()
        super().close()

    def after_fork(self) -> None:
        """In a forked child: refuse everything, for the group is the parent's."""
        # A thread that the child does not have may hold the old lock.
        self._state = threading.RLock()
        self._hot.after_fork()
        self._dead = ConfigError(FORKED)

    # -- memory and steering --------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that peers reach where it lies; its memory goes with its last view.

        It may be used after `close`, and by this process only.

        Raises:
            ResourceError: The arena (`arena_bytes`), or the machine, has no room for it.

        """
        if self._shm is None:
            return super().empty(shape, dtype)
        if self._closed or self._dead is not None:
            raise self._unusable("empty")
        return self._shm.arena.empty(shape, dtype)

    def register(self, x: Tensor) -> Registration:
        """Prepare calls on `x`, which are then the fastest there are.

        `x` is kept until release. Its elements may change, its storage may not: the C engine
        refuses such a call with `ConfigError`.
        """
        return self._hot.register(x)

    def explain(self, op: str, nbytes: int) -> Choice:
        choice = super().explain(op, nbytes)
        if self._shm is None or op in ("send", "recv"):
            return choice
        return explain_shm(self.name, self._shm, self._chooser, op, nbytes, choice.estimate_us)

    def _engine_totals(self) -> Sequence[EngineRow]:
        return () if self._shm is None else self._shm.totals()

    def reset_stats(self) -> None:
        super().reset_stats()
        if self._shm is not None:
            self._shm.reset_statistics()

    def _recorded(self) -> FlightRecorder:
        noted = super()._recorded()
        if self._shm is None:
            return noted
        entries = self._observing.flight_entries
        now = self._shm.positions().get(self._rank)
        ran, failed = self._shm.records(), self._shm.failed
        return merge_records(self, noted.records(), ran, entries, now, self._fallen, failed)
