"""Checks of graphs, plans, serial runs, hooks, micro-batches, lanes and closing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from typing import Any

from sagellm.core.protocols.errors import CommError, ConfigError

from .contract import Check
from .overlap_basics import WAIT_S, Log, Managers, PendingWork, equal

__all__ = ["checks"]


def _graph(m: Managers) -> None:
    log = Log()
    with m.manager() as manager:
        graph = manager.graph()
        a = graph.compute(log.task("a", 1), name="a")
        b = graph.comm(lambda x: log.names.append("b") or x + 1, a, name="b", nbytes=8)  # type: ignore[func-returns-value]  # append gives None
        c = graph.compute(lambda x: log.names.append("c") or x * 10, a, name="c")  # type: ignore[func-returns-value]  # as above
        d = graph.compute(lambda x, y: log.names.append("d") or x + y, b, c, name="d")  # type: ignore[func-returns-value]  # as above
        e = graph.comm(log.task("e"), name="e")
        graph.after(e, d)
        equal(len(graph), 5, "tasks in the graph")
        plan = manager.compile(graph)
        again = manager.compile(graph)
        order = sorted(task for lane in plan.order.values() for task in lane)
        equal(order, sorted([a, b, c, d, e]), "tasks in the plan")
        equal(plan.digest, again.digest, "digest of the same graph")
        result = manager.run(plan).wait(WAIT_S)
        equal(result.compute, (1, 10, 12), "compute results of the graph")
        equal(result.comm, (2, None), "comm results of the graph")
        for first, then in ("ab", "ac", "bd", "cd", "de"):
            log.before(first, then)
        bound = manager.run(plan, {a: 5}).wait(WAIT_S)
        equal(bound.compute[1:], (50, 56), "results with a bound input")
        equal(log.names.count("a"), 1, "runs of a task that was bound once")
        if not manager.explain(plan):
            raise AssertionError("explain is empty")


def _graph_refuses(m: Managers) -> None:
    with m.manager() as manager:
        graph = manager.graph()
        task = graph.compute(lambda: 1)
        for what, call in (
            ("an unknown input", lambda: graph.compute(lambda x: x, task + 7)),
            ("a task after itself", lambda: graph.after(task, task)),
        ):
            try:
                call()
            except ConfigError:
                continue
            raise AssertionError(f"{what} was not refused")


def _digest(m: Managers) -> None:
    with m.manager() as manager:

        def digest(names: str) -> str:
            graph = manager.graph()
            for name in names:
                graph.comm(lambda: None, name=name)
            return manager.compile(graph).digest

        equal(digest("xy"), digest("xy"), "digest of equal communication")
        if digest("xy") == digest("xyz"):
            raise AssertionError("plans of two and of three communications have one digest")


def _disable(m: Managers) -> None:
    """Serial runs keep order and results, and no two tasks overlap."""
    running: list[str] = []

    def task(name: str) -> Callable[[], str]:
        def run() -> str:
            running.append(name)
            if len(running) > 1:
                raise AssertionError(f"{running} run side by side in a serial run")
            threading.Event().wait(0.005)
            running.remove(name)
            return name

        return run

    with m.manager() as manager:
        manager.disable("the contract asks for it")
        result = manager.schedule(
            [task(f"k{i}") for i in range(3)], [task(f"c{i}") for i in range(3)]
        ).wait(WAIT_S)
        equal((result.compute, result.comm), (("k0", "k1", "k2"), ("c0", "c1", "c2")), "results")
        stats = manager.get_stats()
        equal((stats.serial_runs, stats.disabled_reason), (1, "the contract asks for it"), "stats")
        graph = manager.graph()
        graph.compute(lambda: 1)
        plan = manager.compile(graph)
        equal(plan.serial, True, "serial of a plan of a disabled manager")
        if "the contract asks for it" not in manager.explain(plan):
            raise AssertionError(f"explain does not say why: {manager.explain(plan)}")
        manager.reset()
        equal(manager.get_stats().disabled_reason, "", "disabled_reason after reset")
        meet = threading.Barrier(2)
        manager.schedule(lambda: meet.wait(WAIT_S), lambda: meet.wait(WAIT_S)).wait(WAIT_S * 2)


def _await(m: Managers) -> None:
    async def run() -> tuple[Any, ...]:
        with m.manager() as manager:
            result = await manager.schedule(lambda: 1, lambda: 2)
            return (*result.compute, *result.comm)

    equal(asyncio.run(run()), (1, 2), "results of an awaited run")


class _Stream:
    """A KVStream that notes the layers it is given."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def send_layer(self, index: int, after: object = None) -> None:
        self.layers.append(index)


def _layer_hooks(m: Managers) -> None:
    stream: Any = _Stream()  # a KVStream as far as this needs
    with m.manager() as manager:
        hook = manager.layer_hooks(stream)
        for i in range(3):
            hook(i)
    equal(stream.layers, [0, 1, 2], "layers queued by the hook")


def _batches(m: Managers) -> None:
    """While one micro-batch's communication is in flight, another one computes."""
    log: list[str] = []
    events = {name: threading.Event() for name in "ab"}

    def steps(name: str, other: str) -> Generator[object, object, str]:
        log.append(f"{name}0")
        events[name].set()
        # Done only once the other batch has computed its first step.
        yield PendingWork(events[other])
        log.append(f"{name}1")
        return name

    with m.manager() as manager:
        results = manager.overlap_batches([steps("a", "b"), steps("b", "a")])
    equal(results, ["a", "b"], "what the generators returned")
    equal(log[:2], ["a0", "b0"], "first steps")
    equal(sorted(log[2:]), ["a1", "b1"], "second steps")


def _lanes(m: Managers) -> None:
    with m.manager() as manager:
        lane = manager.lane("kv")
        equal((lane.name, lane.kind), ("kv", "comm"), "a lane for communication")
        equal(manager.lane("compute.2").kind, "compute", "kind of lane compute.2")
        if manager.lane("kv") is not lane:
            raise AssertionError("asking twice for a lane gave two")


def _close(m: Managers) -> None:
    manager = m.make()
    before = threading.active_count()
    manager.schedule(lambda: 1, lambda: 2).wait(WAIT_S)
    manager.close()
    manager.close()
    if threading.active_count() > before:
        raise AssertionError(f"{threading.active_count() - before} threads are left after close")
    try:
        manager.schedule(lambda: 1, lambda: 2)
    except CommError:
        return
    raise AssertionError("a closed manager took a run")


def checks() -> list[Check]:
    """The checks of everything around `schedule`, in a stable order."""
    return [
        Check("graphs", _graph),
        Check("graphs refuse cycles and strangers", _graph_refuses),
        Check("digests tell plans apart", _digest),
        Check("disable means serial", _disable),
        Check("await", _await),
        Check("layer hooks", _layer_hooks),
        Check("micro-batches", _batches),
        Check("lanes", _lanes),
        Check("close", _close),
    ]
