"""Many small all_reduces as few large ones, with the same results."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from sagellm.core.protocols import CommBackendProtocol, ConfigError, ReduceOp, Work

__all__ = ["FusedAllReduce", "fused_all_reduce"]

_BUCKET_BYTES = 1 << 20
"""For 200 tensors of 4-64 KiB over gloo, 1 MiB buckets were as good as one (2-core x86-64)."""


class FusedAllReduce:
    """Collects tensors and reduces them together; each tensor is replaced by its reduction.

    A bucket is sent when it holds `bucket_bytes`, or `max_tensors`, or when a tensor of another
    dtype or reduction comes, or on `flush`. Every rank adds the same tensors in the same order.
    Elementwise reductions do not depend on what lies beside an element; a ring may still add
    ranks in another order at another offset, so float sums can differ in the last bit.

    Args:
        backend: Whose `all_reduce` is used.
        bucket_bytes: Bytes at which a bucket is sent.
        max_tensors: Tensors at which a bucket is sent.

    """

    def __init__(
        self,
        backend: CommBackendProtocol,
        *,
        bucket_bytes: int = _BUCKET_BYTES,
        max_tensors: int = 1024,
    ) -> None:
        if bucket_bytes < 1 or max_tensors < 1:
            raise ConfigError(
                f"bucket_bytes {bucket_bytes} and max_tensors {max_tensors} must be at least 1"
            )
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._max_tensors = max_tensors
        self._pending: list[_Member] = []
        self._bytes = 0
        self._flights: list[_Flight] = []
        self.buckets_sent = 0

    def add(self, x: Tensor, op: str | ReduceOp = "sum") -> Work[Tensor]:
        """Queue `x`; the work is done once its bucket is, and waiting for it sends the bucket."""
        reduction = ReduceOp.of(op)
        member = _Member(self, x, reduction)
        if self._pending and not member.fits(self._pending[0]):
            self._send()
        self._pending.append(member)
        self._bytes += x.nbytes
        if self._bytes >= self._bucket_bytes or len(self._pending) >= self._max_tensors:
            self._send()
        return member

    def flush(self, timeout_s: float | None = None) -> None:
        """Send what is queued and wait for everything that was added so far."""
        self._send()
        flights, self._flights = self._flights, []
        for flight in flights:
            flight.land(timeout_s)

    def __enter__(self) -> FusedAllReduce:
        """Return itself; the block's end flushes."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Flush, unless the block failed."""
        if kind is None:
            self.flush()

    def _send(self) -> None:
        members, self._pending, self._bytes = self._pending, [], 0
        if not members:
            return
        self._flights = [f for f in self._flights if not f.landed]
        self._flights.append(_Flight(self._backend, members))
        self.buckets_sent += 1


class _Flight:
    """One bucket on its way."""

    def __init__(self, backend: CommBackendProtocol, members: Sequence[_Member]) -> None:
        self._tensors = [m.x for m in members]
        alone = len(members) == 1
        self._flat = (
            self._tensors[0] if alone else torch.cat([x.reshape(-1) for x in self._tensors])
        )
        self._copies_back = not alone
        self.landed = False
        work = backend.all_reduce(self._flat, members[0].op, async_op=True)
        assert not isinstance(work, Tensor)
        self.work: Work[Tensor] = work
        for member in members:
            member.flight = self

    def land(self, timeout_s: float | None, *, host: bool = False) -> None:
        """Wait, and put the parts where they belong."""
        if self.landed:
            return
        if host:
            self.work.synchronize(timeout_s)
        else:
            self.work.wait(timeout_s)
        if self._copies_back:
            parts = torch.split(self._flat, [x.numel() for x in self._tensors])
            for x, part in zip(self._tensors, parts, strict=True):
                x.copy_(part.view_as(x))
        self.landed = True


class _Member:
    """The `Work` of one tensor of a bucket."""

    def __init__(self, owner: FusedAllReduce, x: Tensor, op: ReduceOp) -> None:
        self._owner = owner
        self.x = x
        self.op = op
        self.flight: _Flight | None = None

    def fits(self, other: _Member) -> bool:
        """Whether both may share a bucket."""
        same = self.x.dtype == other.x.dtype and self.x.device == other.x.device
        return same and self.op is other.op

    def _sent(self) -> _Flight:
        if self.flight is None:
            self._owner._send()
        assert self.flight is not None
        return self.flight

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """Send the bucket if it has not been, and wait for it."""
        self._sent().land(timeout_s)
        return self.x

    def synchronize(self, timeout_s: float | None = None) -> Tensor:
        """As `wait`, blocking the host."""
        self._sent().land(timeout_s, host=True)
        return self.x

    def done(self) -> bool:
        """Whether the bucket is done; False while it has not been sent."""
        return self.flight is not None and (self.flight.landed or self.flight.work.done())

    def exception(self) -> BaseException | None:
        """What the bucket failed with."""
        return None if self.flight is None else self.flight.work.exception()

    def result(self) -> Tensor:
        """The reduced tensor of a finished bucket."""
        return self.wait(0)

    def get_future(self) -> torch.futures.Future[Any]:  # torch fixes the value type per backend
        """A torch future of the bucket, whose value is this tensor."""
        flight = self._sent()

        def land(_: torch.futures.Future[Any]) -> Tensor:
            flight.land(None)
            return self.x

        future: torch.futures.Future[Any] = flight.work.get_future().then(land)
        return future

    def __await__(self) -> Generator[Any, None, Tensor]:
        """Wait without blocking the event loop."""
        flight = self._sent()
        yield from flight.work.__await__()
        flight.land(None)
        return self.x


def fused_all_reduce(
    backend: CommBackendProtocol,
    tensors: Sequence[Tensor],
    op: str | ReduceOp = "sum",
    *,
    bucket_bytes: int = _BUCKET_BYTES,
) -> Sequence[Tensor]:
    """Replace every tensor by its reduction over ranks, in few calls; returns `tensors`.

    Args:
        backend: Whose `all_reduce` is used.
        tensors: Same shapes and order on every rank; dtypes may be mixed
            and are grouped.
        op: Reduction.
        bucket_bytes: Bytes at which a bucket is sent.

    """
    with FusedAllReduce(backend, bucket_bytes=bucket_bytes) as fused:
        for x in sorted(tensors, key=lambda x: str(x.dtype)):
            fused.add(x, op)
    return tensors
