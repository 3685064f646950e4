"""Hundreds of peers that have the key, each within its own bounds: together they fill no memory."""

import contextlib
import gc
import os
import struct

import pytest

from sagellm.comm.kv_transfer import KVTransferSettings, wire
from sagellm.comm.kv_transfer._room import Pressed
from sagellm.core.protocols import CacheGroup, KVLayout, TransferKey

LIMIT = 8 << 20
LINKS = 200


def resident_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def crowded(leakless, pair, attacker, works, eventually):
    """A pair, and many that have the key: they act one after the other, and nothing grows."""

    def make(act, links=LINKS, limit=LIMIT, **settings):
        s = KVTransferSettings(
            max_control_bytes=limit, max_waiting_bytes=limit, transport="tcp", **settings
        )
        honest, _, b, _ = pair(receiver={"settings": s})
        assert works(honest, b)
        most, memory = 0, resident_bytes()
        enemies = []
        for i in range(links):
            instance = struct.pack(">Q", i) * 2
            enemy = attacker(b, 100 + i, instance=instance)
            enemies.append(enemy)
            act(b, enemy)
            most = max(most, b._engine.control.used)
        eventually(lambda: b._engine.control.used <= limit)
        gc.collect()
        assert resident_bytes() - memory < 96 << 20
        assert most < limit + (2 << 20)
        assert works(honest, b, 1)
        return b, enemies

    return make


def answered(enemy):
    """All that it has said has been looked at, or its link has ended."""
    with contextlib.suppress(OSError, AssertionError):
        enemy.say(wire.Ask(1))
        enemy.answer(wire.Answer)


def test_messages_that_never_become_whole(crowded, eventually):
    def act(_, enemy):
        answered(enemy)
        enemy.sock.sendall(struct.pack(">I", 8 << 20) + bytes(1 << 20))

    b, enemies = crowded(act)

    eventually(lambda: sum(enemy.gone() for enemy in map(unblocked, enemies)) >= LINKS - 9)
    for enemy in enemies:
        enemy.sock.close()
    eventually(lambda: b._engine.control.used < 4096)


def unblocked(enemy):
    enemy.sock.setblocking(False)
    return enemy


def test_layouts(crowded, eventually):
    layers = tuple(f"l{i}" for i in range(10_000))
    big = KVLayout((CacheGroup("kv", "kv", layers, ("block", "dim"), (8,), "float32"),))

    def act(_, enemy):
        enemy.say(wire.LayoutChanged(big))
        answered(enemy)

    b, enemies = crowded(act, links=60)

    assert len(b._engine.links._links) < 30
    for enemy in enemies:
        enemy.sock.close()
    eventually(lambda: b._engine.control.used < 4096)


def test_answers_that_nobody_reads(crowded, eventually):
    """What the kernel takes is bounded by it; here it takes nothing more."""

    def act(b, enemy):
        answered(enemy)
        for link in b._engine.links:
            if link.peer >= 100:
                link._write = lambda _: None
        enemy.say(*[wire.Offer(i, "x", i, {"kv": 1}) for i in range(1, 500)])

    b, enemies = crowded(act, links=50, limit=1 << 20, max_in_flight=8)

    eventually(lambda: 0 < b.get_stats().peers < 50)
    assert b._engine.control.used <= LIMIT
    for enemy in enemies:
        enemy.sock.close()
    eventually(lambda: b._engine.control.used < 4096)


def test_connections_that_have_proven_the_key_and_say_half_of_who_they_are(
    crowded, strangers, eventually
):
    b, _ = crowded(lambda _, enemy: answered(enemy), links=1)
    enemies = []
    try:
        for i in range(50):
            enemies.append(half_proven(b, 500 + i, strangers))
        assert b._engine.control.used <= LIMIT
    finally:
        for sock in enemies:
            sock.close()
    eventually(lambda: b._engine.control.used < 4096)


def half_proven(b, node_id, strangers):
    """A control connection up to our proof, then the beginning of a long message."""
    from sagellm.comm.kv_transfer import auth

    sock = strangers.dial(b.address)
    hello = wire.encode(wire.Hello(wire.PROTOCOL, node_id, b.node_id, b"n" * 32, 1, 1, b""))
    sock.sendall(hello)
    buffer, bodies = wire.FrameBuffer(1 << 20), []
    while not bodies:
        bodies.extend(buffer.feed(sock.recv(65536)))
    key = b._engine.discovery.key
    digest = auth.transcript(hello[4:], bodies[0])
    sock.sendall(wire.encode(wire.Proof(auth.proof(key, digest, initiator=True))))
    assert sock.recv(65536)
    try:
        sock.sendall(struct.pack(">I", 8 << 20) + bytes(1 << 20))
    except OSError:  # turned away already
        pass
    return sock


def test_blocks_that_are_fetched_by_name(crowded):
    """Each fetch names thousands of blocks, and none takes what it is sent."""
    many = b"\x01" + bytes(7)

    def act(b, enemy):
        if enemy.session:
            ids = {"kv": many * 16384}
            part = {"kv": wire.Part("", 0, 1)}
            fetches = (wire.Fetch(i, "o", i, {"kv": 16384}, part, ids) for i in range(1, 5))
            enemy.say(*fetches)
            answered(enemy)

    offered = []

    def offer_first(b, enemy):
        if not offered:
            offered.append(b.offer(TransferKey("o"), [1, 2], num_tokens=8, ttl_s=60))
        act(b, enemy)

    b, _ = crowded(offer_first, links=40)

    assert len(b._engine.sending.offering.serving) < 64
    assert b._engine.waiting.used <= LIMIT
    offered[0].cancel()


class Hoarder:
    """Holds what it is told; ends by telling another, which holds more then."""

    def __init__(self, memory, other=None):
        self.held_bytes, self.ended = 0, 0
        self._memory, self._other = memory, other

    def give_way(self, error):
        self.ended += 1
        assert "max_control_bytes" in str(error)
        self._memory.free(self)
        if self._other is not None:
            self._memory.hold(self._other, 5)


def test_who_holds_most_ends_first_and_its_end_may_end_others():
    memory = Pressed(100)
    small, large = Hoarder(memory), Hoarder(memory)
    largest = Hoarder(memory, large)
    memory.hold(small, 10)
    memory.hold(large, 40)
    memory.hold(largest, 49)
    assert not largest.ended

    memory.hold(small, 2)
    assert (small.ended, large.ended, largest.ended) == (0, 0, 1)
    assert memory.used == 57
    memory.hold(large, 60)

    assert (small.ended, large.ended) == (0, 1)
    assert memory.used == small.held_bytes == 12
