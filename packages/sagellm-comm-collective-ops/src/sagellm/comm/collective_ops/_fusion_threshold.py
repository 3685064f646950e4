"""Below how many bytes a tensor gains by sharing a call, the same number on every rank."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sagellm.core.protocols import CommBackendProtocol

__all__ = ["FusionThreshold", "find_threshold", "threshold_bytes"]

_SMALL_BYTES = 1 << 10
_LARGE_BYTES = 1 << 20
_CALLS = 7

MEMBER_US = 6.0
"""What a member costs in Python: queueing, its share of the copies' launches (2-core x86-64)."""


@dataclass(frozen=True, slots=True)
class FusionThreshold:
    """Tensors below `nbytes` are fused; `reason` says where the number comes from."""

    nbytes: int
    reason: str


_found: weakref.WeakKeyDictionary[CommBackendProtocol, FusionThreshold] = (
    weakref.WeakKeyDictionary()
)
"""Measured once per backend; every rank measures in the same call, so all know it or none."""


def threshold_bytes(call_us: float, copy_bytes_per_s: float, bytes_per_s: float) -> int:
    """Bytes at which fusing stops to gain: a call saved against two copies and the queueing.

    The prize is a call's fixed cost; half of it counts, so that a measurement that is off by two
    still loses nothing. A member is copied in and out, and never gains
    once it fills the wire by itself, which is at latency times bandwidth.

    Args:
        call_us: Time of a call that carries next to nothing.
        copy_bytes_per_s: Of this host's memory.
        bytes_per_s: Of a call that carries much.

    >>> threshold_bytes(3.0, 10e9, 14e9)
    0
    >>> threshold_bytes(126.0, 10e9, 2e9) // 1000
    113
    """
    gain_s = max(0.0, call_us / 2 - MEMBER_US) * 1e-6
    return int(min(gain_s * copy_bytes_per_s / 2, gain_s * bytes_per_s))


def find_threshold(backend: CommBackendProtocol) -> FusionThreshold:
    """The threshold of `backend`: by its cost model if it has one, else measured. Collective.

    Measured means some forty calls, once per backend; rank 0's figures are the ones that every
    rank takes. A cost model's are the same everywhere already.
    """
    found = _found.get(backend)
    if found is None:
        found = _found[backend] = _find(backend)
    return found


def _find(backend: CommBackendProtocol) -> FusionThreshold:
    if backend.size == 1:
        return FusionThreshold(0, "a group of one sends nothing")
    small = backend.explain("all_reduce", _SMALL_BYTES).estimate_us
    large = backend.explain("all_reduce", _LARGE_BYTES).estimate_us
    if small is not None and large is not None:
        copy_bytes_per_s = 10e9  # a model knows no memory; ranks must not measure each its own
        source = "the cost model"
    else:
        figures = _measure(backend)
        small, large, copy_bytes_per_s = figures
        source = "rank 0's measurement"
    spread_s = max(1e-9, (large - small) * 1e-6)
    bytes_per_s = (_LARGE_BYTES - _SMALL_BYTES) / spread_s
    nbytes = threshold_bytes(small, copy_bytes_per_s, bytes_per_s)
    return FusionThreshold(
        nbytes,
        f"{source}: a call costs {small:.1f} us and carries {bytes_per_s / 1e9:.2f} GB/s, copies "
        f"{copy_bytes_per_s / 1e9:.1f} GB/s: tensors below {nbytes} bytes are fused",
    )


def _measure(backend: CommBackendProtocol) -> tuple[float, float, float]:
    small = backend.empty((_SMALL_BYTES // 4,), torch.float32).zero_()
    large = backend.empty((_LARGE_BYTES // 4,), torch.float32).zero_()
    other = torch.empty_like(large)
    times = [
        _shortest_us(backend, lambda: backend.all_reduce(small), 4 * _CALLS),
        _shortest_us(backend, lambda: backend.all_reduce(large), _CALLS),
        _shortest_us(backend, lambda: other.copy_(large), _CALLS),
    ]
    figures = torch.tensor(
        [times[0], times[1], _LARGE_BYTES / (times[2] * 1e-6)], dtype=torch.float64
    ).to(backend.device_type)
    backend.broadcast(figures, 0)
    call_us, large_us, copy_bytes_per_s = figures.tolist()
    return call_us, large_us, copy_bytes_per_s


def _shortest_us(backend: CommBackendProtocol, call: Callable[[], object], calls: int) -> float:
    """Not the median: what a busy machine adds is no gain of fusing, which must never lose."""
    on_device = backend.device_type != "cpu"
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        if on_device:  # unverified on hardware: a device's call returns before it is done
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return max(1e-3, min(times[1:]) * 1e6)
