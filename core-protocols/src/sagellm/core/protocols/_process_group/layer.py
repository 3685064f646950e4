"""A transport in front of another one, which does everything that the layer leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from .transport import Position, RawCall, RawWork, Transport

if TYPE_CHECKING:
    import torch

__all__ = ["TransportLayer"]


class TransportLayer(Transport):
    """Hands every call on to `inner`; a subclass overrides what it does otherwise.

    `split` gives the inner transport's own, without the layer.
    """

    def __init__(self, inner: Transport) -> None:
        self.inner = inner

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
        return self.inner.issue(call)

    def issue_batch(self, calls: Sequence[RawCall]) -> list[RawWork]:
        return self.inner.issue_batch(calls)

    def attach(self, position: Callable[[], Position | None]) -> None:
        self.inner.attach(position)

    def peer_positions(self) -> Mapping[int, Position | None]:
        return self.inner.peer_positions()

    def start_coalescing(self) -> None:
        self.inner.start_coalescing()

    def end_coalescing(self) -> None:
        self.inner.end_coalescing()

    def explain_failure(self, describe: str, error: Exception) -> Exception:
        return self.inner.explain_failure(describe, error)

    def abort(self, reason: str) -> None:
        self.inner.abort(reason)

    def close(self) -> None:
        self.inner.close()

    def split(self, ranks: Sequence[int], name: str, timeout_s: float) -> Transport | None:
        return self.inner.split(ranks, name, timeout_s)
