"""Contenders without a transfer library: a copy, a socket, gloo and ZeroMQ."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm.core.protocols import DistributedRuntimeError

from ._turns import MIB, Blocks, Region, Turn
from ._worker import End

if TYPE_CHECKING:
    from torch.distributed import Work

__all__ = ["Bell", "Gloo", "GlooGathered", "Memcpy", "PlainSocket", "ZeroMQ"]

_WAIT_S = 60.0
_DEEP = 32


class Bell:
    """One byte from P to D: what is to be known is known."""

    def __init__(self, sends: bool, host: str) -> None:
        self._sends = sends
        self._socket: socket.socket | None = None
        self._listener = None if sends else socket.create_server((host, 0))

    def hello(self) -> tuple[str, int] | None:
        """Where D listens."""
        if self._listener is None:
            return None
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def meet(self, where: tuple[str, int] | None) -> socket.socket:
        """Connect; the socket is there for other bytes, too."""
        if self._listener is not None:
            self._listener.settimeout(_WAIT_S)
            self._socket, _ = self._listener.accept()
        else:
            assert where is not None, "D says where it listens"
            self._socket = socket.create_connection(where, _WAIT_S)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    def ring(self) -> None:
        """Tell D."""
        assert self._socket is not None, "not connected"
        self._socket.sendall(b"x")

    def wait(self) -> None:
        """Wait for P."""
        assert self._socket is not None, "not connected"
        if not self._socket.recv(1):
            raise ConnectionResetError("P is gone")

    def close(self) -> None:
        """Release it."""
        for sock in (self._socket, self._listener):
            if sock is not None:
                sock.close()


class Memcpy(End):
    """`copy_` of one stretch of the source's memory, by one thread of D: a bound."""

    random = False

    def __init__(self, role: str, case: Mapping[str, Any], host: str) -> None:
        import torch

        super().__init__(role, case, host)
        count = case["nbytes"] // case["block_bytes"]
        source = Region.open(case["source"], case["block_bytes"])
        self._from = torch.from_numpy(source[:count])
        self._into = torch.from_numpy(self.blocks[:count])

    def finish(self, turn: Turn) -> None:
        if not self.sends:
            self._into.copy_(self._from)


class PlainSocket(End):
    """As many bytes, contiguous on both sides, over one TCP connection: a bound."""

    random = False

    def __init__(self, role: str, case: Mapping[str, Any], host: str) -> None:
        super().__init__(role, case, host)
        self._bell = Bell(self.sends, host)
        self._flat = self.blocks.reshape(-1)[: case["nbytes"]].data

    def hello(self) -> object:
        return self._bell.hello()

    def meet(self, theirs: Any) -> None:  # noqa: ANN401 - what `hello` gave
        self._socket = self._bell.meet(theirs)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, option, MIB)

    def finish(self, turn: Turn) -> None:
        if self.sends:
            self._socket.sendall(self._flat)
            return
        got = 0
        while got < len(self._flat):
            moved = self._socket.recv_into(self._flat[got:])
            if not moved:
                raise ConnectionResetError("P is gone")
            got += moved

    def close(self) -> None:
        self._bell.close()


class Gloo(End):
    """`isend` and `irecv` of each block, some in flight at a time."""

    def __init__(self, role: str, case: Mapping[str, Any], host: str) -> None:
        import torch

        super().__init__(role, case, host)
        self._tensor = torch.from_numpy(self.blocks)
        self._folder = tempfile.TemporaryDirectory(prefix="sagellm-bench-") if self.sends else None

    def hello(self) -> object:
        return str(Path(self._folder.name) / "store") if self._folder is not None else None

    def meet(self, theirs: Any) -> None:  # noqa: ANN401 - what `hello` gave
        import torch.distributed as dist
        from torch._C._distributed_c10d import FileStore

        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        path = str(self.hello() or theirs)
        rank = 0 if self.sends else 1
        dist.init_process_group("gloo", store=FileStore(path, 2), rank=rank, world_size=2)

    def finish(self, turn: Turn) -> None:
        import torch.distributed as dist

        ids = (turn.source if self.sends else turn.target).tolist()
        move, other = (dist.isend, 1) if self.sends else (dist.irecv, 0)
        flying = []
        for i in ids:
            flying.append(move(self._tensor[i], other))
            if len(flying) >= _DEEP:
                _wait(flying.pop(0))
        for work in flying:
            _wait(work)

    def close(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        if self._folder is not None:
            self._folder.cleanup()


def _wait(work: Work | None) -> None:
    assert work is not None, "this process is in the group"
    work.wait()


class GlooGathered(Gloo):
    """Blocks gathered into messages of 32 MiB, and scattered from them."""

    def __init__(self, role: str, case: Mapping[str, Any], host: str) -> None:
        import torch

        super().__init__(role, case, host)
        self._per_message = max(1, 32 * MIB // case["block_bytes"])
        self._spare = torch.empty((self._per_message, case["block_bytes"]), dtype=torch.uint8)
        self._spare.fill_(0)

    def finish(self, turn: Turn) -> None:
        import torch
        import torch.distributed as dist

        ids = torch.from_numpy(turn.source if self.sends else turn.target)
        for part in torch.split(ids, self._per_message):
            spare = self._spare[: len(part)]
            if self.sends:
                torch.index_select(self._tensor, 0, part, out=spare)
                dist.send(spare, 1)
            else:
                dist.recv(spare, 0)
                self._tensor.index_copy_(0, part, spare)


class ZeroMQ(End):
    """A message per block over TCP, sent without a copy and received straight into its block."""

    def __init__(self, role: str, case: Mapping[str, Any], host: str) -> None:
        import zmq  # type: ignore[import-not-found,unused-ignore]  # a peer of benchmarks only

        super().__init__(role, case, host)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._port = 0 if self.sends else self._socket.bind_to_random_port(f"tcp://{host}")

    def hello(self) -> object:
        return f"tcp://{self.host}:{self._port}"

    def meet(self, theirs: Any) -> None:  # noqa: ANN401 - what `hello` gave
        if self.sends:
            self._socket.connect(theirs)

    def finish(self, turn: Turn) -> None:
        blocks: Blocks = self.blocks
        if self.sends:
            for i in turn.source.tolist():
                self._socket.send(memoryview(blocks[i]), copy=False)
            return
        for i in turn.target.tolist():
            if (got := self._socket.recv_into(blocks[i].data)) != blocks.shape[1]:
                raise DistributedRuntimeError(f"a message of {got} bytes for block {i}")

    def close(self) -> None:
        self._socket.close()
        self._context.term()
