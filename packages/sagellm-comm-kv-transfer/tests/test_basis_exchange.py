"""Bases over real channels, and blocks that are coded with them."""

import threading

import pytest
import torch
from test_coded_transfers import DIM, HEADS, PAGE, SOURCE, TARGET, coded as coded

from sagellm.comm.kv_transfer import CodecRequest
from sagellm.comm.kv_transfer.basis_exchange import give_basis, take_basis
from sagellm.comm.kv_transfer.compression import BASES, BasisStore
from sagellm.comm.kv_transfer.compression.basis import BasisInfo
from sagellm.comm.kv_transfer.compression.basis_fit import BasisFit
from sagellm.core.protocols import CommError, ConfigError, IntegrityError, KVTransferError


def fitted(tensors, model="m"):
    fit = BasisFit(BasisInfo(model, len(tensors), HEADS, DIM, 1, "bfloat16", "", 0))
    pages = torch.stack(list(tensors.values()))  # [layers, blocks, kv, token, head, dim]
    rows = pages.permute(2, 0, 1, 3, 4, 5).flatten(2, 3)
    for window in rows.split(32 * PAGE, 2):
        fit.add(*window)
    return fit.finish("")


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_basis_reaches_a_peer_once_and_blocks_are_coded_with_it(coded, transport):
    out, a, into, b = coded(transport=transport)
    fingerprint = BASES.put(fitted(a))
    theirs, taken = BasisStore(), []

    def take():
        taken.append(take_basis(into, fingerprint, out.node_id, deadline_s=20, store=theirs))

    thread = threading.Thread(target=take)
    thread.start()
    given = give_basis(out, fingerprint, into.node_id, deadline_s=20)
    thread.join(30)
    given.wait(20)
    again = take_basis(into, fingerprint, out.node_id, deadline_s=0.1, store=theirs)

    assert taken == [again]
    assert again.data == BASES.data(fingerprint)
    got = into.receive(None, TARGET)
    request = CodecRequest("transform", {"basis": fingerprint, "step": 0.25})
    sent = out.transfer(SOURCE, into.node_id, codec=request)
    sent.wait(20)
    got.wait(20)
    BASES.drop(fingerprint)
    assert sent.metrics.codec.startswith("transform")
    assert sent.metrics.wire_bytes < 0.5 * sent.metrics.bytes  # of noise, which has no components
    for name in b:
        x, y = a[name][SOURCE].float(), b[name][TARGET].float()
        assert 0 < float((y - x).norm() / x.norm()) < 0.2


def test_what_is_no_basis_or_another_is_not_kept(coded):
    out, a, into, _ = coded()
    ours, other, theirs = BasisStore(), fitted(a, "n"), BasisStore()
    ours._held["f" * 32] = other  # a peer that says what is not so
    errors = []

    def take():
        try:
            take_basis(into, "f" * 32, out.node_id, deadline_s=20, store=theirs)
        except CommError as e:
            errors.append(e)

    thread = threading.Thread(target=take)
    thread.start()
    give_basis(out, "f" * 32, into.node_id, deadline_s=20, store=ours).wait(20)
    thread.join(30)

    assert isinstance(errors[0], IntegrityError)
    assert "in place of" in str(errors[0])
    assert len(theirs) == 0
    with pytest.raises(ConfigError, match="no basis"):
        give_basis(out, "e" * 32, into.node_id, store=ours)


def test_blocks_of_another_model_are_not_coded_with_it(coded):
    out, a, into, _ = coded()
    fingerprint = BASES.put(fitted(a, "another"))

    into.receive(None, TARGET, deadline_s=5)
    request = CodecRequest("transform", {"basis": fingerprint})
    with pytest.raises(KVTransferError, match="another"):
        out.transfer(SOURCE, into.node_id, codec=request, deadline_s=5).wait(10)
    BASES.drop(fingerprint)
