"""The transfer engines that this package is compared with: NIXL and Mooncake."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from ._plain import Bell
from ._turns import Turn
from ._worker import End

__all__ = ["Mooncake", "Nixl"]

_BATCH = 1024  # a batch of more than some 2048 requests fails and writes on: 0.3.13


class Mooncake(End):
    """P writes in batches over TCP, then tells D."""

    def __init__(self, role: str, case: Mapping[str, Any], host: str) -> None:
        from mooncake.engine import (  # type: ignore[import-untyped,import-not-found,unused-ignore]  # no types
            TransferEngine,
        )

        super().__init__(role, case, host)
        self._bell = Bell(self.sends, host)
        self._engine = TransferEngine()
        _check(self._engine.initialize(host, "P2PHANDSHAKE", "tcp", ""), "initialize")
        self._base = self.blocks.ctypes.data
        code = self._engine.register_memory(self._base, self.blocks.nbytes)
        _check(code, "register_memory")
        self._there = ("", 0)

    def hello(self) -> object:
        name = f"{self.host}:{self._engine.get_rpc_port()}"
        return name, self._base, self._bell.hello()

    def meet(self, theirs: Any) -> None:  # noqa: ANN401 - what `hello` gave
        name, base, where = theirs
        self._there = (name, base)
        self._bell.meet(where)

    def finish(self, turn: Turn) -> None:
        if not self.sends:
            self._bell.wait()
            return
        name, base = self._there
        block = self.case["block_bytes"]
        sources = (turn.source * block + self._base).tolist()
        targets = (turn.target * block + base).tolist()
        for i in range(0, len(sources), _BATCH):
            part = sources[i : i + _BATCH]
            lengths = [block] * len(part)
            code = self._engine.batch_transfer_sync_write(
                name, part, targets[i : i + _BATCH], lengths
            )
            _check(code, "batch_transfer_sync_write")
        self._bell.ring()

    def close(self) -> None:
        self._engine.unregister_memory(self._base)
        self._bell.close()


def _check(code: int, what: str) -> None:
    if code != 0:
        raise RuntimeError(f"{what} gave {code}")


class Nixl(End):
    """One side moves the blocks, by descriptors of the whole pool that were prepared once.

    Args:
        role: P or D.
        case: With regions.
        host: Address.
        progress_thread: Whether the library's thread polls, which is its default.
        how: `read`: D reads, as vLLM does. `told`: so it does, but begins only when P says, by a
            byte on a socket, that it has the blocks. `write`: P writes, and a notification that
            comes after the bytes tells D.

    """

    def __init__(
        self,
        role: str,
        case: Mapping[str, Any],
        host: str,
        *,
        progress_thread: bool,
        how: str = "read",
    ) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
        os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
        from nixl_cu12._api import (  # type: ignore[import-untyped,import-not-found,unused-ignore]  # no types
            nixl_agent,
            nixl_agent_config,
        )

        super().__init__(role, case, host)
        self._bell = Bell(self.sends, host) if how == "told" else None
        self._threaded = progress_thread
        self._operation = "WRITE" if how == "write" else "READ"
        self._moves = self.sends == (how == "write")
        config = nixl_agent_config(enable_prog_thread=progress_thread, backends=["UCX"])
        self._agent = nixl_agent(role, config)
        base, block = self.blocks.ctypes.data, case["block_bytes"]
        self._memory = self._agent.register_memory([(base, self.blocks.nbytes, 0, "")], "DRAM")
        self._rows = [(base + i * block, block, 0) for i in range(len(self.blocks))]
        self._handle: Any = None  # NIXL's

    def hello(self) -> object:
        where = self._bell.hello() if self._bell is not None else None
        return self._agent.get_agent_metadata(), self._rows, where

    def meet(self, theirs: Any) -> None:  # noqa: ANN401 - what `hello` gave
        metadata, rows, where = theirs
        if self._bell is not None:
            self._bell.meet(where)
        self._peer = self._agent.add_remote_agent(metadata)
        if self._moves:
            self._ours = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", self._rows, "DRAM")
            self._theirs = self._agent.prep_xfer_dlist(self._peer, rows, "DRAM")

    def finish(self, turn: Turn) -> None:
        if self._bell is not None:
            (self._bell.ring if self.sends else self._bell.wait)()
        if not self._moves:
            self._wait_notified()
            return
        ours, theirs = turn.source, turn.target
        if not self.sends:
            ours, theirs = theirs, ours
        handle = self._agent.make_prepped_xfer(
            self._operation, self._ours, ours, self._theirs, theirs, b"done"
        )
        state = self._agent.transfer(handle)
        while state == "PROC":
            time.sleep(0)
            state = self._agent.check_xfer_state(handle)
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL's {self._operation} ended in {state}")

    def _wait_notified(self) -> None:
        """P learns when it may give its blocks back, which is in no hurry; D waits for data."""
        end = time.monotonic() + 60
        while not self._agent.get_new_notifs():
            if time.monotonic() > end:
                raise TimeoutError("NIXL sent no notification")
            # without a thread of its own the library moves only when asked
            time.sleep(0.0005 if self._threaded and self.sends else 0)

    def close(self) -> None:
        if hasattr(self, "_ours"):
            self._agent.release_dlist_handle(self._ours)
            self._agent.release_dlist_handle(self._theirs)
        self._agent.deregister_memory(self._memory)
        if self._bell is not None:
            self._bell.close()
