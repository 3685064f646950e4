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
        holder: The one vendor device that torch has in this process, or None.

    """

    plugin: bool
    plugin_reason: str
    autoloads: bool = False
    nodes: tuple[str, ...] = ()
    tool: str | None = None
    running: int | None = None
    holder: str | None = None


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
    # A plug-in that failed half-way stays in sys.modules: the renamed device is the proof.
    holder = _slot(view)
    return Sighting(
        plugin=installed,
        plugin_reason=f"{module} is {'' if installed else 'not '}installed",
        autoloads=module in view.autoloads(),
        nodes=nodes,
        tool=tool,
        running=_running(row) if holder == row.device else None,
        holder=holder,
    )


def probe_vendor(row: VendorSpec, view: HostView | None = None) -> Probe:
    """Whether the vendor's backend should work here; cheap and without side effects.

    A plug-in without any sign of a device is refused, so that `auto` never takes it on a host
    that merely has it installed; whoever knows better imports the plug-in first.
    """
    seen = sight(row, view)
    if not seen.plugin:
        return Probe(False, seen.plugin_reason)
    if seen.running is not None:
        many = f"{seen.running} {row.device} device{'' if seen.running == 1 else 's'}"
        return Probe(seen.running > 0, f"{row.module} runs in this process and sees {many}")
    if seen.holder is not None:
        text = f"{row.module} is installed, but this process has the device {seen.holder!r} already"
        return Probe(False, f"{text}; only one such device can live in a process")
    sign = seen.nodes[0] if seen.nodes else seen.tool
    if sign is None:
        looked = [f"/{pattern}" for pattern in row.device_nodes]
        looked += [row.tool] if row.tool else []
        where = f"no {' and no '.join(looked)}" if looked else "no sign is known to look for"
        asked = f"import {row.module} first" if row.module else "check the driver"
        text = f"{seen.plugin_reason}, but nothing shows a device ({where})"
        call = f"create_domestic_backend({row.backend!r})"
        return Probe(False, f"{text}; if there is one, {asked} or use {call}")
    return Probe(True, f"{seen.plugin_reason} and {sign} is here; the device was not opened")


def _slot(view: HostView) -> str | None:
    """The vendor device that torch has in this process, None without one or without torch."""
    if not view.loaded("torch"):
        return None
    try:
        name = str(sys.modules["torch"]._C._get_privateuse1_backend_name())
    except (AttributeError, KeyError):
        return None
    return None if name == "privateuseone" else name


def _running(row: VendorSpec) -> int:
    device = getattr(sys.modules["torch"], row.device, None)
    try:
        return int(device.device_count()) if device is not None and device.is_available() else 0
    except Exception:  # a vendor's module may fail in any way; that is an answer
        return 0
