"""Calls to a channel's thread: what raises has no effect later."""

import functools
import signal
import threading

import pytest
import torch

from sagellm.comm.kv_transfer._loop import EventLoop
from sagellm.core.protocols import CommTimeoutError, TransferKey


@pytest.fixture
def loop():
    made = EventLoop("kv-test")
    made.start()
    yield made
    made.stop()


def test_a_call_that_timed_out_never_runs(loop):
    go, ran = threading.Event(), []
    loop.call(lambda: go.wait(10))

    with pytest.raises(CommTimeoutError, match=r"busy for 0\.05 s"):
        loop.run(lambda: ran.append("late"), 0.05)
    go.set()

    assert loop.run(lambda: "next") == "next"
    assert ran == []


@pytest.fixture
def interruptible():
    """SIGINT raises here, also where whoever started the tests had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_call_that_is_interrupted_never_runs(loop, interruptible):
    go, ran = threading.Event(), []
    loop.call(lambda: go.wait(10))
    interrupt = threading.Timer(
        0.5, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]
    )
    interrupt.start()

    with pytest.raises(KeyboardInterrupt):
        loop.run(lambda: ran.append("late"), 10.0)
    interrupt.join()
    go.set()

    assert loop.run(lambda: "next") == "next"
    assert ran == []


def test_a_call_that_has_begun_is_waited_for(loop):
    go = threading.Event()

    def slow():
        threading.Timer(1.2, go.set).start()
        assert go.wait(10)
        return "done"

    assert loop.run(slow, 1.0) == "done"


def test_a_call_is_told_apart_from_a_timeout_that_it_raises_itself(loop):
    def late():
        raise CommTimeoutError("its own")

    with pytest.raises(CommTimeoutError, match="its own"):
        loop.run(late)


def test_a_receive_that_raised_takes_no_push(pair, monkeypatch):
    out, _, into, b = pair()
    loop, go = into._engine.loop, threading.Event()
    with monkeypatch.context() as m:
        m.setattr(loop, "run", functools.partial(loop.run, timeout_s=0.05))
        loop.call(lambda: go.wait(10))
        with pytest.raises(CommTimeoutError):
            into.receive(TransferKey("a"), [1], deadline_s=60)
    go.set()
    ours = b["layer0"][1].clone()

    t = out.transfer([3], into.node_id, key=TransferKey("a"), deadline_s=1.0)

    with pytest.raises(Exception, match="has not said `receive`"):
        t.wait(10)
    assert torch.equal(b["layer0"][1], ours)
