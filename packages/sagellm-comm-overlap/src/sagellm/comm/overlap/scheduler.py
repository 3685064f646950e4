"""Graphs of tasks, and plans: a graph with a frozen order on every lane.

On communication lanes the order of a plan is what every rank issues, so it may depend only on
what all ranks share: the graph, and declared costs. `agreement.py` makes sure where they do not.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from sagellm.core.protocols import ConfigError, TaskId

from ._values import Foreign
from .orders import (
    LaneOrder,
    Shape,
    johnson_order,
    lower_bound,
    priority_order,
    simulate,
    upward_rank,
    user_order,
)

__all__ = ["StaticPlan", "TaskGraph", "TaskSpec", "compile_graph", "lane_kind"]

_NOISE = 0.01  # another order must beat the user's by more than costs are known to
LaneKind = Literal["compute", "comm"]


def lane_kind(lane: str) -> LaneKind:
    """Whether a lane of this name counts as compute: it does if it begins with `compute`.

    >>> lane_kind("compute1"), lane_kind("rank0/compute"), lane_kind("kv")
    ('compute', 'compute', 'comm')
    """
    return "compute" if lane.rsplit("/", 1)[-1].startswith("compute") else "comm"


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One task of a graph.

    Attributes:
        id: Position in its graph.
        name: For people.
        fn: Called with the results of `inputs`; any return value.
        lane: Where it runs.
        inputs: Tasks whose results it takes.
        after: Tasks it waits for without taking their results.
        nbytes: Bytes it moves, 0 if unknown.
        cost_s: Declared seconds, None if unknown.

    """

    id: TaskId
    name: str
    fn: Callable[..., Any]  # takes and returns what the caller's graph says
    lane: str
    inputs: tuple[TaskId, ...] = ()
    after: tuple[TaskId, ...] = ()
    nbytes: int = 0
    cost_s: float | None = None

    @property
    def deps(self) -> tuple[TaskId, ...]:
        """Every task it waits for, each once."""
        return tuple(dict.fromkeys(self.inputs + self.after))


class TaskGraph:
    """Tasks and what they wait for; a task can name only earlier ones, so there are no cycles.

    Not thread-safe while it is built. A plan made from it does not change with it.
    """

    def __init__(self) -> None:
        self._tasks: list[TaskSpec] = []

    @property
    def tasks(self) -> tuple[TaskSpec, ...]:
        """The tasks in order of insertion."""
        return tuple(self._tasks)

    def compute(
        self,
        fn: Callable[..., Any],  # see TaskSpec.fn
        *inputs: TaskId,
        name: str | None = None,
        lane: str | None = None,
        cost_s: float | None = None,
    ) -> TaskId:
        """Add a compute task that is called with the results of `inputs`."""
        return self._add("compute", fn, inputs, name, lane, 0, cost_s)

    def comm(
        self,
        fn: Callable[..., Any],  # see TaskSpec.fn
        *inputs: TaskId,
        name: str | None = None,
        lane: str | None = None,
        nbytes: int = 0,
        cost_s: float | None = None,
    ) -> TaskId:
        """Add a communication task that is called with the results of `inputs`."""
        return self._add("comm", fn, inputs, name, lane, nbytes, cost_s)

    def after(self, task: TaskId, *earlier: TaskId) -> None:
        """Make `task` wait for tasks added before it, without receiving their results."""
        self._check(earlier, task)
        if not 0 <= task < len(self._tasks):
            raise ConfigError(f"task {task} is not in 0..{len(self._tasks) - 1}")
        spec = self._tasks[task]
        self._tasks[task] = replace(spec, after=(*spec.after, *earlier))

    def __len__(self) -> int:
        return len(self._tasks)

    def _add(
        self,
        kind: LaneKind,
        fn: Callable[..., Any],  # see TaskSpec.fn
        inputs: tuple[TaskId, ...],
        name: str | None,
        lane: str | None,
        nbytes: int,
        cost_s: float | None,
    ) -> TaskId:
        task = len(self._tasks)
        where = kind if lane is None else lane
        if not callable(fn):
            raise ConfigError(f"task {name or task} is {fn!r}, which is not callable")
        if lane_kind(where) != kind:
            raise ConfigError(
                f"lane {where!r} counts as {lane_kind(where)}, and task {name or task} is {kind}: "
                "names of compute lanes, and of no others, begin with 'compute'"
            )
        if nbytes < 0 or (cost_s is not None and not cost_s >= 0):
            raise ConfigError(f"task {name or task}: nbytes={nbytes}, cost_s={cost_s} below 0")
        self._check(inputs, task)
        label = f"{kind}{task}" if name is None else name
        self._tasks.append(TaskSpec(task, label, fn, where, inputs, (), nbytes, cost_s))
        return task

    @staticmethod
    def _check(earlier: Sequence[TaskId], task: TaskId) -> None:
        for dep in earlier:
            if not 0 <= dep < task:
                raise ConfigError(f"task {task} can wait only for tasks 0..{task - 1}, not {dep}")


class StaticPlan:
    """A graph with a frozen order on every lane. Immutable; may be run any number of times."""

    def __init__(
        self,
        tasks: tuple[TaskSpec, ...],
        order: Mapping[str, tuple[TaskId, ...]],
        *,
        sequence: tuple[TaskId, ...],
        serial: bool = False,
        reason: str = "order as given",
        rule: str = "user",
        predicted_s: float | None = None,
        costs: tuple[float, ...] | None = None,
        candidates: Mapping[str, float] | None = None,
    ) -> None:
        self.tasks = tasks
        self.sequence = sequence
        self.reason = reason
        self.rule = rule
        self.costs = costs
        self.candidates = dict(candidates or {})
        self._order = dict(order)
        self._serial = serial
        self._predicted_s = predicted_s

    @property
    def order(self) -> Mapping[str, tuple[TaskId, ...]]:
        """Task order per lane."""
        return self._order

    @property
    def serial(self) -> bool:
        """Whether the tasks run one after another."""
        return self._serial

    @property
    def predicted_s(self) -> float | None:
        """Makespan expected from the costs; None where they are not all known."""
        return self._predicted_s

    @cached_property
    def digest(self) -> str:
        """Hash of the order on all communication lanes, and of whether it is serial."""
        lines = [
            f"{lane}:{','.join(map(str, tasks))}"
            for lane, tasks in sorted(self._order.items())
            if lane_kind(lane) == "comm"
        ]
        text = "\n".join([f"serial={self._serial}", *lines])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def shape(self) -> Shape:
        """Lanes and declared dependencies."""
        return Shape.of([task.lane for task in self.tasks], [task.deps for task in self.tasks])

    @cached_property
    def run_shape(self) -> Shape:
        """What a run waits for: the dependencies and, if serial, the task before."""
        if not self._serial:
            return self.shape
        deps = [list(task.deps) for task in self.tasks]
        for before, task in pairwise(self.sequence):
            if before not in deps[task]:
                deps[task].append(before)
        return Shape.of([task.lane for task in self.tasks], deps)

    @cached_property
    def feeds_comm(self) -> frozenset[TaskId]:
        """Communications and everything they wait for: what peers may be waiting for."""
        needed: set[TaskId] = set()
        for task in reversed(self.tasks):
            if lane_kind(task.lane) == "comm" or task.id in needed:
                needed.add(task.id)
                needed.update(task.deps)
        return frozenset(needed)

    @property
    def loads_s(self) -> tuple[float, float] | None:
        """Compute and communication seconds measured apart, None where costs are unknown."""
        if self.costs is None:
            return None
        load = {"compute": 0.0, "comm": 0.0}
        for task, cost in zip(self.tasks, self.costs, strict=True):
            load[lane_kind(task.lane)] += cost
        return load["compute"], load["comm"]

    def lower_bound(self, costs: Sequence[float]) -> float:
        """The longest path or the fullest lane, for seconds per task."""
        return lower_bound(self.shape, costs)


def graph_digest(tasks: Sequence[TaskSpec]) -> str:
    """Hash of what ranks must share: lanes and dependencies, not names, functions or bytes."""
    lines = [f"{task.lane}|{task.inputs}|{task.after}" for task in tasks]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def plan_in_order(
    tasks: tuple[TaskSpec, ...], order: Mapping[str, tuple[TaskId, ...]], **facts: Foreign
) -> StaticPlan:  # facts: keyword arguments of StaticPlan
    """A plan of exactly this order.

    Raises:
        ConfigError: It contradicts the dependencies.

    """
    shape = Shape.of([task.lane for task in tasks], [task.deps for task in tasks])
    costs = facts.get("costs")
    run = simulate(shape, order, costs or [1.0] * len(tasks))
    predicted_s = run.makespan_s if costs else None
    return StaticPlan(tasks, order, sequence=run.sequence, predicted_s=predicted_s, **facts)


def serial_plan(tasks: tuple[TaskSpec, ...], reason: str, **facts: Foreign) -> StaticPlan:
    """A plan that runs the tasks one after another as they were added; facts as above."""
    shape = Shape.of([task.lane for task in tasks], [task.deps for task in tasks])
    costs = facts.get("costs")
    return StaticPlan(
        tasks,
        user_order(shape),
        sequence=tuple(range(len(tasks))),
        serial=True,
        reason=reason,
        predicted_s=None if costs is None else float(sum(costs)),
        **facts,
    )


def made_serial(plan: StaticPlan, reason: str) -> StaticPlan:
    """The plan, one task after another. Its lanes keep their order, which peers still follow."""
    if plan.serial:
        return plan
    return StaticPlan(
        plan.tasks,
        plan.order,
        sequence=plan.sequence,
        serial=True,
        reason=reason,
        rule=plan.rule,
        predicted_s=None if plan.costs is None else sum(plan.costs),
        costs=plan.costs,
        candidates=plan.candidates,
    )


def compile_graph(
    tasks: tuple[TaskSpec, ...],
    costs: Mapping[TaskId, float] | None = None,
    *,
    min_gain: float = 0.0,
) -> StaticPlan:
    """The best of several orders by simulation, or a serial plan where they gain too little.

    Args:
        tasks: The graph.
        costs: Seconds per task; declared costs are used where it says nothing, and the mean of
            the known ones of the same kind where nothing says anything.
        min_gain: Smallest share of the serial time that must be saved; only where all costs
            are known.

    """
    known = _known_costs(tasks, costs)
    shape = Shape.of([task.lane for task in tasks], [task.deps for task in tasks])
    mine = user_order(shape)
    if not known:
        return StaticPlan(tasks, mine, sequence=tuple(range(len(tasks))))
    full = _filled(tasks, known)
    rank = upward_rank(shape, full)
    tail = [rank[task] - full[task] for task in range(len(tasks))]
    orders: dict[str, LaneOrder | None] = {
        "user": mine,
        "johnson": johnson_order(shape, full),
        "upward_rank": priority_order(shape, full, rank),
        "tail": priority_order(shape, full, tail),
    }
    runs = {
        rule: (simulate(shape, order, full), order)
        for rule, order in orders.items()
        if order is not None
    }
    rule = min(runs, key=lambda name: runs[name][0].makespan_s)
    if runs["user"][0].makespan_s <= runs[rule][0].makespan_s * (1 + _NOISE):
        rule = "user"
    run, order = runs[rule]
    complete = len(known) == len(tasks)
    facts: dict[str, Any] = {
        "costs": full if complete else None,
        "candidates": {name: sim.makespan_s for name, (sim, _) in runs.items()},
    }
    serial_s = sum(full)
    gain = 1.0 - run.makespan_s / serial_s if serial_s else 0.0
    if complete and gain < min_gain:
        why = f"predicted gain {gain:.1%} is below min_gain {min_gain:.1%}"
        return serial_plan(tasks, why, rule="user", **facts)
    return StaticPlan(
        tasks,
        order,
        sequence=run.sequence,
        reason=f"{rule} order is the best of {len(runs)} simulated",
        rule=rule,
        predicted_s=run.makespan_s if complete else None,
        **facts,
    )


def _known_costs(
    tasks: Sequence[TaskSpec], costs: Mapping[TaskId, float] | None
) -> dict[TaskId, float]:
    known = {task.id: task.cost_s for task in tasks if task.cost_s is not None}
    for task, cost in (costs or {}).items():
        if not 0 <= task < len(tasks) or not cost >= 0:
            raise ConfigError(
                f"cost {cost} of task {task}: no such task of {len(tasks)}, or below 0"
            )
        known[task] = cost
    return known


def _filled(tasks: Sequence[TaskSpec], known: Mapping[TaskId, float]) -> tuple[float, ...]:
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for task in tasks:
        if task.id in known:
            by_kind[lane_kind(task.lane)].append(known[task.id])
    mean_all = sum(known.values()) / len(known)
    mean = {kind: sum(values) / len(values) for kind, values in by_kind.items()}
    return tuple(known.get(task.id, mean.get(lane_kind(task.lane), mean_all)) for task in tasks)
