"""Data of codecs, such as a basis, from node to node."""

import threading

import pytest
import torch

from sagellm.comm.kv_transfer.codec_data import give, take
from sagellm.core.protocols import ConfigError, IntegrityError, KVTransferError, TransferKey


def test_data_goes_once_per_node_and_name(channel):
    out, into = channel(), channel()
    data, kept = bytes(range(256)) * 5000, []
    taking = threading.Thread(target=take, args=(into, "basis", out.node_id, kept.append))
    taking.start()

    first = give(out, into.node_id, "basis", data)
    first.wait(20)
    taking.join(20)

    assert kept == [data]
    assert give(out, into.node_id, "basis", data) is first
    assert out.get_stats().transfers == {"landed": 1}


def test_what_failed_is_given_again(channel):
    out, into = channel(), channel()
    out.connect(into.node_id)
    with pytest.raises(KVTransferError, match="receive"):
        give(out, into.node_id, "basis", b"x" * 9, deadline_s=0.05).wait(20)

    kept = []
    again = give(out, into.node_id, "basis", b"x" * 9)
    take(into, "basis", out.node_id, kept.append, attempt=again.key.attempt)

    assert kept == [b"x" * 9]


def test_what_is_no_data_is_refused(channel):
    out, into = channel(), channel()
    for name, data in (("", b"x"), ("a" * 129, b"x"), ("basis", b"")):
        with pytest.raises(ConfigError):
            give(out, into.node_id, name, data)

    out.transfer([torch.ones(3)], into.node_id, key=TransferKey("codec-data/odd"))
    with pytest.raises(IntegrityError, match="not bytes"):
        take(into, "odd", out.node_id, pytest.fail)
