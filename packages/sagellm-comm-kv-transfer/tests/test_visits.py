"""Callers who wait for something small read it themselves, and leave the lane as it was."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from sagellm.comm.kv_transfer import _visit
from sagellm.comm.kv_transfer._arrivals import Arrivals
from sagellm.comm.kv_transfer._flows import Inflow
from sagellm.comm.kv_transfer._meters import Meters, Traffic
from sagellm.comm.kv_transfer._reader import DataReader
from sagellm.comm.kv_transfer._turn import Gate, ReadTurn
from sagellm.comm.kv_transfer.frames import HEADER_BYTES, Header, block_sum
from sagellm.comm.kv_transfer.memory import TensorExtent, bytes_of
from sagellm.comm.kv_transfer.transfer import TransferHandle
from sagellm.comm.kv_transfer.transports._socket import SocketConnection
from sagellm.core.protocols import DistributedRuntimeError, IntegrityError, TransferKey

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
