"""The channel as a contender."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from sagellm.comm.kv_transfer.channel import KVTransferChannel
from sagellm.comm.kv_transfer.settings import KVTransferSettings
from sagellm.core.protocols import DistributedRuntimeError, TransferKey

from ._turns import Blocks, Turn, fill, layout, pool_blocks
from ._worker import End

__all__ = ["Channel", "ManyTransfers"]

_KEY = b"only for this benchmark on loopback"
_DEADLINE_S = 120.0


class Channel(End):
    """P pushes blocks of its pool, D has said where they go.

    Args:
        role: P or D.
        case: With regions.
        host: Address to listen on.
        transport: Path to take; another one is an error.
        settings: Further settings of the channel.

    """

    def __init__(
        self,
        role: str,
        case: Mapping[str, Any],
        host: str,
        *,
        transport: str,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._transport = transport
        chosen = KVTransferSettings.load(transport=transport, **settings)
        self._channel = KVTransferChannel(
            node_id=0 if role == "P" else 1, peers={}, key=_KEY, host=host, settings=chosen
        )
        try:
            super().__init__(role, case, host)
        except BaseException:
            self._channel.close()
            raise

    def open_blocks(self) -> Blocks:
        shape = layout(self.case["block_bytes"])
        if self._transport == "shm":
            pool = self._channel.allocate(shape, pool_blocks(self.case))
            own: Blocks = pool.tensors["layer0"].numpy()
            if self.sends:
                fill(own, seed=1)
            return own
        blocks = super().open_blocks()
        self._channel.register(shape, {"layer0": torch.from_numpy(blocks)})
        return blocks

    def hello(self) -> object:
        return self._channel.address

    def meet(self, theirs: Any) -> None:  # noqa: ANN401 - what `hello` gave
        self._channel.add_peer(1 if self.sends else 0, theirs)
        if not self.sends:
            return
        path = self._channel.connect(1).path
        if not path.startswith(self._transport):
            raise DistributedRuntimeError(
                f"the path is {path}, not {self._transport}: {self._channel.explain(1)}"
            )

    def begin(self, turn: Turn) -> None:
        key = TransferKey(f"turn-{turn.number}")
        if self.sends:
            self._handle = self._channel.transfer(turn.source, 1, key=key, deadline_s=_DEADLINE_S)
        else:
            self._handle = self._channel.receive(
                key, turn.target, source_node=0, deadline_s=_DEADLINE_S
            )

    def finish(self, turn: Turn) -> None:
        self._handle.wait()
        self._channel.poll()

    def close(self) -> None:
        self._channel.close()


class ManyTransfers(Channel):
    """The turn's blocks in many transfers.

    Args:
        role: P or D.
        case: With regions; `transfers` says how many.
        host: Address to listen on.
        concurrent: All at once, or one after the other.
        transport: As for `Channel`.
        settings: As for `Channel`.

    """

    def __init__(
        self,
        role: str,
        case: Mapping[str, Any],
        host: str,
        *,
        concurrent: bool,
        transport: str,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._concurrent = concurrent
        super().__init__(role, case, host, transport=transport, settings=settings)

    def begin(self, turn: Turn) -> None:
        return None

    def finish(self, turn: Turn) -> None:
        count = self.case["transfers"]
        ids = (turn.source if self.sends else turn.target).reshape(count, -1)
        started = []
        for i, part in enumerate(ids):
            key = TransferKey(f"turn-{turn.number}-{i}")
            if self.sends:
                handle = self._channel.transfer(part, 1, key=key, deadline_s=_DEADLINE_S)
            else:
                handle = self._channel.receive(key, part, source_node=0, deadline_s=_DEADLINE_S)
            if self._concurrent:
                started.append(handle)
            else:
                handle.wait()
        for handle in started:
            handle.wait()
        self._channel.poll()
