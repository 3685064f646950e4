"""The hook a model calls after each layer to stream that layer's KV."""

from __future__ import annotations

from sagellm.core.protocols import KVStream

from .streams import StreamApi

__all__ = ["LayerHook"]


class LayerHook:
    """Queues a layer's KV on a stream each time it is called with the layer's index.

    Attributes:
        layers: Indices queued so far, in order.

    """

    def __init__(self, kv_stream: KVStream, api: StreamApi | None = None) -> None:
        self._stream = kv_stream
        self._api = api
        self.layers: list[int] = []

    def __call__(self, layer: int) -> None:
        """Queue one layer; returns before its bytes have gone.

        Raises:
            ConfigError: As `KVStream.send_layer`.
            KVTransferError: As `KVStream.send_layer`.

        """
        after = None
        if self._api is not None:
            after = self._api.Event()
            after.record(self._api.current_stream())
        self._stream.send_layer(layer, after)
        self.layers.append(layer)
