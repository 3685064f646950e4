"""Bases over real channels: given once to a peer, before the first blocks coded with them."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from handover_peer import KEY, SECRET
from test_coded_transfers import (
    DIM,
    HEADS,
    PAGE,
    SOURCE,
    TARGET,
    coded as coded,
    group,
    memory,
)

from sagellm.comm.kv_transfer import CodecRequest, KVTransferSettings, _handover, wire
from sagellm.comm.kv_transfer._link import Link
from sagellm.comm.kv_transfer.compression import BASES, BasisStore
from sagellm.comm.kv_transfer.compression.basis import BasisInfo
from sagellm.comm.kv_transfer.compression.basis_fit import BasisFit
from sagellm.core.protocols import (
    KVLayout,
    KVTransferError,
    PeerLostError,
    ResourceError,
    TransferKey,
)


def fitted(tensors, model="m"):
    fit = BasisFit(BasisInfo(model, len(tensors), HEADS, DIM, 1, "bfloat16", "", 0))
    pages = torch.stack(list(tensors.values()))  # [layers, blocks, kv, token, head, dim]
    rows = pages.permute(2, 0, 1, 3, 4, 5).flatten(2, 3)
    for window in rows.split(32 * PAGE, 2):
        fit.add(*window)
    return fit.finish("")


LAYOUT = KVLayout((group(),), model="m")


@pytest.fixture(scope="module")
def basis():
    found = fitted(memory(LAYOUT))
    BASES.put(found)
    yield found
    BASES.drop(found.fingerprint)


@pytest.fixture
def told(monkeypatch):
    """Counts messages by type, of all channels."""
    found, send = Counter(), Link.send

    def counting(link, message):
        found[type(message)] += 1
        send(link, message)

    monkeypatch.setattr(Link, "send", counting)
    return found


def coding(basis, **kw):
    return CodecRequest("transform", {"basis": basis.fingerprint, "step": 0.25}, **kw)


def store_of(channel, max_bytes=2 << 30):
    """Let a channel keep bases apart from those of its process."""
    channel._engine.handover.store = BasisStore(max_bytes)
    return channel._engine.handover.store


def close_to(a, b, source=SOURCE, target=TARGET):
    errors = [
        float((b[n][target].float() - a[n][source].float()).norm() / a[n][source].float().norm())
        for n in b
    ]
    return 0 < max(errors) < 0.2


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("way", ["push", "pull"])
def test_a_basis_goes_ahead_of_the_first_blocks_that_need_it(
    coded, basis, told, transport, way, monkeypatch
):
    monkeypatch.setattr(_handover, "_PIECE_BYTES", 64 << 10)
    out, a, into, b = coded(transport=transport)
    theirs = store_of(into)

    for i in range(2):
        key = TransferKey(f"{way}{i}")
        if way == "push":
            got = into.receive(key, TARGET)
            sent = out.transfer(SOURCE, into.node_id, key=key, codec=coding(basis))
        else:
            sent = out.offer(key, SOURCE, num_tokens=1, ttl_s=20, codec=coding(basis))
            got = into.fetch(key, out.node_id, TARGET)
        got.wait(20)
        sent.wait(20)

    assert theirs.data(basis.fingerprint) == basis.data
    assert close_to(a, b)
    assert got.metrics.codec.startswith("transform")
    assert told[wire.BasisOffer] == 1
    assert told[wire.BasisPiece] == -(-len(basis.data) // (64 << 10)) > 4
    assert {c.key.id for c in out.poll()} == {f"{way}0", f"{way}1"}  # no transfer of its own


def test_transfers_at_once_share_one_handover_and_peers_share_the_basis(
    channel, coded, basis, told
):
    out, a, into, b = coded()
    other = channel(settings=KVTransferSettings(transport="tcp"))
    other.register(LAYOUT, a)
    theirs = store_of(into)
    keys = [TransferKey(str(i)) for i in range(8)]
    got = [into.receive(k, [i]) for i, k in enumerate(keys)]

    senders = (out, other)
    sent = [
        senders[i % 2].transfer([i + 10], into.node_id, key=k, codec=coding(basis))
        for i, k in enumerate(keys)
    ]
    for handle in (*got, *sent):
        handle.wait(20)

    assert len(theirs) == 1
    assert told[wire.BasisOffer] == 2
    assert told[wire.BasisPiece] == -(-len(basis.data) // (256 << 10))
    assert close_to(a, b, list(range(10, 18)), list(range(8)))


@pytest.mark.parametrize("way", ["push", "pull"])
def test_a_full_store_refuses_and_both_sides_say_so(coded, basis, way):
    out, _, into, _ = coded()
    theirs = store_of(into, 4096)
    key = TransferKey("k")
    if way == "push":
        got = into.receive(key, TARGET)
        sent = out.transfer(SOURCE, into.node_id, key=key, codec=coding(basis))
        with pytest.raises(KVTransferError, match="no room for basis"):
            sent.wait(20)
    else:
        sent = out.offer(key, SOURCE, num_tokens=1, ttl_s=20, codec=coding(basis))
        got = into.fetch(key, out.node_id, TARGET)
    with pytest.raises(KVTransferError, match="no room for basis") as e:
        got.wait(20)

    assert e.value.cause == ResourceError.code
    assert len(theirs) == 0
    into._engine.handover.store = BASES  # where it is by now: the next is not refused
    again = TransferKey("k", 1)
    got = into.receive(again, TARGET)
    out.transfer(SOURCE, into.node_id, key=again, codec=coding(basis)).wait(20)
    got.wait(20)


def test_what_can_go_as_it_is_does_when_the_basis_is_refused(coded, basis):
    out, a, into, b = coded()
    store_of(into, 4096)
    key = TransferKey("k")
    got = into.receive(key, TARGET)
    sent = out.transfer(SOURCE, into.node_id, key=key, codec=coding(basis, required=False))
    sent.wait(20)
    got.wait(20)

    assert "no room for basis" in sent.explain()
    assert all(torch.equal(b[n][TARGET], a[n][SOURCE]) for n in b)


def test_a_basis_that_is_not_what_it_is_called_is_not_kept(coded, basis):
    out, a, into, _ = coded()
    theirs = store_of(into)
    store_of(out)._held[basis.fingerprint] = fitted(a, "n")  # a peer that says what is not so
    key = TransferKey("k")
    got = into.receive(key, TARGET)
    sent = out.transfer(SOURCE, into.node_id, key=key, codec=coding(basis))

    for handle in (sent, got):
        with pytest.raises(KVTransferError, match="in place of"):
            handle.wait(20)
    assert len(theirs) == 0
    assert not into._engine.handover._taking


def test_a_sender_that_falls_silent_gives_way_to_another(channel, coded, basis, eventually):
    out, a, into, _ = coded(io_timeout_s=0.5)
    other = channel(settings=KVTransferSettings(transport="tcp"))
    other.register(LAYOUT, a)
    theirs = store_of(into)
    out._engine.handover.on_wanted = lambda *_: None
    keys = [TransferKey("silent"), TransferKey("other")]
    got = [into.receive(k, [i]) for i, k in enumerate(keys)]

    first = out.transfer([3], into.node_id, key=keys[0], codec=coding(basis))
    eventually(lambda: into._engine.handover._taking)
    second = other.transfer([3], into.node_id, key=keys[1], codec=coding(basis))

    second.wait(20)
    got[1].wait(20)
    assert basis.fingerprint in theirs
    for handle in (first, got[0]):
        with pytest.raises(KVTransferError, match="and none for"):
            handle.wait(20)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (lambda f, n: wire.BasisPiece(f, 8, b"x"), "sends 1 bytes"),
        (lambda f, n: wire.BasisPiece(f, 0, bytes(n + 1)), "bytes of a basis"),
        (lambda f, n: wire.BasisPiece(f, 0, b""), "sends 0 bytes"),
        (lambda f, n: wire.BasisOffer(f, n), "twice"),
    ],
)
def test_pieces_out_of_turn_end_the_link(coded, basis, eventually, message, why):
    out, _, into, _ = coded()
    theirs = store_of(into)
    out._engine.handover.on_wanted = lambda *_: None
    into.receive(TransferKey("k"), TARGET)
    out.transfer(SOURCE, into.node_id, key=TransferKey("k"), codec=coding(basis))
    eventually(lambda: into._engine.handover._taking)
    link = out._engine.meet(into.node_id, 20)

    wrong = message(basis.fingerprint, len(basis.data))
    out._engine.loop.run(lambda: link.send(wrong))

    eventually(lambda: link.error is not None)
    assert why in str(link.error)
    assert not into._engine.handover._taking
    assert len(theirs) == 0


def test_blocks_of_another_model_are_not_coded_with_it(coded, told):
    out, a, into, _ = coded()
    wrong = fitted(a, "another")
    BASES.put(wrong)
    key = TransferKey("k")
    got = into.receive(key, TARGET)
    sent = out.transfer(SOURCE, into.node_id, key=key, codec=coding(wrong))

    for handle in (sent, got):
        with pytest.raises(KVTransferError, match="another"):
            handle.wait(20)
    BASES.drop(wrong.fingerprint)
    assert told[wire.BasisPiece] == 0  # they share a process, and so the store


def test_what_nobody_waits_for_is_ignored_and_no_basis_is_refused(coded, basis, eventually):
    out, _, into, _ = coded()
    theirs = store_of(into)
    link = out._engine.meet(into.node_id, 20)
    for m in (
        wire.BasisPiece("f", 0, b"x"),
        wire.BasisWanted("f", 0, 9999),
        wire.BasisRefused("f", "resource", "full"),
        wire.BasisOffer("x" * 999, 5),
        wire.BasisOffer("f", 0),
        wire.BasisOffer("f", -5),
        wire.BasisOffer("f", 1 << 62),
    ):
        out._engine.loop.run(lambda m=m: link.send(m))

    eventually(lambda: out._engine.ignored["basis_refused"] == 4)
    assert into._engine.ignored["basis_piece"] == 1
    assert into._engine.ignored["basis_wanted"] == 1
    assert link.error is None
    assert not into._engine.handover._taking
    assert len(theirs) == 0


def test_a_peer_that_takes_no_bases_is_sent_none(coded, basis, told):
    out, _, into, _ = coded()
    del into._engine.codecs.versions["basis"]
    key = TransferKey("k")
    got = into.receive(key, TARGET)
    out.transfer(SOURCE, into.node_id, key=key, codec=coding(basis)).wait(20)
    got.wait(20)  # it has the basis by other means: they share a process

    assert told[wire.BasisOffer] == 0


@pytest.mark.parametrize("act", ["push", "hang"])
def test_a_process_without_the_basis_gets_it_or_learns_of_the_sender_s_death(
    channel, basis, tmp_path, act, eventually
):
    path = tmp_path / "basis.safetensors"
    basis.save(path)
    into = channel(node_id=6, peers={5: "127.0.0.1:1"}, key=SECRET)
    into.register(LAYOUT, b := memory(LAYOUT, seed=1))
    BASES.drop(basis.fingerprint)
    key_handle = into.receive(KEY, TARGET, deadline_s=60)
    command = [sys.executable, str(Path(__file__).with_name("handover_peer.py")), act, "5"]
    command += ["6", into.address, str(path)]
    peer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = peer.stdout.readline().strip()
        if act == "push":
            key_handle.wait(60)
            assert int(line) > 1
            assert basis.fingerprint in BASES
            assert close_to(memory(LAYOUT), b)
        else:
            assert line == "hangs"
            assert into._engine.handover._taking
            peer.kill()
            with pytest.raises(KVTransferError) as e:
                key_handle.wait(60)
            assert e.value.cause == PeerLostError.code
            eventually(lambda: not into._engine.handover._taking)
            assert basis.fingerprint not in BASES
    finally:
        peer.kill()
        peer.wait(20)
        peer.stdout.close()
        BASES.put(basis)
