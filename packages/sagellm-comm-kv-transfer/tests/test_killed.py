"""Either side killed or stopped in every phase of the table, pushes and pulls, tcp and shm.

The one that is left reports in time and holds nothing, what landed is right, and nothing that the
other one still does later, when it goes on, reaches a block that was given back.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from sagellm.comm.kv_transfer.state import RULES, TABLE, Phase, Role
from sagellm.core.protocols import KVTransferError, TransferState

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")

SCRIPT = Path(__file__).with_name("victim.py")
DEADLINE_S = 3.0
"""Of what the survivor does; also the time that victims have to get where they are struck."""
SLACK_S = 10.0

_PUSHED = {
    "offered": Phase.OFFERED,
    "accepted": Phase.ACCEPTED,
    "moving": Phase.MOVING,
    "failing": Phase.FAILING,
    "cancelling": Phase.CANCELLING,
}
POINTS = {
    "send": {
        **_PUSHED,
        "sent": Phase.MOVING,
        "settling": Phase.SETTLING,
        "cancelled": Phase.CANCELLING,
    },
    "receive": {
        **_PUSHED,
        "accepting": Phase.ACCEPTED,
        "landed": Phase.LANDED,
        "told": Phase.LANDED,
        "cancelled": Phase.CANCELLING,
    },
    "offer": {
        "offered": Phase.OFFERED,
        "accepted": Phase.ACCEPTED,
        "moving": Phase.ACCEPTED,
        "renewing": Phase.ACCEPTED,
        "serving": Phase.ACCEPTED,
        "settling": Phase.SETTLING,
        "failing": Phase.FAILING,
        "expired": Phase.FAILING,
        "cancelling": Phase.CANCELLING,
        "cancelled": Phase.CANCELLING,
    },
    "fetch": {
        **_PUSHED,
        "offered": Phase.ACCEPTED,  # the offering side has not offered yet
        "landed": Phase.LANDED,
        "told": Phase.LANDED,
        "cancelled": Phase.CANCELLING,
    },
}
"""Where victims are struck, by what they do, and in which phase they are there."""


def expected(role, point, how):
    """How it ends for the one that is left: `landed`, or one of these causes."""
    if point in ("told", "serving", "settling"):
        return {"landed"}
    if point == "sent":  # of which the kernel may not have everything yet
        return {"landed", "peer_lost" if how == "kill" else "comm_timeout"}
    if role == "fetch":  # its offer stands for others
        return {"lease_expired"}
    if point in ("cancelled", "expired"):
        return {"cancelled" if point == "cancelled" else "lease_expired"}
    if how == "stop":
        return {"comm_timeout"}
    return {"peer_lost", "comm_timeout"} if point == "offered" else {"peer_lost"}


def load():
    spec = importlib.util.spec_from_file_location("kv_transfer_victim", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


v = load()


class Nursery:
    """Forks victims, and listens to them. Thread-safe."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._said = defaultdict(queue.Queue)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.hear(self.process.pid, "ready", 120)

    def _read(self):
        for line in self.process.stdout:
            said = json.loads(line)
            self._said[("born", said["of"]) if "of" in said else said["pid"]].put(said)

    def hear(self, whom, word, timeout_s=20):
        """What a process says next under that word; other words are passed over."""
        end = time.monotonic() + timeout_s
        while True:
            said = self._said[whom].get(timeout=max(0.01, end - time.monotonic()))
            assert "failed" not in said, said["failed"]
            if word in said:
                return said[word]

    def start(self, **job):
        with self._lock:
            number = next(self._numbers)
            self.process.stdin.write((json.dumps({**job, "number": number}) + "\n").encode())
            self.process.stdin.flush()
        return self.hear(("born", number), "born")

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


class Case:
    """One victim, struck at one point, and the channel that is left."""

    def __init__(self, nursery, eventually, role, point, how, transport):
        self.nursery, self.eventually = nursery, eventually
        self.role, self.point, self.how, self.transport = role, point, how, transport
        self.expected = expected(role, point, how)

    def run(self):
        self.channel = c = v.make_channel(v.SURVIVOR, self.transport, {})
        self.tensors = c._engine.pool.tensors
        dials = self.role in ("send", "fetch")
        self.pid = self.nursery.start(
            role=self.role,
            point=self.point,
            transport=self.transport,
            address=c.address if dials else "",
        )
        try:
            if not dials:
                c.add_peer(v.VICTIM, self.nursery.hear(self.pid, "address"))
                c.connect(v.VICTIM, timeout_s=10)
            self.eventually(lambda: c.get_stats().peers, 20)
            self.strike_at_its_point()
            self.ends_in_time()
            self.what_comes_later_changes_nothing()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            c.close()
            self.tensors = {}  # what fails keeps this case

    def strike_at_its_point(self):
        early = self.point != "offered"
        if early:
            self.act()
        phase = Phase(self.its_phase())
        assert phase is POINTS[self.role][self.point], phase
        if self.role in ("send", "offer") and self.point in ("moving", "renewing"):
            self.handle.wait_layer(0, 10)
            want = v.cache(v.VICTIM)["layer0"]
            assert torch.equal(self.tensors["layer0"][v.TARGET], want[v.SOURCE])
        if self.point == "renewing":
            assert self.handle.state is TransferState.MOVING
        os.kill(self.pid, signal.SIGKILL if self.how == "kill" else signal.SIGSTOP)
        self.struck = time.monotonic()
        if not early:
            self.act()

    def its_phase(self):
        """Where the victim is once it has got there; an offer's lease is renewed meanwhile."""
        for last in [False] * 40 + [True]:
            try:
                return self.nursery.hear(self.pid, "reached", 0.5)
            except queue.Empty:
                if last:
                    raise
            finally:
                if self.role == "fetch" and self.point != "offered":
                    self.handle.renew(DEADLINE_S)
                    self.began = time.monotonic()

    def act(self):
        """Do the other half of what the victim does."""
        c, self.began = self.channel, time.monotonic()
        wait_s = DEADLINE_S if self.how == "stop" or self.point == "offered" else 20
        if self.role == "send":
            self.handle = c.receive(v.TRANSFER, v.TARGET, source_node=v.VICTIM, deadline_s=wait_s)
        elif self.role == "offer":
            self.handle = c.fetch(v.TRANSFER, v.VICTIM, v.TARGET, deadline_s=wait_s)
        elif self.role == "fetch":
            passes = {"accepted": 0, "landed": 99, "told": 99}.get(self.point, 1)
            self.handle = c.offer(
                v.TRANSFER, v.SOURCE, num_tokens=1, ttl_s=DEADLINE_S / 2, after=v.Gate(passes)
            )
            assert self.handle.renew(DEADLINE_S)
        else:
            stream = c.begin(v.TRANSFER, v.VICTIM, v.SOURCE, deadline_s=wait_s)
            self.handle = stream.transfer
            if self.point not in ("offered", "accepted", "accepting"):
                stream.send_layer(0)
            if self.point in ("landed", "told"):
                for i in range(1, v.LAYERS):
                    stream.send_layer(i)
                stream.seal(1)

    def ends_in_time(self):
        at_once = self.how == "kill" and self.role != "fetch"
        limit = SLACK_S if at_once else DEADLINE_S + SLACK_S
        since = max(self.struck, self.began) if at_once else self.began
        try:
            self.handle.wait(DEADLINE_S + 10)
            ended = "landed"
        except KVTransferError as e:
            ended = e.cause
        assert ended in self.expected
        assert time.monotonic() - since < limit + (DEADLINE_S if self.point == "offered" else 0)
        self.eventually(lambda: self.channel._engine.pool.leases == 0)
        if ended == "landed" and self.role in ("send", "offer"):
            want = v.cache(v.VICTIM)
            for name, tensor in self.tensors.items():
                assert torch.equal(tensor[v.TARGET], want[name][v.SOURCE]), name
            # it knows by its deadline at the latest that nobody will say more
            self.eventually(
                lambda: self.handle.state is TransferState.RELEASED, DEADLINE_S + SLACK_S
            )
        (done,) = self.channel.poll()
        assert done.blocks_safe
        assert done.status == (ended if ended in ("landed", "cancelled") else "failed")
        if ended != "landed" and self.role in ("send", "offer"):
            assert sorted(done.invalid_blocks) == sorted(v.TARGET)

    def what_comes_later_changes_nothing(self):
        """The blocks are the engine's again: it puts something else in, and the victim goes on."""
        for tensor in self.tensors.values():
            tensor.fill_(7)
        if self.how == "stop":
            os.kill(self.pid, signal.SIGCONT)
            os.kill(self.pid, signal.SIGUSR1)
            self.nursery.hear(self.pid, "awake")
            os.kill(self.pid, signal.SIGKILL)
        self.eventually(lambda: not self.channel.get_stats().peers, 20)  # all it said was taken
        assert all(bool((t == 7).all()) for t in self.tensors.values())
        assert RULES[self.handle.phase].safe
        assert not self.channel.poll()
        assert not self.channel._engine.in_flight()


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("role", POINTS)
def test_a_survivor_ends_in_time_and_holds_nothing(
    nursery, leakless, eventually, at_once, role, transport, how
):
    points = POINTS[role]

    at_once(
        lambda point: Case(nursery, eventually, role, point, how, transport).run(),
        points,
        threads=len(points),
    )


def test_victims_are_struck_in_every_phase_of_the_table():
    for role, points in POINTS.items():
        table = TABLE[Role.RECEIVE if role == "fetch" else Role(role)]
        missing = set(table) - set(points.values())
        # a fetch is accepted as soon as it is asked for: until then it waits for the peer to come
        assert missing == ({Phase.OFFERED} if role == "fetch" else set()), (role, missing)
