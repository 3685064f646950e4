"""The narrow waist between the protocol and whatever moves the bytes.

`TensorBackend` checks, lowers, counts and times; a `Transport` is handed primitive calls on
contiguous tensors and starts them. A torch process group is one transport; threads of one
process are another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from sagellm.core.protocols.comm_types import ReduceOp

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["RawCall", "RawWork", "TorchObject", "Transport"]

TorchObject: TypeAlias = Any
"""A group, work, store or option of torch's C++ side, or a Python class that quacks like one."""


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
        background: Whether the caller goes on without waiting: it asked for a work.

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
