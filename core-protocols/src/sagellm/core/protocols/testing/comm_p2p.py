"""Checks of point-to-point operations and of KV blocks."""

from __future__ import annotations

import torch

from sagellm.core.protocols.comm_types import KVBlock, P2POp

from .contract import Check
from .ranks import Ranks, expect_equal, values

__all__ = ["checks"]


def _send_recv(r: Ranks) -> None:
    """Around a ring, even ranks sending first."""
    after, before = (r.rank + 1) % r.size, (r.rank - 1) % r.size
    for dtype in ("float32", "bfloat16", "int64", "bool"):
        x, y = r.mine(33, dtype), torch.zeros_like(r.mine(33, dtype))

        def send(x: torch.Tensor = x, dtype: str = dtype) -> object:
            return r.attempt("send", dtype, call=lambda: r.backend.send(x, after))

        def recv(y: torch.Tensor = y, dtype: str = dtype) -> object:
            return r.attempt("recv", dtype, call=lambda: r.backend.recv(y, before))

        steps = (send, recv) if r.rank % 2 == 0 else (recv, send)
        results = [step() for step in steps]
        if y is not results[steps.index(recv)]:
            raise AssertionError("recv did not return the tensor that it filled")
        expect_equal(y, r.input(before, 33, dtype), f"recv of {dtype} from {before}")


def _send_recv_async(r: Ranks) -> None:
    after, before = (r.rank + 1) % r.size, (r.rank - 1) % r.size
    x, y = r.mine((4, 6)), torch.zeros(6, 4, device=r.device).t()  # y is not contiguous
    receiving = r.attempt("recv", call=lambda: r.backend.recv(y, before, async_op=True))
    sending = r.attempt("send", call=lambda: r.backend.send(x, after, async_op=True))
    sending.wait(r.timeout_s)  # type: ignore[union-attr]  # a Work: async_op is True
    receiving.wait(r.timeout_s)  # type: ignore[union-attr]  # as above
    expect_equal(y, values(before, (4, 6)), "asynchronous recv into a strided tensor")


def _order(r: Ranks) -> None:
    """Messages of one pair and tag arrive in the order of the sends."""
    n = 20
    if r.rank == 0:
        works = [
            r.attempt(
                "send",
                call=lambda i=i: r.backend.send(r.mine(3, salt=i), 1, async_op=True),  # type: ignore[misc]  # default binds i
            )
            for i in range(n)
        ]
        for work in works:
            work.wait(r.timeout_s)  # type: ignore[union-attr]  # a Work
    elif r.rank == 1:
        for i in range(n):
            y = torch.zeros(3, device=r.device)
            r.attempt("recv", call=lambda y=y: r.backend.recv(y, 0))  # type: ignore[misc]  # default binds y
            expect_equal(y, values(0, 3, i), f"message {i}")


def _batch_crossing(r: Ranks) -> None:
    """Everybody sends to everybody, receives listed last on some ranks and first on others."""
    sizes = {k: 5 + k for k in range(r.size)}
    outs = {k: torch.zeros(sizes[k], device=r.device) for k in r.others}
    sends = [P2POp("send", r.mine(sizes[r.rank]), k) for k in r.others]
    recvs = [P2POp("recv", outs[k], k) for k in reversed(r.others)]
    ops = sends + recvs if r.rank % 2 else recvs + sends
    works = r.attempt("batch_p2p", "send", "recv", call=lambda: r.backend.batch_p2p(ops))
    if len(works) != len(ops):
        raise AssertionError(f"batch_p2p gave {len(works)} works for {len(ops)} operations")
    for work, op in zip(works, ops, strict=True):
        if work.wait(r.timeout_s) is not op.tensor:
            raise AssertionError("a work of batch_p2p does not give its operation's tensor")
    for k, out in outs.items():
        expect_equal(out, values(k, sizes[k]), f"batch_p2p from {k}")


def _batch_large(r: Ranks) -> None:
    """More than a socket buffer in both directions at once."""
    peer = r.rank ^ 1
    if peer >= r.size:
        return
    n = 1 << 20
    out = torch.zeros(n, device=r.device)
    ops = [P2POp("send", r.mine(n), peer), P2POp("recv", out, peer)]
    for work in r.attempt("batch_p2p", "send", "recv", call=lambda: r.backend.batch_p2p(ops)):
        work.wait(r.timeout_s)
    expect_equal(out, values(peer, n), f"1 MiB elements from {peer}")


def _kv(r: Ranks, async_op: bool) -> None:
    shapes = [((2, 4, 3), "float32"), ((7,), "bfloat16"), ((1, 1), "int8"), ((0, 3), "float16")]

    def block(i: int) -> KVBlock:
        shape, dtype = shapes[i]
        return KVBlock(r.input(0, shape, dtype, salt=i), layer=i, index=10 + i)

    blocks: list[KVBlock | torch.Tensor] = [block(i) for i in range(len(shapes))]
    strided = r.input(0, (6, 4), "float32").t()
    if r.rank == 0:
        result = r.attempt(
            "send_kv_blocks",
            call=lambda: r.backend.send_kv_blocks([*blocks, strided], 1, async_op=async_op),
        )
        if async_op:
            result.wait(r.timeout_s)  # type: ignore[union-attr]  # a Work
    elif r.rank == 1:
        received = r.attempt(
            "recv_kv_blocks", call=lambda: r.backend.recv_kv_blocks(0, async_op=async_op)
        )
        if async_op:
            received = received.wait(r.timeout_s)  # type: ignore[union-attr]  # a Work
        if len(received) != len(blocks) + 1:  # type: ignore[arg-type]  # a sequence by now
            raise AssertionError(f"{len(received)} blocks arrived of {len(blocks) + 1}")  # type: ignore[arg-type]
        for i, (shape, dtype) in enumerate(shapes):
            got = received[i]  # type: ignore[index]  # a sequence by now
            if (got.layer, got.index) != (i, 10 + i):
                raise AssertionError(f"block {i} says layer {got.layer}, index {got.index}")
            if str(got.tensor.dtype) != f"torch.{dtype}":
                raise AssertionError(f"block {i} is {got.tensor.dtype}, not {dtype}")
            expect_equal(got.tensor, r.input(0, shape, dtype, salt=i), f"KV block {i}")
        last = received[len(shapes)]  # type: ignore[index]  # a sequence by now
        expect_equal(last.tensor, strided, "a KV block that was not contiguous")


def _kv_sync(r: Ranks) -> None:
    _kv(r, False)


def _kv_async(r: Ranks) -> None:
    _kv(r, True)


def _kv_none(r: Ranks) -> None:
    if r.rank == 0:
        r.attempt("send_kv_blocks", call=lambda: r.backend.send_kv_blocks([], 1))
    elif r.rank == 1:
        received = r.attempt("recv_kv_blocks", call=lambda: r.backend.recv_kv_blocks(0))
        if list(received) != []:  # type: ignore[arg-type]  # not a Work: async_op is False
            raise AssertionError(f"no blocks were sent, and {received!r} arrived")


def checks() -> list[Check]:
    """The point-to-point checks, in a stable order."""
    return [
        Check("send and recv", _send_recv, min_size=2),
        Check("send and recv, asynchronous", _send_recv_async, min_size=2),
        Check("messages arrive in order", _order, min_size=2),
        Check("batch_p2p in crossing orders", _batch_crossing, min_size=2),
        Check("batch_p2p of large tensors", _batch_large, min_size=2),
        Check("kv blocks", _kv_sync, min_size=2),
        Check("kv blocks, asynchronous", _kv_async, min_size=2),
        Check("kv blocks, none", _kv_none, min_size=2),
    ]
