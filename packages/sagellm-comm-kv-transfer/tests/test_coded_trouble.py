"""Coded transfers that go wrong: damage, peers without the codec, cancelling, and death."""

import dataclasses
import os
import signal
import struct
import subprocess
import sys
import threading

import pytest
import torch
from test_coded_transfers import SOURCE, TARGET, group, memory
from test_wire_damage import Cutter

from sagellm.comm.kv_transfer import KVTransferSettings
from sagellm.comm.kv_transfer.frames import HEADER_BYTES, SECTIONS
from sagellm.core.protocols import KVLayout, KVTransferError, TransferKey, TransferState

KEY = b"a key of this test, long enough"
TOKEN_BYTES = 48
LAYOUT = KVLayout((group(),), model="m")


def frame_length(held):
    if len(held) < HEADER_BYTES:
        return 0
    flags, count, payload = struct.unpack_from("<5xB14xIQ", held)
    return HEADER_BYTES + 8 * count + (8 if flags & SECTIONS else 0) + payload


@pytest.fixture
def between(channel, proxy):
    """Two channels whose only data connection goes through a proxy that `edit` may change."""

    def make(edit, **settings):
        s = KVTransferSettings(lanes=1, transport="tcp", quiesce_s=0.1, **settings)
        out, into = (channel(node_id=i, peers={}, key=KEY, settings=s) for i in range(2))
        tcp = into._engine.paths["tcp"]
        data = proxy(tcp.endpoint())
        tcp.endpoint = lambda reached_at="": data.address
        data.flip = Cutter(frame_length, edit, skip=TOKEN_BYTES)
        out.add_peer(1, into.address)
        out.register(LAYOUT, a := memory(LAYOUT))
        into.register(LAYOUT, b := memory(LAYOUT, seed=1))
        return out, a, into, b

    return make


def flipped(frame, at):
    return frame[:at] + bytes([frame[at] ^ 4]) + frame[at + 1 :]


@pytest.mark.parametrize("codec", ["lossless", "quant"])
@pytest.mark.parametrize("where", ["table", "header", "entry", "section"])
def test_damage_is_asked_for_again_once(between, codec, where):
    hit = []

    def edit(index, frame):
        flags, count = struct.unpack_from("<5xB14xI", frame)
        if index != 1 or hit:
            return frame
        assert flags & SECTIONS
        hit.append(index)
        start = HEADER_BYTES + 8 * count + 8
        at = {"table": HEADER_BYTES + 3, "header": start + 40, "entry": start + 300,
              "section": len(frame) - 9}[where]  # fmt: skip
        return flipped(frame, at)

    out, a, into, b = between(edit)
    key = TransferKey("k")
    got = into.receive(key, TARGET, source_node=0)
    sent = out.transfer(SOURCE, 1, key=key, codec=codec)
    sent.wait(20)
    got.wait(20)

    assert hit
    assert got.metrics.retries > 0
    for n in b:
        off = (b[n][TARGET].float() - a[n][SOURCE].float()).abs().max()
        assert off == 0 if codec == "lossless" else off < 0.3


def test_damage_that_comes_again_fails_both_sides(between, eventually):
    out, _, into, b = between(lambda index, frame: flipped(frame, len(frame) - 9))
    kept = {n: t.clone() for n, t in b.items()}

    key = TransferKey("k")
    got = into.receive(key, TARGET, source_node=0)
    sent = out.transfer(SOURCE, 1, key=key, codec="lossless")

    for handle in (got, sent):
        with pytest.raises(KVTransferError, match="changed twice") as e:
            handle.wait(20)
        assert e.value.cause == "integrity"
    others = [i for i in range(80) if i not in TARGET]
    assert all(torch.equal(b[n][others], kept[n][others]) for n in b)
    assert into._engine.pool.leases == 0
    for channel in (out, into):
        threads = channel._engine.codecs.threads
        # pieces that wait for a thread give theirs back once it sees that nobody wants them
        eventually(lambda t=threads: t.encoding.used == t.decoding.used == 0)


@pytest.mark.parametrize("theirs", [None, 7])
def test_a_peer_without_the_codec_is_refused_clearly(channel, theirs):
    s = KVTransferSettings(transport="tcp")
    out, into = channel(settings=s), channel(settings=s)
    versions = into._engine.codecs.versions
    if theirs is None:
        del versions["quant"]
    else:
        versions["quant"] = theirs
    out.register(LAYOUT, a := memory(LAYOUT))
    into.register(LAYOUT, b := memory(LAYOUT, seed=1))

    key = TransferKey("k")
    got = into.receive(key, TARGET, source_node=out.node_id)
    sent = out.transfer(SOURCE, into.node_id, key=key, codec="quant")
    text = "does not have it" if theirs is None else "version 7"
    with pytest.raises(KVTransferError, match=f"cannot decode codec 'quant' version 1.*{text}"):
        sent.wait(20)
    with pytest.raises(KVTransferError, match="cannot decode"):
        got.wait(20)

    key = TransferKey("k", 1)  # over the link that is up now, and as a pull
    sent = out.transfer(SOURCE, into.node_id, key=key, codec="quant")
    with pytest.raises(KVTransferError, match="cannot decode"):
        sent.wait(20)
    key = TransferKey("p")
    out.offer(key, SOURCE, num_tokens=1, ttl_s=20, codec="quant")
    with pytest.raises(KVTransferError, match="cannot decode"):
        into.fetch(key, out.node_id, TARGET).wait(20)

    into.fetch(key, out.node_id, TARGET, codec="lossless").wait(20)
    assert all(torch.equal(b[n][TARGET], a[n][SOURCE]) for n in b)


def test_a_peer_of_an_older_release_has_no_coded_frames(channel, monkeypatch):
    s = KVTransferSettings(transport="tcp")
    out, into = channel(settings=s), channel(settings=s)
    into._engine.codecs.versions.clear()  # its handshake does not know the field
    out.register(LAYOUT, a := memory(LAYOUT))
    into.register(LAYOUT, b := memory(LAYOUT, seed=1))

    sent = out.transfer(SOURCE, into.node_id, key=TransferKey("k"), codec="lossless")
    with pytest.raises(KVTransferError, match="coded frames"):
        sent.wait(20)
    got = into.receive(key := TransferKey("a"), TARGET)
    out.transfer(SOURCE, into.node_id, key=key, codec="auto", max_error="near").wait(20)

    got.wait(20)
    assert all(torch.equal(b[n][TARGET], a[n][SOURCE]) for n in b)


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_cancelling_in_the_middle_ends_both_sides(channel, eventually, who):
    s = KVTransferSettings(transport="tcp")
    out, into = channel(settings=s), channel(settings=s)
    out.register(LAYOUT, memory(LAYOUT))
    into.register(LAYOUT, b := memory(LAYOUT, seed=1))

    got = into.receive(key := TransferKey("k"), TARGET)
    stream = out.begin(key, into.node_id, SOURCE, codec="lossless")
    stream.send_layer(0)
    got.wait_layer(0, 20)
    (stream.transfer if who == "sender" else got).cancel()

    for handle in (stream.transfer, got):
        with pytest.raises(KVTransferError) as e:
            handle.wait(20)
        assert e.value.cause == "cancelled"
        assert handle.state is TransferState.CANCELLED
    after = {n: t.clone() for n, t in b.items()}
    eventually(lambda: not (out._engine.pool.leases or into._engine.pool.leases))
    assert all(torch.equal(b[n], after[n]) for n in b)


def test_cancelling_while_it_is_encoded_leaves_nothing(leakless, channel, eventually):
    s = KVTransferSettings(transport="tcp", max_codec_bytes=1 << 20)
    out, into = channel(settings=s), channel(settings=s)
    out.register(LAYOUT, memory(LAYOUT))
    into.register(LAYOUT, memory(LAYOUT, seed=1))
    out.connect(into.node_id)

    for i in range(40):
        key = TransferKey(f"k{i}")
        into.receive(key, TARGET)
        sent = out.transfer(SOURCE, into.node_id, key=key, codec="lossless")
        if i % 2:
            into.connect(out.node_id)
        sent.cancel()
        with_error = sent.exception
        eventually(sent.done, 20)
        eventually(lambda: not into._engine.pool.leases, 20)
        assert with_error() is None or "cancelled" in str(with_error())

    for c in (out, into):
        threads = c._engine.codecs.threads
        eventually(lambda t=threads: t.encoding.used == t.decoding.used == 0)


CHILD = """
import sys
import threading
sys.path.insert(0, sys.argv[1])
from test_coded_transfers import SOURCE, memory
from test_coded_trouble import KEY, LAYOUT
from sagellm.comm.kv_transfer import KVTransferChannel, KVTransferSettings
from sagellm.core.protocols import TransferKey
c = KVTransferChannel(node_id=0, peers={}, key=KEY, settings=KVTransferSettings(transport="tcp"))
c.register(LAYOUT, memory(LAYOUT))
c.add_peer(1, sys.argv[2])
stream = c.begin(TransferKey("k"), 1, SOURCE, codec="quant", deadline_s=60)
stream.send_layer(0)
stream.transfer.wait_layer(0, 60)
print("half", flush=True)
sys.stdin.read()
"""


def test_a_sender_that_is_killed_in_the_middle_fails_the_receive(channel):
    s = KVTransferSettings(transport="tcp")
    into = channel(node_id=1, peers={}, key=KEY, settings=s)
    into.register(LAYOUT, b := memory(LAYOUT, seed=1))
    got = into.receive(TransferKey("k"), TARGET, source_node=0, deadline_s=60)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, os.path.dirname(__file__), into.address],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
        with pytest.raises(KVTransferError) as e:
            got.wait(20)
    finally:
        child.kill()
        child.communicate(timeout=20)

    assert e.value.cause == "peer_lost"
    (completion,) = into.poll()
    assert completion.blocks_safe
    assert set(completion.invalid_blocks) == set(TARGET)
    after = {n: t.clone() for n, t in b.items()}
    assert into._engine.pool.leases == 0
    assert all(torch.equal(b[n], after[n]) for n in b)


def test_a_bug_in_a_codec_fails_its_transfer_only(channel, monkeypatch):
    from sagellm.comm.kv_transfer.compression import lossless

    s = KVTransferSettings(transport="tcp")
    out, into = channel(settings=s), channel(settings=s)
    out.register(LAYOUT, a := memory(LAYOUT))
    into.register(LAYOUT, b := memory(LAYOUT, seed=1))
    monkeypatch.setattr(lossless.LosslessCodec, "pack", lambda *_: 1 / 0)

    got = into.receive(key := TransferKey("k"), TARGET, source_node=out.node_id)
    sent = out.transfer(SOURCE, into.node_id, key=key, codec="lossless")
    for handle in (sent, got):
        with pytest.raises(KVTransferError, match="ZeroDivisionError"):
            handle.wait(20)

    got = into.receive(key := TransferKey("z"), TARGET)
    out.transfer(SOURCE, into.node_id, key=key, codec="zstd").wait(20)
    got.wait(20)
    assert all(torch.equal(b[n][TARGET], a[n][SOURCE]) for n in b)


def test_frames_that_cannot_be_lose_the_link(channel, monkeypatch):
    from sagellm.comm.kv_transfer import _coded_out

    s = KVTransferSettings(transport="tcp")
    out, into = channel(settings=s), channel(settings=s)
    out.register(LAYOUT, memory(LAYOUT))
    into.register(LAYOUT, memory(LAYOUT, seed=1))
    frame = _coded_out.CodedOutflow._frame

    def bloated(self, chunk, raw, mode):
        table, views, seconds = frame(self, chunk, raw, mode)
        return table, [*views, memoryview(bytes(raw + (1 << 18)))], seconds

    monkeypatch.setattr(_coded_out.CodedOutflow, "_frame", bloated)
    got = into.receive(key := TransferKey("k"), TARGET, source_node=out.node_id)
    out.transfer(SOURCE, into.node_id, key=key, codec="lossless")

    with pytest.raises(KVTransferError, match="a coded frame of"):
        got.wait(20)
    assert into._engine.codecs.threads.decoding.most == 0


def test_metrics_stay_plain_data(channel):
    s = KVTransferSettings(transport="tcp")
    out, into = channel(settings=s), channel(settings=s)
    out.register(LAYOUT, memory(LAYOUT))
    into.register(LAYOUT, memory(LAYOUT))
    got = into.receive(key := TransferKey("k"), TARGET)
    out.transfer(SOURCE, into.node_id, key=key, codec="zstd")

    assert dataclasses.asdict(got.wait(20).metrics)["codec"] == "zstd"


@pytest.mark.parametrize("side", ["encoding", "decoding"])
def test_cancelling_does_not_wait_for_codecs_that_are_busy_elsewhere(channel, side):
    s = KVTransferSettings(transport="tcp", quiesce_s=0.1, codec_workers=1)
    out, into = channel(settings=s), channel(settings=s)
    out.register(LAYOUT, memory(LAYOUT))
    into.register(LAYOUT, memory(LAYOUT, seed=1))
    link = out._engine.meet(into.node_id, 10)
    held = threading.Event()
    threads = (out if side == "encoding" else into)._engine.codecs.threads
    threads.submit(lambda: held.wait(30))
    try:
        got = into.receive(key := TransferKey("k"), TARGET)
        sent = out.transfer(SOURCE, into.node_id, key=key, codec="lossless")
        sent.cancel()
        for handle in (sent, got):
            with pytest.raises(KVTransferError) as e:
                handle.wait(5)
            assert e.value.cause == "cancelled"
        assert not out._engine.pool.leases
        assert not into._engine.pool.leases
    finally:
        held.set()

    got = into.receive(key := TransferKey("z"), TARGET)
    out.transfer(SOURCE, into.node_id, key=key, codec="lossless").wait(20)
    got.wait(20)
    assert out._engine.links.ready(into.node_id) is link
