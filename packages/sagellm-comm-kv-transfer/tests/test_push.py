import asyncio
import select

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from sagellm.comm.kv_transfer import KVTransferSettings
from sagellm.core.protocols import (
    CommTimeoutError,
    ConfigError,
    KVBlock,
    KVTransferError,
    ResourceError,
    TransferKey,
    TransferState,
)


def test_plain_tensors_arrive_as_they_were_sent(channel):
    other = channel(node_id=1)
    first = channel()
    sent = [torch.randn(2, 3), torch.arange(7), torch.zeros(0, 4), torch.ones(3).bfloat16()]

    handle = first.transfer(sent, target_node=1)
    got = other.receive(None).wait(10)

    assert first.node_id == 0
    assert [torch.equal(b.tensor, t) for b, t in zip(got.blocks, sent, strict=True)] == [True] * 4
    assert handle.wait(10).state is TransferState.RELEASED
    assert got.key == handle.key


def test_layer_and_index_of_plain_blocks_arrive(channel):
    other, first = channel(node_id=1), channel()
    wide = torch.randn(600_000)

    first.transfer([KVBlock(wide[::2], layer=3, index=7)], 1)
    block = other.receive(None).wait(10).blocks[0]

    assert (block.layer, block.index) == (3, 7)
    assert torch.equal(block.tensor, wide[::2])


@pytest.mark.parametrize(
    ("transport", "codec", "path"),
    [
        ("tcp", "none", "tcp:2"),
        ("tcp", "lz4", "tcp:2"),
        ("tcp", "zstd", "tcp:2"),
        ("shm", "none", "shm:1"),
        ("shm", "lz4", "shm:1"),
    ],
)
@pytest.mark.parametrize("receiver_first", [True, False])
def test_blocks_land_where_the_receiver_wants_them(pair, transport, codec, path, receiver_first):
    over = {"settings": KVTransferSettings(transport=transport)}
    out, a, into, b = pair(sender={"codec": codec, **over}, receiver=over, dtype="bfloat16")
    for tensor in a.values():
        tensor[2] = 0
    key = TransferKey("r")
    if receiver_first:
        r = into.receive(key, [3, 9, 0])
        t = out.transfer([1, 2, 5], into.node_id, key=key)
    else:
        t = out.transfer([1, 2, 5], into.node_id, key=key)
        r = into.receive(key, [3, 9, 0])

    r.wait(10)
    t.wait(10)

    assert all(torch.equal(a[n][[1, 2, 5]], b[n][[3, 9, 0]]) for n in a)
    p, m = r.progress, r.metrics
    assert (p.blocks_done, p.layers_done, p.bytes_done) == (9, 3, p.bytes_total)
    assert m.bytes == p.bytes_total == t.metrics.bytes
    assert m.path in (path, path.replace("2", "1"))  # a second lane may come after the offer
    assert m.wire_bytes == t.metrics.wire_bytes


def test_untouched_blocks_stay_as_they_were(pair):
    out, _, into, b = pair()
    before = {n: t.clone() for n, t in b.items()}

    out.transfer([1, 2], into.node_id, key=TransferKey("r"))
    into.receive(TransferKey("r"), [4, 5]).wait(10)

    rest = [0, 1, 2, 3, 6, 7, 8, 9]
    assert all(torch.equal(before[n][rest], b[n][rest]) for n in b)


def test_without_destination_blocks_arrive_in_buffers(pair):
    out, a, into, _ = pair()

    out.transfer([4, 1], into.node_id)
    got = into.receive(None).wait(10)

    assert [(b.layer, b.index) for b in got.blocks] == [(i, p) for i in range(3) for p in (0, 1)]
    for b in got.blocks:
        assert torch.equal(b.tensor, a[f"layer{b.layer}"][[4, 1][b.index]])


def test_the_sender_may_name_the_destination(pair):
    out, a, into, b = pair()
    key = TransferKey("r")

    out.transfer([1, 2], into.node_id, key=key, dst_blocks=[8, 7])
    into.receive(key, adopt=True).wait(10)

    assert all(torch.equal(a[n][[1, 2]], b[n][[8, 7]]) for n in a)


@pytest.mark.parametrize(
    ("adopt", "named", "why"),
    [(False, [8], "has not said that it may"), (True, [5], "while cache reads them")],
)
def test_a_sender_cannot_choose_blocks_that_were_not_given_to_it(pair, adopt, named, why):
    out, _, into, b = pair()
    into.offer(TransferKey("cache"), [4, 5], num_tokens=8, ttl_s=30)
    before = {n: t.clone() for n, t in b.items()}

    r = into.receive(None, adopt=adopt)
    t = out.transfer([1], into.node_id, dst_blocks=named)

    for handle in (r, t):
        with pytest.raises(KVTransferError, match=why) as caught:
            handle.wait(10)
        assert caught.value.cause == "invalid_argument"
    assert all(torch.equal(b[n], before[n]) for n in b)
    with pytest.raises(ConfigError, match="names no blocks"):
        into.receive(None, [1], adopt=True)


@pytest.mark.parametrize(
    ("named", "why"),
    [([3, 8], "other"), ([8, 8], "twice|unique|repeat|more than once"), ([8, 99], "99")],
)
def test_destinations_that_a_sender_names_overlap_nothing_and_exist(pair, named, why):
    out, _, into, b = pair()
    other = into.receive(TransferKey("other"), [3], deadline_s=60)
    before = {n: t.clone() for n, t in b.items()}

    r = into.receive(TransferKey("k"), adopt=True)
    t = out.transfer([1, 2], into.node_id, key=TransferKey("k"), dst_blocks=named)

    for handle in (r, t):
        with pytest.raises(KVTransferError, match=why) as caught:
            handle.wait(10)
        assert caught.value.cause == "invalid_argument"
    assert all(torch.equal(b[n], before[n]) for n in b)
    assert not other.done()
    other.cancel()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_permutation_of_blocks_lands(pushing, data):
    out, a, into, b, fresh = pushing
    count = data.draw(st.integers(1, 40))
    ids = st.permutations(range(40))
    src = np.array(data.draw(ids)[:count])
    dst = np.array(data.draw(ids)[:count])
    key = fresh()

    t = out.transfer(src, into.node_id, key=key)
    into.receive(key, dst).wait(10)
    t.wait(10)

    assert all(torch.equal(a[n][src], b[n][dst]) for n in a)


@pytest.fixture
def pushing(pair):
    out, a, into, b = pair(blocks=40, layers=2)
    counter = iter(range(1 << 30))
    return out, a, into, b, lambda: TransferKey(f"p{next(counter)}")


def test_hundreds_of_transfers_are_in_flight_at_once(pair):
    out, a, into, b = pair(blocks=400)
    n = 400
    sends = [out.transfer([i], into.node_id, key=TransferKey(f"t{i}")) for i in range(n)]
    receives = [into.receive(TransferKey(f"t{i}"), [n - 1 - i]) for i in range(n)]

    into.drain(30)
    out.drain(30)

    assert all(t.state in (TransferState.LANDED, TransferState.RELEASED) for t in sends + receives)
    assert all(torch.equal(a[k], b[k].flip(0)) for k in a)
    assert out.get_stats().transfers == {"landed": n}


def test_a_key_that_has_landed_is_not_sent_again(pair):
    out, _, into, _ = pair()
    key = TransferKey("once")
    out.transfer([1], into.node_id, key=key)
    into.receive(key, [2]).wait(10)
    sent = out.transfer([1], into.node_id, key=key).wait(10)

    again = into.receive(key, [2]).wait(10)

    assert again.done()
    assert sent.state is TransferState.RELEASED
    assert into.get_stats().bytes_received == 3 * 2 * 4 * 4 * 8 * 4
    with pytest.raises(ConfigError, match="another attempt"):
        into.receive(key, [3])


def test_receive_none_takes_pushes_in_their_order(channel):
    other, first = channel(node_id=1), channel()
    for i in range(5):
        first.transfer([torch.tensor([i])], 1, key=TransferKey(f"k{i}"))

    got = [other.receive(None).wait(10) for _ in range(5)]

    assert [r.blocks[0].tensor.item() for r in got] == list(range(5))
    assert [r.key.id for r in got] == [f"k{i}" for i in range(5)]


def test_source_node_refuses_others(channel):
    other, first, second = channel(), channel(), channel()
    r = other.receive(TransferKey("k"), source_node=2, deadline_s=10)

    refused = first.transfer([torch.ones(1)], 0, key=TransferKey("k"))
    with pytest.raises(KVTransferError, match=r"from \[2\] only"):
        refused.wait(10)
    assert not r.done() or r.exception() is not None
    second.close()


def test_wait_says_what_is_missing(channel):
    other, first = channel(node_id=1), channel()
    t = first.transfer([torch.ones(1)], 1)

    with pytest.raises(CommTimeoutError, match="offered"):
        t.wait(0.01)

    other.receive(None)
    t.wait(10)


def test_handles_can_be_awaited(channel):
    other, first = channel(node_id=1), channel()

    async def both():
        return await asyncio.gather(
            _coroutine(first.transfer([torch.ones(2)], 1)), _coroutine(other.receive(None))
        )

    t, r = asyncio.run(both())
    assert t.done()
    assert torch.equal(r.blocks[0].tensor, torch.ones(2))


async def _coroutine(handle):
    return await handle


def test_poll_reports_every_end_once_and_the_descriptor_tells(pair):
    out, _, into, _ = pair()
    assert not select.select([into.fileno()], [], [], 0)[0]
    for i in range(3):
        out.transfer([i], into.node_id, key=TransferKey(f"k{i}"))
        into.receive(TransferKey(f"k{i}"), [i]).wait(10)

    assert select.select([into.fileno()], [], [], 5)[0]
    first = into.poll(1)
    rest = into.poll()

    assert [c.key.id for c in first + rest] == ["k0", "k1", "k2"]
    assert {(c.status, c.direction, c.blocks_safe) for c in first + rest} == {
        ("landed", "receive", True)
    }
    assert into.poll() == []
    assert not select.select([into.fileno()], [], [], 0)[0]


def test_whoever_has_waited_finds_the_completion(pair):
    out, _, into, _ = pair()
    for i in range(30):
        t = out.transfer([1], into.node_id, key=TransferKey(f"k{i}"))
        r = into.receive(TransferKey(f"k{i}"), [2])

        for channel, handle in ((into, r), (out, t)):
            handle.wait(10)
            assert [c.key.id for c in channel.poll()] == [f"k{i}"]

    late = into.receive(TransferKey("late"), [2])
    late.cancel()
    with pytest.raises(KVTransferError):
        late.wait(10)
    assert [(c.status, c.blocks_safe) for c in into.poll()] == [("cancelled", True)]


def test_a_wait_that_gives_up_leaves_nothing_behind(pair):
    _, _, into, _ = pair()
    r = into.receive(TransferKey("k"), [2])

    with pytest.raises(CommTimeoutError, match="it has not landed"):
        r.wait(0.01)
    with pytest.raises(CommTimeoutError, match="layer 1 is not there"):
        r.wait_layer(1, 0.01)

    assert not r._gates


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda c: c.transfer([1, 99], 1), "block 99 .* 0..9"),
        (lambda c: c.transfer([-1], 1), "block -1"),
        (lambda c: c.transfer([1.5], 1), "integers"),
        (lambda c: c.transfer({"v": [1]}, 1), "no cache groups"),
        (lambda c: c.transfer([1], 7), r"no node 7; known nodes: \[1\]"),
        (lambda c: c.transfer([1], 0), "this node itself"),
        (lambda c: c.transfer([1], 1, deadline_s=0), "deadline"),
        (lambda c: c.transfer([1], 1, dst_blocks=[1, 2]), "differ in number"),
        (lambda c: c.transfer([1], 1, key="k"), "TransferKey"),
        (lambda c: c.receive(None, [1, 1]), "come twice"),
        (lambda c: c.receive(None, [1], source_node=[]), "names no node"),
        (lambda c: c.add_peer(7, "a..b:80"), "not host:port"),
        (lambda c: c.add_peer(7, "a" * 64 + ":80"), "not host:port"),
        (lambda c: c.fetch(("k", 0), 1, [1], layers=[5]), "layers"),
    ],
)
def test_arguments_are_checked_before_anything_is_sent(pair, call, match):
    out, _, _, _ = pair()

    with pytest.raises(ConfigError, match=match):
        call(out)

    assert out.get_stats().in_flight == 0


def test_two_receives_cannot_write_one_block(pair):
    _, _, into, _ = pair()
    first = into.receive(TransferKey("a"), [1, 2])

    with pytest.raises(ConfigError, match="already the destination"):
        into.receive(TransferKey("b"), [2, 3])

    first.cancel()
    with pytest.raises(KVTransferError):
        first.wait(10)
    assert into.receive(TransferKey("b"), [2, 3]).cancel()


def test_a_pool_cannot_be_forgotten_while_it_is_leased(pair):
    out, _, into, _ = pair()
    t = out.transfer([1], into.node_id, key=TransferKey("held"))
    pool = out._engine.pool

    with pytest.raises(ResourceError, match="held/0"):
        out.unregister(pool)

    into.receive(TransferKey("held"), [1]).wait(10)
    t.wait(10)
    assert pool.leases == 0
    out.unregister(pool)


def test_what_is_known_of_a_peer(pair):
    out, _, into, _ = pair()
    assert out.path(1) == "unconnected"
    assert "unconnected" in out.explain(1)

    info = out.connect(1, timeout_s=5)

    assert info.layout == into._engine.pool.layout
    assert (info.node_id, info.address, info.path) == (1, into.address, out.path(1))
    assert "checksums on" in out.explain(1)
    assert out.path(1) in ("shm:1", "tcp:2")


def test_bounce_memory_is_bounded_and_waits_for_room(channel):
    small = KVTransferSettings(max_bounce_bytes=1 << 16)
    other, first = channel(node_id=1, settings=small), channel()
    too_big = first.transfer([torch.zeros(1 << 17)], 1)
    refused = other.receive(None)
    with pytest.raises(KVTransferError, match="max_bounce_bytes"):
        refused.wait(10)
    with pytest.raises(KVTransferError, match="max_bounce_bytes") as caught:
        too_big.wait(10)
    assert caught.value.cause == "resource_exhausted"

    fitting = [first.transfer([torch.full((12000,), float(i))], 1) for i in range(6)]
    got = [other.receive(None) for _ in fitting]

    assert [r.wait(10).blocks[0].tensor[0].item() for r in got] == list(range(6))
