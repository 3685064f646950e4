"""What a channel tells of itself: who holds which blocks and waits for whom."""

import json

from sagellm.core.protocols import TransferKey


def only(snapshot, kind):
    (found,) = [t for t in snapshot["transfers"] if t["kind"] == kind]
    return found


def test_a_push_that_nobody_receives_names_whom_it_waits_for(pair, eventually):
    out, _, into, _ = pair()
    out.transfer([3, 1], 1, key=TransferKey("k"))
    eventually(lambda: into.snapshot()["waiting"])

    push = only(out.snapshot(), "push")

    assert (push["id"], push["peers"], push["waits_for"]) == ("k", [1], [1])
    assert push["why"] == "node 1 to say `receive`"
    assert (push["blocks"], push["block_ids"]) == ("in use", {"kv": [3, 1]})
    assert into.snapshot()["waiting"] == [{"what": "offer", "id": "k", "attempt": 0, "peer": 0}]
    assert out.snapshot()["pool_leases"] == ["k/0"]
    json.dumps([out.snapshot(), into.snapshot()])


def test_a_receive_names_the_senders_that_have_not_come_or_not_sealed(pair, eventually):
    out, _, into, _ = pair()
    r = into.receive(TransferKey("k"), [5], source_node=0)
    assert only(into.snapshot(), "receive")["waits_for"] == [0]
    assert "never came" in only(into.snapshot(), "receive")["why"]

    stream = out.begin(TransferKey("k"), 1, [1])
    stream.send_layer(0)
    r.wait_layer(0, 10)

    view = only(into.snapshot(), "receive")
    assert (view["state"], view["waits_for"]) == ("moving", [0])
    assert 0 < view["bytes_done"] < view["bytes_total"]
    assert "seal" in view["why"]
    assert only(out.snapshot(), "push")["why"] == "the stream to be sealed"


def test_offers_links_and_invitations_are_shown_and_go(pair, eventually):
    out, _, into, _ = pair()
    out.connect(1, timeout_s=5)
    o = out.offer(TransferKey("o"), [1], num_tokens=1, ttl_s=30)
    r = into.receive(TransferKey("k"), [5], source_node=0)
    eventually(lambda: out.snapshot()["links"][0]["invitations"] == 1)

    (link,) = out.snapshot()["links"]
    assert (link["peer"], link["direction"], link["up"]) == (1, "out", True)
    assert only(out.snapshot(), "offer")["why"] == "somebody to fetch it"

    o.cancel()
    r.cancel()
    eventually(lambda: not (out.snapshot()["transfers"] or into.snapshot()["transfers"]))
    eventually(lambda: out.snapshot()["links"][0]["invitations"] == 0)
    assert out.snapshot()["pool_leases"] == into.snapshot()["pool_leases"] == []


def test_buffers_without_destination_are_counted(channel):
    import torch

    into, out = channel(node_id=1), channel()
    held = into.receive(None)
    t = out.transfer([torch.zeros(100_000)], 1)
    held.wait(10)
    t.wait(10)

    assert into.snapshot()["bounce_bytes"] == 0
    assert into.snapshot()["bounce_limit_bytes"] > 0
