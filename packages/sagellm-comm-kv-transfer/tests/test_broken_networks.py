"""A link between two hosts that is cut, restored, slow, or silent; hosts are network namespaces."""

import contextlib
import threading
import time

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferChannel, KVTransferSettings
from sagellm.core.protocols import CommTimeoutError, KVTransferError, TransferKey
from sagellm.core.protocols.netns import ShapedHosts, enter_namespace, why_not

KEY = b"a key of this test, long enough"
SOURCE, TARGET = list(range(0, 40, 2)), list(range(39, 0, -2))
SLACK_S = 1.5


@pytest.fixture(scope="module")
def namespaces():
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def hosts(namespaces, leakless):
    with ShapedHosts("1gbit") as made:
        yield made


@pytest.fixture
def far_apart(hosts, layout, tensors):
    """A channel on each host: (sender, its tensors, receiver, its tensors)."""
    made = []

    def open_at(host, node_id, peers, settings):
        def run():
            enter_namespace(hosts.pids[host])  # this thread, and those that the channel starts
            made.append(
                KVTransferChannel(
                    node_id=node_id,
                    peers=peers,
                    key=KEY,
                    host=hosts.addresses[host],
                    settings=settings,
                )
            )

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(20)
        return made[-1]

    def make(**settings):
        s = KVTransferSettings(quiesce_s=0.1, **settings)
        into = open_at(1, 1, {}, s)
        out = open_at(0, 0, {1: into.address}, s)
        kw = {"page": 16, "dim": 64}  # 32 KiB a block and layer
        out.register(layout(**kw), a := tensors(layout(**kw), 40))
        into.register(layout(**kw), b := tensors(layout(**kw), 40))
        out.connect(1, timeout_s=10)
        return out, a, into, b

    yield make
    for c in made:
        c.close()


def begin(out, into, attempt, deadline_s):
    key = TransferKey("k", attempt)
    r = into.receive(key, TARGET, source_node=0, deadline_s=deadline_s)
    return out.transfer(SOURCE, 1, key=key, deadline_s=deadline_s), r


def right(a, b):
    return all(torch.equal(a[n][SOURCE], b[n][TARGET]) for n in a)


def works_again(out, into):
    """Within a few attempts: a connection that the link has broken may have to go first."""
    for attempt in range(1, 10):
        handles = begin(out, into, attempt, deadline_s=2)
        try:
            for handle in handles:
                handle.wait(10)
            return True
        except KVTransferError:
            for handle in handles:
                with contextlib.suppress(KVTransferError):
                    handle.cancel()
                    handle.wait(10)
    return False


def both_fail_in_time(handles, started, deadline_s):
    for handle in handles:
        with pytest.raises(KVTransferError):
            handle.wait(deadline_s + 10)
        assert time.monotonic() - started < deadline_s + SLACK_S


def test_a_cut_link_fails_both_sides_and_works_once_restored(hosts, far_apart, eventually):
    out, a, into, b = far_apart()
    hosts.shape("20mbit")  # the transfer would take a second
    started = time.monotonic()
    t, r = begin(out, into, 0, deadline_s=0.6)
    eventually(lambda: r.progress.bytes_done > 0)

    hosts.cut()
    both_fail_in_time((t, r), started, 0.6)
    held = {n: x.clone() for n, x in b.items()}
    hosts.restore()
    hosts.shape("1gbit")

    assert all(torch.equal(b[n], held[n]) for n in b)  # nothing came late
    assert works_again(out, into)
    assert right(a, b)
    assert out._engine.pool.leases == into._engine.pool.leases == 0


def test_a_link_that_comes_back_in_time_costs_nothing_but_time(hosts, far_apart, eventually):
    out, a, into, b = far_apart()
    hosts.shape("20mbit")
    t, r = begin(out, into, 0, deadline_s=20)
    eventually(lambda: r.progress.bytes_done > 0)

    hosts.cut()
    with pytest.raises(CommTimeoutError):
        r.wait(0.3)
    hosts.restore()
    hosts.shape("1gbit")

    for handle in (r, t):
        handle.wait(20)
    assert right(a, b)


def test_deadlines_hold_on_a_link_of_one_megabit(hosts, far_apart):
    out, a, into, b = far_apart()
    hosts.shape("1mbit")
    held = {n: x.clone() for n, x in b.items()}
    started = time.monotonic()
    t, r = begin(out, into, 0, deadline_s=1.5)  # two megabytes would take a quarter of a minute
    both_fail_in_time((t, r), started, 1.5)
    others = [i for i in range(40) if i not in TARGET]
    assert all(torch.equal(b[n][others], held[n][others]) for n in b)
    assert out._engine.pool.leases == into._engine.pool.leases == 0

    hosts.shape("1gbit")
    assert works_again(out, into)
    assert right(a, b)


def test_a_peer_that_falls_silent_is_lost_on_an_idle_link(hosts, far_apart):
    """Nothing is sent, and no packet says that the peer is gone: the kernel's probes tell."""
    out, _, into, _ = far_apart(peer_timeout_s=3)
    r = into.receive(TransferKey("k"), TARGET, source_node=0, deadline_s=60)
    started = time.monotonic()

    hosts.cut()
    with pytest.raises(KVTransferError, match="node 0") as caught:
        r.wait(20)
    seconds = time.monotonic() - started
    while out.get_stats().peers:
        assert time.monotonic() - started < 3 + 2 + SLACK_S
        threading.Event().wait(0.05)

    assert caught.value.cause == "peer_lost"
    assert seconds < 3 + 1 + SLACK_S
    assert into.get_stats().peers == 0
    hosts.restore()
