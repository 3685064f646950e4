"""Callers who wait for something small read it themselves, and leave the lane as it was."""

import contextlib
import linecache
import socket
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sagellm.comm.kv_transfer import _flows, _reader, _turn, _visit
from sagellm.comm.kv_transfer._arrivals import Arrivals
from sagellm.comm.kv_transfer._flows import Inflow
from sagellm.comm.kv_transfer._loop import EventLoop
from sagellm.comm.kv_transfer._meters import Meters, Traffic
from sagellm.comm.kv_transfer._reader import DataReader
from sagellm.comm.kv_transfer._turn import Gate, ReadTurn
from sagellm.comm.kv_transfer.frames import HEADER_BYTES, Header, block_sum
from sagellm.comm.kv_transfer.memory import TensorExtent, bytes_of
from sagellm.comm.kv_transfer.transfer import TransferHandle
from sagellm.comm.kv_transfer.transports._shm_link import ShmConnection
from sagellm.comm.kv_transfer.transports._socket import SocketConnection
from sagellm.core.protocols import (
    CommTimeoutError,
    DistributedRuntimeError,
    IntegrityError,
    PeerLostError,
    TransferKey,
)

pytestmark = pytest.mark.skipif(not ReadTurn.possible(), reason="this system has no eventfd")
LIMIT_S = 20.0


class Rig:
    """A reader with one lane, whose other end is a plain socket."""

    def __init__(self):
        self.sock, theirs = socket.socketpair()
        self.conn = SocketConnection(theirs, "test")
        self.flows, self.landed_on, self.ended = {}, [], []
        self.reader = DataReader(
            self.flows,
            self._landed,
            io_timeout_s=LIMIT_S,
            traffic=Traffic(Meters(), "receive"),
            coded=SimpleNamespace(checksum=True),
        )
        self.thread = threading.Thread(target=self._run, name="lane")
        self.thread.start()
        end = time.monotonic() + LIMIT_S
        while self.reader._seat is None and time.monotonic() < end:
            time.sleep(0.001)

    def _run(self):
        try:
            self.reader.run(self.conn)
        except Exception as e:
            self.ended.append(e)

    def _landed(self, flow, head, fresh, again):
        self.landed_on.append(threading.current_thread().name)
        if flow.complete:
            flow.over.set()
            flow.gate.open()
        return False

    def frame(self, tid, nbytes):
        """The bytes of a frame of one block, and where they will be."""
        source, target = torch.arange(nbytes, dtype=torch.uint8), torch.zeros(nbytes).byte()
        handle = TransferHandle(TransferKey(str(tid)), "receive", LIMIT_S, lambda _: False)
        flow = self.flows[tid] = Inflow(handle, tid, TensorExtent([target], nbytes))
        flow.over, flow.gate = threading.Event(), Gate()
        payload = bytes_of(source)
        table = block_sum([payload], 0, 0).to_bytes(8, "little")
        return Header(tid, 0, 0, 1, nbytes, 0).pack(table) + bytes(payload), (source, target)

    def visit(self, tid, timeout_s=LIMIT_S):
        """Read on a thread of its own until a transfer is over; the thread, which has the turn."""

        def body():
            flow = self.flows[tid]
            self.reader.read(flow.gate, flow.over.is_set, timeout_s)

        thread = threading.Thread(target=body, name="visitor")
        thread.start()
        turn, end = self.reader._seat.turn, time.monotonic() + LIMIT_S
        while not turn._lent and thread.is_alive() and time.monotonic() < end:
            time.sleep(0.001)
        return thread

    def close(self):
        self.sock.close()
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive()
        self.conn.close()


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.close()


def test_whoever_waits_reads_what_is_small_and_gives_the_turn_back(rig):
    first, (source, target) = rig.frame(1, 4096)
    visitor = rig.visit(1)

    rig.sock.sendall(first)
    visitor.join(LIMIT_S)

    assert torch.equal(source, target)
    assert rig.landed_on == ["visitor"]
    second, (source, target) = rig.frame(2, 4096)
    rig.sock.sendall(second)
    assert rig.flows[2].over.wait(LIMIT_S)
    assert torch.equal(source, target)
    assert rig.landed_on == ["visitor", "lane"]


def test_a_visitor_receives_what_another_waits_for(rig):
    (first, _), (second, (source, target)) = rig.frame(1, 4096), rig.frame(2, 4096)
    visitor = rig.visit(1)

    rig.sock.sendall(second + first)
    visitor.join(LIMIT_S)

    assert rig.flows[2].over.is_set()
    assert torch.equal(source, target)
    assert rig.landed_on == ["visitor", "visitor"]


def test_what_is_large_is_left_to_the_thread_of_the_lane(rig):
    frame, (source, target) = rig.frame(1, _visit.SMALL_BYTES + 1)
    visitor = rig.visit(1)

    rig.sock.sendall(frame)

    assert rig.flows[1].over.wait(LIMIT_S)
    visitor.join(LIMIT_S)
    assert torch.equal(source, target)
    assert rig.landed_on == ["lane"]


@pytest.mark.parametrize("cut", [10, HEADER_BYTES, HEADER_BYTES + 1000])
def test_a_frame_that_does_not_come_in_full_is_finished_by_the_thread_of_the_lane(rig, cut):
    frame, (source, target) = rig.frame(1, 4096)
    visitor = rig.visit(1)

    rig.sock.sendall(frame[:cut])
    visitor.join(LIMIT_S)
    assert not visitor.is_alive()
    assert not rig.flows[1].over.is_set()
    rig.sock.sendall(frame[cut:])

    assert rig.flows[1].over.wait(LIMIT_S)
    assert torch.equal(source, target)
    assert rig.landed_on == ["lane"]


def test_a_visit_ends_with_its_time(rig):
    rig.frame(1, 4096)
    visitor = rig.visit(1, timeout_s=0.05)

    visitor.join(LIMIT_S)

    assert not visitor.is_alive()
    assert rig.reader._seat.turn._guest is None


def test_a_visit_ends_when_the_gate_is_opened_for_another_reason(rig):
    rig.frame(1, 4096)
    visitor = rig.visit(1)

    rig.flows[1].over.set()
    rig.flows[1].gate.open()
    visitor.join(LIMIT_S)

    assert not visitor.is_alive()


def test_what_a_visitor_finds_broken_ends_the_lane(rig):
    frame, _ = rig.frame(1, 4096)
    visitor = rig.visit(1)

    rig.sock.sendall(b"x" + frame[1:])
    visitor.join(LIMIT_S)
    rig.thread.join(LIMIT_S)

    assert isinstance(rig.ended[0], IntegrityError)


def test_an_interrupt_in_the_middle_of_a_frame_ends_the_lane_and_leaves_its_blocks(rig):
    frame, _ = rig.frame(1, 4096)
    take, interrupted = rig.conn.take, []

    def interrupt(views):
        if len(views) == 1:
            return take(views)
        raise KeyboardInterrupt

    rig.conn.take = interrupt
    body = rig.reader.read

    def read(*args):
        try:
            body(*args)
        except KeyboardInterrupt as e:
            interrupted.append(e)

    rig.reader.read = read
    visitor = rig.visit(1)

    rig.sock.sendall(frame)
    visitor.join(LIMIT_S)
    rig.thread.join(LIMIT_S)

    assert interrupted
    assert isinstance(rig.ended[0], DistributedRuntimeError)
    assert not rig.flows[1].busy


def test_one_visitor_at_a_time(rig):
    rig.frame(1, 4096)
    rig.frame(2, 4096)
    visitor = rig.visit(1)
    second = Gate()

    assert not rig.reader._seat.turn.ask(second)

    rig.flows[1].over.set()
    rig.flows[1].gate.open()
    visitor.join(LIMIT_S)


def test_a_pushed_block_lands_on_the_thread_that_waits_for_it(pair, monkeypatch):
    landed_on, on_frame = [], Arrivals.on_frame

    def noted(*args):
        landed_on.append(threading.get_ident())
        return on_frame(*args)

    monkeypatch.setattr(Arrivals, "on_frame", noted)
    out, _, into, _ = pair()
    out.connect(into.node_id)

    for i in range(3):  # the lane that small things take is known once one has come
        key = TransferKey(f"small-{i}")
        handle = into.receive(key, [i % 4], source_node=out.node_id)
        timer = threading.Timer(0.05, lambda k=key, b=i % 4: out.transfer([b], into.node_id, key=k))
        timer.start()
        handle.wait()
        timer.join()

    assert threading.get_ident() in landed_on  # and handles wait, whoever reads


def test_a_turn_that_comes_too_late_is_no_landing():
    here, there = socket.socketpair()
    turn = ReadTurn(here.fileno(), lambda: False)
    thread = threading.Thread(target=lambda: turn.settle() and turn.settle())
    thread.start()
    lane = _visit.Lane(None, turn)
    handle = TransferHandle(TransferKey("never"), "receive", LIMIT_S, lambda _: False)
    leave, end = turn.leave, time.monotonic() + LIMIT_S

    def late(gate):  # the turn is lent after the visitor's time, before he leaves
        while turn._guest is gate and not turn.has(gate) and time.monotonic() < end:
            time.sleep(0.001)
        leave(gate)

    turn.leave = late
    handle.seat = SimpleNamespace(
        read=lambda gate, over, timeout_s: lane.visit(gate, over, timeout_s, {}, b"", None)
    )

    with pytest.raises(CommTimeoutError):
        handle.wait(0.0)

    assert not handle._gates
    there.close()
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    here.close()


def test_what_a_visitor_lands_for_others_rouses_the_event_loop_at_once(rig):
    roused = threading.Event()
    rig.reader._rouse = rig.reader._seat.rouse = roused.set
    landed = rig.reader._on_landed
    rig.reader._on_landed = lambda *args: landed(*args) or True
    (first, _), (second, _) = rig.frame(1, 4096), rig.frame(2, 4096)
    visitor = rig.visit(1)

    rig.sock.sendall(second)

    assert roused.wait(LIMIT_S / 2)
    assert visitor.is_alive()
    rig.sock.sendall(first)
    visitor.join(LIMIT_S)


def test_a_call_wakes_the_event_loop_also_when_something_was_posted_before():
    loop, ran = EventLoop("test"), threading.Event()
    loop.start()
    try:
        loop.run(lambda: None)
        time.sleep(0.05)  # asleep
        loop.post(lambda: None)
        loop.call(ran.set)

        assert ran.wait(LIMIT_S)
    finally:
        loop.stop()


def _interrupted_at(rig, tid, n):
    """Have the n-th line of a visit interrupted; where that was, None when there are fewer."""
    files, hit, count = {m.__file__ for m in (_visit, _turn, _reader, _flows)}, [], 0

    def trace(frame, event, arg):
        nonlocal count
        if frame.f_code.co_filename not in files or frame.f_code.co_name == "__init__":
            return None
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        # at the end of `with` no real interrupt comes before the lock is free, as this one would
        if event == "line" and not hit and not source.startswith("with "):
            count += 1
            if count == n:
                hit.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
                raise KeyboardInterrupt
        return trace

    def body():
        flow = rig.flows[tid]
        sys.settrace(trace)
        try:
            rig.reader.read(flow.gate, flow.over.is_set, LIMIT_S)
        except KeyboardInterrupt:
            sys.settrace(None)
        finally:
            sys.settrace(None)
            flow.gate.rise()  # as `wait` does

    thread = threading.Thread(target=body)
    thread.start()
    return thread, hit


def test_an_interrupt_at_any_line_of_a_visit_leaves_the_lane_alive_or_ends_it(eventually):
    n, hit = 0, [None]
    while hit:
        n += 1
        rig = Rig()
        frame, _ = rig.frame(1, 4096)
        visitor, hit = _interrupted_at(rig, 1, n)
        rig.sock.sendall(frame)
        visitor.join(LIMIT_S)
        second, _ = rig.frame(2, 64)
        with contextlib.suppress(OSError):
            rig.sock.sendall(second)
        try:
            eventually(lambda r=rig: r.flows[2].over.is_set() or r.ended, LIMIT_S / 2)
            eventually(lambda r=rig: not r.flows[1].busy, LIMIT_S / 2)
        except AssertionError as e:
            e.add_note(f"line {n}: {hit}")
            raise
        rig.close()
        assert n < 1000
    assert n > 20


def test_a_peer_that_dies_with_unread_bytes_is_lost_and_no_bug():
    ours, theirs = socket.socketpair()
    meeting = SimpleNamespace(
        readable=False,
        theirs=SimpleNamespace(memory=np.zeros(64, np.uint8), close=lambda: None),
        board=SimpleNamespace(close=lambda: None),
        peek=None,
    )
    conn = ShmConnection(ours, "peer", meeting, 1 << 16)
    ours.send(b"unread")
    theirs.close()

    with pytest.raises(PeerLostError, match="broke"):
        conn.take([memoryview(bytearray(10))])

    conn.close()
