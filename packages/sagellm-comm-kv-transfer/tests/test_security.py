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
from sagellm.comm.kv_transfer.frames import HEADER_BYTES, Header
from sagellm.core.protocols import (
    AuthenticationError,
    CacheGroup,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    IntegrityError,
    KVLayout,
    KVTransferError,
    TransferKey,
)

KEY = b"a key of this test, long enough"


def dial(address):
    host, port = address.rsplit(":", 1)
    sock = socket.create_connection((host, int(port)), timeout=5)
    return sock


def closed(sock):
    try:
        while sock.recv(65536):
            pass
    except (ConnectionError, TimeoutError) as e:
        return not isinstance(e, TimeoutError)
    return True


def works(a, b, attempt):
    key = TransferKey("works", attempt)
    t = a.transfer([torch.ones(3)], b.node_id, key=key)
    got = b.receive(key).wait(10)
    t.wait(10)
    return torch.equal(got.blocks[0].tensor, torch.ones(3))


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
def test_garbage_is_turned_away(channel, port):
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
        with dial(address) as sock:
            sock.sendall(data + b"z" * 48)
            sock.shutdown(socket.SHUT_WR)
            assert closed(sock)

    assert b.get_stats().rejected_connections >= len(hostile) - 1
    assert b.get_stats().peers == 0
    assert works(a, b, 0)


@pytest.mark.parametrize("port", ["control", "data"])
def test_connections_that_say_nothing_are_bounded(channel, port, eventually):
    settings = KVTransferSettings(max_unauthenticated=4, handshake_timeout_s=0.3)
    a, b = channel(), channel(settings=settings)
    address = b.address if port == "control" else b._engine.paths["tcp"].endpoint()
    silent = [dial(address) for _ in range(12)]
    if port == "control":
        eventually(lambda: len(b._engine.links._door._guests) <= 4)

    assert works(a, b, 0)
    eventually(lambda: b.get_stats().rejected_connections >= 12)
    for sock in silent:
        sock.close()


def authenticated(b, node_id=9, then=b""):
    """A control connection of an attacker that has the key."""
    sock = dial(b.address)
    hello = wire.encode(wire.Hello(wire.PROTOCOL, node_id, b.node_id, b"n" * 32, 1, 1))
    sock.sendall(hello)
    buffer = wire.FrameBuffer(1 << 20)

    bodies = []

    def read():
        while not bodies:
            data = sock.recv(65536)
            assert data, "closed"
            bodies.extend(buffer.feed(data))
        return bodies.pop(0)

    body = read()
    digest = auth.transcript(hello[4:], body)
    key = b._engine.discovery.key
    sock.sendall(wire.encode(wire.Proof(auth.proof(key, digest, initiator=True))))
    welcome = wire.decode(read())
    ready = wire.Ready(b._engine.pool.layout, [], "none", "tcp", True, "")
    sock.sendall(wire.encode(ready) + then)
    token = auth.data_token(auth.session_key(key, digest), 0)
    return sock, welcome, token, lambda: wire.decode(read())


def test_an_authenticated_peer_cannot_write_what_was_not_granted(pair, eventually):
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
        sock, welcome, token, read = authenticated(b)
        sock.sendall(wire.encode(wire.Offer(1, "k", attempt, {"kv": 1})))
        while not isinstance(read(), wire.Grant):
            pass
        conn = transport.connect(welcome.endpoints["tcp"], token, 5)
        conn.send([memoryview(head.pack(bytes(8 * head.count)) + b"E" * (size * 2))], 5)
        with pytest.raises(KVTransferError, match=what) as caught:
            r.wait(10)
        assert caught.value.cause == "integrity"
        assert closed(sock)
        conn.close()
        sock.close()

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
def test_hostile_offers_are_refused_without_allocating(pair, message):
    _, _, b, _ = pair()
    r = b.receive(TransferKey("h"))
    sock, _, _, read = authenticated(b)

    sock.sendall(wire.encode(message))
    while not isinstance(reply := read(), wire.Fail):
        pass

    assert reply.code in ("invalid_argument", "resource_exhausted")
    with pytest.raises(KVTransferError):
        r.wait(10)
    sock.close()


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
def test_a_fetch_reads_only_what_was_offered(pair, message):
    _, _, b, _ = pair()
    b.offer(TransferKey("o"), [1, 2], num_tokens=8, ttl_s=10)
    sock, _, _, read = authenticated(b)

    sock.sendall(wire.encode(message))
    while not isinstance(reply := read(), wire.Fail):
        pass

    assert "not held here" in reply.message or "blocks of" in reply.message
    sock.close()


def test_a_handshake_message_after_the_handshake_ends_the_link(pair):
    _, _, b, _ = pair()
    sock, _, _, _ = authenticated(b)

    sock.sendall(wire.encode(wire.Proof(b"")))

    assert closed(sock)
    sock.close()


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
def test_senseless_messages_end_the_link(pair, message):
    out, _, b, _ = pair()
    sock, _, _, _ = authenticated(b)

    sock.sendall(wire.encode(message))

    assert closed(sock)
    sock.close()
    assert works(out, b, 0)


def test_parked_offers_hold_bounded_memory(channel, layout, tensors):
    b = channel(settings=KVTransferSettings(max_backlog_bytes=1 << 16))
    b.register(layout(), tensors(layout()))
    sock, _, _, read = authenticated(b)
    named = {"kv": bytes(1 << 14)}
    for i in range(8):
        sock.sendall(wire.encode(wire.Offer(i, f"p{i}", 0, {"kv": 2048}, None, 4096, named)))

    while not isinstance(reply := read(), wire.Fail):
        pass

    assert reply.code == "resource_exhausted"
    sock.close()


def test_a_nack_storm_ends_the_transfer(pair):
    _, _, b, _ = pair()
    sock, _, _, read = authenticated(b)
    b.offer(TransferKey("o"), [1, 2], num_tokens=8, ttl_s=10)
    sock.sendall(
        wire.encode(wire.Fetch(1, "o", 0, {"kv": 2}, {"kv": wire.Part("", 0, 1)}))
        + wire.encode(wire.Nack(1, [(0, 0, 1 << 40)]))
    )

    while not isinstance(reply := read(), wire.Fail):
        pass

    assert reply.code == "integrity"
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


def test_unknown_fields_are_ignored_and_versions_must_meet(channel, monkeypatch):
    body = msgspec.msgpack.encode({"type": "done", "tid": 7, "from_the_future": [1, 2]})
    assert wire.decode(body) == wire.Done(7)
    with pytest.raises(DistributedRuntimeError):
        wire.decode(b"\xc1")

    a, b = channel(), channel()
    monkeypatch.setattr(wire, "VERSIONS", (3, 4))
    hello = wire.encode(wire.Hello(wire.PROTOCOL, 0, 1, b"", 1, 2))
    with dial(b.address) as sock:
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


def test_damaged_headers_are_recognised():
    data = bytearray(Header(1, 2, 3, 4, 100, 0).pack(bytes(32)))
    assert Header.unpack(data[:HEADER_BYTES]).payload_bytes == 100
    for at in range(HEADER_BYTES):
        damaged = bytearray(data[:HEADER_BYTES])
        damaged[at] ^= 1
        with pytest.raises(IntegrityError):
            Header.unpack(damaged)


def test_an_offer_is_taken_once_from_each_peer(pair):
    """Else one peer could make a receive grow without bound."""
    _, _, b, _ = pair()
    r = b.receive(TransferKey("k"), [3])
    sock, _, _, read = authenticated(b)
    for tid in (1, 2):
        sock.sendall(wire.encode(wire.Offer(tid, "k", 0, {"kv": 1})))

    while not isinstance(reply := read(), wire.Fail):
        pass

    assert (reply.tid, "second time" in reply.message) == (2, True)
    assert len(r.owner.sources) == 1
    sock.close()


@pytest.mark.parametrize(
    "message",
    [wire.Offer(1, "p", 0, {"kv": 1}), wire.Fetch(1, "o", 0, {"kv": 1}, {})],
)
def test_a_transfer_id_used_twice_ends_the_link(pair, message):
    _, _, b, _ = pair()
    sock, _, _, _ = authenticated(b)

    sock.sendall(2 * wire.encode(message))

    assert closed(sock)
    sock.close()


def test_fetches_that_are_served_are_bounded(channel, layout, tensors):
    b = channel(settings=KVTransferSettings(max_in_flight=4))
    b.register(layout(), tensors(layout()))
    b.offer(TransferKey("o"), [1], num_tokens=4, ttl_s=10)
    sock, _, _, read = authenticated(b)
    for tid in range(8):
        sock.sendall(wire.encode(wire.Fetch(tid, "o", tid, {"kv": 1}, {"kv": wire.Part("", 0, 1)})))

    replies = [read() for _ in range(4)]

    assert {r.code for r in replies if isinstance(r, wire.Fail)} == {"resource_exhausted"}
    sock.close()


@pytest.mark.parametrize(
    "message",
    [
        wire.Offer(1, "h", 0, {}, [wire.TensorInfo((0,), "uint8", 0, 0)] * 4000, 4096),
        wire.Offer(1, "h", 0, {}, [wire.TensorInfo((1,) * 100_000, "uint8", 0, 0)], 4096),
    ],
)
def test_what_has_no_bytes_takes_memory_too(channel, layout, tensors, message):
    settings = KVTransferSettings(max_bounce_bytes=1 << 20, max_backlog_bytes=1 << 20)
    b = channel(settings=settings)
    b.register(layout(), tensors(layout()))
    r = b.receive(TransferKey("h"))
    sock, _, _, read = authenticated(b)

    sock.sendall(wire.encode(message))
    while not isinstance(reply := read(), wire.Fail):
        pass

    assert reply.code in ("invalid_argument", "resource_exhausted")
    with pytest.raises(KVTransferError):
        r.wait(10)
    sock.close()


def test_a_broken_message_right_behind_the_handshake_ends_the_link(pair):
    _, _, b, _ = pair()
    sock, _, _, _ = authenticated(b, then=b"\x00\x00\x00\x01\xc1")

    assert closed(sock)
    assert b.get_stats().peers == 0
    sock.close()


@pytest.mark.parametrize("port", ["control", "data"])
def test_a_flood_of_garbage_does_not_keep_peers_out(channel, port):
    """Four attackers at once, each a few hundred connections, while new links are made."""
    b = channel(node_id=1, peers={}, key=KEY)
    address = b.address if port == "control" else b._engine.paths["tcp"].endpoint()
    over = threading.Event()
    tried = [0] * 4

    def attack(which):
        rng = random.Random(which)
        while not over.is_set() and tried[which] < 500:
            with contextlib.suppress(OSError), dial(address) as sock:
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
