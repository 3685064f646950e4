"""What the parent and its rank processes say to each other: JSON lines over pipes.

A prompt goes to prefill ranks only. A decode rank learns how many tokens there are and which
one comes first; everything else it knows of a request arrives as KV cache.

Times are seconds of `time.monotonic`, which all processes of a host share.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Role: TypeAlias = Literal["prefill", "decode"]


class Job(msgspec.Struct, frozen=True):
    """What every rank is told when it starts.

    Attributes:
        checkpoint: Folder of the model.
        tp_prefill: Prefill ranks; they are ranks 0.. of the job.
        tp_decode: Decode ranks; they follow.
        backend: Name for `create_comm_backend`.
        codec: Codec of the KV channel.
        transport: Transport of the KV channel.
        prefill_blocks: KV blocks of a prefill rank.
        decode_blocks: KV blocks of a decode rank.
        page_tokens: Tokens per KV block.
        threads: Threads that a rank computes with.
        deadline_s: Longest wait for another rank, to come or in a collective.
        transfer_deadline_s: A request's KV must have landed by then.
        sabotage_layer: Layer whose received KV is zeroed; None leaves it alone.

    """

    checkpoint: str
    tp_prefill: int
    tp_decode: int
    backend: str = "auto"
    codec: str = "none"
    transport: str = "tcp"
    prefill_blocks: int = 64
    decode_blocks: int = 64
    page_tokens: int = 16
    threads: int = 1
    deadline_s: float = 60.0
    transfer_deadline_s: float = 60.0
    sabotage_layer: int | None = None

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tp_prefill + self.tp_decode

    @property
    def prefill_ranks(self) -> list[int]:
        """Global ranks that prefill."""
        return list(range(self.tp_prefill))

    @property
    def decode_ranks(self) -> list[int]:
        """Global ranks that decode."""
        return list(range(self.tp_prefill, self.world_size))

    def role(self, rank: int) -> Role:
        """What a global rank does."""
        return "prefill" if rank < self.tp_prefill else "decode"


class Prefill(msgspec.Struct, frozen=True, tag=True):
    """To prefill ranks: compute a prompt, stream its KV, say the first token."""

    id: str
    tokens: list[int]


class Measure(msgspec.Struct, frozen=True, tag=True):
    """To prefill ranks: time a prompt overlapped, without sending, and sending alone.

    Attributes:
        overlapped_id: Transfer id of the run that does both.
        alone_id: Transfer id of the run that only sends.
        tokens: The prompt.
        overlapped_first: Whether the overlapped run comes before the two others.

    """

    overlapped_id: str
    alone_id: str
    tokens: list[int]
    overlapped_first: bool


class Admit(msgspec.Struct, frozen=True, tag=True):
    """To decode ranks: make room for a request and let its KV come.

    Attributes:
        id: Of the request.
        num_tokens: Tokens whose KV comes.
        max_new_tokens: Tokens to make, the first one included.
        discard: The KV is only timed: free its blocks when it has landed.

    """

    id: str
    num_tokens: int
    max_new_tokens: int = 0
    discard: bool = False


class Decode(msgspec.Struct, frozen=True, tag=True):
    """To decode ranks: the first token of an admitted request."""

    id: str
    first_token: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """To every rank: hand over the timeline and end."""


Command: TypeAlias = Prefill | Measure | Admit | Decode | Stop


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A rank has loaded its shard and met its peers."""

    pid: int
    kv_heads: list[int]
    parameter_bytes: int
    parameter_bytes_total: int
    parameter_bytes_bound: int
    backend: str
    algorithm: str
    reason: str
    paths: dict[int, str]


class LayerSent(msgspec.Struct, frozen=True, tag=True):
    """A prefill rank has a layer of a request on its way."""

    id: str
    layer: int


class FirstToken(msgspec.Struct, frozen=True, tag=True):
    """A prefill rank knows the first token."""

    id: str
    token: int
    at_s: float


class Prefilled(msgspec.Struct, frozen=True, tag=True):
    """A prefill rank's KV of a request has landed.

    Attributes:
        id: Of the request.
        kv_bytes: Bytes of KV sent.
        wire_bytes: What they took on the wire.
        comm_s: Time in which it was sending.
        eff_trace: Share of that in which it also computed.

    """

    id: str
    kv_bytes: int
    wire_bytes: int
    comm_s: float
    eff_trace: float | None


class Token(msgspec.Struct, frozen=True, tag=True):
    """A decode rank has made a token more."""

    id: str
    count: int


class Decoded(msgspec.Struct, frozen=True, tag=True):
    """A decode rank has finished a request."""

    id: str
    tokens: list[int]
    started_s: float
    ended_s: float


class Measured(msgspec.Struct, frozen=True, tag=True):
    """What a prefill rank measured: three makespans, and the trace of the first."""

    overlapped_s: float
    compute_s: float
    comm_s: float
    eff_trace: float | None


class Span(msgspec.Struct, frozen=True):
    """Something a rank did.

    Attributes:
        lane: Where: `compute`, `kv send` or `kv receive`.
        name: What, such as `layer 3`.
        request: Of which request.
        start_s: Beginning.
        end_s: End.
        nbytes: Bytes moved, 0 when none or unknown.

    """

    lane: str
    name: str
    request: str
    start_s: float
    end_s: float
    nbytes: int = 0


class Timeline(msgspec.Struct, frozen=True, tag=True):
    """Everything a rank did, sent last."""

    spans: list[Span]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A rank cannot go on.

    Attributes:
        code: `code` of the error, `bug` for one that no code describes.
        message: The error's text.
        at_s: When it learnt of it.

    """

    code: str
    message: str
    at_s: float


class Exited(msgspec.Struct, frozen=True, tag=True):
    """A rank's process is gone; made by the parent."""

    returncode: int
    at_s: float


Event: TypeAlias = (
    Ready | LayerSent | FirstToken | Prefilled | Token | Decoded | Measured | Timeline | Failed
    | Exited
)  # fmt: skip

encode = msgspec.json.Encoder().encode
decode_command = msgspec.json.Decoder(Command).decode
decode_event = msgspec.json.Decoder(Event).decode
decode_job = msgspec.json.Decoder(Job).decode
