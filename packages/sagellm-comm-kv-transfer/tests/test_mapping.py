"""Memory files lie where large pages fit."""

import os
import sys

import numpy as np
import pytest
import torch

from sagellm.comm.kv_transfer._mapping import LARGE_PAGE, gather_pages, map_file
from sagellm.comm.kv_transfer._segment import Segment, View

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files")


@pytest.fixture
def file():
    fd = os.memfd_create("sagellm-test")
    yield fd
    os.close(fd)


def maps():
    with open("/proc/self/maps") as lines:
        return sum("sagellm-" in line for line in lines)


@pytest.mark.parametrize("extra", [0, 4096, LARGE_PAGE - 4096])
@pytest.mark.parametrize("writable", [True, False])
def test_a_file_of_large_pages_begins_with_one(file, extra, writable):
    """It is unmapped with the last array over it."""
    size = 2 * LARGE_PAGE + extra
    os.ftruncate(file, size)
    before = maps()
    memory = map_file(file, size, writable=writable)

    assert memory.ctypes.data % LARGE_PAGE == 0
    assert memory.nbytes == size
    assert maps() == before + 1
    assert memory.flags.writeable == writable
    part = torch.from_numpy(memory[-8:]) if writable else memory[-8:]
    del memory
    os.pwrite(file, b"z", size - 1)
    assert part[-1] == ord("z")
    del part
    assert maps() == before


def test_bytes_stay_when_their_pages_are_gathered(file):
    size = 2 * LARGE_PAGE + 4096
    os.ftruncate(file, size)
    noise = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    memory = map_file(file, size, writable=True)
    memory[:] = np.frombuffer(noise, np.uint8)

    gather_pages(memory)

    assert memory.tobytes() == noise == os.pread(file, size, 0)


def test_small_files_are_mapped_as_they_are(file):
    os.ftruncate(file, 4096)
    memory = map_file(file, 4096, writable=True)
    gather_pages(memory)
    memory[:4] = 7
    assert os.pread(file, 5, 0) == b"\7\7\7\7\0"


def test_what_cannot_be_mapped_is_an_error_and_leaves_nothing(file):
    os.ftruncate(file, 4096)
    closed = os.dup(file)
    os.close(closed)
    with open("/proc/self/maps") as lines:
        before = len(lines.readlines())

    with pytest.raises(OSError, match="Bad file descriptor"):
        map_file(closed, 3 * LARGE_PAGE, writable=True)

    with open("/proc/self/maps") as lines:
        assert len(lines.readlines()) == before


def test_pools_and_what_peers_see_of_them_begin_with_a_large_page():
    segment = Segment(3 * LARGE_PAGE + 1, "a test")
    try:
        segment.seal(share=False)
        view = View(segment.fd, segment.nbytes)
        assert segment.address % LARGE_PAGE == view.address % LARGE_PAGE == 0
        segment.memory[-1] = 7
        assert view.memory[-1] == 7
        view.close()
    finally:
        segment.close()
