"""Running compute and communication side by side, and saying how much it saved.

A *lane* is a queue whose tasks run one after another: a worker thread on a CPU, a stream on a
device. Lanes run side by side. Order on communication lanes is static and equal on all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from .comm_backend import CommBackendProtocol
    from .kv_transfer import KVStream

__all__ = [
    "Graph",
    "Interval",
    "Lane",
    "OverlapHandle",
    "OverlapManagerProtocol",
    "OverlapMetrics",
    "OverlapResult",
    "OverlapStats",
    "Pairing",
    "Plan",
    "Task",
    "TaskId",
]

# Any below: tasks take and return whatever the caller's functions do.
Task: TypeAlias = "Callable[..., Any] | tuple[Callable[..., Any], tuple[Any, ...]]"
"""A callable, or a callable with its arguments. It may return a Work, Future, tensor or None."""

TaskId: TypeAlias = int
"""Names a task of one graph, in order of insertion."""

Pairing = Literal["zip", "none"]
"""`zip`: communication i starts after compute i and gets its result if it takes one argument;
`none`: the two lists are independent."""


@dataclass(frozen=True, slots=True)
class Interval:
    """One task as it ran.

    Attributes:
        task: Id in its graph.
        name: For people.
        lane: Where it ran.
        start_s: Seconds since the run began; issue time for asynchronous communication.
        end_s: Seconds since the run began; when its work was done.
        nbytes: Bytes it moved, 0 if unknown.

    """

    task: TaskId
    name: str
    lane: str
    start_s: float
    end_s: float
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class OverlapMetrics:
    """What a run hid, in seconds and ratios.

    With U(l) the merged intervals of a lane, C and K the union over communication and compute
    lanes, T the makespan, and Tc, Tm the loads measured apart:

    Attributes:
        makespan_s: T, from the start of the first task to the end of the last.
        compute_s: |K|.
        comm_s: |C|.
        overlapped_s: |C and K|.
        exposed_s: |C| - |C and K|.
        eff_trace: |C and K| / |C|; None without communication. Passes runs slower than
            serial, so never judge by it alone.
        eff_saved: (Tc + Tm - T) / Tm, from loads given by the caller or calibrated apart;
            None without them. Negative when overlapping cost more than it saved.
        idle: Per lane, 1 - |U(l)| / T.
        bound_s: Lower bound of T: the longest path, or the fullest lane.
        bound_ratio: bound_s / T, at most 1 apart from noise; None when the bound is 0.
        intervals: What ran when.

    """

    makespan_s: float
    compute_s: float
    comm_s: float
    overlapped_s: float
    exposed_s: float
    eff_trace: float | None
    eff_saved: float | None
    idle: Mapping[str, float] = field(default_factory=dict)
    bound_s: float = 0.0
    bound_ratio: float | None = None
    intervals: tuple[Interval, ...] = ()


@dataclass(frozen=True, slots=True)
class OverlapResult:
    """What the tasks returned, in the order they were given."""

    compute: tuple[Any, ...] = ()
    comm: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class OverlapStats:
    """A manager's counters."""

    runs: int = 0
    failed: int = 0
    tasks: int = 0
    serial_runs: int = 0
    disabled_reason: str = ""
    compute_s: float = 0.0
    comm_s: float = 0.0
    overlapped_s: float = 0.0


class OverlapHandle(Awaitable[OverlapResult], Protocol):
    """One run in flight. Thread-safe."""

    def wait(self, timeout_s: float | None = None) -> OverlapResult:
        """Block until every task is done and return what they returned.

        Args:
            timeout_s: Longest wait in seconds; None is the manager's deadline.

        Raises:
            CommTimeoutError: Tasks are still running; the message names them and their lanes.
            CancelledError: `cancel` skipped tasks, so there is no whole result
                (`concurrent.futures.CancelledError`).
            Exception: What the first failing task raised; later tasks of all lanes were skipped.

        """
        ...

    def result(self) -> OverlapResult:
        """The result of a finished run; the same as `wait(0)`."""
        ...

    def done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        ...

    def cancel(self) -> bool:
        """Skip tasks that have not started; False when there are none.

        A communication that peers may already wait for is never skipped.
        """
        ...

    def exception(self) -> BaseException | None:
        """What the run failed with; None while it runs and after success."""
        ...

    @property
    def metrics(self) -> OverlapMetrics:
        """What the finished run hid.

        Raises:
            ConfigError: The run is not over.

        """
        ...


class Lane(Protocol):
    """A named queue of a manager."""

    @property
    def name(self) -> str:
        """Its name in traces."""
        ...

    @property
    def kind(self) -> Literal["compute", "comm"]:
        """Whether its time counts as compute or communication."""
        ...


class Graph(Protocol):
    """Tasks and what they wait for; acyclic by construction, since a task names earlier ones."""

    def compute(
        self,
        fn: Callable[..., Any],
        *inputs: TaskId,
        name: str | None = None,
        lane: str | None = None,
        cost_s: float | None = None,
    ) -> TaskId:
        """Add a compute task that is called with the results of `inputs`."""
        ...

    def comm(
        self,
        fn: Callable[..., Any],
        *inputs: TaskId,
        name: str | None = None,
        lane: str | None = None,
        nbytes: int = 0,
        cost_s: float | None = None,
    ) -> TaskId:
        """Add a communication task that is called with the results of `inputs`."""
        ...

    def after(self, task: TaskId, *earlier: TaskId) -> None:
        """Make `task` wait for others without receiving their results."""
        ...

    def __len__(self) -> int:
        """Number of tasks."""
        ...


class Plan(Protocol):
    """A graph with a frozen order on every lane; may be run any number of times."""

    @property
    def order(self) -> Mapping[str, tuple[TaskId, ...]]:
        """Task order per lane."""
        ...

    @property
    def digest(self) -> str:
        """Hash of the order of all communication lanes; ranks compare it."""
        ...

    @property
    def serial(self) -> bool:
        """True when overlapping was not worth it, or a rank vetoed it."""
        ...

    @property
    def predicted_s(self) -> float | None:
        """Makespan expected from the costs given, None without them."""
        ...


class OverlapManagerProtocol(ABC):
    """Runs compute and communication tasks on lanes side by side. Thread-safe."""

    @abstractmethod
    def schedule(
        self,
        compute: Task | Sequence[Task],
        comm: Task | Sequence[Task],
        *,
        pairing: Pairing = "zip",
    ) -> OverlapHandle:
        """Start a run of compute and communication tasks at once and return its handle.

        A single pair of callables is independent and runs side by side; lists are paired as
        `pairing` says.

        Raises:
            ConfigError: `zip` with lists of different lengths, or a task that is not callable.

        """

    @abstractmethod
    def graph(self) -> Graph:
        """An empty graph of tasks."""

    @abstractmethod
    def compile(
        self,
        graph: Graph,
        *,
        costs: Mapping[TaskId, float] | None = None,
        agree: CommBackendProtocol | None = None,
    ) -> Plan:
        """Freeze an order.

        Args:
            graph: What to run.
            costs: Seconds per task; declared costs are used where it says nothing.
            agree: A group whose ranks must hold the same plan: rank 0's order is taken, its
                hash compared, and any rank's veto makes the plan serial.

        Raises:
            CollectiveMismatchError: Ranks brought different graphs.

        """

    @abstractmethod
    def run(self, plan: Plan, bindings: Mapping[TaskId, Any] | None = None) -> OverlapHandle:
        """Start a plan.

        Args:
            plan: From `compile`.
            bindings: Results to use in place of running those tasks.

        """

    @abstractmethod
    def lane(self, name: str, stream: object = None, priority: int = 0) -> Lane:
        """A lane of that name, made at first use.

        Args:
            name: `compute…` counts as compute, anything else as communication.
            stream: Device stream to issue on; None makes one where the device has streams.
            priority: Higher runs first where the device offers it.

        """

    @abstractmethod
    def overlap_batches(
        self, step_generators: Sequence[Iterable[Any]], *, min_tokens: int | None = None
    ) -> list[Any]:
        """Run micro-batches in turn so that one computes while another communicates.

        Each generator yields after issuing a communication: the `Work` to wait for before it
        goes on. Returns what each generator returned.

        Args:
            step_generators: One per micro-batch.
            min_tokens: Below this the batches run one after another; compared with the sum
                of the generators' `num_tokens` attributes where they have one.

        """

    @abstractmethod
    def layer_hooks(self, kv_stream: KVStream) -> Callable[[int], None]:
        """A function for a model to call after each layer, which queues that layer's KV."""

    @abstractmethod
    def disable(self, reason: str) -> None:
        """Run everything serially from now on, and say why in `explain` and statistics."""

    @abstractmethod
    def reset(self) -> None:
        """Overlap again, and forget counters and calibration."""

    @abstractmethod
    def explain(self, plan: Plan) -> str:
        """The plan in words: order, expected gain, and why it is serial if it is."""

    @abstractmethod
    def get_stats(self) -> OverlapStats:
        """A snapshot of the counters."""

    @abstractmethod
    def close(self) -> None:
        """End worker threads; runs in flight finish or fail first. Idempotent."""
