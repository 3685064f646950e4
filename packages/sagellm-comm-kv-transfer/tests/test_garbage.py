"""Ten thousand hostile connections: bounded time, memory, descriptors and threads.

Each sends one hostile frame. Half of them come after authentication, from peers that have the key;
half of those are damaged by a stranger's hand, the others have their seal or digest made anew.
"""

import concurrent.futures
import contextlib
import logging
import os
import random
import socket
import threading
import time
from collections import Counter

import pytest
import torch

from sagellm.comm.kv_transfer import wire
from sagellm.comm.kv_transfer.frames import Header
from sagellm.core.protocols import TransferKey

CONNECTIONS = 10_000
WORKERS = 8
KINDS = ["stranger", "stranger", "damaged", "anew"]


def resident_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stranger(rng, address, strangers):
    """Garbage of one that has no key; half of it begins like a handshake."""
    with contextlib.suppress(OSError), strangers.dial(address) as sock:
        hello = wire.Hello(wire.PROTOCOL, 9, 0, rng.randbytes(32), 1, 1)
        start = wire.encode(hello) if rng.random() < 0.5 else b""
        sock.sendall(start + rng.randbytes(rng.randrange(1, 200)))


def message(rng):
    """A control message that an honest peer might send, more or less."""
    tid = rng.randrange(1, 1 << 32)
    part = {"kv": wire.Part("", 0, 1)}
    return rng.choice(
        [
            wire.Offer(tid, "k", 0, {"kv": 1}),
            wire.Offer(tid, "x", 0, {"kv": 1 << 40}),
            wire.Fetch(tid, "o", 0, {"kv": 1}, part),
            wire.Done(tid),
            wire.Release(tid),
            wire.Nack(tid, [(0, 0, 1)]),
            wire.Lane(1, "tcp"),
            wire.LayoutChanged(None),
        ]
    )


def insider(rng, b, kind, enemy):
    """One mutated frame of one that has the key, on its control or its data connection."""
    if rng.random() < 0.5:
        body = bytearray(wire.encode(message(rng))[4:])
        if kind == "anew":
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        frame = bytearray(enemy.sealed_body(bytes(body)))
        if kind == "damaged":
            frame[rng.randrange(4, len(frame))] ^= 1 << rng.randrange(8)
        until_the_end(enemy.sock, frame)
        return
    with enemy.connect_data(b) as data:
        tid, layer = rng.randrange(1, 1 << 32), rng.randrange(9)
        if kind == "anew":
            head = Header(tid, layer, 1 << 31, 4096, (1 << 64) - 1, rng.randrange(256))
            frame = bytearray(head.pack(b"", enemy.frame_key))
        else:
            head = Header(tid, layer, 0, rng.randrange(1, 9), 64, 0)
            frame = bytearray(head.pack(rng.randbytes(head.table_bytes), enemy.frame_key))
            frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        until_the_end(data, frame + rng.randbytes(64))


def until_the_end(sock, data):
    """Say it and no more, and listen until the other side hangs up."""
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(65536):
        pass


@pytest.mark.timeout(240)
def test_ten_thousand_hostile_connections(leakless, pair, strangers, attackers, caplog):
    caplog.set_level(logging.WARNING)
    out, a, b, held = pair()
    out.connect(b.node_id, timeout_s=10)
    receive = b.receive(TransferKey("k"), [3], source_node=out.node_id, deadline_s=200)
    before = {n: t.clone() for n, t in held.items()}
    addresses = [b.address, b._engine.paths["tcp"].endpoint()]
    memory, descriptors = resident_bytes(), len(os.listdir("/proc/self/fd"))
    most = Counter()
    done = Counter()

    def attack(worker):
        rng = random.Random(worker)
        for i in range(worker, CONNECTIONS, WORKERS):
            kind = KINDS[(i // WORKERS + worker) % len(KINDS)]
            if kind == "stranger":
                stranger(rng, rng.choice(addresses), strangers)
            else:
                enemy = attackers(b, node_id=100 + worker)
                assert enemy.welcome is not None  # it had the key, and was let in
                with enemy.sock, contextlib.suppress(OSError, AssertionError):
                    insider(rng, b, kind, enemy)
            done[worker, kind] += 1
            if i % 50 == 0:
                most["threads"] = max(most["threads"], threading.active_count())
                most["open"] = max(most["open"], len(os.listdir("/proc/self/fd")))

    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for attacked in [pool.submit(attack, worker) for worker in range(WORKERS)]:
            attacked.result()

    assert time.monotonic() - started < 200
    assert sum(done.values()) == CONNECTIONS
    assert sum(n for (_, kind), n in done.items() if kind == "stranger") == CONNECTIONS // 2
    assert sum(n for (_, kind), n in done.items() if kind == "anew") == CONNECTIONS // 4
    assert resident_bytes() - memory < 64 << 20
    assert most["open"] - descriptors < 64 + 64 + 40 + 16 * WORKERS
    assert most["threads"] < 200  # each that had the key left threads that waited for its data
    for i in range(3):
        t = out.transfer([1, 2], b.node_id, key=TransferKey("honest", i))
        b.receive(TransferKey("honest", i), [8, 9]).wait(10)
        t.wait(10)
    receive.cancel()
    assert all(torch.equal(held[n][:8], before[n][:8]) for n in held)
    assert all(torch.equal(held[n][[8, 9]], a[n][[1, 2]]) for n in held)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(caplog.records) < 1000  # nobody can fill the log
