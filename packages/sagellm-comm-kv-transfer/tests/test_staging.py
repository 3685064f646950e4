"""Scattered blocks come through the staging buffers in order, whatever their number."""

import numpy as np
import pytest
import torch

from sagellm.comm.kv_transfer import HostStaging
from sagellm.core.protocols import ConfigError

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def gathered(staging, ids):
    found, at = [], 0
    for first, view in staging.read(ids):
        assert first == at
        at += len(view)
        found.append(view.clone())
    return torch.cat(found) if found else None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 4, 5, 8, 13, 40])
def test_chunks_hold_the_blocks_in_order(device, count):
    pool = torch.randn(40, 3, 7, device=device)
    staging = HostStaging(pool, chunk_bytes=4 * 3 * 7 * 4)
    for turn in range(2):  # buffers are used again
        ids = np.random.default_rng(turn).permutation(40)[:count]

        got = gathered(staging, ids)

        assert got.device.type == "cpu"
        assert torch.equal(got, pool[torch.from_numpy(ids).to(device)].cpu())


def test_a_block_larger_than_a_chunk_goes_alone_and_no_blocks_are_no_chunk():
    pool = torch.randn(4, 100)
    staging = HostStaging(pool, chunk_bytes=1)

    assert [len(view) for _, view in staging.read([3, 1])] == [1, 1]
    assert gathered(staging, []) is None


def test_one_chunk_is_ahead_of_the_reader():
    pool = torch.zeros(3, 8)
    reading = HostStaging(pool, chunk_bytes=32).read([0, 1, 2])

    next(reading)
    pool += 1

    assert [float(view[0, 0]) for _, view in reading] == [0.0, 1.0]


def test_what_cannot_be_staged_is_refused():
    pool = torch.zeros(4, 6)
    with pytest.raises(ConfigError, match="contiguous"):
        HostStaging(pool.t())
    with pytest.raises(ConfigError, match="0 bytes"):
        HostStaging(pool, chunk_bytes=0)
    with pytest.raises(ConfigError, match=r"blocks -1..4 are not all in 0..3"):
        next(HostStaging(pool).read([4, -1]))


@pytest.mark.gpu
@NO_GPU
def test_work_of_the_current_stream_is_waited_for():
    pool = torch.zeros(64, 1 << 20, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        pool += 7
        got = gathered(HostStaging(pool), [5])

    assert bool((got == 7).all())
