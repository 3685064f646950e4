"""A process that a test kills or stops: it brings a transfer into a state and waits there.

Run as a program it forks one victim for each line of its standard input, a job in JSON, because
importing torch takes seconds. What victims say comes out as lines in JSON, with their pid.
"""

import json
import os
import signal
import sys
import time

import torch

from sagellm.comm.kv_transfer import KVTransferChannel, KVTransferSettings, wire
from sagellm.comm.kv_transfer._link import Link
from sagellm.core.protocols import CacheGroup, KVLayout, KVTransferError, TransferKey

KEY = b"a key of this test, long enough"
BLOCKS, LAYERS = 64, 4
TRANSFER = TransferKey("request")
LAYOUT = KVLayout(
    (
        CacheGroup(
            "kv",
            "kv",
            tuple(f"layer{i}" for i in range(LAYERS)),
            ("block", "token", "dim"),
            (16, 1024),
            "float32",
        ),
    )
)


def cache(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(BLOCKS, 16, 1024, generator=generator) for n in LAYOUT.layers}


def make_channel(node_id, transport, peers):
    settings = KVTransferSettings(transport=transport, quiesce_s=0.1, handshake_timeout_s=2)
    channel = KVTransferChannel(node_id=node_id, peers=peers, key=KEY, settings=settings)
    channel.register(LAYOUT, cache(node_id))
    return channel


def say(**what):
    os.write(1, (json.dumps({"pid": os.getpid(), **what}) + "\n").encode())


def hang_at(kind, *, before):
    """Stop the channel's thread for good at the first message of that kind that it sends."""
    send = Link.send

    def hanging(link, message):
        if not isinstance(message, kind):
            send(link, message)
            return
        if not before:
            send(link, message)
            link._flush()  # it would go at the end of this turn, which never comes
        say(reached="landed")
        time.sleep(600)

    Link.send = hanging


def sender(job):
    """Node 0: has made its offer; has been granted; has sent a layer; has sent everything."""
    state = job["state"]
    if state == "landed":
        hang_at(wire.Sealed, before=False)
    channel = make_channel(0, job["transport"], {1: job["address"]})
    stream = channel.begin(TRANSFER, 1, range(BLOCKS), deadline_s=30)
    channel.connect(1, timeout_s=10)
    if state != "offered":
        while stream.transfer.state.value == "offered":
            time.sleep(0.001)
    if state == "moving":
        stream.send_layer(0)
    if state == "landed":
        for i in range(LAYERS):
            stream.send_layer(i)
        stream.seal(1)  # the thread that sends this says so and hangs
    else:
        say(reached=state)
    return stream.transfer


def receiver(job):
    """Node 1: has met its peer; has granted; has a layer; has everything and has not said so."""
    state = job["state"]
    if state == "landed":
        hang_at(wire.Done, before=True)
    channel = make_channel(1, job["transport"], {})
    say(address=channel.address)
    if state == "offered":
        while not channel.get_stats().peers:
            time.sleep(0.001)
        say(reached=state)
        return None
    handle = channel.receive(TRANSFER, range(BLOCKS), deadline_s=30)
    if state == "accepted":
        while handle.state.value == "offered":
            time.sleep(0.001)
        say(reached=state)
    if state == "moving":
        handle.wait_layer(0, 20)
        say(reached=state)
    return handle


def main():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    torch.set_num_threads(1)
    say(ready=True)
    children = []
    for line in sys.stdin:
        job = json.loads(line)
        if pid := os.fork():
            children.append(pid)
            say(born=pid)
            continue
        try:
            handle = {"sender": sender, "receiver": receiver}[job["role"]](job)
            if handle is not None:
                handle.wait(60)
                say(ended="landed")
        except KVTransferError as e:
            say(ended=e.cause)
        except BaseException as e:
            say(failed=f"{type(e).__name__}: {e}")
        finally:
            time.sleep(60)
            os._exit(0)
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


if __name__ == "__main__":
    main()
