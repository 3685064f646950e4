"""What the runs of a manager did: its counters, and what it keeps for a trace."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace

from sagellm.core.protocols import Interval, OverlapStats, TaskId

from .handle import Fence, Run
from .metrics import measure
from .trace import TraceRun

__all__ = ["Ledger"]

_KEPT_RUNS = 10_000
_UNFOLDED = 64


class Ledger:
    """Counters and traced runs. Thread-safe.

    Args:
        rank: Process that the traced runs belong to.
        traced: Whether runs are kept.

    """

    def __init__(self, rank: int, *, traced: bool) -> None:
        self._rank = rank
        self._traced = traced
        self._lock = threading.Lock()
        self._stats = OverlapStats()
        self._to_fold: deque[tuple[Interval, ...]] = deque()  # measured when somebody asks
        self._runs: deque[TraceRun] = deque(maxlen=_KEPT_RUNS)
        self._issued: deque[tuple[Run, Fence]] = deque(maxlen=_KEPT_RUNS)

    def issued(self, run: Run, fence: Fence) -> None:
        """Note a run of a device. Its times, which a trace needs, are known when it is through."""
        if self._traced:
            self._issued.append((run, fence))
        else:
            self.over(run)

    def over(self, run: Run, spans: list[tuple[TaskId, float, float]] | None = None) -> None:
        """Note a run that is over; spans as for `Run.intervals`."""
        tasks = run.plan.tasks
        flows = tuple(
            (dep, task.id)
            for task in (tasks if self._traced else ())
            for dep in task.deps
            if tasks[dep].lane != task.lane
        )
        serial = run.plan.serial
        name = f"{'serial ' if serial else ''}{run.plan.rule}"
        trace = TraceRun(run.intervals(spans), self._rank, name, run.origin_s, flows)
        self.add(trace, failed=run.error is not None, serial=serial)

    def add(self, run: TraceRun, *, failed: bool, serial: bool) -> None:
        """Count a run, and keep it if runs are traced."""
        with self._lock:
            old = self._stats
            self._stats = replace(
                old,
                runs=old.runs + 1,
                failed=old.failed + failed,
                tasks=old.tasks + len(run.intervals),
                serial_runs=old.serial_runs + serial,
            )
            self._to_fold.append(run.intervals)
            if len(self._to_fold) > _UNFOLDED:
                self._fold()
            if self._traced:
                self._runs.append(run)

    def disabled(self, reason: str) -> None:
        """Show in the counters why nothing overlaps."""
        with self._lock:
            self._stats = replace(self._stats, disabled_reason=reason)

    def stats(self) -> OverlapStats:
        """A snapshot of the counters."""
        self._settle()
        with self._lock:
            self._fold()
            return self._stats

    def runs(self) -> tuple[TraceRun, ...]:
        """The latest traced runs that are over."""
        self._settle()
        with self._lock:
            return tuple(self._runs)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._stats = OverlapStats()
            self._to_fold.clear()
            self._runs.clear()
            self._issued.clear()

    def _settle(self) -> None:
        """Note the runs that the device is through with."""
        over: list[tuple[Run, Fence]] = []
        with self._lock:
            while self._issued and self._issued[0][1].done():
                over.append(self._issued.popleft())
        for run, fence in over:
            self.over(run, fence.spans())

    def _fold(self) -> None:
        while self._to_fold:
            metrics = measure(self._to_fold.popleft())
            old = self._stats
            self._stats = replace(
                old,
                compute_s=old.compute_s + metrics.compute_s,
                comm_s=old.comm_s + metrics.comm_s,
                overlapped_s=old.overlapped_s + metrics.overlapped_s,
            )
