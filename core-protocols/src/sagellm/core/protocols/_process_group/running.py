"""Issuing one checked call: hooks, counts, waiting, failure."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import Any, TypeVar

import torch
from torch import Tensor

from sagellm.core.protocols.comm_types import CommCall
from sagellm.core.protocols.errors import CommError, CommTimeoutError, DistributedRuntimeError
from sagellm.core.protocols.work import Work

from .observed import ObservedGroup
from .recorder import (
    COMPLETED,
    LOCAL,
    NATIVE,
    P2P_OPS,
    STARTED,
    TAKEN_OVER,
    Describer,
    Record,
)
from .stats import BATCH
from .transport import RawWork, WorkReport
from .work import GroupWork

__all__ = ["After", "Before", "CallRunner", "Started", "TakeOver"]

T = TypeVar("T")

Before = Callable[[CommCall], None]
After = Callable[[CommCall, float, BaseException | None], None]
TakeOver = Callable[[CommCall], Work[Any] | None]  # Any: the operation's result

Started = tuple[list[RawWork], Callable[[], object]]
"""Primitive works, and what to do once all of them are done."""


class _TakenWork(RawWork):
    """A hook's work, as a primitive one."""

    def __init__(self, work: Work[Any]) -> None:  # Any: the operation's result
        self._work = work

    def wait(self, timeout_s: float) -> bool:
        self._work.wait(timeout_s)
        return True

    def synchronize(self, timeout_s: float) -> bool:
        self._work.synchronize(timeout_s)
        return True

    def done(self) -> bool:
        return self._work.done()


def _nothing() -> None:
    return None


def _wait_all(raws: Sequence[RawWork], timeout_s: float) -> None:
    if len(raws) == 1:
        over = raws[0].wait(timeout_s)
    else:
        end = time.monotonic() + timeout_s
        over = all(raw.wait(max(0.0, end - time.monotonic())) for raw in raws)
    if not over:
        raise CommTimeoutError(f"not done within {timeout_s} s")


class CallRunner(ObservedGroup):
    """The part of a backend that every call goes through."""

    _algorithms: dict[str, str]
    _describe: Describer
    _on_device: bool
    _state: threading.RLock
    _dead: Exception | None
    _closed: bool
    _background: bool
    _before: list[Before]
    _after: list[After]
    _take_over: list[TakeOver]
    _deferred: list[Work[Any]] | None  # Any: the operation's result

    @abstractmethod
    def _declare_dead(self, text: str, error: Exception) -> Exception:
        """Explain the first failure; later ones refer to it."""

    @abstractmethod
    def _die(self, reason: str, error: Exception) -> None:
        """End the group with an error of this rank's own."""

    @abstractmethod
    def _unusable(self, op: str) -> Exception:
        """Why a dead or closed group takes no call."""

    def _run(
        self,
        op: str,
        tensors: tuple[Tensor, ...],
        start: Callable[[str], Started],
        finish: Callable[[], T],
        *,
        async_op: bool,
        local: Callable[[], object] | None = None,
        nbytes: int | None = None,
        wire_bytes: int | None = None,
        reduce_op: str | None = None,
        peer: int | None = None,
        copies: int = 0,
        lowered: int = 0,
        timeout_s: float | None = None,
        in_place: bool = False,
    ) -> T | Work[T]:
        """Issue one checked call: `start` sends, `finish` makes the result.

        `local` stands for both the sending and the peers where none are needed.
        """
        if self._dead is not None or self._closed:
            raise self._unusable(op)
        if tensors:
            dtype: torch.dtype | None = tensors[0].dtype
            if nbytes is None:
                nbytes = tensors[0].nbytes
        else:
            dtype = None
        size = nbytes or 0
        recorder = self._recorder
        record = Record(
            self,
            op,
            recorder.sequence,
            recorder.collectives + (peer is None or op not in P2P_OPS),
            size,
            size if wire_bytes is None else wire_bytes,
            dtype,
            reduce_op,
            peer,
            LOCAL if local is not None else self._algorithms.get(op, NATIVE),
        )
        recorder.add(record)
        hooked = self._before or self._after or self._take_over
        call = record.call(tensors) if hooked else None
        record.text = self._describe(record)
        limit = self.timeout_s if timeout_s is None else timeout_s
        self._background = async_op or (in_place and self._deferred is not None)
        try:
            taken = None if call is None else self._hooks_before(call)
            if taken is not None:
                record.algorithm = TAKEN_OVER
                raws: list[RawWork] = [_TakenWork(taken)]
                done: Callable[[], object] = _nothing
            elif local is not None:
                local()
                raws, done = [], _nothing
            else:
                raws, done = start(record.text)
        except Exception as e:  # a hook's error, or the library's refusal to start
            self._not_launched(record, e, copies, lowered)
            raise
        record.state = STARTED
        if async_op or (in_place and self._deferred is not None):
            return self._pend(
                record, call, raws, done, finish, limit, copies, lowered, async_op=async_op
            )
        try:
            _wait_all(raws, limit)
        except Exception as e:  # whatever the library beneath raised
            if self._counting:
                self._counters.started(op, copies, lowered)
            error = self._failed(record, call, e)
            if error is e:
                raise
            raise error from e
        done()
        result = finish()
        record.state = COMPLETED
        if raws and raws[0].report is not None:
            self._learn(record, raws[0].report)
        if not self._on_device:
            record.ended_ns = monotonic_ns()
        if self._counting:
            if copies or lowered:
                self._counters.extra(op, copies, lowered)
            ran = self._counters.ran
            ran.append(record)
            if len(ran) >= BATCH:
                self._counters.fold()
        if self._after:
            self._run_after(record, call, None)
        return result

    def _pend(
        self,
        record: Record,
        call: CommCall | None,
        raws: list[RawWork],
        done: Callable[[], object],
        finish: Callable[[], T],
        limit: float,
        copies: int,
        lowered: int,
        *,
        async_op: bool,
    ) -> T | Work[T]:
        """The handle of a call that goes on, or its result-to-be inside of `coalesce`."""
        if self._counting:
            self._counters.started(record.op, copies, lowered)
        with self._state:
            self._in_flight += 1

        def result() -> T:
            done()
            return finish()

        work = GroupWork(self, record, call, raws, result, limit, on_device=self._on_device)
        if not raws:
            work.wait()  # settle at once: count it and run the hooks
        if async_op:
            return work
        assert self._deferred is not None
        self._deferred.append(work)
        return finish()

    def _hooks_before(self, call: CommCall) -> Work[Any] | None:  # Any: the operation's result
        for before in self._before:
            before(call)
        for take_over in self._take_over:
            taken = take_over(call)
            if taken is not None:
                return taken
        return None

    def _not_launched(self, record: Record, e: Exception, copies: int, lowered: int) -> None:
        """Declare the group dead; raises where another error than `e` says it better."""
        if self._counting:
            self._counters.started(record.op, copies, lowered)
            self._counters.failed(record.op)
        text = record.text
        if isinstance(e, CommError) and not isinstance(e, DistributedRuntimeError):
            self._die(f"{text}: {e}", e)
        elif type(e).__module__.startswith("torch") or isinstance(e, RuntimeError):
            raise self._declare_dead(text, e) from e
        else:
            self._die(f"{text}: {type(e).__name__}: {e}", e)

    def work_done(
        self, record: Record, call: CommCall | None, *, timed: bool, raws: Sequence[RawWork]
    ) -> None:
        """Count a finished call and run the hooks; for `GroupWork`."""
        with self._state:
            self._in_flight -= 1
        if raws and raws[0].report is not None:
            self._learn(record, raws[0].report)
        if timed:
            record.ended_ns = monotonic_ns()
        record.state = COMPLETED
        if self._counting:
            ended = self._counters.ended
            ended.append(record)
            if len(ended) >= BATCH:
                self._counters.fold()
        if self._after:
            self._run_after(record, call, None)

    def work_failed(self, record: Record, call: CommCall | None, error: Exception) -> Exception:
        """Declare the group dead after a failed call and run the hooks; for `GroupWork`."""
        with self._state:
            self._in_flight -= 1
        return self._failed(record, call, error)

    def _failed(self, record: Record, call: CommCall | None, error: Exception) -> Exception:
        if self._counting:
            self._counters.failed(record.op)
        named = self._declare_dead(record.text, error)
        if self._after:
            self._run_after(record, call, named)
        return named

    @staticmethod
    def _learn(record: Record, report: WorkReport) -> None:
        if report.algorithm is not None:
            record.algorithm = report.algorithm
        if report.nbytes is not None:
            record.nbytes = record.wire_bytes = report.nbytes
        record.wait_ns = report.wait_ns

    def _run_after(
        self, record: Record, call: CommCall | None, error: BaseException | None
    ) -> None:
        told = record.call() if call is None else call
        ended = record.ended_ns or monotonic_ns() if error is not None else record.ended_ns
        seconds = (ended - record.started_ns) * 1e-9 if ended else 0.0
        try:
            for after in self._after:
                after(told, seconds, error)
        except Exception as e:
            self._die(f"{record.text}: a hook raised {type(e).__name__}: {e}", e)
            raise
