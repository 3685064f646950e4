"""Ten thousand hostile connections: bounded time, memory, descriptors and threads.

One in ten has the key and sends ten frames: half of all hostile frames come from insiders.
"""

import contextlib
import logging
import os
import random
import threading
import time

import pytest
import torch

from sagellm.comm.kv_transfer import wire
from sagellm.comm.kv_transfer.frames import Header
from sagellm.core.protocols import TransferKey

CONNECTIONS = 10_000


def resident_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stranger(rng, address, strangers):
    """Garbage of one that has no key; half of it begins like a handshake."""
    with contextlib.suppress(OSError), strangers.dial(address) as sock:
        hello = wire.Hello(wire.PROTOCOL, 9, 0, rng.randbytes(32), 1, 1)
        start = wire.encode(hello) if rng.random() < 0.5 else b""
        sock.sendall(start + rng.randbytes(rng.randrange(1, 200)))


def insider(rng, b, attacker):
    """Ten frames of one that has the key, on its control or its data connection.

    Those that are well formed come first, because the first mutated one ends the link. Half of
    the mutated ones have their seal or digest made anew.
    """
    enemy = attacker(b)
    anew = rng.random() < 0.5
    with enemy.sock, contextlib.suppress(OSError, AssertionError):
        if rng.random() < 0.5:
            tids = [rng.randrange(1 << 31) for _ in range(9)]
            said = enemy.sealed(
                *[rng.choice([wire.Done, wire.Release])(tid) for tid in tids[:5]],
                *[wire.Offer(tid, "x", tid, {"kv": 1 << 40}) for tid in tids[5:]],
            )
            body = bytearray(wire.encode(wire.Offer(1, "k", 0, {"kv": 1}))[4:])
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            last = enemy.sealed_body(bytes(body))
            if not anew:
                last = last[:-1] + bytes([last[-1] ^ 1])
            enemy.sock.sendall(said + last)
            return
        with enemy.connect_data(b) as data:
            frames = bytearray()
            for last in [False] * 9 + [True]:
                tid, layer = rng.randrange(1, 1 << 32), rng.randrange(9)
                head = Header(tid, layer, 0, rng.randrange(1, 9), 64, 0)
                frame = bytearray(head.pack(rng.randbytes(head.table_bytes), enemy.frame_key))
                if last:
                    flags = rng.randrange(256) if anew else 0
                    head = Header(tid, layer, 1 << 31, 4096, (1 << 64) - 1, flags)
                    frame = bytearray(head.pack(b"", enemy.frame_key))
                    if not anew:
                        frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
                frames += frame + rng.randbytes(64)
            data.sendall(frames)


@pytest.mark.timeout(120)
def test_ten_thousand_hostile_connections(leakless, channel, pair, strangers, attacker, caplog):
    caplog.set_level(logging.WARNING)
    out, a, b, held = pair()
    out.connect(b.node_id, timeout_s=10)
    receive = b.receive(TransferKey("k"), [3], deadline_s=100)
    before = {n: t.clone() for n, t in held.items()}
    addresses = [b.address, b._engine.paths["tcp"].endpoint()]
    rng = random.Random(4)
    memory, descriptors, threads = resident_bytes(), len(os.listdir("/proc/self/fd")), 0
    started = time.monotonic()
    for i in range(CONNECTIONS):
        if i % 10:
            stranger(rng, rng.choice(addresses), strangers)
        else:
            insider(rng, b, attacker)
        if i % 500 == 0:
            threads = max(threads, threading.active_count())
            assert len(os.listdir("/proc/self/fd")) - descriptors < 64 + 64 + 40

    assert time.monotonic() - started < 90
    assert resident_bytes() - memory < 64 << 20
    assert threads < 200  # a thousand had the key, each with a thread that waited for its data
    for i in range(3):
        t = out.transfer([1, 2], b.node_id, key=TransferKey("honest", i))
        b.receive(TransferKey("honest", i), [8, 9]).wait(10)
        t.wait(10)
    receive.cancel()
    assert all(torch.equal(held[n][:3], before[n][:3]) for n in held)
    assert all(torch.equal(held[n][4:8], before[n][4:8]) for n in held)
    assert all(torch.equal(held[n][[8, 9]], a[n][[1, 2]]) for n in held)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(caplog.records) < 1000  # nobody can fill the log
