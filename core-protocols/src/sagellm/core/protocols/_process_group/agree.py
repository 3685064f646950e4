"""Comparing calls before they are sent, for libraries that hang or corrupt when they differ."""

from __future__ import annotations

import json

import torch

from sagellm.core.protocols.errors import CollectiveMismatchError, CommTimeoutError

from .layer import TransportLayer
from .shim import dtype_name
from .transport import RawCall, RawWork, Transport

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


class CheckedTransport(TransportLayer):
    """A transport that exchanges a fingerprint of every collective first. For debugging.

    Point-to-point calls pass unchecked: their order is between two ranks only.
    """

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self._sequence = 0

    def issue(self, call: RawCall) -> RawWork:
        if call.op not in ("send", "recv"):
            self._compare(call)
        return self.inner.issue(call)

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
