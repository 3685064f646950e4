"""Either side killed or stopped in every state: the other one reports in time and holds nothing."""

import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sagellm.core.protocols import KVTransferError, TransferState

SCRIPT = Path(__file__).with_name("victim.py")
DEADLINE_S = 0.8
SLACK_S = 3.0
CASES = [(state, "tcp") for state in ("offered", "accepted", "moving", "landed")]
CASES += [("moving", "auto"), ("landed", "auto")]  # by shared memory, where there is any


def load():
    spec = importlib.util.spec_from_file_location("kv_transfer_victim", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


v = load()


class Nursery:
    """Forks victims, and listens to them."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.lines = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.hear(self.process.pid, "ready", 120)

    def _read(self):
        for line in self.process.stdout:
            self.lines.put(json.loads(line))

    def hear(self, pid, word, timeout_s=20):
        """What a process says next under that word; other words are passed over."""
        end = time.monotonic() + timeout_s
        while True:
            said = self.lines.get(timeout=max(0.01, end - time.monotonic()))
            assert "failed" not in said, said["failed"]
            if said["pid"] == pid and word in said:
                return said[word]

    def start(self, **job):
        self.process.stdin.write((json.dumps(job) + "\n").encode())
        self.process.stdin.flush()
        return self.hear(self.process.pid, "born")

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)
        self._reader.join(10)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def nursery():
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def survivor(leakless):
    made = []

    def make(node_id, transport):
        made.append(v.make_channel(node_id, transport, {}))
        return made[-1]

    yield make
    for c in made:
        c.close()


def snapshot(channel):
    return {n: t.clone() for n, t in channel._engine.pool.tensors.items()}


def same(channel, before):
    return all(torch.equal(t, before[n]) for n, t in channel._engine.pool.tensors.items())


def strike(pid, what):
    os.kill(pid, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])


def failed_in_time(handle, what, started):
    """How it failed: at once when the peer died, at the deadline when it only stopped."""
    with pytest.raises(KVTransferError) as caught:
        handle.wait(DEADLINE_S + 10)
    seconds = time.monotonic() - started
    assert seconds < (SLACK_S if what == "kill" else DEADLINE_S + SLACK_S)
    assert caught.value.cause in (("peer_lost",) if what == "kill" else ("comm_timeout",))
    assert handle.state is TransferState.FAILED


def let_go(nursery, channel, pid, what, *, hangs):
    """A stopped victim goes on; what it still had to say changes nothing here."""
    before = snapshot(channel)
    if what == "stop":
        os.kill(pid, signal.SIGCONT)
        if not hangs:
            ended = nursery.hear(pid, "ended")
            assert ended != "landed"
        os.kill(pid, signal.SIGKILL)
    assert same(channel, before)
    assert channel._engine.pool.leases == 0
    (done,) = channel.poll()
    assert done.blocks_safe
    return done


@pytest.mark.parametrize("what", ["kill", "stop"])
@pytest.mark.parametrize(("state", "transport"), CASES)
def test_a_receiver_outlives_its_sender(nursery, survivor, eventually, state, what, transport):
    c = survivor(1, transport)
    pid = nursery.start(role="sender", state=state, transport=transport, address=c.address)
    started = time.monotonic()

    def receive():
        return c.receive(v.TRANSFER, range(v.BLOCKS), source_node=0, deadline_s=wait_s)

    wait_s = 20 if what == "kill" or state == "landed" else DEADLINE_S
    if state == "offered":
        nursery.hear(pid, "reached")
        strike(pid, what)
        started = time.monotonic()
        wait_s = DEADLINE_S  # it may be gone already, and then nobody comes
        r = receive()
        with pytest.raises(KVTransferError) as caught:
            r.wait(10)
        assert caught.value.cause in ("peer_lost", "comm_timeout")
        assert time.monotonic() - started < DEADLINE_S + SLACK_S
    elif state == "landed":
        r = receive()
        r.wait(20)
        nursery.hear(pid, "reached")
        want = v.cache(0)
        assert all(torch.equal(t, want[n]) for n, t in c._engine.pool.tensors.items())
        strike(pid, what)
        eventually(lambda: c._engine.pool.leases == 0)
    else:
        r = receive()
        nursery.hear(pid, "reached")
        if state == "moving":
            r.wait_layer(0, 10)
        strike(pid, what)
        failed_in_time(r, what, time.monotonic() if what == "kill" else started)

    done = let_go(nursery, c, pid, what, hangs=state == "landed")
    assert done.status == ("landed" if state == "landed" else "failed")
    if state != "landed":
        assert done.invalid_blocks == tuple(range(v.BLOCKS))


@pytest.mark.parametrize("what", ["kill", "stop"])
@pytest.mark.parametrize(("state", "transport"), CASES)
def test_a_sender_outlives_its_receiver(nursery, survivor, state, what, transport):
    c = survivor(0, transport)
    pid = nursery.start(role="receiver", state=state, transport=transport)
    address = nursery.hear(pid, "address")
    c.add_peer(1, address)
    c.connect(1, timeout_s=10)
    wait_s = 20 if what == "kill" else DEADLINE_S
    started = time.monotonic()
    stream = c.begin(v.TRANSFER, 1, range(v.BLOCKS), deadline_s=wait_s)
    if state in ("moving", "landed"):
        stream.send_layer(0)
    if state == "landed":
        for i in range(1, v.LAYERS):
            stream.send_layer(i)
        stream.seal(1)
    nursery.hear(pid, "reached")
    strike(pid, what)
    struck = time.monotonic()
    if state == "moving":
        for i in range(1, v.LAYERS):  # more than the kernel's buffers hold
            stream.send_layer(i)

    failed_in_time(stream.transfer, what, struck if what == "kill" else started)

    hangs = state in ("offered", "landed")
    assert let_go(nursery, c, pid, what, hangs=hangs).status == "failed"
