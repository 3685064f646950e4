"""A group for programs that have CPU and device tensors: each kind goes to a library of its own.

Unverified on hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from sagellm.core.protocols import CommBackendProtocol
from sagellm.core.protocols.process_group import TorchObject

from .cpu import CpuGroup
from .libraries import GroupPlan, forget_group, library_for, library_group
from .names import ENTRY_POINTS, EntryPoint, method_of, tensors_in

__all__ = ["DeviceGroup"]


class DeviceGroup(CpuGroup):
    """CPU tensors by a backend of ours; others by torch's library for their device.

    A device's library is started by the first call with its tensors, which every rank makes.
    """

    def __init__(
        self,
        backend: CommBackendProtocol,
        library: str,
        plan: GroupPlan,
        kinds: tuple[str, ...],
        release: Callable[[], None],
        reason: str = "asked for",
    ) -> None:
        super().__init__(backend, library, plan.store, release, reason)
        self._plan = plan
        self._kinds = kinds
        self._inner: dict[str, Any] = {}  # Any: process groups of torch's

    def inner(self, device_type: str) -> TorchObject:
        """The library's group for a kind of device."""
        if device_type not in self._inner:
            library = library_for(device_type)
            self._inner[device_type] = library_group(library, device_type, self._plan)
        return self._inner[device_type]

    def _get_backend(self, device: torch.device) -> TorchObject:
        kind = torch.device(device).type
        if kind in self._kinds:
            return self.inner(kind)._get_backend(torch.device(device))
        return super()._get_backend(device)

    def _start_coalescing(self, device: TorchObject) -> None:
        kind = torch.device(device).type
        if kind == "cpu":
            super()._start_coalescing(device)
        else:
            self.inner(kind)._start_coalescing(device)

    def _end_coalescing(self, device: TorchObject) -> TorchObject:
        kind = torch.device(device).type
        if kind == "cpu":
            return super()._end_coalescing(device)
        return self.inner(kind)._end_coalescing(device)

    def set_timeout(self, timeout: timedelta) -> None:
        """Replace the deadline of later calls, on all kinds of devices."""
        super().set_timeout(timeout)
        for kind, group in self._inner.items():
            group._get_backend(torch.device(kind))._set_default_timeout(timeout)

    _set_default_timeout = set_timeout

    def abort(self) -> None:
        """Fail what is in flight here and at the peers."""
        super().abort()
        for kind, group in self._inner.items():
            getattr(group._get_backend(torch.device(kind)), "abort", lambda: None)()

    def shutdown(self) -> None:
        """Close the backend and the libraries. Safe more than once."""
        super().shutdown()
        inner, self._inner = self._inner, {}
        for kind, group in inner.items():
            forget_group(group)
            backend = group._get_backend(torch.device(kind))
            end = getattr(backend, "shutdown", getattr(backend, "_shutdown", None))
            if end is not None:
                end()

    _shutdown = shutdown


def _by_device(entry: EntryPoint, on_cpu: Callable[..., Any]) -> Callable[..., Any]:
    places = [place for place in (entry.inputs, entry.outputs) if place is not None]

    def call(self: DeviceGroup, *args: TorchObject, **kwargs: TorchObject) -> TorchObject:
        for place in places:
            for x in tensors_in(args[place]) if len(args) > place else ():
                if x.is_cpu:
                    return on_cpu(self, *args, **kwargs)
                return method_of(self.inner(x.device.type), entry)(*args, **kwargs)
        device = getattr(kwargs.get("opts", args[0] if args else None), "device", None)
        if device is not None and device.type in self._kinds:  # a barrier says where
            return method_of(self.inner(device.type), entry)(*args, **kwargs)
        return on_cpu(self, *args, **kwargs)

    call.__name__ = entry.name
    return call


for _entry in ENTRY_POINTS:
    _method = _by_device(_entry, getattr(CpuGroup, _entry.name))
    for _name in (_entry.name, *_entry.older):
        setattr(DeviceGroup, _name, _method)
