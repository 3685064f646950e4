"""What a channel tells the application's metrics sink, against what it says of itself."""

import pytest

from sagellm.comm.kv_transfer._meters import Meters
from sagellm.comm.kv_transfer.transfer import TransferHandle
from sagellm.core.protocols import CommError, KVTransferError, TransferKey, TransferStats
from sagellm.core.protocols.kv_status import CAUSES
from sagellm.core.protocols.metrics import InMemoryMetrics, get_metrics, set_metrics


@pytest.fixture
def sink():
    before, made = get_metrics(), InMemoryMetrics()
    set_metrics(made)
    yield made
    set_metrics(before)


def test_bytes_ends_and_failures_are_counted(sink, pair):
    out, _, into, _ = pair(sender={"codec": "lz4"})
    t = out.transfer([1, 2], 1, key=TransferKey("k"))
    into.receive(TransferKey("k"), [3, 4]).wait(10)
    t.wait(10)
    late = into.receive(TransferKey("late"), [5], deadline_s=0.01)
    with pytest.raises(KVTransferError):
        late.wait(10)

    stats = {"send": out.get_stats(), "receive": into.get_stats()}

    for direction, payload, wire in (
        ("send", stats["send"].bytes_sent, stats["send"].wire_bytes_sent),
        ("receive", stats["receive"].bytes_received, stats["receive"].wire_bytes_received),
    ):
        labels = {"direction": direction, "transport": out.path(1).partition(":")[0]}
        assert sink.value("sagellm_kv_payload_bytes_total", **labels) == payload > 0
        assert sink.value("sagellm_kv_wire_bytes_total", **labels) == wire > 0
        assert sink.value("sagellm_kv_transfer_seconds", **labels) > 0
        landed = {"direction": direction, "status": "landed", "code": ""}
        assert sink.value("sagellm_kv_transfers_total", **landed) == 1
    failed = {"direction": "receive", "status": "failed", "code": "comm_timeout"}
    assert sink.value("sagellm_kv_transfers_total", **failed) == 1


def test_what_a_transfer_took_is_told_of_it_and_to_the_sink(sink, pair, eventually):
    out, _, into, _ = pair()
    sent = out.transfer([1, 2, 7], 1, key=TransferKey("k"))
    received = into.receive(TransferKey("k"), [3, 4, 9]).wait(10)
    sent.wait(10)

    for handle, direction in ((sent, "send"), (received, "receive")):
        took = handle.metrics
        labels = {"direction": direction, "transport": took.path.partition(":")[0]}
        assert took.bytes == 9216
        assert took.wire_bytes > 0  # references only, where both are of one host
        assert took.runs > 0
        assert took.syscalls > 0
        assert took.retries == 0
        assert min(took.queue_s, took.wire_s, took.verify_s) >= 0
        landed = {"direction": direction, "status": "landed", "code": ""}
        eventually(lambda landed=landed: sink.value("sagellm_kv_transfers_total", **landed) == 1)
        assert sink.value("sagellm_kv_runs_total", **labels) == took.runs
        assert sink.value("sagellm_kv_syscalls_total", **labels) == took.syscalls
        for name in ("queue", "wire", "verify"):
            (row,) = [
                r
                for r in sink.snapshot()
                if r["name"] == f"sagellm_kv_{name}_seconds" and r["labels"] == labels
            ]
            assert row["count"] == 1, "one observation per transfer"
    assert received.metrics.verify_s > 0


def test_failures_are_counted_by_what_went_wrong(sink, pair, eventually):
    out, _, into, _ = pair()
    out.connect(into.node_id)
    given_up = into.receive(TransferKey("given up"), [1])
    given_up.cancel()
    late = into.receive(TransferKey("late"), [2], deadline_s=0.01)
    leased = out.offer(TransferKey("leased"), [1], num_tokens=4, ttl_s=0.01)
    refused = out.transfer([1, 2], into.node_id, key=TransferKey("refused"))
    into.receive(TransferKey("refused"), [5])
    lost = into.receive(TransferKey("lost"), [6], source_node=out.node_id)
    for handle in (given_up, late, leased, refused):
        with pytest.raises(KVTransferError):
            handle.wait(10)
    out.close()
    with pytest.raises(KVTransferError):
        lost.wait(10)

    def count(direction, cause):
        return sink.value("sagellm_kv_failures_total", direction=direction, cause=cause)

    for direction, cause in (
        ("receive", "cancelled"),
        ("receive", "deadline"),
        ("send", "lease_expiry"),
        ("send", "refused"),
        ("receive", "transport"),
    ):
        eventually(lambda d=direction, c=cause: count(d, c) == 1)


def test_blocks_asked_for_again_are_counted(sink):
    handle = TransferHandle(TransferKey("k"), "receive", 10.0, lambda h: False)
    handle.via("tcp:2")
    handle.retried(3)

    Meters().ended(handle, "landed", "")

    labels = {"direction": "receive", "transport": "tcp"}
    assert sink.value("sagellm_kv_retries_total", **labels) == 3


def test_every_code_of_an_error_has_a_kind():
    codes = {kind.code for kind in CommError.__subclasses__()} - {"kv_transfer_failed"}

    assert codes - CAUSES.keys() == {"distributed_runtime_error"}
    told = TransferStats(failures=dict.fromkeys(codes, 1)).causes
    counted = {kind: sum(CAUSES.get(c, "other") == kind for c in codes) for kind in told}
    assert told == counted, "the sink and the statistics tell the same"


def test_it_does_not_start_on_windows(monkeypatch):
    from sagellm.comm.kv_transfer import KVTransferChannel
    from sagellm.core.protocols import ConfigError

    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(ConfigError, match="Windows"):
        KVTransferChannel()
