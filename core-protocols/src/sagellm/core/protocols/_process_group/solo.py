"""The transport of a group of one: it never has anything to send."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sagellm.core.protocols.errors import UnsupportedOperationError

from .transport import RawCall, RawWork, Transport

__all__ = ["SoloTransport"]


class SoloTransport(Transport):
    """A world of this process alone; needs no library and no process group."""

    def __init__(self, device: torch.device, name: str = "solo", global_rank: int = 0) -> None:
        self._device = device
        self._name = name
        self._global_rank = global_rank

    @property
    def rank(self) -> int:
        return 0

    @property
    def size(self) -> int:
        return 1

    @property
    def global_ranks(self) -> tuple[int, ...]:
        return (self._global_rank,)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def group_name(self) -> str:
        return self._name

    def issue(self, call: RawCall) -> RawWork:
        raise UnsupportedOperationError(f"{call.describe}: a group of one has nobody to talk to")

    def issue_batch(self, calls: Sequence[RawCall]) -> list[RawWork]:
        return [self.issue(call) for call in calls]

    def explain_failure(self, describe: str, error: Exception) -> Exception:
        return error

    def abort(self, reason: str) -> None:
        """Nobody else has to learn of it."""

    def close(self) -> None:
        """Nothing was opened."""

    def split(self, ranks: Sequence[int], name: str, timeout_s: float) -> Transport | None:
        return SoloTransport(self._device, name, self._global_rank)
