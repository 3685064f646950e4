"""Callers who are stopped while they begin a transfer: what they never got a handle of, ends."""

import sys
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from sagellm.comm.kv_transfer._flows import Chunk
from sagellm.comm.kv_transfer._lanes import LaneTuner
from sagellm.comm.kv_transfer._sending import Sending
from sagellm.comm.kv_transfer._writer import DataWriter
from sagellm.core.protocols import CommError, TransferKey


class StoppedError(BaseException):
    """What a signal handler raises."""


def begin(what, channel, peer):
    key = TransferKey("x")
    if what == "receive":
        return channel.receive(key, [5], source_node=peer, deadline_s=20)
    if what == "fetch":
        return channel.fetch(key, peer, [5], deadline_s=20)
    return channel.offer(key, [5], num_tokens=4, ttl_s=20)


@pytest.mark.parametrize("what", ["receive", "fetch", "offer"])
def test_what_has_begun_ends_with_its_interrupted_caller(pair, monkeypatch, eventually, what):
    out, _, into, b = pair()
    into.connect(out.node_id)
    result = Future.result

    def interrupted(self, timeout=None):
        got = result(self, timeout)
        if threading.current_thread() is threading.main_thread():
            raise StoppedError
        return got

    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(StoppedError):
            begin(what, into, out.node_id)
    eventually(lambda: not into._engine.pool.leases)
    if what == "receive":
        b["layer0"][5].fill_(1.0)  # the engine has given the block to another request
        with pytest.raises(CommError, match="stopped"):
            out.transfer([5], into.node_id, key=TransferKey("x"), deadline_s=5).wait()
        assert bool((b["layer0"][5] == 1.0).all())


def test_what_is_refused_leaves_no_completion(pair):
    out, _, into, _ = pair()
    into.receive(TransferKey("x"), [5], source_node=out.node_id)
    with pytest.raises(CommError):
        into.receive(TransferKey("y"), [5], source_node=out.node_id)
    assert not into.poll()
    assert into._engine.pool.leases == 1


def test_an_interrupted_push_keeps_its_blocks_until_nobody_sends_them(
    pair, monkeypatch, eventually
):
    out, _, into, b = pair()
    key = TransferKey("first")
    first = into.receive(key, [1], source_node=out.node_id)
    out.transfer([1], into.node_id, key=key).wait()
    first.wait()
    event = SimpleNamespace(query=lambda: ready, synchronize=lambda: None)
    ready = False
    monkeypatch.setattr(out._engine.pool, "mark", lambda: event)
    key = TransferKey("x")
    received = into.receive(key, [5], source_node=out.node_id, deadline_s=10)
    link = out._engine.links.ready(into.node_id)
    eventually(lambda: len(link.invitations))
    call = out._engine.loop.call

    def interrupted(callback):
        if sys._getframe(1).f_code is Sending._begin_here.__code__:
            raise StoppedError
        return call(callback)

    with monkeypatch.context() as patch:
        patch.setattr(out._engine.loop, "call", interrupted)
        with pytest.raises(StoppedError):
            out.transfer([5], into.node_id, key=key, deadline_s=10)
    before = b["layer0"][5].clone()
    eventually(lambda: not out._engine.pool.leases)
    ready = True
    with pytest.raises(CommError, match="stopped"):
        received.wait()
    assert bool((b["layer0"][5] == before).all())
    assert not out._engine.sending.in_flight()


def test_who_is_stopped_after_sending_leaves_the_lane_to_its_thread(
    pair, monkeypatch, works, eventually
):
    out, _, into, _ = pair()
    works(out, into)
    link = out._engine.links.ready(into.node_id)
    sent, stopped = DataWriter._sent, []

    def interrupted(self, count):
        sent(self, count)
        if threading.current_thread() is threading.main_thread():
            stopped.append(count)
            raise StoppedError

    key = TransferKey("x")
    handle = into.receive(key, [5], source_node=out.node_id, deadline_s=10)
    eventually(lambda: len(link.invitations) and link.writer._lanes[0].asleep)
    with monkeypatch.context() as patch:
        patch.setattr(DataWriter, "_sent", interrupted)
        with pytest.raises(StoppedError):
            out.transfer([5], into.node_id, key=key, deadline_s=10)
    assert stopped
    assert not any(lane.busy for lane in link.writer._lanes)
    with pytest.raises(CommError):
        handle.wait()
    eventually(lambda: link.error is not None)
    works(out, into, 1)


def test_the_rate_meter_is_at_rest_when_nothing_is_sent(pair, eventually):
    out, _, into, _ = pair()
    for i in range(20):
        key = TransferKey(f"x{i}")
        handle = into.receive(key, [i % 10], source_node=out.node_id)
        if i:
            link = out._engine.links.ready(into.node_id)
            eventually(lambda link=link: len(link.invitations) and link.writer._lanes[0].asleep)
        out.transfer([i % 10], into.node_id, key=key).wait()
        handle.wait()
    rate = out._engine.links.ready(into.node_id).writer._rate
    eventually(lambda: rate._pieces == 0)


def test_what_was_encoded_and_is_not_sent_gives_its_credits_back():
    done, left = [], []
    piece = SimpleNamespace(done=lambda: done.append(1))
    flow = SimpleNamespace(coded=lambda chunk: piece, leave=lambda: left.append(1))
    writer = DataWriter(1 << 20, 1.0, None, LaneTuner(1, 1), None)
    writer._rate.begin()
    lane = SimpleNamespace(ahead=(flow, Chunk(0, 0, 1), None))
    writer._drop_ahead(lane)
    assert done == left == [1]
    assert lane.ahead is None
