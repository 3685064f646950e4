"""Device lanes against a stand-in for `torch.cuda` that records what is issued."""

import contextlib
from concurrent.futures import Future
from unittest.mock import Mock

import pytest
import torch

from sagellm.comm.overlap import OverlapManager, manager as manager_module
from sagellm.core.protocols import (
    BackendUnavailableError,
    CommBackendProtocol,
    CommTimeoutError,
    CompletedWork,
    ConfigError,
)


class FakeEvent:
    def __init__(self, api, timing):
        self.api, self.timing, self.at, self.on = api, timing, None, None

    def record(self, stream):
        self.on, self.at = stream, len(self.api.log)
        self.api.log.append(("record", stream.name))

    def query(self):
        return self.api.finished

    def elapsed_time(self, later):
        assert self.timing
        return float(later.at - self.at)


class FakeStream:
    def __init__(self, api, name, priority=0):
        self.api, self.name, self.priority = api, name, priority

    def wait_event(self, event):
        self.api.log.append(("wait", self.name, event.on.name))


class FakeDevice:
    """Streams named s1, s2, … in order of making; `main` is the caller's."""

    def __init__(self):
        self.log, self.made, self.finished = [], [], True
        self.stack = [FakeStream(self, "main")]

    def is_available(self):
        return True

    def Stream(self, *, priority=0):  # noqa: N802
        self.made.append(FakeStream(self, f"s{len(self.made) + 1}", priority))
        return self.made[-1]

    def Event(self, *, enable_timing=False):  # noqa: N802
        return FakeEvent(self, enable_timing)

    def current_stream(self):
        return self.stack[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        self.stack.append(stream)
        try:
            yield
        finally:
            self.stack.pop()


@pytest.fixture
def device(monkeypatch):
    fake = FakeDevice()
    monkeypatch.setattr(manager_module, "device_api", lambda kind: fake)
    return fake


def test_tasks_are_issued_on_their_lanes_streams_with_events_between(device):
    manager = OverlapManager(device="cuda")

    def task(name):
        def run(*_):
            device.log.append((name, device.current_stream().name))
            return torch.ones(1)

        return run

    handle = manager.schedule([task("a0"), task("a1")], [task("c0"), task("c1")])

    issued = [entry for entry in device.log if entry[0] in {"a0", "a1", "c0", "c1"}]
    assert issued == [("a0", "s1"), ("c0", "s2"), ("a1", "s1"), ("c1", "s2")]
    assert device.log.index(("wait", "s2", "s1")) < device.log.index(("c0", "s2"))
    assert device.log[0] == ("record", "main")
    assert [stream.priority for stream in device.made] == [0, -1]
    assert handle.done()
    assert len(handle.wait().comm) == 2
    assert ("wait", "main", "s2") in device.log  # the caller's stream goes on after the lanes
    assert handle.metrics.intervals == ()  # host times of issue are no times of execution
    assert not handle.cancel()
    manager.close()


def test_a_device_that_is_not_through_times_out(device):
    device.finished = False
    manager = OverlapManager(device="cuda", timeout_s=0.05)

    handle = manager.schedule(lambda: 1, lambda: 2)

    assert not handle.done()
    with pytest.raises(CommTimeoutError, match="lanes comm, compute"):
        handle.wait()
    device.finished = True
    assert handle.wait().compute == (1,)


def test_traced_runs_take_their_times_from_events(device):
    manager = OverlapManager(device="cuda", trace=True)

    handle = manager.schedule([lambda: 1], [lambda: CompletedWork(2)])
    result = handle.wait()

    assert result.comm == (2,)
    spans = {item.lane: (item.start_s, item.end_s) for item in handle.metrics.intervals}
    assert set(spans) == {"compute", "comm"}
    assert all(end > start > 0 for start, end in spans.values())


def test_what_a_task_raises_while_it_is_issued_ends_the_run(device):
    manager = OverlapManager(device="cuda", timeout_s=0.05)
    ran = []

    def broken():
        raise ValueError("shape")

    handle = manager.schedule([broken], [lambda: ran.append(1)])

    with pytest.raises(ValueError, match="shape"):
        handle.wait()
    assert ran == []
    silent = manager.schedule(lambda: 1, lambda: Future())
    with pytest.raises(CommTimeoutError, match="on lane 'comm'"):
        silent.wait()


def test_a_lane_takes_a_given_stream_and_hooks_hand_over_events(device):
    manager = OverlapManager(device="cuda")
    mine = FakeStream(device, "mine")
    sent = []

    class Sink:
        def send_layer(self, index, after=None):
            sent.append((index, after.on.name))

    lane = manager.lane("comm", stream=mine)
    high = manager.lane("kv", priority=3)
    manager.schedule(lambda: 1, lambda: device.log.append(("on", device.current_stream().name)))
    manager.layer_hooks(Sink())(7)

    assert lane.stream is mine
    assert high.stream.priority == -3
    assert ("on", "mine") in device.log
    assert sent == [(7, "main")]


def test_without_a_device_cuda_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this host has CUDA")

    with pytest.raises(BackendUnavailableError, match="no device"):
        OverlapManager(device="cuda")


def test_lanes_wait_for_what_the_caller_issued_before(device):
    OverlapManager(device="cuda").schedule(
        lambda: device.log.append(("ran", "compute")), lambda: device.log.append(("ran", "comm"))
    )

    for lane in ("s1", "s2"):
        assert device.log.index(("wait", lane, "main")) < device.log.index(("ran", "compute"))


def test_traces_of_a_device_hold_its_own_times(device):
    manager = OverlapManager(device="cuda", trace=True)
    device.finished = False
    manager.schedule([lambda: 1], [lambda: 2])
    before = manager.trace_runs(), manager.get_stats().runs
    device.finished = True

    (run,) = manager.trace_runs()

    assert before == ((), 0)
    assert all(item.end_s > item.start_s for item in run.intervals)
    assert manager.get_stats().tasks == 2


def test_a_run_that_fails_while_it_is_issued_aborts_the_group(device):
    backend = Mock(spec=CommBackendProtocol)
    backend.size, backend.rank = 2, 0
    manager = OverlapManager(backend, device="cuda")

    with pytest.raises(ZeroDivisionError):
        manager.schedule([lambda: 1 / 0], [lambda: None]).wait()

    assert "ZeroDivisionError" in backend.abort.call_args.args[0]


def test_close_waits_for_the_device_and_refuses_new_runs(device):
    manager = OverlapManager(device="cuda", timeout_s=0.05)
    manager.schedule(lambda: 1, lambda: 2)
    device.finished = False

    with pytest.raises(CommTimeoutError, match="lanes comm, compute"):
        manager.close()
    device.finished = True
    manager.close()

    with pytest.raises(ConfigError, match="closed"):
        manager.schedule(lambda: 1, lambda: 2)
