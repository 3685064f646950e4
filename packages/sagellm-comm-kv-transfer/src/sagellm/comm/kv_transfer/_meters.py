"""What a channel reports to the metrics sink of the application."""

from __future__ import annotations

import threading
import time

from sagellm.core.protocols import metrics

from .transfer import TransferHandle

__all__ = ["Meters", "Traffic"]


class Meters:
    """The instruments of one channel, from the sink that is set when the channel is made."""

    def __init__(self) -> None:
        self.payload = metrics.counter(metrics.KV_PAYLOAD_BYTES)
        self.wire = metrics.counter(metrics.KV_WIRE_BYTES)
        self._transfers = metrics.counter(metrics.KV_TRANSFERS)
        self._seconds = metrics.histogram(metrics.KV_TRANSFER_SECONDS)

    def ended(self, handle: TransferHandle, status: str, cause: str) -> None:
        """Count the end of a transfer, and how long it took."""
        self._transfers.add(direction=handle.direction, status=status, code=cause)
        seconds = time.monotonic() - handle.started
        transport = handle.metrics.path.partition(":")[0]
        self._seconds.observe(seconds, direction=handle.direction, transport=transport)


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
