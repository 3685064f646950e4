"""One run of a plan, and the handle a caller holds of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import CancelledError
from functools import partial
from typing import Any, NoReturn, Protocol

from sagellm.core.protocols import (
    CommTimeoutError,
    ConfigError,
    Interval,
    OverlapMetrics,
    OverlapResult,
    TaskId,
)

from ._context import CallerContext
from ._values import Foreign
from .metrics import length_s, measure, merged
from .orders import lower_bound
from .scheduler import StaticPlan, lane_kind

__all__ = ["DONE", "FAILED", "PENDING", "RUNNING", "SKIPPED", "Fence", "Run", "RunHandle"]

PENDING, RUNNING, DONE, SKIPPED, FAILED = range(5)


class Run:
    """The state of one run; every field is guarded by the lock it was made with."""

    def __init__(
        self,
        plan: StaticPlan,
        bindings: Mapping[TaskId, Any],  # results of any type
        lock: threading.Lock,
        timeout_s: float,
        loads_s: tuple[float, float] | None = None,
    ) -> None:
        count = len(plan.tasks)
        for task in bindings:
            if not 0 <= task < count:
                raise ConfigError(f"bindings name task {task}, and the plan has 0..{count - 1}")
        self.plan = plan
        self.timeout_s = timeout_s
        self.loads_s = loads_s if loads_s is not None else plan.loads_s
        self.context = CallerContext()
        self.origin_s = time.time()
        self.begun = time.perf_counter()
        self.over = threading.Condition(lock)
        self.shape = plan.run_shape
        self.left = [len(deps) for deps in self.shape.deps]
        self.state = [PENDING] * count
        self.values: list[Any] = [None] * count  # what tasks returned, any type
        self.remaining = count - len(bindings)
        self.spans: list[tuple[TaskId, float, float]] = []
        self.error: BaseException | None = None
        self.cancelled = False
        self.callbacks: list[Callable[[], None]] = []
        for task, value in bindings.items():
            self.state[task] = DONE
            self.values[task] = value
        for task in bindings:
            self._release(task)

    def arguments(self, task: TaskId) -> tuple[Any, ...]:
        """Results of the task's inputs."""
        return tuple(self.values[dep] for dep in self.plan.tasks[task].inputs)

    def finish(self, task: TaskId, value: Foreign, start: float, end: float) -> tuple[TaskId, ...]:
        """Note that a task is done, and return the tasks that became ready."""
        self.state[task] = DONE
        self.values[task] = value
        self.spans.append((task, start, end))
        ready = self._release(task)
        self._count_down(1)
        return ready

    def fail(self, task: TaskId, error: BaseException, start: float, end: float) -> bool:
        """Note what a task raised and skip all that has not started.

        Returns whether communications were skipped that peers may wait for.
        """
        spec = self.plan.tasks[task]
        self.state[task] = FAILED
        self.spans.append((task, start, end))
        skipped_comm = False
        if self.error is None:
            error.add_note(f"in overlap task {spec.name!r} (id {task}) on lane {spec.lane!r}")
            self.error = error
            pending = [t for t, state in enumerate(self.state) if state == PENDING]
            skipped_comm = any(lane_kind(self.plan.tasks[t].lane) == "comm" for t in pending)
            self.skip(pending)
        self._count_down(1)
        return skipped_comm or lane_kind(spec.lane) == "comm"

    def skip(self, tasks: list[TaskId]) -> None:
        """Drop tasks that have not started; what waited for them must be dropped as well."""
        for task in tasks:
            self.state[task] = SKIPPED
        self._count_down(len(tasks))

    def unfinished(self) -> str:
        """Pending and running tasks with their lanes, for a message."""
        word = {PENDING: "waiting", RUNNING: "running"}
        open_tasks = [
            f"{task.name!r} on lane {task.lane!r} ({word[self.state[task.id]]})"
            for task in self.plan.tasks
            if self.state[task.id] in word
        ]
        shown = sorted(open_tasks, key=lambda text: "(running)" not in text)
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        return ", ".join(shown[:8]) + more

    def intervals(
        self, spans: list[tuple[TaskId, float, float]] | None = None
    ) -> tuple[Interval, ...]:
        """What ran when, in order of start; from a device's own times where they are given."""
        tasks = self.plan.tasks
        return tuple(
            Interval(task, tasks[task].name, tasks[task].lane, start, end, tasks[task].nbytes)
            for task, start, end in sorted(
                self.spans if spans is None else spans, key=lambda span: span[1:]
            )
        )

    def metrics(self, spans: list[tuple[TaskId, float, float]] | None = None) -> OverlapMetrics:
        """Metrics of a run that is over; spans as for `intervals`."""
        intervals = self.intervals(spans)
        if self.plan.costs is not None:
            return measure(
                intervals,
                loads_s=self.loads_s,
                bound_s=self.plan.lower_bound(self.plan.costs),
            )
        return measure(intervals, loads_s=self.loads_s, bound_s=self._measured_bound(intervals))

    def _measured_bound(self, intervals: tuple[Interval, ...]) -> float:
        took = [0.0] * len(self.plan.tasks)
        lanes: dict[str, list[tuple[float, float]]] = {}
        for item in intervals:
            took[item.task] = item.end_s - item.start_s
            lanes.setdefault(item.lane, []).append((item.start_s, item.end_s))
        fullest = max((length_s(merged(spans)) for spans in lanes.values()), default=0.0)
        no_queues = dict.fromkeys(lanes, len(took))
        return max(fullest, lower_bound(self.plan.shape, took, no_queues))

    def _release(self, task: TaskId) -> tuple[TaskId, ...]:
        ready = []
        for later in self.shape.succ[task]:
            self.left[later] -= 1
            if not self.left[later]:
                ready.append(later)
        return tuple(ready)

    def _count_down(self, tasks: int) -> None:
        self.remaining -= tasks
        if self.remaining == 0:
            self.over.notify_all()


def _wake_loop(loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(wake)


class Fence(Protocol):
    """What a device has still to do for a run whose tasks were all issued."""

    def done(self) -> bool:
        """Whether the device is past it. Never blocks."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Order the caller's stream after it and block until it is done; False at the deadline."""
        ...

    def spans(self) -> list[tuple[TaskId, float, float]]:
        """Start and end of each task on the device; empty unless it was timed."""
        ...


class RunHandle:
    """One run in flight. Thread-safe; dropping it cancels nothing."""

    def __init__(
        self,
        run: Run,
        wake: Callable[[], None],
        *,
        has_peers: bool = True,
        fence: Fence | None = None,
    ) -> None:
        self._run = run
        self._wake = wake
        self._fence = fence
        self._has_peers = has_peers
        self._metrics: OverlapMetrics | None = None

    @property
    def run_state(self) -> Run:
        """The run beneath, for traces."""
        return self._run

    def wait(self, timeout_s: float | None = None) -> OverlapResult:
        """Block until every task is done and return what they returned.

        After a task has raised, this returns once the tasks that were running then have ended,
        because they still use their buffers.

        Args:
            timeout_s: Longest wait in seconds; None is the manager's deadline.

        Raises:
            CommTimeoutError: Tasks are still running; the message names them and their lanes.
            CancelledError: `cancel` skipped tasks, so there is no whole result
                (`concurrent.futures.CancelledError`).
            Exception: What the first failing task raised, with a note of its name and lane.

        """
        run = self._run
        limit = run.timeout_s if timeout_s is None else timeout_s
        with run.over:
            over = run.over.wait_for(lambda: run.remaining == 0, limit)
        if not over:
            self._not_over(limit)
        if run.error is not None:
            raise run.error
        if self._fence is not None and not self._fence.wait(limit):
            raise CommTimeoutError(
                f"the device was not through with the tasks of lanes "
                f"{', '.join(sorted(run.plan.order))} after {limit:.3g} s"
            )
        if run.cancelled:
            names = [t.name for t in run.plan.tasks if run.state[t.id] == SKIPPED]
            raise CancelledError(f"cancelled before {', '.join(names[:8])} started")
        values = run.values
        kinds = [lane_kind(task.lane) for task in run.plan.tasks]
        return OverlapResult(
            compute=tuple(v for v, kind in zip(values, kinds, strict=True) if kind == "compute"),
            comm=tuple(v for v, kind in zip(values, kinds, strict=True) if kind == "comm"),
        )

    def __await__(self) -> Generator[Any, None, OverlapResult]:
        """Wait without blocking the event loop; cancelling the awaiter cancels no task.

        The deadline is that of `wait()`.
        """
        loop = asyncio.get_running_loop()
        waker: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not waker.done():
                waker.set_result(None)

        with self._run.over:
            pending = self._run.remaining > 0
            if pending:
                self._run.callbacks.append(partial(_wake_loop, loop, wake))
        if pending:
            timer = loop.call_later(self._run.timeout_s, wake)
            try:
                yield from waker
            finally:
                timer.cancel()
            if self._run.remaining:
                self._not_over(self._run.timeout_s)
        if self._fence is not None:
            yield from loop.run_in_executor(None, self.wait)
        return self.wait(0)

    def _not_over(self, limit_s: float) -> NoReturn:
        run = self._run
        with run.over:
            unfinished = run.unfinished()
        if run.error is not None:
            raise run.error
        raise CommTimeoutError(
            f"overlap run not over after {limit_s:.3g} s: {unfinished}; wait again, or close the "
            "manager"
        )

    def result(self) -> OverlapResult:
        """The result of a finished run; the same as `wait(0)`."""
        return self.wait(0)

    def done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        fenced = self._fence is not None and self._run.error is None and not self._fence.done()
        return self._run.remaining == 0 and not fenced

    def cancel(self) -> bool:
        """Skip compute tasks that have not started; False when there are none.

        Communications, and the tasks they wait for, still run: peers may be waiting for them.
        Where the manager's group has one rank there are no peers, and they are skipped as well.
        """
        run = self._run
        with run.over:
            keep = run.plan.feeds_comm if self._has_peers else frozenset()
            drop = [t for t, state in enumerate(run.state) if state == PENDING and t not in keep]
            if drop:
                run.cancelled = True
                run.skip(drop)
        if drop:
            self._wake()
        return bool(drop)

    def exception(self) -> BaseException | None:
        """What the run failed with; None while it runs and after success."""
        return self._run.error if self._run.remaining == 0 else None

    @property
    def metrics(self) -> OverlapMetrics:
        """What the finished run hid.

        Raises:
            ConfigError: The run is not over.

        """
        if not self.done():
            raise ConfigError("metrics of a run that is not over: wait for it first")
        if self._metrics is None:
            spans = None if self._fence is None else self._fence.spans()
            self._metrics = self._run.metrics(spans)
        return self._metrics
