"""What newer peers may say, what is ignored and counted, and what ends a link."""

import msgspec
import pytest

from sagellm.comm.kv_transfer import wire
from sagellm.core.protocols import DistributedRuntimeError, KVTransferError, TransferKey


def body(**fields):
    return msgspec.msgpack.encode(fields)


def test_fields_of_a_newer_peer_are_ignored():
    assert wire.decode(body(type="done", tid=3, colour="blue")) == wire.Done(3)
    assert wire.decode(body(type="bye")) == wire.Bye()


def test_an_optional_message_of_a_newer_peer_is_ignored():
    assert wire.decode(body(type="hint", optional=True, what=[1, {"a": 2}])) == wire.Unknown()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (body(type="hint"), "'hint', which sagellm-kv 1..1 does not have"),
        (body(type="hint", optional=False), "'hint'"),
        (body(type="done", optional=True), "not a message.*tid"),
        (body(type="done", tid="three"), "not a message"),
        (body(type=7), "not a message"),
        (body(optional=True), "not a message"),
        (body(type="x" * 5000), "'x{64}'"),
        (b"\xc1", "not a message"),
        (b"", "not a message"),
        (b"\x91" * 5000, "not a message"),
    ],
)
def test_any_other_message_is_an_error_that_names_it(data, match):
    with pytest.raises(DistributedRuntimeError, match=match) as caught:
        wire.decode(data)
    assert len(str(caught.value)) < 400


class Hint(msgspec.Struct, tag_field="type", tag="hint"):
    """A message that this version does not have."""

    optional: bool
    text: str = "what will come"


def test_a_link_survives_optional_messages_and_counts_them(pair, eventually):
    out, _, into, _ = pair()
    out.connect(1, timeout_s=5)
    (link,) = out._engine.links

    for _ in range(3):
        out._engine.loop.run(lambda: link.send(Hint(True)))
    eventually(lambda: into.get_stats().ignored.get("unknown") == 3)

    out.transfer([1], 1, key=TransferKey("k"))
    into.receive(TransferKey("k"), [2]).wait(10)
    assert link.error is None


def test_an_unknown_message_ends_the_link_and_the_next_transfer_opens_another(pair, eventually):
    out, _, into, _ = pair()
    out.connect(1, timeout_s=5)
    (link,) = out._engine.links

    out._engine.loop.run(lambda: link.send(Hint(False)))

    eventually(lambda: link.error is not None)
    out.transfer([1], 1, key=TransferKey("k"))
    into.receive(TransferKey("k"), [2]).wait(10)


def test_messages_of_an_earlier_epoch_are_ignored_and_counted(pair, eventually):
    out, _, into, _ = pair()
    t = out.transfer([1], 1, key=TransferKey("k"))
    into.receive(TransferKey("k"), [2]).wait(10)
    t.wait(10)
    (link,) = out._engine.links
    (back,) = into._engine.links

    for message in (wire.Done(1), wire.Grant(1, {}), wire.Nack(1, []), wire.LayerDone(1, 0)):
        into._engine.loop.run(lambda m=message: back.send(m))
    into._engine.loop.run(lambda: back.send(wire.Fail(1, "integrity", "too late")))
    out._engine.loop.run(lambda: link.send(wire.Release(1)))

    late = {"done": 1, "grant": 1, "nack": 1, "layer_done": 1, "fail": 1}
    eventually(lambda: out.get_stats().ignored == late)
    eventually(lambda: into.get_stats().ignored == {"release": 1})
    assert t.exception() is None


def test_ends_are_counted_by_what_they_ask_for(pair):
    out, _, into, _ = pair()
    ends = [
        into.receive(TransferKey("late"), [1], deadline_s=0.01),
        out.offer(TransferKey("lease"), [1], num_tokens=1, ttl_s=0.01),
        (cancelled := into.receive(TransferKey("cancelled"), [2])),
    ]
    cancelled.cancel()
    out.transfer([1, 2], 1, key=TransferKey("refused"))
    ends.append(into.receive(TransferKey("refused"), [3]))
    for handle in ends:
        with pytest.raises(KVTransferError):
            handle.wait(10)

    causes, theirs = into.get_stats().causes, out.get_stats().causes

    assert (causes["deadline"], causes["cancelled"], causes["refused"]) == (1, 1, 1)
    assert theirs["lease_expiry"] == 1
    assert sum(causes.values()) == 3
