"""Moving KV cache between nodes: layouts, transfers, and the channel that carries them.

A *node* is one process that owns KV memory, named by a small integer; under torchrun it is
the global rank. A *pool* is a set of tensors whose `block` axis, wherever the layout puts it,
is indexed by block ids; the channel moves blocks and never allocates or frees them. Blocks are
integer arrays per cache group, never one object per block and layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from .comm_backend import KVBlock, Probe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "Axis",
    "BlockIds",
    "Blocks",
    "CacheGroup",
    "CacheKind",
    "CodecSpec",
    "Completion",
    "KVCodec",
    "KVConnection",
    "KVLayout",
    "KVStream",
    "KVTransferChannelProtocol",
    "KVTransport",
    "PeerInfo",
    "Pool",
    "Progress",
    "ReadyEvent",
    "Shard",
    "Transfer",
    "TransferKey",
    "TransferMetrics",
    "TransferState",
    "TransferStats",
    "TransportSpec",
]

CacheKind = Literal["kv", "mla", "state", "scale", "opaque"]
"""What a group caches: K and V, MLA's latent, recurrent state, quantisation scales, or bytes."""

Axis = Literal["block", "layer", "kv", "token", "head", "dim"]
"""Meaning of one dimension of a pool tensor; `kv` has length 2, K first."""

BlockIds: TypeAlias = "NDArray[np.integer] | Sequence[int]"
"""Block ids in the order of the tokens they hold."""

Blocks: TypeAlias = "BlockIds | Mapping[str, BlockIds] | Sequence[KVBlock | Tensor]"
"""Block ids of the only cache group, ids per group, or plain tensors that are wrapped."""


class TransferKey(NamedTuple):
    """Names one attempt at one transfer on every side of it.

    Attributes:
        id: The engine's id of the transfer, unique among those in flight.
        attempt: Counts the engine's retries. The channel retries inside an attempt by itself.

    """

    id: str
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of an axis this node holds.

    Attributes:
        axis: The sharded axis, usually `head`.
        rank: This node's part, from 0.
        size: Number of parts.
        replicas: Nodes that hold the same part (KV heads replicated beyond their number).

    """

    axis: Axis
    rank: int
    size: int
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose caches share a block table, a page size and a shape.

    Attributes:
        name: Name of the group, unique in the layout.
        kind: What it caches.
        layers: Layer names, in order of computation.
        axes: Meaning of every dimension of a pool tensor. With `layer` among them one tensor,
            keyed by the group's name, holds all layers; else there is a tensor per layer.
        block_shape: Lengths of the axes other than `block` (and, where the pool tensor's axes
            include it, `layer`), as held *here*, after sharding.
        dtype: torch dtype name without the prefix.
        page_tokens: Tokens per block; None where a block is not a span of tokens.
        parts: Names of the tensors of one layer when it has several (`("k", "v")`); each is
            then keyed `layer.part`.
        shard: Which part of which axis this node holds; None when it holds all.

    """

    name: str
    kind: CacheKind
    layers: tuple[str, ...]
    axes: tuple[Axis, ...]
    block_shape: tuple[int, ...]
    dtype: str
    page_tokens: int | None = None
    parts: tuple[str, ...] = ()
    shard: Shard | None = None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Keys that `register` expects in its mapping for this group."""
        if "layer" in self.axes:
            return tuple(f"{self.name}.{p}" for p in self.parts) or (self.name,)
        if self.parts:
            return tuple(f"{layer}.{part}" for layer in self.layers for part in self.parts)
        return self.layers


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How one node's KV memory is laid out; compared when two nodes meet.

    Attributes:
        groups: Cache groups; layer i of the layout is the i-th of all groups' layers in order.
        model: Fingerprint of the model and of everything that changes what its cache means.
        version: Of this structure.

    """

    groups: tuple[CacheGroup, ...]
    model: str = ""
    version: int = 1

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers; their positions are what `send_layer` and `wait_layer` take."""
        return tuple(layer for group in self.groups for layer in group.layers)

    def describe(self) -> str:
        """One line with every field that must fit the peer's."""
        groups = "; ".join(
            f"{g.name}: {g.kind} {len(g.layers)} layers {g.dtype} {'x'.join(g.axes)}"
            f" {list(g.block_shape)} page_tokens={g.page_tokens}"
            + (f" {g.shard.axis} {g.shard.rank}/{g.shard.size}" if g.shard else "")
            for g in self.groups
        )
        return f"model={self.model or '-'} [{groups}]"


class TransferState(StrEnum):
    """Where a transfer is; each state has a deadline and a terminal error."""

    OFFERED = "offered"
    ACCEPTED = "accepted"
    MOVING = "moving"
    LANDED = "landed"
    RELEASED = "released"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether the transfer can change no more, apart from LANDED becoming RELEASED."""
        return self in (TransferState.RELEASED, TransferState.FAILED, TransferState.CANCELLED)


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of a transfer is in place and verified."""

    bytes_done: int = 0
    bytes_total: int = 0
    blocks_done: int = 0
    blocks_total: int = 0
    layers_done: int = 0
    layers_total: int = 0


@dataclass(frozen=True, slots=True)
class TransferMetrics:
    """What one transfer cost.

    Attributes:
        bytes: Payload as it lies in memory.
        wire_bytes: What crossed the wire for it, headers included.
        runs: Contiguous stretches after coalescing.
        syscalls: Calls into the kernel that moved its bytes; 0 where unknown.
        queue_s: From the request to the first byte.
        wire_s: From the first byte to the last.
        verify_s: Spent on checksums.
        codec_s: Spent on encoding or decoding.
        path: How it went, such as `tcp:1`.
        retries: Blocks asked for again.

    """

    bytes: int = 0
    wire_bytes: int = 0
    runs: int = 0
    syscalls: int = 0
    queue_s: float = 0.0
    wire_s: float = 0.0
    verify_s: float = 0.0
    codec_s: float = 0.0
    path: str = ""
    retries: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of one transfer, as `poll` reports it, exactly once.

    Attributes:
        key: Which transfer.
        status: `landed`, `failed` or `cancelled`.
        direction: Whether this node sent or received; one key may end in both on one node.
        cause: `code` of the error, empty on success.
        message: The error's text, empty on success.
        invalid_blocks: Destination blocks that must not be read.
        blocks_safe: True when no late byte can reach the blocks any more: only then do they
            go back to the allocator.

    """

    key: TransferKey
    status: Literal["landed", "failed", "cancelled"]
    direction: Literal["send", "receive"]
    cause: str = ""
    message: str = ""
    invalid_blocks: tuple[int, ...] = ()
    blocks_safe: bool = True


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What is known of a connected peer.

    Attributes:
        node_id: The peer's node id.
        address: Where it listens, for people.
        protocol_version: Wire version agreed on.
        layout: The peer's layout, None when it has registered none.
        path: How bytes go to it, such as `tcp:1`.

    """

    node_id: int
    address: str
    protocol_version: int
    layout: KVLayout | None
    path: str


@dataclass(frozen=True, slots=True)
class TransferStats:
    """A channel's counters since it was made.

    Attributes:
        transfers: Ended transfers by status.
        failures: Failed transfers by cause code.
        bytes_sent: Payload sent.
        bytes_received: Payload received, verified.
        wire_bytes_sent: Bytes on the wire, sent.
        wire_bytes_received: Bytes on the wire, received.
        in_flight: Transfers now in flight.
        peers: Connected peers.
        rejected_connections: Connections that did not authenticate or broke the protocol.

    """

    transfers: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    bytes_sent: int = 0
    bytes_received: int = 0
    wire_bytes_sent: int = 0
    wire_bytes_received: int = 0
    in_flight: int = 0
    peers: int = 0
    rejected_connections: int = 0


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
    def blocks(self) -> Sequence[KVBlock]:
        """Received bounce buffers of a `receive` without destinations; empty otherwise."""
        ...

    def wait(self, timeout_s: float | None = None) -> Transfer:
        """Block until it has landed, and return it.

        Args:
            timeout_s: Longest wait in seconds; None is the transfer's own deadline.

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
            dst_blocks: Destination ids when known; None waits for the receiver's grant.
            deadline_s: The whole transfer must have landed by then.

        """

    @abstractmethod
    def receive(
        self,
        key: TransferKey | None,
        blocks: BlockIds | Mapping[str, BlockIds] | None = None,
        *,
        source_node: int | Sequence[int] | None = None,
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
        """Let peers fetch blocks for `ttl_s` seconds; lands when one has fetched them."""

    @abstractmethod
    def fetch(
        self,
        key: TransferKey,
        peer: int,
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
            peer: Node that offers it.
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
        """Block until nothing is in flight.

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

    def __enter__(self) -> KVTransferChannelProtocol:
        """Return itself; `close` runs at the end of the block."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()


class KVConnection(ABC):
    """One authenticated byte stream of a transport to one peer; used by one thread per direction.

    Raises (every method): PeerLostError when the peer is gone, CommTimeoutError at the deadline.
    """

    @abstractmethod
    def send(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Send all bytes of all views in order; returns the number of kernel calls."""

    @abstractmethod
    def receive(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Fill all views in order, in place; returns the number of kernel calls."""

    @abstractmethod
    def abort(self) -> None:
        """Break the connection at once, from any thread; pending calls raise PeerLostError."""

    @abstractmethod
    def close(self) -> None:
        """Release it. Idempotent."""


class KVTransport(ABC):
    """Moves bytes for the channel, whose control plane has already met and proven the peer."""

    @abstractmethod
    def endpoint(self) -> str:
        """What a peer needs to reach us; travels over the authenticated control connection."""

    @abstractmethod
    def connect(self, endpoint: str, token: bytes, deadline_s: float) -> KVConnection:
        """Open a connection to a peer's endpoint.

        Args:
            endpoint: What the peer's `endpoint` returned.
            token: One-time secret that the peer issued for this connection.
            deadline_s: Seconds.

        """

    @abstractmethod
    def accept(self, token: bytes, deadline_s: float) -> KVConnection:
        """The incoming connection that presents `token`; others are closed and counted."""

    @abstractmethod
    def close(self) -> None:
        """Release listeners and threads. Idempotent."""


@dataclass(frozen=True, slots=True)
class TransportSpec:
    """What an entry point of group `sagellm.comm.kv_transfer.transports` gives; torch-free.

    Attributes:
        name: `tcp`, `shm`, ….
        priority: The highest available one that both sides share is used.
        one_sided: The peer's CPU is not involved in moving a block.
        remote_write: The sender writes into the receiver's memory.
        cancel: A started move can be stopped.
        integrity: The transport itself detects changed bytes.
        probe: Cheap, without side effects.
        load: Returns the class or factory of the transport; called with the channel's settings
            as keyword arguments.

    """

    name: str
    priority: int
    one_sided: bool
    remote_write: bool
    cancel: bool
    integrity: bool
    probe: Callable[[], Probe]
    load: Callable[[], Callable[..., KVTransport]]
    install_hint: str = ""


class KVCodec(ABC):
    """Makes blocks smaller on the wire. Not thread-safe: one object per thread."""

    @abstractmethod
    def encode(self, block: memoryview, *, dtype: str) -> bytes | memoryview:
        """The encoded block.

        Args:
            block: Bytes of one block, contiguous.
            dtype: torch dtype name of the elements, a hint for codecs that use it.

        """

    @abstractmethod
    def decode(self, frame: memoryview, out: memoryview, *, dtype: str) -> None:
        """Decode into `out`, whose size is the block's; allocates no more than it.

        Raises:
            IntegrityError: The frame is truncated, changed, or holds another number of bytes.

        """


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """What an entry point of group `sagellm.comm.kv_transfer.codecs` gives; torch-free.

    Attributes:
        name: `none`, `lz4`, `zstd`, ….
        lossless: Whether decoding gives the same bits.
        probe: Cheap, without side effects.
        load: Returns the class or factory of the codec.
        compresses: Whether frames of data that can shrink are smaller; False only for a codec
            that copies.

    """

    name: str
    lossless: bool
    probe: Callable[[], Probe]
    load: Callable[[], Callable[..., KVCodec]]
    install_hint: str = ""
    compresses: bool = True
