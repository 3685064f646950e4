"""`create_domestic_backend`: from a name to a backend that works, or to what is missing."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from sagellm.core.protocols import (
    BackendUnavailableError,
    ConfigError,
    CostModelProtocol,
    DistributedRuntimeError,
    TopologyManagerProtocol,
)
from sagellm.core.protocols.doctor import require_supported_platform

from .auto import choose_vendor
from .groups import open_group
from .options import vendor_options
from .runtime import VendorRuntime, load_vendor
from .specs import backend_class, backend_spec
from .vendor_spec import VendorSpec
from .vendors import find_vendor

if TYPE_CHECKING:
    import torch

    from .backend import DomesticBackend

__all__ = ["create_domestic_backend"]

logger = logging.getLogger(__name__)

_Group: TypeAlias = Any
"""A torch ProcessGroup, C++ or Python."""


def create_domestic_backend(
    name: str = "auto",
    *,
    group: _Group = None,
    device: torch.device | str | int | None = None,
    timeout_s: float = 30.0,
    topology_manager: TopologyManagerProtocol | None = None,
    cost_model: CostModelProtocol | None = None,
    options: Mapping[str, Any] | None = None,
    self_test: bool = False,
) -> DomesticBackend:
    """A backend on a domestic accelerator. Unverified on hardware.

    Loads the vendor's plug-in, sets the device, and takes the group that is given, torch's
    default group if it serves the device, the rendezvous of torchrun's variables, or a world of
    one, in this order. `close` ends what was made here.

    Args:
        name: Backend name or alias (`hccl`, `ascend`, `cncl`, …), or `auto`.
        group: A process group that serves the device.
        device: `npu:0`, or its index; None is LOCAL_RANK's, else the current one.
        timeout_s: Deadline of every call and wait that gives none.
        topology_manager: Kept for whoever asks.
        cost_model: Lets `explain` name an algorithm and a time.
        options: `check_calls`, and options of the library, which need a group made here.
        self_test: Run `self_test()` before returning; collective.

    Raises:
        ConfigError: An unknown or ambiguous name, an option that cannot be delivered, a device
            that does not exist, a group that does not serve it; Windows.
        BackendUnavailableError: Plug-in, runtime, library or device is missing; the message
            says which and what to do, and the cause is chained. For `auto`, one line per vendor.
        CommTimeoutError: The other ranks did not come.
        DistributedRuntimeError: The library could not make the group, or failed its self-test.

    """
    require_supported_platform()
    row = _choose(name)
    wanted = vendor_options(row, options)
    unknown = sorted(set(options or {}) - {"check_calls", *row.options})
    if unknown:
        known = ", ".join(["check_calls", *row.options])
        raise ConfigError(f"{row.backend} has no option {', '.join(unknown)}; known: {known}")
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s must be above 0, got {timeout_s}")
    runtime = load_vendor(row)
    chosen = _set_device(row, runtime, device)
    opened = open_group(row, group=group, timeout_s=timeout_s, options=wanted)
    backend = backend_class(row).over(
        backend_spec(row),
        opened,
        device=chosen,
        timeout_s=timeout_s,
        topology_manager=topology_manager,
        cost_model=cost_model,
        options=options,
    )
    logger.info("%s on %s over %s", row.backend, backend.device, opened.why)
    if self_test:
        wrong = backend.self_test()
        if wrong:
            backend.close()
            raise DistributedRuntimeError(
                f"{row.library} gave wrong results for {', '.join(wrong)} on rank {backend.rank}; "
                f"update the driver and runtime of {row.title}"
            )
    return backend


def _choose(name: str) -> VendorSpec:
    if name != "auto":
        return find_vendor(name)
    choice = choose_vendor()
    if choice.row is None:
        raise BackendUnavailableError(choice.explain())
    logger.info("auto took %s: %s", choice.row.backend, choice.reason)
    return choice.row


def _set_device(
    row: VendorSpec, runtime: VendorRuntime, device: torch.device | str | int | None
) -> torch.device:
    """The device of this process; it is made current, which libraries want before a group."""
    import torch

    index: int | None = None
    if isinstance(device, int):
        index = device
    elif device is not None:
        try:
            given = torch.device(device)
        except RuntimeError as e:
            raise ConfigError(f"device {device!r} is none of torch's; try '{row.device}:0'") from e
        if given.type != row.device:
            raise ConfigError(f"{row.backend} serves {row.device}, not {given}")
        index = given.index
    elif os.environ.get("LOCAL_RANK", "").isdigit():
        # Launchers that show each process one device leave LOCAL_RANK counting on.
        index = int(os.environ["LOCAL_RANK"]) % runtime.device_count
    if index is None:
        return torch.device(row.device, int(runtime.device_module.current_device()))
    if not 0 <= index < runtime.device_count:
        raise ConfigError(
            f"device {row.device}:{index} is not in 0..{runtime.device_count - 1}, which this "
            f"process sees"
        )
    runtime.device_module.set_device(index)
    return torch.device(row.device, index)
