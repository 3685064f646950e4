import contextlib
import os
import threading
import time

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings, wire
from sagellm.core.protocols import (
    CommTimeoutError,
    IntegrityError,
    KVTransferError,
    LayoutMismatchError,
    PeerLostError,
    ResourceError,
    TransferKey,
    TransferState,
)

KEY = b"a key of this test, long enough"


def test_a_peer_that_never_comes_is_named(channel, layout, tensors):
    c = channel(node_id=0, peers={1: "127.0.0.1:1"}, key=KEY)
    c.register(layout(), tensors(layout()))

    t = c.transfer([1], 1, deadline_s=0.3)
    with pytest.raises(KVTransferError, match="node 1 never came") as caught:
        t.wait(10)
    with pytest.raises(CommTimeoutError, match="node 1 never came"):
        c.connect(1, timeout_s=0.1)

    assert caught.value.cause == "comm_timeout"
    assert isinstance(caught.value.__cause__, CommTimeoutError)
    assert c._engine.pool.leases == 0


def test_a_sender_that_never_comes_is_named(pair):
    _, _, into, _ = pair()
    r = into.receive(TransferKey("r"), [1, 2], source_node=[0, 7], deadline_s=0.2)

    with pytest.raises(KVTransferError, match="node 0, 7, which never came") as caught:
        r.wait(10)

    assert caught.value.invalid_blocks == (1, 2)
    (done,) = into.poll()
    assert (done.status, done.cause, done.blocks_safe) == ("failed", "comm_timeout", True)


def test_a_receiver_that_never_receives_fails_the_sender(pair):
    out, _, _, _ = pair()

    t = out.transfer([1], 1, deadline_s=0.3)

    with pytest.raises(KVTransferError, match="node 1 has not said `receive`"):
        t.wait(10)


def test_a_failed_key_stays_failed_on_the_other_side(pair):
    out, _, into, _ = pair()
    t = out.transfer([1], 1, key=TransferKey("k"), deadline_s=0.2)
    with pytest.raises(KVTransferError):
        t.wait(10)
    out.inspect(1)  # what was said before has come, too

    late = into.receive(TransferKey("k"), [1])
    with pytest.raises(KVTransferError, match="has not said"):
        late.wait(10)
    again = out.transfer([1], 1, key=TransferKey("k", 1))
    into.receive(TransferKey("k", 1), [1]).wait(10)

    assert again.wait(10).state is TransferState.RELEASED


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_cancel_ends_both_sides_and_frees_the_blocks(pair, who):
    out, _, into, _ = pair()
    r = into.receive(TransferKey("k"), [1])
    stream = out.begin(TransferKey("k"), 1, [1])
    stream.send_layer(0)
    r.wait_layer(0, 10)

    assert (stream.transfer if who == "sender" else r).cancel()

    for handle in (stream.transfer, r):
        with pytest.raises(KVTransferError, match="cancelled by node") as caught:
            handle.wait(10)
        assert caught.value.cause == "cancelled"
        assert handle.state is TransferState.CANCELLED
        assert not handle.cancel()
    assert into._engine.pool.leases == out._engine.pool.leases == 0
    assert [c.status for c in into.poll()] == ["cancelled"]


def test_a_channel_that_closes_fails_what_it_carries(pair):
    out, _, into, _ = pair()
    r = into.receive(TransferKey("k"), [1])
    stream = out.begin(TransferKey("k"), 1, [1])
    stream.send_layer(0)
    r.wait_layer(0, 10)

    out.close()

    with pytest.raises(KVTransferError, match="channel of node 0 was closed"):
        r.wait(10)
    assert stream.transfer.done()
    with pytest.raises(PeerLostError, match="closed"):
        out.transfer([1], 1)
    out.close()


def test_a_lost_prefill_rank_fails_all_sides(channel, layout, tensors):
    """Two prefill ranks feed two decode ranks; one prefill rank goes away half-way."""
    prefill = [channel() for _ in range(2)]
    decode = [channel() for _ in range(2)]
    for rank, c in enumerate(prefill):
        c.register(layout(4, 2, rank), tensors(layout(4, 2, rank)))
    for rank, c in enumerate(decode):
        c.register(layout(4, 2, rank), tensors(layout(4, 2, rank)))
    for c in prefill:
        for target in decode:
            c.connect(target.node_id, timeout_s=10)
    key = TransferKey("k")
    received = [c.receive(key, [1], source_node=[0, 1]) for c in decode]
    streams = {(s, t): prefill[s].begin(key, 2 + t, [1]) for s in range(2) for t in range(2)}
    for stream in streams.values():
        stream.send_layer(0)
    for r in received:
        r.wait_layer(0, 10)
    for t in range(2):  # the survivor is done with its own part
        for layer in (1, 2):
            streams[0, t].send_layer(layer)
        streams[0, t].seal(4)

    started = time.monotonic()
    # as if its process had died: on its loop, so that it can tell nobody in between
    engine = prefill[1]._engine
    engine.loop.run(lambda: [link._sock.shutdown(2) for link in engine.links])

    for handle in (*received, streams[0, 0].transfer, streams[0, 1].transfer):
        with pytest.raises(KVTransferError, match="node 1") as caught:
            handle.wait(10)
        assert caught.value.cause == "peer_lost"
    assert time.monotonic() - started < 2
    assert [r.exception().invalid_blocks for r in received] == [(1,), (1,)]


def test_a_named_source_that_is_lost_before_its_push_fails_the_receive(pair):
    out, _, into, _ = pair()
    out.connect(1, timeout_s=10)
    r = into.receive(TransferKey("k"), [1], source_node=0)

    out.close()

    with pytest.raises(KVTransferError, match="node 0"):
        r.wait(2)


def test_a_restarted_peer_is_found_again(channel, layout, tensors):
    first = channel(node_id=0, peers={}, key=KEY)
    first.register(layout(), a := tensors(layout()))
    for attempt in range(2):
        second = channel(node_id=1, peers={}, key=KEY)
        second.register(layout(), b := tensors(layout()))
        first.add_peer(1, second.address)
        key = TransferKey("k", attempt)
        t = first.transfer([1], 1, key=key)
        second.receive(key, [2]).wait(10)
        t.wait(10)
        assert torch.equal(a["layer0"][1], b["layer0"][2])
        second.close()


def test_a_port_in_use_is_refused(channel):
    first = channel(node_id=0, peers={}, key=KEY)
    port = int(first.address.rsplit(":", 1)[1])

    with pytest.raises(ResourceError, match=str(port)):
        channel(node_id=1, peers={}, key=KEY, port=port)

    assert not [t for t in threading.enumerate() if "node-1" in t.name]


def through_proxy(channel, proxy, layout, tensors, **settings):
    out = channel(
        node_id=0, peers={}, key=KEY, settings=KVTransferSettings(lanes=1, transport="tcp")
    )
    into = channel(
        node_id=1, peers={}, key=KEY, settings=KVTransferSettings(transport="tcp", **settings)
    )
    tcp = into._engine.paths["tcp"]
    gate = proxy(tcp.endpoint())
    tcp.endpoint = lambda reached_at="": gate.address
    out.add_peer(1, into.address)
    out.register(layout(), a := tensors(layout()))
    into.register(layout(), b := tensors(layout()))
    return out, a, into, b, gate


def test_a_damaged_block_is_asked_for_once_more(channel, proxy, layout, tensors):
    out, a, into, b, gate = through_proxy(channel, proxy, layout, tensors)
    flipped = []

    def flip(position, data):
        at = 48 + 48 + 8 * 3 + 5  # token, header, table: inside the first blocks
        if not flipped and position <= at < position + len(data):
            data[at - position] ^= 0xFF
            flipped.append(at)
        return data

    gate.flip = flip
    t = out.transfer([1, 2, 3], 1, key=TransferKey("k"))
    r = into.receive(TransferKey("k"), [4, 5, 6])
    r.wait(10)
    t.wait(10)

    assert flipped
    assert r.metrics.retries == t.metrics.retries == 1
    assert all(torch.equal(a[n][[1, 2, 3]], b[n][[4, 5, 6]]) for n in a)


def test_blocks_damaged_twice_fail_both_sides(channel, proxy, layout, tensors):
    out, _, into, _, gate = through_proxy(channel, proxy, layout, tensors)

    def flip(position, data):
        if len(data) > 1024:
            data[-1] ^= 1
        return data

    gate.flip = flip
    t = out.transfer([1], 1, key=TransferKey("k"))
    r = into.receive(TransferKey("k"), [4])

    for handle in (r, t):
        with pytest.raises(KVTransferError, match="changed twice") as caught:
            handle.wait(10)
        assert caught.value.cause == "integrity"
        assert isinstance(caught.value.__cause__, IntegrityError)
    assert r.exception().invalid_blocks == (4,)


def test_swapped_blocks_are_caught(channel, layout, tensors):
    """Positions are in the checksum: right bytes in the wrong place are not accepted."""
    from sagellm.comm.kv_transfer.frames import block_sum, block_sums

    one = memoryview(b"x" * 64)

    assert block_sum([one], 0, 0) != block_sum([one], 0, 1) != block_sum([one], 1, 1)
    assert block_sum([one[:10], one[10:]], 2, 3) == block_sum([one], 2, 3)
    for cut in ([one], [one[:10], one[10:]]):  # of one run, and of several
        want = [block_sum([one], 1, 5), block_sum([one], 1, 6)]
        assert block_sums([cut, cut], 1, 5) == want


def test_a_damaged_header_loses_the_link_not_the_process(channel, proxy, layout, tensors):
    out, _, into, _, gate = through_proxy(channel, proxy, layout, tensors)

    def flip(position, data):
        if position <= 60 < position + len(data):
            data[60 - position] ^= 0xFF
        return data

    gate.flip = flip
    t = out.transfer([1], 1, key=TransferKey("k"))
    r = into.receive(TransferKey("k"), [4])

    for handle in (r, t):
        with pytest.raises(KVTransferError):
            handle.wait(10)
    assert r.exception().cause == "integrity"
    gate.flip = lambda position, data: data
    again = out.transfer([1], 1, key=TransferKey("k", 1))
    into.receive(TransferKey("k", 1), [4]).wait(10)
    again.wait(10)


def test_a_slow_frame_of_a_cancelled_transfer_costs_no_other(channel, proxy, layout, tensors):
    out, a, into, b, gate = through_proxy(channel, proxy, layout, tensors, quiesce_s=0.3)
    under_way, pause = threading.Event(), threading.Event()

    def trickle(position, data):
        if position > 1 << 18:
            under_way.set()
            pause.wait(0.02)
        return data

    gate.flip = trickle
    r = into.receive(TransferKey("victim"))
    out.transfer([torch.ones(1 << 20)], 1, key=TransferKey("victim"))
    other = out.transfer([1, 2], 1, key=TransferKey("other"))
    assert under_way.wait(10)

    r.cancel()
    with pytest.raises(KVTransferError, match="cancelled"):
        r.wait(10)

    into.receive(TransferKey("other"), [3, 4]).wait(10)
    other.wait(10)
    assert all(torch.equal(a[n][[1, 2]], b[n][[3, 4]]) for n in a)


def test_a_silent_data_connection_fails_by_its_deadline(channel, proxy, layout, tensors):
    out, _, into, _, gate = through_proxy(channel, proxy, layout, tensors, quiesce_s=0.1)
    reached = threading.Event()
    release = threading.Event()

    def stall(position, data):
        if position + len(data) > 2000:
            reached.set()
            release.wait(20)
        return data

    gate.flip = stall
    t = out.transfer([1, 2, 3], 1, key=TransferKey("k"), deadline_s=10)
    r = into.receive(TransferKey("k"), [4, 5, 6], deadline_s=0.5)
    assert reached.wait(10)
    started = time.monotonic()
    for handle in (r, t):
        with pytest.raises(KVTransferError, match=r"within 0\.5 s"):
            handle.wait(10)
    release.set()

    assert time.monotonic() - started < 2.5
    assert into.poll()[0].blocks_safe
    assert into._engine.pool.leases == 0


def test_nothing_leaks(channel, layout, tensors, eventually):
    def count():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def round_trip():
        out, into = channel(), channel()
        out.register(layout(), tensors(layout()))
        into.register(layout(), tensors(layout()))
        out.transfer([1], into.node_id, key=TransferKey("k"))
        into.receive(TransferKey("k"), [1]).wait(10)
        out.offer(TransferKey("o"), [1], num_tokens=1, ttl_s=10)
        into.fetch(TransferKey("o"), out.node_id, [1]).wait(10)
        out.transfer([1], into.node_id, key=TransferKey("left"))
        with contextlib.suppress(KVTransferError):
            into.receive(TransferKey("gone"), [2], deadline_s=0.01).wait(10)
        out.close()
        into.close()

    round_trip()
    before = count()
    for _ in range(3):
        round_trip()

    eventually(lambda: count() == before)


def test_blocks_swapped_on_the_way_are_asked_for_again(channel, proxy, layout, tensors):
    """Right bytes in the wrong place: only the position in the checksum tells."""
    out, a, into, b, gate = through_proxy(channel, proxy, layout, tensors)
    size = a["layer0"][0].nbytes
    swapped = []

    def swap(position, data):
        first = 48 + 48 + 8 * 3  # token, header, table of three sums
        if not swapped and position == 48 and len(data) >= 48 + 24 + 3 * size:
            at = first - position
            data[at : at + size], data[at + size : at + 2 * size] = (
                data[at + size : at + 2 * size],
                data[at : at + size],
            )
            swapped.append(at)
        return data

    gate.flip = swap
    t = out.transfer([1, 2, 3], 1, key=TransferKey("k"))
    r = into.receive(TransferKey("k"), [4, 5, 6])
    r.wait(10)
    t.wait(10)

    assert swapped
    assert r.metrics.retries == t.metrics.retries == 2
    assert all(torch.equal(a[n][[1, 2, 3]], b[n][[4, 5, 6]]) for n in a)


def test_a_refused_layout_is_told_with_both(channel, layout, tensors):
    """Also to a sender whose own layout fits: a fellow's does not."""
    into, good, bad = channel(), channel(), channel()
    into.register(layout(4), tensors(layout(4)))
    good.register(layout(4, 2, 0), tensors(layout(4, 2, 0)))
    bad.register(layout(4, 2, 1, dtype="float16"), tensors(layout(4, 2, 1, dtype="float16")))
    stream = good.begin(TransferKey("k"), 0, [1])
    r = into.receive(TransferKey("k"), [1], source_node=[1, 2])
    stream.send_layer(0)

    t = bad.transfer([1], 0, key=TransferKey("k"))

    seen = {}
    for name, handle in (("good", stream.transfer), ("into", r), ("bad", t)):
        with pytest.raises(KVTransferError) as caught:
            handle.wait(10)
        seen[name] = caught.value.__cause__
    assert {type(e) for e in seen.values()} == {LayoutMismatchError}
    assert "float32" in seen["into"].ours
    assert "float16" in seen["into"].theirs
    assert "float16" in seen["bad"].ours
    assert "float32" in seen["bad"].theirs
    assert "float16" in str(seen["good"])
    assert str(seen["good"]).count("ours:") == 1


def test_a_node_fails_nothing_that_it_has_no_part_in(channel, layout, tensors):
    out, into, stranger = channel(), channel(), channel()
    for c in (out, into):
        c.register(layout(), tensors(layout()))
    stranger.connect(into.node_id)
    stranger.connect(out.node_id)
    keys = [TransferKey(name) for name in ("running", "later")]
    r = into.receive(keys[0], [1], source_node=out.node_id)
    t = out.transfer([2], into.node_id, key=TransferKey("unreceived"))

    for peer in (into, out):
        link = stranger._engine.links.ready(peer.node_id)
        for key in (*keys, t.key):
            message = wire.KeyFail(key.id, key.attempt, "peer_lost", "because I say so")
            stranger._engine.loop.run(lambda k=link, m=message: k.send(m))
        stranger.inspect(peer.node_id)  # the messages before it have come, too

    received = [r, *(into.receive(k, [b], source_node=0) for k, b in ((keys[1], 3), (t.key, 4)))]
    sent = [out.transfer([2], into.node_id, key=key) for key in keys]
    for handle in (*received, *sent, t):
        handle.wait(10)


def test_a_stranger_makes_nobody_forget_what_has_landed(channel, layout, tensors):
    few = KVTransferSettings(max_remembered=4)
    out, into, stranger = channel(), channel(settings=few), channel()
    for c in (out, into):
        c.register(layout(), tensors(layout()))
    key = TransferKey("k")
    out.transfer([2], into.node_id, key=key)
    into.receive(key, [1]).wait(10)
    stranger.connect(into.node_id)
    link = stranger._engine.links.ready(into.node_id)
    failures = [wire.KeyFail(f"q{i}", 0, "peer_lost", "") for i in range(8)]
    offers = [wire.Offer(100 + i, f"p{i}", 0, {"kv": 1}) for i in range(8)]
    fails = [wire.Fail(100 + i, "peer_lost", "") for i in range(8)]

    stranger._engine.loop.run(lambda: [link.send(m) for m in (*failures, *offers, *fails)])
    stranger.inspect(into.node_id)

    assert into.receive(key, [1], deadline_s=1).wait(10).done()


def test_a_sender_that_failed_before_they_met_fails_the_receive_that_names_it(pair):
    out, _, into, _ = pair()
    out.connect(into.node_id)
    link = out._engine.links.ready(into.node_id)
    out._engine.loop.run(lambda: link.send(wire.KeyFail("k", 0, "peer_lost", "it is gone")))
    out.inspect(into.node_id)

    for named in ({"source_node": out.node_id}, {}):
        with pytest.raises(KVTransferError, match="it is gone"):
            into.receive(TransferKey("k"), [1], **named).wait(5)


def test_many_words_of_failures_hold_nobody_up(pair):
    out, _, into, _ = pair()
    for i in range(2000):
        out.transfer([torch.zeros(1)], into.node_id, key=TransferKey(f"x{i}"), deadline_s=60)
    into.connect(out.node_id)
    link = into._engine.links.ready(out.node_id)
    words = [wire.KeyFail(f"q{i}", 0, "peer_lost", "") for i in range(5000)]
    into._engine.loop.run(lambda: [link.send(m) for m in words])

    started = time.monotonic()
    into.inspect(out.node_id, 30.0)

    assert time.monotonic() - started < 1.0
