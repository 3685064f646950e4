"""Hundreds of transfers at once: bounded, fair, and safe whatever happens to some of them."""

import random
import threading

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings
from sagellm.core.protocols import KVTransferError, PeerLostError, ResourceError, TransferKey


def writers(channel, link):
    """Names of the threads that send frames from now on."""
    names, send = [], link.writer._send

    def note(*args, **kwargs):
        names.append(threading.current_thread().name)
        return send(*args, **kwargs)

    link.writer._send = note
    return names


def test_what_is_small_and_invited_is_written_by_its_caller(pair, eventually):
    out, a, into, b = pair(layers=1)
    out.connect(1, timeout_s=5)
    (link,) = out._engine.links
    names = writers(out, link)
    for i in range(3):
        r = into.receive(TransferKey("k", i), [i], source_node=0)
        eventually(lambda: len(link.invitations) == 1)
        eventually(lambda: link.writer._lanes and link.writer._lanes[0].asleep)
        out.transfer([5 + i], 1, key=TransferKey("k", i)).wait(10)
        r.wait(10)

    assert names == [threading.current_thread().name] * 3
    assert torch.equal(a["layer0"][[5, 6, 7]], b["layer0"][[0, 1, 2]])


def test_a_caller_does_not_write_behind_what_may_not_have_come(pair, eventually):
    out, _, into, _ = pair(layers=1)
    out.connect(1, timeout_s=5)
    (link,) = out._engine.links
    names = writers(out, link)
    keys = [TransferKey("first"), TransferKey("second")]
    for i, key in enumerate(keys):
        into.receive(key, [i], source_node=0)
    eventually(lambda: len(link.invitations) == 2)
    stream = out.begin(keys[0], 1, [1])

    out.transfer([2], 1, key=keys[1]).wait(10)

    assert threading.current_thread().name not in names
    stream.send_layer(0)
    stream.seal(1).wait(10)


def test_hundreds_of_transfers_run_at_once_and_leave_nothing(pair, eventually):
    out, a, into, b = pair(blocks=400)
    before = threading.active_count()
    order = torch.randperm(400).tolist()
    received = [into.receive(TransferKey(f"k{i}"), [i]) for i in range(400)]
    sent = [out.transfer([order[i]], 1, key=TransferKey(f"k{i}")) for i in range(400)]
    for handle in (*received, *sent):
        handle.wait(30)

    assert all(torch.equal(a[n][order], b[n]) for n in a)
    assert threading.active_count() <= before + 12  # those of one link, none per transfer
    eventually(lambda: not (into.snapshot()["transfers"] or out.snapshot()["transfers"]))
    assert out._engine.pool.leases == into._engine.pool.leases == 0
    assert len(out.poll()) == len(into.poll()) == 400
    assert out.poll() == []


def test_more_than_are_allowed_are_refused_and_those_before_go_on(pair):
    out, _, into, _ = pair(sender={"settings": KVTransferSettings(max_in_flight=3)})
    sent = [out.transfer([i], 1, key=TransferKey(f"k{i}")) for i in range(3)]

    with pytest.raises(ResourceError, match="max_in_flight is 3"):
        out.transfer([3], 1, key=TransferKey("k3"))
    for i, t in enumerate(sent):
        into.receive(TransferKey(f"k{i}"), [i]).wait(10)
        t.wait(10)

    out.transfer([3], 1, key=TransferKey("k3"))
    into.receive(TransferKey("k3"), [3]).wait(10)


def test_no_completion_is_lost_when_nobody_polls(pair, eventually):
    """Nothing more begins until some are taken; then it goes on."""
    settings = {"settings": KVTransferSettings(max_remembered=8)}
    out, _, into, _ = pair(sender=settings, receiver=settings)
    peer, ended = into.node_id, []

    def go(attempt):
        r = into.receive(TransferKey("k", attempt), [1], source_node=out.node_id)
        t = out.transfer([2], peer, key=TransferKey("k", attempt))
        eventually(lambda: r.done() and t.done())

    for attempt in range(10):
        go(attempt)
    for begin in (
        lambda: into.receive(TransferKey("k", 99), [1]),
        lambda: into.receive(TransferKey("k", 1), [1]),  # which has landed
        lambda: into.fetch(TransferKey("k", 99), out.node_id, [1]),
        lambda: out.transfer([2], peer),
        lambda: out.transfer([2], peer, key=TransferKey("k", 1)),
        lambda: out.offer(TransferKey("o"), [2], num_tokens=1, ttl_s=1),
    ):
        with pytest.raises(ResourceError, match="10 completions wait for `poll`"):
            begin()
    for c in (out, into):
        ended += c.poll(7)
        assert not c.snapshot()["transfers"]
    go(10)

    ended += [*out.poll(), *into.poll()]
    assert sorted(c.key.attempt for c in ended) == sorted([*range(11)] * 2)


def test_whoever_waits_for_handles_need_not_poll(pair):
    settings = {"settings": KVTransferSettings(max_remembered=8)}
    out, _, into, _ = pair(sender=settings, receiver=settings)
    for attempt in range(60):
        key = TransferKey("k", attempt)
        r = into.receive(key, [1], source_node=out.node_id)
        t = out.transfer([2], into.node_id, key=key)
        t.wait(10)
        r.wait(10)

    assert 0 < len(into.poll()) < 12
    assert 0 < len(out.poll()) < 12


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_large_transfer_does_not_starve_a_small_one(channel, layout, tensors, transport):
    settings = {"settings": KVTransferSettings(transport=transport)}
    out, into = channel(**settings), channel(**settings)
    wide = layout(layers=2, page=64, dim=128)  # 256 KiB a block
    out.register(wide, tensors(wide, 260))
    into.register(wide, tensors(wide, 260))
    large_in = into.receive(TransferKey("large"), range(256))
    small_in = [into.receive(TransferKey("small", i), [256 + i]) for i in range(4)]
    large = out.transfer(range(256), 1, key=TransferKey("large"))

    small = [out.transfer([256 + i], 1, key=TransferKey("small", i)) for i in range(4)]
    for handle in (*small_in, *small):
        handle.wait(30)
    done_when_small_was = large_in.progress.bytes_done
    large.wait(30)
    large_in.wait(30)

    assert done_when_small_was < large_in.progress.bytes_total


class Given:
    """A block given back: nothing may write it any more."""

    def __init__(self, pool, ids):
        self.pool, self.ids = pool, ids
        self.canary = torch.randn(())
        for tensor in pool.values():
            tensor[ids] = self.canary

    def untouched(self):
        return all(bool((t[self.ids] == self.canary).all()) for t in self.pool.values())


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("seed", range(3))
def test_no_late_byte_reaches_a_block_that_was_given_back(
    channel, layout, tensors, eventually, transport, seed
):
    """Cancels, deadlines, aborts and cut links at any moment, attempt after attempt."""
    dice = random.Random(seed)
    settings = KVTransferSettings(transport=transport, quiesce_s=0.05, chunk_bytes=4096)
    out, into = channel(settings=settings), channel(settings=settings)
    wide = layout(layers=3, page=8, dim=32)  # 8 KiB a block and layer
    out.register(wide, tensors(wide, 64))
    into.register(wide, got := tensors(wide, 64))
    given, ends = [], {"landed": 0, "failed": 0}

    for attempt in range(40):
        key = TransferKey("k", attempt)
        ids = list(range(8 * (attempt % 8), 8 * (attempt % 8) + 8))
        given = [g for g in given if g.ids != ids]
        named = {"source_node": 0} if dice.random() < 0.6 else {}
        r = into.receive(key, ids, deadline_s=dice.choice([0.002, 2.0, 2.0]), **named)
        if dice.random() < 0.5:
            t = out.transfer(ids, 1, key=key, deadline_s=2.0)
        else:
            stream = out.begin(key, 1, ids, deadline_s=2.0)
            t = stream.transfer
            for layer in range(3):
                if not t.done():
                    try:
                        stream.send_layer(layer)
                    except KVTransferError:
                        break
            else:
                if dice.random() < 0.3:
                    stream.abort("for the test")
                elif not t.done():
                    try:
                        stream.seal(1)
                    except KVTransferError:
                        pass
        action = dice.random()
        if action < 0.2:
            r.cancel()
        elif action < 0.4:
            t.cancel()
        elif action < 0.5:
            for link in list(out._engine.links):
                out._engine.loop.call(lambda k=link: k.lose(PeerLostError("cut", rank=1)))
        elif action < 0.6:
            r.cancel()
            t.cancel()
        try:
            r.wait(10)
            ends["landed"] += 1
            assert all(torch.equal(got[n][ids], out._engine.pool.tensors[n][ids]) for n in got)
        except KVTransferError:
            ends["failed"] += 1
        given.append(Given(got, ids))
        try:
            t.wait(10)
        except KVTransferError:
            pass
        else:
            assert r.exception() is None, "the sender believes in a landing that was none"
        assert all(g.untouched() for g in given)

    assert min(ends.values()) > 0, ends
    eventually(lambda: out._engine.pool.leases == into._engine.pool.leases == 0)
    assert all(g.untouched() for g in given)
    completions = into.poll()
    assert len(completions) == 40
    assert all(c.blocks_safe for c in completions)
    eventually(lambda: not (into.snapshot()["transfers"] or out.snapshot()["transfers"]))
