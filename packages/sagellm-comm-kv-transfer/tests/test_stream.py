import threading
import time

import pytest
import torch

from sagellm.core.protocols import (
    CommTimeoutError,
    ConfigError,
    KVTransferError,
    TransferKey,
    TransferState,
)


class Event:
    """What `torch.cuda.Event` offers, set by hand."""

    def __init__(self):
        self._set = threading.Event()
        self.asked = threading.Event()

    def record(self):
        self._set.set()

    def query(self):
        self.asked.set()
        return self._set.is_set()

    def synchronize(self):
        assert self._set.wait(10)


def test_layers_can_be_used_before_the_next_are_computed(pair):
    out, a, into, b = pair()
    key = TransferKey("s")
    r = into.receive(key, [7, 8])
    stream = out.begin(key, 1, [1, 2])

    for i in range(3):
        a[f"layer{i}"][[1, 2]] = float(i + 1)
        stream.send_layer(i)
        r.wait_layer(i, 10)
        assert (b[f"layer{i}"][[7, 8]] == i + 1).all()
        assert not r.done()
    stream.seal(num_tokens=8).wait(10)

    assert r.wait(10).num_tokens == 8


def test_the_sender_hears_of_every_layer(pair):
    out, _, into, _ = pair()
    key = TransferKey("s")
    into.receive(key, [7])
    stream = out.begin(key, 1, [1])

    stream.send_layer(1)
    stream.transfer.wait_layer(1, 10)
    with pytest.raises(CommTimeoutError, match="layer 0"):
        stream.transfer.wait_layer(0, 0)
    for i in (0, 2):
        stream.send_layer(i)
        stream.transfer.wait_layer(i, 10)

    assert stream.transfer.progress.layers_done == 3
    assert not stream.transfer.done()
    stream.seal(4).wait(10)


def test_nothing_is_read_before_the_event(pair):
    out, a, into, b = pair()
    key = TransferKey("s")
    r = into.receive(key, [7])
    stream = out.begin(key, 1, [1])
    late = Event()

    stream.send_layer(0, after=late)
    stream.send_layer(1)
    r.wait_layer(1, 10)
    assert late.asked.wait(10)
    a["layer0"][1] = 42.0
    late.record()
    r.wait_layer(0, 10)

    assert (b["layer0"][7] == 42.0).all()
    stream.abort("seen enough")


def test_chunked_prefill_sends_spans(pair):
    out, a, into, b = pair()
    key = TransferKey("s")
    r = into.receive(key, [7, 8, 9])
    stream = out.begin(key, 1, [1, 2, 3])

    for span in ((0, 2), (2, 3)):
        for i in range(3):
            stream.send_layer(i, span=span)
    stream.seal(12)
    r.wait(10)

    assert all(torch.equal(a[n][[1, 2, 3]], b[n][[7, 8, 9]]) for n in a)


def test_a_stream_that_is_not_complete_fails_on_both_sides(pair):
    out, _, into, _ = pair()
    key = TransferKey("s")
    r = into.receive(key, [7])
    stream = out.begin(key, 1, [1])
    stream.send_layer(1)

    with pytest.raises(ConfigError, match="layer0, layer2"):
        stream.seal(4)
    with pytest.raises(KVTransferError, match="layer0, layer2"):
        r.wait(10)

    assert stream.transfer.wait_layer  # the handle stays readable
    assert r.exception().invalid_blocks == (7,)
    with pytest.raises(KVTransferError):
        stream.transfer.wait(10)
    with pytest.raises(KVTransferError):
        stream.send_layer(0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: s.send_layer(3), "layer 3 is not in 0..2"),
        (lambda s: s.send_layer(1), "sent before"),
        (lambda s: s.send_layer(0, span=(0, 3)), "span"),
    ],
)
def test_wrong_layers_are_refused(pair, call, match):
    out, _, _, _ = pair()
    stream = out.begin(TransferKey("s"), 1, [1, 2])
    stream.send_layer(1, span=(0, 1))

    with pytest.raises(ConfigError, match=match):
        call(stream)


def test_a_sealed_stream_takes_no_more(pair):
    out, _, into, _ = pair()
    into.receive(TransferKey("s"), [7])
    stream = out.begin(TransferKey("s"), 1, [1])
    for i in range(3):
        stream.send_layer(i)
    sealed = stream.seal(4)

    assert stream.seal(4) is sealed
    with pytest.raises((ConfigError, KVTransferError), match="sealed"):
        stream.send_layer(0)
    assert sealed.wait(10).state is TransferState.RELEASED


def test_abort_reaches_the_receiver_with_its_reason(pair):
    out, _, into, _ = pair()
    r = into.receive(TransferKey("s"), [7])
    stream = out.begin(TransferKey("s"), 1, [1])
    stream.send_layer(0)
    r.wait_layer(0, 10)

    stream.abort("the request was dropped")

    with pytest.raises(KVTransferError, match="the request was dropped"):
        r.wait_layer(2, 10)
    assert r.state is TransferState.CANCELLED


class CountingEvent(Event):
    """Notes when it was asked for the hundredth time."""

    def __init__(self):
        super().__init__()
        self._asked, self.often = 0, threading.Event()

    def query(self):
        self._asked += 1
        if self._asked == 100:
            self.often.set()
        return super().query()


def test_an_event_that_takes_its_time_is_asked_less_and_less_often(pair):
    out, _, into, _ = pair()
    r = into.receive(TransferKey("s"), [1])
    stream = out.begin(TransferKey("s"), 1, [1])
    event = CountingEvent()
    start = time.monotonic()

    stream.send_layer(0, after=event)

    assert event.often.wait(10)
    assert time.monotonic() - start > 0.3
    event.record()
    r.wait_layer(0, 10)


class FailingEvent(Event):
    """An event of a device that has failed."""

    def query(self):
        raise RuntimeError("device-side assert")


def test_an_event_that_raises_fails_its_own_transfer_only(pair):
    out, a, into, b = pair()
    other = out.begin(TransferKey("other"), 1, [5])
    r = into.receive(TransferKey("other"), [5])
    stream = out.begin(TransferKey("s"), 1, [1, 2])
    into.receive(TransferKey("s"), [1, 2])
    other.send_layer(0)
    r.wait_layer(0, 10)

    stream.send_layer(0, after=FailingEvent())

    with pytest.raises(KVTransferError, match="RuntimeError: device-side assert"):
        stream.transfer.wait(10)
    for i in (1, 2):
        other.send_layer(i)
    other.seal(8).wait(10)
    assert all(torch.equal(a[n][5], b[n][5]) for n in a)
