import contextlib
import os
import random
import resource
import socket
import stat
import struct
import threading
import time

import msgspec
import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings, auth, wire
from sagellm.comm.kv_transfer.transports.tcp import TcpTransport
from sagellm.core.protocols import (
    AuthenticationError,
    CacheGroup,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    IntegrityError,
    KVLayout,
    KVTransferError,
    PeerLostError,
)

KEY = b"a key of this test, long enough"


def test_another_key_is_refused_by_both_sides(channel, eventually):
    right = channel(node_id=1, peers={}, key=KEY)
    wrong = channel(node_id=0, peers={1: right.address}, key=KEY + b"!")

    with pytest.raises(AuthenticationError, match="does not have"):
        wrong.connect(1, timeout_s=5)
    t = wrong.transfer([torch.ones(1)], 1)
    with pytest.raises(KVTransferError) as caught:
        t.wait(10)

    assert caught.value.cause == "unauthenticated"
    eventually(lambda: right.get_stats().rejected_connections >= 2)
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
    sock.sendall(wire.encode(wire.Welcome(b"m" * 32, None, {"tcp": address}, True, "")))

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


@pytest.mark.parametrize(("port", "count", "most"), [("control", 12, 4), ("data", 80, 64)])
def test_connections_that_say_nothing_are_bounded(
    channel, port, count, most, eventually, works, strangers
):
    """Long before their time is over: the oldest give way."""
    settings = KVTransferSettings(max_unauthenticated=4, handshake_timeout_s=60, transport="tcp")
    a, b = channel(settings=settings), channel(settings=settings)
    address = b.address if port == "control" else b._engine.paths["tcp"].endpoint()
    silent = [strangers.dial(address) for _ in range(count)]
    eventually(lambda: b.get_stats().rejected_connections >= count - most)

    assert works(a, b, 0)
    for sock in silent:
        sock.close()


@pytest.mark.parametrize("port", ["control", "data"])
def test_connections_that_say_nothing_are_closed_in_time(channel, port, eventually, strangers):
    b = channel(settings=KVTransferSettings(handshake_timeout_s=0.3, transport="tcp"))
    address = b.address if port == "control" else b._engine.paths["tcp"].endpoint()
    silent = [strangers.dial(address) for _ in range(12)]

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
    # or frames could be sent back to who has sent them
    assert auth.frame_key(session, initiator=True) != auth.frame_key(session, initiator=False)


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
    transport = TcpTransport(handshake_timeout_s=0.2)
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


def test_who_has_only_seen_a_token_is_turned_away_and_its_owner_comes_in(strangers):
    transport = TcpTransport(handshake_timeout_s=5)
    token = b"t" * 32
    found = []
    thread = threading.Thread(target=lambda: found.append(transport.accept(token, 10)))
    thread.start()
    with strangers.dial(transport.endpoint()) as thief:
        thief.sendall(auth.token_id(token) + auth.token_proof(b"u" * 32, initiator=True))
        assert thief.recv(32) == b""

    ours = transport.connect(transport.endpoint(), token, 5)
    thread.join(5)

    (theirs,) = found
    assert transport.rejected == 1
    for x in (ours, theirs, transport):
        x.close()


def test_a_data_listener_that_does_not_know_the_token_is_sent_no_byte_of_a_block():
    transport = TcpTransport()
    with socket.create_server(("127.0.0.1", 0)) as fake:

        def answer():
            sock, _ = fake.accept()
            with sock:
                name = sock.recv(48)
                sock.sendall(auth.token_proof(b"u" * 32, initiator=False))
                heard.append((name, sock.recv(1)))

        heard = []
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(PeerLostError, match="does not know the data connection's token"):
            transport.connect(f"127.0.0.1:{fake.getsockname()[1]}", b"t" * 32, 5)
        thread.join(5)

    ((name, rest),) = heard
    assert (name[:16], rest) == (auth.token_id(b"t" * 32), b"")
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


def relayed(channel, proxy, rewrite, **settings):
    """Nodes 0 and 1 with a proxy between that sees what 0 sends on the control connection."""
    b = channel(node_id=1, peers={}, key=KEY, settings=KVTransferSettings(**settings))
    gate = proxy(b.address)
    gate.flip = rewrite
    a = channel(node_id=0, peers={1: gate.address}, key=KEY)
    return a, b


def test_a_downgrade_on_the_way_is_noticed(channel, proxy, monkeypatch):
    monkeypatch.setattr(wire, "VERSIONS", (1, 2))
    a, b = relayed(
        channel, proxy, lambda _, data: data.replace(b"max_version\x02", b"max_version\x01")
    )

    with pytest.raises(AuthenticationError, match="does not have"):
        a.connect(1, timeout_s=5)

    assert b.get_stats().peers == 0


def test_a_recorded_handshake_is_worth_nothing(channel, proxy, strangers, works):
    heard = bytearray()

    def listen(position, data):
        heard.extend(data)
        return data

    a, b = relayed(channel, proxy, listen)
    assert works(a, b)

    with strangers.dial(b.address) as sock:
        sock.sendall(bytes(heard))
        answer = b""
        while got := sock.recv(4096):
            answer += got
    assert [wire.decode(body).__class__ for body in wire.FrameBuffer(4096).feed(answer)] == [
        wire.Challenge,
        wire.Reject,
    ]
    assert b"unauthenticated" in answer
    assert works(a, b, 1)


def test_a_caller_cannot_be_made_to_talk_to_itself(leakless, channel, proxy):
    """Its own proofs, played back to it, would be right if roles and ids were not in them."""
    a = channel(node_id=0, peers={}, key=KEY)
    a.add_peer(1, a.address)

    with pytest.raises(ConfigError, match="this is node 0, not 1"):
        a.connect(1, timeout_s=5)


def test_an_answer_in_another_nodes_name_is_refused(channel):
    fake = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{fake.getsockname()[1]}"
    c = channel(node_id=0, peers={1: address}, key=KEY)
    t = c.transfer([torch.ones(1)], 1, deadline_s=5)
    sock, _ = fake.accept()
    sock.recv(4096)
    sock.sendall(wire.encode(wire.Challenge(2, b"n" * 32, 1)))

    with pytest.raises(KVTransferError, match="is node 2, not 1"):
        t.wait(10)
    sock.close()
    fake.close()


def test_two_owners_of_one_node_id_are_told(leakless, channel, works):
    b = channel(node_id=1, peers={}, key=KEY)
    first = channel(node_id=0, peers={1: b.address}, key=KEY)
    assert works(first, b)
    second = channel(node_id=0, peers={1: b.address}, key=KEY)

    started = time.monotonic()
    with pytest.raises(CommTimeoutError, match="node id 0 is taken by another process"):
        second.connect(1, timeout_s=0.5)
    assert time.monotonic() - started < 3
    assert works(first, b, 1)

    first.close()  # and then the id is free
    assert works(second, b, 2)


def test_a_node_cannot_come_in_the_name_of_the_one_it_calls(channel, attacker):
    b = channel(node_id=1, peers={}, key=KEY)

    for node_id in (1, -1):
        assert attacker(b, node_id=node_id).lost()

    assert b.get_stats().peers == 0


def test_links_that_a_peer_may_open_are_bounded(leakless, channel, attacker, eventually):
    """One for each node id, and so many ids."""
    b = channel(node_id=1, peers={}, key=KEY, settings=KVTransferSettings(max_links=3))
    first = attacker(b, node_id=10, instance=b"i")
    again = attacker(b, node_id=10, instance=b"i")
    assert first.lost()
    others = [attacker(b, node_id=n) for n in (11, 12)]
    eventually(lambda: b.get_stats().peers == 3)

    late = attacker(b, node_id=13)

    assert late.lost()
    assert b.get_stats().peers == 3
    again.sock.close()
    eventually(lambda: b.get_stats().peers == 2)
    assert attacker(b, node_id=13).welcome is not None
    assert len(others) == 2


def test_a_peer_that_does_not_read_its_welcome_holds_nobody_up(
    leakless, channel, layout, strangers, works
):
    """It has proven the key; what it is sent does not fit into the kernel's buffers."""
    b = channel(node_id=1, peers={}, key=KEY)
    group = CacheGroup(
        "kv", "kv", tuple(f"{i:04}" + "l" * 20_000 for i in range(512)), ("block", "dim"), (8,),
        "float32",
    )  # fmt: skip
    b.register(KVLayout((group,)), {n: torch.zeros(1, 8) for n in group.layers})
    slow = []
    for node_id in range(10, 14):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = b.address.split(":")
        sock.connect((host, int(port)))
        hello = wire.encode(wire.Hello(wire.PROTOCOL, node_id, 1, b"n" * 32, 1, 1))
        sock.sendall(hello)
        body = sock.recv(4096)[4:]
        digest = auth.transcript(hello[4:], body)
        sock.sendall(wire.encode(wire.Proof(auth.proof(KEY, digest, initiator=True))))
        slow.append(sock)
    assert [sock.recv(1) for sock in slow]  # it has begun to welcome all of them
    started = time.monotonic()

    assert works(channel(node_id=0, peers={1: b.address}, key=KEY), b)

    assert time.monotonic() - started < 3  # each of the four would hold the loop for a second
    for sock in slow:
        sock.close()


def test_a_data_connection_is_good_for_one_link_and_number(
    leakless, channel, attacker, strangers, works
):
    b = channel(node_id=1, peers={}, key=KEY)
    b.register(*pool())
    one, two = attacker(b, node_id=10), attacker(b, node_id=11)
    with one.connect_data(b), two.connect_data(b):
        for session, number in ((one.session, 0), (one.session, 1), (bytes(32), 0)):
            token = auth.data_token(session, number)
            shown = auth.token_id(token) + auth.token_proof(token, initiator=True)
            with strangers.dial(b._engine.paths["tcp"].endpoint()) as sock:
                sock.sendall(shown)  # seen on the wire, or made up
                sock.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    sock.recv(32)  # it is never answered, and closed with the handshake's time
        assert b.get_stats().peers == 2


def pool():
    group = CacheGroup("kv", "kv", ("l",), ("block", "dim"), (8,), "float32")
    return KVLayout((group,)), {"l": torch.zeros(4, 8)}


def test_seals_hold_what_is_changed_dropped_repeated_reordered_or_reflected():
    def sealed():
        ours, theirs = (auth.Seal(b"s" * 32, initiator=True) for _ in range(2))
        return [ours.close(body) for body in (b"one", b"two")], theirs

    (one, two), theirs = sealed()
    assert [theirs.open(one), theirs.open(two)] == [b"one", b"two"]
    other = auth.Seal(b"s" * 32, initiator=False)
    for wrong in (
        [b"onE" + one[3:]],
        [one[:-1] + bytes([one[-1] ^ 1])],
        [two],
        [one, one],
        [one[:5]],
        [b""],
        [other.close(b"one")],
    ):
        _, theirs = sealed()
        with pytest.raises(IntegrityError):
            [theirs.open(body) for body in wrong]


def test_a_kernel_out_of_descriptors_does_not_make_the_loop_spin(channel, strangers, works):
    b = channel(node_id=1, peers={}, key=KEY)
    a = channel(node_id=0, peers={1: b.address}, key=KEY)
    assert works(a, b)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    callers = [socket.socket() for _ in range(4)]
    host, port = b.address.split(":")
    used = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used - 1, limits[1]))
        for sock in callers:
            sock.connect((host, int(port)))
        before = time.process_time()
        threading.Event().wait(0.5)
        spent = time.process_time() - before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for sock in callers:
            sock.close()

    assert spent < 0.25
    assert works(a, b, 1)
