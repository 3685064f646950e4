"""Shared memory in trouble: freed, given up, crowded out, or behind a worker that is busy."""

import contextlib
import ctypes
import mmap
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings
from sagellm.comm.kv_transfer.transports import _shm_link
from sagellm.core.protocols import IntegrityError, KVTransferError, TransferKey

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")

KEY = TransferKey("k")


@pytest.fixture
def shared(channel, layout, monkeypatch):
    """Two channels with allocated pools, whose small blocks are referred to as large ones are."""
    monkeypatch.setattr(_shm_link, "_SENT_BYTES", 0)

    def make(**settings):
        options = {"settings": KVTransferSettings(transport="shm", **settings)}
        made = channel(**options), channel(**options)
        for c in made:
            c.allocate(layout(), 10)
        return made

    return make


def test_memory_that_its_sender_has_taken_back_and_freed_costs_no_other_transfer(
    channel, monkeypatch
):
    from sagellm.comm.kv_transfer._peek import Peek

    patient = {"settings": KVTransferSettings(transport="shm", quiesce_s=30)}
    out, into = channel(**patient), channel(**patient)
    out.connect(into.node_id)
    real, reading, freed = Peek.read, threading.Event(), threading.Event()
    errors = []

    def read(self, sources, addresses):
        reading.set()
        freed.wait(10)
        try:
            return real(self, sources, addresses)
        except IntegrityError as e:
            errors.append(e)
            raise

    monkeypatch.setattr(Peek, "read", read)
    memory = mmap.mmap(-1, 1 << 20)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    t = out.transfer([tensor], into.node_id, key=KEY)
    into.receive(KEY)
    assert reading.wait(10)
    other = out.transfer([torch.ones(3)], into.node_id, key=TransferKey("other"))

    t.cancel()
    with pytest.raises(KVTransferError):
        t.wait(10)
    # as if it were freed; but nothing else of this process can come to lie there
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(tensor.data_ptr()), 1 << 20, 0)
    freed.set()

    into.receive(TransferKey("other")).wait(10)
    other.wait(10)
    assert errors, "it was there still"


def test_a_frame_of_a_cancelled_transfer_is_not_sent(shared, monkeypatch):
    from sagellm.comm.kv_transfer import _writer

    out, into = shared()
    real, summing, go = _writer.block_sums, threading.Event(), threading.Event()

    def sums(*args):
        summing.set()
        go.wait(10)
        return real(*args)

    monkeypatch.setattr(_writer, "block_sums", sums)
    r = into.receive(KEY, [3, 4])
    t = out.transfer([1, 2], into.node_id, key=KEY)
    assert summing.wait(10)
    t.cancel()
    with pytest.raises(KVTransferError):
        r.wait(10)
    go.set()
    with pytest.raises(KVTransferError):
        t.wait(10)

    assert out.get_stats().wire_bytes_sent == 0


def test_a_crowd_at_the_door_is_waited_for(monkeypatch):
    from sagellm.comm.kv_transfer.transports import _door, shm

    real, opened = _door.TokenDoor._take_in, threading.Event()

    def take_in(*args):
        opened.wait(10)
        real(*args)

    monkeypatch.setattr(_door.TokenDoor, "_take_in", take_in)
    ours, theirs = shm.ShmTransport(), shm.ShmTransport()
    door, crowd = "\0" + theirs.endpoint().partition("/")[2], []
    with contextlib.suppress(BlockingIOError):
        while True:
            crowd.append(socket.socket(socket.AF_UNIX))
            crowd[-1].setblocking(False)
            crowd[-1].connect(door)
    with ThreadPoolExecutor(2) as threads:
        accepted = threads.submit(theirs.accept, b"t" * 32, 10)
        connected = threads.submit(ours.connect, theirs.endpoint(), b"t" * 32, 10)
        with pytest.raises(TimeoutError):
            connected.result(0.2)
        for sock in crowd:
            sock.close()
        opened.set()
        connections = [connected.result(10), accepted.result(10)]

    for x in (*connections, ours, theirs):
        x.close()


def test_a_transfer_given_up_does_not_wait_for_a_worker_that_is_stuck_in_another(shared):
    out, into = shared(copy_workers=1)
    out.connect(into.node_id)
    other = out.transfer([7], into.node_id, key=TransferKey("other"))
    workers = into._engine.pool._segment.workers
    busy = workers._free.pop()
    try:
        out.transfer([1, 2], into.node_id, key=KEY)
        with pytest.raises(KVTransferError):
            into.receive(KEY, [3, 4], deadline_s=0.3).wait(5)
        into.receive(TransferKey("other"), [8])  # over the same link, which nobody had to break
    finally:
        with workers._idle:
            workers._free.append(busy)
            workers._idle.notify_all()

    other.wait(10)
