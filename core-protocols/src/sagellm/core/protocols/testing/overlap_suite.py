"""The contract of `OverlapManagerProtocol` on a CPU: order, errors, cancelling, metrics."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sagellm.core.protocols.errors import CommError, CommTimeoutError, ConfigError
from sagellm.core.protocols.overlap_manager import (
    Interval,
    OverlapHandle,
    OverlapManagerProtocol,
    OverlapMetrics,
)
from sagellm.core.protocols.work import CompletedWork

from .contract import Check, Report, run_local, select
from .targets import factory_of, resolve

__all__ = ["check_overlap_manager", "measure", "overlap_checks"]

_WAIT_S = 10.0


def measure(intervals: Sequence[Interval], makespan_s: float) -> dict[str, float]:
    """What `OverlapMetrics` says of intervals, by its definition and nothing else.

    Returns compute_s, comm_s, overlapped_s, exposed_s, and `idle:<lane>` for every lane.
    """
    lanes: dict[str, list[tuple[float, float]]] = {}
    for i in intervals:
        lanes.setdefault(i.lane, []).append((i.start_s, i.end_s))
    compute = _merged(x for lane, xs in lanes.items() if lane.startswith("compute") for x in xs)
    comm = _merged(x for lane, xs in lanes.items() if not lane.startswith("compute") for x in xs)
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in compute for c, d in comm)
    found = {
        "compute_s": _length(compute),
        "comm_s": _length(comm),
        "overlapped_s": both,
        "exposed_s": _length(comm) - both,
    }
    for lane, xs in lanes.items():
        found[f"idle:{lane}"] = 1 - _length(_merged(xs)) / makespan_s if makespan_s > 0 else 0.0
    return found


def _merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    out: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


@dataclass(frozen=True, slots=True)
class Managers:
    """What a check gets: a factory of managers."""

    make: Callable[[], OverlapManagerProtocol]

    @contextmanager
    def manager(self) -> Iterator[OverlapManagerProtocol]:
        """A manager that is closed at the end of the block."""
        manager = self.make()
        try:
            yield manager
        finally:
            manager.close()


class _Log:
    """Names in the order in which they were noted; thread-safe."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def task(self, name: str, result: object = None) -> Callable[[], object]:
        def run() -> object:
            self.names.append(name)
            return result

        return run

    def before(self, first: str, then: str) -> None:
        if not (first in self.names and then in self.names):
            raise AssertionError(f"{first} or {then} never ran: {self.names}")
        if self.names.index(first) > self.names.index(then):
            raise AssertionError(f"{then} ran before {first}: {self.names}")


def _equal(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise AssertionError(f"{what} is {found!r}, not {expected!r}")


def _held(event: threading.Event) -> None:
    if not event.wait(_WAIT_S):
        raise AssertionError("a task waited for one that never ran beside it")


def _side_by_side(m: Managers) -> None:
    meet = threading.Barrier(2)
    with m.manager() as manager:
        handle = manager.schedule(lambda: meet.wait(_WAIT_S), lambda: meet.wait(_WAIT_S))
        result = handle.wait(_WAIT_S * 2)
    _equal(sorted((*result.compute, *result.comm)), [0, 1], "results of two tasks that met")


def _zip(m: Managers) -> None:
    """Communication i gets compute i's result, after it; results keep the order given."""
    log = _Log()

    def comm(i: int) -> Callable[[object], object]:
        def run(x: object) -> object:
            log.names.append(f"comm{i}")
            return ("sent", x)

        return run

    with m.manager() as manager:
        result = manager.schedule(
            [log.task(f"compute{i}", i * 10) for i in range(5)], [comm(i) for i in range(5)]
        ).wait(_WAIT_S)
    _equal(result.compute, (0, 10, 20, 30, 40), "compute results")
    _equal(result.comm, tuple(("sent", i * 10) for i in range(5)), "comm results")
    for i in range(5):
        log.before(f"compute{i}", f"comm{i}")
    for i in range(4):
        log.before(f"compute{i}", f"compute{i + 1}")
        log.before(f"comm{i}", f"comm{i + 1}")


def _zip_without_argument(m: Managers) -> None:
    """A communication that takes no argument still waits for its compute."""
    log, started = _Log(), threading.Event()

    def slow() -> None:
        started.wait(0.05)
        log.names.append("compute")

    with m.manager() as manager:
        manager.schedule([slow], [log.task("comm")]).wait(_WAIT_S)
    log.before("compute", "comm")


def _overlaps(m: Managers) -> None:
    """While communication 0 runs, compute 1 runs."""
    second = threading.Event()
    with m.manager() as manager:
        manager.schedule([lambda: None, second.set], [lambda: _held(second), lambda: None]).wait(
            _WAIT_S * 2
        )


def _independent(m: Managers) -> None:
    sent = threading.Event()
    with m.manager() as manager:
        result = manager.schedule(
            [lambda: _held(sent), lambda: 1, lambda: 2], [sent.set], pairing="none"
        ).wait(_WAIT_S * 2)
    _equal(result.compute, (None, 1, 2), "compute results")


def _arguments(m: Managers) -> None:
    with m.manager() as manager:
        result = manager.schedule((max, (3, 5)), (min, (3, 5))).wait(_WAIT_S)
    _equal((result.compute, result.comm), ((5,), (3,)), "results of tasks with arguments")


def _refuses(m: Managers) -> None:
    with m.manager() as manager:
        calls: list[tuple[str, Callable[[], object]]] = [
            ("lists of different lengths",
             lambda: manager.schedule([lambda: 1], [lambda: 1, lambda: 2])),
            ("what is not callable", lambda: manager.schedule(3, lambda: 1)),  # type: ignore[arg-type]  # on purpose
            ("an unknown pairing",
             lambda: manager.schedule([max], [max], pairing="cross")),  # type: ignore[arg-type]  # on purpose
        ]  # fmt: skip
        for what, call in calls:
            try:
                call()
            except ConfigError:
                continue
            raise AssertionError(f"{what} was not refused")
        manager.schedule(lambda: 1, lambda: 2).wait(_WAIT_S)


class TaskError(Exception):
    """What failing tasks raise."""


def _fail() -> None:
    raise TaskError("on purpose")


def _expect_failure(handle: OverlapHandle) -> None:
    try:
        handle.wait(_WAIT_S)
    except TaskError:
        pass
    else:
        raise AssertionError("a task raised, and wait did not")
    if not handle.done() or not isinstance(handle.exception(), TaskError):
        raise AssertionError(f"done is {handle.done()}, exception {handle.exception()!r}")


def _compute_fails(m: Managers) -> None:
    log = _Log()
    with m.manager() as manager:
        handle = manager.schedule(
            [log.task("0"), _fail, log.task("2")], [log.task("c0"), log.task("c1"), log.task("c2")]
        )
        _expect_failure(handle)
        manager.schedule(log.task("next"), log.task("next comm")).wait(_WAIT_S)
    for skipped in ("2", "c1", "c2"):
        if skipped in log.names:
            raise AssertionError(f"task {skipped} ran after the failure: {log.names}")
    log.before("0", "next")


def _comm_fails(m: Managers) -> None:
    with m.manager() as manager:
        _expect_failure(manager.schedule(lambda: 1, _fail))


class _Pending(CompletedWork[int]):
    """A work that is done once an event is set."""

    def __init__(self, event: threading.Event, error: BaseException | None = None) -> None:
        super().__init__(42, error)
        self._event = event

    def wait(self, timeout_s: float | None = None) -> int:
        if not self._event.wait(_WAIT_S if timeout_s is None else timeout_s):
            raise CommTimeoutError("not yet")
        return super().wait(timeout_s)

    def synchronize(self, timeout_s: float | None = None) -> int:
        return self.wait(timeout_s)

    def done(self) -> bool:
        return self._event.is_set()


def _works(m: Managers) -> None:
    """A run is over when the works that its tasks returned are."""
    sent = threading.Event()
    with m.manager() as manager:
        handle = manager.schedule(lambda: 1, lambda: _Pending(sent))
        early = handle.done()
        try:
            handle.wait(0.05)
            raise AssertionError("wait ended before the work that the task returned")
        except CommTimeoutError:
            pass
        sent.set()
        result = handle.wait(_WAIT_S)
    _equal(early, False, "done before the work")
    _equal(result.comm, (42,), "the result of a task that returned a work")


def _failing_work(m: Managers) -> None:
    done = threading.Event()
    done.set()
    with m.manager() as manager:
        _expect_failure(manager.schedule(lambda: 1, lambda: _Pending(done, TaskError("later"))))


def _timeout(m: Managers) -> None:
    go = threading.Event()
    with m.manager() as manager:
        handle = manager.schedule(lambda: _held(go), lambda: 1)
        try:
            handle.wait(0.05)
        except CommTimeoutError as e:
            if not str(e):
                raise AssertionError("the timeout's message is empty") from e
        else:
            raise AssertionError("wait ended although a task was running")
        try:
            _ = handle.metrics
        except ConfigError:
            pass
        else:
            raise AssertionError("metrics were given of a run that is not over")
        go.set()
        handle.wait(_WAIT_S)


def _cancel(m: Managers) -> None:
    log, running, go = _Log(), threading.Event(), threading.Event()

    def first() -> None:
        running.set()
        _held(go)

    with m.manager() as manager:
        handle = manager.schedule([first, log.task("1"), log.task("2")], [], pairing="none")
        _held(running)
        cancelled = handle.cancel()
        go.set()
        try:
            handle.wait(_WAIT_S)
        except CommTimeoutError:
            raise AssertionError("a cancelled run never ended") from None
        except Exception as e:  # whether a cancelled run raises is the manager's choice
            if not isinstance(e, CommError | asyncio.CancelledError):
                raise
        _equal((cancelled, log.names), (True, []), "cancel, and what ran after it")
        _equal(handle.cancel(), False, "cancel of a run that is over")


def _close_to(found: float, expected: float, what: str, makespan_s: float) -> None:
    if not math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-6 + makespan_s * 1e-3):
        raise AssertionError(f"{what} is {found}, but its intervals say {expected}")


def _agree(metrics: OverlapMetrics) -> None:
    wanted = measure(metrics.intervals, metrics.makespan_s)
    for name, value in wanted.items():
        if name.startswith("idle:"):
            found = metrics.idle.get(name.removeprefix("idle:"))
            if found is None:
                raise AssertionError(f"metrics have no {name}: {dict(metrics.idle)}")
        else:
            found = getattr(metrics, name)
        _close_to(found, value, name, metrics.makespan_s)
    if wanted["comm_s"] > 0:
        if metrics.eff_trace is None:
            raise AssertionError("eff_trace is None although there was communication")
        ratio = wanted["overlapped_s"] / wanted["comm_s"]
        _close_to(metrics.eff_trace, ratio, "eff_trace", 1.0)
    last = max((i.end_s for i in metrics.intervals), default=0.0)
    if last > metrics.makespan_s * 1.01 + 1e-3:
        raise AssertionError(f"a task ended at {last} s of a makespan of {metrics.makespan_s} s")


def _metrics(m: Managers) -> None:
    pause = threading.Event()
    with m.manager() as manager:
        handle = manager.schedule([lambda: pause.wait(0.02)] * 3, [lambda x: pause.wait(0.03)] * 3)
        handle.wait(_WAIT_S)
        metrics = handle.metrics
        stats = manager.get_stats()
    _equal(len(metrics.intervals), 6, "intervals of six tasks")
    _agree(metrics)
    if metrics.compute_s < 0.05 or metrics.comm_s < 0.08:
        raise AssertionError(f"three pauses of 20 and 30 ms are said to take {metrics}")
    _equal((stats.runs, stats.tasks, stats.failed), (1, 6, 0), "runs, tasks and failures counted")


def _graph(m: Managers) -> None:
    log = _Log()
    with m.manager() as manager:
        graph = manager.graph()
        a = graph.compute(log.task("a", 1), name="a")
        b = graph.comm(lambda x: log.names.append("b") or x + 1, a, name="b", nbytes=8)  # type: ignore[func-returns-value]  # append gives None
        c = graph.compute(lambda x: log.names.append("c") or x * 10, a, name="c")  # type: ignore[func-returns-value]  # as above
        d = graph.compute(lambda x, y: log.names.append("d") or x + y, b, c, name="d")  # type: ignore[func-returns-value]  # as above
        e = graph.comm(log.task("e"), name="e")
        graph.after(e, d)
        _equal(len(graph), 5, "tasks in the graph")
        plan = manager.compile(graph)
        again = manager.compile(graph)
        order = sorted(task for lane in plan.order.values() for task in lane)
        _equal(order, sorted([a, b, c, d, e]), "tasks in the plan")
        _equal(plan.digest, again.digest, "digest of the same graph")
        result = manager.run(plan).wait(_WAIT_S)
        _equal(result.compute, (1, 10, 12), "compute results of the graph")
        _equal(result.comm, (2, None), "comm results of the graph")
        for first, then in ("ab", "ac", "bd", "cd", "de"):
            log.before(first, then)
        bound = manager.run(plan, {a: 5}).wait(_WAIT_S)
        _equal(bound.compute[1:], (50, 56), "results with a bound input")
        _equal(log.names.count("a"), 1, "runs of a task that was bound once")
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

        if digest("xy") == digest("yx") or digest("xy") == digest("xyz"):
            raise AssertionError("plans of different communication have one digest")


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
        ).wait(_WAIT_S)
        _equal((result.compute, result.comm), (("k0", "k1", "k2"), ("c0", "c1", "c2")), "results")
        stats = manager.get_stats()
        _equal((stats.serial_runs, stats.disabled_reason), (1, "the contract asks for it"), "stats")
        graph = manager.graph()
        graph.compute(lambda: 1)
        plan = manager.compile(graph)
        _equal(plan.serial, True, "serial of a plan of a disabled manager")
        if "the contract asks for it" not in manager.explain(plan):
            raise AssertionError(f"explain does not say why: {manager.explain(plan)}")
        manager.reset()
        _equal(manager.get_stats().disabled_reason, "", "disabled_reason after reset")
        meet = threading.Barrier(2)
        manager.schedule(lambda: meet.wait(_WAIT_S), lambda: meet.wait(_WAIT_S)).wait(_WAIT_S * 2)


def _await(m: Managers) -> None:
    async def run() -> tuple[Any, ...]:
        with m.manager() as manager:
            result = await manager.schedule(lambda: 1, lambda: 2)
            return (*result.compute, *result.comm)

    _equal(asyncio.run(run()), (1, 2), "results of an awaited run")


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
    _equal(stream.layers, [0, 1, 2], "layers queued by the hook")


def _batches(m: Managers) -> None:
    """While one micro-batch's communication is in flight, another one computes."""
    log: list[str] = []
    events = {name: threading.Event() for name in "ab"}

    def steps(name: str, other: str) -> Generator[object, object, str]:
        log.append(f"{name}0")
        events[name].set()
        # Done only once the other batch has computed its first step.
        yield _Pending(events[other])
        log.append(f"{name}1")
        return name

    with m.manager() as manager:
        results = manager.overlap_batches([steps("a", "b"), steps("b", "a")])
    _equal(results, ["a", "b"], "what the generators returned")
    _equal(log[:2], ["a0", "b0"], "first steps")
    _equal(sorted(log[2:]), ["a1", "b1"], "second steps")


def _lanes(m: Managers) -> None:
    with m.manager() as manager:
        lane = manager.lane("kv")
        _equal((lane.name, lane.kind), ("kv", "comm"), "a lane for communication")
        _equal(manager.lane("compute.2").kind, "compute", "kind of lane compute.2")
        if manager.lane("kv") is not lane:
            raise AssertionError("asking twice for a lane gave two")


def _close(m: Managers) -> None:
    manager = m.make()
    before = threading.active_count()
    manager.schedule(lambda: 1, lambda: 2).wait(_WAIT_S)
    manager.close()
    manager.close()
    if threading.active_count() > before:
        raise AssertionError(f"{threading.active_count() - before} threads are left after close")
    try:
        manager.schedule(lambda: 1, lambda: 2)
    except CommError:
        return
    raise AssertionError("a closed manager took a run")


def overlap_checks() -> list[Check]:
    """Every check of the suite, in a stable order."""
    return [
        Check("a pair runs side by side", _side_by_side),
        Check("pairs keep order and pass results", _zip),
        Check("communication waits for its compute", _zip_without_argument),
        Check("lists overlap", _overlaps),
        Check("pairing none is independent", _independent),
        Check("tasks with arguments", _arguments),
        Check("bad arguments are refused", _refuses),
        Check("a failing compute ends the run", _compute_fails),
        Check("a failing communication ends the run", _comm_fails),
        Check("works are waited for", _works),
        Check("a failing work ends the run", _failing_work),
        Check("a wait that ends early", _timeout),
        Check("cancel skips what has not started", _cancel),
        Check("metrics follow from intervals", _metrics),
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


def check_overlap_manager(target: str, *, only: Sequence[str] = ()) -> Report:
    """Run the suite on a manager: `module:attribute` or the name of an entry point."""
    argument = Managers(factory_of(resolve("overlap_manager", target)))
    return run_local("overlap_manager", target, select(overlap_checks(), only), lambda: argument)
