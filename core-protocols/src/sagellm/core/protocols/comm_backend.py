"""One group of ranks on one device type, and the operations between them.

Shape suffixes: N = elements of one rank's buffer, R = ranks of the group.

`src`, `dst` and `peer` are ranks *of this group*; `global_ranks` maps them to the job's.
Order of calls on the caller's current stream is the order of operations. Non-contiguous
inputs are copied and counted in the statistics, empty tensors return at once, a group of one
is the identity. After an error the group is dead: buffers are undefined, and `abort` with
`split`, or a new backend, is the way on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .errors import ConfigError
from .work import Work

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "BackendSpec",
    "BandwidthStats",
    "Capabilities",
    "Choice",
    "CommBackendProtocol",
    "CommCall",
    "CommStats",
    "KVBlock",
    "Lowering",
    "OpStats",
    "P2POp",
    "Probe",
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
        name = op if isinstance(op, str) else getattr(op, "name", str(op).rsplit(".", 1)[-1])
        try:
            return cls(str(name).lower())
        except ValueError:
            known = ", ".join(cls)
            raise ConfigError(f"op {name!r} is not one of {known}") from None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do, as plain data that can be compared and printed.

    Attributes:
        ops: Operations offered, by method name.
        reduce_ops: Reductions offered, as strings.
        dtypes: Dtypes that may be reduced, as torch names without the prefix (`float32`).
        move_dtypes: Dtypes that may be moved without arithmetic; empty means any.
        async_op: Whether `async_op=True` overlaps with the caller.
        uneven: Whether ranks may contribute different sizes.
        graph_capture: Whether calls may be captured in a device graph.
        symmetric_memory: Whether `empty()` returns memory that peers reach without staging.
        coalesce: Whether `coalesce()` saves anything.
        zero_dim: Whether 0-dimensional tensors are accepted.
        verified_on_hardware: False where nobody has run it on the device it is for.

    """

    ops: frozenset[str] = frozenset()
    reduce_ops: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset()
    move_dtypes: frozenset[str] = frozenset()
    async_op: bool = True
    uneven: bool = False
    graph_capture: bool = False
    symmetric_memory: bool = False
    coalesce: bool = False
    zero_dim: bool = True
    verified_on_hardware: bool = False


@dataclass(frozen=True, slots=True)
class Lowering:
    """A documented rule by which an unsupported call becomes supported ones.

    Attributes:
        when: What triggers it: an op (`all_to_all`), a reduction (`avg`) or a dtype (`bool`).
        rule: Name of the rule in `process_group` (`avg_as_sum_div`, `via_int32`, …).
        why: One sentence for `explain`.

    """

    when: str
    rule: str
    why: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a backend can run here, and why.

    Attributes:
        available: True when `load` followed by a group should work on this host.
        reason: One sentence; for a refusal it names what is missing and the next step.

    """

    available: bool
    reason: str


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """What an entry point of group `sagellm.comm.backends` gives: facts, no imports, no torch.

    Attributes:
        name: Name users pass to `create_comm_backend`.
        device_types: torch device types it serves (`cuda`, `npu`, `cpu`).
        c10d_name: Name torch.distributed knows it by; None when it is not a c10d backend.
        priority: `auto` prefers the highest available one for the device.
        capabilities: What it can do.
        lowering: Rules for what it cannot.
        options: Names of the options it understands, with a line of explanation each.
        install_hint: What to install or source when it is missing.
        probe: Cheap test without side effects: no import of a vendor plug-in, no device context.
        load: Returns the backend class or factory; called once it has been chosen. What it
            returns is called as `load()(spec, group, device=, timeout_s=, topology_manager=,
            cost_model=, options=)`: `group` is a torch process group or None, `options` a mapping
            by name or None, and the others are as in `create_comm_backend`. A backend that is
            not c10d may have attribute `in_process_world`, a class `World(size, timeout_s=…)` with
            `backend(rank)`, or `join(rank, size, meet, timeout_s=…)`, a rank's backend; the
            conformance kit makes its ranks by it.
        vendor: Who makes the device; None for backends of the CPU.

    """

    name: str
    device_types: tuple[str, ...]
    c10d_name: str | None
    priority: int
    capabilities: Capabilities
    probe: Callable[[], Probe]
    load: Callable[[], Callable[..., CommBackendProtocol]]
    lowering: tuple[Lowering, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    install_hint: str = ""
    vendor: str | None = None


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
class CommStats:
    """A snapshot of a backend's counters.

    Attributes:
        backend: Backend name.
        group: Group name.
        rank: This rank.
        size: Ranks of the group.
        ops: Per operation.
        in_flight: Asynchronous works not yet done.

    """

    backend: str
    group: str
    rank: int
    size: int
    ops: Mapping[str, OpStats] = field(default_factory=dict)
    in_flight: int = 0


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
