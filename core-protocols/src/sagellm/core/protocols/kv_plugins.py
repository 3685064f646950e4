"""What the KV channel is extended by: transports that move bytes, codecs that shrink them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .backend_spec import Probe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "CodecSpec",
    "KVCodec",
    "KVConnection",
    "KVTransport",
    "MemoryRuns",
    "OneSidedConnection",
    "Pledge",
    "Reference",
    "TransportSpec",
]


class KVConnection(ABC):
    """One authenticated byte stream of a transport to one peer; used by one thread per direction.

    Raises (every method): PeerLostError when the peer is gone, CommTimeoutError at the deadline.
    """

    @property
    def most_lanes(self) -> int | None:
        """Connections to this peer beyond which more do not help; None leaves it to the tuner."""
        return None

    @abstractmethod
    def send(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Send all bytes of all views in order; returns the number of kernel calls."""

    @abstractmethod
    def receive(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Fill all views in order, in place; returns the number of kernel calls."""

    @abstractmethod
    def abort(self) -> None:
        """Break the connection at once, from any thread; pending calls raise PeerLostError."""

    def moved_bytes(self) -> int:
        """Bytes that have come and gone so far, from any thread; 0 where that is not known.

        It grows in the middle of a call, too, so that a slow one can be told from a stuck one.
        """
        return 0

    @abstractmethod
    def close(self) -> None:
        """Release it. Idempotent."""


class MemoryRuns(NamedTuple):
    """Stretches of a process's memory, in the order in which their bytes cross the wire.

    Attributes:
        addresses: Where each begins.
        lengths: Bytes of each, all positive.

    """

    addresses: NDArray[np.int64]
    lengths: NDArray[np.int64]


class Pledge(ABC):
    """A sender's word that memory it refers to stays as it is. Thread-safe."""

    @abstractmethod
    def revoke(self) -> None:
        """Take it back, before the memory is used for something else. Idempotent, never blocks.

        Whatever a peer copies after this returns does not count, even if the peer was stopped
        in the middle of a copy and goes on later.
        """


class Reference(ABC):
    """Memory of a peer that may be read; checked against what the peer has shown us."""

    @property
    @abstractmethod
    def total_bytes(self) -> int:
        """Bytes in all runs."""

    @property
    @abstractmethod
    def runs(self) -> MemoryRuns:
        """The runs, with addresses that only its copier understands."""

    @abstractmethod
    def copier(
        self, sources: MemoryRuns, addresses: NDArray[np.int64]
    ) -> Callable[[int, int], int]:
        """What copies parts of the runs to addresses of ours, from one position to another.

        It returns the number of kernel calls. The caller answers for the addresses; sources are
        checked when the reference is made.
        """

    @abstractmethod
    def kept(self) -> bool:
        """Whether the peer keeps its pledge still: what was copied before this is the peer's."""


class OneSidedConnection(KVConnection):
    """A connection over which a receiver reads the sender's memory instead of being sent it.

    One thread per direction, as for every connection; pledges are for any thread.
    """

    @property
    @abstractmethod
    def frame_bytes(self) -> int:
        """Bytes that one reference should cover, about."""

    @property
    def least_bytes(self) -> int:
        """Payload of a frame from which a reference costs less than sending the bytes; 0: any."""
        return 0

    @abstractmethod
    def pledge(self) -> Pledge | None:
        """A pledge for references to come; None when too many are out, so send the bytes."""

    @abstractmethod
    def refer(self, runs: MemoryRuns, pledge: Pledge) -> memoryview | None:
        """What to send in place of the bytes in these runs, as the last view of the next `send`.

        None when the peer cannot read them: send the bytes.
        """

    @abstractmethod
    def resolve(self, size: int, deadline_s: float) -> Reference:
        """Receive a reference of so many bytes, as the peer's `refer` made it.

        Raises:
            IntegrityError: It is none, or names memory the peer has not shown us.

        """

    @abstractmethod
    def watch(self, callback: Callable[[], object]) -> None:
        """Call back, from any thread, when `news` has something."""

    @abstractmethod
    def news(self) -> memoryview | None:
        """A reference to nothing that the peer should get soon: it lets go of memory."""


class KVTransport(ABC):
    """Moves bytes for the channel, whose control plane has already met and proven the peer."""

    @abstractmethod
    def endpoint(self, reached_at: str = "") -> str:
        """What a peer needs to reach us; travels over the authenticated control connection.

        Args:
            reached_at: Host at which that peer has reached our control port, for a transport
                that listens at every address.

        """

    def reaches(self, endpoint: str) -> Probe:
        """Whether `connect` may work, as far as can be told at once; else why not."""
        return Probe(True, "nothing speaks against it")

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

    def forget(self, token: bytes) -> None:
        """Have an `accept` of this token, which waits or is about to, raise PeerLostError.

        A transport that cannot lets it end at its deadline. From any thread.
        """
        return None

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
        load: Returns the class or factory of the transport. It is called with keyword arguments,
            of which it takes what it needs and ignores the rest: `host` to listen on,
            `advertise` (host that peers are told, None leaves it open), `socket_buffer_bytes`,
            `handshake_timeout_s`, `comm`, a communication backend or None, and `tls`, what
            encrypts connections to other hosts or None. It raises BackendUnavailableError when
            it cannot work with these: with `tls`, when blocks would leave the host in the open.
        install_hint: Line that brings what the probe misses.
        start_lanes: Connections per peer to begin with.
        max_lanes: Connections per peer that may make it faster.

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
    start_lanes: int = 1
    max_lanes: int = 1


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
