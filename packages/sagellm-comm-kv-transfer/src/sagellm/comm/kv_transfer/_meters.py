"""What a channel reports to the metrics sink of the application."""

from __future__ import annotations

import threading
import time

from sagellm.core.protocols import metrics
from sagellm.core.protocols.kv_status import CAUSES
from sagellm.core.protocols.metrics import Metric

from .transfer import TransferHandle

__all__ = ["Meters", "Traffic"]


_LABELS = ("direction", "transport")
_FAILURES = Metric(
    "sagellm_kv_failures_total",
    "counter",
    "Transfers that did not land, by the kind of thing that went wrong.",
    ("direction", "cause"),
)
_RETRIES = Metric(
    "sagellm_kv_retries_total", "counter", "Blocks that were asked for again.", _LABELS
)
_RUNS = Metric(
    "sagellm_kv_runs_total", "counter", "Contiguous stretches of memory that moved.", _LABELS
)
_SYSCALLS = Metric(
    "sagellm_kv_syscalls_total", "counter", "Calls into the kernel that moved bytes.", _LABELS
)
_QUEUE = Metric(
    "sagellm_kv_queue_seconds", "histogram", "From the request to the first byte.", _LABELS, "s"
)
_WIRE = Metric(
    "sagellm_kv_wire_seconds", "histogram", "From the first byte to the last.", _LABELS, "s"
)
_VERIFY = Metric(
    "sagellm_kv_verify_seconds", "histogram", "Spent on checksums, per transfer.", _LABELS, "s"
)
_CODEC = Metric(
    "sagellm_kv_codec_seconds",
    "histogram",
    "Spent by threads encoding or decoding, per transfer.",
    _LABELS,
    "s",
)

_COUNTED = {"retries": _RETRIES, "runs": _RUNS, "syscalls": _SYSCALLS}
_TIMED = {"queue_s": _QUEUE, "wire_s": _WIRE, "verify_s": _VERIFY, "codec_s": _CODEC}


class Meters:
    """The instruments of one channel, from the sink that is set when the channel is made."""

    def __init__(self) -> None:
        self.payload = metrics.counter(metrics.KV_PAYLOAD_BYTES)
        self.wire = metrics.counter(metrics.KV_WIRE_BYTES)
        self._transfers = metrics.counter(metrics.KV_TRANSFERS)
        self._seconds = metrics.histogram(metrics.KV_TRANSFER_SECONDS)
        self._failures = metrics.counter(_FAILURES)
        self._counters = {n: metrics.counter(m) for n, m in _COUNTED.items()}
        self._histograms = {n: metrics.histogram(m) for n, m in _TIMED.items()}

    def ended(self, handle: TransferHandle, status: str, cause: str) -> None:
        """Count the end of a transfer, and what it took."""
        direction, taken = handle.direction, handle.metrics
        if status != "landed":
            self._failures.add(direction=direction, cause=CAUSES.get(cause, "other"))
        labels = {"direction": direction, "transport": taken.path.partition(":")[0]}
        self._seconds.observe(time.monotonic() - handle.started, **labels)
        for name, counter in self._counters.items():
            if amount := getattr(taken, name):
                counter.add(amount, **labels)
        if taken.bytes:
            for name, histogram in self._histograms.items():
                histogram.observe(getattr(taken, name), **labels)
        self._transfers.add(direction=direction, status=status, code=cause)


class Traffic:
    """Bytes of one direction of a link. Thread-safe.

    Args:
        meters: Where they are counted, too.
        direction: `send` or `receive`.

    """

    def __init__(self, meters: Meters, direction: str) -> None:
        self.payload = 0
        self.wire = 0
        self.transport = ""
        self._meters = meters
        self._direction = direction
        self._lock = threading.Lock()

    def count(self, payload: int, wire: int) -> None:
        """Add a frame's bytes."""
        with self._lock:
            self.payload += payload
            self.wire += wire
        labels = {"direction": self._direction, "transport": self.transport}
        self._meters.payload.add(payload, **labels)
        self._meters.wire.add(wire, **labels)
