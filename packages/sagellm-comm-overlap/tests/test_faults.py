"""What happens when tasks raise, peers stay silent, runs are cancelled, nested or closed on."""

import threading
from concurrent.futures import CancelledError, Future
from unittest.mock import Mock

import pytest

from sagellm.comm.overlap import OverlapPolicy
from sagellm.core.protocols import (
    CommBackendProtocol,
    CommTimeoutError,
    CompletedWork,
    ConfigError,
    PeerLostError,
)

WAIT_S = 10.0


def group(size=2):
    backend = Mock(spec=CommBackendProtocol)
    backend.size, backend.rank, backend.device_type = size, 0, "cpu"
    return backend


def test_what_compute_raises_reaches_wait_and_skips_the_rest(manager):
    ran = []

    def broken():
        raise ZeroDivisionError("no such number")

    handle = manager.schedule(
        [broken, lambda: ran.append("compute")], [lambda: ran.append("comm")] * 2
    )

    with pytest.raises(ZeroDivisionError, match="no such number") as caught:
        handle.wait()
    assert "task 'broken[0]' (id 0) on lane 'compute'" in caught.value.__notes__[0]
    assert ran == []
    assert isinstance(handle.exception(), ZeroDivisionError)
    assert handle.done()
    assert manager.get_stats().failed == 1


def test_running_tasks_end_before_wait_raises(manager):
    started, failing, ended = threading.Event(), threading.Event(), threading.Event()

    def slow():
        started.set()
        assert failing.wait(WAIT_S)
        ended.set()

    def broken():
        assert started.wait(WAIT_S)
        failing.set()
        raise ValueError("broken")

    handle = manager.schedule(broken, slow)

    with pytest.raises(ValueError, match="broken"):
        handle.wait()
    assert ended.is_set()


@pytest.mark.parametrize("how", ["raised", "work failed", "future failed"])
def test_what_communication_fails_with_reaches_wait(manager, how):
    lost = PeerLostError("rank 1 left", rank=1)
    future = Future()
    future.set_exception(lost)

    def comm():
        if how == "raised":
            raise lost
        return CompletedWork(None, lost) if how == "work failed" else future

    handle = manager.schedule([lambda: 1, lambda: 2], [comm, lambda: 3])

    with pytest.raises(PeerLostError, match="rank 1 left") as caught:
        handle.wait()
    assert caught.value is lost
    assert "on lane 'comm'" in caught.value.__notes__[0]


def test_a_timeout_raised_by_a_future_is_not_our_deadline(manager):
    future = Future()
    future.set_exception(TimeoutError("the user's own"))

    with pytest.raises(TimeoutError, match="the user's own") as caught:
        manager.schedule(lambda: None, lambda: future).wait()
    assert not isinstance(caught.value, CommTimeoutError)


@pytest.mark.parametrize("kind", ["concurrent", "torch", "list"])
def test_a_silent_peer_ends_in_an_error_that_names_task_and_lane(make_manager, kind):
    import torch

    manager = make_manager(timeout_s=0.2)
    silent = torch.futures.Future() if kind == "torch" else Future()

    def halo_exchange():
        return [CompletedWork(1), silent] if kind == "list" else silent

    handle = manager.schedule([lambda: 1, lambda: 2], [halo_exchange, lambda: 3])

    with pytest.raises(CommTimeoutError, match=r"'halo_exchange\[0\]' on lane 'comm'"):
        handle.wait(WAIT_S)
    silent.set_result(None)


def test_a_wait_that_ends_early_names_what_runs_and_the_run_goes_on(manager):
    hold = threading.Event()

    def long_matmul():
        assert hold.wait(WAIT_S)
        return 1

    handle = manager.schedule(long_matmul, lambda: 2)
    with pytest.raises(CommTimeoutError, match=r"'long_matmul\[0\]' on lane 'compute' \(running\)"):
        handle.wait(0.01)
    with pytest.raises(CommTimeoutError):
        handle.result()
    with pytest.raises(ConfigError, match="not over"):
        _ = handle.metrics
    before = handle.done(), handle.exception()
    hold.set()

    assert before == (False, None)
    assert handle.wait().compute == (1,)


def blocked_run(manager):
    """A run whose first compute task waits; then two more tasks, and one communication."""
    running, hold, ran = threading.Event(), threading.Event(), []

    def first():
        running.set()
        assert hold.wait(WAIT_S)
        ran.append("first")

    graph = manager.graph()
    a = graph.compute(first)
    b = graph.compute(lambda _: ran.append("feeds"), a)
    graph.comm(lambda _: ran.append("comm"), b)
    graph.compute(lambda _: ran.append("local"), a)
    handle = manager.run(manager.compile(graph))
    assert running.wait(WAIT_S)
    return handle, hold, ran


def test_cancel_never_skips_what_peers_wait_for(make_manager):
    manager = make_manager(comm_backend=group())
    handle, hold, ran = blocked_run(manager)

    cancelled = handle.cancel()
    again = handle.cancel()
    hold.set()

    with pytest.raises(CancelledError, match="compute3"):
        handle.wait()
    assert (cancelled, again) == (True, False)
    assert ran == ["first", "feeds", "comm"]
    assert handle.done()
    assert handle.exception() is None


def test_cancel_skips_all_where_there_are_no_peers(make_manager):
    manager = make_manager(comm_backend=group(size=1))
    handle, hold, ran = blocked_run(manager)

    cancelled = handle.cancel()
    hold.set()

    with pytest.raises(CancelledError):
        handle.wait()
    assert cancelled
    assert ran == ["first"]
    assert manager.schedule(lambda: 1, lambda: 2).wait().comm == (2,)


def test_cancel_of_a_finished_run_changes_nothing(manager):
    handle = manager.schedule(lambda: 1, lambda: 2)
    handle.wait()

    assert not handle.cancel()
    assert handle.wait().compute == (1,)


def test_lanes_go_on_after_a_cancelled_run_that_never_started(make_manager):
    manager = make_manager(comm_backend=group(size=1))
    hold = threading.Event()
    first = manager.schedule(lambda: hold.wait(WAIT_S), lambda: hold.wait(WAIT_S))
    second = manager.schedule([lambda: 1] * 3, [lambda: 2] * 3)
    third = manager.schedule(lambda: "after", lambda: "after")

    assert second.cancel()
    assert second.done()
    hold.set()

    assert third.wait().compute == ("after",)
    assert first.wait().comm == (True,)


@pytest.mark.parametrize("lane", ["compute", "comm"])
def test_a_run_inside_a_task_does_not_hang(manager, lane):
    def nested():
        inner = manager.schedule([lambda: 1, lambda: 2], [lambda x: x + 10, lambda x: x + 10])
        return inner.wait().comm

    pair = (nested, lambda: 0) if lane == "compute" else (lambda: 0, nested)
    result = manager.schedule(*pair).wait()

    assert getattr(result, lane) == ((11, 12),)


@pytest.mark.parametrize("lane", ["compute", "comm"])
def test_a_run_inside_a_task_waits_for_its_handles(manager, lane):
    waited = []

    class Handle:
        def wait(self, timeout_s=None):
            waited.append("waited")
            return 5

        def exception(self):
            return None

    def nested():
        return manager.schedule(lambda: 1, lambda: Handle()).wait().comm

    def nothing():
        return manager.schedule([], []).wait().comm

    pair = (nested, nothing) if lane == "compute" else (nothing, nested)
    result = manager.schedule(*pair).wait()

    assert getattr(result, lane) == ((5,),)
    assert waited == ["waited"]
    assert manager.get_stats().runs == 3  # the empty one inside counts and ends as well


def test_a_failed_batch_aborts_the_group(make_manager):
    backend = group()
    manager = make_manager(comm_backend=backend)

    def bad():
        yield CompletedWork(1)
        raise ValueError("bad batch")

    with pytest.raises(ValueError, match="bad batch"):
        manager.overlap_batches([bad()])

    assert "bad batch" in backend.abort.call_args.args[0]


def test_what_a_nested_run_raises_comes_through_both(manager):
    def inner():
        raise KeyError("inner")

    def outer():
        return manager.schedule(inner, lambda: 0).wait()

    with pytest.raises(KeyError, match="inner") as caught:
        manager.schedule(outer, lambda: 0).wait()
    assert len(caught.value.__notes__) == 2


def test_a_failed_run_aborts_the_group_that_is_out_of_step(make_manager):
    backend = group()
    manager = make_manager(comm_backend=backend)

    def broken():
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        manager.schedule([broken], [lambda: None]).wait()

    manager.close()
    (reason,) = backend.abort.call_args.args
    assert "broken" in reason
    assert "bad row" in reason


@pytest.mark.parametrize("why", ["policy", "no communication left", "one rank"])
def test_a_group_in_step_is_not_aborted(make_manager, why):
    backend = group(size=1 if why == "one rank" else 2)
    manager = make_manager(comm_backend=backend, policy=OverlapPolicy(abort_group=why != "policy"))

    def broken():
        raise ValueError("bad row")

    comms = [] if why == "no communication left" else [lambda: None]
    pairing = "none" if why == "no communication left" else "zip"
    with pytest.raises(ValueError, match="bad row"):
        manager.schedule([broken], comms, pairing=pairing).wait()

    manager.close()
    backend.abort.assert_not_called()


def test_close_waits_for_runs_and_refuses_new_ones(make_manager):
    manager = make_manager()
    hold, closing = threading.Event(), threading.Event()
    handle = manager.schedule(lambda: hold.wait(WAIT_S), lambda: 1)

    def close():
        closing.set()
        manager.close()

    closer = threading.Thread(target=close)
    closer.start()
    assert closing.wait(WAIT_S)
    hold.set()
    closer.join(WAIT_S)

    assert not closer.is_alive()
    assert handle.wait(0).compute == (True,)
    with pytest.raises(ConfigError, match="closed"):
        manager.schedule(lambda: 1, lambda: 2)
    manager.close()


def test_close_gives_up_at_the_deadline_and_says_on_what(make_manager):
    manager = make_manager(timeout_s=0.05)
    hold, skipped = threading.Event(), []

    def stuck():
        return hold.wait(WAIT_S)

    handle = manager.schedule([stuck, lambda: skipped.append(1)], [lambda: None] * 2)
    with pytest.raises(CommTimeoutError, match=r"'stuck\[0\]' on lane 'compute'"):
        manager.close()
    hold.set()

    with pytest.raises(CommTimeoutError, match="closed while running"):
        handle.wait(WAIT_S)
    assert skipped == []


def test_a_task_may_close_its_manager(make_manager):
    manager = make_manager()

    handle = manager.schedule([manager.close, lambda: 1], [lambda: 2, lambda: 3])

    assert handle.wait().comm == (2, 3)


def test_lanes_survive_a_failed_run(manager):
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            manager.schedule([lambda: 1 / 0] * 4, [lambda: 1] * 4).wait()

    assert manager.schedule(lambda: 1, lambda: 2).wait().comm == (2,)
    assert manager.get_stats().failed == 3
