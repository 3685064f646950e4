import contextlib
import os
import random
import socket
import stat
import struct
import threading

import msgspec
import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings, auth, wire
from sagellm.core.protocols import (
    AuthenticationError,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    KVTransferError,
)

KEY = b"a key of this test, long enough"


def test_another_key_is_refused_by_both_sides(channel):
    right = channel(node_id=1, peers={}, key=KEY)
    wrong = channel(node_id=0, peers={1: right.address}, key=KEY + b"!")

    with pytest.raises(AuthenticationError, match="does not have"):
        wrong.connect(1, timeout_s=5)
    t = wrong.transfer([torch.ones(1)], 1)
    with pytest.raises(KVTransferError) as caught:
        t.wait(10)

    assert caught.value.cause == "unauthenticated"
    assert right.get_stats().rejected_connections >= 2
    assert right.get_stats().peers == 0


def test_an_impostor_that_answers_is_not_believed(channel):
    """A listener without the key cannot make a caller send it anything."""
    fake = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{fake.getsockname()[1]}"
    c = channel(
        node_id=0, peers={1: address}, key=KEY, settings=KVTransferSettings(handshake_timeout_s=2)
    )
    t = c.transfer([torch.ones(1)], 1, deadline_s=5)
    sock, _ = fake.accept()
    sock.settimeout(5)
    sock.recv(4096)
    sock.sendall(wire.encode(wire.Challenge(1, b"n" * 32, 1)))
    sock.recv(4096)
    sock.sendall(
        wire.encode(wire.Welcome(b"m" * 32, None, ["none"], "none", {"tcp": address}, True, ""))
    )

    with pytest.raises(KVTransferError, match="does not have") as caught:
        t.wait(10)

    assert caught.value.cause == "unauthenticated"
    sock.close()
    fake.close()


@pytest.mark.parametrize("port", ["control", "data"])
def test_garbage_is_turned_away(channel, port, works, strangers):
    a, b = channel(), channel(settings=KVTransferSettings(handshake_timeout_s=0.2))
    address = b.address if port == "control" else b._engine.paths["tcp"].endpoint()
    rng = random.Random(0)
    good = wire.encode(wire.Hello(wire.PROTOCOL, 0, 1, b"n" * 32, 1, 1))
    hostile = [
        rng.randbytes(200),
        b"\xff\xff\xff\xff" + b"x" * 100,
        struct.pack(">I", 1 << 31),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"y" * 200,
        good + good,
        good + wire.encode(wire.Bye()),
        good + wire.encode(wire.Proof(b"guess" * 8)),
        wire.encode(wire.Hello("other", 0, 1, b"", 1, 1)),
        wire.encode(wire.Hello(wire.PROTOCOL, 0, 1, b"", 7, 9)),
        wire.encode(wire.Hello(wire.PROTOCOL, 0, 5, b"", 1, 1)),
        struct.pack(">I", 40) + b"\xdd\xff\xff\xff\xff" + b"\x91" * 35,
    ]
    for data in hostile:
        with strangers.dial(address) as sock:
            sock.sendall(data + b"z" * 48)
            sock.shutdown(socket.SHUT_WR)
            assert strangers.closed(sock)

    assert b.get_stats().rejected_connections >= len(hostile) - 1
    assert b.get_stats().peers == 0
    assert works(a, b, 0)


@pytest.mark.parametrize("port", ["control", "data"])
def test_connections_that_say_nothing_are_bounded(channel, port, eventually, works, strangers):
    settings = KVTransferSettings(max_unauthenticated=4, handshake_timeout_s=0.3)
    a, b = channel(), channel(settings=settings)
    address = b.address if port == "control" else b._engine.paths["tcp"].endpoint()
    silent = [strangers.dial(address) for _ in range(12)]
    if port == "control":
        eventually(lambda: len(b._engine.links._door._guests) <= 4)

    assert works(a, b, 0)
    eventually(lambda: b.get_stats().rejected_connections >= 12)
    for sock in silent:
        sock.close()


def test_key_files_must_be_private(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(KEY + b"\n")
    path.chmod(0o600)
    assert auth.read_key_file(path) == KEY

    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"0640.*chmod 600"):
        auth.read_key_file(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes"):
        auth.read_key_file(path)
    with pytest.raises(ConfigError, match="No such file"):
        auth.read_key_file(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo", stat.S_IRUSR | stat.S_IWUSR)


def test_proofs_are_bound_to_role_and_transcript():
    one, two = auth.transcript(b"a", b"bc"), auth.transcript(b"ab", b"c")
    assert one != two
    mac = auth.proof(KEY, one, initiator=True)
    auth.verify(KEY, one, mac, initiator=True)
    for digest, initiator in ((two, True), (one, False)):
        with pytest.raises(AuthenticationError):
            auth.verify(KEY, digest, mac, initiator=initiator)
    session = auth.session_key(KEY, one)
    assert auth.data_token(session, 0) != auth.data_token(session, 1)


def test_unknown_fields_are_ignored_and_versions_must_meet(channel, monkeypatch, strangers):
    body = msgspec.msgpack.encode({"type": "done", "tid": 7, "from_the_future": [1, 2]})
    assert wire.decode(body) == wire.Done(7)
    with pytest.raises(DistributedRuntimeError):
        wire.decode(b"\xc1")

    a, b = channel(), channel()
    monkeypatch.setattr(wire, "VERSIONS", (3, 4))
    hello = wire.encode(wire.Hello(wire.PROTOCOL, 0, 1, b"", 1, 2))
    with strangers.dial(b.address) as sock:
        sock.sendall(hello)
        reply = sock.recv(4096)
    assert "speaks sagellm-kv 3..4" in wire.decode(reply[4:]).message
    assert a.connect(1, timeout_s=5).protocol_version == 4


def test_tokens_are_good_once():
    from sagellm.comm.kv_transfer.transports.tcp import TcpTransport

    transport = TcpTransport(handshake_timeout_s=0.5)
    token = b"t" * 32
    found = []
    thread = threading.Thread(target=lambda: found.append(transport.accept(token, 5)))
    thread.start()
    ours = transport.connect(transport.endpoint(), token, 5)
    thread.join(5)
    assert found

    with pytest.raises(ConnectionError):
        transport.connect(transport.endpoint(), token, 5)
    with pytest.raises(CommTimeoutError):
        transport.accept(b"u" * 32, 0.05)
    ours.close()
    found[0].close()
    transport.close()


@pytest.mark.parametrize("port", ["control", "data"])
def test_a_flood_of_garbage_does_not_keep_peers_out(channel, port, works, strangers):
    """Four attackers at once, each a few hundred connections, while new links are made."""
    b = channel(node_id=1, peers={}, key=KEY)
    address = b.address if port == "control" else b._engine.paths["tcp"].endpoint()
    over = threading.Event()
    tried = [0] * 4

    def attack(which):
        rng = random.Random(which)
        while not over.is_set() and tried[which] < 500:
            with contextlib.suppress(OSError), strangers.dial(address) as sock:
                sock.sendall(rng.randbytes(48))
            tried[which] += 1

    before = len(os.listdir("/proc/self/fd"))
    attackers = [threading.Thread(target=attack, args=(i,)) for i in range(4)]
    for t in attackers:
        t.start()
    try:
        for attempt in range(5):
            a = channel(node_id=0, peers={1: b.address}, key=KEY)
            assert works(a, b, attempt)
            a.close()
    finally:
        over.set()
        for t in attackers:
            t.join(30)

    assert sum(tried) > 20
    assert len(os.listdir("/proc/self/fd")) - before < 64 + 64 + 20
