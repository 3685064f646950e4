"""Lanes on a CPU: worker threads that take tasks in the plan's order.

Each lane takes its tasks first in, first out, across runs too: the order in which runs are
submitted and the plan's order fix the order of issue, which ranks must agree on. A communication
lane has a second thread that waits for what was issued, so that several may be in flight. One
lock guards everything; a lane goes on with its own next task without a wake-up.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sagellm.core.protocols import CommTimeoutError, ConfigError, TaskId

from ._values import Foreign
from .completion import StillRunning, is_handle, note_end, resolve
from .handle import DONE, FAILED, PENDING, RUNNING, SKIPPED, Run
from .scheduler import lane_kind

__all__ = ["LaneExecutor"]

_here = threading.local()


@dataclass(slots=True)
class _Segment:
    """A run's tasks on one lane, and how far the lane has come."""

    run: Run
    tasks: tuple[TaskId, ...]
    variables: contextvars.Context
    at: int = 0


@dataclass(slots=True)
class _Flight:
    """A communication that was issued."""

    run: Run
    task: TaskId
    handle: Foreign  # Work or future
    start: float
    deadline: float
    ended: list[float]  # from `note_end`: works of a lane may end in another order than they began


class _Lane:
    __slots__ = ("ended", "flights", "idle", "landing", "name", "queue", "ready", "threads")

    def __init__(self, name: str, lock: threading.Lock) -> None:
        self.name = name
        self.queue: deque[_Segment] = deque()
        self.ready = threading.Condition(lock)
        self.idle = False
        self.ended = False
        self.flights: deque[_Flight] = deque()
        self.landing = threading.Condition(lock)
        self.threads: list[threading.Thread] = []


class LaneExecutor:
    """Runs plans on lane threads. Thread-safe; threads start with the first task of a lane.

    Args:
        max_inflight: Communications a lane may have in flight.
        on_over: Called with each run that is over, with the lock held: it must be quick.
        on_broken: Called with a reason when an error left communications unissued.

    """

    def __init__(
        self,
        *,
        max_inflight: int = 4,
        on_over: Callable[[Run], None] | None = None,
        on_broken: Callable[[str], None] | None = None,
    ) -> None:
        self.lock = threading.Lock()
        self._max_inflight = max_inflight
        self._on_over = on_over
        self._on_broken = on_broken
        self._lanes: dict[str, _Lane] = {}
        self._active: set[Run] = set()
        self._quarantine: list[Any] = []  # handles past their deadline: they own their buffers
        self._closed = False
        self._stop = False

    def submit(self, run: Run, order: Mapping[str, tuple[TaskId, ...]]) -> None:
        """Queue a run on its lanes; on a lane's own thread, run it there and then.

        A nested run cannot queue behind the task that waits for it, so its tasks run one after
        another on the calling thread.

        Raises:
            ConfigError: The executor is closed.

        """
        inside = getattr(_here, "executor", None) is self
        with self.lock:
            if self._closed and not inside:
                raise ConfigError("the overlap manager is closed; make another")
            self._active.add(run)
            if self._retired(run):
                return
            for name, tasks in {} if inside else order.items():
                lane = self._lanes.get(name) or self._open(name)
                lane.queue.append(_Segment(run, tasks, run.context.for_lane()))
                if lane.idle:
                    lane.ready.notify()
        if inside:
            self._run_inline(run)

    def wake(self) -> None:
        """Make idle lanes look again, after tasks were skipped."""
        with self.lock:
            self._notify_all()
            over = [run for run in tuple(self._active) if self._retired(run)]
        for run in over:
            self._call_back(run)

    def close(self, timeout_s: float) -> None:
        """Refuse new runs, wait for those in flight, end the threads. Idempotent.

        Raises:
            CommTimeoutError: Tasks were still running at the deadline. Waiting tasks are
                dropped, and each thread ends with the task that it is in.

        """
        inside = getattr(_here, "executor", None) is self
        deadline = time.monotonic() + timeout_s
        late: list[str] = []
        with self.lock:
            self._closed = True
            active = [] if inside else list(self._active)
        for run in active:
            with run.over:
                budget = max(deadline - time.monotonic(), 0.0)
                if not run.over.wait_for(lambda run=run: run.remaining == 0, budget):  # type: ignore[misc]  # binds the loop variable
                    late.append(run.unfinished())
                    if run.error is None:
                        run.error = CommTimeoutError(f"closed while running: {late[-1]}")
                    run.skip([t for t, state in enumerate(run.state) if state == PENDING])
        with self.lock:
            self._stop = True
            self._notify_all()
            threads = [t for lane in self._lanes.values() for t in lane.threads]
        if not inside:
            for thread in threads:
                thread.join(max(deadline - time.monotonic(), 0.0) + (0.0 if late else 1.0))
        if late:
            raise CommTimeoutError(
                f"close() gave up after {timeout_s:.3g} s with {'; '.join(late)}: the threads "
                "end when these tasks do"
            )

    @property
    def quarantined(self) -> int:
        """Handles past their deadline that still own their buffers."""
        with self.lock:
            return len(self._quarantine)

    def _open(self, name: str) -> _Lane:
        lane = self._lanes[name] = _Lane(name, self.lock)
        targets = [self._work] if lane_kind(name) == "compute" else [self._work, self._land]
        for target in targets:
            thread = threading.Thread(
                target=target, args=(lane,), name=f"overlap-{name}{target.__name__}", daemon=True
            )
            lane.threads.append(thread)
            thread.start()
        return lane

    def _notify_all(self) -> None:
        for lane in self._lanes.values():
            lane.ready.notify_all()
            lane.landing.notify_all()

    def _work(self, lane: _Lane) -> None:
        _here.executor = self
        while (step := self._next(lane)) is not None:
            segment, task = step
            self._do(lane, segment, task)
            del segment, step
        with self.lock:
            lane.ended = True
            lane.landing.notify()

    def _next(self, lane: _Lane) -> tuple[_Segment, TaskId] | None:
        with self.lock:
            while True:
                step = self._head(lane)
                if step is not None:
                    return step
                if self._stop and not lane.queue:
                    return None
                lane.idle = True
                lane.ready.wait()
                lane.idle = False

    def _head(self, lane: _Lane) -> tuple[_Segment, TaskId] | None:
        while lane.queue:
            segment = lane.queue[0]
            run = segment.run
            if segment.at == len(segment.tasks):
                lane.queue.popleft()
                continue
            task = segment.tasks[segment.at]
            if run.state[task] in (DONE, SKIPPED, FAILED):
                segment.at += 1
                continue
            if run.left[task] or len(lane.flights) >= self._max_inflight:
                return None
            segment.at += 1
            run.state[task] = RUNNING
            if segment.at == len(segment.tasks):
                lane.queue.popleft()
            return segment, task
        return None

    def _do(self, lane: _Lane, segment: _Segment, task: TaskId) -> None:
        run = segment.run
        fn, args = run.plan.tasks[task].fn, run.arguments(task)
        start = time.perf_counter()
        try:
            value = run.context.call(segment.variables, fn, args)
            if is_handle(value):
                if len(lane.threads) > 1:
                    deadline = time.monotonic() + run.timeout_s
                    flight = _Flight(run, task, value, start, deadline, note_end(value))
                    with self.lock:
                        lane.flights.append(flight)
                        lane.landing.notify()
                    return
                value = self._resolved(run, task, value, run.timeout_s)
        except BaseException as error:
            self._failed(run, task, error, start)
        else:
            self._finished(run, task, value, start, lane)

    def _land(self, lane: _Lane) -> None:
        _here.executor = self
        while True:
            with self.lock:
                while not lane.flights:
                    if lane.ended:
                        return
                    lane.landing.wait()
                flight = lane.flights[0]
            run, task = flight.run, flight.task
            budget = flight.deadline - time.monotonic()
            try:
                value = self._resolved(run, task, flight.handle, budget)
            except BaseException as error:
                self._landed(lane)
                self._failed(run, task, error, flight.start)
            else:
                self._landed(lane)
                self._finished(run, task, value, flight.start, None, flight.ended)
            del flight, run

    def _landed(self, lane: _Lane) -> None:
        with self.lock:
            lane.flights.popleft()
            if lane.idle:
                lane.ready.notify()

    def _resolved(
        self, run: Run, task: TaskId, handle: Foreign, budget_s: float
    ) -> Foreign:  # a result
        try:
            return resolve(handle, budget_s)
        except StillRunning as error:
            spec = run.plan.tasks[task]
            with self.lock:
                self._quarantine.append(handle)
                waiting = run.unfinished()
            raise CommTimeoutError(
                f"task {spec.name!r} on lane {spec.lane!r} was not done {run.timeout_s:.3g} s "
                f"after it was issued; unfinished: {waiting}. Its buffers may still be "
                "written: give up the group before using them"
            ) from error

    def _finished(
        self,
        run: Run,
        task: TaskId,
        value: Foreign,
        start: float,
        lane: _Lane | None,
        ended: Sequence[float] = (),
    ) -> None:
        end = max(ended[0], start) if ended else time.perf_counter()
        with self.lock:
            ready = run.finish(task, value, start - run.begun, end - run.begun)
            for later in ready:
                other = self._lanes.get(run.plan.tasks[later].lane)
                if other is not None and other is not lane and other.idle:
                    other.ready.notify()
            over = self._retired(run)
        if over:
            self._call_back(run)

    def _failed(self, run: Run, task: TaskId, error: BaseException, start: float) -> None:
        end = time.perf_counter()
        with self.lock:
            broken = run.fail(task, error, start - run.begun, end - run.begun)
            self._notify_all()
            over = self._retired(run)
        if broken and self._on_broken is not None:
            name = run.plan.tasks[task].name
            self._on_broken(f"overlap task {name!r} failed: {type(error).__name__}: {error}")
        if over:
            self._call_back(run)

    def _retired(self, run: Run) -> bool:
        over = run.remaining == 0 and run in self._active
        if over:
            self._active.discard(run)
            if self._on_over is not None:
                self._on_over(run)
        return over

    def _call_back(self, run: Run) -> None:
        with self.lock:
            callbacks, run.callbacks = run.callbacks, []
        for callback in callbacks:
            callback()

    def _run_inline(self, run: Run) -> None:
        variables = run.context.for_lane()
        for task in run.plan.sequence:
            with self.lock:
                if run.state[task] != PENDING:
                    continue
                run.state[task] = RUNNING
            start = time.perf_counter()
            try:
                spec = run.plan.tasks[task]
                value = run.context.call(variables, spec.fn, run.arguments(task))
                if is_handle(value):
                    value = self._resolved(run, task, value, run.timeout_s)
            except BaseException as error:
                self._failed(run, task, error, start)
            else:
                self._finished(run, task, value, start, None)
