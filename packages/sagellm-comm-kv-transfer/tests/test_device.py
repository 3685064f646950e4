"""Pools on a device: what is sent and received goes through pinned halves, in the device's time."""

import threading

import numpy as np
import pytest
import torch
from late_device import LateDevice, LateEvent

from sagellm.comm.kv_transfer import (
    HostStaging,
    KVTransferSettings,
    _device_staging,
    _landing,
    pool,
    staging,
)
from sagellm.comm.kv_transfer._device_staging import DeviceStaging
from sagellm.core.protocols import (
    CommTimeoutError,
    ConfigError,
    KVTransferError,
    PeerLostError,
    TransferKey,
    TransferState,
    UnsupportedOperationError,
)

KEY = TransferKey("k")


@pytest.fixture
def device(monkeypatch):
    late = LateDevice()
    monkeypatch.setattr(pool, "device_of", lambda tensors: late)
    yield late
    late.gate.set()


@pytest.fixture
def host(monkeypatch, device):
    """Makes pools in host memory from now on."""
    return lambda: monkeypatch.setattr(pool, "device_of", lambda tensors: None)


def push(out, into, src, dst, key=KEY):
    r = into.receive(key, dst, source_node=out.node_id)
    t = out.transfer(src, into.node_id, key=key)
    return r, t


def equal(a, src, b, dst):
    return all(torch.equal(a[n][src], b[n][dst]) for n in a)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("chunk", [1, 3000, 1 << 20])
def test_blocks_go_from_device_to_device(pair, device, transport, chunk):
    settings = KVTransferSettings(transport=transport, chunk_bytes=chunk)
    out, a, into, b = pair(
        blocks=60, sender={"settings": settings}, receiver={"settings": settings}, heads=8
    )
    before = {n: t.clone() for n, t in b.items()}
    for turn in range(3):
        rng = np.random.default_rng(turn)
        src, dst = rng.permutation(60)[:40], rng.permutation(60)[:40]

        r, t = push(out, into, src, dst, TransferKey(f"turn{turn}"))
        r.wait(20)
        t.wait(20)

        assert equal(a, src, b, dst)
        if not turn:
            rest = np.setdiff1d(np.arange(60), dst)
            assert equal(before, rest, b, rest)
    assert r.metrics.bytes == t.metrics.bytes == 40 * sum(x[0].nbytes for x in a.values())


@pytest.mark.parametrize("sends", [True, False])
def test_one_side_may_be_in_host_memory(channel, layout, tensors, device, host, sends):
    shm = {"settings": KVTransferSettings(transport="shm")}
    out, into = channel(**shm), channel(**shm)
    a, b = tensors(layout()), tensors(layout())
    first, second = ((out, a), (into, b)) if sends else ((into, b), (out, a))
    first[0].register(layout(), first[1])
    host()
    second[0].register(layout(), second[1])

    r, t = push(out, into, [1, 2, 3], [9, 0, 4])
    r.wait(10)
    t.wait(10)

    assert equal(a, [1, 2, 3], b, [9, 0, 4])
    assert device.done > 0


def test_shards_are_gathered_and_scattered_by_runs(channel, layout, tensors, device):
    whole, parts = channel(), [channel(), channel()]
    b = tensors(layout())
    whole.register(layout(), b)
    theirs = [tensors(layout(tp=2, rank=i)) for i in range(2)]
    r = whole.receive(KEY, [3, 4], source_node=[p.node_id for p in parts])

    sent = []
    for i, part in enumerate(parts):
        part.register(layout(tp=2, rank=i), theirs[i])
        sent.append(part.transfer([1, 2], whole.node_id, key=KEY))
    for handle in (r, *sent):
        handle.wait(10)

    for name, tensor in b.items():
        want = torch.cat([t[name][[1, 2]] for t in theirs], dim=2)
        assert torch.equal(tensor[[3, 4]], want)


def test_nothing_lands_before_the_device_has_written_it(pair, device, eventually):
    out, a, into, b = pair()
    push(out, into, [0], [0], TransferKey("meet"))[0].wait(10)
    before = {n: t.clone() for n, t in b.items()}
    incoming = into._engine.pool.staging.incoming
    shut = threading.Event()
    incoming.work.put((LateEvent(), lambda: shut.wait(20)))  # a slow piece of work before ours

    r, t = push(out, into, [1, 2], [3, 4])

    eventually(lambda: r.progress.bytes_total > 0)
    with pytest.raises(CommTimeoutError):
        r.wait(0.3)
    assert equal(before, [3, 4], b, [3, 4])
    assert r.progress.bytes_done == 0
    shut.set()
    assert r.wait(10).state in (TransferState.LANDED, TransferState.RELEASED)
    assert equal(a, [1, 2], b, [3, 4])
    t.wait(10)


def test_an_error_is_reported_only_when_the_device_writes_no_more(pair, device, eventually):
    patient = {"settings": KVTransferSettings(quiesce_s=30)}
    out, _, into, b = pair(sender=patient, receiver=patient)
    push(out, into, [0], [0], TransferKey("meet"))[0].wait(10)
    shut, entered = threading.Event(), threading.Event()

    def slow():
        entered.set()
        shut.wait(20)

    into._engine.pool.staging.incoming.work.put((LateEvent(), slow))
    r, _ = push(out, into, [1, 2], [3, 4])
    assert entered.wait(10)
    eventually(lambda: any(s.inflow.busy for s in r.owner.sources))

    r.cancel()

    with pytest.raises(CommTimeoutError):
        r.wait(0.3)
    assert into._engine.pool.lease_holders()
    shut.set()
    with pytest.raises(KVTransferError) as caught:
        r.wait(10)
    assert caught.value.cause == "cancelled"
    after = {n: t.clone() for n, t in b.items()}  # from now on the blocks are the caller's
    push(out, into, [5], [5], TransferKey("next"))[0].wait(10)
    assert equal(after, [3, 4], b, [3, 4])


def test_what_is_cancelled_before_it_is_scattered_never_is(pair, device, monkeypatch, eventually):
    out, _, into, b = pair()
    push(out, into, [0], [0], TransferKey("meet"))[0].wait(10)
    before = {n: t.clone() for n, t in b.items()}
    real, checking, go = _landing.block_sums, threading.Event(), threading.Event()

    def sums(*args):
        checking.set()
        go.wait(10)
        return real(*args)

    monkeypatch.setattr(_landing, "block_sums", sums)
    r, _ = push(out, into, [1, 2], [3, 4])
    assert checking.wait(10)
    r.cancel()
    eventually(lambda: all(s.inflow.stopped for s in r.owner.sources))
    go.set()

    with pytest.raises(KVTransferError):
        r.wait(10)
    push(out, into, [5], [5], TransferKey("next"))[0].wait(10)
    assert equal(before, [3, 4], b, [3, 4])


@pytest.mark.parametrize("where", ["gather", "scatter"])
def test_a_copy_that_fails_fails_its_transfer_and_no_other(
    channel, layout, tensors, device, host, where
):
    out, into = channel(), channel()
    a, b = tensors(layout()), tensors(layout())
    (out if where == "gather" else into).register(layout(), a if where == "gather" else b)
    host()
    (into if where == "gather" else out).register(layout(), b if where == "gather" else a)
    push(out, into, [0], [0], TransferKey("meet"))[0].wait(10)
    device.fail = True

    r, t = push(out, into, [1, 2], [3, 4])
    for handle in (r, t):
        with pytest.raises(KVTransferError, match="device-side assert"):
            handle.wait(10)
    device.fail = False

    r, t = push(out, into, [1, 2], [3, 4], TransferKey("again"))
    r.wait(10)
    t.wait(10)
    assert equal(a, [1, 2], b, [3, 4])


def test_blocks_are_gathered_behind_the_callers_stream(pair, device, eventually):
    out, a, into, b = pair()
    push(out, into, [0], [0], TransferKey("meet"))[0].wait(10)
    device.current = busy = LateEvent()  # of both sides: a kernel that still writes the blocks

    r = into.receive(KEY, [3])
    t = out.transfer([1], into.node_id, key=KEY)
    with pytest.raises(CommTimeoutError):
        t.wait(0.2)
    for tensor in a.values():
        tensor[1] = 7.0
    busy.over.set()

    r.wait(10)
    assert all((x[3] == 7).all() for x in b.values())


def test_blocks_are_scattered_behind_the_callers_stream(channel, layout, tensors, device, host):
    out, into = channel(), channel()
    a, b = tensors(layout()), tensors(layout())
    into.register(layout(), b)
    host()
    out.register(layout(), a)
    before = {n: t.clone() for n, t in b.items()}
    device.current = busy = LateEvent()  # a kernel that still reads the blocks

    r, _ = push(out, into, [1], [3])
    with pytest.raises(CommTimeoutError):
        r.wait(0.3)
    assert equal(before, [3], b, [3])
    busy.over.set()

    r.wait(10)
    assert equal(a, [1], b, [3])


def test_damaged_blocks_are_asked_for_again_and_not_scattered(pair, device, monkeypatch):
    from sagellm.comm.kv_transfer import _writer

    out, a, into, b = pair()
    real, flips = _writer.block_sums, [1]

    def sum_then_flip(units, layer, first):
        sums = real(units, layer, first)
        if flips and flips.pop():
            units[1][0][5] ^= 255
        return sums

    monkeypatch.setattr(_writer, "block_sums", sum_then_flip)
    r, t = push(out, into, [1, 2, 3], [3, 4, 5])
    r.wait(10)
    t.wait(10)

    assert r.metrics.retries == 1
    assert equal(a, [1, 2, 3], b, [3, 4, 5])


def test_offers_and_streams_of_a_device(leakless, pair, device):
    out, a, into, b = pair()
    offer = out.offer(KEY, [1, 2], num_tokens=8, ttl_s=10)
    into.fetch(KEY, out.node_id, [5, 6]).wait(10)
    offer.wait(10)
    assert equal(a, [1, 2], b, [5, 6])

    key = TransferKey("s")
    r = into.receive(key, [7, 8])
    stream = out.begin(key, into.node_id, [3, 4])
    for i in range(3):
        stream.send_layer(i)
        r.wait_layer(i, 10)
        assert torch.equal(a[f"layer{i}"][[3, 4]], b[f"layer{i}"][[7, 8]])
    stream.seal(8).wait(10)
    r.wait(10)


def test_codecs_are_not_used_where_the_host_cannot_reach_the_values(pair, device):
    out, a, into, b = pair()
    with pytest.raises(UnsupportedOperationError, match=r"'lossless'.*late:0"):
        out.transfer([1], into.node_id, codec="lossless")
    with pytest.raises(UnsupportedOperationError, match=r"'lossless'.*late:0"):
        out.offer(KEY, [1], num_tokens=4, ttl_s=5, codec="lossless")
    with pytest.raises(UnsupportedOperationError, match=r"'lossless'.*late:0"):
        into.fetch(KEY, out.node_id, [1], codec="lossless")

    r = into.receive(KEY, [3])
    out.transfer([1], into.node_id, key=KEY, codec="auto").wait(10)
    r.wait(10)
    assert equal(a, [1], b, [3])


@pytest.mark.parametrize("late", [False, True])
def test_a_sender_that_codes_for_a_device_is_told(channel, layout, tensors, device, host, late):
    out, into = channel(), channel()
    if late:  # then its pool is registered after the codecs were told
        out.connect(into.node_id)
    into.register(layout(), tensors(layout()))
    host()
    out.register(layout(), tensors(layout()))

    r = into.receive(KEY, [3], deadline_s=10)
    t = out.transfer([1], into.node_id, key=KEY, codec="lossless")

    with pytest.raises(KVTransferError, match="on a device" if late else "cannot decode"):
        t.wait(10)
    with pytest.raises(KVTransferError):
        r.wait(15)


def test_the_next_frame_is_gathered_while_one_is_sent(pair, device, monkeypatch):
    from sagellm.comm.kv_transfer.transports.tcp import TcpConnection

    options = {"settings": KVTransferSettings(transport="tcp", lanes=1, chunk_bytes=2048)}
    out, a, into, b = pair(sender=options, receiver=options)
    push(out, into, [0], [0], TransferKey("meet"))[0].wait(10)
    real, sending, go = TcpConnection.send, threading.Event(), threading.Event()
    before = device.done

    def send(conn, views, deadline_s):
        sending.set()
        assert go.wait(10)
        return real(conn, views, deadline_s)

    monkeypatch.setattr(TcpConnection, "send", send)
    r, t = push(out, into, [1, 2, 3, 4], [4, 5, 6, 7])
    assert sending.wait(10)
    end = threading.Event()
    for _ in range(200):
        if device.done >= before + 2:
            break
        end.wait(0.02)
    gathered = device.done - before
    go.set()
    r.wait(10)
    t.wait(10)

    assert gathered == 2
    assert equal(a, [1, 2, 3, 4], b, [4, 5, 6, 7])


def test_pinned_memory_is_bounded_whatever_frames_come(pair, device):
    sender = {"settings": KVTransferSettings(transport="tcp", chunk_bytes=1 << 20)}
    receiver = {"settings": KVTransferSettings(transport="tcp", chunk_bytes=3000)}
    out, a, into, b = pair(blocks=60, sender=sender, receiver=receiver)
    ids = np.random.default_rng(0).permutation(60)[:50]
    r, t = push(out, into, ids, ids[::-1].copy())
    r.wait(10)
    t.wait(10)

    halves = into._engine.pool.staging._free_in
    assert equal(a, ids, b, ids[::-1].copy())
    assert len(halves._free) + halves._left == 4
    assert max(h.nbytes for h in halves._free) == 3000


def test_a_lost_link_frees_the_halves_and_the_blocks(pair, device, eventually):
    out, _, into, _ = pair()
    push(out, into, [0], [0], TransferKey("meet"))[0].wait(10)
    device.gate.clear()
    r, t = push(out, into, [1, 2], [3, 4])
    assert device.submitted.acquire(timeout=10)
    link = next(iter(into._engine.links))
    into._engine.loop.run(lambda: link.lose(PeerLostError("it left")))

    device.gate.set()
    for handle in (r, t):
        with pytest.raises(KVTransferError):
            handle.wait(10)
    for c in (out, into):
        made = c._engine.pool.staging
        eventually(lambda made=made: len(made._free_in._free) + made._free_in._left == 4)
        eventually(lambda made=made: len(made._free_out._free) + made._free_out._left == 4)


def test_whoever_waits_for_a_half_takes_the_place_of_one_that_could_not_be_made(monkeypatch):
    begun, go, made = threading.Event(), threading.Event(), []

    def make(device, nbytes):
        made.append(nbytes)
        if len(made) == 1:
            begun.set()
            assert go.wait(10)
            raise MemoryError("of the device")
        return nbytes

    monkeypatch.setattr(_device_staging, "Half", make)
    halves, failed, got = _device_staging._Halves("late:0", 1), [], []

    def first():
        try:
            halves.take(10, 1.0)
        except MemoryError as e:
            failed.append(e)

    waiting = threading.Event()
    wait_for = halves._idle.wait_for
    halves._idle.wait_for = lambda *a: (waiting.set(), wait_for(*a))[1]
    threads = [threading.Thread(target=first)]
    threads.append(threading.Thread(target=lambda: got.append(halves.take(11, 5.0))))
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    assert waiting.wait(10)
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(failed) == 1
    assert got == [11]


def test_what_follows_a_landing_may_fail_or_come_late(device, caplog):
    staging, done = DeviceStaging(device, 1 << 16), []

    def fail(error):
        raise ValueError("a bug")

    staging.when_landed(None, fail)
    staging.when_landed(None, done.append)
    staging.close()
    assert done == [None]
    assert "a bug in what follows" in caplog.text
    staging.when_landed(None, done.append)
    assert done == [None, None]


def test_a_channels_own_codec_does_not_hinder_a_pool_on_a_device(pair, device):
    out, a, into, b = pair(sender={"codec": "lossless"})
    r = into.receive(KEY, [3], source_node=out.node_id)
    out.transfer([1], into.node_id, key=KEY).wait(10)
    r.wait(10)
    assert equal(a, [1], b, [3])


def test_no_half_in_time_is_said(device):
    made = DeviceStaging(device, 100, halves=1, timeout_s=0.05)
    half = made.to_send(100, wait=True)

    assert made.to_send(100, wait=False) is None
    with pytest.raises(CommTimeoutError, match=r"late:0.*0\.05 s"):
        made.to_send(100, wait=True)
    made.sent(half)
    assert made.to_send(50, wait=False) is half


def test_a_pool_is_on_one_device():
    from sagellm.comm.kv_transfer._device import device_of

    with pytest.raises(ConfigError, match=r"cpu, meta"):
        device_of([torch.zeros(1), torch.zeros(1, device="meta")])
    assert device_of([torch.zeros(1)]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16, torch.complex128])
def test_host_staging_reads_a_device(monkeypatch, dtype):
    late = LateDevice()
    monkeypatch.setattr(staging, "device_of", lambda tensors: late)
    blocks = torch.randn(40, 3, 7).to(dtype)
    reading = HostStaging(blocks, chunk_bytes=5 * blocks[0].nbytes)
    ids = np.random.default_rng(0).permutation(40)[:33]

    got = torch.cat([view.clone() for _, view in reading.read(ids)])

    assert torch.equal(got, blocks[torch.from_numpy(ids)])
