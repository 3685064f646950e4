"""Channels that are closed, layouts and tensors to move, a proxy that damages bytes."""

import collections
import concurrent.futures
import contextlib
import gc
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferChannel, auth, wire
from sagellm.core.protocols import CacheGroup, IntegrityError, KVLayout, Shard, TransferKey
from sagellm.core.protocols.testing.pytest_plugin import (
    rank_pool as rank_pool,
    rank_pools as rank_pools,
)

sys.path.append(str(Path(__file__).parent))  # helpers lie beside the tests

if not torch.cuda.is_available():  # read when triton is imported, by whomever
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def imported_for_good():
    """Tests that count what is held collect garbage: what was imported before is none."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def held_by_this_process():
    """Descriptors by kind, threads and mappings that channels may hold."""
    kinds = collections.Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists the others
            kinds[os.readlink(f"/proc/self/fd/{fd}").split(":")[0]] += 1
    with open("/proc/self/maps") as f:
        kinds["mapped"] = sum("memfd:" in line or "/dev/shm" in line for line in f)
    kinds["threads"] = sum(t.name.startswith("kv-") for t in threading.enumerate())
    names = ("socket", "pipe", "anon_inode", "/memfd", "mapped", "threads")
    return {name: kinds[name] for name in names}


@pytest.fixture
def leakless(eventually):
    """Holds a test to leaving no descriptor, port, thread or mapping; name it first."""
    gc.collect()
    before = held_by_this_process()
    yield
    gc.collect()

    def more():  # what an earlier test has left may go meanwhile
        now = held_by_this_process()
        return {name: (n, now[name]) for name, n in before.items() if now[name] > n}

    try:
        eventually(lambda: not more(), 20)
    except AssertionError:
        names = [t.name for t in threading.enumerate()]
        pytest.fail(f"held before and after: {more()}; threads: {names}")


@pytest.fixture
def kept():
    """Counts descriptors, threads, and mappings of memory files; closed channels are cycles."""

    def count():
        gc.collect()
        with open("/proc/self/maps") as maps:
            mapped = sum("sagellm-kv" in line for line in maps)
        return len(os.listdir("/proc/self/fd")), threading.active_count(), mapped

    return count


@pytest.fixture
def channel():
    """Makes channels, and closes them."""
    made = []

    def make(*args, **kwargs):
        made.append(KVTransferChannel(*args, **kwargs))
        return made[-1]

    yield make
    for c in made:
        c.close()


@pytest.fixture
def layout():
    """Makes a layout of one group, kv_BSHPD, of which this node holds a shard of the heads."""

    def make(heads=4, tp=1, rank=0, layers=3, page=4, dim=8, dtype="float32", model="m", **kw):
        replicas = max(1, tp // heads)
        parts = tp // replicas
        shard = Shard("head", rank // replicas, parts, replicas) if tp > 1 else None
        return KVLayout(
            (
                CacheGroup(
                    name="kv",
                    kind="kv",
                    layers=tuple(f"layer{i}" for i in range(layers)),
                    axes=kw.get("axes", ("block", "kv", "head", "token", "dim")),
                    block_shape=kw.get("block_shape", (2, heads // parts, page, dim)),
                    dtype=dtype,
                    page_tokens=page,
                    shard=shard,
                ),
            ),
            model=model,
        )

    return make


@pytest.fixture
def tensors():
    """Makes tensors for such a layout, random."""

    def make(layout, blocks=10):
        group = layout.groups[0]
        shape = (blocks, *group.block_shape)
        return {n: torch.randn(shape).to(getattr(torch, group.dtype)) for n in group.layers}

    return make


@pytest.fixture
def pair(channel, layout, tensors):
    """Two channels with equal layouts: (sender, its tensors, receiver, its tensors)."""

    def make(blocks=10, sender=None, receiver=None, **kw):
        out, into = channel(**(sender or {})), channel(**(receiver or {}))
        a, b = tensors(layout(**kw), blocks), tensors(layout(**kw), blocks)
        out.register(layout(**kw), a)
        into.register(layout(**kw), b)
        return out, a, into, b

    return make


class Proxy:
    """Forwards one address byte by byte, except those that it flips.

    `flip` sees what goes to the address, `flip_back` what comes from it, each with its position
    in the stream; None cuts the connection, a tuple does after what it holds.
    """

    def __init__(self, target):
        self.target = target
        self.flip = self.flip_back = lambda position, data: data
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            host, port = self.target.rsplit(":", 1)
            far = socket.create_connection((host, int(port)))
            self._sockets += [near, far]
            for a, b, forward in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(a, b, forward), daemon=True).start()

    def _pump(self, a, b, forward):
        position = 0
        try:
            while data := bytearray(a.recv(1 << 16)):
                at, position = position, position + len(data)
                data = (self.flip if forward else self.flip_back)(at, data)
                if data is None:
                    break
                if isinstance(data, tuple):
                    b.sendall(data[0])
                    break
                b.sendall(data)
            else:
                b.shutdown(socket.SHUT_WR)
                return
        except OSError:  # one end is gone: so is the other
            pass
        for sock in (a, b):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        for s in self._sockets:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            s.close()


@pytest.fixture
def proxy():
    made = []

    def make(target):
        made.append(Proxy(target))
        return made[-1]

    yield make
    for p in made:
        p.close()


class Strangers:
    """What a test does with sockets of its own."""

    @staticmethod
    def dial(address):
        """A connection to `host:port`."""
        host, port = address.rsplit(":", 1)
        return socket.create_connection((host, int(port)), timeout=5)

    @staticmethod
    def closed(sock):
        """Whether the other side ends the connection in time."""
        try:
            while sock.recv(65536):
                pass
        except (ConnectionError, TimeoutError) as e:
            return not isinstance(e, TimeoutError)
        return True


@pytest.fixture
def strangers():
    """Connections that are no channel's."""
    return Strangers


@pytest.fixture
def at_once():
    """Runs a function for many cases, each on a thread, because most of them just wait."""

    def run(function, cases, threads=8):
        failed = []
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for case, done in [(case, pool.submit(function, case)) for case in cases]:
                if (error := done.exception()) is not None:
                    error.add_note(f"case: {case}")
                    failed.append(error)
        if failed:
            raise ExceptionGroup(f"{len(failed)} cases", failed)

    return run


@pytest.fixture
def works():
    """Tells whether a small transfer goes through."""

    def check(a, b, attempt=0):
        key = TransferKey("works", attempt)
        t = a.transfer([torch.ones(3)], b.node_id, key=key)
        got = b.receive(key).wait(10)
        t.wait(10)
        return torch.equal(got.blocks[0].tensor, torch.ones(3))

    return check


class Attacker:
    """A peer that has the key, and says what it likes: a control connection made by hand."""

    def __init__(self, b, node_id=9, then=b"", instance=b"", receive_buffer=None):
        self.sock = Strangers.dial(b.address)
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        hello = wire.encode(
            wire.Hello(wire.PROTOCOL, node_id, b.node_id, b"n" * 32, 1, 1, instance)
        )
        self.sock.sendall(hello)
        self._buffer = wire.FrameBuffer(1 << 20)
        self._bodies = []
        body = self._body()
        digest = auth.transcript(hello[4:], body)
        key = b._engine.discovery.key
        self.sock.sendall(wire.encode(wire.Proof(auth.proof(key, digest, initiator=True))))
        self.session = session = auth.session_key(key, digest)
        self._ours = auth.Seal(session, initiator=True)
        self._theirs = auth.Seal(session, initiator=False)
        try:
            self.welcome = self.read()
        except IntegrityError:  # nothing but a refusal comes without a seal
            self.welcome = None
            return
        self.token = auth.data_token(session, 0)
        self.frame_key = auth.frame_key(session, initiator=True)
        pool = b._engine.pool
        ready = wire.Ready(pool.layout if pool is not None else None, "tcp", True, "")
        self.sock.sendall(self.sealed(ready) + then)

    def _body(self):
        while not self._bodies:
            data = self.sock.recv(65536)
            assert data, "closed"
            self._bodies.extend(self._buffer.feed(data))
        return self._bodies.pop(0)

    def read(self):
        return wire.decode(self._theirs.open(self._body()))

    def connect_data(self, b, number=0):
        """The link's data connection of that number, as bytes: nothing is sent but the token."""
        token = auth.data_token(self.session, number)
        sock = Strangers.dial(b._engine.paths["tcp"].endpoint())
        sock.sendall(auth.token_id(token) + auth.token_proof(token, initiator=True))
        assert sock.recv(32) == auth.token_proof(token, initiator=False)
        return sock

    def sealed(self, *messages):
        return b"".join(self.sealed_body(wire.encode(m)[4:]) for m in messages)

    def sealed_body(self, body):
        body = self._ours.close(body)
        return struct.pack(">I", len(body)) + body

    def say(self, *messages):
        self.sock.sendall(self.sealed(*messages))

    def answer(self, kind):
        """The next message of that kind; others are passed over."""
        while not isinstance(message := self.read(), kind):
            pass
        return message

    def gone(self):
        """Whether the link has ended by now; what came is thrown away, and nothing waits."""
        try:
            while data := self.sock.recv(1 << 20):
                assert data
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def lost(self):
        """Whether the other side ends the link in time."""
        return Strangers.closed(self.sock)


@pytest.fixture
def attackers():
    """What such peers are made by, for tests that make thousands and close each."""
    return Attacker


@pytest.fixture
def attacker():
    """Makes peers that have the key, and closes them."""
    made = []

    def make(*args, **kwargs):
        made.append(Attacker(*args, **kwargs))
        return made[-1]

    yield make
    for enemy in made:
        enemy.sock.close()


@pytest.fixture
def eventually():
    """Waits until something is true, and fails when it does not become so."""

    def wait(condition, timeout_s=5.0):
        end = time.monotonic() + timeout_s
        tick = threading.Event()
        while not condition():
            assert time.monotonic() < end, "it did not become true in time"
            tick.wait(0.005)

    return wait


@pytest.fixture(scope="module")
def bases():
    """Fitted bases by how many layers they join, which the store holds."""
    from basis_data import held_bases

    yield from held_bases()
