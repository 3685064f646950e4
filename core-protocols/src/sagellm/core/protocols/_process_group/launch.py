"""Device calls that the library starts as one launch. Unverified on hardware."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sagellm.core.protocols.errors import DistributedRuntimeError

from .shim import issue
from .transport import RawCall, RawWork, TorchObject

__all__ = ["GroupLaunch"]


class _Part(RawWork):
    """One call of a launch; it has a work of its own once the launch has been made."""

    def __init__(self, launch: GroupLaunch) -> None:
        self._launch = launch
        self.whole: RawWork | None = None

    def _made(self) -> RawWork:
        if self.whole is None:
            # Somebody needs the result within the context: what there is goes off now.
            self._launch.flush()
        if self.whole is None:
            raise DistributedRuntimeError("this call was part of a launch that was not made")
        return self.whole

    def wait(self, timeout_s: float) -> bool:
        return self._made().wait(timeout_s)

    def synchronize(self, timeout_s: float) -> bool:
        return self._made().synchronize(timeout_s)

    def done(self) -> bool:
        return self.whole is not None and self.whole.done()


class GroupLaunch:
    """Collectives between `start` and `end` in one launch of a torch process group.

    Torch's coalescing takes collectives alone: sends, receives and barriers end the launch that
    is being gathered and go by themselves, as does a wait for one of its calls.

    Args:
        group: With torch's `_start_coalescing` and `_end_coalescing`.
        device: Where tensors live.
        on_device: Makes the work of a launch, whose deadline is that of its first call.

    """

    def __init__(
        self,
        group: TorchObject,
        device: torch.device,
        on_device: Callable[[TorchObject, RawCall], RawWork],
    ) -> None:
        self._group = group
        self._device = device
        self._on_device = on_device
        self._parts: list[_Part] = []
        self._first: RawCall | None = None

    def add(self, call: RawCall) -> RawWork:
        """Start a collective with the others."""
        if self._first is None:
            self._group._start_coalescing(self._device)
            self._first = call
        part = _Part(self)
        issue(self._group, call)
        self._parts.append(part)
        return part

    def flush(self) -> None:
        """Make the launch of what was added so far; nothing where there is nothing."""
        if self._first is None:
            return
        first, parts = self._first, self._parts
        self._first, self._parts = None, []
        whole = self._on_device(self._group._end_coalescing(self._device), first)
        for part in parts:
            part.whole = whole
