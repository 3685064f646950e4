"""Comparing calls before they are sent, for libraries that hang or corrupt when they differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import torch

from sagellm.core.protocols.errors import CollectiveMismatchError, CommTimeoutError

from .shim import dtype_name
from .transport import Position, RawCall, RawWork, Transport

__all__ = ["CheckedTransport", "fingerprint", "mismatch"]

_BYTES = 192


def fingerprint(call: RawCall) -> str:
    """What must agree across ranks, as text: op, dtype, bytes, reduction and root."""
    tensors = call.inputs or call.outputs
    # Of rooted operations only the root holds all parts: the per-rank part is what agrees.
    each = call.outputs[:1] if call.op == "scatter" else tensors[:1]
    uneven = bool(call.in_splits or call.out_splits)
    facts: list[object] = [call.op]
    if each:
        facts.append(dtype_name(each[0].dtype))
        facts.append("uneven" if uneven else f"{each[0].nbytes} bytes")
    if call.reduce_op is not None:
        facts.append(str(call.reduce_op))
    if call.peer is not None:
        facts.append(f"root {call.peer}")
    return " ".join(map(str, facts))


def mismatch(where: str, calls: dict[int, str]) -> CollectiveMismatchError:
    """The error that every rank raises; names each rank's call."""
    text = "; ".join(f"rank {rank}: {call}" for rank, call in sorted(calls.items()))
    return CollectiveMismatchError(f"{where}: ranks made different calls: {text}", calls=calls)


class CheckedTransport(Transport):
    """A transport that exchanges a fingerprint of every collective first. For debugging.

    Point-to-point calls pass unchecked: their order is between two ranks only.
    """

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self._sequence = 0

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def global_ranks(self) -> tuple[int, ...]:
        return self.inner.global_ranks

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def group_name(self) -> str:
        return self.inner.group_name

    def issue(self, call: RawCall) -> RawWork:
        if call.op not in ("send", "recv"):
            self._compare(call)
        return self.inner.issue(call)

    def issue_batch(self, calls: Sequence[RawCall]) -> list[RawWork]:
        return self.inner.issue_batch(calls)

    def start_coalescing(self) -> None:
        self.inner.start_coalescing()

    def end_coalescing(self) -> None:
        self.inner.end_coalescing()

    def explain_failure(self, describe: str, error: Exception) -> Exception:
        return self.inner.explain_failure(describe, error)

    def attach(self, position: Callable[[], Position | None]) -> None:
        self.inner.attach(position)

    def peer_positions(self) -> Mapping[int, Position | None]:
        return self.inner.peer_positions()

    def abort(self, reason: str) -> None:
        self.inner.abort(reason)

    def close(self) -> None:
        self.inner.close()

    def split(self, ranks: Sequence[int], name: str, timeout_s: float) -> Transport | None:
        return self.inner.split(ranks, name, timeout_s)

    def _compare(self, call: RawCall) -> None:
        ours = json.dumps([self._sequence, fingerprint(call)]).encode()[:_BYTES]
        self._sequence += 1
        x = torch.frombuffer(bytearray(ours.ljust(_BYTES)), dtype=torch.uint8).to(self.device)
        out = torch.empty(_BYTES * self.size, dtype=torch.uint8, device=self.device)
        work = self.inner.issue(
            RawCall(
                "all_gather",
                [x],
                [out],
                timeout_s=call.timeout_s,
                describe=call.describe,
                device=call.device,
            )
        )
        if not work.synchronize(call.timeout_s):
            raise self.inner.explain_failure(
                call.describe,
                CommTimeoutError(f"not every rank made a call within {call.timeout_s} s"),
            )
        rows = out.cpu().view(self.size, _BYTES).tolist()  # numpy may be absent
        texts = [bytes(row).decode().rstrip() for row in rows]
        if len(set(texts)) > 1:
            calls = {rank: _readable(text) for rank, text in enumerate(texts)}
            raise mismatch(call.describe, calls)


def _readable(text: str) -> str:
    try:
        sequence, what = json.loads(text)
    except ValueError:
        return text
    return f"#{sequence} {what}"
