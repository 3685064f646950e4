"""A vendor's device without the vendor: same names, same refusals, CPU bytes and gloo beneath.

`emulate("hccl")` makes `torch_npu`, the device `npu` and the c10d library `hccl` exist in this
process, so that a program for the device runs where there is none: tests, demonstrations, CI. It
proves names, options, lowering and refusals; it says nothing of speed or of the vendor's bugs.

Limits: torch's interface for this is private (present in 2.13 and 2.15, missing in 2.6); one vendor
per process; the device index is always 0, `data_ptr()` is 0, a view with other strides looks
contiguous, and tensors cannot grow in place.
CPU tensors cannot use a group that has an emulated library.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any, TypeAlias

from sagellm.core.protocols import BackendUnavailableError

from .runtime import import_torch
from .vendor_spec import VendorSpec
from .vendors import find_vendor

__all__ = ["can_emulate", "emulate"]

_Torch: TypeAlias = Any
"""torch's C++ objects of process groups have no useful types."""

_kept: list[object] = []  # registrations end when their objects do


def can_emulate() -> bool:
    """Whether this torch has the private interface that emulation stands on."""
    import_torch()
    import torch

    try:
        from torch.utils.backend_registration import (  # noqa: F401
            _setup_privateuseone_for_python_backend,
        )
    except ImportError:
        return False
    return hasattr(getattr(torch._C, "_acc", None), "create_empty_tensor")


def emulate(name: str, *, device_name: str = "emulated", devices: int = 1) -> VendorSpec:
    """Make a vendor's plug-in, device and library exist in this process.

    Not reversible, and only one vendor per process.

    Args:
        name: Backend name or alias of a vendor with a device type of its own.
        device_name: What the device calls itself.
        devices: Devices it claims to have; 0 emulates a runtime without a device.

    Raises:
        ConfigError: No such vendor.
        BackendUnavailableError: torch lacks the private interface, the vendor's device is an
            alias of `cuda`, or another vendor lives in this process.

    """
    row = find_vendor(name)
    if row.dispatch != "privateuse1" or row.module is None:
        raise BackendUnavailableError(f"{row.backend}: {row.device} is torch's own device type")
    if not can_emulate():
        raise BackendUnavailableError("this torch cannot emulate a device; torch 2.13 can")
    import torch
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    # These need a torch that can emulate, and torch is not imported before it is needed.
    from ._emulated_group import group_class
    from ._emulated_tensor import install_kernels

    taken = torch._C._get_privateuse1_backend_name()
    if taken != "privateuseone":
        raise BackendUnavailableError(f"this process has the device {taken!r} already")
    module = _device_module(row, device_name, devices)
    _setup_privateuseone_for_python_backend(row.device, backend_module=module)
    _kept.append(install_kernels(row.device))
    group = group_class(row)
    _install_plugin(row, module, group)
    _register(row, group)
    return row


def _device_module(row: VendorSpec, device_name: str, devices: int) -> ModuleType:
    module = ModuleType(f"{row.module}.{row.device}")
    current = SimpleNamespace(index=0)

    def set_device(device: object) -> None:
        current.index = int(str(device).rpartition(":")[2])

    vars(module).update(
        is_available=lambda: devices > 0,
        is_initialized=lambda: True,
        device_count=lambda: devices,
        set_device=set_device,
        current_device=lambda: current.index,
        synchronize=lambda *_: None,
        get_device_name=lambda *_: device_name,
        manual_seed_all=lambda seed: None,
        _is_in_bad_fork=lambda: False,
    )
    return module


def _install_plugin(row: VendorSpec, device_module: ModuleType, group: type) -> None:
    """Put the plug-in's modules where imports, and the path of its options class, find them."""
    assert row.module is not None
    plugin = ModuleType(row.module)
    vars(plugin).update({"__version__": "0+emulated", row.device: device_module})
    sys.modules[row.module] = plugin
    sys.modules[device_module.__name__] = device_module
    if row.options_path is None:
        return
    where, _, attribute = row.options_path.partition(":")
    parent = plugin
    names = where.split(".")
    for depth in range(2, len(names) + 1):
        child = ModuleType(".".join(names[:depth]))
        setattr(parent, names[depth - 1], child)
        sys.modules[child.__name__] = child
        parent = child
    setattr(parent, attribute.split(".")[0], group)


def _register(row: VendorSpec, group: type) -> None:
    import torch.distributed as dist

    # From 2.15 torch records the calls of groups whose library does not do so itself, which fails
    # for a group that is a Python class.
    recording = getattr(dist.distributed_c10d, "_FR_SELF_RECORDING_BACKENDS", None)
    if recording is not None:
        recording.add(row.c10d_name)

    def extended(given: _Torch, options: _Torch) -> _Torch:
        # Vendors replace an options object of another class by their defaults, silently.
        own = options if isinstance(options, group.Options) else group.Options()  # type: ignore[attr-defined]  # set by _group_class
        return group(given.store, given.group_rank, given.group_size, given.timeout, own)

    def plain(store: _Torch, rank: int, size: int, timeout: timedelta) -> _Torch:
        return group(store, rank, size, timeout, None)

    if row.in_default_map is False:
        dist.Backend.register_backend(row.c10d_name, plain, extended_api=False, devices=row.device)
    else:
        dist.Backend.register_backend(
            row.c10d_name, extended, extended_api=True, devices=[row.device]
        )
