"""The transport over hosts: plans for what gains by them, the flat group for the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sagellm.comm.collective_ops._scheduled import POINT_TO_POINT, ScheduledTransport
from sagellm.comm.collective_ops._shm.calls import CallQueue, FinishedWork
from sagellm.comm.collective_ops.choice import NATIVE, AlgorithmTable, choose
from sagellm.core.protocols import CommBackendProtocol, CommError, CommTimeoutError, PeerLostError
from sagellm.core.protocols.process_group import (
    RawCall,
    RawWork,
    TorchTransport,
    Transport,
    TransportLayer,
    WorkReport,
)

from .partition import HostMap
from .plans import PLANNED, Plans
from .settings import FLAT, LEADERS, TWO_D

__all__ = ["HierTransport", "Stages"]

_CLOSE_S = 5.0


@dataclass(slots=True)
class Stages:
    """The groups that a rank is in, and who makes the same for a part of them.

    Attributes:
        map: Where ranks are.
        flat: All ranks, over the library that hosts speak with.
        plans: The steps of operations.
        groups: Every group beneath but the flat one.
        split: Makes the stages of a sub-group, from its flat transport and partition.

    """

    map: HostMap
    flat: TorchTransport
    plans: Plans
    split: Callable[[TorchTransport, Sequence[Sequence[int]]], Stages]
    groups: list[CommBackendProtocol] = field(default_factory=list)


class HierTransport(TransportLayer):
    """Primitive calls of one group over several hosts.

    A caller who waits runs the steps itself; calls with `async_op`, and those behind them, run
    on one thread in order, whatever runs them, but for point-to-point calls. Calls over all ranks
    go to `inner`, whose rings pass them host by host.
    """

    def __init__(self, stages: Stages) -> None:
        self._over = ScheduledTransport(stages.flat, order=stages.map.order)
        super().__init__(self._over)
        self.stages = stages
        self._tables: Sequence[AlgorithmTable] = ()
        self._queue: CallQueue | None = None
        self._closed = False

    def use(self, tables: Sequence[AlgorithmTable]) -> None:
        """Choose by these tables from the next call on; between the same calls on all ranks."""
        self._tables = tuple(tables)
        self._over.use(tables)

    def issue(self, call: RawCall) -> RawWork:
        if call.op in POINT_TO_POINT:
            return self.inner.issue(call)
        algorithm = self._algorithm(call)
        if call.background or (self._queue is not None and self._queue.busy):
            if self._queue is None:
                name = f"sagellm-comm-hier-{self.group_name}"
                self._queue = CallQueue(self._run, name, lambda busy: None)
            work: RawWork = self._queue.put(call)
            if algorithm not in (LEADERS, TWO_D):
                schedule = self._over.schedule_for(call)
                algorithm = NATIVE if schedule is None else schedule.algorithm
        elif algorithm not in (LEADERS, TWO_D):
            return self.inner.issue(call)
        else:
            try:
                self._run(call)
                work = FinishedWork()
            except Exception as e:  # reaches the caller by the work, as a queued call's does
                work = FinishedWork(e)
        work.report = WorkReport(algorithm=algorithm)
        return work

    def _algorithm(self, call: RawCall) -> str:
        """`leaders` or `two_d`, or what runs over all ranks."""
        if call.op not in PLANNED:
            return FLAT
        tensors = call.inputs or call.outputs
        found = choose(self._tables, call.op, tensors[0].nbytes) if tensors else None
        name = NATIVE if found is None else found[0].algorithm
        if name == NATIVE or (name == TWO_D and not self.stages.plans.has_rails):
            return LEADERS
        return name

    def _run(self, call: RawCall) -> None:
        algorithm = self._algorithm(call)
        try:
            if algorithm in (LEADERS, TWO_D):
                self.stages.plans.run(call, rails=algorithm == TWO_D)
            elif not self.inner.issue(replace(call, background=False)).wait(call.timeout_s):
                raise CommTimeoutError(f"{call.describe} not done in {call.timeout_s} s")
        except Exception:
            raise
        except BaseException as e:  # an interrupt: the ranks are apart now
            self.abort(f"{type(e).__name__} in {call.describe or call.op}")
            raise

    def explain_failure(self, describe: str, error: Exception) -> Exception:
        """Have all parts of the group fail first, so that ranks on every host come to know.

        Who is lost is asked of the flat group's store. Where that went down with its host, what
        the part said that failed has to do, and where nothing was said, which hosts are silent.
        """
        self._abort_parts(describe)
        told = self.inner.explain_failure(describe, error)
        known = getattr(error, "rank", None)
        if isinstance(told, PeerLostError) and told.rank is None and known is not None:
            told.rank = known
        if isinstance(told, CommError) and not _names_ranks(told):
            told = _more(told, f"{told}; {self.stages.map.explain()}, this is rank {self.rank}")
        return told

    def abort(self, reason: str) -> None:
        self._abort_parts(reason)
        self.inner.abort(reason)

    def _abort_parts(self, reason: str) -> None:
        for group in self.stages.groups:
            group.abort(reason)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        end = time.monotonic() + _CLOSE_S
        if self._queue is not None and not self._queue.close(_CLOSE_S):
            self.abort("closed while calls were running")
            self._queue.close(max(1.0, end - time.monotonic()))
        for group in self.stages.groups:
            group.close()
        self.inner.close()

    def split(self, ranks: Sequence[int], name: str, timeout_s: float) -> Transport | None:
        flat = self.stages.flat.split(ranks, name, timeout_s)
        if flat is None:
            return None
        assert isinstance(flat, TorchTransport)
        try:
            return HierTransport(self.stages.split(flat, self.stages.map.restricted(ranks)))
        except BaseException:
            flat.close()
            raise


def _names_ranks(error: CommError) -> bool:
    text = str(error)
    return (
        "lost rank" in text or "no sign of rank" in text or getattr(error, "rank", None) is not None
    )


def _more(error: CommError, text: str) -> CommError:
    if isinstance(error, PeerLostError):
        return PeerLostError(text, rank=error.rank)
    try:
        return type(error)(text)
    except TypeError:
        return error
