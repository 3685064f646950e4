import contextlib
import os
import struct
import threading
import time

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings, wire
from sagellm.comm.kv_transfer.frames import HEADER_BYTES, Header
from sagellm.core.protocols import (
    CacheGroup,
    IntegrityError,
    KVLayout,
    KVTransferError,
    TransferKey,
)


def test_an_authenticated_peer_cannot_write_what_was_not_granted(pair, eventually, attacker):
    from sagellm.comm.kv_transfer.transports.tcp import TcpTransport

    _, _, b, tensors = pair()
    before = {n: t.clone() for n, t in tensors.items()}
    r = b.receive(TransferKey("k"), [3])
    transport = TcpTransport()
    size = tensors["layer0"][0].nbytes
    cases = [
        (Header(1, 0, 1, 1, size, 0), "granted"),  # second block of one
        (Header(1, 9, 0, 1, size, 0), "granted"),  # no such layer
        (Header(1, 0, 0, 1, size * 100, 0), "bytes"),  # longer than the block
    ]
    for attempt, (head, what) in enumerate(cases):
        if attempt:
            r = b.receive(TransferKey("k", attempt), [3])
        enemy = attacker(b)
        enemy.say(wire.Offer(1, "k", attempt, {"kv": 1}))
        enemy.answer(wire.Grant)
        conn = transport.connect(enemy.welcome.endpoints["tcp"], enemy.token, 5)
        conn.send(
            [memoryview(head.pack(bytes(8 * head.count), enemy.frame_key) + b"E" * (size * 2))], 5
        )
        with pytest.raises(KVTransferError, match=what) as caught:
            r.wait(10)
        assert caught.value.cause == "integrity"
        assert enemy.lost()
        conn.close()

    for n, t in tensors.items():
        assert torch.equal(t, before[n])
    eventually(lambda: b._engine.pool.leases == 0)
    transport.close()


@pytest.mark.parametrize(
    "message",
    [
        wire.Offer(1, "h", 0, {"kv": 1 << 60}),
        wire.Offer(1, "h", 0, {"kv": -5}),
        wire.Offer(1, "h", 0, {}, [wire.TensorInfo((1 << 40,), "float32", 0, 0)], 4096),
        wire.Offer(1, "h", 0, {}, [wire.TensorInfo((-1,), "float32", 0, 0)], 4096),
        wire.Offer(1, "h", 0, {}, [wire.TensorInfo((4,), "__class__", 0, 0)], 4096),
        wire.Offer(1, "h", 0, {}, [wire.TensorInfo((1 << 20,), "uint8", 0, 0)], 1),
        wire.Offer(1, "h", 0, {"kv": 1}, None, 0, {"kv": b"odd"}),
        wire.Offer(1, "h", 0, {"kv": 1}, None, 0, {"kv": struct.pack("<q", 99)}),
    ],
)
def test_hostile_offers_are_refused_without_allocating(pair, message, attacker):
    _, _, b, _ = pair()
    r = b.receive(TransferKey("h"))
    enemy = attacker(b)

    enemy.say(message)
    reply = enemy.answer(wire.Fail)

    assert reply.code in ("invalid_argument", "resource_exhausted")
    with pytest.raises(KVTransferError):
        r.wait(10)


@pytest.mark.parametrize(
    "message",
    [
        wire.Fetch(1, "o", 0, {"kv": 2}, {"kv": wire.Part("head", 0, 99)}),
        wire.Fetch(1, "o", 0, {"kv": 2}, {"kv": wire.Part("head", -4, 1)}),
        wire.Fetch(1, "o", 0, {"kv": 2}, {"kv": wire.Part("nothing", 0, 1)}),
        wire.Fetch(1, "o", 0, {"kv": 2}, {"other": wire.Part("", 0, 1)}),
        wire.Fetch(1, "o", 0, {"kv": 1 << 50}, {}),
    ],
)
def test_a_fetch_reads_only_what_was_offered(pair, message, attacker):
    _, _, b, _ = pair()
    b.offer(TransferKey("o"), [1, 2], num_tokens=8, ttl_s=10)
    enemy = attacker(b)

    enemy.say(message)
    reply = enemy.answer(wire.Fail)

    assert "not held here" in reply.message or "blocks of" in reply.message


def test_a_handshake_message_after_the_handshake_ends_the_link(pair, attacker):
    _, _, b, _ = pair()
    enemy = attacker(b)

    enemy.say(wire.Proof(b""))

    assert enemy.lost()


@pytest.mark.parametrize(
    "message",
    [
        wire.LayoutChanged(
            KVLayout((CacheGroup("kv", "kv", ("l",), ("block", "dim"), (1, 2, 3), "float32"),))
        ),
        wire.LayoutChanged(
            KVLayout((CacheGroup("kv", "kv", ("l",), ("dim",), (0,), "float32"),) * 2)
        ),
        wire.KeyFail("i" * 5000, 0, "peer_lost", ""),
    ],
)
def test_senseless_messages_end_the_link(pair, message, attacker, works):
    out, _, b, _ = pair()
    enemy = attacker(b)

    enemy.say(message)

    assert enemy.lost()
    assert works(out, b, 0)


def test_parked_offers_hold_bounded_memory(channel, layout, tensors, attacker):
    b = channel(settings=KVTransferSettings(max_backlog_bytes=1 << 16))
    b.register(layout(), tensors(layout()))
    enemy = attacker(b)
    named = {"kv": bytes(1 << 14)}
    for i in range(8):
        enemy.say(wire.Offer(i, f"p{i}", 0, {"kv": 2048}, None, 4096, named))

    reply = enemy.answer(wire.Fail)

    assert reply.code == "resource_exhausted"


@pytest.mark.parametrize("what", ["offers", "fetches"])
def test_what_one_peer_leaves_waiting_is_counted(channel, layout, tensors, attacker, what):
    b = channel(settings=KVTransferSettings(max_in_flight=4))
    b.register(layout(), tensors(layout()))
    enemy = attacker(b)
    if what == "offers":
        enemy.say(*[wire.Offer(i, f"p{i}", 0, {"kv": 1}) for i in range(1, 9)])
    else:
        enemy.say(*[wire.Fetch(i, f"p{i}", 0, {"kv": 1}, {}) for i in range(1, 9)])

    replies = [enemy.answer(wire.Fail) for _ in range(4)]

    assert [r.tid for r in replies] == [5, 6, 7, 8]
    assert {r.code for r in replies} == {"resource_exhausted"}
    assert len(b.snapshot()["waiting"]) == 4


def test_a_nack_storm_ends_the_transfer(pair, attacker):
    _, _, b, _ = pair()
    enemy = attacker(b)
    b.offer(TransferKey("o"), [1, 2], num_tokens=8, ttl_s=10)
    enemy.say(
        wire.Fetch(1, "o", 0, {"kv": 2}, {"kv": wire.Part("", 0, 1)}),
        wire.Nack(1, [(0, 0, 1 << 40)]),
    )

    reply = enemy.answer(wire.Fail)

    assert reply.code == "integrity"


def test_damaged_headers_are_recognised():
    data = bytearray(Header(1, 2, 3, 4, 100, 0).pack(bytes(32)))
    assert Header.unpack(data[:HEADER_BYTES]).payload_bytes == 100
    for at in range(HEADER_BYTES):
        damaged = bytearray(data[:HEADER_BYTES])
        damaged[at] ^= 1
        with pytest.raises(IntegrityError):
            Header.unpack(damaged)
    with pytest.raises(IntegrityError):  # of another link
        Header.unpack(data[:HEADER_BYTES], bytes(32))


def test_an_offer_is_taken_once_from_each_peer(pair, attacker):
    """Else one peer could make a receive grow without bound."""
    _, _, b, _ = pair()
    r = b.receive(TransferKey("k"), [3])
    enemy = attacker(b)
    for tid in (1, 2):
        enemy.say(wire.Offer(tid, "k", 0, {"kv": 1}))

    reply = enemy.answer(wire.Fail)

    assert (reply.tid, "second time" in reply.message) == (2, True)
    assert len(r.owner.sources) == 1


@pytest.mark.parametrize(
    "message",
    [wire.Offer(1, "p", 0, {"kv": 1}), wire.Fetch(1, "o", 0, {"kv": 1}, {})],
)
def test_a_transfer_id_used_twice_ends_the_link(pair, message, attacker):
    _, _, b, _ = pair()
    enemy = attacker(b)

    enemy.say(message, message)

    assert enemy.lost()


def test_fetches_that_are_served_are_bounded(channel, layout, tensors, attacker):
    b = channel(settings=KVTransferSettings(max_in_flight=4))
    b.register(layout(), tensors(layout()))
    b.offer(TransferKey("o"), [1], num_tokens=4, ttl_s=10)
    enemy = attacker(b)
    for tid in range(8):
        enemy.say(wire.Fetch(tid, "o", tid, {"kv": 1}, {"kv": wire.Part("", 0, 1)}))

    replies = [enemy.answer(wire.Fail) for _ in range(4)]

    assert {r.code for r in replies} == {"resource_exhausted"}


@pytest.mark.parametrize(
    "message",
    [
        wire.Offer(1, "h", 0, {}, [wire.TensorInfo((0,), "uint8", 0, 0)] * 4000, 4096),
        wire.Offer(1, "h", 0, {}, [wire.TensorInfo((1,) * 100_000, "uint8", 0, 0)], 4096),
    ],
)
def test_what_has_no_bytes_takes_memory_too(channel, layout, tensors, message, attacker):
    settings = KVTransferSettings(max_bounce_bytes=1 << 20, max_backlog_bytes=1 << 20)
    b = channel(settings=settings)
    b.register(layout(), tensors(layout()))
    r = b.receive(TransferKey("h"))
    enemy = attacker(b)

    enemy.say(message)
    reply = enemy.answer(wire.Fail)

    assert reply.code in ("invalid_argument", "resource_exhausted")
    with pytest.raises(KVTransferError):
        r.wait(10)


def test_a_broken_message_right_behind_the_handshake_ends_the_link(pair, attacker):
    _, _, b, _ = pair()
    enemy = attacker(b, then=b"\x00\x00\x00\x01\xc1")

    assert enemy.lost()
    assert b.get_stats().peers == 0


def many(kind):
    """A message, or thousands, of several megabytes: what could take time or memory."""
    fetch = wire.Fetch(1, "o", 0, {"kv": 2}, {"kv": wire.Part("", 0, 1)})
    match kind:
        case "offers":
            return [wire.Offer(i, f"p{i}", 0, {"kv": 1}) for i in range(8_000)]
        case "fetches":
            return [wire.Fetch(i, f"p{i}", 0, {"kv": 1}, {}) for i in range(8_000)]
        case "groups":
            return [wire.Offer(1, "k", 0, {f"g{i}": 1 for i in range(100_000)})]
        case "spans":
            return [fetch, wire.Nack(1, [(0, 0, 1)] * 200_000)]
        case "failures":
            return [wire.KeyFail(f"k{i}", 0, "peer_lost", "m" * 2048) for i in range(3000)]
        case "ids":
            return [wire.Offer(1, "k", 0, {"kv": 1}, None, 0, {"kv": bytes(12 << 20)})]
        case "layers":
            layers = tuple(f"l{i}" for i in range(100_000))
            group = CacheGroup("kv", "kv", layers, ("block", "dim"), (8,), "float32")
            return [wire.LayoutChanged(KVLayout((group,)))]


@pytest.mark.parametrize(
    "kind", ["offers", "fetches", "groups", "spans", "failures", "ids", "layers"]
)
def test_much_at_once_holds_nobody_up_and_takes_bounded_memory(
    leakless, pair, attacker, works, kind
):
    settings = {"settings": KVTransferSettings(max_backlog_bytes=1 << 20, max_remembered=64)}
    honest, _, b, held = pair(receiver=settings)
    before = {n: t.clone() for n, t in held.items()}
    honest.connect(b.node_id, timeout_s=10)
    b.offer(TransferKey("o"), [1, 2], num_tokens=8, ttl_s=60)
    r = b.receive(TransferKey("k"), [3], source_node=9)
    enemy = attacker(b)
    data = enemy.sealed(*many(kind))
    memory = resident_bytes()
    started = time.monotonic()

    with contextlib.suppress(OSError):
        enemy.sock.sendall(data)
    assert works(honest, b)

    assert time.monotonic() - started < 5
    enemy.sock.close()
    with pytest.raises(KVTransferError):
        r.wait(30)
    assert resident_bytes() - memory < 160 << 20
    assert all(torch.equal(held[n], before[n]) for n in held)


def test_what_a_peer_made_long_is_not_passed_on(pair, attacker):
    """Else its layout, in the reason why a transfer failed, would end links between others."""
    honest, _, b, _ = pair(sender={"settings": KVTransferSettings(max_message_bytes=1 << 16)})
    honest.connect(b.node_id, timeout_s=10)
    key = TransferKey("k")
    r = b.receive(key, [3], source_node=[9, honest.node_id])
    t = honest.begin(key, b.node_id, [1]).transfer  # not sealed: it cannot land
    group = CacheGroup("kv", "kv", ("l" * (1 << 20),), ("block", "dim"), (8,), "float32")
    attacker(b).say(wire.LayoutChanged(KVLayout((group,), "m" * (1 << 20))))

    for handle in (r, t):
        with pytest.raises(KVTransferError, match="KV layouts do not fit"):
            handle.wait(10)
    assert honest.get_stats().peers == 1


def test_a_peer_that_reads_no_answers_loses_its_link(leakless, pair, attacker, eventually, works):
    settings = KVTransferSettings(max_backlog_bytes=1 << 16, max_in_flight=8)
    honest, _, b, _ = pair(receiver={"settings": settings})
    enemy = attacker(b, receive_buffer=4096)
    eventually(lambda: b.get_stats().peers == 1)

    def flood():
        for i in range(0, 400_000, 1000):  # each is answered with a refusal
            enemy.say(*[wire.Offer(n, "x", n, {"kv": 1}) for n in range(i, i + 1000)])

    with pytest.raises(OSError, match=r"reset|pipe"):
        flood()

    eventually(lambda: b.get_stats().peers == 0)
    assert works(honest, b)


def test_a_peer_that_reads_no_blocks_holds_them_no_longer_than_its_lease(
    leakless, pair, attacker, eventually, works
):
    honest, _, b, _ = pair(blocks=64, page=256, dim=64, receiver={"settings": quick()})
    enemy = attacker(b)
    with enemy.connect_data(b):
        offer = b.offer(TransferKey("o"), range(64), num_tokens=8, ttl_s=1)
        enemy.say(wire.Fetch(1, "o", 0, {"kv": 64}, {"kv": wire.Part("", 0, 1)}))
        eventually(lambda: offer.state.value != "offered")
        started = time.monotonic()

        assert works(honest, b)  # meanwhile, with another
        with pytest.raises(KVTransferError, match="not fetched within"):
            offer.wait(10)

        assert time.monotonic() - started < 1 + 1.5
        assert b._engine.pool.leases == 0
    (done,) = [c for c in b.poll() if c.key.id == "o"]
    assert done.blocks_safe


def quick():
    return KVTransferSettings(quiesce_s=0.1)


def resident_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_lanes_that_are_announced_and_never_come_keep_one_thread(channel, attacker, eventually):
    settings = KVTransferSettings(transport="tcp", handshake_timeout_s=30)
    node = channel(settings=settings)
    enemy = attacker(node)

    enemy.say(*(wire.Lane(i, "tcp") for i in range(1, 15)))

    eventually(lambda: [k.lanes_promised for k in node._engine.links] == [15])
    eventually(lambda: sum("-in-" in t.name for t in threading.enumerate()) == 1)


def test_peers_together_have_no_more_room_than_there_is(pair, attacker, works, eventually):
    """Each within its own bound: it is their sum that would fill the memory."""
    most = 1 << 20
    honest, _, b, _ = pair(receiver={"settings": KVTransferSettings(max_waiting_bytes=most)})
    enemies = [attacker(b, node_id=20 + i, instance=bytes([i]) * 16) for i in range(4)]
    ids = {"kv": bytes(1 << 17)}
    for enemy in enemies:
        enemy.say(*(wire.Offer(i, f"o{i}", 0, {"kv": 1 << 14}, None, 0, ids) for i in range(3)))
        fetch = wire.Fetch(9, "f", 0, {"kv": 1 << 14}, {"kv": wire.Part("", 0, 1)}, ids)
        enemy.say(fetch, wire.Ask(1))
        enemy.answer(wire.Answer)  # all before it has come

    assert b._engine.waiting.used <= most
    assert 5 <= len(b.snapshot()["waiting"]) <= 8
    for enemy in enemies:
        enemy.sock.close()
    assert works(honest, b)
    eventually(lambda: not b._engine.waiting.used)
