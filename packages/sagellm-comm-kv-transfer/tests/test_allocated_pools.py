"""Pools that a channel allocates: what they are, what they cost, and when they go."""

import mmap
import os
import resource
import sys

import pytest
import torch

from sagellm.core.protocols import (
    ConfigError,
    ResourceError,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")


def test_an_allocated_pool_is_what_its_layout_says(channel, layout):
    wanted = layout(layers=2, dtype="bfloat16", axes=("kv", "head", "block", "token", "dim"))
    pool = channel().allocate(wanted, 7)

    assert {n: list(t.shape) for n, t in pool.tensors.items()} == {
        "layer0": [2, 4, 7, 4, 8],
        "layer1": [2, 4, 7, 4, 8],
    }
    assert all(t.dtype is torch.bfloat16 and not t.any() for t in pool.tensors.values())
    assert dict(pool.num_blocks) == {"kv": 7}


def test_who_has_its_descriptor_can_neither_write_nor_resize_a_pool(channel, layout):
    from sagellm.comm.kv_transfer._segment import shared_segments

    pool = channel().allocate(layout(), 4)
    (segment,) = shared_segments()
    again = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, segment.nbytes)
        with pytest.raises(PermissionError):
            os.write(again, b"x")
        for size in (0, 2 * segment.nbytes):
            with pytest.raises(PermissionError):
                os.ftruncate(again, size)
        assert mmap.mmap(again, segment.nbytes, prot=mmap.PROT_READ)[:4] == b"\0" * 4
        pool.tensors["layer0"].fill_(1)
    finally:
        os.close(again)


def test_an_allocated_pool_goes_with_its_registration(channel, layout, kept):
    node = channel()
    before = kept()
    pool = node.allocate(layout(), 10)
    assert kept() != before

    node.unregister(pool)

    assert kept() == before
    with pytest.raises(ConfigError, match="not registered"):
        node.unregister(pool)


def test_too_large_a_pool_is_refused_with_what_there_is(channel, layout, monkeypatch, kept):
    from sagellm.comm.kv_transfer import _segment

    node = channel()
    before = kept()
    with pytest.raises(ResourceError, match=r"\d+ bytes are available here; allocate fewer"):
        node.allocate(layout(), 1 << 32)
    monkeypatch.setattr(_segment, "room_bytes", lambda: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"File too large.*ulimit -f"):
            node.allocate(layout(), 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for wrong in (0, -1, {"other": 3}):
        with pytest.raises(ConfigError, match="num_blocks"):
            node.allocate(layout(), wrong)

    assert kept() == before
    node.allocate(layout(), 2)
