"""Checks of `schedule`: order, pairing, errors, waiting, cancelling, metrics."""

from __future__ import annotations

import concurrent.futures
import math
import threading
from collections.abc import Callable

from sagellm.core.protocols.errors import CommTimeoutError, ConfigError
from sagellm.core.protocols.overlap_manager import OverlapHandle, OverlapMetrics

from .contract import Check
from .overlap_basics import WAIT_S, Log, Managers, PendingWork, equal, held, measure

__all__ = ["checks"]


def _side_by_side(m: Managers) -> None:
    meet = threading.Barrier(2)
    with m.manager() as manager:
        handle = manager.schedule(lambda: meet.wait(WAIT_S), lambda: meet.wait(WAIT_S))
        result = handle.wait(WAIT_S * 2)
    equal(sorted((*result.compute, *result.comm)), [0, 1], "results of two tasks that met")


def _zip(m: Managers) -> None:
    """Communication i gets compute i's result, after it; results keep the order given."""
    log = Log()

    def comm(i: int) -> Callable[[object], object]:
        def run(x: object) -> object:
            log.names.append(f"comm{i}")
            return ("sent", x)

        return run

    with m.manager() as manager:
        result = manager.schedule(
            [log.task(f"compute{i}", i * 10) for i in range(5)], [comm(i) for i in range(5)]
        ).wait(WAIT_S)
    equal(result.compute, (0, 10, 20, 30, 40), "compute results")
    equal(result.comm, tuple(("sent", i * 10) for i in range(5)), "comm results")
    for i in range(5):
        log.before(f"compute{i}", f"comm{i}")
    for i in range(4):
        log.before(f"compute{i}", f"compute{i + 1}")
        log.before(f"comm{i}", f"comm{i + 1}")


def _zip_without_argument(m: Managers) -> None:
    """A communication that takes no argument still waits for its compute."""
    log, started = Log(), threading.Event()

    def slow() -> None:
        started.wait(0.05)
        log.names.append("compute")

    with m.manager() as manager:
        manager.schedule([slow], [log.task("comm")]).wait(WAIT_S)
    log.before("compute", "comm")


def _overlaps(m: Managers) -> None:
    """While communication 0 runs, compute 1 runs."""
    second = threading.Event()
    with m.manager() as manager:
        manager.schedule([lambda: None, second.set], [lambda: held(second), lambda: None]).wait(
            WAIT_S * 2
        )


def _independent(m: Managers) -> None:
    sent = threading.Event()
    with m.manager() as manager:
        result = manager.schedule(
            [lambda: held(sent), lambda: 1, lambda: 2], [sent.set], pairing="none"
        ).wait(WAIT_S * 2)
    equal(result.compute, (None, 1, 2), "compute results")


def _arguments(m: Managers) -> None:
    with m.manager() as manager:
        result = manager.schedule((max, (3, 5)), (min, (3, 5))).wait(WAIT_S)
    equal((result.compute, result.comm), ((5,), (3,)), "results of tasks with arguments")


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
        manager.schedule(lambda: 1, lambda: 2).wait(WAIT_S)


class TaskError(Exception):
    """What failing tasks raise."""


def _fail() -> None:
    raise TaskError("on purpose")


def _expect_failure(handle: OverlapHandle) -> None:
    try:
        handle.wait(WAIT_S)
    except TaskError:
        pass
    else:
        raise AssertionError("a task raised, and wait did not")
    if not handle.done() or not isinstance(handle.exception(), TaskError):
        raise AssertionError(f"done is {handle.done()}, exception {handle.exception()!r}")


def _compute_fails(m: Managers) -> None:
    log = Log()
    with m.manager() as manager:
        handle = manager.schedule(
            [log.task("0"), _fail, log.task("2")], [log.task("c0"), log.task("c1"), log.task("c2")]
        )
        _expect_failure(handle)
        manager.schedule(log.task("next"), log.task("next comm")).wait(WAIT_S)
    for skipped in ("2", "c1", "c2"):
        if skipped in log.names:
            raise AssertionError(f"task {skipped} ran after the failure: {log.names}")
    log.before("0", "next")


def _comm_fails(m: Managers) -> None:
    with m.manager() as manager:
        _expect_failure(manager.schedule(lambda: 1, _fail))


def _works(m: Managers) -> None:
    """A run is over when the works that its tasks returned are."""
    sent = threading.Event()
    with m.manager() as manager:
        handle = manager.schedule(lambda: 1, lambda: PendingWork(sent))
        early = handle.done()
        try:
            handle.wait(0.05)
            raise AssertionError("wait ended before the work that the task returned")
        except CommTimeoutError:
            pass
        sent.set()
        result = handle.wait(WAIT_S)
    equal(early, False, "done before the work")
    equal(result.comm, (42,), "the result of a task that returned a work")


def _failing_work(m: Managers) -> None:
    done = threading.Event()
    done.set()
    with m.manager() as manager:
        _expect_failure(manager.schedule(lambda: 1, lambda: PendingWork(done, TaskError("later"))))


def _timeout(m: Managers) -> None:
    go = threading.Event()
    with m.manager() as manager:
        handle = manager.schedule(lambda: held(go), lambda: 1)
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
        handle.wait(WAIT_S)


def _cancel(m: Managers) -> None:
    log, running, go = Log(), threading.Event(), threading.Event()

    def first() -> None:
        running.set()
        held(go)

    with m.manager() as manager:
        handle = manager.schedule([first, log.task("1"), log.task("2")], [], pairing="none")
        held(running)
        cancelled = handle.cancel()
        go.set()
        for _ in range(2):  # every call gives the same answer
            try:
                result = handle.wait(WAIT_S)
            except concurrent.futures.CancelledError:
                continue
            except CommTimeoutError:
                raise AssertionError("a cancelled run never ended") from None
            raise AssertionError(f"wait of a cancelled run raised nothing, but gave {result}")
        equal((cancelled, log.names), (True, []), "cancel, and what ran after it")
        equal(handle.cancel(), False, "cancel of a run that is over")


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
    first = min((i.start_s for i in metrics.intervals), default=0.0)
    last = max((i.end_s for i in metrics.intervals), default=0.0)
    _close_to(metrics.makespan_s, last - first, "makespan_s", last - first)


def _metrics(m: Managers) -> None:
    pause = threading.Event()
    with m.manager() as manager:
        handle = manager.schedule([lambda: pause.wait(0.02)] * 3, [lambda x: pause.wait(0.03)] * 3)
        handle.wait(WAIT_S)
        metrics = handle.metrics
        stats = manager.get_stats()
    equal(len(metrics.intervals), 6, "intervals of six tasks")
    _agree(metrics)
    if metrics.compute_s < 0.05 or metrics.comm_s < 0.08:
        raise AssertionError(f"three pauses of 20 and 30 ms are said to take {metrics}")
    equal((stats.runs, stats.tasks, stats.failed), (1, 6, 0), "runs, tasks and failures counted")


def checks() -> list[Check]:
    """The checks of `schedule`, in a stable order."""
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
    ]
