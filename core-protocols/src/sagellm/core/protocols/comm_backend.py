"""One group of ranks on one device type, and the operations between them.

Shape suffixes: N = elements of one rank's buffer, R = ranks of the group.

`src`, `dst` and `peer` are ranks *of this group*; `global_ranks` maps them to the job's.
Order of calls on the caller's current stream is the order of operations. Non-contiguous
inputs are copied and counted in the statistics, and so is an input that shares memory with the
output elsewhere than where this rank's own part of it belongs. Empty tensors return at once, a
group of one is the identity. After an error the group is dead: buffers are undefined, and `abort` with
`split`, or a new backend, is the way on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .backend_spec import Capabilities
from .comm_types import (
    BandwidthStats,
    Choice,
    CommCall,
    CommStats,
    KVBlock,
    P2POp,
    ReduceOp,
    Registration,
)
from .work import Work

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "CommBackendProtocol",
]


class CommBackendProtocol(ABC):
    """Collectives and point-to-point operations of one group on one device type.

    Every operation takes `async_op=False`: the default returns the result, `async_op=True`
    returns a `Work` whose `wait()` gives the same result. All ranks of the group make the same
    calls in the same order; one thread at a time uses a backend.

    Raises:
        ConfigError: Arguments that can never work, before anything is sent.
        UnsupportedOperationError: The backend has neither the operation nor a rule for it.
        CommTimeoutError: The group's deadline ended; the message names op, sequence, group,
            ranks and bytes.
        PeerLostError: A rank is gone.
        CollectiveMismatchError: Ranks made different calls.
    """

    # -- who ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def name(self) -> str:
        """Backend name, such as `nccl`."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """This process's rank in the group, from 0."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of ranks in the group."""

    @property
    @abstractmethod
    def global_ranks(self) -> tuple[int, ...]:
        """The job's rank of each member, by rank in the group."""

    @property
    @abstractmethod
    def device_type(self) -> str:
        """Torch device type of the tensors it takes."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it can do without being told of an error first."""

    @property
    @abstractmethod
    def process_group(self) -> torch.distributed.ProcessGroup | None:
        """What an engine or a torch API is given; None for backends outside torch."""

    # -- in place -------------------------------------------------------------------------

    @abstractmethod
    def all_reduce(
        self, x: Tensor, op: str | ReduceOp = "sum", *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        """Replace `x_N` on every rank by its reduction over ranks; the result is `x` itself.

        N and dtype agree across ranks. `avg` needs a floating dtype; `band`, `bor` and `bxor`
        an integer or bool one.
        """

    # -- into a given output --------------------------------------------------------------

    @abstractmethod
    def all_gather_into_tensor(
        self, out: Tensor, x: Tensor, *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        """Fill `out` (R·N elements) with every rank's `x_N` in rank order; the result is `out`."""

    @abstractmethod
    def reduce_scatter_tensor(
        self, out: Tensor, x: Tensor, op: str | ReduceOp = "sum", *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        """Reduce `x` (R·N elements) over ranks and leave this rank's N in `out`."""

    @abstractmethod
    def all_to_all_single(
        self,
        out: Tensor,
        x: Tensor,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
        *,
        async_op: bool = False,
    ) -> Tensor | Work[Tensor]:
        """Send slice i of `x` along dimension 0 to rank i, and receive its slice for us.

        Args:
            out: Receives the slices in rank order.
            x: Sent slices in rank order.
            out_splits: Rows from each rank; None splits evenly.
            in_splits: Rows to each rank; None splits evenly.
            async_op: Return a `Work`.

        """

    # -- new tensors ----------------------------------------------------------------------

    @abstractmethod
    def all_gather(self, x: Tensor, *, async_op: bool = False) -> list[Tensor] | Work[list[Tensor]]:
        """Return every rank's `x`, in rank order, as new tensors; shapes agree across ranks."""

    @abstractmethod
    def reduce_scatter(
        self, xs: Sequence[Tensor], op: str | ReduceOp = "sum", *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        """Return the reduction over ranks of their `xs[rank]`, as a new tensor.

        Args:
            xs: One tensor per rank; shapes and dtypes agree across ranks.
            op: Reduction.
            async_op: Return a `Work`.

        """

    @abstractmethod
    def all_to_all(
        self, xs: Sequence[Tensor], *, async_op: bool = False
    ) -> list[Tensor] | Work[list[Tensor]]:
        """Return what each rank had for us in its `xs[rank]`, as new tensors.

        Shapes may differ where `capabilities.uneven`; then ranks agree on them first.
        """

    # -- rooted and point to point --------------------------------------------------------

    @abstractmethod
    def broadcast(self, x: Tensor, src: int, *, async_op: bool = False) -> Tensor | Work[Tensor]:
        """Replace `x` on every rank by rank `src`'s; the result is `x` itself."""

    @abstractmethod
    def reduce(
        self, x: Tensor, dst: int, op: str | ReduceOp = "sum", *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        """Leave the reduction in `x` on rank `dst`; elsewhere `x` is undefined afterwards."""

    @abstractmethod
    def gather(
        self, x: Tensor, dst: int, *, async_op: bool = False
    ) -> list[Tensor] | Work[list[Tensor] | None] | None:
        """Return every rank's `x` on rank `dst` and None elsewhere."""

    @abstractmethod
    def scatter(
        self, out: Tensor, xs: Sequence[Tensor] | None, src: int, *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        """Fill `out` with our part of rank `src`'s `xs`; `xs` is None on the other ranks."""

    @abstractmethod
    def send(
        self, x: Tensor, dst: int, tag: int = 0, *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        """Send `x` to rank `dst`; the result is `x`."""

    @abstractmethod
    def recv(
        self, x: Tensor, src: int, tag: int = 0, *, async_op: bool = False
    ) -> Tensor | Work[Tensor]:
        """Fill `x` from rank `src`'s matching send; the result is `x`."""

    @abstractmethod
    def batch_p2p(self, ops: Sequence[P2POp]) -> list[Work[Tensor]]:
        """Start all sends and receives at once, so that no order of them can deadlock."""

    # -- KV blocks ------------------------------------------------------------------------

    @abstractmethod
    def send_kv_blocks(
        self, blocks: Sequence[KVBlock | Tensor], dst: int, *, async_op: bool = False
    ) -> Sequence[KVBlock] | Work[Sequence[KVBlock]]:
        """Send blocks with their shapes and dtypes to rank `dst`, which need not know them."""

    @abstractmethod
    def recv_kv_blocks(
        self, src: int, *, async_op: bool = False
    ) -> Sequence[KVBlock] | Work[Sequence[KVBlock]]:
        """Receive what rank `src` passed to `send_kv_blocks`, as new tensors in its order."""

    # -- the group ------------------------------------------------------------------------

    @abstractmethod
    def barrier(
        self, timeout_s: float | None = None, *, async_op: bool = False
    ) -> Work[None] | None:
        """Return once every rank has arrived.

        Raises:
            CommTimeoutError: Some have not; the message names the missing ranks where known.

        """

    @abstractmethod
    def split(self, ranks: Sequence[int], name: str | None = None) -> CommBackendProtocol | None:
        """A new backend over `ranks` of this group, in that order. Collective over this group.

        Returns None on ranks that are not in it. Several calls with disjoint `ranks` are made
        by every rank in the same order.
        """

    @abstractmethod
    def coalesce(self) -> AbstractContextManager[None]:
        """Within the context, calls may be sent together; all are done when it ends."""

    # -- memory ---------------------------------------------------------------------------

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the backend's device, in symmetric memory where it has it."""

    @abstractmethod
    def register(self, x: Tensor) -> Registration:
        """Make memory known to the transport ahead of time; a no-op where none is needed."""

    # -- steering -------------------------------------------------------------------------

    @abstractmethod
    def explain(self, op: str, nbytes: int) -> Choice:
        """What would run for such a call, and why. Pure; identical on all ranks."""

    @abstractmethod
    def get_stats(self) -> CommStats:
        """A snapshot of this rank's counters."""

    @abstractmethod
    def get_bandwidth_stats(self) -> BandwidthStats:
        """Bandwidths derived from the counters."""

    @abstractmethod
    def add_hook(
        self,
        *,
        before: Callable[[CommCall], None] | None = None,
        after: Callable[[CommCall, float, BaseException | None], None] | None = None,
        take_over: Callable[[CommCall], Work[Any] | None] | None = None,  # Any: the op's result
    ) -> Callable[[], None]:
        """Observe or replace calls; returns a function that removes the hook.

        Args:
            before: Called before a call is issued.
            after: Called once it is done, with seconds since the call and its exception.
            take_over: May return a `Work` whose result stands for the call's; None declines.
                Every rank must decide alike.

        An exception in a hook reaches the caller of the operation, and `abort`s the group so
        that no peer waits for it.
        """

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Fail every work in flight on this rank and refuse later calls; peers see a lost rank.

        Safe from any thread and more than once.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the group. Works in flight must be done. Safe more than once."""

    def __enter__(self) -> CommBackendProtocol:
        """Return itself; `close` runs at the end of the block."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()
