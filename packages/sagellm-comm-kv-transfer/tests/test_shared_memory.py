"""Blocks in shared memory: references to them, and copies that count only while they may."""

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings
from sagellm.comm.kv_transfer.transports import _shm_link
from sagellm.core.protocols import (
    KVTransferError,
    PeerLostError,
    TransferKey,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")

KEY = TransferKey("k")


SHM = {"settings": KVTransferSettings(transport="shm")}
UNCHECKED = {"settings": KVTransferSettings(transport="shm", checksum=False)}


@pytest.fixture(autouse=True)
def _referred(monkeypatch):
    """Blocks as small as these would be sent as bytes."""
    monkeypatch.setattr(_shm_link, "_SENT_BYTES", -1)


@pytest.fixture
def shared(channel, layout):
    """Two channels with allocated pools of random blocks."""

    def make(blocks=10, options=SHM, **kw):
        out, into = channel(**options), channel(**options)
        pools = [c.allocate(layout(**kw), blocks) for c in (out, into)]
        for pool in pools:
            for tensor in pool.tensors.values():
                tensor.copy_(torch.randn(tensor.shape))
        return out, dict(pools[0].tensors), into, dict(pools[1].tensors)

    return make


def ints(*values):
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(("bytes_sent", "maps"), [(0, 1), (1 << 20, 0)])
def test_what_is_small_is_sent_and_what_is_large_is_shown(shared, monkeypatch, bytes_sent, maps):
    monkeypatch.setattr(_shm_link, "_SENT_BYTES", bytes_sent)
    out, a, into, b = shared()

    r = into.receive(KEY, [3, 4], source_node=0)
    out.transfer([1, 2], 1, key=KEY).wait(10)
    r.wait(10)

    assert all(torch.equal(a[n][[1, 2]], b[n][[3, 4]]) for n in a)
    (lane,) = next(iter(into._engine.links)).lanes
    assert len(lane._views) == maps
    assert (r.metrics.wire_bytes > r.metrics.bytes) == (not maps)


# -- transfers ------------------------------------------------------------------------------


def push(out, into, src, dst, key=KEY):
    t = out.transfer(src, into.node_id, key=key)
    r = into.receive(key, dst, source_node=out.node_id)
    return r.wait(10), t.wait(10)


def forbid(monkeypatch):
    from sagellm.comm.kv_transfer._peek import Peek

    def refuse(self, sources, addresses):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Peek, "read", refuse)


@pytest.mark.parametrize("options", [SHM, UNCHECKED])
@pytest.mark.parametrize("src", [[1, 2, 3, 7], [7, 2, 1, 3]])
def test_blocks_of_shared_pools_need_no_permission(shared, monkeypatch, options, src):
    forbid(monkeypatch)
    out, a, into, b = shared(options=options)

    r, t = push(out, into, src, [4, 5, 6, 0])

    assert all(torch.equal(a[n][src], b[n][[4, 5, 6, 0]]) for n in a)
    assert r.metrics.path == "shm:1"
    assert r.metrics.bytes == t.metrics.bytes > 10 * r.metrics.wire_bytes


def test_a_second_channel_shares_what_the_first_allocated(channel, layout, monkeypatch):
    forbid(monkeypatch)
    owner, out, into = channel(**SHM), channel(**SHM), channel(**SHM)
    pool = owner.allocate(layout(), 10)
    a = dict(pool.tensors)
    out.register(layout(), {n: t.copy_(torch.randn(t.shape)) for n, t in a.items()})
    b = dict(into.allocate(layout(), 10).tensors)

    r, _ = push(out, into, [1, 2], [8, 3])

    assert all(torch.equal(a[n][[1, 2]], b[n][[8, 3]]) for n in a)
    assert r.metrics.bytes > 10 * r.metrics.wire_bytes


def test_memory_that_nobody_allocated_is_read_where_the_kernel_permits(pair, channel):
    out, a, into, b = pair(sender=SHM, receiver=SHM)
    r, _ = push(out, into, [1, 2, 5], [3, 9, 0])
    plain = torch.randn(700_000)

    out.transfer([plain], 1, key=TransferKey("plain"))
    got = into.receive(TransferKey("plain")).wait(10)

    assert all(torch.equal(a[n][[1, 2, 5]], b[n][[3, 9, 0]]) for n in a)
    assert torch.equal(got.blocks[0].tensor, plain)
    assert r.metrics.path == "shm:1"
    assert got.metrics.wire_bytes < 10_000 < got.metrics.bytes


def test_bytes_are_sent_where_only_pools_can_be_read(shared, monkeypatch):
    forbid(monkeypatch)
    out, _, into, _ = shared()
    plain = [torch.randn(100_000), torch.randn(7)]

    out.transfer(plain, 1, key=KEY)
    got = into.receive(KEY).wait(10)

    assert all(torch.equal(g.tensor, p) for g, p in zip(got.blocks, plain, strict=True))
    assert got.metrics.wire_bytes > got.metrics.bytes
    assert out.path(1) == "shm:1"


def test_where_nothing_can_be_read_tcp_is_taken_and_says_why(pair, monkeypatch):
    forbid(monkeypatch)
    out, a, into, b = pair()

    push(out, into, [1, 2], [3, 4])

    assert all(torch.equal(a[n][[1, 2]], b[n][[3, 4]]) for n in a)
    assert out.path(1).startswith("tcp")
    assert "Operation not permitted" in out.explain(1)
    assert "channel.allocate" in out.explain(1)


def test_unregistering_lets_peers_unmap(shared, eventually):
    out, _, into, _ = shared()
    push(out, into, [1], [2])
    (link,) = into._engine.links
    (conn,) = link.lanes
    assert len(conn._views) == 1

    out.unregister(out._engine.pool)

    eventually(lambda: not conn._views)


def test_nothing_leaks_from_shared_memory(channel, layout, eventually, kept):
    def round_trip():
        out, into = channel(), channel()
        for node in (out, into):
            node.allocate(layout(), 10)
        push(out, into, [1], [2])
        out.offer(TransferKey("o"), [1], num_tokens=1, ttl_s=10)
        into.fetch(TransferKey("o"), out.node_id, [1]).wait(10)
        out.transfer([1], into.node_id, key=TransferKey("left"))
        out.close()
        into.close()

    def no_more():  # what an earlier test has left may still go
        gc.collect()
        return all(n <= m for n, m in zip(kept(), before, strict=True))

    round_trip()
    gc.collect()
    before = kept()
    for _ in range(3):
        round_trip()

    eventually(no_more, 20)


def at_first_copy(monkeypatch, action):
    """Do something once, after the first stretch of a reference was copied."""
    from sagellm.comm.kv_transfer.transports import _shm_link

    made, real = [], _shm_link.mover

    def mover(sources, addresses):
        move = real(sources, addresses)

        def first_then(low, high):
            move(low, min(low + 1, high))
            if not made:
                made.append(True)
                action()
            return move(low + 1, high)

        return first_then

    monkeypatch.setattr(_shm_link, "mover", mover)


@pytest.mark.parametrize("options", [SHM, UNCHECKED])
def test_what_is_copied_after_the_blocks_were_given_back_does_not_count(
    shared, monkeypatch, eventually, options
):
    out, a, into, _ = shared(options=options, blocks=40)
    push(out, into, [0], [0], key=TransferKey("meet"))
    copying, go_on = threading.Event(), threading.Event()

    def wait():
        copying.set()
        assert go_on.wait(10)

    at_first_copy(monkeypatch, wait)
    into._engine.receiving.on_fail = lambda *_: True  # its message is late: only the board tells
    into._engine.receiving.fail_key = lambda *_: None
    r = into.receive(KEY, range(20, 30), source_node=0)
    t = out.transfer(range(0, 20, 2), 1, key=KEY)
    assert copying.wait(10)
    (source,) = r.owner.sources

    t.cancel()
    with pytest.raises(KVTransferError):
        t.wait(10)
    for tensor in a.values():
        tensor.zero_()
    go_on.set()

    eventually(lambda: not source.inflow.busy)
    into._engine.loop.run(lambda: None)
    assert r.progress.bytes_done == 0
    assert not r.done()


def test_bytes_that_change_after_they_were_summed_are_asked_for_again(shared, monkeypatch):
    out, a, into, b = shared()
    push(out, into, [0], [0], key=TransferKey("meet"))
    from sagellm.comm.kv_transfer import _writer

    real, flips = _writer.block_sums, [1]

    def sum_then_flip(units, layer, first):
        sums = real(units, layer, first)
        if flips and flips.pop():
            units[0][0][5] ^= 255
        return sums

    monkeypatch.setattr(_writer, "block_sums", sum_then_flip)
    r, t = push(out, into, [1, 2], [3, 4])
    assert r.metrics.retries == t.metrics.retries == 1
    assert all(torch.equal(a[n][[1, 2]], b[n][[3, 4]]) for n in a)

    flips += [1] * 100
    t = out.transfer([1, 2], 1, key=TransferKey("always"))
    r = into.receive(TransferKey("always"), [3, 4])
    for handle in (r, t):
        with pytest.raises(KVTransferError) as caught:
            handle.wait(10)
        assert caught.value.cause == "integrity"


# -- copy workers ---------------------------------------------------------------------------


def workers_of(channel):
    (segment,) = {s for s in [channel._engine.pool._segment] if s is not None}
    return segment.workers


def children():
    mine = Path(f"/proc/{os.getpid()}/task")
    return sum(len((t / "children").read_text().split()) for t in mine.iterdir())


WORKING = {"settings": KVTransferSettings(transport="shm", copy_workers=1)}
WORKING_UNCHECKED = {
    "settings": KVTransferSettings(transport="shm", copy_workers=1, checksum=False)
}


@pytest.mark.parametrize("options", [WORKING, WORKING_UNCHECKED])
def test_a_copy_worker_moves_blocks_without_this_process(shared, monkeypatch, options):
    from sagellm.comm.kv_transfer.transports import _shm_link

    def refuse(*_):
        raise AssertionError("copied here")

    out, a, into, b = shared(options=options, blocks=40)
    monkeypatch.setattr(_shm_link, "mover", refuse)
    ids = np.random.default_rng(1).permutation(40)[:30]

    push(out, into, ids, ids[::-1])

    assert all(torch.equal(a[n][ids], b[n][ids[::-1].copy()]) for n in a)
    assert len(workers_of(into)) == 1


@pytest.fixture
def sharing(monkeypatch):
    """Options of channels that share the copying of everything, and the jobs of their workers."""
    from sagellm.comm.kv_transfer import _copy_workers, _offload, _reader, _segment

    monkeypatch.setattr(_segment, "_WORTH_BYTES", 0)
    monkeypatch.setattr(_segment, "usable_cpus", lambda: 2.0)
    monkeypatch.setattr(_offload, "_SHARED_BYTES", 0)
    monkeypatch.setattr(_reader, "_WARM_BYTES", 1)
    jobs, real = [], _copy_workers.CopyWorkers.begin

    def begin(workers, job, *args):
        jobs.append(job.stretches.shape[1])
        return real(workers, job, *args)

    monkeypatch.setattr(_copy_workers.CopyWorkers, "begin", begin)
    return {"settings": KVTransferSettings(transport="shm", checksum=False)}, jobs


@pytest.mark.parametrize("dies", [False, True])
def test_a_worker_shares_the_copying_of_unchecked_blocks(shared, sharing, dies):
    options, jobs = sharing
    out, a, into, b = shared(options=options, blocks=40)
    ids = np.random.default_rng(1).permutation(40)[:32]
    push(out, into, [0], [39], key=TransferKey("meet"))
    if dies:
        (worker,) = workers_of(into)._workers
        os.kill(worker._process.pid, signal.SIGKILL)

    push(out, into, ids, ids[::-1])

    assert all(torch.equal(a[n][ids], b[n][ids[::-1].copy()]) for n in a)
    assert 0 < jobs[-1] < 32
    assert len(workers_of(into)) == (0 if dies else 1)


def test_blocks_that_are_checked_and_small_pools_are_copied_here(shared, sharing, monkeypatch):
    from sagellm.comm.kv_transfer import _segment

    _, jobs = sharing
    out, a, into, b = shared(options={"settings": KVTransferSettings(transport="shm")})
    push(out, into, [1, 2, 3], [2, 3, 4])

    assert all(torch.equal(a[n][1:4], b[n][2:5]) for n in a)
    assert not jobs
    monkeypatch.setattr(_segment, "_WORTH_BYTES", 1 << 40)
    before = children()
    shared(options={"settings": KVTransferSettings(transport="shm")})
    assert children() == before


def test_a_copy_worker_finds_damaged_blocks(shared, monkeypatch):
    from sagellm.comm.kv_transfer import _writer

    out, a, into, b = shared(options=WORKING)
    real, flips = _writer.block_sums, [1]

    def sum_then_flip(units, layer, first):
        sums = real(units, layer, first)
        if flips and flips.pop():
            units[1][0][5] ^= 255
        return sums

    monkeypatch.setattr(_writer, "block_sums", sum_then_flip)
    r, _ = push(out, into, [1, 2], [3, 4])

    assert r.metrics.retries == 1
    assert all(torch.equal(a[n][[1, 2]], b[n][[3, 4]]) for n in a)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_blocks_land_in_spite_of_a_copy_worker_in_trouble(shared, monkeypatch, how):
    options = {"settings": KVTransferSettings(transport="shm", copy_workers=1, io_timeout_s=0.5)}
    out, a, into, b = shared(options=options)
    push(out, into, [0], [0], key=TransferKey("meet"))
    (worker,) = workers_of(into)._workers
    os.kill(worker._process.pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    push(out, into, [1, 2], [3, 4])

    assert all(torch.equal(a[n][[1, 2]], b[n][[3, 4]]) for n in a)
    assert worker._process.returncode == -signal.SIGKILL
    assert len(workers_of(into)) == 0


def test_a_transfer_given_up_ends_the_worker_that_is_stuck_in_it(shared):
    out, _, into, b = shared(options=WORKING)
    push(out, into, [0], [0], key=TransferKey("meet"))
    before = {n: t.clone() for n, t in b.items()}
    (worker,) = workers_of(into)._workers
    os.kill(worker._process.pid, signal.SIGSTOP)

    out.transfer([1, 2], 1, key=KEY)
    r = into.receive(KEY, [3, 4], deadline_s=0.5)
    with pytest.raises(KVTransferError):
        r.wait(10)

    assert worker._process.returncode == -signal.SIGKILL
    assert all(torch.equal(b[n], before[n]) for n in b)


@pytest.mark.parametrize("chosen", [None, "glibc.malloc.tcache_count=1"])
def test_copy_workers_copy_around_the_cache_unless_told_otherwise(
    channel, layout, monkeypatch, chosen
):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", chosen)
    into = channel(**WORKING)
    into.allocate(layout(), 2)
    (worker,) = workers_of(into)._workers

    environ = Path(f"/proc/{worker._process.pid}/environ").read_bytes().split(b"\0")

    (tunables,) = [e for e in environ if e.startswith(b"GLIBC_TUNABLES=")]
    assert (b"x86_non_temporal_threshold" in tunables) == (chosen is None)


def test_copy_workers_go_with_their_pool_and_let_go_of_peers(shared, eventually):
    before = children()
    out, _, into, _ = shared(options=WORKING)
    assert children() == before + 2
    push(out, into, [1], [2])
    (worker,) = workers_of(into)._workers
    assert len(worker._known) == 1

    out.unregister(out._engine.pool)

    eventually(lambda: not worker._known)
    assert children() == before + 1
    into.close()
    assert children() == before


def test_a_copy_worker_ends_with_its_parent(layout, eventually):
    program = (
        "import sys, os\n"
        "from sagellm.comm.kv_transfer._segment import Segment\n"
        "s = Segment(4096, 'x'); s.start_workers(1)\n"
        "print(s.workers._workers[0]._process.pid, flush=True)\n"
        "if os.fork() == 0: sys.stdin.read(); os._exit(0)\n"  # holds our end of the socket
        "os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    worker = int(process.stdout.readline())
    process.wait(10)

    def gone():
        try:
            state = Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        return state in "ZX"

    eventually(gone, 10)
    process.stdin.close()
    process.stdout.close()


def test_memory_of_a_peer_that_left_is_given_back(shared, eventually):
    def mapped():
        with open("/proc/self/maps") as f:
            return sum("memfd:sagellm" in line for line in f)

    out, _, into, _ = shared()
    before = mapped()
    r = into.receive(KEY, [1])
    out.transfer([2], into.node_id, key=KEY).wait(10)
    r.wait(10)
    assert mapped() > before

    link = next(iter(into._engine.links))
    into._engine.loop.run(lambda: link.lose(PeerLostError("it left")))

    eventually(lambda: mapped() == before)
