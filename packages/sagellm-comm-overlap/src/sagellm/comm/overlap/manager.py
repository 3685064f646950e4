"""`OverlapManager`: compute and communication side by side, with a measure of what it saved."""

from __future__ import annotations

import logging
import statistics
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from sagellm.core.protocols import (
    CommBackendProtocol,
    ConfigError,
    Graph,
    KVStream,
    OverlapManagerProtocol,
    OverlapStats,
    Pairing,
    Plan,
    Task,
    TaskId,
)
from sagellm.core.protocols.doctor import require_supported_platform

from ._ledger import Ledger
from .agreement import agree_on
from .batches import BatchRun, token_count
from .executor import LaneExecutor
from .handle import Run, RunHandle
from .kv_hooks import LayerHook
from .pairing import pair_up
from .policy import OverlapPolicy
from .scheduler import StaticPlan, TaskGraph, compile_graph, lane_kind, made_serial, serial_plan
from .streams import StreamLanes, device_api
from .trace import TraceRun, write_chrome_trace

__all__ = ["LaneInfo", "OverlapManager"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LaneInfo:
    """A named queue of a manager.

    Attributes:
        name: Its name in traces.
        stream: The device stream it issues on; None on a CPU.
        priority: As asked for.

    """

    name: str
    stream: object = None
    priority: int = 0

    @property
    def kind(self) -> Literal["compute", "comm"]:
        """Whether its time counts as compute or communication."""
        return lane_kind(self.name)


class OverlapManager(OverlapManagerProtocol):
    """Runs compute and communication tasks on lanes side by side. Thread-safe.

    Threads start with the first task, and end with `close` or the `with` block. On a CPU a lane
    is a worker thread that has the caller's inference mode, grad mode, autocast, context
    variables and thread count; on a device it is a stream, on which the caller's thread issues
    (unverified on hardware).

    A run that is scheduled from inside a task of the same manager runs at once, serially, on the
    task's thread. Its communications are then not ordered against those of the communication
    lane: give it a group of its own.

    Args:
        comm_backend: The group whose communications the tasks issue; asked for its rank and
            size, and aborted when a failed run leaves it out of step.
        device: `cpu`, a device type of torch, or `auto`: `cuda` where usable, else `cpu`.
        policy: When overlapping is worth it, and how far to run ahead.
        timeout_s: Deadline of each communication after it was issued, and of `wait()`.
        trace: True keeps what ran for `write_trace`; a path also writes it there at `close`.

    Raises:
        BackendUnavailableError: The device asked for is not usable here.
        ConfigError: `timeout_s` is not above 0, or this is Windows.

    Example:
        >>> with OverlapManager() as manager:
        ...     handle = manager.schedule(lambda: 6 * 7, lambda: "sent")
        ...     handle.wait()
        OverlapResult(compute=(42,), comm=('sent',))

    """

    def __init__(
        self,
        comm_backend: CommBackendProtocol | None = None,
        device: str = "auto",
        policy: OverlapPolicy | None = None,
        timeout_s: float = 30.0,
        trace: bool | str | Path = False,
    ) -> None:
        require_supported_platform()
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s {timeout_s} is not above 0")
        self._backend = comm_backend
        self._policy = policy if policy is not None else OverlapPolicy()
        self._timeout_s = timeout_s
        self._trace = trace
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device).type
        self._streams: StreamLanes | None = None
        if self._device != "cpu":
            self._streams = StreamLanes(
                device_api(self._device), timed=bool(trace), on_broken=self._abort_group
            )
        size = getattr(comm_backend, "size", 0)
        rank = getattr(comm_backend, "rank", 0)
        self._has_peers = size != 1
        self._rank = rank if isinstance(rank, int) else 0
        self._lock = threading.Lock()
        self._lanes: dict[str, LaneInfo] = {}
        self._disabled = ""
        self._ledger = Ledger(self._rank, traced=bool(trace))
        self._executor = LaneExecutor(
            max_inflight=self._policy.max_inflight,
            on_over=self._ledger.over,
            on_broken=self._abort_group,
        )

    def schedule(
        self,
        compute: Task | Sequence[Task],
        comm: Task | Sequence[Task],
        *,
        pairing: Pairing = "zip",
        loads_s: tuple[float, float] | None = None,
    ) -> RunHandle:
        """Start a run of compute and communication tasks at once and return its handle.

        A single pair of callables is independent and runs side by side. Lists are paired: with
        `zip`, communication i starts after compute i, and gets its result if it has exactly one
        positional parameter without a default. Each lane keeps the order given.

        Args:
            compute: Callable, (fn, args), or a list of those.
            comm: The same; may return a Work or Future, which is waited for.
            pairing: `zip` or `none`.
            loads_s: Compute and communication seconds measured apart, for `eff_saved`.

        Raises:
            ConfigError: `zip` with lists of different lengths, a task that is not callable, one
                that needs arguments nobody gives it, or the manager is closed.

        """
        graph = TaskGraph()
        pair_up(graph, compute, comm, pairing)
        tasks = graph.tasks
        if self._disabled:
            plan = serial_plan(tasks, self._disabled)
        else:
            plan = compile_graph(tasks)
        return self._start(plan, {}, loads_s)

    def graph(self) -> TaskGraph:
        """An empty graph of tasks."""
        return TaskGraph()

    def compile(
        self,
        graph: Graph,
        *,
        costs: Mapping[TaskId, float] | None = None,
        agree: CommBackendProtocol | None = None,
    ) -> StaticPlan:
        """Freeze an order: the best of the user's, Johnson's and two path-length rules.

        Without any costs the user's order is kept. Without `agree`, costs must be equal on all
        ranks that share communications, so declared or broadcast, not measured on each.

        Args:
            graph: What to run.
            costs: Seconds per task; declared costs are used where it says nothing.
            agree: A group whose ranks must hold the same plan: rank 0's order is taken, its
                hash compared, and any rank's veto makes the plan serial. Collective.

        Raises:
            CollectiveMismatchError: Ranks brought different graphs.
            ConfigError: A cost is negative or of no task, or the graph is not of this package.

        """
        if not isinstance(graph, TaskGraph):
            raise ConfigError(f"{type(graph).__name__} is not a graph made by graph()")
        tasks = graph.tasks
        if self._disabled:
            plan = serial_plan(tasks, self._disabled)
        else:
            plan = compile_graph(tasks, costs, min_gain=self._policy.min_gain)
        return plan if agree is None else agree_on(plan, agree)

    def run(
        self,
        plan: Plan,
        bindings: Mapping[TaskId, Any] | None = None,  # results of any type
        *,
        loads_s: tuple[float, float] | None = None,
    ) -> RunHandle:
        """Start a plan and return its handle; a plan may run any number of times.

        Args:
            plan: From `compile`.
            bindings: Results to use in place of running those tasks.
            loads_s: Compute and communication seconds measured apart, for `eff_saved`; None
                takes the plan's costs.

        Raises:
            ConfigError: A binding of no task, a plan not made by `compile`, or the manager is
                closed.

        """
        plan = _ours(plan)
        if self._disabled:
            plan = made_serial(plan, self._disabled)
        return self._start(plan, bindings or {}, loads_s)

    def calibrate(self, plan: Plan, repeats: int = 3) -> dict[TaskId, float]:
        """Seconds each task takes alone: medians of serial runs, to compile or to judge with.

        Runs the tasks for real, so all ranks of their communications must call it.

        Raises:
            ConfigError: `repeats` is below 1.

        """
        if repeats < 1:
            raise ConfigError(f"repeats {repeats} is not at least 1")
        alone = serial_plan(_ours(plan).tasks, "calibration")
        taken: dict[TaskId, list[float]] = {}
        for _ in range(repeats):
            handle = self._start(alone, {}, None)
            handle.wait()
            for item in handle.metrics.intervals:
                taken.setdefault(item.task, []).append(item.end_s - item.start_s)
        return {task: statistics.median(times) for task, times in taken.items()}

    def lane(self, name: str, stream: object = None, priority: int = 0) -> LaneInfo:
        """A lane of that name, made at first use.

        Args:
            name: `compute…` counts as compute, anything else as communication.
            stream: Device stream to issue on; None makes one where the device has streams.
            priority: Higher runs first where the device offers it.

        Raises:
            ConfigError: An empty name, or a stream on a CPU.

        """
        if not name:
            raise ConfigError("a lane needs a name")
        if stream is not None and self._streams is None:
            raise ConfigError(f"lane {name!r}: a CPU has no streams; leave stream=None")
        with self._lock:
            if name not in self._lanes or stream is not None:
                if self._streams is not None:
                    stream = self._streams.add(name, stream, priority)
                self._lanes[name] = LaneInfo(name, stream, priority)
            return self._lanes[name]

    def overlap_batches(
        self,
        step_generators: Sequence[Iterable[Any]],  # yields are Works or futures
        *,
        min_tokens: int | None = None,
    ) -> list[Any]:
        """Run micro-batches in turn so that one computes while another communicates.

        Each generator yields after issuing a communication: the `Work` to wait for before it
        goes on; it is sent the work's result. Everything runs on the calling thread, in an order
        that does not depend on timing. Returns what each generator returned. After an error the
        group is aborted as after a failed run, because peers wait for what was not issued.

        Args:
            step_generators: One per micro-batch.
            min_tokens: Below this the batches run one after another; compared with the sum
                of the generators' `num_tokens` attributes where they have one. Must be equal on
                all ranks, as must the token counts. None takes the policy's.

        Raises:
            CommTimeoutError: A work was not done within the manager's deadline.
            Exception: What a generator or its work raised, with a note of the batch.

        """
        least = self._policy.min_tokens if min_tokens is None else min_tokens
        tokens = token_count(step_generators)
        serial = bool(self._disabled) or (tokens is not None and tokens < least)
        batches = BatchRun(step_generators, timeout_s=self._timeout_s, serial=serial)
        failed = True
        try:
            returned = batches.run()
            failed = False
        except BaseException as error:
            self._abort_group(f"a micro-batch failed: {type(error).__name__}: {error}")
            raise
        finally:
            trace = TraceRun(batches.intervals(), self._rank, "batches", batches.origin_s)
            self._ledger.add(trace, failed=failed, serial=serial)
        return returned

    def layer_hooks(self, kv_stream: KVStream) -> LayerHook:
        """A function for a model to call after each layer, which queues that layer's KV.

        It returns as soon as the stream has queued the layer, so `seal` may follow the last call.
        On a device it hands the stream an event of the current device stream.
        """
        return LayerHook(kv_stream, None if self._device == "cpu" else device_api(self._device))

    def disable(self, reason: str) -> None:
        """Run everything serially from now on, and say why in `explain` and statistics.

        Runs and batches only: what is in flight goes on.
        """
        if not reason:
            raise ConfigError("disable() needs a reason, which explain() shows")
        _log.warning("overlap is off: %s", reason)
        with self._lock:
            self._disabled = reason
            self._ledger.disabled(reason)

    def reset(self) -> None:
        """Overlap again, and forget counters and traces."""
        with self._lock:
            self._disabled = ""
            self._ledger.clear()

    def explain(self, plan: Plan) -> str:
        """The plan in words: order, expected gain, and why it is serial if it is."""
        plan = _ours(plan)
        serial = plan.serial or bool(self._disabled)
        why = plan.reason if plan.serial or not self._disabled else self._disabled
        lines = [f"{'serial' if serial else 'overlapped'}: {why}; digest {plan.digest}"]
        if plan.costs is not None and plan.predicted_s is not None:
            total, bound = sum(plan.costs), plan.lower_bound(plan.costs)
            gain = f" ({1 - plan.predicted_s / total:.1%} saved)" if total else ""
            lines.append(
                f"predicted {plan.predicted_s * 1e3:.3f} ms{gain}, serial {total * 1e3:.3f} ms, "
                f"lower bound {bound * 1e3:.3f} ms"
            )
        lines += [f"candidate {rule}: {s * 1e3:.3f} ms" for rule, s in plan.candidates.items()]
        for lane, order in plan.order.items():
            names = ", ".join(plan.tasks[task].name for task in order)
            lines.append(f"{lane} ({lane_kind(lane)}): {names}")
        return "\n".join(lines)

    def get_stats(self) -> OverlapStats:
        """A snapshot of the counters; runs that failed count the tasks that ran."""
        return self._ledger.stats()

    def trace_runs(self) -> tuple[TraceRun, ...]:
        """What ran so far, the latest 10 000 runs; empty unless the manager traces."""
        return self._ledger.runs()

    def write_trace(self, path: str | Path) -> Path:
        """Write what ran as a Chrome trace, and return its path.

        Raises:
            ConfigError: The manager does not trace.

        """
        if not self._trace:
            raise ConfigError("nothing was traced: make the manager with trace=True")
        return write_chrome_trace(path, self.trace_runs())

    def close(self) -> None:
        """End worker threads; runs in flight finish or fail first. Idempotent.

        Raises:
            CommTimeoutError: Tasks were still running at the manager's deadline; the message
                names them and their lanes.

        """
        try:
            self._executor.close(self._timeout_s)
            if self._streams is not None:
                self._streams.close(self._timeout_s)
        finally:
            if isinstance(self._trace, (str, Path)):
                self.write_trace(self._trace)

    def __enter__(self) -> OverlapManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(
        self,
        plan: StaticPlan,
        bindings: Mapping[TaskId, Any],  # results of any type
        loads_s: tuple[float, float] | None,
    ) -> RunHandle:
        executor = self._executor
        run = Run(plan, bindings, executor.lock, self._timeout_s, loads_s)
        if self._streams is None:
            executor.submit(run, plan.order)
            return RunHandle(run, executor.wake, has_peers=self._has_peers)
        fence = self._streams.issue(run)
        self._ledger.issued(run, fence)
        return RunHandle(run, executor.wake, has_peers=self._has_peers, fence=fence)

    def _abort_group(self, reason: str) -> None:
        if self._backend is None or not self._policy.abort_group or not self._has_peers:
            return
        _log.warning("aborting the group, which is out of step: %s", reason)
        self._backend.abort(reason)


def _ours(plan: Plan) -> StaticPlan:
    if not isinstance(plan, StaticPlan):
        raise ConfigError(f"{type(plan).__name__} is not a plan made by compile()")
    return plan
