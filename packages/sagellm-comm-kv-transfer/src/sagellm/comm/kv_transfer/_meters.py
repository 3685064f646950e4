"""What a channel reports to the metrics sink of the application."""

from __future__ import annotations

import time

from sagellm.core.protocols import metrics

from .transfer import TransferHandle

__all__ = ["Meters", "Traffic"]


class Meters:
    """The instruments of one channel, from the sink that is set when the channel is made.

    Args:
        transport: Name of what carries the blocks, a label.

    """

    def __init__(self, transport: str) -> None:
        self.transport = transport
        self.payload = metrics.counter(metrics.KV_PAYLOAD_BYTES)
        self.wire = metrics.counter(metrics.KV_WIRE_BYTES)
        self._transfers = metrics.counter(metrics.KV_TRANSFERS)
        self._seconds = metrics.histogram(metrics.KV_TRANSFER_SECONDS)

    def ended(self, handle: TransferHandle, status: str, cause: str) -> None:
        """Count the end of a transfer, and how long it took."""
        self._transfers.add(direction=handle.direction, status=status, code=cause)
        seconds = time.monotonic() - handle.started
        self._seconds.observe(seconds, direction=handle.direction, transport=self.transport)


class Traffic:
    """Bytes of one direction of a link; written by one thread.

    Args:
        meters: Where they are counted, too.
        direction: `send` or `receive`.

    """

    def __init__(self, meters: Meters, direction: str) -> None:
        self.payload = 0
        self.wire = 0
        self._meters = meters
        self._labels = {"direction": direction, "transport": meters.transport}

    def count(self, payload: int, wire: int) -> None:
        """Add a frame's bytes."""
        self.payload += payload
        self.wire += wire
        self._meters.payload.add(payload, **self._labels)
        self._meters.wire.add(wire, **self._labels)
