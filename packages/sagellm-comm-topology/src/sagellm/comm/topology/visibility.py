"""Which accelerators this process sees, and by which number.

`CUDA_VISIBLE_DEVICES` and its cousins hold driver indices, UUIDs (or their beginnings) or MIG ids,
in the order in which the process numbers them. A device with several partitions in it has several
numbers. As CUDA does, the first entry that names nothing
ends the list, and a device named twice empties it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sagellm.core.protocols import Device, TopologyInfo

from ._numbers import whole_number
from ._vendors import UNHEARD_VARIABLES, VISIBLE_VARIABLES

__all__ = ["apply_visibility", "visible_indices"]

_SEVERAL = "visible_indices"


def apply_visibility(info: TopologyInfo, environ: Mapping[str, str]) -> TopologyInfo:
    """The same topology with `visible_index` set for what this process sees.

    Args:
        info: A host's topology; devices hidden by the environment stay in it.
        environ: The environment to honour.

    """
    numbers: dict[str, list[int]] = {}
    warnings: list[str] = []
    vendors = dict.fromkeys(d.vendor for d in info.accelerators)
    for vendor in vendors:
        mine = [
            d
            for d in info.accelerators
            if d.vendor == vendor and not d.attrs.get("driver", "").startswith("vfio")
        ]
        seen, notes = _visible(vendor or "", mine, environ)
        warnings += notes
        for i, d in enumerate(seen):
            numbers.setdefault(d.id, []).append(i)
    if not info.accelerators:
        return info
    devices = tuple(
        _numbered(d, numbers.get(d.id, [])) if d.kind in ("gpu", "npu") else d for d in info.devices
    )
    return replace(info, devices=devices, warnings=(*info.warnings, *warnings))


def visible_indices(device: Device) -> tuple[int, ...]:
    """Every number by which this process sees a device: one for each of its partitions."""
    listed = device.attrs.get(_SEVERAL, "").split(",")
    several = tuple(i for x in listed if (i := whole_number(x)) is not None)
    return several or (() if device.visible_index is None else (device.visible_index,))


def _numbered(device: Device, numbers: Sequence[int]) -> Device:
    attrs = {k: v for k, v in device.attrs.items() if k != _SEVERAL}
    if len(numbers) > 1:
        attrs[_SEVERAL] = ",".join(map(str, numbers))
    return replace(device, visible_index=numbers[0] if numbers else None, attrs=attrs)


def _visible(
    vendor: str, devices: Sequence[Device], environ: Mapping[str, str]
) -> tuple[list[Device], list[str]]:
    notes: list[str] = []
    known = [d for d in devices if d.index is not None]
    if not known:
        notes.append(
            f"{vendor or 'unknown'} driver indices are unknown; devices are numbered by bus address"
        )
    elif len(known) < len(devices):
        # The kernel shows a container what its device rules keep from it.
        hidden = ", ".join(d.id for d in devices if d.index is None)
        notes.append(f"the {vendor} driver does not show {hidden} to this process: hidden")
        devices = known
    # ROCm hides twice: what ROCR leaves is what HIP numbers.
    if vendor in ("amd", "hygon") and "ROCR_VISIBLE_DEVICES" in environ:
        left = _choose("ROCR_VISIBLE_DEVICES", environ, devices, notes)
        devices = [replace(d, index=i) for i, d in enumerate(left)]
    notes += [
        f"{name}={environ[name][:40]!r} is set, but its meaning for {vendor} devices is not known "
        "here: they are numbered as if it were not"
        for name in UNHEARD_VARIABLES.get(vendor, ()) if name in environ
    ]  # fmt: skip
    name = next((v for v in VISIBLE_VARIABLES.get(vendor, ()) if v in environ), None)
    if name is None:
        return list(devices), notes
    models = {d.model for d in devices}
    if vendor == "nvidia" and len(models) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        notes.append(
            "GPUs of several models: CUDA numbers the fastest first unless "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID is set, so that visible indices may differ"
        )
    return _choose(name, environ, devices, notes), notes


def _choose(
    name: str, environ: Mapping[str, str], devices: Sequence[Device], notes: list[str]
) -> list[Device]:
    chosen: list[Device] = []
    entries: set[str] = set()
    for raw in environ[name].split(","):
        entry = raw.strip()
        found = _named(entry, devices)
        if found is None:
            if entry not in ("", "-1", "NoDevFiles"):
                notes.append(f"{name} names {entry!r}, which is not here; it ends the list")
            break
        # Partitions of one device are devices of their own; `0`, `00` and its UUID are one.
        name_of = entry if entry.startswith("MIG-") else found.id
        if name_of in entries:
            notes.append(f"{name} names {entry!r} twice; nothing is visible")
            return []
        entries.add(name_of)
        chosen.append(found)
    return chosen


def _named(entry: str, devices: Sequence[Device]) -> Device | None:
    """The device an entry means: index, UUID prefix without doubt, or the parent of a MIG id."""
    position = whole_number(entry)
    if position is not None:
        # `devices` are in driver order, so the position stands in for an unknown index.
        indices = {d.index: d for d in devices if d.index is not None}
        if len(indices) == len(devices):
            return indices.get(position)
        return devices[position] if position < len(devices) else None
    if entry.startswith("MIG-"):
        for d in devices:
            parts = d.attrs.get("mig", "").split(",")
            if entry in parts or (d.uuid and entry.startswith(f"MIG-{d.uuid}/")):
                return d
        return None
    if len(entry) < 5:  # shorter than `GPU-x`
        return None
    matching = [d for d in devices if d.uuid and d.uuid.startswith(entry)]
    return matching[0] if len(matching) == 1 else None
