"""Which group serves a plan: the choice among our backends on the CPU, and devices beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from sagellm.core.protocols import CommBackendProtocol, ConfigError

from ..gloo_backend import GlooBackend
from .cpu import CpuGroup
from .devices import DeviceGroup
from .libraries import GroupPlan, device_types, forget_group, library_group

__all__ = ["make_group"]

logger = logging.getLogger(__name__)

_TORCH = "torch:"

Release = Callable[[], None]


def make_group(
    plan: GroupPlan,
    library: str,
    backend: str,
    options: Mapping[str, Any],  # Any: each option has its own type
) -> Any:  # Any: a ProcessGroup
    """A process group for a plan; every rank of it makes this call.

    Args:
        plan: What torch wants.
        library: Name that the group has in torch.
        backend: As in `register_c10d_backend`.
        options: The backend's own.

    Raises:
        ConfigError: No such backend.

    """
    kinds = tuple(device_types())
    if backend.startswith(_TORCH):
        name = backend.removeprefix(_TORCH)
        return library_group(name, "cpu" if name == "gloo" or not kinds else kinds[0], plan)
    chosen, release = _cpu_backend(plan, backend, options)
    if kinds:  # pragma: device-only
        return DeviceGroup(chosen, library, plan, kinds, release)
    return CpuGroup(chosen, library, plan.store, release)


def _cpu_backend(
    plan: GroupPlan,
    name: str,
    options: Mapping[str, Any],  # Any: each option has its own type
) -> tuple[CommBackendProtocol, Release]:
    """The backend for CPU tensors, and what ends it."""
    if name in ("auto", "gloo"):
        return _gloo(plan, options)
    raise ConfigError(f"backend {name!r} is not one of auto, gloo, torch:LIBRARY")


def _gloo(plan: GroupPlan, options: Mapping[str, Any]) -> tuple[CommBackendProtocol, Release]:
    group = library_group("gloo", "cpu", plan)
    backend = GlooBackend(process_group=group, timeout_s=plan.timeout_s, options=options)

    def release() -> None:
        backend.close()
        forget_group(group)

    return backend, release
