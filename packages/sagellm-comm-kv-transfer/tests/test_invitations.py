"""Receives that name their sender tell it ahead: no round trip, and no race does harm."""

import contextlib
import threading

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings, wire
from sagellm.comm.kv_transfer._invitations import Invitations
from sagellm.comm.kv_transfer._room import Room
from sagellm.core.protocols import KVTransferError, PeerLostError, TransferKey, TransferState

KEY = b"a key of this test, long enough"


@pytest.fixture
def met(pair):
    """A pair whose sender has met the receiver: (out, a, into, b, link, the messages sent)."""

    def make(**kw):
        out, a, into, b = pair(**kw)
        out.connect(into.node_id, timeout_s=5)
        (link,) = out._engine.links
        said = []
        send = link.send

        def note(message):
            said.append(message)
            send(message)

        link.send = note
        return out, a, into, b, link, said

    return make


@contextlib.contextmanager
def holding(channel):
    """Keeps a channel's loop busy; what comes meanwhile is handled afterwards, calls first."""
    began, go = threading.Event(), threading.Event()
    channel._engine.loop.call(lambda: (began.set(), go.wait(10)))
    assert began.wait(10)
    yield channel._engine.loop
    go.set()


def same(a, b, src, dst):
    return all(torch.equal(a[n][src], b[n][dst]) for n in a)


def test_an_invited_push_needs_no_offer(met, eventually):
    out, a, into, b, link, said = met()
    r = into.receive(TransferKey("k"), [4, 5], source_node=0)
    eventually(lambda: len(link.invitations) == 1)
    assert r.state is TransferState.OFFERED

    t = out.transfer([1, 2], 1, key=TransferKey("k"))
    r.wait(10)
    t.wait(10)

    assert same(a, b, [1, 2], [4, 5])
    eventually(lambda: r.state is TransferState.RELEASED)
    assert [type(m) for m in said] == [wire.Release]
    assert len(link.invitations) == 0


def test_what_was_invited_lands_while_both_event_loops_are_busy(met, eventually):
    out, a, into, b, link, _ = met()
    key = TransferKey("k")
    r = into.receive(key, [4, 5], source_node=0)
    eventually(lambda: len(link.invitations) == 1)

    with holding(out), holding(into):
        t = out.transfer([1, 2], 1, key=key)
        r.wait(10)
        assert same(a, b, [1, 2], [4, 5])
        assert [c.key for c in into.poll()] == [key]
        assert into._engine.pool.leases == 0
        assert not t.done()

    t.wait(10)
    assert [c.key for c in out.poll()] == [key]


def test_nobody_joins_a_receive_that_has_landed(met, eventually):
    out, _, into, _, link, _ = met()
    key = TransferKey("k")
    arrivals = into._engine.receiving.arrivals
    r = into.receive(key, [4], source_node=0)
    eventually(lambda: len(link.invitations) == 1)
    owner, books, arrivals._landed = r.owner, arrivals._landed, lambda r: None  # the loop is late
    t = out.transfer([1], 1, key=key)
    r.wait(10)

    offer = wire.Offer(99, "k", 0, {"kv": 1}, None, 1 << 20, None, True, 0)
    out._engine.loop.run(lambda: link.send(offer))
    theirs = next(iter(into._engine.links))
    eventually(lambda: out._engine.ignored["done"] == 1)

    assert 99 not in theirs.inflows
    into._engine.loop.run(lambda: books(owner))
    t.wait(10)


def test_a_receive_invites_a_sender_that_comes_later(pair, eventually):
    out, a, into, b = pair()
    r = into.receive(TransferKey("k"), [4], source_node=0)
    out.connect(1, timeout_s=5)
    (link,) = out._engine.links
    eventually(lambda: len(link.invitations) == 1)

    out.transfer([1], 1, key=TransferKey("k"))
    r.wait(10)

    assert same(a, b, [1], [4])


def test_an_invited_stream_lands_when_it_is_sealed(met, eventually):
    out, a, into, b, link, said = met()
    r = into.receive(TransferKey("k"), [4], source_node=0)
    eventually(lambda: len(link.invitations) == 1)

    stream = out.begin(TransferKey("k"), 1, [1])
    for layer in range(3):
        stream.send_layer(layer)
        r.wait_layer(layer, 10)
    assert not r.done()
    stream.seal(3)
    r.wait(10)

    assert same(a, b, [1], [4])
    assert r.num_tokens == 3
    assert wire.Offer not in {type(m) for m in said}


def test_senders_that_hold_different_heads_are_all_invited(channel, layout, tensors, eventually):
    whole = layout(4)
    into = channel(node_id=9)
    into.register(whole, got := tensors(whole))
    outs, parts = [], []
    for rank in range(2):
        out = channel()
        out.register(layout(4, 2, rank), part := tensors(layout(4, 2, rank)))
        out.connect(9, timeout_s=5)
        outs.append(out)
        parts.append(part)

    r = into.receive(TransferKey("k"), [3], source_node=[0, 1])
    links = [next(iter(o._engine.links)) for o in outs]
    eventually(lambda: [len(k.invitations) for k in links] == [1, 1])
    sent = [o.transfer([1], 9, key=TransferKey("k")) for o in outs]
    r.wait(10)

    for t in sent:
        t.wait(10)
    for n, tensor in got.items():
        assert torch.equal(tensor[3], torch.cat([p[n][1] for p in parts], dim=1))


def test_senders_that_hold_the_same_are_not_invited(channel, layout, tensors):
    """Whichever comes first sends it, so that one of them is enough."""
    into = channel(node_id=9)
    into.register(layout(), got := tensors(layout()))
    outs = [channel() for _ in range(2)]
    held = [tensors(layout()) for _ in outs]
    for out, t in zip(outs, held, strict=True):
        out.register(layout(), t)
        out.connect(9, timeout_s=5)

    r = into.receive(TransferKey("k"), [3], source_node=[0, 1])
    outs[1].transfer([1], 9, key=TransferKey("k"))
    r.wait(10)

    assert same(held[1], got, [1], [3])


@pytest.mark.parametrize("what", ["count", "destinations"])
def test_a_push_that_differs_from_its_invitation_is_refused_on_both_sides(met, eventually, what):
    out, _, into, _, link, _ = met()
    r = into.receive(TransferKey("k"), [4, 5], source_node=0)
    eventually(lambda: len(link.invitations) == 1)

    if what == "count":
        t = out.transfer([1], 1, key=TransferKey("k"))
    else:
        t = out.transfer([1, 2], 1, key=TransferKey("k"), dst_blocks=[6, 7])

    for handle in (r, t):
        with pytest.raises(KVTransferError, match=r"blocks into|other destinations"):
            handle.wait(10)


def test_an_offer_that_crosses_its_invitation_withdraws_it(met, eventually):
    out, a, into, b, _, said = met()
    push = threading.Thread(target=out.transfer, args=([1], 1), kwargs={"key": TransferKey("k")})
    with holding(out) as loop:
        r = into.receive(TransferKey("k"), [4], source_node=0)
        owner = r.owner
        eventually(lambda: owner.sources)
        push.start()  # its call goes before what has come from the peer
        eventually(lambda: loop._calls)
    push.join(10)
    r.wait(10)

    assert same(a, b, [1], [4])
    assert wire.Offer in {type(m) for m in said}
    assert len(owner.sources) == 1


@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_an_invitation_is_forgotten_with_its_receive(met, eventually, end):
    out, _, into, _, link, _ = met()
    wait_s = 10 if end == "cancel" else 0.3
    r = into.receive(TransferKey("k"), [4], source_node=0, deadline_s=wait_s)
    eventually(lambda: len(link.invitations) == 1)
    if end == "cancel":
        r.cancel()

    with pytest.raises(KVTransferError):
        r.wait(10)
    eventually(lambda: len(link.invitations) == 0)
    assert into._engine.pool.leases == 0
    with pytest.raises(KVTransferError):
        out.transfer([1], 1, key=TransferKey("k")).wait(10)


def test_a_cancel_that_crosses_the_first_frame_ends_both_sides(met, eventually):
    out, _, into, b, link, said = met()
    r = into.receive(TransferKey("k"), [4], source_node=0)
    eventually(lambda: len(link.invitations) == 1)
    before = {n: t.clone() for n, t in b.items()}
    pushed = []
    with holding(out) as loop:
        r.cancel()
        with pytest.raises(KVTransferError, match="cancelled"):
            r.wait(10)
        push = threading.Thread(
            target=lambda: pushed.append(out.transfer([1], 1, key=TransferKey("k")))
        )
        push.start()
        eventually(lambda: loop._calls)
    push.join(10)
    with pytest.raises(KVTransferError, match="cancelled"):
        pushed[0].wait(10)

    assert wire.Offer not in {type(m) for m in said}
    assert all(torch.equal(before[n], b[n]) for n in b)


def test_an_invitation_for_another_attempt_is_left_alone(met, eventually):
    out, a, into, b, link, said = met()
    r = into.receive(TransferKey("k", 1), [4], source_node=0)
    eventually(lambda: len(link.invitations) == 1)

    t = out.transfer([1], 1, key=TransferKey("k", 0), deadline_s=0.2)
    with pytest.raises(KVTransferError, match="has not said"):
        t.wait(10)
    out.transfer([2], 1, key=TransferKey("k", 1))
    r.wait(10)

    assert same(a, b, [2], [4])
    assert sum(isinstance(m, wire.Offer) for m in said) == 1


def test_a_lost_link_takes_its_invitations_along(met, eventually):
    out, _, into, _, link, _ = met()
    r = into.receive(TransferKey("k"), [4], source_node=0)
    eventually(lambda: len(link.invitations) == 1)

    out._engine.loop.run(lambda: link.lose(PeerLostError("cut", rank=1)))

    with pytest.raises(KVTransferError, match="node 0"):
        r.wait(10)
    assert into._engine.pool.leases == 0


def test_a_new_layout_replaces_the_invitation(met, layout, tensors, eventually):
    out, _, into, b, link, said = met()
    r = into.receive(TransferKey("k"), [4], source_node=0)
    eventually(lambda: len(link.invitations) == 1)

    out.unregister(out._engine.pool)
    out.register(layout(), a := tensors(layout()))
    eventually(lambda: len(link.invitations) == 1)
    out.transfer([1], 1, key=TransferKey("k"))
    r.wait(10)

    assert same(a, b, [1], [4])
    assert wire.Offer not in {type(m) for m in said}


def invite(tid, name="k", attempt=0):
    return wire.Invite(tid, name, attempt, {"kv": 1}, {}, 0)


def test_invitations_are_bounded_and_the_oldest_goes():
    kept = Invitations(max_count=3, max_bytes=1 << 20, room=Room(1 << 30))
    for i in range(5):
        kept.add(invite(wire.INVITED + i, f"k{i}"))

    assert len(kept) == 3
    assert kept.take(TransferKey("k1")) is None
    assert kept.take(TransferKey("k4")).tid == wire.INVITED + 4
    assert kept.take(TransferKey("k4")) is None
    assert kept.forget(wire.INVITED + 4) is None
    small = Invitations(max_count=1000, max_bytes=4000, room=Room(1 << 30))
    for i in range(100):
        small.add(invite(wire.INVITED + i, f"k{i}"))
    assert len(small) <= 5


def test_invitations_of_all_links_are_bounded_together():
    """What finds no room is not kept: the push begins with an offer."""
    room = Room(10_000)
    links = [Invitations(max_count=100, max_bytes=4000, room=room) for _ in range(50)]
    for kept in links:
        for i in range(5):
            kept.add(invite(wire.INVITED + i, f"k{i}"))
    assert 8000 < room.used <= 10_000
    assert 10 < sum(map(len, links)) < 20

    for kept in links[::2]:
        kept.take(TransferKey("k4"))
        kept.forget(wire.INVITED)
    for kept in links:
        kept.clear()

    assert room.used == 0
    links[-1].add(invite(wire.INVITED))
    assert len(links[-1]) == 1


def test_a_second_invitation_of_a_key_replaces_the_first():
    kept = Invitations(max_count=3, max_bytes=1 << 20, room=Room(1 << 30))
    kept.add(invite(wire.INVITED))
    kept.add(invite(wire.INVITED + 1))

    assert len(kept) == 1
    assert kept.take(TransferKey("k")).tid == wire.INVITED + 1


def test_a_peer_that_invites_out_of_turn_loses_the_link(met):
    _out, _, into, _, link, _ = met()
    far = next(iter(into._engine.links))
    lost = threading.Event()
    link.when_up(lambda _: None)
    on_lost = link._on_lost

    def note(of, error):
        on_lost(of, error)
        lost.set()

    link._on_lost = note
    into._engine.loop.run(lambda: far.send(invite(7)))

    assert lost.wait(10)
    assert "out of turn" in str(link.error)


def test_a_bounded_sender_still_gets_everything_through(met):
    """More receives than invitations are kept: the others begin with an offer."""
    out, a, into, b, _, said = met(sender={"settings": KVTransferSettings(max_in_flight=2)})
    keys = [TransferKey(f"k{i}") for i in range(6)]
    got = [into.receive(k, [i], source_node=0) for i, k in enumerate(keys)]

    for i, key in enumerate(keys):
        out.transfer([i], 1, key=key).wait(10)
    for r in got:
        r.wait(10)

    assert same(a, b, list(range(6)), list(range(6)))
    assert any(isinstance(m, wire.Offer) for m in said)


def test_half_of_the_heads_does_not_fill_what_a_whole_sender_was_invited_to(
    met, layout, tensors, eventually
):
    out, _, into, b, link, _ = met(layers=1)
    r = into.receive(TransferKey("k"), [4, 5], source_node=0, deadline_s=0.7)
    eventually(lambda: len(link.invitations) == 1)
    before = {n: t.clone() for n, t in b.items()}
    half = layout(tp=2, rank=0, layers=1)
    out.unregister(out._engine.pool)
    out.register(half, tensors(half))

    out.transfer([1, 2], 1, key=TransferKey("k"))

    with pytest.raises(KVTransferError, match="all that blocks of kv hold") as caught:
        r.wait(10)
    assert caught.value.invalid_blocks == (4, 5)
    assert all(torch.equal(b[n][[4, 5], :, 2:], before[n][[4, 5], :, 2:]) for n in b)
