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
    UnsupportedOperationError,
)


@pytest.mark.parametrize("offer_first", [True, False])
def test_either_of_offer_and_fetch_may_come_first(pair, offer_first, eventually):
    out, a, into, b = pair()
    if offer_first:
        o = out.offer(TransferKey("o"), [1, 2], num_tokens=8, ttl_s=10)
        f = into.fetch(TransferKey("o"), 0, [5, 6])
    else:
        f = into.fetch(TransferKey("o"), 0, [5, 6])
        eventually(lambda: len(out._engine.sending.offering.fetches))
        o = out.offer(TransferKey("o"), [1, 2], num_tokens=8, ttl_s=10)

    f.wait(10)
    o.wait(10)

    assert all(torch.equal(a[n][[1, 2]], b[n][[5, 6]]) for n in a)
    assert o.state is TransferState.RELEASED
    assert f.num_tokens == o.num_tokens == 8
    assert [c.num_tokens for c in (*into.poll(), *out.poll())] == [8, 8]
    assert out._engine.pool.leases == 0


def test_a_fetch_does_not_land_before_it_is_told_how_many_tokens_came(pair, eventually):
    out, _, into, _ = pair()
    out.connect(into.node_id, timeout_s=5)
    into.connect(out.node_id, timeout_s=5)
    sealed, on_sealed = [], into._engine.receiving.on_sealed
    into._engine.receiving.on_sealed = lambda *args: sealed.append(args)
    out.offer(TransferKey("o"), [1, 2], num_tokens=8, ttl_s=10)
    f = into.fetch(TransferKey("o"), 0, [5, 6])
    eventually(lambda: sealed and f.progress.blocks_done == 6)

    assert not f.done()
    into._engine.loop.call(lambda: on_sealed(*sealed[0]))
    f.wait(10)

    assert f.num_tokens == 8


def test_one_standing_offer_serves_chosen_blocks_and_layers(pair):
    out, a, into, b = pair()
    o = out.offer(TransferKey("pool"), range(10), num_tokens=0, ttl_s=30)
    before = b["layer1"].clone()

    for attempt, (src, dst) in enumerate([([3], [0]), ([9, 4], [1, 2])]):
        key = TransferKey("pool", attempt)
        into.fetch(key, 0, dst, src_blocks=src, layers=[0, 2]).wait(10)

    assert torch.equal(a["layer0"][[3, 9, 4]], b["layer0"][[0, 1, 2]])
    assert torch.equal(a["layer2"][[3, 9, 4]], b["layer2"][[0, 1, 2]])
    assert torch.equal(before, b["layer1"])
    assert not o.done()
    assert o.cancel()
    with pytest.raises(KVTransferError):
        o.wait(10)


def test_an_offer_that_is_cancelled_while_it_is_fetched_has_not_landed(pair):
    out, _, into, _ = pair()
    o = out.offer(TransferKey("o"), [1], num_tokens=4, ttl_s=30)
    key = TransferKey("o", 1)
    hold, served = threading.Event(), out._engine.sending

    def late(link, tid, on_done=served.on_done):
        assert o.cancel()  # before the receiver's word has been taken in
        out._engine.loop.call(lambda: on_done(link, tid))
        out._engine.loop.call(hold.set)

    served.on_done = late
    into.fetch(key, 0, [5], src_blocks=[1]).wait(10)
    assert hold.wait(10)

    with pytest.raises(KVTransferError, match="cancelled"):
        o.wait(10)
    assert o.state is TransferState.CANCELLED


def test_an_offer_ends_when_all_parts_were_fetched(channel, layout, tensors):
    out = channel()
    out.register(layout(4), a := tensors(layout(4)))
    o = out.offer(TransferKey("o"), [1, 2], num_tokens=8, ttl_s=30)
    got = []
    for rank in range(2):
        c = channel()
        c.register(layout(4, 2, rank), b := tensors(layout(4, 2, rank)))
        assert not o.done()
        c.fetch(TransferKey("o", rank), 0, [3, 4]).wait(10)
        got.append(b)

    o.wait(10)

    for rank, b in enumerate(got):
        heads = slice(2 * rank, 2 * rank + 2)
        assert all(torch.equal(a[n][[1, 2], :, heads], b[n][[3, 4]]) for n in a)


def test_an_offer_nobody_fetches_ends_with_its_lease(pair):
    out, _, _, _ = pair()
    o = out.offer(TransferKey("o"), [1], num_tokens=4, ttl_s=0.05)

    with pytest.raises(KVTransferError, match="not fetched within") as caught:
        o.wait(10)

    assert caught.value.cause == "lease_expired"
    assert out._engine.pool.leases == 0


def test_a_renewed_offer_stands_longer_and_an_expired_one_cannot_be_renewed(pair):
    out, a, into, b = pair()
    kept = out.offer(TransferKey("kept"), [1], num_tokens=4, ttl_s=0.2)
    left = out.offer(TransferKey("left"), [2], num_tokens=4, ttl_s=0.2)
    assert kept.renew(30)
    assert kept.renew(0.001)  # never shortens

    with pytest.raises(KVTransferError, match="not fetched within"):
        left.wait(10)
    assert not left.renew(30)
    into.fetch(TransferKey("kept"), 0, [5]).wait(10)
    kept.wait(10)

    assert torch.equal(a["layer0"][1], b["layer0"][5])
    with pytest.raises(UnsupportedOperationError, match="no lease"):
        out.transfer([1], 1, key=TransferKey("push")).renew(1)
    assert not kept.renew(30)


def test_offers_are_reaped_in_order_of_expiry(pair):
    out, _, _, _ = pair()
    order = [7, 2, 9, 0, 5, 1, 8, 3, 6, 4]
    offers = {i: out.offer(TransferKey(str(i)), [i], num_tokens=1, ttl_s=30) for i in order}
    far = out.offer(TransferKey("far"), [1], num_tokens=1, ttl_s=3600)
    now = time.monotonic()
    for i, o in offers.items():
        o.deadline = now + 0.5 + i / 100  # all timers are set long before
        out._engine.loop.run(o.owner.watch._at_limit)

    for i in reversed(range(10)):
        with pytest.raises(KVTransferError):
            offers[i].wait(10)

    ended = out.poll()
    assert [c.key.id for c in ended] == [str(i) for i in range(10)]
    assert {c.cause for c in ended} == {"lease_expired"}
    assert out.get_stats().failures == {"lease_expired": 10}
    assert not far.done()


def test_a_fetch_that_a_lease_cuts_off_fails_with_its_cause_on_both_sides(pair):
    out, _, into, _ = pair()
    never = Never()
    o = out.offer(TransferKey("o"), [1], num_tokens=4, ttl_s=0.3, after=never)
    f = into.fetch(TransferKey("o"), 0, [5])

    for handle in (f, o):
        with pytest.raises(KVTransferError) as caught:
            handle.wait(10)
        assert caught.value.cause == "lease_expired"


class Never:
    """An event that does not happen."""

    def query(self):
        return False

    def synchronize(self):
        raise AssertionError("nobody may block on it")


def test_a_fetch_nobody_offers_ends_with_its_deadline(pair):
    _, _, into, _ = pair()
    f = into.fetch(TransferKey("o"), 0, [1], deadline_s=0.2)

    with pytest.raises(KVTransferError, match=r"within 0\.2 s"):
        f.wait(10)

    assert f.exception().invalid_blocks == (1,)


def test_wrong_fetches_are_refused_by_the_offering_side(pair):
    out, _, into, _ = pair()
    out.offer(TransferKey("o"), [1, 2], num_tokens=8, ttl_s=10)

    with pytest.raises(KVTransferError, match=r"fetches .*blocks of"):
        into.fetch(TransferKey("o", 1), 0, [1]).wait(10)
    with pytest.raises(KVTransferError, match="not offered"):
        into.fetch(TransferKey("o", 2), 0, [1], src_blocks=[3]).wait(10)
    into.fetch(TransferKey("o", 3), 0, [1, 2]).wait(10)


def test_only_blocks_of_a_pool_are_offered_once(pair):
    out, _, _, _ = pair()
    with pytest.raises(UnsupportedOperationError):
        out.offer(TransferKey("t"), [torch.ones(1)], num_tokens=1, ttl_s=1)
    out.offer(TransferKey("o"), [1], num_tokens=4, ttl_s=10)

    with pytest.raises(ConfigError, match="stands already"):
        out.offer(TransferKey("o"), [1], num_tokens=4, ttl_s=10)


def sharded_offers(channel, layout, tensors, key, size=2):
    """Two prefill ranks that offer blocks 1 and 2, and the heads of both together."""
    whole = tensors(layout(4))
    nodes = []
    for rank in range(size):
        c = channel()
        heads = slice(rank * 4 // size, (rank + 1) * 4 // size)
        part = {n: t[:, :, heads].contiguous() for n, t in whole.items()}
        c.register(layout(4, size, rank), part)
        nodes.append((c, c.offer(key, [1, 2], num_tokens=8, ttl_s=30)))
    return whole, nodes


def test_a_fetch_that_would_fill_only_a_part_of_its_blocks_is_refused(channel, layout, tensors):
    _, nodes = sharded_offers(channel, layout, tensors, TransferKey("o"))
    into = channel()
    into.register(layout(4), b := tensors(layout(4)))
    before = {n: t.clone() for n, t in b.items()}

    f = into.fetch(TransferKey("o"), nodes[0][0].node_id, [3, 4])

    with pytest.raises(KVTransferError, match=r"hold head 0\.\.3.*every node that holds a part"):
        f.wait(10)
    assert all(torch.equal(b[n], before[n]) for n in b)
    assert into._engine.pool.leases == 0
    assert not nodes[0][1].done()


def test_one_fetch_joins_the_parts_of_several_nodes(channel, layout, tensors):
    whole, nodes = sharded_offers(channel, layout, tensors, TransferKey("o"))
    into = channel()
    into.register(layout(4), b := tensors(layout(4)))

    f = into.fetch(TransferKey("o"), [c.node_id for c, _ in nodes], [3, 4])
    f.wait_layer(2, 10)
    f.wait(10)

    assert f.num_tokens == 8
    assert all(torch.equal(whole[n][[1, 2]], b[n][[3, 4]]) for n in b)
    for _, o in nodes:
        o.wait(10)


def test_one_of_several_nodes_that_fails_fails_the_fetch(channel, layout, tensors):
    _, nodes = sharded_offers(channel, layout, tensors, TransferKey("o"))
    into = channel()
    into.register(layout(4), tensors(layout(4)))
    nodes[1][1].cancel()
    with pytest.raises(KVTransferError):
        nodes[1][1].wait(10)

    f = into.fetch(TransferKey("o"), [c.node_id for c, _ in nodes], [3, 4], deadline_s=0.5)

    with pytest.raises(KVTransferError, match=r"within 0\.5 s"):
        f.wait(10)
    assert f.exception().invalid_blocks == (3, 4)
    with pytest.raises(ConfigError, match="no node to fetch from"):
        into.fetch(TransferKey("o"), [], [3, 4])


def test_an_offer_that_just_stands_holds_up_no_drain(pair, eventually):
    out, _, into, _ = pair()
    out.offer(TransferKey("o"), [1], num_tokens=4, ttl_s=30)
    out.drain(1)

    busy = out.offer(TransferKey("b"), [1], num_tokens=4, ttl_s=30, after=Never())
    into.fetch(TransferKey("b"), 0, [5])
    eventually(lambda: out._engine.sending.offering.serving)
    with pytest.raises(CommTimeoutError, match=r"1 transfers still in flight .*: b/0"):
        out.drain(0.05)
    busy.cancel()
    out.drain(5)

    assert out.get_stats().in_flight == 1
