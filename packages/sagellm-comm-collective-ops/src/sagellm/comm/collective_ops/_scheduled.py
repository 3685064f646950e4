"""A transport that runs chosen calls by schedules, and leaves the others to the library."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from sagellm.core.protocols import (
    CollectiveMismatchError,
    CommError,
    CommTimeoutError,
    DistributedRuntimeError,
    ReduceOp,
)
from sagellm.core.protocols.process_group import Position, RawCall, RawWork, Transport

from ._schedule_data import Move, Schedule
from ._schedule_plans import PLANS
from ._schedule_run import execute
from .choice import AlgorithmTable, choose
from .schedules import SCHEDULE_TAG, make_schedule

__all__ = ["ScheduledTransport", "agree_on_algorithms"]


class _Scheduled(RawWork):
    """A call that is run by its schedule: by whoever waits for it, or by the transport's thread.

    On a device the host only starts it: `run` returns once everything is on the stream.
    """

    def __init__(self, transport: Transport, call: RawCall, schedule: Schedule) -> None:
        self._transport = transport
        self._call = call
        self._schedule = schedule
        self._deadline = time.monotonic() + call.timeout_s
        self._started = False
        self._over = threading.Event()
        self._error: Exception | None = None
        self._raws: list[RawWork] = []  # of a device: the last ones

    def queue(self) -> None:
        """Keep those who wait from running it."""
        self._started = True

    def run(self) -> None:
        """Do the schedule in this thread. Called once."""
        self._started = True
        call, rank = self._call, self._transport.rank
        try:
            row = math.prod(call.outputs[0].shape[1:])
            execute(
                self._schedule,
                rank,
                call.inputs[0] if call.inputs else None,
                call.outputs[0],
                self._exchange,
                call.reduce_op or ReduceOp.SUM,
                [n * row for n in call.in_splits],
                [n * row for n in call.out_splits],
            )
        except Exception as e:  # given to whoever waits
            self._error = e
        self._over.set()

    def _exchange(self, messages: list[tuple[Move, Tensor]]) -> None:
        call = self._call
        left = max(0.001, self._deadline - time.monotonic())
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
            if not raw.wait(max(0.001, self._deadline - time.monotonic())):
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


class ScheduledTransport(Transport):
    """Calls that a table names run by schedule over the inner transport's sends and receives.

    A call that is waited for at once runs in the caller's thread. The others run in a thread of
    the group, one after the other, in the order of their calls; once that thread has work, calls
    that come later queue behind it, so that messages keep their order.

    Args:
        inner: What moves the bytes, and runs every other call.
        tables: By precedence.
        order: Ranks as a ring passes them; None is rank order.

    """

    def __init__(
        self,
        inner: Transport,
        tables: Sequence[AlgorithmTable],
        order: Sequence[int] | None = None,
    ) -> None:
        self.inner = inner
        self.tables = tuple(tables)
        self._order = None if order is None else tuple(order)
        self._queue: queue.SimpleQueue[_Scheduled | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: _Scheduled | None = None  # the latest that was queued

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def global_ranks(self) -> tuple[int, ...]:
        return self.inner.global_ranks

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def group_name(self) -> str:
        return self.inner.group_name

    def issue(self, call: RawCall) -> RawWork:
        schedule = self._schedule_for(call)
        if schedule is None:
            return self.inner.issue(call)
        work = _Scheduled(self.inner, call, schedule)
        if self.device.type != "cpu":
            work.run()  # unverified on hardware: the stream keeps the order, the host goes on
        elif call.background or not (self._last is None or self._last.done()):
            self._last = work
            work.queue()  # only that thread may run it: the queue's order is that of the messages
            self._queue.put(work)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="sagellm-comm-schedules", daemon=True
                )
                self._thread.start()
        return work

    def _schedule_for(self, call: RawCall) -> Schedule | None:
        tensors = call.inputs or call.outputs
        if self.size == 1 or call.op not in PLANS or not tensors:
            return None
        uneven = bool(call.in_splits or call.out_splits)
        found = choose(self.tables, call.op, None if uneven else tensors[0].nbytes)
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

    def issue_batch(self, calls: Sequence[RawCall]) -> list[RawWork]:
        return self.inner.issue_batch(calls)

    def attach(self, position: Callable[[], Position | None]) -> None:
        self.inner.attach(position)

    def peer_positions(self) -> Mapping[int, Position | None]:
        return self.inner.peer_positions()

    def start_coalescing(self) -> None:
        self.inner.start_coalescing()

    def end_coalescing(self) -> None:
        self.inner.end_coalescing()

    def explain_failure(self, describe: str, error: Exception) -> Exception:
        return self.inner.explain_failure(describe, error)

    def abort(self, reason: str) -> None:
        self.inner.abort(reason)

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
        self.inner.close()

    def split(self, ranks: Sequence[int], name: str, timeout_s: float) -> Transport | None:
        return self.inner.split(ranks, name, timeout_s)


def agree_on_algorithms(
    store: Store,
    group_name: str,
    rank: int,
    size: int,
    asked: str,
    timeout_s: float,
) -> None:
    """Compare what this rank was asked with the other ranks, before anything is sent by it.

    Every rank posts its own; those that were asked nothing wait for nobody.

    Raises:
        CollectiveMismatchError: Some rank was asked something else; the message names both.
        CommTimeoutError: Some rank did not post one in time.

    """
    prefix = f"sagellm/algorithms/{group_name}"
    written = asked or "none"
    end = time.monotonic() + timeout_s
    pause_s = 0.001
    try:
        turn = store.add(f"{prefix}/turn/{rank}", 1)
        store.set(f"{prefix}/{turn}/{rank}", written)
        if not asked:
            return
        for other in range(size):
            key = f"{prefix}/{turn}/{other}"
            while not store.check([key]):
                if time.monotonic() >= end:
                    raise CommTimeoutError(
                        f"rank {other} did not say within {timeout_s} s which algorithms it uses; "
                        f"make the backend on all ranks"
                    )
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.05)
            theirs = bytes(store.get(key)).decode()
            if theirs != written:
                raise CollectiveMismatchError(
                    f"algorithms differ: rank {rank} has {written}, rank {other} has {theirs}; "
                    f"give all ranks the same",
                    calls={rank: written, other: theirs},
                )
    except CommError:
        raise
    except RuntimeError as e:  # torch's store errors, all of them RuntimeError
        raise DistributedRuntimeError(f"the store of group {group_name} failed: {e}") from e
