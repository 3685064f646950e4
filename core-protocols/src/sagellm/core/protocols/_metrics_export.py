"""Metrics for Prometheus and OpenTelemetry; each needs the extra that its error names."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ._metrics_api import (
    ALL_METRICS,
    Counter,
    Gauge,
    Histogram,
    LabelGuard,
    MetricSource,
    buckets_for,
)
from .errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    import opentelemetry.metrics
    import prometheus_client

__all__ = ["OpenTelemetryMetrics", "PrometheusMetrics"]

T = TypeVar("T")

_DESCRIPTIONS = {metric.name: metric.description for metric in ALL_METRICS}


def _need(module: str, extra: str) -> Any:  # noqa: ANN401 - an optional library, without types here
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise BackendUnavailableError(
            f"{module} is not installed: pip install 'sagellm-core-protocols[{extra}]'"
        ) from e


class _Made:
    """Instruments by name, so that asking twice gives the same one. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[str, tuple[object, object]] = {}

    def get(self, name: str, shape: object, make: Callable[[], T]) -> T:
        with self._lock:
            if name not in self._made:
                self._made[name] = (shape, make())
            known, instrument = self._made[name]
        if known != shape:
            raise ConfigError(f"metric {name} is {known}; it cannot also be {shape}")
        return instrument  # type: ignore[return-value]  # equal shapes were made by equal calls


class _Prometheus:
    """One collector of prometheus-client with bounded labels."""

    def __init__(self, collector: Any, name: str, labels: Sequence[str]) -> None:  # noqa: ANN401
        self._collector = collector
        self._labels = LabelGuard(name, labels)

    def _child(self, labels: dict[str, str]) -> Any:  # noqa: ANN401 - as the collector
        values = self._labels(labels)
        return self._collector.labels(*values) if values else self._collector

    def add(self, value: float = 1, **labels: str) -> None:
        self._child(labels).inc(value)

    def set(self, value: float, **labels: str) -> None:
        self._child(labels).set(value)

    def observe(self, value: float, **labels: str) -> None:
        self._child(labels).observe(value)


class _SourceCollector:
    """Rows of a source as metric families, made anew at every scrape."""

    def __init__(self, source: MetricSource) -> None:
        self._source = source
        self._core = _need("prometheus_client.core", "prometheus")

    def describe(self) -> list[Any]:  # as the collector protocol wants it
        """Nothing beforehand: the source is not asked before the first scrape."""
        return []

    def collect(self) -> list[Any]:  # metric families of a library that has no types here
        """One family per name."""
        families: dict[str, Any] = {}
        for row in self._source():
            name, kind, labels = row["name"], row["kind"], row["labels"]
            if name not in families:
                make = getattr(self._core, f"{kind.capitalize()}MetricFamily")
                families[name] = make(
                    name.removesuffix("_total"), _DESCRIPTIONS.get(name, name), labels=list(labels)
                )
            values = list(labels.values())
            if kind == "histogram":
                total = 0
                buckets = []
                for bound, count in row["buckets"]:
                    total += count
                    buckets.append(("+Inf" if bound is None else repr(bound), total))
                families[name].add_metric(values, buckets, row["sum"])
            else:
                families[name].add_metric(values, row["value"])
        return list(families.values())


class PrometheusMetrics:
    """Records into a prometheus-client registry; the application serves or pushes it.

    Args:
        registry: Where to register; None takes the library's default registry.

    Raises:
        BackendUnavailableError: prometheus-client is not installed; the message has the line
            that installs it.

    """

    def __init__(self, registry: prometheus_client.CollectorRegistry | None = None) -> None:
        self._client = _need("prometheus_client", "prometheus")
        self._registry = self._client.REGISTRY if registry is None else registry
        self._made = _Made()

    def add_source(self, source: MetricSource) -> None:
        """Ask `source` for its series at every scrape, such as `group_metrics(backend)`.

        One source per registry and set of names: Prometheus refuses the same name twice.
        """
        self._registry.register(_SourceCollector(source))

    def text(self) -> str:
        """The registry in Prometheus' text format."""
        return str(self._client.generate_latest(self._registry).decode())

    def counter(self, name: str, description: str, labels: Sequence[str] = ()) -> Counter:
        """A counter; Prometheus wants its name to end with `_total`."""
        return self._get("Counter", name, description, labels)

    def histogram(
        self,
        name: str,
        description: str,
        unit: str = "s",
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] | None = None,
    ) -> Histogram:
        """A histogram."""
        bounds = buckets_for(name, unit, buckets)
        return self._get("Histogram", name, description, labels, buckets=bounds)

    def gauge(self, name: str, description: str, labels: Sequence[str] = ()) -> Gauge:
        """A gauge."""
        return self._get("Gauge", name, description, labels)

    def _get(
        self, kind: str, name: str, description: str, labels: Sequence[str], **options: object
    ) -> _Prometheus:
        def make() -> _Prometheus:
            collector = getattr(self._client, kind)(
                name, description, tuple(labels), registry=self._registry, **options
            )
            return _Prometheus(collector, name, labels)

        return self._made.get(name, (kind, tuple(labels), tuple(options.values())), make)


class _OpenTelemetry:
    """One instrument of OpenTelemetry with bounded labels."""

    def __init__(self, instrument: Any, name: str, labels: Sequence[str]) -> None:  # noqa: ANN401
        self._instrument = instrument
        self._labels = LabelGuard(name, labels)
        self._lock = threading.Lock()
        self._values: dict[tuple[str, ...], float] = {}

    def _attributes(self, labels: dict[str, str]) -> dict[str, str]:
        return dict(zip(self._labels.labels, self._labels(labels), strict=True))

    def observe(self, value: float, **labels: str) -> None:
        self._instrument.record(value, self._attributes(labels))


class _OpenTelemetryCounter(_OpenTelemetry):
    def add(self, value: float = 1, **labels: str) -> None:
        self._instrument.add(value, self._attributes(labels))


class _OpenTelemetryGauge(_OpenTelemetry):
    def set(self, value: float, **labels: str) -> None:
        with self._lock:
            self._values[self._labels(labels)] = value
            self._instrument.set(value, self._attributes(labels))

    def add(self, value: float, **labels: str) -> None:
        with self._lock:
            key = self._labels(labels)
            self._values[key] = self._values.get(key, 0.0) + value
            self._instrument.set(self._values[key], self._attributes(labels))


class OpenTelemetryMetrics:
    """Records into an OpenTelemetry meter; the application configures provider and exporter.

    Args:
        meter: Where to record; None takes meter `sagellm.comm` of the global provider.

    Raises:
        BackendUnavailableError: opentelemetry-api is not installed; the message has the line
            that installs it.

    """

    def __init__(self, meter: opentelemetry.metrics.Meter | None = None) -> None:
        api = _need("opentelemetry.metrics", "otel")
        self._meter: Any = api.get_meter("sagellm.comm") if meter is None else meter
        self._made = _Made()

    def counter(self, name: str, description: str, labels: Sequence[str] = ()) -> Counter:
        """A counter."""
        return self._made.get(
            name,
            ("counter", tuple(labels)),
            lambda: _OpenTelemetryCounter(
                self._meter.create_counter(name, description=description), name, labels
            ),
        )

    def histogram(
        self,
        name: str,
        description: str,
        unit: str = "s",
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] | None = None,
    ) -> Histogram:
        """A histogram."""
        bounds = buckets_for(name, unit, buckets)
        return self._made.get(
            name,
            ("histogram", tuple(labels), bounds),
            lambda: _OpenTelemetry(
                self._meter.create_histogram(
                    name,
                    unit=unit,
                    description=description,
                    explicit_bucket_boundaries_advisory=list(bounds),
                ),
                name,
                labels,
            ),
        )

    def gauge(self, name: str, description: str, labels: Sequence[str] = ()) -> Gauge:
        """A gauge."""
        return self._made.get(
            name,
            ("gauge", tuple(labels)),
            lambda: _OpenTelemetryGauge(
                self._meter.create_gauge(name, description=description), name, labels
            ),
        )
