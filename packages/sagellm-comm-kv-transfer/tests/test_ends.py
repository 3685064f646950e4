"""What a transfer leaves when it is over, and what its key stands for then."""

import asyncio
import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings, transfer, wire
from sagellm.comm.kv_transfer._granting import Granter
from sagellm.comm.kv_transfer.state import Role
from sagellm.comm.kv_transfer.transfer import TransferHandle
from sagellm.core.protocols import (
    CacheGroup,
    CommTimeoutError,
    ConfigError,
    KVLayout,
    KVTransferError,
    PeerLostError,
    TransferKey,
)


async def _coroutine(handle):
    return await handle


def test_a_waiter_whose_event_loop_is_closed_hinders_nobody(pair):
    out, a, into, b = pair()
    key = TransferKey("given-up")
    r = into.receive(key, [1, 2])
    loop = asyncio.new_event_loop()
    task = loop.create_task(_coroutine(r))
    loop.run_until_complete(asyncio.sleep(0))  # it waits now
    task._log_destroy_pending = False
    loop.close()

    out.transfer([3, 4], into.node_id, key=key, deadline_s=5).wait(10)

    r.wait(10)
    assert [c.status for c in into.poll()] == ["landed"]
    assert all(torch.equal(a[n][[3, 4]], b[n][[1, 2]]) for n in a)


def test_a_waiter_that_gives_up_is_forgotten(channel):
    c = channel()
    r = c.receive(TransferKey("never"), deadline_s=60)

    async def give_up():
        for _ in range(5):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(_coroutine(r), 0.01)

    asyncio.run(give_up())

    assert r._callbacks == []


def test_what_is_over_holds_no_memory(pair, eventually):
    out, _, into, _ = pair()
    gc.collect()
    gc.disable()  # a cycle would live on
    try:
        held = []
        for i in range(4):
            t = out.transfer([torch.ones(8)], into.node_id, key=TransferKey("t", i))
            r = into.receive(TransferKey("t", i))
            r.wait(10)
            t.wait(10)
            held += [weakref.ref(x) for x in (r, t, r.blocks[0].tensor)]
            del r, t
        stuck = into.receive(TransferKey("stuck"))
        offer = into.offer(TransferKey("offer"), [1], num_tokens=4, ttl_s=60)
        for handle in (stuck, offer):
            handle.cancel()
            with pytest.raises(KVTransferError):
                handle.wait(10)
        held += [weakref.ref(stuck), weakref.ref(offer)]
        del stuck, offer, handle

        # a data thread may still name the last one that it has served
        eventually(lambda: all(ref() is None for ref in (*held[:9], *held[-2:])))
    finally:
        gc.enable()


def test_a_failure_that_is_remembered_holds_no_offer(pair, attacker, eventually):
    _, _, into, _ = pair()
    gc.collect()
    before = {id(o) for o in gc.get_objects() if type(o) is wire.Offer}
    enemy = attacker(into)
    ids = np.full(1 << 10, 99, dtype=np.int64).tobytes()
    r = into.receive(TransferKey("t"))
    enemy.say(wire.Offer(1, "t", 0, {"kv": 1 << 10}, None, 4096, {"kv": ids}, True, 0))
    with pytest.raises(KVTransferError):
        r.wait(10)

    error = into._engine.receiving.arrivals.ended.get(TransferKey("t")).error

    def offers():
        gc.collect()
        return [o for o in gc.get_objects() if type(o) is wire.Offer and id(o) not in before]

    eventually(lambda: not offers())
    assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)


def test_those_that_wait_for_memory_are_not_all_tried_at_every_end(channel, monkeypatch):
    into = channel(settings=KVTransferSettings(max_bounce_bytes=1 << 14))
    out, many = channel(), 60
    tried, plan = [], Granter.plan
    monkeypatch.setattr(Granter, "plan", lambda *args: tried.append(args) or plan(*args))
    received = [into.receive(TransferKey("k", i)) for i in range(many)]

    sent = [
        out.transfer([torch.ones(1 << 13, dtype=torch.uint8)], into.node_id, key=r.key)
        for r in received
    ]
    for handle in (*received, *sent):
        handle.wait(20)

    assert len(tried) <= 4 * many


def test_a_landed_key_that_is_repeated_is_reported_again(pair):
    out, _, into, b = pair()
    key = TransferKey("k")
    r = into.receive(key, [4])
    out.transfer([1], into.node_id, key=key).wait(10)
    r.wait(10)
    assert [c.status for c in (*out.poll(), *into.poll())] == ["landed", "landed"]
    b["layer0"][4] = 7

    t = out.transfer([1], into.node_id, key=key)
    r = into.receive(key, [4])

    assert t.done()
    assert r.done()
    assert [(c.key, c.status, c.direction) for c in out.poll()] == [(key, "landed", "send")]
    assert [(c.key, c.status, c.direction) for c in into.poll()] == [(key, "landed", "receive")]
    assert (b["layer0"][4] == 7).all(), "it was done once more"
    with pytest.raises(ConfigError, match="in other blocks"):
        into.receive(key, [5])


def test_a_receive_that_landed_in_buffers_gives_them_again_while_they_live(channel):
    out, into = channel(), channel()
    key = TransferKey("k")
    t = out.transfer([torch.arange(5)], into.node_id, key=key)
    r = into.receive(key).wait(10)
    t.wait(10)

    again = into.receive(key)

    assert again is r
    assert torch.equal(again.wait(0).blocks[0].tensor, torch.arange(5))
    ends = into._engine.receiving.arrivals.ended
    ends[key] = ends.get(key)._replace(handle=lambda: None)  # a reference that is dead
    with pytest.raises(ConfigError, match="dropped with its handle"):
        into.receive(key)


def test_one_key_under_way_stands_for_one_thing(pair):
    out, _, into, _ = pair()
    ones, key = torch.ones(4), TransferKey("tensors")
    t = out.transfer([ones], into.node_id, key=key)
    strided = torch.arange(12).reshape(3, 4).T
    s = out.transfer([strided], into.node_id, key=TransferKey("strided"))
    d = out.transfer([1], into.node_id, key=TransferKey("blocks"), dst_blocks=[2])

    assert out.transfer([ones], into.node_id, key=key) is t
    assert out.transfer([strided], into.node_id, key=TransferKey("strided")) is s
    assert out.transfer([1], into.node_id, key=TransferKey("blocks"), dst_blocks=[2]) is d
    for blocks, name, named in (
        ([torch.zeros(4)], "tensors", None),
        ([torch.ones(5)], "tensors", None),
        ([ones, ones], "tensors", None),
        ([strided.T], "strided", None),
        ([1], "blocks", [3]),
        ([1], "blocks", None),
        ([2], "blocks", [2]),
    ):
        with pytest.raises(ConfigError, match="other blocks or destinations"):
            out.transfer(blocks, into.node_id, key=TransferKey(name), dst_blocks=named)


def test_blocks_that_must_not_be_read_are_told_by_group(channel):
    groups = [
        CacheGroup(n, "kv", (f"{n}0",), ("block", "dim"), (8,), "float32") for n in ("kv", "state")
    ]
    into = channel()
    tensors = {"kv0": torch.zeros(4, 8), "state0": torch.zeros(4, 8)}
    into.register(KVLayout(tuple(groups)), tensors)

    r = into.receive(TransferKey("k"), {"kv": [2, 1], "state": [3, 2]}, deadline_s=0.1)
    with pytest.raises(KVTransferError) as caught:
        r.wait(10)

    for told in (caught.value, into.poll()[0]):
        assert told.invalid_blocks == (1, 2, 3)
        assert told.invalid_by_group == {"kv": (1, 2), "state": (2, 3)}


def test_a_layer_that_is_not_there_is_refused_before_anybody_has_come(pair):
    out, _, into, _ = pair()
    handles = [
        into.receive(TransferKey("r"), [1]),
        into.fetch(TransferKey("f"), 0, [2]),
        out.transfer([1], 1, key=TransferKey("t")),
    ]

    for handle in handles:
        with pytest.raises(ConfigError, match=r"layer 3 is not in 0\.\.2"):
            handle.wait_layer(3, 5)


def test_nobody_waits_long_for_a_transfer_that_does_not_end(monkeypatch):
    monkeypatch.setattr(transfer, "_GRACE_S", 0.05)

    def stuck(deadline_s=0.05):
        return TransferHandle(TransferKey("k"), "send", deadline_s, lambda _: False, Role.OFFER)

    with pytest.raises(CommTimeoutError, match="has not landed"):
        asyncio.run(asyncio.wait_for(_coroutine(stuck()), 5))
    for wait in (lambda h: h.wait(), lambda h: asyncio.run(_coroutine(h))):
        renewed = stuck()
        threading.Timer(0.02, renewed.renew, (0.4,)).start()
        began = time.monotonic()
        with pytest.raises(CommTimeoutError, match="has not landed"):
            wait(renewed)
        assert 0.4 < time.monotonic() - began < 5


def test_a_closed_channel_has_no_descriptor(channel):
    c = channel()
    assert c.fileno() >= 0
    c.close()

    with pytest.raises(PeerLostError, match="closed"):
        c.fileno()
