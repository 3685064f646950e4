"""What is told of KV transfers: keys, states, progress, costs, completions and counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Literal, NamedTuple

from .kv_layout import KVLayout

__all__ = [
    "CAUSES",
    "Completion",
    "PeerInfo",
    "Progress",
    "TransferKey",
    "TransferMetrics",
    "TransferState",
    "TransferStats",
]


CAUSES: Mapping[str, str] = MappingProxyType(
    {
        "peer_lost": "transport",
        "integrity": "checksum",
        "lease_expired": "lease_expiry",
        "comm_timeout": "deadline",
        "cancelled": "cancelled",
        "invalid_argument": "refused",
        "layout_mismatch": "refused",
        "mismatch": "refused",
        "not_implemented": "refused",
        "resource_exhausted": "refused",
        "unauthenticated": "refused",
        "unavailable": "refused",
    }
)
"""Why a transfer did not land, by the code of its error; any other code means `other`."""


class TransferKey(NamedTuple):
    """Names one attempt at one transfer on every side of it.

    Attributes:
        id: The engine's id of the transfer, unique among those in flight.
        attempt: Counts the engine's retries. The channel retries inside an attempt by itself.

    """

    id: str
    attempt: int = 0


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
        codec: What coded its bytes last; empty where nothing was asked to.
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
    codec: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of one transfer, as `poll` reports it, exactly once.

    Attributes:
        key: Which transfer.
        status: `landed`, `failed` or `cancelled`.
        direction: Whether this node sent or received; one key may end in both on one node.
        cause: `code` of the error, empty on success.
        message: The error's text, empty on success.
        invalid_blocks: Destination blocks that must not be read, of all cache groups together.
        invalid_by_group: The same by cache group, whose block ids may be told apart by group only.
        blocks_safe: True when no late byte can reach the blocks any more: only then do they
            go back to the allocator.
        num_tokens: Tokens that the blocks hold, as `seal` or `offer` has said; else 0.

    """

    key: TransferKey
    status: Literal["landed", "failed", "cancelled"]
    direction: Literal["send", "receive"]
    cause: str = ""
    message: str = ""
    invalid_blocks: tuple[int, ...] = ()
    blocks_safe: bool = True
    num_tokens: int = 0
    invalid_by_group: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)


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
        ignored: Messages that came too late, twice, for an earlier epoch or of a type not known
            here, late frames, and completions lost because nobody polled them, by type.

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
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def causes(self) -> Mapping[str, int]:
        """Transfers that did not land, by why: codes that ask for the same remedy are one.

        `transport` (a peer or a connection was lost), `checksum`, `lease_expiry`, `refused`
        (layouts, arguments, room, keys), `deadline`, `cancelled` and `other`.
        """
        total = dict.fromkeys((*CAUSES.values(), "other"), 0)
        total["cancelled"] = self.transfers.get("cancelled", 0)
        for code, count in self.failures.items():
            total[CAUSES.get(code, "other")] += count
        return total
