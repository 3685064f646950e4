"""Point-to-point operations, batches of them, and KV blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sagellm.core.protocols.comm_types import KVBlock, P2POp
from sagellm.core.protocols.errors import ConfigError
from sagellm.core.protocols.work import Work

from .buffers import is_plain, plain
from .checks import check_peer, check_tensor
from .core import BackendCore, Started
from .kv import KV_TAG, KVReceive, send_calls
from .transport import RawCall, RawWork

__all__ = ["PointToPointOps"]

_MAX_TAG = 1 << 16


def _nothing() -> None:
    return None


class PointToPointOps(BackendCore):
    """send, recv, batch_p2p, send_kv_blocks and recv_kv_blocks."""

    def send(
        self, x: Tensor, dst: int, tag: int = 0, *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        return self._point_to_point("send", x, dst, tag, async_op)

    def recv(
        self, x: Tensor, src: int, tag: int = 0, *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        return self._point_to_point("recv", x, src, tag, async_op)

    def _point_to_point(
        self, method: str, x: Tensor, peer: int, tag: int, async_op: bool
    ) -> Tensor | Work[Tensor]:
        call, done = self._p2p_call(method, x, peer, tag)

        def start(text: str) -> Started:
            call.describe, call.background = text, self._background
            return [self._transport.issue(call)], done

        return self._run(
            method,
            (x,),
            start,
            lambda: x,
            async_op=async_op,
            local=_nothing if x.numel() == 0 else None,
            peer=peer,
            copies=0 if is_plain(x) else 1,
        )

    def _p2p_call(
        self, method: str, x: Tensor, peer: int, tag: int
    ) -> tuple[RawCall, Callable[[], None]]:
        check_peer("dst" if method == "send" else "src", peer, self._rank, self._size)
        check_tensor("x", x, self._device.type, written=method == "recv")
        self._check_move(x)
        self._offered(method)
        if not 0 <= tag < _MAX_TAG or tag == KV_TAG:
            raise ConfigError(f"tag {tag} is not in 0..{_MAX_TAG - 1}, or is {KV_TAG}, kept for KV")
        receiving = method == "recv"
        if receiving:
            buffer = x if is_plain(x) else self._scratch(x.shape, x.dtype)
        else:
            buffer = plain(x)
        call = RawCall(
            method,
            [] if receiving else [buffer],
            [buffer] if receiving else [],
            peer=peer,
            tag=tag,
            timeout_s=self.timeout_s,
            device=self._device,
        )

        def done() -> None:
            if receiving and buffer is not x:
                x.copy_(buffer)

        return call, done

    def batch_p2p(self, ops: Sequence[P2POp]) -> list[Work[Tensor]]:
        prepared = [self._p2p_call(op.kind, op.tensor, op.peer, op.tag) for op in ops]
        live = [i for i, op in enumerate(ops) if op.tensor.numel()]
        started: dict[int, RawWork] = {}

        def start_all(text: str) -> None:
            for i in live:
                prepared[i][0].describe = text
                prepared[i][0].background = True
            raws = self._transport.issue_batch([prepared[i][0] for i in live])
            started.update(zip(live, raws, strict=True))

        works: list[Work[Tensor]] = []
        for i, op in enumerate(ops):

            def start(text: str, i: int = i) -> Started:
                if not started:
                    start_all(text)
                return [started[i]], prepared[i][1]

            work = self._run(
                op.kind,
                (op.tensor,),
                start,
                lambda x=op.tensor: x,  # type: ignore[misc]  # mypy cannot type a lambda's default
                async_op=True,
                local=_nothing if op.tensor.numel() == 0 else None,
                peer=op.peer,
                copies=0 if is_plain(op.tensor) else 1,
            )
            assert not isinstance(work, Tensor)
            works.append(work)
        return works

    def send_kv_blocks(
        self, blocks: Sequence[KVBlock | Tensor], dst: int, *, async_op: bool = False
    ) -> Sequence[KVBlock] | Work[Sequence[KVBlock]]:
        check_peer("dst", dst, self._rank, self._size)
        wrapped = [b if isinstance(b, KVBlock) else KVBlock(b) for b in blocks]
        for i, block in enumerate(wrapped):
            check_tensor(f"blocks[{i}]", block.tensor, self._device.type)
        calls = send_calls(wrapped, dst, self.timeout_s, self._device, "")

        def start(text: str) -> Started:
            for call in calls:
                call.describe, call.background = text, self._background
            return [self._transport.issue(call) for call in calls], _nothing

        def finish() -> Sequence[KVBlock]:
            return wrapped

        return self._run(
            "send_kv_blocks",
            tuple(b.tensor for b in wrapped),
            start,
            finish,
            async_op=async_op,
            nbytes=sum(b.tensor.nbytes for b in wrapped),
            peer=dst,
            copies=sum(not is_plain(b.tensor) for b in wrapped),
        )

    def recv_kv_blocks(
        self, src: int, *, async_op: bool = False
    ) -> Sequence[KVBlock] | Work[Sequence[KVBlock]]:
        check_peer("src", src, self._rank, self._size)
        holder: list[KVReceive] = []

        def start(text: str) -> Started:
            earlier = self._kv_receives.get(src)
            receive = KVReceive(self._transport, src, self.timeout_s, text, earlier)
            self._kv_receives[src] = receive
            holder.append(receive)
            return [receive], _nothing

        def finish() -> Sequence[KVBlock]:
            return holder[0].result()

        return self._run("recv_kv_blocks", (), start, finish, async_op=async_op, peer=src)
