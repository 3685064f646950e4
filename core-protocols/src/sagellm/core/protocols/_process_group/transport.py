"""The narrow waist between the protocol and whatever moves the bytes.

`TensorBackend` checks, lowers, counts and times; a `Transport` is handed primitive calls on
contiguous tensors and starts them. A torch process group is one transport; threads of one
process are another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from sagellm.core.protocols.comm_types import ReduceOp

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Position", "RawCall", "RawWork", "TorchObject", "Transport", "WorkReport"]

TorchObject: TypeAlias = Any
"""A group, work, store or option of torch's C++ side, or a Python class that quacks like one."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a rank stands in the calls of a group.

    Attributes:
        collective: Collectives that it has begun; equal on ranks that made the same calls.
        op: Its latest operation.
        state: `scheduled`, `started` or `completed`.

    """

    collective: int
    op: str
    state: str


@dataclass(frozen=True, slots=True)
class WorkReport:
    """What a transport tells of one finished call; None is unknown.

    Attributes:
        algorithm: What ran, where the transport chose among several.
        wait_ns: Time spent waiting for peers.
        nbytes: Bytes, where they were not known when the call was issued.

    """

    algorithm: str | None = None
    wait_ns: int | None = None
    nbytes: int | None = None


@dataclass(slots=True, eq=False)
class RawCall:
    """One primitive call. In-place operations name their tensor in `outputs` only.

    Attributes:
        op: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, reduce, gather,
            scatter, send, recv or barrier.
        inputs: Contiguous tensors read; for `scatter` one per rank on the root, else none.
        outputs: Contiguous tensors written; for `gather` one per rank on the root, else none.
        reduce_op: Reduction, or None.
        peer: Root or peer, a rank of the group.
        tag: Of send and recv.
        in_splits: Rows of `inputs[0]` for each rank; empty splits evenly.
        out_splits: Rows of `outputs[0]` from each rank; empty splits evenly.
        timeout_s: Longest time it may take.
        describe: The call for error messages and mismatch checks.
        device: Where the group's tensors live; None is the CPU.
        background: Whether the caller goes on before it waits, so that a transport that works in
            the caller's thread has to work in another.

    """

    op: str
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    reduce_op: ReduceOp | None = None
    peer: int | None = None
    tag: int = 0
    in_splits: Sequence[int] = ()
    out_splits: Sequence[int] = ()
    timeout_s: float = 30.0
    describe: str = ""
    device: torch.device | None = None
    background: bool = False


class RawWork(ABC):
    """A primitive call that has been started. Every method may be called from any thread."""

    report: WorkReport | None = None
    """What the transport can tell of a call that is done, where it can."""

    @abstractmethod
    def wait(self, timeout_s: float) -> bool:
        """Block until done and return True, or return False after `timeout_s` (0 polls).

        On a device: make the current stream wait, and return True.

        Raises:
            CommError: It failed; the same error at every later call.

        """

    @abstractmethod
    def synchronize(self, timeout_s: float) -> bool:
        """Block the host until done, as `wait` does on the CPU."""

    @abstractmethod
    def done(self) -> bool:
        """Whether `synchronize(0)` would return True or raise. Never blocks."""


class Transport(ABC):
    """Starts primitive calls of one group."""

    def attach(self, position: Callable[[], Position | None]) -> None:  # noqa: B027 - optional
        """Learn how to ask where this rank stands, for what it tells its peers of a failure."""

    def peer_positions(self) -> Mapping[int, Position | None]:
        """Where other ranks stand, as far as is known: None for one that gave no sign.

        Empty before a failure, and for transports that cannot tell.
        """
        return {}

    @property
    @abstractmethod
    def rank(self) -> int:
        """This rank."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Ranks of the group."""

    @property
    @abstractmethod
    def global_ranks(self) -> tuple[int, ...]:
        """The job's rank of each member."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where tensors live."""

    @property
    @abstractmethod
    def group_name(self) -> str:
        """Name in messages and statistics."""

    @abstractmethod
    def issue(self, call: RawCall) -> RawWork:
        """Start `call`.

        Raises:
            CommError: It cannot be started.

        """

    @abstractmethod
    def issue_batch(self, calls: Sequence[RawCall]) -> list[RawWork]:
        """Start sends and receives at once, so that no order of them can deadlock."""

    def start_coalescing(self) -> None:
        """Let calls from now on wait for `end_coalescing`, where one launch is cheaper than many.

        A transport that gains nothing by it does nothing here.
        """
        return

    def end_coalescing(self) -> None:
        """Start what has waited. Safe without a start."""
        return

    @abstractmethod
    def explain_failure(self, describe: str, error: Exception) -> Exception:
        """The error to raise for `error`, naming lost or missing ranks where they can be known.

        Called once per group, after which the group is dead; may talk to the peers' store.
        """

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Fail every call in flight here and make peers' calls fail. Never blocks for long."""

    @abstractmethod
    def close(self) -> None:
        """Release what the transport made itself. Safe more than once."""

    @abstractmethod
    def split(self, ranks: Sequence[int], name: str, timeout_s: float) -> Transport | None:
        """A transport over `ranks` of this group in that order; None where this rank is not in it.

        Collective over this group.
        """
