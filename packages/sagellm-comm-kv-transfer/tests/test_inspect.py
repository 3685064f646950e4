"""What a node tells a peer of itself, and what happens when it does not."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sagellm.comm.kv_transfer import wire
from sagellm.core.protocols import (
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    PeerLostError,
    TransferKey,
)


def test_a_peer_learns_who_holds_blocks_and_waits_for_whom(pair):
    out, _, into, _ = pair()
    into.receive(TransferKey("r", 2), [7, 3], source_node=out.node_id)

    told = out.inspect(into.node_id)

    (transfer,) = told["transfers"]
    assert (transfer["id"], transfer["attempt"], transfer["kind"]) == ("r", 2, "receive")
    assert transfer["waits_for"] == [out.node_id]
    assert transfer["block_ids"] == {"kv": [7, 3]}
    assert told["pool"] == {"kv": 10}
    assert told["stats"]["in_flight"] == 1
    assert told["left_out"] == {}


def test_a_long_list_is_cut_and_says_so(pair):
    out, _, into, _ = pair()
    for i in range(300):
        into.receive(TransferKey(f"r{i}"), deadline_s=60)

    told = out.inspect(into.node_id)

    assert len(told["transfers"]) == 256
    assert told["left_out"] == {"transfers": 44}


def test_a_silent_or_lost_peer_is_no_answer(pair, monkeypatch):
    out, _, into, _ = pair()
    monkeypatch.setattr(into._engine.inquiries, "on_ask", lambda link, message: None)
    with pytest.raises(CommTimeoutError, match=f"node {into.node_id} has not answered in 0.1 s"):
        out.inspect(into.node_id, 0.1)

    def leave(link, message):
        link.lose(PeerLostError("it left"))

    monkeypatch.setattr(into._engine.inquiries, "on_ask", leave)
    with pytest.raises(PeerLostError):
        out.inspect(into.node_id, 10.0)

    with pytest.raises(ConfigError, match="no node 77"):
        out.inspect(77, 0.1)


def test_an_answer_nobody_asked_for_is_passed_over_and_one_that_is_none_ends_the_link(
    pair, eventually
):
    out, _, into, _ = pair()
    out.connect(into.node_id)
    engine = into._engine
    (link,) = engine.links

    engine.loop.run(lambda: link.send(wire.Answer(99, "rubbish")))
    assert out.inspect(into.node_id)["node_id"] == into.node_id

    engine.inquiries.on_ask = lambda link, message: link.send(wire.Answer(message.number, "[1]"))
    with pytest.raises(DistributedRuntimeError, match="its report is no JSON object"):
        out.inspect(into.node_id)
    eventually(lambda: into.get_stats().peers == 0)


def test_a_flood_of_questions_leaves_the_loop_to_others(pair):
    out, _, into, _ = pair(blocks=1000)
    for i in range(1000):
        into.receive(TransferKey(f"r{i}"), [i], deadline_s=60)
    out.connect(into.node_id)
    link = out._engine.links.ready(into.node_id)
    out._engine.loop.run(lambda: [link.send(wire.Ask(10**6 + i)) for i in range(500)])
    started = time.monotonic()

    while into.get_stats().ignored.get("ask", 0) < 400:
        assert time.monotonic() - started < 5

    assert time.monotonic() - started < 1.0
    assert len(out.inspect(into.node_id)["transfers"]) == 256


def test_questions_of_many_are_all_answered(pair):
    out, _, into, _ = pair()
    out.connect(into.node_id)
    with ThreadPoolExecutor(6) as threads:
        told = list(threads.map(lambda _: out.inspect(into.node_id), range(6)))

    assert {t["node_id"] for t in told} == {into.node_id}
