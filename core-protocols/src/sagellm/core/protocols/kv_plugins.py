"""What the KV channel is extended by: transports that move bytes, codecs that shrink them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .backend_spec import Probe

__all__ = [
    "CodecSpec",
    "KVCodec",
    "KVConnection",
    "KVTransport",
    "TransportSpec",
]


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
        load: Returns the class or factory of the codec: a `KVCodec`, or one that codes tensors
            whose layout it is told, as `sagellm.comm.kv_transfer.compression` has them.
        compresses: Whether frames of data that can shrink are smaller; False only for a codec
            that copies.

    """

    name: str
    lossless: bool
    probe: Callable[[], Probe]
    load: Callable[[], Callable[..., object]]
    install_hint: str = ""
    compresses: bool = True
