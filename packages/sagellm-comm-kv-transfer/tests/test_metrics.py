"""What a channel tells the application's metrics sink, against what it says of itself."""

import pytest

from sagellm.core.protocols import KVTransferError, TransferKey
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


def test_it_does_not_start_on_windows(monkeypatch):
    from sagellm.comm.kv_transfer import KVTransferChannel
    from sagellm.core.protocols import ConfigError

    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(ConfigError, match="Windows"):
        KVTransferChannel()
