"""What can be tuned on a channel, with its default and its bound."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from sagellm.core.protocols import ConfigError

__all__ = ["KVTransferSettings"]

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KVTransferSettings:
    """Bounds and choices of one channel.

    Attributes:
        codec: Codec of what this channel sends: `none`, `lz4`, `zstd` or an installed one.
        transport: What carries the blocks.
        checksum: Check every block with xxh3 on arrival. Both sides of a link must agree.
        chunk_bytes: Bytes that one frame carries at most, unless one block is larger.
        page_bytes: Plain tensors are cut into pieces of this size.
        socket_buffer_bytes: Kernel buffer of a data connection, each way.
        handshake_timeout_s: A connection that has not authenticated by then is closed.
        io_timeout_s: A block transfer that makes no progress for so long loses its peer.
        quiesce_s: How long a failed transfer waits for its last block before the connection
            that carries it is broken.
        retry_s: Longest pause between attempts to reach a peer that is not there yet.
        max_message_bytes: Control messages longer than this end the connection.
        max_backlog_bytes: Control bytes that a peer may leave unread.
        max_unauthenticated: Connections that have not authenticated yet; more are closed.
        max_in_flight: Transfers of one peer that are offered or moving; more are refused.
        max_bounce_bytes: Memory for transfers received without destination, all together.
        max_remembered: Ended transfers whose keys are remembered.

    """

    codec: str = "none"
    transport: str = "tcp"
    checksum: bool = True
    chunk_bytes: int = 4 * MIB
    page_bytes: int = MIB
    socket_buffer_bytes: int = MIB
    handshake_timeout_s: float = 5.0
    io_timeout_s: float = 30.0
    quiesce_s: float = 0.5
    retry_s: float = 0.2
    max_message_bytes: int = 16 * MIB
    max_backlog_bytes: int = 64 * MIB
    max_unauthenticated: int = 64
    max_in_flight: int = 4096
    max_bounce_bytes: int = 256 * MIB
    max_remembered: int = 65536

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
                raise ConfigError(f"{f.name}={value} must be above 0")
        if self.chunk_bytes > 1 << 30:
            raise ConfigError(f"chunk_bytes={self.chunk_bytes} must be at most 1 GiB")

    def with_codec(self, codec: str) -> KVTransferSettings:
        """The same with another codec."""
        return replace(self, codec=codec)
