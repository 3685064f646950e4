"""Memory that fused tensors share: staging buckets that are used again, and tensors' homes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sagellm.core.protocols import CommBackendProtocol

__all__ = ["Home", "Homes", "Staging", "StagingPool"]

_ALIGN_BYTES = 64
_LAYOUTS = 8
"""Layouts whose views a bucket remembers; a training step or a forward has one or two."""


class Staging:
    """One bucket that tensors are copied into; its views are kept per layout."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self._views: dict[tuple[torch.Size, ...], list[Tensor]] = {}

    def views(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """A view for each of `xs`, one after the other, shaped alike."""
        layout = tuple(x.shape for x in xs)
        found = self._views.get(layout)
        if found is None:
            if len(self._views) >= _LAYOUTS:
                self._views.clear()
            counts = [x.numel() for x in xs]
            parts = torch.split(self.flat[: sum(counts)], counts)
            found = [part.view(x.shape) for part, x in zip(parts, xs, strict=True)]
            self._views[layout] = found
        return found


class StagingPool:
    """Staging buckets by dtype, made by the backend (symmetric where it can) and used again."""

    def __init__(self, backend: CommBackendProtocol, bucket_bytes: int) -> None:
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._free: dict[torch.dtype, list[Staging]] = {}

    def take(self, dtype: torch.dtype, count: int) -> Staging:
        """A bucket of at least `count` elements; the same choice on every rank."""
        free = self._free.setdefault(dtype, [])
        for i, staging in enumerate(free):
            if staging.flat.numel() >= count:
                return free.pop(i)
        # One more tensor than the limit may come in before it is seen.
        room = max(count, -(-self._bucket_bytes * 5 // 4) // dtype.itemsize)
        return Staging(self._backend.empty((room,), dtype))

    def give(self, staging: Staging) -> None:
        """Take a bucket back that nothing is in flight on."""
        self._free.setdefault(staging.flat.dtype, []).append(staging)


@dataclass(slots=True)
class Home:
    """One piece of memory that tensors live in, filled from its start."""

    flat: Tensor
    used: int = 0


class Homes:
    """Tensors that live in buckets, so that sending a run of them copies nothing."""

    def __init__(self, backend: CommBackendProtocol, bucket_bytes: int) -> None:
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._latest: dict[torch.dtype, Home] = {}
        self._by_storage: dict[int, Home] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor next to the one made before it, in a new bucket when that one is full."""
        count = math.prod(shape)
        step = max(1, _ALIGN_BYTES // dtype.itemsize)
        room = -(-count // step) * step
        home = self._latest.get(dtype)
        if home is None or home.used + room > home.flat.numel():
            size = max(room, self._bucket_bytes // dtype.itemsize)
            # Zeroed: the gaps between tensors are reduced along and must stay harmless.
            home = Home(self._backend.empty((size,), dtype).zero_())
            self._latest[dtype] = home
            self._by_storage[_storage(home.flat)] = home
        start, home.used = home.used, home.used + room
        return home.flat[start : start + count].view(tuple(shape))

    def __bool__(self) -> bool:
        """Whether any tensor lives here."""
        return bool(self._by_storage)

    def owns(self, x: Tensor) -> bool:
        """Whether `x` lives in one of the buckets."""
        return bool(self._by_storage) and _storage(x) in self._by_storage

    def span(self, xs: Sequence[Tensor]) -> Tensor | None:
        """The one stretch of a bucket that `xs` fill in order; None when they do not."""
        home = self._by_storage.get(_storage(xs[0]))
        if home is None:
            return None
        flat = home.flat
        step = max(1, _ALIGN_BYTES // flat.itemsize)
        base = flat.storage_offset()
        start = end = xs[0].storage_offset() - base
        for x in xs:
            here = x.storage_offset() - base
            if here != end or _storage(x) != _storage(flat) or not x.is_contiguous():
                return None
            last = here + x.numel()
            end = -(-last // step) * step
        return flat[start:last]


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
