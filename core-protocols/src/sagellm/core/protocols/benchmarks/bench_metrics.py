"""What recording a metric costs on a hot path, per sink, beside an empty call.

python -m sagellm.core.protocols.benchmarks.bench_metrics [--quick] [--json F] [--markdown F]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from sagellm.core.protocols.bench import Benchmark, Case, Contender, Missing, Ratio, Row
from sagellm.core.protocols.errors import BackendUnavailableError
from sagellm.core.protocols.metrics import (
    COMM_BYTES,
    InMemoryMetrics,
    MetricsSink,
    NoMetrics,
    PrometheusMetrics,
    counter,
)

_CALLS = 2000


def _per_call(call: Callable[..., None]) -> Callable[[], float]:
    def measure() -> float:
        started = time.perf_counter()
        for _ in range(_CALLS):
            call(8, backend="mock", op="send")
        return (time.perf_counter() - started) / _CALLS

    return measure


def _empty(value: float, **labels: str) -> None:
    return None


def _prometheus() -> Contender:
    try:
        import prometheus_client

        sink: MetricsSink = PrometheusMetrics(prometheus_client.CollectorRegistry())
    except (ImportError, BackendUnavailableError):
        return Missing("pip install 'sagellm-core-protocols[prometheus]'")
    return _per_call(counter(COMM_BYTES, sink).add)


def contenders(case: Case) -> dict[str, Contender]:
    return {
        "empty call": _per_call(_empty),
        "none": _per_call(counter(COMM_BYTES, NoMetrics()).add),
        "in memory": _per_call(counter(COMM_BYTES, InMemoryMetrics()).add),
        "prometheus": _prometheus(),
    }


def ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    """An empty call over the default sink: at 1 they cost the same."""
    medians = {row.contender: row.median for row in rows}
    empty, default = medians["empty call"], medians["none"]
    if empty is not None and default is not None:
        yield Ratio("empty call/none", rows[0].case, empty / default, goal=0.5)


main = Benchmark(
    "metrics", contenders, cases=[{"labels": 2}], ratios=ratios, distributions=["prometheus-client"]
).main

if __name__ == "__main__":
    raise SystemExit(main())
