"""Below how many bytes a tensor gains by sharing a call, the same number on every rank."""

from __future__ import annotations

import functools
import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sagellm.core.protocols import CommBackendProtocol

__all__ = ["FusionThreshold", "crossing_bytes", "find_threshold", "threshold_bytes"]

_SIZES = tuple(kib << 10 for kib in (1, 4, 16, 32, 64, 128, 256))
"""Tensor sizes that are timed, each and in company."""

_TOGETHER = 8
_ROUNDS = 24
"""Calls of which the shortest counts, as many in company as alone: on a busy machine the shortest
of a few is longer than that of many."""

_MARGIN = 1.15
"""What company has to gain, so that a measurement that is off loses nothing."""

MEMBER_US = 3.0
"""What a member costs in Python: queueing, its share of the copies' launches (2-core x86-64)."""

_QUICK_US = 30.0
"""A call below this is over before a handle or a thread for it would pay."""

_QUICK_BYTES = 8 << 10
"""Most that such calls fuse: 200 tensors of 8 KiB gained 1.5x, and more leave the cache."""

_QUICK_BUCKET_BYTES = 256 << 10
"""What shares a call of those: it stays in the second cache."""

_BUCKET_BYTES = 16 << 20
"""What shares a call of others. A list in one call, in the caller's thread, took 0.8 of the time of
buckets of 2 MiB with two on their way: gloo's calls gain nothing by overlap (2-core x86-64)."""


@dataclass(frozen=True, slots=True)
class FusionThreshold:
    """Tensors below `nbytes` are fused.

    Attributes:
        nbytes: Of a tensor.
        reason: Where the number comes from.
        bucket_bytes: What shares a call, so that its fixed cost hardly counts.
        quick: Whether calls are so short that nothing is gained by doing something meanwhile.

    """

    nbytes: int
    reason: str
    bucket_bytes: int = _BUCKET_BYTES
    quick: bool = False

    @property
    def queued(self) -> FusionThreshold:
        """For tensors that come one by one."""
        if not self.quick or self.nbytes == 0:
            return self
        reason = f"{self.reason} where they come as a list; to queue one costs as much as its call"
        return replace(self, nbytes=0, reason=reason)


_found: weakref.WeakKeyDictionary[CommBackendProtocol, FusionThreshold] = (
    weakref.WeakKeyDictionary()
)
"""Measured once per backend; every rank measures in the same call, so all know it or none."""


def threshold_bytes(call_us: float, copy_bytes_per_s: float, bytes_per_s: float) -> int:
    """Bytes at which fusing stops to gain: a call saved against two copies and the queueing.

    The prize is a call's fixed cost; half of it counts, so that a model that is off by two
    still loses nothing. A member is copied in and out, and never gains
    once it fills the wire by itself, which is at latency times bandwidth.

    Args:
        call_us: Time of a call that carries next to nothing.
        copy_bytes_per_s: Of this host's memory.
        bytes_per_s: Of a call that carries much.

    >>> threshold_bytes(3.0, 10e9, 14e9)
    0
    >>> threshold_bytes(126.0, 10e9, 2e9) // 1000
    252
    """
    gain_s = max(0.0, call_us / 2 - MEMBER_US) * 1e-6
    return int(min(gain_s * copy_bytes_per_s / 2, call_us * 1e-6 * bytes_per_s))


def crossing_bytes(
    sizes: Sequence[int], alone_us: Sequence[float], fused_us: Sequence[float]
) -> int:
    """Bytes up to which company gains, by times of a tensor of each size; straight in between.

    >>> crossing_bytes([10, 20], [230.0, 230.0], [100.0, 300.0])
    15
    >>> crossing_bytes([10, 20], [1.0, 9.0], [2.0, 3.0])
    0
    """
    gains = [a / _MARGIN - f for a, f in zip(alone_us, fused_us, strict=True)]
    last = 0
    for i, gain in enumerate(gains):
        if gain <= 0:
            if i == 0:
                return 0
            before = gains[i - 1]
            return last + int((sizes[i] - last) * before / (before - gain))
        last = sizes[i]
    return last


def find_threshold(backend: CommBackendProtocol) -> FusionThreshold:
    """The threshold of `backend`: by its cost model if it has one, else measured. Collective.

    Measured means that tensors of 1 to 256 KiB are reduced alone and in company, some 350 calls
    once per backend; rank 0's figures are the ones that every rank takes. A cost model's are the
    same everywhere already.
    """
    found = _found.get(backend)
    if found is None:
        found = _found[backend] = _find(backend)
    return found


def _find(backend: CommBackendProtocol) -> FusionThreshold:
    if backend.size == 1:
        return FusionThreshold(0, "a group of one sends nothing")
    small = large = None
    if getattr(backend, "cost_model", None) is not None:  # a calibration has other sizes
        small = backend.explain("all_reduce", _SIZES[0]).estimate_us
        large = backend.explain("all_reduce", 1 << 20).estimate_us
    if small is not None and large is not None:
        spread_s = max(1e-9, (large - small) * 1e-6)
        bytes_per_s = ((1 << 20) - _SIZES[0]) / spread_s
        # A model knows no memory, and ranks must not measure each its own.
        nbytes = threshold_bytes(small, 10e9, bytes_per_s)
        why = (
            f"the cost model: a call costs {small:.1f} us and carries {bytes_per_s / 1e9:.2f} GB/s"
        )
    else:
        nbytes, small, fused = _measure(backend)
        why = (
            f"rank 0's measurement: {_SIZES[0]} bytes take {small:.1f} us alone and {fused:.1f} "
            f"in company"
        )
    quick = small < _QUICK_US
    if quick:
        nbytes = min(nbytes, _QUICK_BYTES)
    bucket = _QUICK_BUCKET_BYTES if quick else _BUCKET_BYTES
    why += f": tensors below {nbytes} bytes are fused"
    return FusionThreshold(nbytes, why, bucket, quick)


def _measure(backend: CommBackendProtocol) -> tuple[int, float, float]:
    """The threshold, and a small tensor's times alone and in company; rank 0's."""
    alone_us, fused_us = [], []
    for nbytes in _SIZES:
        count = nbytes // 4
        device = backend.device_type
        xs = [torch.zeros(count, device=device) for _ in range(_TOGETHER)]
        flat = backend.empty((count * _TOGETHER,), torch.float32).zero_()
        views = list(torch.split(flat, count))

        def fused(
            xs: list[torch.Tensor] = xs,
            flat: torch.Tensor = flat,
            views: list[torch.Tensor] = views,
        ) -> None:
            torch._foreach_copy_(views, xs)
            backend.all_reduce(flat)
            torch._foreach_copy_(xs, views)

        alone, company = _shortest_us(
            backend, [functools.partial(backend.all_reduce, x) for x in xs], fused
        )
        alone_us.append(alone)
        fused_us.append(company / _TOGETHER + _LISTED_US)
    figures = torch.tensor(
        [float(crossing_bytes(_SIZES, alone_us, fused_us)), alone_us[0], fused_us[0]],
        dtype=torch.float64,
    ).to(backend.device_type)
    backend.broadcast(figures, 0)
    nbytes, small, company = figures.tolist()
    return int(nbytes), small, company


_LISTED_US = 0.6
"""Sorting one tensor of a list into its bucket (2-core x86-64)."""


def _shortest_us(
    backend: CommBackendProtocol, alone: Sequence[Callable[[], object]], fused: Callable[[], object]
) -> tuple[float, float]:
    """Of the calls of tensors alone, and of the one in company, taken in turn.

    Not the median: what a busy machine adds is no gain of fusing, which must never lose.
    """
    on_device = backend.device_type != "cpu"
    shortest = [math.inf, math.inf]
    for i in range(-1, _ROUNDS):
        for which, call in enumerate((alone[i % len(alone)], fused)):
            start = time.perf_counter()
            call()
            if on_device:  # unverified on hardware: a device's call returns before it is done
                torch.accelerator.synchronize()
            if i >= 0:
                shortest[which] = min(shortest[which], time.perf_counter() - start)
    alone_us, fused_us = (max(1e-3, seconds * 1e6) for seconds in shortest)
    return alone_us, fused_us
