"""Whether sending fewer bits is worth the encoding, by the speeds of the link and the codec."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sagellm.core.protocols import Choice, CommBackendProtocol
from sagellm.core.protocols.bandwidth import busbw_factor

from ._wire_codec import WIRES, make_codec

__all__ = ["WireRates", "choose_wire", "find_rates"]

_PROBE_BYTES = 1 << 20
_CALLS = 4
_ON_WIRE = {"bf16": 2.0, "fp16": 2.0, "int8": 1.0 + 4 / 256}
"""Bytes sent for a number."""


@dataclass(frozen=True, slots=True)
class WireRates:
    """Speeds by which a wire format is chosen; the same on every rank.

    Attributes:
        link_bytes_per_s: What one rank can send.
        call_s: Time of a call that carries next to nothing.
        encode_bytes_per_s: Bytes of float32 numbers written in a second, by format.
        decode_bytes_per_s: Bytes of float32 numbers read in a second, by format.
        basis: Where the numbers come from.

    """

    link_bytes_per_s: float
    call_s: float
    encode_bytes_per_s: Mapping[str, float]
    decode_bytes_per_s: Mapping[str, float]
    basis: str = "given"


def choose_wire(
    op: str,
    nbytes: int,
    size: int,
    rates: WireRates,
    wires: Sequence[str],
    backend: str,
    itemsize: int = 4,
) -> Choice:
    """The format with the shortest expected time, `none` where exact bytes are as good. Pure.

    `all_reduce` sends 2 (W-1)/W of its bytes; encoded it is two calls instead of one, every
    number is encoded once and a W-th of them again, and all are decoded twice but for our own.

    Args:
        op: `all_reduce`, `reduce_scatter_tensor` or `all_gather_into_tensor`.
        nbytes: Bytes of the rank's input.
        size: Ranks.
        rates: Agreed speeds.
        wires: Formats that may be used.
        backend: Name for the answer.
        itemsize: Bytes of a number in the tensor.

    """
    others = (size - 1) / size
    gathered = op.startswith("all_gather")
    sent = nbytes * (size - 1) if gathered else nbytes * busbw_factor(op, size)
    times = {"none": rates.call_s + sent / rates.link_bytes_per_s}
    floats = nbytes * 4 / itemsize
    for wire in wires:
        if op == "all_reduce":
            encoded, decoded, calls = floats, floats * (others + 1), 2
        elif gathered:
            encoded, decoded, calls = floats, floats * size, 1
        else:
            encoded, decoded, calls = floats * others, floats * others, 1
        times[wire] = (
            calls * rates.call_s
            + sent * _ON_WIRE[wire] / itemsize / rates.link_bytes_per_s
            + encoded / rates.encode_bytes_per_s[wire]
            + decoded / rates.decode_bytes_per_s[wire]
        )
    best = min(times, key=lambda wire: times[wire])
    listed = ", ".join(f"{wire} {1e6 * t:.0f} us" for wire, t in times.items())
    reason = (
        f"{op} of {nbytes} bytes over {size} ranks, {rates.link_bytes_per_s / 1e9:.3f} GB/s link, "
        f"codec speeds {rates.basis}: expected {listed}"
    )
    rejected = {
        wire: f"{1e6 * t:.0f} us, {best} {1e6 * times[best]:.0f} us"
        for wire, t in times.items()
        if wire != best
    }
    return Choice(backend, best, reason, 1e6 * times[best], rejected)


def find_rates(backend: CommBackendProtocol, link_bytes_per_s: float | None) -> WireRates:
    """Rank 0's measurement on every rank. Collective: some ten calls of up to 1 MiB."""
    tiny = backend.empty((256,), torch.float32).zero_()
    x = backend.empty((_PROBE_BYTES // 4,), torch.float32).zero_()
    y = torch.empty_like(x)
    call_s = _median_s(lambda: backend.all_reduce(tiny))
    link = link_bytes_per_s
    if link is None:
        whole_s = _median_s(lambda: backend.all_reduce(x))
        sent = busbw_factor("all_reduce", backend.size) * _PROBE_BYTES
        link = sent / max(1e-9, whole_s - call_s)
    figures = [link, call_s]
    for wire in WIRES:
        codec = make_codec(wire)
        encoded = torch.empty(codec.wire_bytes(x.numel()), dtype=torch.uint8, device=x.device)
        figures.append(_PROBE_BYTES / _median_s(_call(codec.encode, encoded, x)))
        figures.append(_PROBE_BYTES / _median_s(_call(codec.decode, y, encoded)))
    told = torch.tensor(figures, dtype=torch.float64).to(backend.device_type)
    backend.broadcast(told, 0)
    link, call_s, *speeds = told.tolist()
    return WireRates(
        link,
        call_s,
        dict(zip(WIRES, speeds[0::2], strict=True)),
        dict(zip(WIRES, speeds[1::2], strict=True)),
        "and link measured by rank 0" if link_bytes_per_s is None else "measured by rank 0",
    )


def _call(
    function: Callable[[torch.Tensor, torch.Tensor], object], a: torch.Tensor, b: torch.Tensor
) -> Callable[[], object]:
    return lambda: function(a, b)


def _median_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return max(1e-9, statistics.median(times[1:]))
