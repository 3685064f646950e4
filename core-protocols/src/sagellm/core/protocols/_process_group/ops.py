"""The operations of `CommBackendProtocol` over a `Transport`: checks, lowering, buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from sagellm.core.protocols.errors import ConfigError, IntegrityError
from sagellm.core.protocols.work import Work

from .buffers import is_plain, plain, tangled
from .checks import check_rank, check_same, check_splits, check_tensor
from .core import Started
from .p2p import PointToPointOps
from .part_shapes import MAX_PART_DIMS, part_row, read_part_rows
from .reduce import ReducingOps
from .transport import RawCall

__all__ = ["TensorBackend"]

T = TypeVar("T")


def _nothing() -> None:
    return None


class TensorBackend(ReducingOps, PointToPointOps):
    """Every operation of the protocol, for any transport.

    Subclasses give `_wrap`, and a transport that starts primitive calls.
    """

    # -- moving ---------------------------------------------------------------------------

    def all_gather_into_tensor(
        self, out: Tensor, x: Tensor, *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        check_tensor("x", x, self._device.type)
        check_tensor("out", out, self._device.type, written=True)
        check_same("out", out, x, numel=self._size * x.numel())
        return self._all_gather("all_gather_into_tensor", out, x, lambda: out, async_op, True)

    def all_gather(self, x: Tensor, *, async_op: bool = False) -> list[Tensor] | Work[list[Tensor]]:
        check_tensor("x", x, self._device.type)
        out = self._scratch((self._size, *x.shape), x.dtype)
        return self._all_gather("all_gather", out, x, lambda: list(out.unbind(0)), async_op, False)

    def _all_gather(
        self,
        method: str,
        out: Tensor,
        x: Tensor,
        finish: Callable[[], T],
        async_op: bool,
        in_place: bool,
    ) -> T | Work[T]:
        self._check_move(x)
        lowered = self._offered(method)
        alone = self._size == 1 or x.numel() == 0
        copied = not is_plain(x) or tangled(x, out, self._rank * x.nbytes)
        direct = is_plain(out)

        def start(text: str) -> Started:
            source = plain(x, copied=copied)
            target = out if direct else self._scratch(out.shape, out.dtype)
            call = RawCall(
                "all_gather",
                [source.view(-1)],
                [target.view(-1)],
                timeout_s=self.timeout_s,
                describe=text,
            )
            raws, after = self._issue(method, call)

            def done() -> None:
                after()
                if target is not out:
                    out.copy_(target)

            return raws, done

        return self._run(
            method,
            (x, out),
            start,
            finish,
            async_op=async_op,
            local=(lambda: out.copy_(x.reshape(out.shape))) if alone else None,
            wire_bytes=x.nbytes * self._size,
            copies=0 if alone else copied + (not direct),
            lowered=lowered,
            in_place=in_place,
        )

    def all_to_all_single(
        self,
        out: Tensor,
        x: Tensor,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
        *,
        async_op: bool = False,
    ) -> Tensor | Work[Tensor]:
        method = "all_to_all_single"
        check_tensor("x", x, self._device.type)
        check_tensor("out", out, self._device.type, written=True)
        self._check_move(x)
        ours = check_splits("x", in_splits, x, self._size)
        theirs = check_splits("out", out_splits, out, self._size)
        even = in_splits is None and out_splits is None
        check_same("out", out, x, numel=x.numel() if even else out.numel())
        if x.shape[1:] != out.shape[1:] and not even:
            raise ConfigError(f"rows of x {x.shape[1:]} and out {out.shape[1:]} differ in shape")
        if ours[self._rank] != theirs[self._rank] and not even:
            raise ConfigError(
                f"rank {self._rank} sends itself {ours[self._rank]} rows and "
                f"expects {theirs[self._rank]}"
            )
        lowered = self._offered(method)
        alone = self._size == 1 or (even and x.numel() == 0)
        copied = not is_plain(x) or tangled(x, out)
        direct = is_plain(out)

        def start(text: str) -> Started:
            source = plain(x, copied=copied)
            target = out if direct else self._scratch(out.shape, out.dtype)
            call = RawCall(
                "all_to_all",
                [source],
                [target],
                in_splits=() if even else ours,
                out_splits=() if even else theirs,
                timeout_s=self.timeout_s,
                describe=text,
            )
            raws, after = self._issue(method, call)

            def done() -> None:
                after()
                if target is not out:
                    out.copy_(target)

            return raws, done

        return self._run(
            method,
            (x, out),
            start,
            lambda: out,
            async_op=async_op,
            local=(lambda: out.copy_(x.reshape(out.shape))) if alone else None,
            copies=0 if alone else copied + (not direct),
            lowered=lowered,
            in_place=True,
        )

    def all_to_all(
        self, xs: Sequence[Tensor], *, async_op: bool = False
    ) -> list[Tensor] | Work[list[Tensor]]:
        parts = self._check_parts("xs", xs, even=not self.spec.capabilities.uneven)
        if self.spec.capabilities.uneven:
            shapes = self._exchange_shapes(parts)
        else:
            shapes = [tuple(parts[0].shape)] * self._size
        in_splits = [p.numel() for p in parts]
        out_splits = [math.prod(shape) for shape in shapes]
        x = torch.cat([p.reshape(-1) for p in parts])
        out = self._scratch((sum(out_splits),), x.dtype)
        even = len({*in_splits, *out_splits}) == 1 and not self.spec.capabilities.uneven
        self._check_move(x)
        lowered = self._offered("all_to_all")

        def start(text: str) -> Started:
            call = RawCall(
                "all_to_all",
                [x],
                [out],
                in_splits=() if even else in_splits,
                out_splits=() if even else out_splits,
                timeout_s=self.timeout_s,
                describe=text,
            )
            return self._issue("all_to_all", call)

        def finish() -> list[Tensor]:
            return [
                part.view(shape)
                for part, shape in zip(torch.split(out, out_splits), shapes, strict=True)
            ]

        alone = self._size == 1 or (even and x.numel() == 0)
        return self._run(
            "all_to_all",
            (x, out),
            start,
            finish,
            async_op=async_op,
            local=(lambda: out.copy_(x)) if alone else None,
            copies=1,
            lowered=lowered,
        )

    def _exchange_shapes(self, parts: list[Tensor]) -> list[tuple[int, ...]]:
        """Shapes that the other ranks have for this one; every rank asks in every call.

        Raises:
            IntegrityError: A peer's answer is no shape, or beyond `MAX_PART_BYTES`; the group
                is dead then, because the peers go on to send.

        """
        if any(p.dim() > MAX_PART_DIMS for p in parts):
            raise ConfigError(
                f"all_to_all of uneven parts takes at most {MAX_PART_DIMS} dimensions"
            )
        if self._size == 1:
            return [tuple(parts[0].shape)]
        itemsize = parts[0].itemsize
        rows = [part_row(p.shape, itemsize) for p in parts]
        mine = torch.tensor(rows, dtype=torch.int64, device=self._device)
        theirs = torch.empty_like(mine)
        work = self.all_to_all_single(theirs, mine, async_op=True)
        assert not isinstance(work, Tensor)
        try:
            shapes = read_part_rows(work.synchronize().tolist(), itemsize)
            if shapes[self._rank] != tuple(parts[self._rank].shape):
                raise IntegrityError(
                    f"rank {self._rank} got {shapes[self._rank]} back for its own part of shape "
                    f"{tuple(parts[self._rank].shape)}"
                )
        except IntegrityError as e:
            text = f"all_to_all of group {self.group_name} (rank {self._rank} of {self._size})"
            raise self._declare_dead(text, IntegrityError(f"{text}: {e}")) from None
        return shapes

    # -- rooted ---------------------------------------------------------------------------

    def broadcast(self, x: Tensor, src: int, *, async_op: bool = False) -> Tensor | Work[Tensor]:
        check_rank("src", src, self._size)
        check_tensor("x", x, self._device.type, written=self._rank != src)
        self._check_move(x)
        lowered = self._offered("broadcast")
        alone = self._size == 1 or x.numel() == 0

        def start(text: str) -> Started:
            buffer = plain(x)
            call = RawCall(
                "broadcast", outputs=[buffer], peer=src, timeout_s=self.timeout_s, describe=text
            )
            raws, after = self._issue("broadcast", call)

            def done() -> None:
                after()
                if buffer is not x and self._rank != src:
                    x.copy_(buffer)

            return raws, done

        return self._run(
            "broadcast",
            (x,),
            start,
            lambda: x,
            async_op=async_op,
            local=_nothing if alone else None,
            peer=src,
            copies=0 if alone or is_plain(x) else 1,
            lowered=lowered,
            in_place=True,
        )

    def gather(
        self, x: Tensor, dst: int, *, async_op: bool = False
    ) -> list[Tensor] | Work[list[Tensor] | None] | None:
        check_rank("dst", dst, self._size)
        check_tensor("x", x, self._device.type)
        self._check_move(x)
        lowered = self._offered("gather")
        alone = self._size == 1 or x.numel() == 0
        root = self._rank == dst
        outs = [self._scratch(x.shape, x.dtype) for _ in range(self._size)] if root else []

        def start(text: str) -> Started:
            call = RawCall(
                "gather", [plain(x)], outs, peer=dst, timeout_s=self.timeout_s, describe=text
            )
            return self._issue("gather", call)

        def local() -> None:
            for out in outs:
                out.copy_(x)

        def finish() -> list[Tensor] | None:
            return outs if root else None

        return self._run(
            "gather",
            (x, *outs),
            start,
            finish,
            async_op=async_op,
            local=local if alone else None,
            wire_bytes=x.nbytes * self._size,
            peer=dst,
            copies=0 if alone or is_plain(x) else 1,
            lowered=lowered,
        )

    def scatter(
        self, out: Tensor, xs: Sequence[Tensor] | None, src: int, *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        check_rank("src", src, self._size)
        check_tensor("out", out, self._device.type, written=True)
        self._check_move(out)
        parts: list[Tensor] = []
        if self._rank == src:
            if xs is None:
                raise ConfigError(f"rank {src} is the root of scatter and must pass xs")
            parts = self._check_parts("xs", xs, even=True)
            check_same("xs[0]", parts[0], out, numel=out.numel())
        lowered = self._offered("scatter")
        alone = self._size == 1 or out.numel() == 0
        strided = sum(not is_plain(p) for p in parts)
        own = [0 if r == self._rank else None for r in range(len(parts))]
        direct = is_plain(out) and not any(map(tangled, parts, [out] * len(parts), own))

        def start(text: str) -> Started:
            target = out if direct else self._scratch(out.shape, out.dtype)
            sources = [plain(p).view(target.shape) for p in parts]
            call = RawCall(
                "scatter", sources, [target], peer=src, timeout_s=self.timeout_s, describe=text
            )
            raws, after = self._issue("scatter", call)

            def done() -> None:
                after()
                if target is not out:
                    out.copy_(target)

            return raws, done

        return self._run(
            "scatter",
            (out, *parts),
            start,
            lambda: out,
            async_op=async_op,
            local=(lambda: out.copy_(parts[0].reshape(out.shape)) if parts else None)
            if alone
            else None,
            wire_bytes=out.nbytes * self._size,
            peer=src,
            copies=0 if alone else strided + (not direct),
            lowered=lowered,
            in_place=True,
        )

    # -- the group ------------------------------------------------------------------------

    def barrier(
        self, timeout_s: float | None = None, *, async_op: bool = False
    ) -> Work[None] | None:
        limit = self.timeout_s if timeout_s is None else timeout_s
        if not limit > 0:
            raise ConfigError(f"timeout_s must be above 0, got {timeout_s}")
        lowered = self._offered("barrier")

        def start(text: str) -> Started:
            return self._issue("barrier", RawCall("barrier", timeout_s=limit, describe=text))

        return self._run(
            "barrier",
            (),
            start,
            _nothing,
            async_op=async_op,
            local=_nothing if self._size == 1 else None,
            lowered=lowered,
            timeout_s=limit,
        )
