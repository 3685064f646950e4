"""Moving KV cache between nodes: layouts, transfers, and the channel that carries them.

A *node* is one process that owns KV memory, named by a small integer; under torchrun it is
the global rank. A *pool* is a set of tensors whose `block` axis, wherever the layout puts it,
is indexed by block ids; the channel moves blocks and never allocates or frees them. Blocks are
integer arrays per cache group, never one object per block and layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, Self

from .comm_types import KVBlock
from .kv_layout import BlockIds, Blocks, KVLayout
from .kv_status import (
    Completion,
    PeerInfo,
    Progress,
    TransferKey,
    TransferMetrics,
    TransferState,
    TransferStats,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "KVStream",
    "KVTransferChannelProtocol",
    "Pool",
    "ReadyEvent",
    "Transfer",
]


class ReadyEvent(Protocol):
    """Something that has to happen before memory may be read; `torch.cuda.Event` fits."""

    def query(self) -> bool:
        """Whether it has happened. Never blocks."""
        ...

    def synchronize(self) -> None:
        """Block until it has happened."""
        ...


class Pool(Protocol):
    """Registered KV memory."""

    @property
    def layout(self) -> KVLayout:
        """Its layout."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors by the layout's names; owned by whoever registered them."""
        ...

    @property
    def num_blocks(self) -> Mapping[str, int]:
        """Blocks per cache group."""
        ...

    @property
    def leases(self) -> int:
        """Transfers that still read or write it."""
        ...


class Transfer(Awaitable["Transfer"], Protocol):
    """One transfer in flight. All methods are thread-safe; dropping it cancels nothing."""

    @property
    def key(self) -> TransferKey:
        """Its name on every side."""
        ...

    @property
    def state(self) -> TransferState:
        """Where it is now."""
        ...

    @property
    def progress(self) -> Progress:
        """How much is in place and verified."""
        ...

    @property
    def metrics(self) -> TransferMetrics:
        """What it has cost so far."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens that the blocks hold, as `seal` or `offer` has said, once it has landed."""
        ...

    @property
    def blocks(self) -> Sequence[KVBlock]:
        """Received bounce buffers of a `receive` without destinations; empty otherwise."""
        ...

    def wait(self, timeout_s: float | None = None) -> Transfer:
        """Block until it has landed, and return it.

        Args:
            timeout_s: Longest wait in seconds; None waits for its end, which comes by the
                transfer's own deadline, and some seconds more for one that does not end.

        Raises:
            KVTransferError: It failed; `cause` and `invalid_blocks` say how. A more precise
                error of the tree is its `__cause__`.
            CommTimeoutError: Still in flight after `timeout_s`; the transfer goes on.

        """
        ...

    def wait_layer(self, index: int, timeout_s: float | None = None) -> None:
        """Block until one layer is in place and verified.

        Raises:
            KVTransferError: The transfer failed first.
            CommTimeoutError: Not there after `timeout_s`.

        """
        ...

    def done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        ...

    def cancel(self) -> bool:
        """Ask both sides to give up; False when it was already over. Never blocks.

        The destination's blocks are safe only once the completion says so.
        """
        ...

    def renew(self, ttl_s: float) -> bool:
        """Let what `offer` gave stand for at least so many seconds from now. Never blocks.

        Returns:
            False when it has ended. A lease is never shortened: cancel it instead.

        Raises:
            UnsupportedOperationError: This is no offer.

        """
        ...

    def exception(self) -> BaseException | None:
        """What it failed with; None while it runs and after success."""
        ...


class KVStream(Protocol):
    """A transfer whose layers are sent as they are computed."""

    @property
    def transfer(self) -> Transfer:
        """The transfer this stream feeds."""
        ...

    def send_layer(
        self, index: int, after: ReadyEvent | None = None, *, span: tuple[int, int] | None = None
    ) -> None:
        """Queue one layer's blocks; returns at once. Layers may come in any order.

        Args:
            index: Position in `layout.layers`.
            after: Waited for before a byte is read.
            span: Positions [first, last) in the stream's blocks, for prefill in chunks; None is
                all of them. Each block of a layer is sent once.

        Raises:
            ConfigError: Unknown layer, a block sent before, or the stream is sealed.
            KVTransferError: The transfer has failed.

        """
        ...

    def seal(self, num_tokens: int) -> Transfer:
        """Say that nothing more comes, and how many tokens the blocks hold.

        Raises:
            ConfigError: Blocks of a layer were never sent; the message lists the layers. The
                transfer is aborted.

        """
        ...

    def abort(self, reason: str) -> None:
        """Give up; the receiver fails with this reason."""
        ...


class KVTransferChannelProtocol(ABC):
    """Moves KV blocks between this node and others.

    Thread-safe; nothing blocks unless its name starts with `wait` or it takes a deadline and
    returns a value. Every transfer ends: landed, failed on both sides, or cancelled.
    """

    @property
    @abstractmethod
    def node_id(self) -> int:
        """This node's id."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Where peers reach this node, `host:port`; what an engine hands on out of band."""

    @abstractmethod
    def add_peer(self, node_id: int, address: str) -> None:
        """Make a node known that discovery has not found, or give a restarted one its new address.

        Raises:
            ConfigError: The address is not `host:port`, or the node is this one.

        """

    @abstractmethod
    def register(self, layout: KVLayout, tensors: Mapping[str, Tensor]) -> Pool:
        """Make KV memory known; one pool per channel at a time.

        Raises:
            ConfigError: Names, shapes, dtypes or strides do not fit the layout.

        """

    @abstractmethod
    def unregister(self, pool: Pool) -> None:
        """Forget a pool.

        Raises:
            ResourceError: Transfers still lease it; the message names them.

        """

    @abstractmethod
    def connect(self, peer: int, timeout_s: float | None = None) -> PeerInfo:
        """Meet a peer: authenticate, agree on a version, compare layouts. Happens by itself.

        Raises:
            ConfigError: Unknown node id; the message lists the known ones.
            CommTimeoutError: The peer did not come; the message names it.
            AuthenticationError: One side does not have the key.
            LayoutMismatchError: The layouts do not fit; the message holds both.

        """

    @abstractmethod
    def transfer(
        self,
        blocks: Blocks,
        target_node: int,
        *,
        key: TransferKey | None = None,
        dst_blocks: BlockIds | Mapping[str, BlockIds] | None = None,
        deadline_s: float = 30.0,
    ) -> Transfer:
        """Push blocks to a node.

        Args:
            blocks: Block ids in our pool, or tensors (owned by the caller until it is done).
            target_node: Node id.
            key: Name of the transfer; None makes a fresh one, which the receiver gets with
                `receive(None)`. Repeating a key that has landed does nothing.
            dst_blocks: Destination ids when known, for a receiver that gives the same ones or
                adopts them; None waits for the receiver's grant.
            deadline_s: The whole transfer must have landed by then.

        """

    @abstractmethod
    def receive(
        self,
        key: TransferKey | None,
        blocks: BlockIds | Mapping[str, BlockIds] | None = None,
        *,
        source_node: int | Sequence[int] | None = None,
        adopt: bool = False,
        deadline_s: float = 30.0,
    ) -> Transfer:
        """Accept a push.

        Args:
            key: Which transfer; None takes the next one that no `receive` has named.
            blocks: Destination ids in our pool; None receives into bounded bounce buffers
                that the `Transfer` owns.
            source_node: Only from this node, or from these, each of which holds a part of the
                sharded axis; losing a named one fails the transfer even before its push has
                begun. None takes any. Named or not, the transfer has landed once the parts
                that came cover everything the blocks hold.
            adopt: Whether a sender that knows our blocks may name those it writes, by its
                `dst_blocks`; never blocks that another transfer reads or writes. Without it a
                sender that names other destinations than `blocks` is refused.
            deadline_s: It must have landed by then.

        """

    @abstractmethod
    def offer(
        self,
        key: TransferKey,
        blocks: Blocks,
        *,
        num_tokens: int,
        ttl_s: float,
        after: ReadyEvent | None = None,
    ) -> Transfer:
        """Let peers fetch blocks for `ttl_s` seconds; lands when one has fetched them.

        `num_tokens` is what the blocks hold; it is told to everybody who fetches.

        `Transfer.renew` extends the lease. When it ends first, the cause is `lease_expired`.
        """

    @abstractmethod
    def fetch(
        self,
        key: TransferKey,
        peer: int | Sequence[int],
        blocks: BlockIds | Mapping[str, BlockIds],
        *,
        src_blocks: BlockIds | Mapping[str, BlockIds] | None = None,
        layers: Sequence[int] | None = None,
        deadline_s: float = 30.0,
    ) -> Transfer:
        """Pull offered blocks into ours; either of `offer` and `fetch` may come first.

        Args:
            key: Which offer, by its id; the attempt is this fetch's own, so that one standing
                offer serves many fetches.
            peer: Node that offers it, or all nodes that offer it, each of which holds a part of
                the sharded axis. What they have must cover everything the blocks hold.
            blocks: Destination ids.
            src_blocks: Which of the offered ids, in the order of `blocks`; None takes the
                offered ones in their order. An offer of a whole pool plus `src_blocks` is a
                one-sided read.
            layers: Only these positions of `layout.layers`; None fetches all.
            deadline_s: It must have landed by then.

        """

    @abstractmethod
    def begin(
        self,
        key: TransferKey,
        target_node: int,
        blocks: Blocks,
        *,
        deadline_s: float = 30.0,
    ) -> KVStream:
        """Start a push whose layers follow one by one and have all landed by the deadline."""

    @abstractmethod
    def poll(self, max_n: int | None = None) -> list[Completion]:
        """Completions not reported before. Never blocks; engines call it once a step."""

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor that is readable while `poll` has something to report."""

    @abstractmethod
    def drain(self, deadline_s: float) -> None:
        """Block until nothing is in flight but offers that nobody fetches just now.

        Raises:
            CommTimeoutError: Some still are; the message names them.

        """

    @abstractmethod
    def close(self) -> None:
        """Fail what is in flight on both sides and release sockets and threads. Idempotent."""

    @abstractmethod
    def path(self, peer: int) -> str:
        """How bytes go to a peer, such as `tcp:1`; `unconnected` before they met."""

    @abstractmethod
    def explain(self, peer: int) -> str:
        """Why that path, and which others were refused, in words."""

    @abstractmethod
    def get_stats(self) -> TransferStats:
        """A snapshot of the counters."""

    def __enter__(self) -> Self:
        """Return itself; `close` runs at the end of the block."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()
