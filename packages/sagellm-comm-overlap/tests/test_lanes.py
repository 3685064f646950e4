"""Real lanes: side by side, in order, with the caller's state; what tasks may return."""

import asyncio
import contextvars
import itertools
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, strategies as st

from sagellm.comm.overlap import OverlapManager, OverlapPolicy
from sagellm.core.protocols import CommTimeoutError, CompletedWork, ConfigError

WAIT_S = 10.0


def test_a_pair_of_functions_runs_side_by_side(manager):
    both = threading.Barrier(2)  # passes only if compute and communication are in it together

    handle = manager.schedule(lambda: both.wait(WAIT_S) >= 0, lambda: both.wait(WAIT_S) >= 0)

    assert handle.wait().compute == (True,)
    assert handle.result().comm == (True,)
    assert handle.done()
    assert handle.exception() is None
    assert handle.metrics.overlapped_s > 0


def test_communication_runs_under_the_next_compute(manager):
    sent, computed = threading.Event(), threading.Event()

    def compute_1():
        assert sent.wait(WAIT_S)  # the communication of compute 0 has begun
        computed.set()
        return "b"

    def comm_0(x):
        sent.set()
        assert computed.wait(WAIT_S)  # and ends only after compute 1 ran
        return x * 2

    handle = manager.schedule([lambda: "a", compute_1], [comm_0, lambda x: x * 3])

    assert handle.wait().compute == ("a", "b")
    assert handle.wait().comm == ("aa", "bbb")


def test_results_go_only_to_functions_that_ask(manager):
    got = []

    handle = manager.schedule(
        [lambda: 1, lambda: 2, lambda: 3, lambda: 4],
        [lambda x: x, lambda: "none", lambda i=7: i, (got.append, ("bound",))],
    )

    assert handle.wait().comm == (1, "none", 7, None)
    assert got == ["bound"]


def test_independent_lists_may_differ_in_length(manager):
    result = manager.schedule([lambda: 1, (int, ("2",))], lambda: 3, pairing="none").wait()

    assert result.compute == (1, 2)
    assert result.comm == (3,)


@pytest.mark.parametrize(
    ("compute", "comm", "pairing", "says"),
    [
        ([len], [], "zip", "1 compute and 0"),
        (3, list, "zip", "neither callable"),
        ([list, 4], [list, list], "zip", "task 1 is 4"),
        (lambda x: x, list, "zip", "needs 1 arguments"),
        ([list], [lambda x, y: x], "zip", "needs 2 arguments"),
        ([list], [(lambda x, y: x, (1,))], "zip", "missing a required argument: 'y'"),
        ((lambda: 1, (1, 2)), list, "zip", "the 2 given"),
        (list, list, "cross", "not one of"),
    ],
)
def test_bad_schedules_are_refused(manager, compute, comm, pairing, says):
    with pytest.raises(ConfigError, match=says):
        manager.schedule(compute, comm, pairing=pairing)


def test_tasks_see_the_state_of_the_caller(manager):
    setting = contextvars.ContextVar("setting", default="other")
    setting.set("mine")

    def state():
        return (
            setting.get(),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
            torch.get_num_threads(),
        )

    threads = torch.get_num_threads()
    plain = manager.schedule(state, state).wait()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inference = manager.schedule(state, state).wait()
    with torch.no_grad():
        frozen = manager.schedule(state, state).wait()

    assert plain.compute == plain.comm == (("mine", False, True, False, threads),)
    want = ("mine", True, False, torch.bfloat16, threads)
    assert inference.compute == inference.comm == (want,)
    assert frozen.compute == (("mine", False, False, False, threads),)


def test_futures_and_works_are_waited_for(manager):
    ours, theirs = Future(), torch.futures.Future()
    release = threading.Event()

    def finish_later():
        assert release.wait(WAIT_S)
        ours.set_result("concurrent")
        theirs.set_result("torch")

    def let_go():
        release.set()

    with ThreadPoolExecutor(1) as pool:
        finisher = pool.submit(finish_later)
        handle = manager.schedule(
            [lambda: None, lambda: None, let_go, lambda: None],
            [
                lambda: ours,
                lambda: theirs,
                lambda: CompletedWork("work"),
                lambda: [CompletedWork(1), CompletedWork(2)],
            ],
        )
        result = handle.wait()
        finisher.result(WAIT_S)

    assert result.comm == ("concurrent", "torch", "work", [1, 2])


def test_works_beside_other_values_are_waited_for(manager):
    future = Future()

    def late():
        future.set_result("landed")

    handle = manager.schedule([lambda: 0, late], [lambda: ("tensor", future), lambda: [None]])

    assert handle.wait().comm == (("tensor", "landed"), [None])


def test_compute_may_return_a_future_too(manager):
    future = Future()

    def free():
        future.set_result(3)

    assert manager.schedule(lambda: future, free).wait().compute == (3,)


def test_a_paired_communication_that_takes_nothing_still_waits_for_its_compute(manager):
    begun, hold, order = threading.Event(), threading.Event(), []

    def compute():
        begun.set()
        assert hold.wait(WAIT_S)
        order.append("compute")

    handle = manager.schedule([compute], [lambda: order.append("comm")])
    assert begun.wait(WAIT_S)
    hold.set()
    handle.wait()

    assert order == ["compute", "comm"]


def test_a_communication_ends_when_its_future_says_so(manager):
    class Watched(Future):
        def __init__(self):
            super().__init__()
            self.watched = threading.Event()

        def add_done_callback(self, fn):
            super().add_done_callback(fn)
            self.watched.set()

    first, second = Watched(), Watched()

    def end_out_of_order():
        assert first.watched.wait(WAIT_S)
        assert second.watched.wait(WAIT_S)
        second.set_result(None)
        first.set_result(None)

    graph = manager.graph()
    a = graph.comm(lambda: first)
    b = graph.comm(lambda: second)
    graph.compute(end_out_of_order)
    handle = manager.run(manager.compile(graph))
    handle.wait()

    ends = {item.task: item.end_s for item in handle.metrics.intervals}
    assert ends[b] < ends[a]


def test_a_dependant_waits_for_the_work_and_gets_its_result(manager):
    future = Future()
    seen = []
    free = manager.graph()
    free.compute(lambda: future.set_result(5))
    free.compute(seen.append, free.comm(lambda: future))
    manager.run(manager.compile(free)).wait()

    assert seen == [5]


def test_lanes_keep_at_most_max_inflight(make_manager):
    manager = make_manager(policy=OverlapPolicy(max_inflight=2))
    futures = [Future() for _ in range(4)]
    issued = [threading.Event() for _ in range(4)]

    def issue(at):
        issued[at].set()
        return futures[at]

    handle = manager.schedule([], [(issue, (at,)) for at in range(4)], pairing="none")
    assert issued[1].wait(WAIT_S)
    third_early = issued[2].is_set()
    futures[0].set_result(None)
    assert issued[2].wait(WAIT_S)
    fourth_early = issued[3].is_set()
    for future in futures[1:]:
        future.set_result(None)
    handle.wait()

    assert not third_early
    assert not fourth_early


def test_runs_of_many_threads_keep_the_order_of_each_lane(manager):
    log = []

    def submit(who):
        handles = [
            manager.schedule(
                [lambda: None] * 3, [(log.append, ((who, run, at),)) for at in range(3)]
            )
            for run in range(5)
        ]
        for handle in handles:
            handle.wait()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(submit, range(4)))

    for who in range(4):
        mine = [entry for entry in log if entry[0] == who]
        assert mine == sorted(mine)
    runs = [key for key, _ in itertools.groupby((who, run) for who, run, _ in log)]
    assert len(runs) == len(set(runs)) == 20  # no run's communications cut into another's


def test_a_run_can_be_awaited(manager):
    both = threading.Barrier(2)

    async def main():
        handle = manager.schedule(lambda: both.wait(WAIT_S) >= 0, lambda: both.wait(WAIT_S) >= 0)
        first = await handle
        return first, await handle

    first, second = asyncio.run(main())

    assert first == second
    assert first.comm == (True,)


def test_awaiting_a_run_has_the_deadline_of_wait(make_manager):
    manager = make_manager(timeout_s=0.1)
    hold = threading.Event()

    def stuck():
        return hold.wait(WAIT_S)

    handle = manager.schedule(stuck, lambda: 1)

    async def main():
        await handle

    with pytest.raises(CommTimeoutError, match=r"'stuck\[0\]' on lane 'compute'"):
        asyncio.run(main())
    hold.set()
    assert handle.wait(WAIT_S).compute == (True,)


def test_three_lanes_run_side_by_side(manager):
    meet = threading.Barrier(3)
    graph = manager.graph()
    graph.compute(lambda: meet.wait(WAIT_S))
    graph.compute(lambda: meet.wait(WAIT_S), lane="compute-mlp")
    graph.comm(lambda: meet.wait(WAIT_S), lane="kv")

    handle = manager.run(manager.compile(graph))

    assert sorted((*handle.wait().compute, *handle.wait().comm)) == [0, 1, 2]
    assert set(handle.metrics.idle) == {"compute", "compute-mlp", "kv"}


def test_an_empty_run_is_over_at_once(manager):
    handle = manager.schedule([], [])

    assert handle.wait().compute == ()
    assert handle.metrics.makespan_s == 0
    assert manager.get_stats().runs == 1


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 20))
    return [
        (
            draw(st.sampled_from(["compute", "compute1", "comm", "kv"])),
            sorted(draw(st.sets(st.integers(0, at - 1), max_size=3))) if at else [],
            draw(st.booleans()),
            draw(st.integers(1, 5)),
        )
        for at in range(count)
    ]


@given(graphs(), st.booleans())
def test_any_graph_runs_in_order_and_gives_the_serial_values(tasks, disabled):
    def value(at, *inputs):
        return (at, *inputs)

    with OverlapManager(device="cpu", timeout_s=10.0) as manager:
        if disabled:
            manager.disable("a test")
        graph = manager.graph()
        for at, (lane, deps, as_future, cost) in enumerate(tasks):

            def fn(*inputs, at=at, as_future=as_future):
                result = value(at, *inputs)
                return CompletedWork(result) if as_future else result

            add = graph.compute if lane.startswith("compute") else graph.comm
            add(fn, *deps, lane=lane, cost_s=float(cost))
        plan = manager.compile(graph)
        handle = manager.run(plan)
        result = handle.wait()
        metrics = handle.metrics

    want = []
    for at, (_, deps, _, _) in enumerate(tasks):
        want.append(value(at, *(want[dep] for dep in deps)))
    kinds = [lane.startswith("compute") for lane, *_ in tasks]
    assert result.compute == tuple(w for w, k in zip(want, kinds, strict=True) if k)
    assert result.comm == tuple(w for w, k in zip(want, kinds, strict=True) if not k)
    ran = {item.task: item for item in metrics.intervals}
    assert len(ran) == len(tasks)
    for at, (_, deps, _, _) in enumerate(tasks):
        assert all(ran[at].start_s >= ran[dep].end_s for dep in deps)
    for lane, order in plan.order.items():
        starts = [ran[task].start_s for task in order]
        assert starts == sorted(starts)
        if lane.startswith("compute"):  # lanes of compute hold one task at a time
            assert all(ran[b].start_s >= ran[a].end_s for a, b in itertools.pairwise(order))
    if plan.serial:
        line = [ran[task] for task in plan.sequence]
        assert all(b.start_s >= a.end_s for a, b in itertools.pairwise(line))


@given(graphs())
def test_a_run_never_beats_its_measured_bound(tasks):
    with OverlapManager(device="cpu", timeout_s=10.0) as manager:
        graph = manager.graph()
        for lane, deps, _, _ in tasks:
            add = graph.compute if lane.startswith("compute") else graph.comm
            add(lambda *_: sum(range(200)), *deps, lane=lane)
        handle = manager.run(manager.compile(graph))
        handle.wait()

    assert handle.metrics.bound_s <= handle.metrics.makespan_s * (1 + 1e-9)
    assert handle.metrics.bound_ratio <= 1 + 1e-9
