"""A push that is fed layer by layer, while they are computed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from sagellm.core.protocols import ConfigError, KVTransferError, ReadyEvent

from ._flows import Span
from ._records import CANCELLED
from .transfer import TransferHandle

if TYPE_CHECKING:
    from ._engine import Engine
    from ._push import Push

__all__ = ["Stream"]


class Stream:
    """Feeds one push; made by `KVTransferChannel.begin`. Thread-safe."""

    def __init__(self, engine: Engine, push: Push) -> None:
        self._engine = engine
        self._push = push
        self._lock = threading.Lock()
        self._sealed = False
        assert push.pool is not None, "streams send blocks of a pool"
        layout = push.pool.layout
        self._names = layout.layers
        self._sent = [
            np.zeros(len(push.blocks[g.name]), dtype=bool) for g in layout.groups for _ in g.layers
        ]

    @property
    def transfer(self) -> TransferHandle:
        """The transfer this stream feeds."""
        return self._push.handle

    def send_layer(
        self, index: int, after: ReadyEvent | None = None, *, span: tuple[int, int] | None = None
    ) -> None:
        """Queue one layer's blocks, or those at positions [first, last); returns at once.

        Raises:
            ConfigError: Unknown layer, a block sent before, or the stream is sealed.
            KVTransferError: The transfer has failed.

        """
        if not 0 <= index < len(self._sent):
            raise ConfigError(f"layer {index} is not in 0..{len(self._sent) - 1}")
        self._raise_if_failed()
        with self._lock:
            if self._sealed:
                raise ConfigError("the stream is sealed")
            sent = self._sent[index]
            first, last = (0, len(sent)) if span is None else span
            if not 0 <= first <= last <= len(sent):
                raise ConfigError(f"span {span} is not within 0..{len(sent)}")
            if sent[first:last].any():
                raise ConfigError(f"blocks {first}..{last - 1} of layer {index} were sent before")
            sent[first:last] = True
        if after is None and self._push.pool is not None:
            after = self._push.pool.mark()
        self._push.queue([Span(index, first, last, after)])

    def seal(self, num_tokens: int) -> TransferHandle:
        """Say that nothing more comes, and how many tokens the blocks hold.

        The transfer lands when all senders of the key have sealed and everything is in place:
        seal all streams of a thread before waiting for one of them.

        Raises:
            ConfigError: Blocks were never sent, and the transfer is aborted.
            KVTransferError: The transfer has failed.

        """
        self._raise_if_failed()
        with self._lock:
            if self._sealed:
                return self.transfer
            missing = [n for n, s in zip(self._names, self._sent, strict=True) if not s.all()]
            self._sealed = not missing
        if missing:
            why = f"sealed without blocks of layers {', '.join(missing)}"
            self.abort(why)
            raise ConfigError(f"the stream was {why}")
        self._engine.loop.call(lambda: self._engine.sending.seal(self._push, num_tokens))
        return self.transfer

    def abort(self, reason: str) -> None:
        """Give up; the receiver fails with this reason."""
        error = KVTransferError(f"aborted by the sender: {reason}", cause=CANCELLED)
        self._engine.loop.call(lambda: self._engine.sending.fail(self._push, error))

    def _raise_if_failed(self) -> None:
        if (error := self.transfer.exception()) is not None:
            raise error
