"""Orders of tasks on two or more lanes: simulation, lower bound and a portfolio of rules.

No single priority rule is good everywhere, so several orders are simulated and the best one is
kept. Everything here is deterministic: equal graphs and costs give equal orders on all ranks.
Times are seconds; a lane runs one task at a time.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from sagellm.core.protocols import ConfigError

__all__ = [
    "LaneOrder",
    "Shape",
    "Simulation",
    "johnson_order",
    "lower_bound",
    "priority_order",
    "simulate",
    "upward_rank",
    "user_order",
]

LaneOrder: TypeAlias = "dict[str, tuple[int, ...]]"


@dataclass(frozen=True, slots=True)
class Shape:
    """What an order depends on: where each task runs and what it waits for.

    Attributes:
        lanes: Lane of each task.
        deps: Earlier tasks each task waits for.
        succ: Later tasks that wait for each task.

    """

    lanes: tuple[str, ...]
    deps: tuple[tuple[int, ...], ...]
    succ: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, lanes: Sequence[str], deps: Sequence[Sequence[int]]) -> Shape:
        """The shape for lanes and dependencies, both indexed by task."""
        succ: list[list[int]] = [[] for _ in lanes]
        for task, earlier in enumerate(deps):
            for dep in earlier:
                succ[dep].append(task)
        return cls(tuple(lanes), tuple(map(tuple, deps)), tuple(map(tuple, succ)))


@dataclass(frozen=True, slots=True)
class Simulation:
    """A run as it would go if every task took exactly its cost.

    Attributes:
        makespan_s: End of the last task.
        start_s: Start of each task.
        sequence: All tasks in an order that respects lanes and dependencies.

    """

    makespan_s: float
    start_s: tuple[float, ...]
    sequence: tuple[int, ...]


def simulate(
    shape: Shape, order: Mapping[str, Sequence[int]], costs: Sequence[float]
) -> Simulation:
    """How a static order per lane would run.

    Raises:
        ConfigError: The order contradicts the dependencies, so the lanes would wait for
            each other for ever; or it does not hold every task once.

    """
    count = len(shape.lanes)
    if sorted(task for tasks in order.values() for task in tasks) != list(range(count)):
        raise ConfigError(f"the order does not hold each of {count} tasks once")
    left = [len(deps) for deps in shape.deps]
    follower = [-1] * count
    for tasks in order.values():
        for first, second in pairwise(tasks):
            follower[first] = second
            left[second] += 1
    start = [0.0] * count
    ready = [(0.0, task) for task in range(count) if not left[task]]
    heapq.heapify(ready)
    sequence: list[int] = []
    makespan = 0.0
    while ready:
        begun, task = heapq.heappop(ready)
        sequence.append(task)
        end = begun + costs[task]
        makespan = max(makespan, end)
        for later in (*shape.succ[task], follower[task]):
            if later < 0:
                continue
            start[later] = max(start[later], end)
            left[later] -= 1
            if not left[later]:
                heapq.heappush(ready, (start[later], later))
    if len(sequence) != count:
        stuck = sorted(set(range(count)) - set(sequence))
        raise ConfigError(f"the order of the lanes contradicts the dependencies of tasks {stuck}")
    return Simulation(makespan, tuple(start), tuple(sequence))


def upward_rank(shape: Shape, costs: Sequence[float]) -> list[float]:
    """Per task, the length of the longest path from its start to the end of the graph."""
    rank = [0.0] * len(shape.lanes)
    for task in reversed(range(len(rank))):
        rank[task] = costs[task] + max((rank[later] for later in shape.succ[task]), default=0.0)
    return rank


def lower_bound(
    shape: Shape, costs: Sequence[float], width: Mapping[str, int] | None = None
) -> float:
    """Seconds that no order can beat: the longest path, or the fullest lane.

    Args:
        shape: The graph.
        costs: Seconds per task.
        width: Tasks a lane runs at full speed at the same time; 1 where it says nothing.

    """
    load: defaultdict[str, float] = defaultdict(float)
    for lane, cost in zip(shape.lanes, costs, strict=True):
        load[lane] += cost
    wide = width or {}
    fullest = max((load[lane] / wide.get(lane, 1) for lane in load), default=0.0)
    return max(fullest, max(upward_rank(shape, costs), default=0.0))


def user_order(shape: Shape) -> LaneOrder:
    """Each lane in the order in which its tasks were added."""
    order: defaultdict[str, list[int]] = defaultdict(list)
    for task, lane in enumerate(shape.lanes):
        order[lane].append(task)
    return {lane: tuple(tasks) for lane, tasks in order.items()}


def priority_order(shape: Shape, costs: Sequence[float], priority: Sequence[float]) -> LaneOrder:
    """The order in which lanes start tasks that always take the ready one of highest priority."""
    left = [len(deps) for deps in shape.deps]
    ready: dict[str, list[tuple[float, int]]] = {lane: [] for lane in shape.lanes}
    order: dict[str, list[int]] = {lane: [] for lane in shape.lanes}
    for task, lane in enumerate(shape.lanes):
        if not left[task]:
            heapq.heappush(ready[lane], (-priority[task], task))
    free = set(ready)
    running: list[tuple[float, int]] = []
    now = 0.0
    while True:
        for lane in ready:
            if lane in free and ready[lane]:
                task = heapq.heappop(ready[lane])[1]
                free.discard(lane)
                order[lane].append(task)
                heapq.heappush(running, (now + costs[task], task))
        if not running:
            return {lane: tuple(tasks) for lane, tasks in order.items()}
        now, task = heapq.heappop(running)
        free.add(shape.lanes[task])
        for later in shape.succ[task]:
            left[later] -= 1
            if not left[later]:
                heapq.heappush(ready[shape.lanes[later]], (-priority[later], later))


def johnson_order(shape: Shape, costs: Sequence[float]) -> LaneOrder | None:
    """The optimal order of independent pairs first -> second on two lanes, by Johnson's rule.

    None when the graph is not of that form: two lanes, every dependency from the first lane to
    the second, at most one per task. A task without a partner counts as a pair with one empty half.
    """
    lanes = sorted(set(shape.lanes))
    heads = {shape.lanes[dep] for deps in shape.deps for dep in deps}
    if len(lanes) != 2 or len(heads) != 1:
        return None
    (first,) = heads
    jobs: list[tuple[float, float, int, int]] = []
    for task, lane in enumerate(shape.lanes):
        deps, succ = shape.deps[task], shape.succ[task]
        if lane == first:
            if deps or len(succ) > 1 or any(shape.lanes[later] == first for later in succ):
                return None
            partner = succ[0] if succ else -1
            jobs.append((costs[task], costs[partner] if succ else 0.0, task, partner))
        elif len(deps) > 1 or succ:
            return None
        elif not deps:
            jobs.append((0.0, costs[task], -1, task))
    jobs.sort(key=lambda job: (0, job[0], job[3]) if job[0] < job[1] else (1, -job[1], job[3]))
    second = next(lane for lane in lanes if lane != first)
    return {
        first: tuple(job[2] for job in jobs if job[2] >= 0),
        second: tuple(job[3] for job in jobs if job[3] >= 0),
    }
