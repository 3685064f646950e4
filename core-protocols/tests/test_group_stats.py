"""Counters of groups: per operation, algorithm and size, with an engine's counts merged in."""

import threading
from dataclasses import dataclass, field, replace

import pytest

torch = pytest.importorskip("torch")

from sagellm.core.protocols import CompletedWork, ConfigError, PeerLostError  # noqa: E402
from sagellm.core.protocols._process_group.recorder import Record  # noqa: E402
from sagellm.core.protocols._process_group.stats import (  # noqa: E402
    BATCH,
    BUCKETS,
    CallCounters,
    percentile_us,
)
from sagellm.core.protocols.bandwidth import busbw_factor  # noqa: E402
from sagellm.core.protocols.metrics import (  # noqa: E402
    GROUP_BYTES,
    GROUP_CALLS,
    GROUP_SECONDS,
    GROUP_WAIT_SECONDS,
    InMemoryMetrics,
    group_metrics,
)
from sagellm.core.protocols.observe import ObserveSettings  # noqa: E402
from sagellm.core.protocols.process_group import (  # noqa: E402
    RawWork,
    TensorBackend,
    Transport,
    WorkReport,
)


class Done(RawWork):
    def wait(self, timeout_s):
        return True

    synchronize = wait

    def done(self):
        return True


class Told(Done):
    report = WorkReport(algorithm="ring", wait_ns=7)


class Nobody(Transport):
    """Rank 0 of two; every call is over at once."""

    rank, size, global_ranks, group_name = 0, 2, (0, 1), "nobody"
    device = torch.device("cpu")

    def __init__(self, work=None):
        self.work = Done() if work is None else work

    def issue(self, call):
        if isinstance(self.work, Exception):
            raise self.work
        return self.work

    def issue_batch(self, calls):
        return [self.issue(call) for call in calls]

    def explain_failure(self, describe, error):
        return error

    def abort(self, reason):
        pass

    def close(self):
        pass

    def split(self, ranks, name, timeout_s):
        return None


class Plain(TensorBackend):
    def _wrap(self, transport):
        return Plain(self.spec, transport)


@dataclass
class Row:
    op: str
    algorithm: str
    bucket: int
    calls: int
    nbytes: int
    total_ns: int
    wait_ns: int
    histogram: list = field(default_factory=list)


def over(op, nbytes, ns):
    """The record of a call that took so long; None where nobody saw its end."""
    record = Record(None, op, 0, 0, nbytes, nbytes, None, None, None, "native")
    record.ended_ns = 0 if ns is None else record.started_ns + ns
    return record


def cells(backend):
    return {
        (d.op, d.algorithm, d.bucket_bytes): (d.calls, d.bytes) for d in backend.get_stats().details
    }


def test_calls_are_kept_apart_by_operation_algorithm_and_power_of_two(spec):
    backend = Plain(spec, Nobody())
    for count in (1, 16, 31, 32):
        backend.all_reduce(torch.ones(count))
    backend.all_reduce(torch.ones(0))
    backend.all_reduce(torch.ones(16), async_op=True).wait()
    backend.barrier()

    assert cells(backend) == {
        ("all_reduce", "local", 0): (1, 0),
        ("all_reduce", "native", 4): (1, 4),
        ("all_reduce", "native", 64): (3, 64 + 124 + 64),
        ("all_reduce", "native", 128): (1, 128),
        ("barrier", "native", 0): (1, 0),
    }
    stats = backend.get_stats().ops["all_reduce"]
    assert (stats.calls, stats.bytes, stats.errors) == (6, 4 + 64 + 124 + 128 + 64, 0)
    backend.reset_stats()
    assert cells(backend) == {}


def test_rules_and_hooks_are_algorithms(spec):
    poor = replace(
        spec,
        capabilities=replace(spec.capabilities, ops=spec.capabilities.ops - {"barrier"}),
        lowering=(replace(spec.lowering[0], when="barrier", rule="barrier_by_all_reduce"),),
    )
    backend = Plain(poor, Nobody())
    backend.barrier()
    remove = backend.add_hook(take_over=lambda call: CompletedWork(None))
    backend.all_reduce(torch.ones(1))
    remove()

    assert set(cells(backend)) == {
        ("barrier", "barrier_by_all_reduce", 0),
        ("all_reduce", "taken_over", 4),
    }


def test_a_transport_may_tell_algorithm_and_wait(spec):
    backend = Plain(spec, Nobody(Told()))
    backend.all_reduce(torch.ones(4))
    backend.all_reduce(torch.ones(4), async_op=True).wait()

    (row,) = backend.get_stats().details
    assert (row.algorithm, row.calls) == ("ring", 2)
    assert row.wait_s == pytest.approx(14e-9)
    assert row.wait_s + row.transfer_s == pytest.approx(row.seconds)
    assert row.busbw_bytes_per_s == row.algbw_bytes_per_s == pytest.approx(32 / row.seconds)


def test_an_engines_calls_are_counted_once_whichever_way_they_came(spec):
    class Engined(Plain):
        rows = ()

        def _engine_totals(self):
            return self.rows

    backend = Engined(spec, Nobody())
    x, out = torch.ones(4), torch.empty(8)
    backend.all_gather(x)
    backend.all_gather_into_tensor(out, x)
    backend.all_reduce(torch.ones(0))
    backend.send(x, 1)
    histogram = [0] * 100 + [5]
    backend.rows = [
        Row("all_gather", "direct", 4, 5, 80, 5000, 2000, histogram),
        Row("all_reduce", "one_shot", 4, 3, 48, 300, 100, [0, 3]),
    ]

    assert cells(backend) == {
        ("all_gather", "direct", 16): (1, 16),
        ("all_gather_into_tensor", "direct", 16): (4, 64),
        ("all_reduce", "local", 0): (1, 0),
        ("all_reduce", "one_shot", 16): (3, 48),
        ("send", "native", 16): (1, 16),
    }
    ops = backend.get_stats().ops
    assert {op: (s.calls, s.bytes) for op, s in ops.items()} == {
        "all_gather": (1, 16),
        "all_gather_into_tensor": (4, 64),
        "all_reduce": (4, 48),
        "send": (1, 16),
    }
    listed, gather = backend.get_stats().details[:2]
    assert (gather.wait_s, gather.transfer_s) == (pytest.approx(1.6e-6), pytest.approx(2.4e-6))
    assert gather.algbw_bytes_per_s == pytest.approx(128 / 4e-6)
    assert sum(gather.histogram) == 4
    assert listed.wait_s == pytest.approx(0.4 * listed.seconds)
    bandwidth = backend.get_bandwidth_stats().algbw_bytes_per_s
    assert bandwidth["all_gather"] == pytest.approx(32 / listed.seconds)
    assert gather.p50_us == pytest.approx(2 ** (100.5 / 8) / 100)


def test_percentiles_and_bandwidth_follow_the_histogram(spec):
    counters = CallCounters()
    for us in (10, 10, 10, 1000):
        counters.ran.append(over("all_reduce", 8, us * 1000))
    counters.fold()
    cell = counters.ops["all_reduce"].cells["native", 4]
    assert percentile_us(cell.histogram, 0.5) == pytest.approx(10, rel=0.1)
    assert percentile_us(cell.histogram, 0.99) == pytest.approx(1000, rel=0.1)
    assert percentile_us([0] * BUCKETS, 0.5) is None
    assert (cell.wire, cell.ns) == (32, 1030_000)
    backend = Plain(spec, Nobody())
    backend._counters = counters
    bandwidth = backend.get_bandwidth_stats()
    assert bandwidth.algbw_bytes_per_s["all_reduce"] == pytest.approx(32 / 1030e-6)
    assert busbw_factor("all_reduce", 2) == 1


def test_the_longest_and_the_shortest_times_have_a_bucket():
    counters = CallCounters()
    for ns in (0, 1, 10, 1 << 62):
        counters.ran.append(over("barrier", 0, ns))
        counters.ended.append(over("barrier", 0, ns))
    counters.fold()
    histogram = counters.ops["barrier"].cells["native", 0].histogram
    assert (histogram[0], histogram[-1]) == (6, 2)


def test_failed_calls_are_errors_and_neither_bytes_nor_time(spec):
    backend = Plain(spec, Nobody(PeerLostError("gone")))
    with pytest.raises(PeerLostError):
        backend.all_reduce(torch.ones(4))
    stats = backend.get_stats()
    assert (stats.ops["all_reduce"].calls, stats.ops["all_reduce"].errors) == (1, 1)
    assert stats.details == ()


def test_switched_off_nothing_is_counted_and_calls_work(spec, monkeypatch):
    off = Plain(spec, Nobody(), observe=ObserveSettings(statistics=False))
    off.all_reduce(torch.ones(4))
    off.all_reduce(torch.ones(4), async_op=True).wait()
    assert off.get_stats().ops == {}
    assert off.get_stats().in_flight == 0
    monkeypatch.setenv("SAGELLM_COMM_OBSERVE_STATISTICS", "false")
    assert not Plain(spec, Nobody())._counting
    with pytest.raises(ConfigError, match="flight_entries"):
        ObserveSettings(flight_entries=-1)


def test_threads_that_wait_lose_no_count(spec):
    backend = Plain(spec, Nobody())
    works = [backend.all_reduce(torch.ones(4), async_op=True) for _ in range(400)]
    threads = [
        threading.Thread(target=lambda part=works[i::4]: [w.wait() for w in part]) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for _ in range(400):
        backend.all_reduce(torch.ones(4))
    for thread in threads:
        thread.join(20)
    assert cells(backend) == {("all_reduce", "native", 16): (800, 800 * 16)}
    assert backend.get_stats().in_flight == 0


def test_hooks_see_one_call_object_before_and_after(spec):
    backend = Plain(spec, Nobody())
    seen = []
    backend.add_hook(before=seen.append, after=lambda call, seconds, error: seen.append(call))
    x = torch.ones(4)
    backend.all_reduce(x)
    backend.all_reduce(x, async_op=True).wait()
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert [c.sequence for c in seen] == [0, 0, 1, 1]
    assert seen[0].tensors == (x,)
    assert seen[0].dtype == "float32"


def test_a_call_is_only_noted_and_counted_with_others(spec):
    backend = Plain(spec, Nobody())
    folds = []

    class Locked:
        def __enter__(self):
            folds.append(len(backend._counters.ran))

        def __exit__(self, *error):
            pass

    backend._counters.lock = Locked()
    for _ in range(BATCH - 1):
        backend.all_reduce(torch.ones(4))
    assert (folds, len(backend._counters.ran)) == ([], BATCH - 1)
    backend.all_reduce(torch.ones(4))
    assert (folds, backend._counters.ran) == ([BATCH], [])
    backend.all_reduce(torch.ones(4))
    assert cells(backend) == {("all_reduce", "native", 16): (BATCH + 1, (BATCH + 1) * 16)}


def test_calls_without_an_end_have_bytes_and_no_time():
    counters = CallCounters()
    counters.ran += [over("all_reduce", 8, 1000), over("all_reduce", 8, None)]
    counters.fold()
    cell = counters.ops["all_reduce"].cells["native", 4]
    assert (cell.calls, cell.bytes, cell.ns, cell.wire) == (2, 16, 1000, 8)
    assert sum(cell.histogram) == 1


def test_statistics_leave_as_metrics_with_units_and_bounded_labels(spec):
    backend = Plain(spec, Nobody(Told()))
    for _ in range(3):
        backend.all_reduce(torch.ones(4))
    sink = InMemoryMetrics()
    sink.add_source(group_metrics(backend))
    rows = {row["name"]: row for row in sink.snapshot()}

    labels = {
        "backend": "gloo", "group": "nobody", "op": "all_reduce", "algorithm": "ring",
        "bucket": "16",
    }  # fmt: skip
    assert rows[GROUP_CALLS.name] == {
        "name": GROUP_CALLS.name, "kind": "counter", "labels": labels, "value": 3,
    }  # fmt: skip
    assert rows[GROUP_BYTES.name]["value"] == 48
    assert rows[GROUP_WAIT_SECONDS.name]["value"] == pytest.approx(21e-9)
    seconds = rows[GROUP_SECONDS.name]
    assert seconds["count"] == sum(n for _, n in seconds["buckets"]) == 3
    assert seconds["labels"] == labels


def test_series_beyond_the_bound_are_added_up_as_other(spec, monkeypatch):
    import sagellm.core.protocols._metrics_api as api

    monkeypatch.setattr(api, "MAX_SERIES", 2)
    backend = Plain(spec, Nobody())
    for count in (1, 2, 4, 8):
        backend.all_reduce(torch.ones(count))
    rows = [r for r in group_metrics(backend)() if r["name"] == GROUP_CALLS.name]
    assert [(r["labels"]["bucket"], r["value"]) for r in rows] == [("4", 1), ("8", 1), ("other", 2)]


def test_prometheus_text_has_the_same_numbers(spec):
    prometheus_client = pytest.importorskip("prometheus_client")
    from sagellm.core.protocols.metrics import PrometheusMetrics

    backend = Plain(spec, Nobody())
    metrics = PrometheusMetrics(prometheus_client.CollectorRegistry())
    metrics.add_source(group_metrics(backend))
    backend.all_reduce(torch.ones(4))
    backend.all_reduce(torch.ones(4))
    where = 'algorithm="native",backend="gloo",bucket="16",group="nobody",op="all_reduce"'
    text = metrics.text()
    assert f"sagellm_comm_group_calls_total{{{where}}} 2.0" in text
    assert f"sagellm_comm_group_seconds_count{{{where}}} 2.0" in text
    assert 'sagellm_comm_group_in_flight{backend="gloo",group="nobody"} 0.0' in text
