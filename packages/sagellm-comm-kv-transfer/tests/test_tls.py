"""Connections under TLS 1.3 with certificates on both sides, and what is said of wrong ones."""

import contextlib
import datetime as dt
import os
import secrets
import socket
import ssl
import threading
import time

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sagellm.comm.kv_transfer import KVTransferSettings, auth
from sagellm.comm.kv_transfer.tls import Tls, TlsConnection
from sagellm.comm.kv_transfer.transports.tcp import TcpTransport
from sagellm.core.protocols import (
    AuthenticationError,
    CommError,
    CommTimeoutError,
    ConfigError,
    KVTransferError,
    PeerLostError,
    TransferKey,
)
from sagellm.core.protocols.testing.transport_suite import check_transport

KEY = b"a key of this test, long enough"
DAY = dt.timedelta(days=1)


class Authority:
    """A CA that writes certificates into a folder."""

    def __init__(self, folder, name):
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert = self._build(self._name, self._key, [], DAY, -DAY, ca=True)
        self.path = self._write("ca.pem", cert.public_bytes(serialization.Encoding.PEM))

    def _build(self, name, key, names, ends, begins, ca=False):
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, name, data):
        path = self.folder / name
        path.write_bytes(data)
        path.chmod(0o600)
        return str(path)

    def node(self, *names, ends=DAY, begins=-DAY, ca=None):
        """Settings with a certificate of these alternative names."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node of a test")])
        kinds = [x509.UniformResourceIdentifier(n) if ":" in n else x509.DNSName(n) for n in names]
        cert = self._build(subject, key, kinds, ends, begins)
        tag = secrets.token_hex(4)
        return KVTransferSettings(
            tls_cert=self._write(f"{tag}.pem", cert.public_bytes(serialization.Encoding.PEM)),
            tls_key=self._write(
                f"{tag}.key",
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                ),
            ),
            tls_ca=ca or self.path,
            transport="tcp",
            handshake_timeout_s=5,
        )


@pytest.fixture
def authority(tmp_path):
    """Makes CAs."""

    def make(name="the CA"):
        folder = tmp_path / secrets.token_hex(4)
        folder.mkdir()
        return Authority(folder, name)

    return make


@pytest.fixture
def refused(channel):
    """What our error says when node 0 calls node 1 in vain."""

    def call(ours, theirs):
        b = channel(node_id=1, peers={}, key=KEY, settings=theirs)
        a = channel(node_id=0, peers={1: b.address}, key=KEY, settings=ours)
        t = a.transfer([torch.ones(1)], 1, deadline_s=8)
        started = time.monotonic()
        with pytest.raises(KVTransferError) as caught:
            t.wait(10)
        assert time.monotonic() - started < 4
        assert caught.value.cause == "unauthenticated", caught.value
        return str(caught.value)

    return call


@pytest.fixture
def logged(caplog, eventually):
    """Waits until the side that was called has logged a text: the caller may be the faster."""
    return lambda text: eventually(lambda: text in caplog.text)


def test_blocks_move_under_tls_in_both_directions(pair, authority):
    ca = authority()
    out, a, into, b = pair(
        blocks=40, sender={"settings": ca.node("node-0")}, receiver={"settings": ca.node("node-1")}
    )
    for attempt in range(2):
        key = TransferKey("push", attempt)
        t = out.transfer(range(40), 1, key=key)
        into.receive(key, range(39, -1, -1)).wait(10)
        t.wait(10)
    assert all(torch.equal(a[n], b[n].flip(0)) for n in a)

    into.offer(TransferKey("pull"), range(40), num_tokens=1, ttl_s=10)
    out.fetch(TransferKey("pull"), 1, range(40)).wait(10)

    assert all(torch.equal(a[n], b[n]) for n in a)


def test_the_contract_of_transports_holds_under_tls(authority):
    tls = Tls.of(authority().node())

    report = check_transport(lambda: TcpTransport(tls=tls))

    assert report.ok(), report


def test_nothing_of_the_blocks_crosses_the_wire_in_the_open(channel, authority, proxy, layout):
    ca = authority()
    tcp = {"transport": "tcp"}
    into = channel(node_id=1, peers={}, key=KEY, settings=ca.node().model_copy(update=tcp))
    out = channel(node_id=0, peers={}, key=KEY, settings=ca.node().model_copy(update=tcp))
    seen = bytearray()

    def look(position, data):
        seen.extend(data)
        return data

    control = proxy(into.address)
    data = proxy(into._engine.paths["tcp"].endpoint())
    control.flip = data.flip = look
    into._engine.paths["tcp"].endpoint = lambda reached_at="": data.address
    out.add_peer(1, control.address)
    secret = torch.full((1 << 16,), 0x5A, dtype=torch.uint8)
    t = out.transfer([secret], 1, key=TransferKey("hidden-name"))
    into.receive(TransferKey("hidden-name")).wait(10)
    t.wait(10)

    assert len(seen) > 1 << 16
    assert b"\x5a" * 16 not in seen
    assert b"hidden-name" not in seen


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        (["node-0"], True),
        (["sagellm://node/0"], True),
        (["node-7", "node-0"], True),
        (["host.example"], True),  # names no node: stands for any
        (["node-7"], False),
        (["sagellm://node/7", "host.example"], False),
    ],
)
def test_a_certificate_stands_for_the_nodes_that_it_names(
    channel, authority, refused, logged, works, name, fits
):
    ca = authority()
    if not fits:
        text = "the certificate of node 0 is made for node 7"
        assert text in refused(ca.node(*name), ca.node())
        logged(text)
        return
    b = channel(node_id=1, peers={}, key=KEY, settings=ca.node("node-1"))
    a = channel(node_id=0, peers={1: b.address}, key=KEY, settings=ca.node(*name))
    assert works(a, b)


def test_a_called_node_has_to_be_the_one_of_its_certificate(authority, refused):
    ca = authority()

    said = refused(ca.node(), ca.node("node-2"))

    assert "the certificate of node 1 is made for node 2" in said


@pytest.mark.parametrize("side", ["caller", "called"])
@pytest.mark.parametrize(
    ("dates", "what"),
    [({"ends": -DAY / 2}, "has expired"), ({"begins": DAY / 2}, "is not valid yet")],
)
def test_certificates_out_of_date_are_named_on_both_sides(
    authority, refused, logged, side, dates, what
):
    ca = authority()
    bad, good = ca.node(**dates), ca.node()

    said = refused(*((bad, good) if side == "caller" else (good, bad)))

    theirs, ours = f"its certificate {what}", "our certificate"
    assert (ours if side == "caller" else theirs) in said
    logged(theirs if side == "caller" else ours)


@pytest.mark.parametrize("side", ["caller", "called"])
@pytest.mark.parametrize("name", ["the CA", "another CA"])
def test_another_ca_is_refused_and_named_on_both_sides(authority, refused, logged, side, name):
    one, two = authority(), authority(name)
    stranger = two.node(ca=one.path)  # trusts ours, and comes from another
    pair = (stranger, one.node()) if side == "caller" else (one.node(), stranger)

    assert "tls_ca" in refused(*pair)
    logged("tls_ca")


@pytest.mark.parametrize("side", ["caller", "called"])
def test_a_plain_peer_and_a_tls_peer_tell_each_other(authority, refused, logged, side):
    pair = (None, authority().node()) if side == "caller" else (authority().node(), None)

    text = "set tls_cert, tls_key and tls_ca on all nodes, or on none"
    assert text in refused(*pair)
    logged(text)


def test_a_peer_without_certificate_is_refused(channel, authority, strangers, caplog, works):
    ca = authority()
    b = channel(node_id=1, peers={}, key=KEY, settings=ca.node())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(ca.path)
    for address in (b.address, b._engine.paths["tcp"].endpoint()):
        with context.wrap_socket(strangers.dial(address)) as sock:
            with pytest.raises(OSError, match=r"CERTIFICATE_REQUIRED|reset"):
                sock.recv(4096)
    assert "it showed no certificate" in caplog.text

    a = channel(node_id=0, peers={1: b.address}, key=KEY, settings=ca.node())
    assert works(a, b)


def test_older_versions_of_tls_are_refused(channel, authority, strangers):
    ca = authority()
    b = channel(node_id=1, peers={}, key=KEY, settings=(mine := ca.node()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(ca.path)
    context.load_cert_chain(mine.tls_cert, mine.tls_key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    with strangers.dial(b.address) as sock, pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        context.wrap_socket(sock)


def test_the_key_is_needed_as_well(channel, authority):
    ca = authority()
    b = channel(node_id=1, peers={}, key=KEY, settings=ca.node())
    a = channel(node_id=0, peers={1: b.address}, key=KEY + b"!", settings=ca.node())

    with pytest.raises(AuthenticationError, match="does not have"):
        a.connect(1, timeout_s=5)


def test_nobody_with_a_certificate_can_sit_in_between(channel, authority, strangers, caplog):
    """An insider that has a certificate and relays: the proofs cover what each side has seen."""
    ca = authority()
    b = channel(node_id=1, peers={}, key=KEY, settings=ca.node())
    middle = Tls.of(ca.node())
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    a = channel(node_id=0, peers={1: address}, key=KEY, settings=ca.node())

    def relay():
        sock, _ = listener.accept()
        near = middle.server(sock)
        near.settimeout(5)
        far = middle.client(strangers.dial(b.address))
        far.settimeout(5)

        def pump(x, y):
            with contextlib.suppress(OSError, CommError):
                while data := x.recv(4096):
                    y.sendall(data)
            with contextlib.suppress(OSError):
                y.close()

        near.handshake()
        far.handshake()
        threading.Thread(target=pump, args=(far, near), daemon=True).start()
        pump(near, far)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()

    with pytest.raises(AuthenticationError, match="does not have this channel's key"):
        a.connect(1, timeout_s=5)
    thread.join(10)
    listener.close()
    assert b.get_stats().peers == 0


def test_a_token_is_good_over_the_certificates_that_both_sides_see_only(authority, strangers):
    """One that relays sees other certificates than the two ends do, so its proof is another."""
    ca = authority()
    server, tls = TcpTransport(tls=Tls.of(ca.node())), Tls.of(ca.node())
    token = b"t" * 32
    ended = []

    def accept():
        with pytest.raises(CommTimeoutError) as caught:
            server.accept(token, 1)
        ended.append(caught.value)

    thread = threading.Thread(target=accept)
    thread.start()
    with tls.client(strangers.dial(server.endpoint())) as sock:
        sock.settimeout(5)
        sock.handshake()
        assert len(tls.binding(sock)) >= 32
        sock.sendall(auth.token_id(token) + auth.token_proof(token, initiator=True))
        assert sock.recv(32) == b""
    thread.join(5)

    assert ended
    server.close()


def test_garbage_does_not_keep_tls_peers_out(channel, authority, strangers, works):
    ca = authority()
    b = channel(node_id=1, peers={}, key=KEY, settings=ca.node())
    hello = bytes.fromhex("160301") + b"\x02\x00\x01\x00\x01\xfc\x03\x03"
    for address in (b.address, b._engine.paths["tcp"].endpoint()):
        for data in (b"\x16", hello, hello + os.urandom(600), os.urandom(64), b"\x16" * 4096):
            with strangers.dial(address) as sock:
                with contextlib.suppress(OSError):  # it may have been turned away by now
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                assert strangers.closed(sock)

    a = channel(node_id=0, peers={1: b.address}, key=KEY, settings=ca.node())
    assert works(a, b)


def connected(authority, **kw):
    tls = Tls.of(authority.node())
    server, client = TcpTransport(tls=tls, **kw), TcpTransport(tls=tls, **kw)
    token = os.urandom(16)
    found = []
    thread = threading.Thread(target=lambda: found.append(server.accept(token, 5)))
    thread.start()
    ours = client.connect(server.endpoint(), token, 5)
    thread.join(5)
    return server, client, ours, found[0]


def test_both_directions_of_one_connection_at_once(authority):
    """Two threads on each end, which OpenSSL does not take by itself."""
    server, client, a, b = connected(authority())
    assert isinstance(a, TlsConnection)
    size = 1 << 20
    sent = {a: bytearray(os.urandom(size)), b: bytearray(os.urandom(size))}
    got = {a: bytearray(size), b: bytearray(size)}
    failed = []

    def run(call, data):
        try:
            for _ in range(5):
                cut = [memoryview(data)[i : i + 70_001] for i in range(0, size, 70_001)]
                call([*cut[:3], memoryview(b""), *cut[3:]], 10)
        except CommError as e:
            failed.append(e)

    threads = [
        threading.Thread(target=run, args=args)
        for args in ((a.send, sent[a]), (b.send, sent[b]), (a.receive, got[a]), (b.receive, got[b]))
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)

    assert not failed
    assert got[b] == sent[a]
    assert got[a] == sent[b]
    for x in (a, b, server, client):
        x.close()


def test_deadlines_and_aborts_hold_under_tls(authority):
    server, client, a, b = connected(authority())
    room = memoryview(bytearray(1))
    started = time.monotonic()
    with pytest.raises(CommTimeoutError, match=r"0\.3 s"):
        a.receive([room], 0.3)
    with pytest.raises(CommTimeoutError, match=r"0\.3 s"):  # nobody reads
        a.send([memoryview(bytes(64 << 20))], 0.3)
    assert time.monotonic() - started < 5

    failed = []

    def receive():
        try:
            b.receive([memoryview(bytearray(256 << 20))], 60)
        except PeerLostError as e:
            failed.append(e)

    thread = threading.Thread(target=receive)
    thread.start()
    b.abort()
    thread.join(5)
    assert failed
    for x in (a, b, server, client):
        x.close()


def test_files_that_do_not_fit_are_named(authority, tmp_path):
    ca = authority()
    good = ca.node()
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    cases = [
        ((str(tmp_path / "no"), good.tls_key, good.tls_ca), r"tls_cert .*No such file"),
        ((str(empty), good.tls_key, good.tls_ca), "no certificate in PEM form"),
        ((good.tls_cert, ca.node().tls_key, good.tls_ca), "KEY_VALUES_MISMATCH"),
        ((good.tls_cert, str(tmp_path / "no"), good.tls_ca), "tls_key .*No such file"),
        ((good.tls_cert, good.tls_key, str(empty)), "tls_ca"),
    ]
    for files, message in cases:
        with pytest.raises(ConfigError, match=message):
            Tls(*files)
    os.chmod(good.tls_key, 0o644)
    with pytest.raises(ConfigError, match=r"0644.*chmod 600"):
        Tls.of(good)
    with pytest.raises(ValueError, match="tls_ca unset"):
        KVTransferSettings(tls_cert="a", tls_key="b")
