"""Which vendors could be here, from signs that cost nothing and change nothing."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from sagellm.core.protocols import Probe

from .cuda_alias import classify_cuda, read_torch_build
from .host import HostView
from .vendor_spec import VendorSpec

__all__ = ["Sighting", "probe_vendor", "sight"]


@dataclass(frozen=True, slots=True)
class Sighting:
    """The signs of one vendor.

    Attributes:
        plugin: Whether its plug-in, or its build of torch, is installed.
        plugin_reason: What was found or missed.
        autoloads: Whether torch imports the plug-in by itself.
        nodes: Device nodes found.
        tool: Management tool found, or None.
        running: Number of devices by the plug-in when it runs in this process already, or None.

    """

    plugin: bool
    plugin_reason: str
    autoloads: bool = False
    nodes: tuple[str, ...] = ()
    tool: str | None = None
    running: int | None = None


def sight(row: VendorSpec, view: HostView | None = None) -> Sighting:
    """The signs of a vendor on a host: no import of its plug-in, no device opened."""
    view = view or HostView.local()
    nodes = view.nodes(row.device_nodes)
    tool = view.tool(row.tool, row.tool_paths)
    if row.dispatch == "cuda":
        split = classify_cuda(read_torch_build(view))
        return Sighting(
            plugin=split.vendor == row.vendor,
            plugin_reason=split.reason,
            nodes=nodes,
            tool=tool,
        )
    module = row.module or ""
    installed = view.find_module(module)
    return Sighting(
        plugin=installed,
        plugin_reason=f"{module} is {'' if installed else 'not '}installed",
        autoloads=module in view.autoloads(),
        nodes=nodes,
        tool=tool,
        running=_running(row, view),
    )


def probe_vendor(row: VendorSpec, view: HostView | None = None) -> Probe:
    """Whether the vendor's backend should work here; cheap and without side effects."""
    seen = sight(row, view)
    if not seen.plugin:
        return Probe(False, f"{seen.plugin_reason}; {row.install_hint}")
    if seen.running is not None:
        many = f"{seen.running} {row.device} device{'' if seen.running == 1 else 's'}"
        return Probe(seen.running > 0, f"{row.module} runs in this process and sees {many}")
    sign = seen.nodes[0] if seen.nodes else seen.tool
    if sign is None:
        looked = [f"/{pattern}" for pattern in row.device_nodes]
        looked += [row.tool] if row.tool else []
        where = " nor ".join(looked) or "a device node"
        text = f"{seen.plugin_reason}, but nothing shows a device: neither {where} is here"
        return Probe(False, f"{text}; install the driver, or pass the devices into the container")
    return Probe(True, f"{seen.plugin_reason} and {sign} is here; the device was not opened")


def _running(row: VendorSpec, view: HostView) -> int | None:
    if row.dispatch != "privateuse1" or not view.loaded("torch"):
        return None
    torch = sys.modules["torch"]
    device = getattr(torch, row.device, None)
    # A plug-in that failed half-way stays in sys.modules: the renamed device is the proof.
    if device is None or torch._C._get_privateuse1_backend_name() != row.device:
        return None
    try:
        return int(device.device_count()) if device.is_available() else 0
    except Exception:  # a vendor's module may fail in any way; that is an answer
        return 0
