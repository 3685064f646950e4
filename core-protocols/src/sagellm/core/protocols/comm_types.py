"""What goes into a communication call and what is told of it: reductions, blocks, counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BandwidthStats",
    "CallStats",
    "Choice",
    "CommCall",
    "CommStats",
    "KVBlock",
    "OpStats",
    "P2POp",
    "ReduceOp",
    "Registration",
]


class ReduceOp(StrEnum):
    """How ranks' elements are combined; every operation also takes the plain string.

    >>> ReduceOp.of("sum") is ReduceOp.SUM
    True
    >>> ReduceOp.of("mean")
    Traceback (most recent call last):
    ...
    sagellm.core.protocols.errors.ConfigError: op 'mean' is not one of sum, avg, min, ...
    """

    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"
    BAND = "band"
    BOR = "bor"
    BXOR = "bxor"

    @classmethod
    def of(cls, op: object) -> ReduceOp:
        """The member for a string, a member, or torch's `dist.ReduceOp` value.

        Raises:
            ConfigError: No such reduction; the message lists them.

        """
        if type(op) is cls:
            return op
        if type(op) is str:
            known = cls._value2member_map_.get(op)
            if known is not None:
                return known  # type: ignore[return-value]  # the map holds this class's members
        name = op if isinstance(op, str) else getattr(op, "name", str(op).rsplit(".", 1)[-1])
        try:
            return cls(str(name).lower())
        except ValueError:
            names = ", ".join(cls)
            raise ConfigError(f"op {name!r} is not one of {names}") from None


@dataclass(frozen=True, slots=True)
class Choice:
    """What would run for one call, and why.

    Attributes:
        backend: Backend name.
        algorithm: `ring`, `tree`, `native`, ….
        reason: One sentence for a person.
        estimate_us: Expected time, None without a cost model.
        rejected: Other candidates and why they were not taken.

    """

    backend: str
    algorithm: str
    reason: str
    estimate_us: float | None = None
    rejected: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CommCall:
    """One call as hooks see it; also what error messages name.

    Attributes:
        op: Method name, such as `all_reduce`.
        sequence: Position in this rank's call order on the group, from 0.
        nbytes: Bytes of this rank's input.
        dtype: torch dtype name without the prefix; empty for a barrier.
        group: Name of the group.
        rank: This rank in the group.
        size: Ranks of the group.
        reduce_op: Reduction or None.
        peer: Root or peer rank, None for symmetric operations.
        tensors: The tensors of the call, inputs then outputs; a hook must not keep them.

    """

    op: str
    sequence: int
    nbytes: int
    dtype: str
    group: str
    rank: int
    size: int
    reduce_op: str | None = None
    peer: int | None = None
    tensors: tuple[Any, ...] = ()  # torch.Tensor; torch is not imported here


@dataclass(frozen=True, slots=True)
class OpStats:
    """Counts of one operation since the backend was made or reset.

    Latency runs from the call to its completion as this rank saw it: it contains the wait for
    slower ranks and is never link bandwidth.
    """

    calls: int = 0
    errors: int = 0
    bytes: int = 0
    seconds: float = 0.0
    p50_us: float | None = None
    p99_us: float | None = None
    copies: int = 0
    lowered: int = 0


@dataclass(frozen=True, slots=True)
class CallStats:
    """Finished calls of one operation by one algorithm in one range of sizes.

    Times are those of the calls whose end the host saw; a device call that nobody synchronised
    is counted, not timed.

    Attributes:
        op: Method name.
        algorithm: What ran them: `native` for the library's own, the name of a rule or a
            schedule, `local` where nothing was sent, `taken_over` for a hook's.
        bucket_bytes: Smallest size of the bucket, a power of two; it ends below twice that.
            0 holds the calls without bytes only.
        calls: How many.
        bytes: Bytes of this rank's inputs, summed.
        seconds: From the call to its completion here, summed.
        wait_s: The part of it spent waiting for other ranks; None where nothing below can tell.
        transfer_s: The rest, None likewise.
        p50_us: Median duration; None when no call was timed.
        p99_us: 99th percentile.
        algbw_bytes_per_s: Bytes as nccl-tests count them over the time.
        busbw_bytes_per_s: The same times nccl-tests' factor, comparable with link speed.
        histogram: Timed calls per duration: item `i` counts those from 2**(i/8) times 10 ns on,
            up to the next; percentiles are within 5 % of the true ones.

    """

    op: str
    algorithm: str
    bucket_bytes: int
    calls: int
    bytes: int
    seconds: float
    wait_s: float | None
    transfer_s: float | None
    p50_us: float | None
    p99_us: float | None
    algbw_bytes_per_s: float | None
    busbw_bytes_per_s: float | None
    histogram: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class CommStats:
    """A snapshot of a backend's counters.

    Attributes:
        backend: Backend name.
        group: Group name.
        rank: This rank.
        size: Ranks of the group.
        ops: Per operation.
        in_flight: Asynchronous works not yet done.
        details: The same calls per operation, algorithm and size; finished ones only.

    """

    backend: str
    group: str
    rank: int
    size: int
    ops: Mapping[str, OpStats] = field(default_factory=dict)
    in_flight: int = 0
    details: tuple[CallStats, ...] = ()


@dataclass(frozen=True, slots=True)
class BandwidthStats:
    """Bandwidth per operation over the calls seen so far.

    Attributes:
        algbw_bytes_per_s: Bytes of the call over its time, per operation.
        busbw_bytes_per_s: The same times nccl-tests' factor, comparable with link speed.

    """

    algbw_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    busbw_bytes_per_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class P2POp:
    """One member of `batch_p2p`: a send or receive of `tensor` with rank `peer` of the group."""

    kind: Literal["send", "recv"]
    tensor: Tensor
    peer: int
    tag: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class KVBlock:
    """One block of KV cache on its way by `send_kv_blocks` or `transfer`.

    Attributes:
        tensor: Any shape and dtype, contiguous; owned by the caller until the call is done.
        layer: Layer index, or -1 when the block holds all layers.
        index: Block id in the sender's pool, or its position in the sequence.

    """

    tensor: Tensor
    layer: int = -1
    index: int = -1


class Registration(Protocol):
    """Memory that the backend has made known to its transport; released by `release`."""

    def release(self) -> None:
        """Undo the registration; the tensor must not be in use by any work."""
        ...
