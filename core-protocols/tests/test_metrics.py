"""Sinks: what they keep, what they refuse, and what reaches other libraries."""

import io
import json
import sys

import pytest

from sagellm.core.protocols import metrics
from sagellm.core.protocols.errors import BackendUnavailableError, ConfigError
from sagellm.core.protocols.metrics import (
    COMM_BYTES,
    COMM_IN_FLIGHT,
    COMM_SECONDS,
    MAX_SERIES,
    InMemoryMetrics,
    JsonMetrics,
    NoMetrics,
    OpenTelemetryMetrics,
    PrometheusMetrics,
    counter,
    gauge,
    get_metrics,
    histogram,
    set_metrics,
)


@pytest.fixture
def sink():
    sink = InMemoryMetrics()
    former = set_metrics(sink)
    yield sink
    set_metrics(former)


def record(sink):
    counter(COMM_BYTES, sink).add(8, backend="mock", op="send")
    counter(COMM_BYTES, sink).add(4, backend="mock", op="send")
    histogram(COMM_SECONDS, sink).observe(0.5, backend="mock", op="send")
    gauge(COMM_IN_FLIGHT, sink).set(3, backend="mock")
    gauge(COMM_IN_FLIGHT, sink).add(-1, backend="mock")


def test_the_default_sink_keeps_nothing_and_is_shared():
    assert isinstance(get_metrics(), NoMetrics)
    record(NoMetrics())
    assert NoMetrics().counter("a", "A.") is NoMetrics().counter("b", "B.")


def test_series_add_up(sink):
    record(None)

    assert sink.value(COMM_BYTES.name, backend="mock", op="send") == 12
    assert sink.value(COMM_SECONDS.name, backend="mock", op="send") == 0.5
    assert sink.value(COMM_IN_FLIGHT.name, backend="mock") == 2
    assert sink.value("nobody") == 0


def test_a_snapshot_has_every_series(sink):
    record(None)

    rows = {row["name"]: row for row in sink.snapshot()}

    assert rows[COMM_BYTES.name]["value"] == 12
    assert rows[COMM_SECONDS.name]["count"] == 1
    assert [n for bound, n in rows[COMM_SECONDS.name]["buckets"] if bound == 1.0] == [1]
    assert sum(n for _, n in rows[COMM_SECONDS.name]["buckets"]) == 1


def test_reset_keeps_instruments_working(sink):
    bytes_ = counter(COMM_BYTES)
    bytes_.add(8, backend="mock", op="send")

    sink.reset()
    bytes_.add(1, backend="mock", op="send")

    assert sink.value(COMM_BYTES.name, backend="mock", op="send") == 1


def test_a_value_on_a_bound_belongs_below_it(sink):
    sink.histogram("x", "X.", buckets=[1, 2]).observe(1)

    assert sink.snapshot()[0]["buckets"] == [[1.0, 1], [2.0, 0], [None, 0]]


def test_labels_are_bounded(sink):
    many = sink.counter("x_total", "X.", ["op"])

    for i in range(MAX_SERIES + 5):
        many.add(op=f"op{i}")

    assert len(sink.snapshot()) == MAX_SERIES + 1
    assert sink.value("x_total", op="other") == 5


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: s.counter("x", "X.", ["a"]).add(), "has labels"),
        (lambda s: s.counter("x", "X.").add(b="1"), "has labels"),
        (lambda s: s.counter("x", "X.").add(-1), "only grows"),
        (lambda s: (s.counter("x", "X."), s.gauge("x", "X.")), "cannot also be a gauge"),
        (lambda s: s.histogram("x", "X.", buckets=[2, 1]), "must rise"),
        (lambda s: s.histogram("x", "X.", buckets=[]), "must rise"),
        (lambda s: counter(COMM_SECONDS, s), "is a histogram, not a counter"),
    ],
)
def test_misuse_is_refused(sink, call, match):
    with pytest.raises(ConfigError, match=match):
        call(sink)


def test_json_lines_hold_totals():
    file = io.StringIO()
    sink = JsonMetrics(file)
    record(sink)

    sink.flush()
    sink.flush()

    rows = [json.loads(line) for line in file.getvalue().splitlines()]
    values = [r["value"] for r in rows if r["name"] == COMM_BYTES.name]
    assert values == [12, 12]
    assert all("time_unix_s" in r for r in rows)


def test_declared_names_are_unique_and_carry_units():
    names = [m.name for m in metrics.ALL_METRICS]

    assert len(set(names)) == len(names)
    for metric in metrics.ALL_METRICS:
        assert metric.name.startswith("sagellm_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        if metric.unit == "s":
            assert metric.name.removesuffix("_total").endswith("_seconds")
        if metric.unit == "By":
            assert "_bytes" in metric.name


def test_prometheus_gets_the_same_values():
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    record(PrometheusMetrics(registry))

    labels = {"backend": "mock", "op": "send"}
    assert registry.get_sample_value(COMM_BYTES.name, labels) == 12
    assert registry.get_sample_value(COMM_SECONDS.name + "_sum", labels) == 0.5
    assert registry.get_sample_value(COMM_IN_FLIGHT.name, {"backend": "mock"}) == 2


def test_prometheus_refuses_a_name_with_two_shapes():
    prometheus = pytest.importorskip("prometheus_client")
    sink = PrometheusMetrics(prometheus.CollectorRegistry())
    sink.counter("x_total", "X.").add()

    with pytest.raises(ConfigError, match="cannot also be"):
        sink.gauge("x_total", "X.")


def test_opentelemetry_gets_the_same_values():
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    reader = export.InMemoryMetricReader()
    provider = sdk.MeterProvider(metric_readers=[reader])
    record(OpenTelemetryMetrics(provider.get_meter("test")))

    data = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    points = {m.name: m.data.data_points[0] for m in data}

    assert points[COMM_BYTES.name].value == 12
    assert points[COMM_SECONDS.name].sum == 0.5
    assert points[COMM_IN_FLIGHT.name].value == 2
    assert dict(points[COMM_BYTES.name].attributes) == {"backend": "mock", "op": "send"}
    provider.shutdown()


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [
        (PrometheusMetrics, "prometheus_client", "prometheus"),
        (OpenTelemetryMetrics, "opentelemetry.metrics", "otel"),
    ],
)
def test_a_missing_library_names_the_line_that_installs_it(monkeypatch, make, module, extra):
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(BackendUnavailableError, match=rf"sagellm-core-protocols\[{extra}\]"):
        make()
