"""A transport that runs chosen calls by schedules, and leaves the others to the library."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sagellm.core.protocols import (
    CollectiveMismatchError,
    CommTimeoutError,
    ReduceOp,
)
from sagellm.core.protocols.process_group import (
    RawCall,
    RawWork,
    TorchObject,
    Transport,
    TransportLayer,
    WorkReport,
)

from ._schedule_data import Move, Schedule
from ._schedule_plans import PLANS
from ._schedule_run import execute
from ._shm.exchange import Exchange
from .choice import AlgorithmTable, choose
from .schedules import SCHEDULE_TAG, make_schedule

__all__ = ["POINT_TO_POINT", "ScheduledTransport", "agree_on_options"]

POINT_TO_POINT = ("send", "recv")
"""Operations that are in no order with collectives."""


class _Ordered(RawWork):
    """A call that is run by whoever waits for it, or by the transport's thread.

    Without a schedule it is the inner transport's. On a device the host only starts it: `run`
    returns once everything is on the stream.
    """

    def __init__(
        self,
        transport: Transport,
        call: RawCall,
        schedule: Schedule | None,
        after: Sequence[RawWork] = (),
    ) -> None:
        self._transport = transport
        self._call = call
        self._schedule = schedule
        self._after = after
        self.report = None if schedule is None else WorkReport(algorithm=schedule.algorithm)
        self._deadline = time.monotonic() + call.timeout_s
        self._started = False
        self._over = threading.Event()
        self._error: Exception | None = None
        self._raws: list[RawWork] = []  # of a device: the last ones

    def queue(self) -> None:
        """Keep those who wait from running it."""
        self._started = True

    def run(self) -> None:
        """Do it in this thread, after those before it. Called once."""
        self._started = True
        try:
            for before in self._after:
                with contextlib.suppress(Exception):  # its own caller is told
                    before.wait(self._left())
            self._after = ()
            if self._schedule is None:
                self._run_native()
            else:
                self._run_schedule(self._schedule)
        except Exception as e:  # given to whoever waits
            self._error = e
        self._over.set()

    def _left(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def _run_native(self) -> None:
        raw = self._transport.issue(replace(self._call, timeout_s=self._left(), background=False))
        if not raw.wait(self._left()):
            raise CommTimeoutError(f"{self._call.describe} not done in {self._call.timeout_s} s")
        self.report = raw.report

    def _run_schedule(self, schedule: Schedule) -> None:
        call = self._call
        row = math.prod(call.outputs[0].shape[1:])
        execute(
            schedule,
            self._transport.rank,
            call.inputs[0] if call.inputs else None,
            call.outputs[0],
            self._exchange,
            call.reduce_op or ReduceOp.SUM,
            [n * row for n in call.in_splits],
            [n * row for n in call.out_splits],
        )

    def _exchange(self, messages: list[tuple[Move, Tensor]]) -> None:
        call = self._call
        left = self._left()
        calls = [
            RawCall(
                m.kind,
                [part] if m.kind == "send" else [],
                [part] if m.kind == "recv" else [],
                peer=m.peer,
                tag=SCHEDULE_TAG,
                timeout_s=left,
                describe=call.describe,
                device=call.device,
            )
            for m, part in messages
        ]
        if not calls:
            return
        self._raws = self._transport.issue_batch(calls)
        for (move, _), raw in zip(messages, self._raws, strict=True):
            if not raw.wait(self._left()):
                assert self._schedule is not None
                raise CommTimeoutError(
                    f"{self._schedule.algorithm} schedule: no {move.kind} with rank {move.peer} "
                    f"within {call.timeout_s} s"
                )

    def wait(self, timeout_s: float) -> bool:
        if not self._started:
            self.run()
        if not self._over.wait(max(0.0, timeout_s)):
            return False
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self, timeout_s: float) -> bool:
        if not self.wait(timeout_s):
            return False
        if self._call.device is None or self._call.device.type == "cpu":
            return True
        return all(raw.synchronize(timeout_s) for raw in self._raws)

    def done(self) -> bool:
        if not self._over.is_set():
            return False
        if self._call.device is None or self._call.device.type == "cpu":
            return True
        return self._error is not None or all(raw.done() for raw in self._raws)


class ScheduledTransport(TransportLayer):
    """Calls that a table names run by schedule over the inner transport's sends and receives.

    A call that is waited for at once runs in the caller's thread. The others run in a thread of
    the group, one after the other, in the order of their calls. Once that thread has work, every
    later collective queues behind it, those of the library too; and a schedule begins when the
    library's calls before it are over. Point-to-point calls are in no order with those.

    Args:
        inner: What moves the bytes, and runs every other call.
        tables: By precedence.
        order: Ranks as a ring passes them; None is rank order.

    """

    def __init__(
        self,
        inner: Transport,
        tables: Sequence[AlgorithmTable] = (),
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__(inner)
        self._tables = tuple(tables)
        self._order = None if order is None else tuple(order)
        self._queue: queue.SimpleQueue[_Ordered | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: _Ordered | None = None  # the latest that was queued
        self._flying: list[RawWork] = []  # the library's, of callers who went on

    def use(self, tables: Sequence[AlgorithmTable]) -> None:
        """Choose by these tables from the next call on; between the same calls on all ranks."""
        self._tables = tuple(tables)

    def issue(self, call: RawCall) -> RawWork:
        schedule = self.schedule_for(call)
        if call.op in POINT_TO_POINT or self.device.type != "cpu":
            if schedule is None:
                return self.inner.issue(call)
            work = _Ordered(self.inner, call, schedule)
            work.run()  # unverified on hardware: the stream keeps the order, the host goes on
            return work
        busy = self._last is not None and not self._last.done()
        if schedule is None and not busy:
            raw = self.inner.issue(call)
            if call.background and self._tables:
                self._flying = [*self._unfinished(), raw]
            return raw
        work = _Ordered(self.inner, call, schedule, self._unfinished())
        if call.background or busy:
            self._last = work
            work.queue()  # only that thread may run it: the queue's order is that of the messages
            self._queue.put(work)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="sagellm-comm-schedules", daemon=True
                )
                self._thread.start()
        return work

    def _unfinished(self) -> list[RawWork]:
        self._flying = [raw for raw in self._flying if not raw.done()]
        return self._flying

    def schedule_for(self, call: RawCall) -> Schedule | None:
        """What a call runs by; None is the library's own algorithm."""
        tensors = call.inputs or call.outputs
        if self.size == 1 or call.op not in PLANS or not tensors:
            return None
        uneven = bool(call.in_splits or call.out_splits)
        found = choose(self._tables, call.op, None if uneven else tensors[0].nbytes)
        if found is None or found[0].algorithm not in PLANS[call.op]:
            return None
        rooted = call.op in ("broadcast", "reduce")
        root = call.peer or 0 if rooted else 0
        name = found[0].algorithm
        return make_schedule(call.op, name, self.size, root=root, order=self._order)

    def _serve(self) -> None:
        # In inference mode both kinds of tensor may be written.
        with torch.inference_mode():
            while (work := self._queue.get()) is not None:
                work.run()

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
        self.inner.close()


def agree_on_options(
    store: TorchObject,
    group_name: str,
    rank: int,
    size: int,
    asked: str,
    timeout_s: float,
    *,
    always: bool = False,
) -> None:
    """Compare what this rank was asked with the other ranks, before anything is sent by it.

    Every rank posts its own; those that were asked nothing wait for nobody, unless `always`.

    Raises:
        CollectiveMismatchError: Some rank was asked something else; the message names both.
        CommTimeoutError: Some rank did not post one in time.

    """
    meeting = Exchange(store, rank, size, f"options/{group_name}", timeout_s)
    if not asked:
        asked = "none"
        if not always:
            meeting.tell("options", {"asked": asked})
            return
    said = [str(told["asked"]) for told in meeting.all("options", {"asked": asked})]
    for other, theirs in enumerate(said):
        if theirs != asked:
            raise CollectiveMismatchError(
                f"options differ: rank {rank} has {asked}, rank {other} has {theirs}; "
                f"give all ranks the same",
                calls={rank: asked, other: theirs},
            )
