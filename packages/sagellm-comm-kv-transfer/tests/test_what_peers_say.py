"""What peers say, and what they send slowly, takes bounded memory and costs no other peer."""

import threading
from types import SimpleNamespace

import pytest

from sagellm.comm.kv_transfer import _coded_in
from sagellm.comm.kv_transfer._coded_in import CodedReader
from sagellm.comm.kv_transfer._coded_threads import CodecThreads
from sagellm.comm.kv_transfer._flows import Flow
from sagellm.comm.kv_transfer._heard import HEARD_BYTES, Heard
from sagellm.comm.kv_transfer.wire import KeyFail
from sagellm.core.protocols import CommError, CommTimeoutError, TransferKey

MIB = 1 << 20


def test_failures_that_a_peer_makes_up_take_bounded_memory(channel):
    engine = channel()._engine
    link = SimpleNamespace(peer=1, error=None)
    long = chr(0x1F600) * 2048

    def hear():
        for i in range(2 * HEARD_BYTES // 4096):
            failed = KeyFail(f"{i:0512d}", 0, "layout_mismatch", long, long, long)
            engine.on_message(link, failed)

    engine.loop.run(hear, 60)
    for heard in (engine.sending._heard, engine.receiving._heard):
        assert 0 < heard.used_bytes <= HEARD_BYTES
        assert all(
            len(text) <= 1000
            for error, _ in heard._peers[1].values()
            for text in (str(error), error.ours, error.theirs)
        )


def test_what_one_peer_says_does_not_evict_what_another_has_said():
    heard = Heard(limit=100)
    heard[2, TransferKey("honest")] = CommTimeoutError("late")
    for i in range(1000):
        heard[1, TransferKey(str(i))] = CommError("made up")
    assert isinstance(heard.get((2, TransferKey("honest"))), CommTimeoutError)
    assert heard.get((1, TransferKey("999"))) is not None
    assert heard.get((1, TransferKey("0"))) is None
    assert sum(map(len, heard._peers.values())) == 100


class Drip:
    """A connection whose bytes come when they are let."""

    def __init__(self):
        self.asked, self.let = threading.Event(), threading.Event()
        self.got = 0

    def receive(self, views, timeout_s):
        self.asked.set()
        assert self.let.wait(20)
        self.got += sum(map(len, views))
        return 1


class CodedFlow(Flow):
    """A flow whose frames are all of one size."""

    def __init__(self, raw):
        super().__init__(None, 1)
        self.extent = SimpleNamespace(span_bytes=lambda *a: raw)
        self.failed = []
        self.broken = self.failed.append


@pytest.fixture
def receives(monkeypatch):
    monkeypatch.setattr(_coded_in, "codable", lambda *a: True)
    threads = CodecThreads("kv-test", 1, 64 * MIB)

    def receive(reader, conn, raw):
        flow = CodedFlow(raw)
        assert flow.enter()
        head = SimpleNamespace(layer=0, first=0, count=1, payload_bytes=raw)
        running = threading.Thread(target=reader.receive, args=(conn, flow, head, b""))
        running.start()
        return flow, running

    def reader(io_timeout_s=20.0):
        made = CodedReader(
            threads, lambda *a: None, lambda e: None, io_timeout_s=io_timeout_s, traffic=None
        )
        monkeypatch.setattr(made, "_finish", lambda *a: made._give(a[5]))
        return made

    yield reader, receive, threads
    threads.close()


def test_a_peer_whose_coded_frames_drip_leaves_room_to_others(receives, eventually):
    make, receive, threads = receives
    slow, honest = make(), make()
    drips = [Drip() for _ in range(2)]
    begun = [receive(slow, drip, 16 * MIB) for drip in drips]
    eventually(lambda: any(d.asked.is_set() for d in drips))
    good = Drip()
    good.let.set()
    flow, running = receive(honest, good, 4096)
    running.join(15)
    assert not running.is_alive()
    assert not flow.failed
    assert good.got == 4096
    for flow, _ in begun:
        flow.stop()
    for drip in drips:
        drip.let.set()
    for _, running in begun:
        running.join(15)
    eventually(lambda: threads.decoding.used == 0)


def test_a_coded_frame_is_within_its_fence_until_it_is_there(receives, eventually):
    make, receive, threads = receives
    drip = Drip()
    flow, running = receive(make(), drip, MIB)
    assert drip.asked.wait(10)
    assert not flow.stop()  # so that the fence breaks it off
    drip.let.set()
    running.join(15)
    assert not flow.busy
    assert drip.got == MIB  # the next frame begins where it should
    assert threads.decoding.used == 0


def test_no_room_fails_the_transfer_and_not_the_link(receives):
    make, receive, threads = receives
    threads.decoding.take(64 * MIB, 1.0)
    good = Drip()
    good.let.set()
    flow, running = receive(make(io_timeout_s=0.4), good, 4096)
    running.join(15)
    assert [type(e) for e in flow.failed] == [CommTimeoutError]
    assert good.got == 4096
    threads.decoding.give(64 * MIB)
