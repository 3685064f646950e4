"""What a run of the demo came to, as people and programs read it: schema `sagellm.demo/1`."""

from __future__ import annotations

from pathlib import Path

import msgspec

SCHEMA = "sagellm.demo/1"


class RequestResult(msgspec.Struct, frozen=True):
    """One prompt.

    Attributes:
        prompt_tokens: Length of the prompt.
        tokens: Ids of the new tokens.
        kv_bytes: Bytes of KV that decode received.
        wire_bytes: What they took on the wire, headers included.
        ratio: kv_bytes / wire_bytes.
        bytes_per_s: KV bytes over the time in which the busiest prefill rank was sending.
        time_to_first_token_s: From the request's turn at prefill to its first token.
        tokens_per_s: Of decode, first token to last; None for one token.

    """

    prompt_tokens: int
    tokens: list[int]
    kv_bytes: int
    wire_bytes: int
    ratio: float
    bytes_per_s: float
    time_to_first_token_s: float
    tokens_per_s: float | None


class BackendResult(msgspec.Struct, frozen=True):
    """The collective backend that was chosen, and why."""

    name: str
    algorithm: str
    reason: str


class OverlapResult(msgspec.Struct, frozen=True):
    """How much of the sending was hidden behind the computation; None where nothing was sent."""

    eff_trace: float | None
    eff_saved: float | None


class DemoResult(msgspec.Struct, frozen=True):
    """The whole run."""

    schema: str
    tokens_equal: bool
    requests: list[RequestResult]
    backend: BackendResult
    overlap: OverlapResult
    tp_prefill: int
    tp_decode: int
    codec: str
    transport: str
    files: list[str]

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
