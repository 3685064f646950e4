"""Peers that have the key and say anything: seeded, and longer with SAGELLM_KV_FUZZ_ROUNDS."""

import contextlib
import logging
import os
import random
import struct

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings, wire
from sagellm.comm.kv_transfer.frames import Header
from sagellm.core.protocols import KVTransferError, TransferKey

ROUNDS = int(os.environ.get("SAGELLM_KV_FUZZ_ROUNDS", "6"))
NUMBERS = [0, 1, 2, 3, -1, 7, 255, 4096, 4097, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, -(1 << 63)]
NAMES = ["k", "o", "none", "", "works", "x" * 300, "\u2603", "kv", "head", "block", "__class__"]


class Liar:
    """Makes messages whose every field may be anything of its type."""

    def __init__(self, seed, layout):
        self.rng = random.Random(seed)
        self.layout = layout
        self.attempt = 0

    def number(self):
        return self.rng.choice([*NUMBERS, self.rng.randrange(8)])

    def name(self):
        return self.rng.choice(NAMES)

    def ids(self):
        some = [self.number() for _ in range(self.rng.randrange(4))]
        raw = struct.pack(f"<{len(some)}q", *some)
        return raw[: len(raw) - self.rng.choice([0, 0, 0, 1])]

    def maybe(self, make):
        return make() if self.rng.random() < 0.5 else None

    def table(self, make):
        return {self.rng.choice(["kv", "kv", self.name()]): make() for _ in range(1)}

    def part(self):
        return wire.Part(self.rng.choice(["", "head", self.name()]), self.number(), self.number())

    def tensor(self):
        shape = tuple(self.number() for _ in range(self.rng.randrange(4)))
        kind = self.rng.choice(["float32", "uint8", "bool", "bits8", "qint8", self.name()])
        return wire.TensorInfo(shape, kind, self.number(), self.number())

    def tensors(self):
        return [self.tensor() for _ in range(self.rng.randrange(3))]

    def message(self):
        r, n, name = self.rng, self.number, self.name
        tid = r.choice([1, 2, 3, n()])
        return r.choice(
            [
                lambda: wire.Offer(
                    tid, name(), n(), self.table(n), self.maybe(self.tensors), n(),
                    self.maybe(lambda: self.table(self.ids)), r.random() < 0.5, n(),
                ),
                lambda: wire.Offer(tid, "k", self.attempt, {"kv": 1}),
                lambda: wire.Fetch(
                    tid, name(), n(), self.table(n), self.table(self.part),
                    self.maybe(lambda: self.table(self.ids)),
                    self.maybe(lambda: [n() for _ in range(3)]), r.choice([1.0, -1.0, 1e300]),
                ),
                lambda: wire.Fetch(tid, "o", 0, {"kv": 2}, {"kv": wire.Part("", 0, 1)}),
                lambda: wire.Grant(tid, self.table(self.part)),
                lambda: wire.Sealed(tid, n()),
                lambda: wire.Nack(tid, [(n(), n(), n()) for _ in range(r.randrange(3))]),
                lambda: wire.LayerDone(tid, n()),
                lambda: wire.Done(tid),
                lambda: wire.Release(tid),
                lambda: wire.Fail(tid, name(), name(), name(), name()),
                lambda: wire.KeyFail(name(), n(), name(), name(), name(), name()),
                lambda: wire.LayoutChanged(r.choice([None, self.layout])),
            ]
        )()  # fmt: skip

    def mutated(self, body):
        """A body with some bytes changed, cut out or put in."""
        data = bytearray(body)
        for _ in range(self.rng.randrange(1, 4)):
            at = self.rng.randrange(len(data) + 1)
            match self.rng.randrange(3):
                case 0 if at < len(data):
                    data[at] ^= 1 << self.rng.randrange(8)
                case 1:
                    del data[at : at + self.rng.randrange(1, 4)]
                case _:
                    data[at:at] = self.rng.randbytes(2)
        return bytes(data)


def resident_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def target(channel, layout, tensors):
    """A channel under attack: its tensors, and what they held."""
    settings = KVTransferSettings(
        max_bounce_bytes=1 << 20, max_backlog_bytes=1 << 20, max_in_flight=64, max_remembered=256
    )
    b = channel(settings=settings)
    b.register(layout(), held := tensors(layout()))
    return b, held, {n: t.clone() for n, t in held.items()}


def unharmed(b, held, before, caplog, written=()):
    """No block was written but those, no bug was met, and the loop is alive."""
    bugs = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert not bugs, bugs[0].exc_text or bugs[0].getMessage()
    others = [i for i in range(10) if i not in written]
    assert all(torch.equal(held[n][others], before[n][others]) for n in held)
    assert b._engine.loop.run(lambda: True, 5.0)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_any_control_message_leaves_the_channel_sound(
    leakless, channel, target, layout, attacker, works, caplog, seed
):
    """Half of the links say well-formed things that make no sense, the others mutated ones.

    Half of the mutated messages carry a right seal.
    """
    b, held, before = target
    honest = channel()
    liar = Liar(seed, layout())
    b.offer(TransferKey("o"), [1, 2], num_tokens=8, ttl_s=60)
    grown = resident_bytes()
    said = 0
    for link in range(60):
        liar.attempt = link
        r = b.receive(TransferKey("k", link), [3])
        enemy = attacker(b)
        enemy.sock.setblocking(False)
        while not enemy.gone() and said < 30 * (link + 1):
            said += 1
            body = wire.encode(liar.message())[4:]
            if link % 2:
                body = liar.mutated(body)
            data = enemy.sealed_body(body)
            if link % 2 and liar.rng.random() < 0.5:
                data = data[:-1] + bytes([data[-1] ^ 1])
            with contextlib.suppress(OSError):
                enemy.sock.sendall(data)
            b._engine.loop.run(lambda: None)
        enemy.sock.close()
        r.cancel()

    assert said > 300
    assert works(honest, b, 1000 + seed)
    unharmed(b, held, before, caplog, written=[3])
    assert resident_bytes() - grown < 64 << 20


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_any_data_frame_writes_only_what_was_granted(
    leakless, channel, target, attacker, works, caplog, seed
):
    """Half of the frames are mutated bytes, half have wrong fields and right digests."""
    b, held, before = target
    honest = channel()
    rng = random.Random(seed)
    size = held["layer0"][0].nbytes
    for attempt in range(40):
        key = TransferKey("k", attempt)
        r = b.receive(key, [3, 4], deadline_s=5)
        enemy = attacker(b)
        with enemy.sock, enemy.connect_data(b) as data:
            enemy.say(wire.Offer(1, "k", attempt, {"kv": 2}))
            enemy.answer(wire.Grant)
            for _ in range(4):
                right = Header(1, rng.randrange(3), rng.randrange(2), 1, size, 0)
                wrong = Header(
                    rng.choice([1, 1, 1, 2, (1 << 32) - 1]),
                    rng.choice([0, 1, 2, 3, (1 << 32) - 1]),
                    rng.choice([0, 1, 2, (1 << 32) - 1]),
                    rng.choice([1, 1, 2, 3, 4096]),
                    rng.choice([0, 1, size, 2 * size, 1 << 20, (1 << 64) - 1]),
                    rng.choice([0, 0, 1, 2, 255]),
                )
                head = rng.choice([right, wrong])
                frame = bytearray(head.pack(rng.randbytes(head.table_bytes), enemy.frame_key))
                if rng.random() < 0.5:
                    frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
                with contextlib.suppress(OSError):
                    data.sendall(frame + rng.randbytes(rng.choice([0, size, 2 * size])))
        with pytest.raises(KVTransferError):
            r.wait(5)
        assert r.exception().invalid_blocks == (3, 4)

    assert works(honest, b, 1000 + seed)
    assert b._engine.pool.leases == 0
    unharmed(b, held, before, caplog, written=[3, 4])
