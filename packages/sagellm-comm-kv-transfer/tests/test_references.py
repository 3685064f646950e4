"""References to memory: hostile tables, paired runs, words that are taken back."""

import fcntl
import os
import socket
import struct
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from sagellm.comm.kv_transfer import auth
from sagellm.comm.kv_transfer._flows import Inflow
from sagellm.comm.kv_transfer._reader import DataReader
from sagellm.comm.kv_transfer.frames import HEADER_BYTES, REF, Header
from sagellm.comm.kv_transfer.memory import TensorExtent
from sagellm.comm.kv_transfer.transfer import TransferHandle
from sagellm.core.protocols import (
    AuthenticationError,
    CommError,
    IntegrityError,
    MemoryRuns,
    TransferKey,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")


def ints(*values):
    return np.array(values, dtype=np.int64)


def kept():
    """Descriptors, and mappings of memory files."""
    with open("/proc/self/maps") as maps:
        mapped = sum("sagellm-kv" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), threading.active_count(), mapped


class Room:
    """A mapped segment of a peer, as far as a table knows."""

    def __init__(self, nbytes):
        self.memory = np.zeros(nbytes, dtype=np.uint8)
        self.nbytes, self.address = nbytes, self.memory.ctypes.data


def table(which, places, lengths, **kw):
    from sagellm.comm.kv_transfer._reference import SEGMENTS, Table

    columns = [np.array(c, dtype=np.uint64) for c in (which, places, lengths)]
    return Table(kw.get("kind", SEGMENTS), 0, 1, (), (), *columns)


@pytest.mark.parametrize(
    ("which", "places", "lengths"),
    [
        ([2], [0], [1]),
        ([0], [0], [1]),
        ([1], [4096], [1]),
        ([1], [4095], [2]),
        ([1], [0], [4097]),
        ([1, 1], [0, 2**64 - 1], [8, 8]),
        ([1, 1], [0, 2**46], [8, 8]),
        ([1], [1], [2**46]),
        ([1], [0], [0]),
        ([1], [0], [2**63]),
        ([1, 2**63], [0, 0], [8, 8]),
    ],
)
def test_a_run_outside_what_was_shown_is_refused(which, places, lengths):
    from sagellm.comm.kv_transfer._reference import Table

    rooms = {1: Room(4096)}

    with pytest.raises(IntegrityError):
        Table.unpack(table(which, places, lengths).pack()).runs(rooms)
    assert table([1], [4000], [96]).runs(rooms).lengths.tolist() == [96]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_bytes_come_a_table_stays_within_its_segments(data):
    from sagellm.comm.kv_transfer._reference import SEGMENTS, Table

    rooms = {1: Room(4096), 9: Room(8192)}
    sound = bytearray(table([1, 9, 9], [0, 0, 4096], [4096, 100, 4096]).pack())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(sound) - 1))
        sound[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(sound)), st.integers(0, len(sound))))
    try:
        got = Table.unpack(bytes(sound[:cut]))
        runs = got.runs(rooms)
    except IntegrityError:
        return
    if got.kind == SEGMENTS:
        for start, length in zip(runs.addresses.tolist(), runs.lengths.tolist(), strict=True):
            assert length > 0
            assert any(r.address <= start <= start + length <= r.address + r.nbytes
                       for r in rooms.values())  # fmt: skip


@pytest.mark.parametrize("count", [1 << 17, (1 << 32) - 1])
def test_huge_counts_are_refused_before_anything_is_made_of_them(count):
    from sagellm.comm.kv_transfer._reference import Table

    sound = bytearray(table([1], [0], [8]).pack())
    for at in (8, 12):  # segments gone, runs
        broken = bytearray(sound)
        struct.pack_into("<I", broken, at, count)
        with pytest.raises(IntegrityError):
            Table.unpack(broken)


@pytest.mark.parametrize("fault", ["unsealed", "shrinkable", "sparse", "smaller", "no memory file"])
def test_a_segment_that_could_fail_under_its_reader_is_not_mapped(fault, tmp_path):
    from sagellm.comm.kv_transfer._segment import View

    if fault == "no memory file":
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        os.truncate(fd, 8192)
    else:
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 8192)
        if fault != "sparse":
            os.pwrite(fd, bytes(8192), 0)
        seals = {"unsealed": 0, "shrinkable": fcntl.F_SEAL_GROW | 0x10}
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals.get(fault, 0x2 | 0x4 | 0x10))
    before = kept()
    try:
        with pytest.raises(IntegrityError):
            View(fd, 4096 if fault == "smaller" else 8192)
        assert kept() == before
    finally:
        os.close(fd)


def runs_of(lengths, gaps, base):
    starts = base + np.cumsum(np.array(gaps) + np.array([0, *lengths[:-1]]))
    return MemoryRuns(starts.astype(np.int64), np.array(lengths, dtype=np.int64))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_runs_are_cut_where_either_side_is_and_nowhere_else(data):
    from sagellm.comm.kv_transfer._copy import mover, pair

    total = data.draw(st.integers(1, 400))

    def side(memory):
        edges = sorted(data.draw(st.sets(st.integers(1, total), max_size=6)) | {total})
        lengths = [b - a for a, b in zip([0, *edges], edges, strict=False)]
        gaps = [data.draw(st.integers(0, 3)) for _ in lengths]
        return runs_of(lengths, gaps, memory.ctypes.data)

    source = np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8)
    target = np.zeros(500, dtype=np.uint8)
    a, b = side(source), side(target)
    cuts = ints(*sorted(data.draw(st.sets(st.integers(1, total), max_size=3))))

    paired = pair(a, b, cuts)
    mover(paired.sources, paired.addresses)(0, len(paired.ends))

    def gather(memory, runs):
        places = zip(runs.addresses - memory.ctypes.data, runs.lengths, strict=True)
        return np.concatenate([memory[i : i + n] for i, n in places])

    assert np.array_equal(gather(source, a), gather(target, b))
    joints = {int(e) for runs in (a, b) for e, x, n, y in zip(
        np.cumsum(runs.lengths), runs.addresses, runs.lengths, runs.addresses[1:], strict=False)
        if x + n != y}  # fmt: skip
    assert paired.ends.tolist() == sorted({total, *joints, *cuts.tolist()})


def python_calls(function):
    """Calls of Python and C functions that it makes."""
    calls = [0]

    def count(frame, event, argument):
        calls[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls[0]


def test_page_tables_are_converted_without_work_per_block(monkeypatch, layout):
    from sagellm.comm.kv_transfer import _copy, _reference, _segment
    from sagellm.comm.kv_transfer.plan import held_part
    from sagellm.comm.kv_transfer.pool import PoolExtent, RegisteredPool

    monkeypatch.setattr(_reference, "MAX_RUNS", 1 << 20)
    one = layout(layers=1, page=1, dim=4, heads=1)
    pool = RegisteredPool.allocate(one, 200_000)
    try:
        parts = {"kv": held_part(one.groups[0], "")}
        view = Room(1)
        (segment,) = _segment.shared_segments()
        view.nbytes, view.address = segment.nbytes, segment.address

        def convert(count):
            ids = np.arange(count * 2 - 2, -1, -2)
            table_ = pool.as_table(ids, unique=True)
            runs = PoolExtent(pool, table_, parts).runs(0, 0, count)
            found = _segment.locate(runs)
            packed = table(np.full(count, segment.number), found.offsets, runs.lengths).pack()
            there = _reference.Table.unpack(packed).runs({segment.number: view})
            _copy.pair(there, runs, ints())
            assert len(there.lengths) == count

        convert(10)
        assert python_calls(lambda: convert(100_000)) == python_calls(lambda: convert(100))
    finally:
        pool.close()


def test_slots_are_used_again_and_words_taken_back_once():
    from sagellm.comm.kv_transfer._board import BOARD_BYTES, Board

    board = Board()
    slots = BOARD_BYTES // 8
    pledges = [board.pledge() for _ in range(slots)]
    assert len({p.slot for p in pledges}) == slots
    assert board.pledge() is None

    pledges[3].revoke()
    fresh = board.pledge()
    pledges[3].revoke()

    assert (fresh.slot, fresh.number) == (pledges[3].slot, slots + 1)
    assert board.pledge() is None
    board.close()
    fresh.revoke()


@pytest.fixture
def connected():
    """Two ends of a connection through shared memory."""
    from sagellm.comm.kv_transfer.transports import ShmTransport

    one, two = ShmTransport(), ShmTransport()
    found = []
    thread = threading.Thread(target=lambda: found.append(two.accept(b"t" * 32, 10)))
    thread.start()
    ours = one.connect(two.endpoint(), b"t" * 32, 10)
    thread.join(10)
    yield ours, found[0]
    for x in (ours, *found, one, two):
        x.close()


@pytest.mark.parametrize("what", ["slot", "shown without", "cannot be read", "were shown"])
def test_a_reference_to_what_the_peer_has_not_shown_is_refused(connected, what):
    from sagellm.comm.kv_transfer._reference import ADDRESSES, NOTHING, SEGMENTS, Table

    ours, theirs = connected
    none, one = np.empty(0, np.uint64), np.ones(1, np.uint64)
    data = {
        "slot": Table(NOTHING, 1 << 20, 1),
        "shown without": Table(SEGMENTS, 0, 1, [(1, 4096)], (), one, one, one),
        "cannot be read": Table(ADDRESSES, 0, 1, (), (), none, one, one),
        "were shown": Table(SEGMENTS, 0, 1, (), (), one, one, one),
    }[what].pack()
    peek = theirs._meeting.peek
    theirs._meeting = theirs._meeting._replace(peek=None)  # as where the kernel does not permit it
    ours.send([memoryview(data)], 5)

    with pytest.raises(IntegrityError, match=what):
        theirs.resolve(len(data), 5)
    theirs._meeting = theirs._meeting._replace(peek=peek)


def test_a_frame_refers_to_as_many_bytes_as_its_blocks_have():
    handle = TransferHandle(TransferKey("k"), "receive", 10, lambda _: False)
    flow = Inflow(handle, 1, TensorExtent([torch.zeros(4, dtype=torch.uint8)], 1))
    reader = DataReader({}, lambda *_: None, io_timeout_s=1, traffic=None, coded=None)
    packed = Header(1, 0, 0, 4, 10, REF).pack(bytes(32))
    head, sums = Header.unpack(packed[:HEADER_BYTES]), memoryview(packed[HEADER_BYTES:])

    for size in (3, 5):
        with pytest.raises(IntegrityError, match=f"refers to {size} bytes for blocks of 4"):
            reader._take(None, flow, head, sums, SimpleNamespace(total_bytes=size))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_processes_of_other_users_are_turned_away_with_a_right_token_too():
    from sagellm.comm.kv_transfer.transports import ShmTransport

    transport, token = ShmTransport(), b"t" * 32
    refused = []

    def accept():
        try:
            transport.accept(token, 20)
        except CommError as e:
            refused.append(str(e))

    thread = threading.Thread(target=accept)
    thread.start()
    child = os.fork()
    if child == 0:
        got = b"what was never said"
        try:
            os.setuid(65534)
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(10)
            try:
                sock.connect("\0" + transport.endpoint().partition("/")[2])
                sock.sendall(auth.token_id(token) + auth.token_proof(token, initiator=True))
                got = sock.recv(32)
            except ConnectionError:
                got = b""
        finally:
            os._exit(len(got))
    try:
        _, status = os.waitpid(child, 0)
        transport.forget(token)
        thread.join(10)

        assert os.waitstatus_to_exitcode(status) == 0
        assert transport.rejected == 1
        assert refused == ["nobody wants it now"]
    finally:
        transport.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_the_socket_of_another_user_is_told_nothing():
    from sagellm.comm.kv_transfer.transports import ShmTransport

    transport = ShmTransport()
    name = f"sagellm-kv-test-{os.getpid()}"
    ready, heard = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"\0{name}")
            listener.listen()
            os.write(ready[1], b"x")
            listener.settimeout(10)
            sock, _ = listener.accept()
            os.write(heard[1], sock.recv(100))
        finally:
            os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"x"
        host = transport.endpoint().partition("/")[0]
        with pytest.raises(AuthenticationError, match="another user"):
            transport.connect(f"{host}/{name}", b"t" * 32, 5)
        os.waitpid(child, 0)
        os.close(heard[1])
        assert os.read(heard[0], 100) == b""
    finally:
        transport.close()
        for fd in (*ready, heard[0]):
            os.close(fd)
