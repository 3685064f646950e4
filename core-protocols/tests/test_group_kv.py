"""KV blocks over a group: bounded headers, and rubbish that is refused."""

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from sagellm.core.protocols import (  # noqa: E402
    IntegrityError,
    KVBlock,
    ResourceError,
)
from sagellm.core.protocols._process_group.kv import _PREFIX, KV_TAG, encode  # noqa: E402


def test_kv_header_is_bounded(monkeypatch):
    from sagellm.core.protocols._process_group import kv

    monkeypatch.setattr(kv, "_MAX_BLOCKS", 1)
    with pytest.raises(ResourceError, match="2 blocks in one call, at most 1"):
        encode([KVBlock(torch.ones(1))] * 2)
    monkeypatch.setattr(kv, "MAX_KV_BYTES", 2)
    with pytest.raises(ResourceError, match="4 bytes of KV in one call, at most 2"):
        encode([KVBlock(torch.ones(1))])


def kv_message(header, nbytes=0):
    return [_PREFIX.pack(b"sgKV", 1, 0, len(header), nbytes), header]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([_PREFIX.pack(b"oops", 1, 0, 4, 0)], "not KV blocks of version 1"),
        ([_PREFIX.pack(b"sgKV", 9, 0, 4, 0)], "version 9"),
        ([_PREFIX.pack(b"sgKV", 1, 0, 1 << 40, 0)], "are beyond"),
        (kv_message(b"\xc1\xc1\xc1"), "header cannot be read"),
        (kv_message(b"\x91\x91\x94\x91\x02\xa6system\x00\x00"), "'system' is no dtype"),
        (kv_message(b"\x91\x91\x94\x91\xff\xa7float32\x00\x00"), "is not possible"),
        (kv_message(b"\x91\x91\x94\x91\x02\xa7float32\x00\x00", 3), "announced 3"),
    ],
)
def test_kv_receiver_refuses_rubbish(ranks, messages, text):
    backends = ranks(2).backends()

    def body(b):
        if b.rank == 0:
            for message in messages:
                data = torch.frombuffer(bytearray(message), dtype=torch.uint8)
                b.process_group.send([data], 1, KV_TAG).wait()
            return None
        with pytest.raises(IntegrityError, match=text):
            b.recv_kv_blocks(0)
        with pytest.raises(IntegrityError, match="the group is dead"):
            b.barrier()
        return None

    ranks(2).run(body, backends)
