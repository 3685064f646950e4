"""A process that a test kills or stops: it brings a transfer into a phase and stays there.

Run as a program it forks one victim for each line of its standard input, a job in JSON, because
importing torch takes seconds. What victims say comes out as lines in JSON, with their pid.
"""

import json
import os
import signal
import sys
import threading
import time

import torch

from sagellm.comm.kv_transfer import KVTransferChannel, KVTransferSettings, wire
from sagellm.comm.kv_transfer._link import Link
from sagellm.comm.kv_transfer._offering import Offering
from sagellm.core.protocols import (
    CacheGroup,
    CommTimeoutError,
    KVLayout,
    KVTransferError,
    TransferKey,
)

KEY = b"a key of this test, long enough"
VICTIM, SURVIVOR = 5, 6
BLOCKS, LAYERS = 8, 3
SOURCE, TARGET = list(range(BLOCKS)), list(range(BLOCKS - 1, -1, -1))
TRANSFER = TransferKey("request")
LONG_S = 60
NAMES = tuple(f"layer{i}" for i in range(LAYERS))
GROUP = CacheGroup("kv", "kv", NAMES, ("block", "token", "dim"), (8, 1024), "float32")
LAYOUT = KVLayout((GROUP,))
FAILS = (wire.Fail, wire.KeyFail)
MOVING = ("moving", "failing", "expired", "cancelling", "cancelled")
"""Where some of it has moved, and no more does."""

HANGS = {
    ("send", "sent"): (wire.Sealed, "after"),
    ("send", "settling"): (wire.Release, "before"),
    ("receive", "accepting"): (wire.Grant, "before"),
    ("receive", "landed"): (wire.Done, "before"),
    ("receive", "told"): (wire.Done, "after"),
    ("offer", "serving"): (wire.Release, "before"),
    ("offer", "expired"): (FAILS, "after"),
    ("fetch", "landed"): (wire.Done, "before"),
    ("fetch", "told"): (wire.Done, "after"),
}
"""Where the channel's thread stops for good: at the first message of that kind."""
for _role in ("send", "receive", "offer", "fetch"):
    HANGS[_role, "failing"] = HANGS[_role, "cancelling"] = (FAILS, "before")
    HANGS[_role, "cancelled"] = (FAILS, "after")


class Gate:
    """An event that has happened for the first so many that ask, and for the others never."""

    def __init__(self, passes):
        self.passes = passes
        self._lock = threading.Lock()

    def query(self):
        with self._lock:
            self.passes -= 1
            return self.passes >= 0

    def synchronize(self):
        raise AssertionError("nothing here may block")


def cache(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(BLOCKS, 8, 1024, generator=generator) for n in LAYOUT.layers}


def make_channel(node_id, transport, peers):
    settings = KVTransferSettings(transport=transport, quiesce_s=0.1, handshake_timeout_s=5)
    channel = KVTransferChannel(node_id=node_id, peers=peers, key=KEY, settings=settings)
    pool = channel.allocate(LAYOUT, BLOCKS)  # readable by the other side
    for name, values in cache(node_id).items():
        pool.tensors[name].copy_(values)
    return channel


# -- in the victim --------------------------------------------------------------------------

HANDLES = []


def say(**what):
    os.write(1, (json.dumps({"pid": os.getpid(), **what}) + "\n").encode())


def reached():
    """Say in which phase of the table it is now."""
    say(reached=HANDLES[0].phase.value)


def hang():
    reached()
    time.sleep(600)


def hang_at(kind, when):
    send = Link.send

    def hanging(link, message):
        if not isinstance(message, kind):
            send(link, message)
            return
        if when == "after":
            send(link, message)
            link._flush()  # it would go at the end of this turn, which never comes
        hang()

    Link.send = hanging


def until(condition):
    while not condition():
        time.sleep(0.001)


def act_send(channel, point):
    """Push to the survivor, layer by layer."""
    stream = channel.begin(TRANSFER, SURVIVOR, SOURCE, deadline_s=LONG_S)
    HANDLES.append(stream.transfer)
    channel.connect(SURVIVOR, timeout_s=20)
    if point != "offered":
        until(lambda: stream.transfer.state.value != "offered")
    if point in ("offered", "accepted"):
        reached()
        return
    stream.send_layer(0)
    until(lambda: stream.transfer.phase.value != "accepted")
    if point in ("sent", "settling"):
        for i in range(1, LAYERS):
            stream.send_layer(i)
        stream.seal(1)
    move_on(channel, stream.transfer, point)


def act_receive(channel, point):
    """Take what the survivor pushes."""
    handle = channel.receive(TRANSFER, TARGET, deadline_s=LONG_S)
    HANDLES.append(handle)
    say(address=channel.address)
    if point == "offered":
        until(lambda: channel.get_stats().peers)
        reached()
        return
    if point == "accepted":
        until(lambda: handle.phase.value != "offered")
        reached()
        return
    if point in MOVING:
        handle.wait_layer(0, 20)
    move_on(channel, handle, point)


def act_offer(channel, point):
    """Let the survivor fetch."""
    passes = {"offered": 99, "accepted": 0, "serving": 99, "settling": 99}.get(point, 1)
    ttl_s = 1.0 if point == "renewing" else LONG_S
    gate = Gate(passes)
    handle = channel.offer(TRANSFER, SOURCE, num_tokens=1, ttl_s=ttl_s, after=gate)
    HANDLES.append(handle)
    say(address=channel.address)
    if point == "offered":
        until(lambda: channel.get_stats().peers)
        reached()
        return
    if point == "renewing":
        until(lambda: channel.get_stats().bytes_sent and handle.renew(1.0))
        reached()
        until(lambda: not handle.renew(1.0))
        return
    until(lambda: handle.phase.value != "offered")
    if point in MOVING:
        until(lambda: channel.get_stats().bytes_sent)
    move_on(channel, handle, "moving" if point == "accepted" else point)


def act_fetch(channel, point):
    """Fetch what the survivor offers."""
    channel.connect(SURVIVOR, timeout_s=20)
    handle = channel.fetch(TRANSFER, SURVIVOR, TARGET, deadline_s=LONG_S)
    HANDLES.append(handle)
    if point in ("offered", "accepted"):
        until(lambda: handle.phase.value != "offered")
        reached()
        return
    if point in MOVING:
        handle.wait_layer(0, 20)
    move_on(channel, handle, point)


def move_on(channel, handle, point):
    """From where it moves to the point."""
    if point == "moving":
        reached()
    if point in ("cancelling", "cancelled"):
        handle.cancel()
    if point in ("failing", "expired"):  # as its deadline, or its lease, would have it
        late = CommTimeoutError("late")
        error = KVTransferError("late", cause="lease_expired") if point == "expired" else late
        channel._engine.loop.call(lambda: channel._engine.end(handle.owner, error))


def watch():
    """Say when it goes on: a handler would need the main thread, which may wait for a lock."""
    signal.sigwait([signal.SIGUSR1])
    say(awake=True)


def live(job):
    role, point = job["role"], job["point"]
    if (role, point) in HANGS:
        hang_at(*HANGS[role, point])
    if (role, point) == ("offer", "settling"):
        Offering._close = lambda self, offered: hang()
    peers = {SURVIVOR: job["address"]} if job["address"] else {}
    channel = make_channel(VICTIM, job["transport"], peers)
    try:
        {"send": act_send, "receive": act_receive, "offer": act_offer, "fetch": act_fetch}[role](
            channel, point
        )
        HANDLES[0].wait(LONG_S)
        say(ended="landed")
    except KVTransferError as e:
        say(ended=e.cause)


def main():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    torch.set_num_threads(1)
    say(ready=True)
    children = []
    for line in sys.stdin:
        job = json.loads(line)
        if pid := os.fork():
            children.append(pid)
            say(born=pid, of=job["number"])
            continue
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        threading.Thread(target=watch, daemon=True).start()
        try:
            live(job)
        except BaseException as e:
            say(failed=f"{type(e).__name__}: {e}")
        finally:
            time.sleep(LONG_S)
            os._exit(0)
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


if __name__ == "__main__":
    main()
