"""What can be tuned on a channel, with its default and its bound."""

from __future__ import annotations

from typing import Annotated

import pydantic

from sagellm.core.protocols.config import Settings

__all__ = ["KVTransferSettings"]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

Count = Annotated[int, pydantic.Field(gt=0)]
Seconds = Annotated[float, pydantic.Field(gt=0, lt=1e6)]


class KVTransferSettings(Settings, package="kv_transfer"):
    """Bounds and choices of one channel: section `kv_transfer` of the configuration.

    Attributes:
        key: Secret that all nodes share; None where discovery brings one.
        key_file: File with it, mode 0600.
        peers_file: JSON file `{id: "host:port"}` to find peers in.
        tls_cert: PEM file with this node's certificate, for TLS 1.3 on every connection that
            leaves the process; needs `tls_key` and `tls_ca` too.
        tls_key: PEM file with its private key, mode 0600.
        tls_ca: PEM file with the CA that all nodes' certificates come from.
        codec: Codec of what this channel sends to peers that have it, where a call names none:
            `none`, `auto` (which changes no bit), `lossless`, `quant` or any installed one.
        codec_workers: Threads that encode and decode sections; 0 takes one per core, at most 4.
        max_codec_bytes: Memory for sections that are being coded, decoded or sent, each way.
        transport: What carries the blocks: `auto` takes the best that leads to a peer, a name
            that one only.
        lanes: Data connections of a link; 0 begins with what suits the transport and tunes it.
        checksum: Check every block with xxh3 on arrival; on for a link when either side says so.
        chunk_bytes: Bytes that one frame carries at most, unless one block is larger; on a slow
            network frames are smaller.
        copy_workers: Processes per allocated pool that copy into it outside the GIL, for engines
            that compute in Python meanwhile; 0 copies in this process. None has one process share
            the copying with this one, for pools from 64 MiB on, where there are several CPUs.
        page_bytes: Plain tensors are cut into pieces of this size.
        socket_buffer_bytes: Kernel buffer of a data connection, each way; 0 takes 256 KiB within
            a host and 1 MiB between hosts.
        handshake_timeout_s: A connection that has not authenticated by then is closed.
        io_timeout_s: A frame that makes no progress for so long loses its peer.
        quiesce_s: How long a failed transfer waits for its last frame, after the last byte that
            was seen to move, before the connection that carries it is broken; it waits no
            longer than `io_timeout_s` in any case.
        retry_s: Longest pause between attempts to reach a peer that is not there yet.
        peer_timeout_s: A peer whose machine is silent for so long is lost, on idle links, too.
        max_message_bytes: Control messages longer than this end the connection.
        max_backlog_bytes: Control bytes that a peer may leave unread, and memory that its offers
            and fetches take while they wait for their other half.
        max_waiting_bytes: Memory that waiting offers and fetches of all peers take together.
        max_invited_bytes: Memory that invitations of all peers take together; what finds no room
            begins with an offer instead.
        max_control_bytes: Memory that the control connections of all peers hold together: what
            they leave unread, messages that are not whole yet, and layouts. Beyond it the one that
            holds most ends.
        max_unauthenticated: Connections that have not authenticated yet; the oldest gives way.
        max_links: Connections that peers may have opened, one for each node id.
        max_in_flight: Transfers that are offered or moving; more are refused.
        max_bounce_bytes: Memory for transfers received without destination, all together.
        max_remembered: Ended transfers whose keys are remembered. As many completions may wait for
            `poll` before new transfers are refused; those that were waited for do not count.

    """

    key: pydantic.SecretStr | None = None
    key_file: str | None = None
    peers_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    codec: str = "none"
    codec_workers: Annotated[int, pydantic.Field(ge=0, le=64)] = 0
    max_codec_bytes: Count = 64 * MIB
    transport: str = "auto"
    lanes: Annotated[int, pydantic.Field(ge=0, le=8)] = 0
    checksum: bool = True
    chunk_bytes: Annotated[int, pydantic.Field(gt=0, le=GIB)] = 16 * MIB
    copy_workers: Annotated[int | None, pydantic.Field(ge=0, le=16)] = None
    page_bytes: Annotated[int, pydantic.Field(ge=4 * KIB, le=GIB)] = MIB
    socket_buffer_bytes: Annotated[int, pydantic.Field(ge=0, le=GIB)] = 0
    handshake_timeout_s: Seconds = 5.0
    io_timeout_s: Seconds = 30.0
    quiesce_s: Seconds = 0.5
    retry_s: Seconds = 0.2
    peer_timeout_s: Annotated[float, pydantic.Field(ge=3, lt=1e6)] = 15.0
    max_message_bytes: Count = 16 * MIB
    max_backlog_bytes: Count = 64 * MIB
    max_waiting_bytes: Count = 256 * MIB
    max_invited_bytes: Count = 64 * MIB
    max_control_bytes: Count = 256 * MIB
    max_unauthenticated: Count = 64
    max_links: Count = 1024
    max_in_flight: Count = 4096
    max_bounce_bytes: Count = 256 * MIB
    max_remembered: Count = 16384

    @pydantic.model_validator(mode="after")
    def _tls_is_whole(self) -> KVTransferSettings:
        files = {"tls_cert": self.tls_cert, "tls_key": self.tls_key, "tls_ca": self.tls_ca}
        missing = [name for name, path in files.items() if path is None]
        if 0 < len(missing) < len(files):
            raise ValueError(f"TLS needs tls_cert, tls_key and tls_ca: {', '.join(missing)} unset")
        return self
