import os

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sagellm.comm.kv_transfer import KVTransferChannel, KVTransferSettings, create_codec
from sagellm.comm.kv_transfer.compression import codec_names
from sagellm.core.protocols import ConfigError, IntegrityError

NAMES = ("lossless", "lossless-fast", "lz4", "lz4-planes", "none", "zstd", "zstd-planes")


def test_the_codecs_are_found_by_entry_point():
    assert set(NAMES) <= set(codec_names())
    with pytest.raises(ConfigError, match="did you mean 'zstd'"):
        create_codec("zst")
    with pytest.raises(ConfigError, match="needs a tensor's layout"):
        create_codec("quant")
    with pytest.raises(ConfigError, match=r"installed: .*lz4"):
        KVTransferChannel(codec="snappy")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(data=st.one_of(st.binary(max_size=4096), st.binary(max_size=8).map(lambda b: b * 500)))
def test_decoding_gives_the_same_bytes(name, data):
    codec = create_codec(name)
    out = bytearray(len(data))

    frame = codec.encode(memoryview(data), dtype="uint8")
    codec.decode(memoryview(frame), memoryview(out), dtype="uint8")

    assert bytes(out) == data


@pytest.mark.parametrize("name", NAMES)
def test_damaged_frames_are_refused(name):
    codec = create_codec(name)
    block = memoryview(bytes(range(256)) * 16)
    frame = bytes(codec.encode(block, dtype="uint8"))
    out = memoryview(bytearray(len(block)))
    bad = [
        (frame[: len(frame) // 2], out),
        (b"", out),
        (frame, out[:-1]),
        (frame, memoryview(bytearray(len(block) + 1))),
    ]
    if name != "none":
        bad.append((os.urandom(100), out))

    for damaged, into in bad:
        with pytest.raises(IntegrityError):
            codec.decode(memoryview(damaged), into, dtype="uint8")


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_a_bomb_does_not_grow_memory(name):
    import tracemalloc

    codec = create_codec(name)
    bomb = memoryview(bytes(codec.encode(memoryview(bytes(1 << 26)), dtype="uint8")))
    out = memoryview(bytearray(4096))
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            codec.decode(bomb, out, dtype="uint8")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 1 << 20


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_what_does_not_shrink_is_sent_as_it_is(pair, codec):
    settings = KVTransferSettings(codec=codec, transport="tcp")  # others move blocks as they are
    out, a, into, _ = pair(sender={"settings": settings}, page=16, dim=64)
    for tensor in a.values():
        noise = torch.randint(0, 256, (*tensor[0].shape, 4), dtype=torch.uint8)
        tensor[1] = noise.view(torch.float32).squeeze(-1)
        tensor[2] = 0

    t = out.transfer([1, 2], 1)
    got = into.receive(None).wait(10)
    t.wait(10)

    block = a["layer0"][0].nbytes
    assert 3 * block < t.metrics.wire_bytes < 3.5 * block
    for x in got.blocks:
        want = a[f"layer{x.layer}"][[1, 2][x.index]]
        assert torch.equal(x.tensor.view(torch.int32), want.view(torch.int32))
