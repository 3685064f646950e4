"""Many small all_reduces as few large ones, with the same results."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sagellm.core.protocols import CommBackendProtocol, CompletedWork, ConfigError, ReduceOp, Work

from ._fusion_bucket import Flight, Homes
from ._fusion_threshold import FusionThreshold, find_threshold

__all__ = ["FusedAllReduce", "fused_all_reduce"]

_BUCKET_BYTES = 8 << 20
"""Of tensors that come one by one; over gloo, calls of 1 to 8 MiB carry as much a second, and each
bucket more costs a hand-over between threads (2-core x86-64)."""

_IN_FLIGHT = 2
"""Buckets of a list on their way while the next one is filled."""

_RATE_EVERY = 16
"""Buckets between two agreements on what an age is in tensors."""


class FusedAllReduce:
    """Collects tensors and reduces them together; each tensor is replaced by its reduction.

    A bucket is sent when it holds `bucket_bytes`, or `max_tensors`, or when a tensor of another
    dtype or reduction comes, or when it is too old, or on `flush` and on a wait for one of its
    tensors. A tensor that gains nothing by company is sent at once and by itself; on a backend
    with low latency that is every tensor. Every rank adds the same tensors in the same order,
    and makes the same waits and other calls of the backend between them.

    When a bucket is sent has to be the same on all ranks, and their clocks are not. So
    `max_age_s` is turned into a number of tensors: rank 0 measures how fast tensors come and
    tells the others, right after a bucket; from the next bucket on all ranks send when that many
    have been added since the bucket's first, fused or not. No clock of another rank decides
    anything, and no thread runs. Where no more tensors come, the wait for one of them sends.

    Reductions are elementwise. A backend that adds in rank order (`shm`, `mock`, and any with
    two ranks) gives the bits of unfused calls; a ring over more ranks may add them in another
    order at another offset, so that the last bit of a float sum can differ.

    Args:
        backend: Whose `all_reduce` is used; one thread at a time, as for its other calls.
        bucket_bytes: Bytes at which a bucket is sent.
        max_tensors: Tensors at which a bucket is sent.
        fuse_below_bytes: Larger tensors are sent by themselves; None asks the backend's cost
            model, or measures by some 350 calls at the first `add` (collective, rank 0 decides).
        max_age_s: About how long a tensor may wait for company while others come; None for as
            long as it takes.

    """

    def __init__(
        self,
        backend: CommBackendProtocol,
        *,
        bucket_bytes: int = _BUCKET_BYTES,
        max_tensors: int = 1024,
        fuse_below_bytes: int | None = None,
        max_age_s: float | None = None,
    ) -> None:
        if bucket_bytes < 1 or max_tensors < 1:
            raise ConfigError(
                f"bucket_bytes {bucket_bytes} and max_tensors {max_tensors} must be at least 1"
            )
        if fuse_below_bytes is not None and fuse_below_bytes < 0:
            raise ConfigError(f"fuse_below_bytes {fuse_below_bytes} is below 0")
        if max_age_s is not None and not max_age_s > 0:
            raise ConfigError(f"max_age_s must be above 0, got {max_age_s}")
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._max_tensors = max_tensors
        self._threshold = (
            None
            if fuse_below_bytes is None
            else FusionThreshold(fuse_below_bytes, f"tensors below {fuse_below_bytes} bytes: given")
        )
        self._pace = None if max_age_s is None else _Pace(backend, max_age_s)
        self._homes = Homes(backend, bucket_bytes)
        self._pending: list[_Member] = []
        self._bytes = 0
        self._age = 0
        self._flights: list[Flight] = []
        self._nothing_gains = False
        self.buckets_sent = 0
        self.sent_alone = 0

    @property
    def threshold(self) -> FusionThreshold:
        """What is fused and why; the first question may measure, and is collective then."""
        if self._threshold is None:
            self._threshold = find_threshold(self._backend).queued
        return self._threshold

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that lives in a bucket, next to the one made before it.

        Tensors that are added in the order in which they were made travel without a copy, and
        all of them are fused. The memory is the backend's own kind (symmetric on `shm`) and
        stays for as long as a tensor of the bucket does, or this object. Its values are zeros at
        first. Every rank makes the same tensors in the same order.
        """
        self._nothing_gains = False
        return self._homes.empty(shape, dtype)

    def add(self, x: Tensor, op: str | ReduceOp = "sum") -> Work[Tensor]:
        """Queue `x`; the work is done once its bucket is, and waiting for it sends the bucket."""
        if self._nothing_gains:  # the shortest way: this must cost nearly nothing
            self.sent_alone += 1
            return CompletedWork(self._backend.all_reduce(x, op))  # type: ignore[arg-type]  # a tensor without async_op
        reduction = ReduceOp.of(op)
        if self._pace is not None:
            self._pace.tensor_came()
        nbytes = x.nbytes
        if not self._homes.owns(x) and nbytes >= self.threshold.nbytes:
            return self._alone(x, reduction)
        member = _Member(self, x, reduction)
        if self._pending and not member.fits(self._pending[0]):
            self._send()
        self._pending.append(member)
        self._bytes += nbytes
        self._grow_older()
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

    def _alone(self, x: Tensor, op: ReduceOp) -> Work[Tensor]:
        self.sent_alone += 1
        if self.threshold.nbytes == 0:  # so low a latency that a handle would cost more
            self._nothing_gains = self._pace is None and not self._homes and not self._pending
            done = self._backend.all_reduce(x, op)
            assert isinstance(done, Tensor)
            work: Work[Tensor] = CompletedWork(done)
        else:
            member = _Member(self, x, op)
            self._fly([member])
            work = member
        self._grow_older()
        return work

    def _fly(self, members: Sequence[_Member]) -> None:
        tensors = [m.x for m in members]
        span = self._homes.span(tensors)
        flight = Flight(self._backend, tensors, members[0].op, span)
        for member in members:
            member.flight = flight
        self._flights = [f for f in self._flights if not f.landed]
        self._flights.append(flight)

    def _grow_older(self) -> None:
        if not self._pending:
            return
        self._age += 1
        if self._pace is not None and self._age >= self._pace.max_tensors:
            self._send()

    def _send(self) -> None:
        members, self._pending, self._bytes, self._age = self._pending, [], 0, 0
        if not members:
            return
        self._fly(members)
        self.buckets_sent += 1
        if self._pace is not None:
            self._pace.bucket_sent(self.buckets_sent)


class _Pace:
    """An age in seconds as a number of tensors, which rank 0 measures and the others take."""

    def __init__(self, backend: CommBackendProtocol, max_age_s: float) -> None:
        self._backend = backend
        self._max_age_s = max_age_s
        self._came = 0
        self._since = time.monotonic()
        self._told: Work[Tensor] | None = None
        self.max_tensors = 1 << 40

    def tensor_came(self) -> None:
        """Count it."""
        self._came += 1

    def bucket_sent(self, buckets: int) -> None:
        """Take what rank 0 told after an earlier bucket; have it told again from time to time."""
        if self._told is not None:
            self.max_tensors = int(self._told.synchronize().item())
            self._told = None
        if buckets <= 4 or buckets % _RATE_EVERY == 0:
            now = time.monotonic()
            seconds = max(1e-9, (now - self._since) / self._came)
            count = max(1, min(1 << 40, int(self._max_age_s / seconds)))
            self._came, self._since = 0, now
            told = self._backend.broadcast(
                torch.tensor([count], device=self._backend.device_type), 0, async_op=True
            )
            assert not isinstance(told, Tensor)
            self._told = told


class _Member:
    """The `Work` of one tensor of a bucket."""

    __slots__ = ("_owner", "flight", "op", "x")

    def __init__(self, owner: FusedAllReduce, x: Tensor, op: ReduceOp) -> None:
        self._owner = owner
        self.x = x
        self.op = op
        self.flight: Flight | None = None

    def fits(self, other: _Member) -> bool:
        """Whether both may share a bucket."""
        same = self.x.dtype == other.x.dtype and self.x.device == other.x.device
        return same and self.op is other.op

    def _sent(self) -> Flight:
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
    bucket_bytes: int | None = None,
    fuse_below_bytes: int | None = None,
) -> Sequence[Tensor]:
    """Replace every tensor by its reduction over ranks, in few calls; returns `tensors`.

    Knowing all tensors at once, it costs less than `FusedAllReduce`, so that tensors of a few KiB
    share calls on a backend with low latency too.

    Args:
        backend: Whose `all_reduce` is used.
        tensors: Same shapes and order on every rank; dtypes may be mixed
            and are grouped.
        op: Reduction.
        bucket_bytes: Bytes that share a call; None takes what suits the backend's latency.
        fuse_below_bytes: As in `FusedAllReduce`; None measures once per backend.

    """
    if bucket_bytes is not None and bucket_bytes < 1:
        raise ConfigError(f"bucket_bytes {bucket_bytes} must be at least 1")
    threshold = (
        find_threshold(backend)
        if fuse_below_bytes is None
        else FusionThreshold(fuse_below_bytes, "given")
    )
    limit = threshold.nbytes
    full = bucket_bytes or threshold.bucket_bytes
    quick = threshold.quick
    reduction = ReduceOp.of(op)
    alone: list[Tensor] = []
    buckets: list[list[Tensor]] = []
    filling: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    filled: dict[tuple[torch.dtype, torch.device], int] = {}
    # Looking at each tensor costs a tenth of a quick call, so there the mean decides for all.
    if limit == 0 or (quick and sum([x.nbytes for x in tensors]) >= limit * len(tensors)):
        alone = list(tensors)
        tensors_left: Sequence[Tensor] = ()
    else:
        tensors_left = tensors
    for x in tensors_left:
        nbytes = x.nbytes
        if nbytes >= limit:
            alone.append(x)
            continue
        kind = (x.dtype, x.device)
        sofar = filled.get(kind, full)
        if sofar + nbytes > full:
            filling[kind] = []
            buckets.append(filling[kind])
            sofar = 0
        filling[kind].append(x)
        filled[kind] = sofar + nbytes
    flights: deque[Flight] = deque()
    last = len(buckets) - 1
    for i, bucket in enumerate(buckets):
        if len(flights) == _IN_FLIGHT:
            flights.popleft().land(None)
        at_once = quick or (i == last and not flights and not alone)
        flights.append(Flight(backend, bucket, reduction, at_once=at_once))
        if at_once:
            flights.pop().land(None)
    if quick or limit == 0:
        _all_reduce_each(backend, alone, reduction)
    else:
        flights.extend(Flight(backend, [x], reduction) for x in alone)
    for flight in flights:
        flight.land(None)
    return tensors


def _all_reduce_each(backend: CommBackendProtocol, tensors: Sequence[Tensor], op: ReduceOp) -> None:
    if isinstance(backend, _ReducesEach):
        backend.all_reduce_each(tensors, op)
        return
    for x in tensors:
        backend.all_reduce(x, op)


@runtime_checkable
class _ReducesEach(Protocol):
    """A backend with a loop of its own."""

    def all_reduce_each(self, tensors: Sequence[Tensor], op: str | ReduceOp = "sum") -> None:
        """Reduce them one after another."""
