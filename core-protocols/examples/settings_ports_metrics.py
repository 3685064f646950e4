"""Settings with their origins, a port that nobody hard-coded, and metrics in one place.

SAGELLM_COMM_EXAMPLE_CHUNK_BYTES=4096 python examples/settings_ports_metrics.py
"""

from __future__ import annotations

from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.config import Section, Settings
from sagellm.core.protocols.metrics import COMM_BYTES, InMemoryMetrics, counter, set_metrics
from sagellm.core.protocols.ports import SagePorts


class Wire(Section):
    """How bytes travel."""

    streams: int = 1


class ExampleSettings(Settings, package="example"):
    """Section `example`, variables `SAGELLM_COMM_EXAMPLE_…`."""

    chunk_bytes: int = 65536
    wire: Wire = Wire()


def main() -> None:
    """Show each of the three."""
    settings = ExampleSettings.load(wire={"streams": 4})
    print(settings.describe())
    try:
        ExampleSettings.load({"SAGELLM_COMM_EXAMPLE_CHUNK_BITES": "1"})
    except ConfigError as e:
        print(f"refused: {e}")

    with SagePorts().listen("example") as listener:
        print(f"listening on port {listener.getsockname()[1]}, which the kernel chose")

    sink = InMemoryMetrics()
    set_metrics(sink)
    counter(COMM_BYTES).add(4096, backend="example", op="send")
    print(sink.snapshot())


if __name__ == "__main__":
    main()
