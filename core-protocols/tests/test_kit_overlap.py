"""The overlap suite passes a sound manager, catches each seeded bug, and measures rightly."""

import asyncio
import contextlib
import inspect
import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest

from sagellm.core.protocols import (
    CommTimeoutError,
    ConfigError,
    Interval,
    OverlapManagerProtocol,
    OverlapMetrics,
    OverlapResult,
    OverlapStats,
)
from sagellm.core.protocols.testing import check_overlap_manager
from sagellm.core.protocols.testing.overlap_basics import measure

WAIT_S = 20.0


class SkippedError(Exception):
    """A task whose run failed or was cancelled before it started."""


class Run:
    """Tasks on lanes: one thread per lane, each task waiting for its inputs."""

    def __init__(self, manager, tasks, lanes, bindings=None):
        self.manager, self.tasks = manager, tasks
        self.changed = threading.Condition()
        self.results = dict(bindings or {})
        self.started, self.intervals = set(self.results), []
        self.error, self.cancelled = None, False
        self.t0, self.open_lanes = time.perf_counter(), len(lanes)
        for lane, order in lanes.items():
            worker = threading.Thread(target=self._lane, args=(lane, order), daemon=True)
            manager.threads.append(worker)
            worker.start()

    def _lane(self, lane, order):
        try:
            for task in order:
                self._task(lane, task)
        except SkippedError:
            pass
        except BaseException as e:
            with self.changed:
                self.error = self.error or e
        with self.changed:
            self.open_lanes -= 1
            self.changed.notify_all()
        if self.done():
            self.manager.over(self)

    def _task(self, lane, i):
        task = self.tasks[i]
        with self.changed:
            needed = {*task.inputs, *task.after}
            self.changed.wait_for(
                lambda: self.error or self.cancelled or needed <= self.results.keys()
            )
            if i in self.results:
                return
            if self.error or self.cancelled:
                raise SkippedError
            self.started.add(i)
            inputs = [self.results[j] for j in task.inputs]
        begin = time.perf_counter() - self.t0
        result = task.fn(*inputs)
        if hasattr(result, "wait") and hasattr(result, "done"):
            result = result.wait()
        with self.changed:
            self.results[i] = result
            end = time.perf_counter() - self.t0
            self.intervals.append(Interval(i, task.name, lane, begin, end, task.nbytes))
            self.changed.notify_all()

    def done(self):
        with self.changed:
            return self.open_lanes == 0

    def wait(self, timeout_s=None):
        with self.changed:
            limit = WAIT_S if timeout_s is None else timeout_s
            if not self.changed.wait_for(lambda: self.open_lanes == 0, limit):
                raise CommTimeoutError(f"tasks are still running after {limit} s")
            if self.error:
                raise self.error
            if self.cancelled:
                raise CancelledError
        return OverlapResult(
            tuple(self.results[i] for i, t in enumerate(self.tasks) if t.kind == "compute"),
            tuple(self.results[i] for i, t in enumerate(self.tasks) if t.kind == "comm"),
        )

    def result(self):
        return self.wait(0)

    def exception(self):
        return self.error

    def cancel(self):
        with self.changed:
            if len(self.started) == len(self.tasks) or self.open_lanes == 0:
                return False
            self.cancelled = True
            self.changed.notify_all()
            return True

    def __await__(self):
        return asyncio.to_thread(self.wait).__await__()

    @property
    def metrics(self):
        if not self.done():
            raise ConfigError("the run is not over")
        ends = [i.end_s for i in self.intervals]
        total = max(ends) - min(i.start_s for i in self.intervals) if ends else 0.0
        found = measure(self.intervals, total)
        idle = {k.removeprefix("idle:"): v for k, v in found.items() if k.startswith("idle:")}
        comm, hidden = found["comm_s"], found["overlapped_s"]
        return OverlapMetrics(
            total, found["compute_s"], comm, hidden, found["exposed_s"],
            hidden / comm if comm else None, None, idle, intervals=tuple(self.intervals),
        )  # fmt: skip


class Graph:
    def __init__(self):
        self.tasks = []

    def _add(self, kind, fn, inputs, name, nbytes=0):
        if any(not 0 <= i < len(self.tasks) for i in inputs):
            raise ConfigError(f"unknown inputs among {inputs}")
        self.tasks.append(
            SimpleNamespace(
                kind=kind, fn=fn, inputs=inputs, name=name or "", after=[], nbytes=nbytes
            )
        )
        return len(self.tasks) - 1

    def compute(self, fn, *inputs, name=None, lane=None, cost_s=None):
        return self._add("compute", fn, inputs, name)

    def comm(self, fn, *inputs, name=None, lane=None, nbytes=0, cost_s=None):
        return self._add("comm", fn, inputs, name, nbytes)

    def after(self, task, *earlier):
        if any(i >= task for i in earlier):
            raise ConfigError("only earlier tasks can be waited for")
        self.tasks[task].after += earlier

    def __len__(self):
        return len(self.tasks)


class Manager(OverlapManagerProtocol):
    """A sound manager in a page: two lanes of threads per run."""

    def __init__(self):
        self.threads, self.lanes, self.closed, self.reason = [], {}, False, ""
        self.lock = threading.Lock()
        self.counts = {"runs": 0, "failed": 0, "tasks": 0, "serial_runs": 0}

    def over(self, run):
        with self.lock:
            self.counts["failed"] += run.error is not None

    def schedule(self, compute, comm, *, pairing="zip"):
        if self.closed:
            raise ConfigError("the manager is closed")
        if pairing not in ("zip", "none"):
            raise ConfigError(f"pairing {pairing!r}")
        lists = isinstance(compute, list) or isinstance(comm, list)
        graph = Graph()
        sides = [x if isinstance(x, list) else [x] for x in (compute, comm)]
        fns = [[self._callable(t) for t in side] for side in sides]
        zipped = lists and pairing == "zip"
        if zipped and len(fns[0]) != len(fns[1]):
            raise ConfigError(f"{len(fns[0])} compute and {len(fns[1])} comm tasks")
        made = [graph.compute(fn) for fn in fns[0]]
        for i, fn in enumerate(fns[1]):
            takes = zipped and self._takes_one(fn)
            task = graph.comm(fn, *([made[i]] if takes else []))
            if zipped:
                graph.after(task, made[i])
        return self.run(self.compile(graph))

    def _callable(self, task):
        if isinstance(task, tuple):
            fn, args = task
            return lambda: fn(*args)
        if not callable(task):
            raise ConfigError(f"{task!r} is not callable")
        return task

    def _takes_one(self, fn):
        try:
            return len(inspect.signature(fn).parameters) == 1
        except ValueError:
            return False

    def graph(self):
        return Graph()

    def compile(self, graph, *, costs=None, agree=None):
        order = {"compute": [], "comm": []}
        for i, task in enumerate(graph.tasks):
            order[task.kind].append(i)
        if self.reason:
            first = [x for pair in zip(*order.values(), strict=False) for x in pair]
            rest = [i for lane in order.values() for i in lane if i not in first]
            order = {"serial": first + rest}
        digest = repr([(t.name, t.nbytes) for t in graph.tasks if t.kind == "comm"])
        return SimpleNamespace(
            tasks=graph.tasks, order={k: tuple(v) for k, v in order.items()}, digest=digest,
            serial=bool(self.reason), predicted_s=None,
        )  # fmt: skip

    def run(self, plan, bindings=None):
        with self.lock:
            self.counts["runs"] += 1
            self.counts["tasks"] += len(plan.tasks)
            self.counts["serial_runs"] += plan.serial
        return self.start(plan, bindings)

    def start(self, plan, bindings):
        return Run(self, plan.tasks, plan.order, bindings)

    def lane(self, name, stream=None, priority=0):
        kind = "compute" if name.startswith("compute") else "comm"
        return self.lanes.setdefault(name, SimpleNamespace(name=name, kind=kind))

    def overlap_batches(self, step_generators, *, min_tokens=None):
        results, pending = {}, [(i, g, None) for i, g in enumerate(step_generators)]
        while pending:
            i, generator, work = pending.pop(0)
            if work is not None:
                work.wait()
            try:
                pending.append((i, generator, next(generator)))
            except StopIteration as e:
                results[i] = e.value
        return [results[i] for i in sorted(results)]

    def layer_hooks(self, kv_stream):
        return kv_stream.send_layer

    def disable(self, reason):
        self.reason = reason

    def reset(self):
        self.reason = ""

    def explain(self, plan):
        return f"order {plan.order}" + (f"; serial: {self.reason}" if self.reason else "")

    def get_stats(self):
        for thread in self.threads:
            thread.join(WAIT_S)
        return OverlapStats(**self.counts, disabled_reason=self.reason)

    def close(self):
        self.closed = True
        for thread in self.threads:
            thread.join(WAIT_S)


# -- seeded bugs --------------------------------------------------------------------------


class CommBeforeItsCompute(Manager):
    def schedule(self, compute, comm, *, pairing="zip"):
        if isinstance(comm, list) and pairing == "zip":
            comm = [(lambda f=f: f(None) if self._takes_one(f) else f()) for f in comm]
            return super().schedule(compute, comm, pairing="none")
        return super().schedule(compute, comm, pairing=pairing)


class AlwaysSerial(Manager):
    def start(self, plan, bindings):
        order = [i for lane in plan.order.values() for i in lane]
        return Run(self, plan.tasks, {"compute": sorted(order)}, bindings)


class SwallowsErrors(Manager):
    def start(self, plan, bindings):
        run = super().start(plan, bindings)
        run.wait = lambda timeout_s=None: contextlib.suppress(Exception) and OverlapResult()
        return run


class GoesOnAfterFailure(Manager):
    def start(self, plan, bindings):
        for task in plan.tasks:
            task.fn = self.guarded(task.fn)
        run = super().start(plan, bindings)
        wait = run.wait

        def raise_late(timeout_s=None):
            result = wait(timeout_s)
            for x in (*result.compute, *result.comm):
                if isinstance(x, Exception):
                    run.error = x
                    raise x
            return result

        run.wait = raise_late
        return run

    def guarded(self, fn):
        def call(*args):
            try:
                return fn(*args)
            except Exception as e:
                return e

        return call


class ForgetsWorks(Manager):
    def schedule(self, compute, comm, *, pairing="zip"):
        if callable(comm) and not isinstance(comm, list):
            inner = comm
            comm = lambda: [inner()]  # noqa: E731
        return super().schedule(compute, comm, pairing=pairing)


class FlattersItself(Manager):
    def start(self, plan, bindings):
        run = super().start(plan, bindings)

        class Flattering(type(run)):
            @property
            def metrics(self):
                found = super().metrics
                fields = {f: getattr(found, f) for f in found.__slots__}
                return OverlapMetrics(**{**fields, "overlapped_s": found.comm_s, "eff_trace": 1.0})

        run.__class__ = Flattering
        return run


class DeafToCancel(Manager):
    def start(self, plan, bindings):
        run = super().start(plan, bindings)
        run.cancel = lambda: True
        return run


class CancelsWithoutAWord(Manager):
    def start(self, plan, bindings):
        run = super().start(plan, bindings)
        wait = run.wait

        def silent(timeout_s=None):
            try:
                return wait(timeout_s)
            except CancelledError:
                return OverlapResult()

        run.wait = silent
        return run


class OneDigest(Manager):
    def compile(self, graph, *, costs=None, agree=None):
        plan = super().compile(graph, costs=costs, agree=agree)
        plan.digest = "same"
        return plan


class NeverDisabled(Manager):
    def disable(self, reason):
        pass


class LeavesThreads(Manager):
    def schedule(self, compute, comm, *, pairing="zip"):
        if not hasattr(self, "idle"):
            self.idle = threading.Event()
            threading.Thread(target=self.idle.wait, args=(5,), daemon=True).start()
        return super().schedule(compute, comm, pairing=pairing)


class MissesLayers(Manager):
    def layer_hooks(self, kv_stream):
        return lambda i: kv_stream.send_layer(i) if i else None


class OneBatchAfterAnother(Manager):
    def overlap_batches(self, step_generators, *, min_tokens=None):
        results = []
        for generator in step_generators:
            with contextlib.suppress(CommTimeoutError):
                for work in generator:
                    work.wait(0.1)
            results.append(None)
        return results


class TakesAnything(Manager):
    def _callable(self, task):
        return (
            task if callable(task) else super()._callable(task) if isinstance(task, tuple) else max
        )


BUGS = {
    CommBeforeItsCompute: "pairs keep*",
    AlwaysSerial: "a pair runs*",
    SwallowsErrors: "a failing compute*",
    GoesOnAfterFailure: "a failing compute*",
    ForgetsWorks: "works are*",
    FlattersItself: "metrics*",
    DeafToCancel: "cancel*",
    CancelsWithoutAWord: "cancel*",
    OneDigest: "digests*",
    NeverDisabled: "disable*",
    LeavesThreads: "close",
    MissesLayers: "layer hooks",
    OneBatchAfterAnother: "micro-batches",
    TakesAnything: "bad arguments*",
}


def test_a_sound_manager_passes():
    report = check_overlap_manager(Manager)

    assert report.ok(reference=True), report.text()


@pytest.mark.parametrize(("bug", "check"), BUGS.items(), ids=[b.__name__ for b in BUGS])
def test_a_seeded_bug_is_caught(bug, check):
    assert not check_overlap_manager(bug, only=[check], timeout_s=3).ok()


def test_metrics_of_hand_made_intervals():
    intervals = [
        Interval(0, "k0", "compute", 0.0, 2.0),
        Interval(1, "k1", "compute", 3.0, 5.0),
        Interval(2, "c0", "comm", 1.0, 4.0),
        Interval(3, "c1", "comm.2", 3.5, 6.0),
    ]

    found = measure(intervals, 8.0)

    assert found == {
        "compute_s": 4.0,
        "comm_s": 5.0,
        "overlapped_s": 3.0,
        "exposed_s": 2.0,
        "idle:compute": 0.5,
        "idle:comm": 1 - 3 / 8,
        "idle:comm.2": 1 - 2.5 / 8,
    }


def test_metrics_without_tasks():
    assert measure([], 0.0)["comm_s"] == 0
