"""A device's memory and streams, as far as moving blocks needs them. Unverified on hardware.

One class for all kinds: `torch.get_device_module` gives `torch.cuda` (CUDA and ROCm), `torch.npu`,
`torch.mlu`, `torch.musa`, which agree in streams and events. Tests put another device in its
place by `device_of`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sagellm.core.protocols import (
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    ReadyEvent,
    UnsupportedOperationError,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Device", "Queue", "device_of", "wait_for"]

_FIRST_LOOK_S, _LONGEST_LOOK_S = 20e-6, 1e-3


class Device:
    """Where a pool's tensors are.

    Args:
        device: A device of torch.

    Raises:
        UnsupportedOperationError: It has no streams, or torch cannot use it here.

    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        try:
            self._module: Any = torch.get_device_module(device)  # one module for each kind
        except RuntimeError:
            self._module = None
        if not (hasattr(self._module, "Stream") and hasattr(self._module, "Event")):
            raise UnsupportedOperationError(
                f"the tensors are on {device}, which has no streams in this torch: a channel moves "
                "memory of the host and of devices such as cuda, npu, mlu or musa; copy the "
                "blocks to the host first"
            )

    def __repr__(self) -> str:
        return str(self.device)

    def pinned(self, nbytes: int) -> Tensor:
        """Bytes of the host that the device copies to and from by itself."""
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, nbytes: int) -> Tensor:
        """Bytes of the device."""
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def queue(self) -> Queue:
        """A stream of our own."""
        return Queue(self.device, self._module)

    def mark(self) -> ReadyEvent:
        """An event behind all that the caller's current stream was told to do."""
        event = self._module.Event()
        event.record(self._module.current_stream(self.device))
        found: ReadyEvent = event
        return found


class Queue:
    """Work that a device does in order, beside what its user has it do. Thread-safe.

    Args:
        device: Of torch.
        module: Of torch, for this kind of device.

    """

    def __init__(self, device: torch.device, module: Any) -> None:  # noqa: ANN401 - of torch
        self._device = device
        self._module = module
        self._stream = module.Stream(device)

    def follow(self) -> None:
        """Begin nothing more before what the caller's current stream was told until now."""
        self._stream.wait_stream(self._module.current_stream(self._device))

    def submit(self, work: Callable[[], None]) -> ReadyEvent:
        """Have the device do what `work` asks torch for; returns at once, with its end.

        What goes wrong here is said by the end, too, once nothing of it runs any more.
        """
        event: Any = None  # of torch
        error: Exception | None = None
        with self._module.stream(self._stream):
            try:
                work()
            except Exception as e:  # of torch, or of the device's library
                error = e
            try:
                event = self._module.Event()
                event.record(self._stream)
            except Exception as e:  # the device is lost, with all it had to do
                event, error = None, error or e
        end: ReadyEvent = event if error is None and event is not None else _Failed(event, error)
        return end


class _Failed:
    """The end of work that could not be asked for, or not all of it."""

    def __init__(self, event: ReadyEvent | None, error: Exception | None) -> None:
        self._event = event
        self._error = error

    def query(self) -> bool:
        if self._event is not None and not self._event.query():
            return False
        raise self._error or RuntimeError("the device is lost")

    def synchronize(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def device_of(tensors: Iterable[Tensor]) -> Device | None:
    """Where all of these are; None for the host.

    Raises:
        ConfigError: They are in several places.
        UnsupportedOperationError: They are where no stream can copy them.

    """
    found = {t.device for t in tensors}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise ConfigError(f"the tensors of one pool are on {names}; they have to be on one device")
    if not found or (device := found.pop()).type == "cpu":
        return None
    return Device(device)


def wait_for(event: ReadyEvent, timeout_s: float, what: str) -> None:
    """Block until it has happened.

    Raises:
        CommTimeoutError: It has not, in that time.
        DistributedRuntimeError: The device has failed.

    """
    end, pause_s = time.monotonic() + timeout_s, _FIRST_LOOK_S
    while True:
        try:
            if event.query():
                return
        except Exception as e:  # of whatever library
            text = f"copying {what} failed: {type(e).__name__}: {e}"
            raise DistributedRuntimeError(text) from e
        if time.monotonic() > end:
            raise CommTimeoutError(f"copying {what} took more than {timeout_s:g} s")
        time.sleep(pause_s)
        pause_s = min(1.25 * pause_s, _LONGEST_LOOK_S)
