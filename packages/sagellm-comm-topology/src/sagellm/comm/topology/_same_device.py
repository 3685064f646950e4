"""Which devices of several sources are one: by bus address, then UUID, then weaker names.

Weak names (`nvidia:0`, `ib:mlx5_0`) come from tools that print no address. They join a device that
has no address or UUID with one of that number or interface, and never two that have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sagellm.core.protocols import Device, TopologyFragment

from ._sysfs import normal_bdf

__all__ = ["merge_devices"]

_FIRST_KNOWN = ("vendor", "model", "uuid", "cpulist", "index", "memory_bytes")
_MUST_AGREE = ("kind", "uuid", "numa_nodes")


def merge_devices(
    fragments: Sequence[TopologyFragment], notes: list[str]
) -> tuple[dict[str, Device], dict[str, str]]:
    """Devices by final id, and every name that a source used to its final id.

    Args:
        fragments: The most trusted first.
        notes: Conflicts are appended.

    """
    merging = _Merging(notes)
    for fragment in fragments:
        for device in fragment.devices:
            merging.add(device, fragment.source)
    merging.join_by_order()
    return merging.finish()


class _Merging:
    def __init__(self, notes: list[str]) -> None:
        self._notes = notes
        self._devices: dict[str, Device] = {}
        self._names: dict[str, str] = {}
        self._weak: dict[str, str] = {}
        self._sources: dict[str, str] = {}

    def add(self, device: Device, source: str) -> None:
        bdf = normal_bdf(device.bdf) if device.bdf else None
        strong = [k for k in (bdf, device.uuid, device.id) if k]
        weak = _weak_names(device)
        known = next((self._names[k] for k in strong if k in self._names), None)
        if known is None:
            known = next((at for k in weak if (at := self._match(k, device)) is not None), None)
        if known is None:
            known = bdf or device.id
            self._devices[known] = replace(device, id=known, bdf=bdf)
            self._sources[known] = source
        else:
            self._combine(known, replace(device, bdf=bdf), source)
        self._names.update(dict.fromkeys(strong, known))
        for name in weak:
            self._weak.setdefault(name, known)

    def _match(self, weak: str, device: Device) -> str | None:
        """The device of a weak name, unless both have names of their own that differ."""
        known = self._weak.get(weak)
        if known is None:
            return None
        other = self._devices[known]
        both_placed = device.bdf is not None and other.bdf is not None
        both_named = device.uuid is not None and other.uuid is not None
        return None if both_placed or both_named else known

    def join_by_order(self) -> None:
        """Give what only has a number the address of that place in the order of addresses.

        Drivers number by bus address. It is done only where counts agree.
        """
        accelerators = [d for d in self._devices.values() if d.kind in ("gpu", "npu")]
        for vendor in dict.fromkeys(d.vendor for d in accelerators):
            mine = [d for d in accelerators if d.vendor == vendor]
            numbered = [d for d in mine if d.bdf is None and d.index is not None]
            placed = [d for d in mine if d.bdf is not None and d.index is None]
            if not numbered or len(numbered) != len(placed):
                continue
            self._notes.append(
                f"{vendor} devices without an address are taken in the order of addresses"
            )
            numbered.sort(key=lambda d: d.index or 0)
            placed.sort(key=lambda d: d.id)
            for a, b in zip(numbered, placed, strict=True):
                order = list(self._devices)
                first, second = sorted((a.id, b.id), key=order.index)
                self._combine(first, self._devices.pop(second), self._sources[second])
                for name in [n for n, at in self._names.items() if at == second]:
                    self._names[name] = first

    def finish(self) -> tuple[dict[str, Device], dict[str, str]]:
        """Devices under their bus address where one is known."""
        final = {name: d.bdf or name for name, d in self._devices.items()}
        devices = {final[name]: replace(d, id=final[name]) for name, d in self._devices.items()}
        names = {k: final[at] for k, at in (self._weak | self._names).items() if at in final}
        return devices, names

    def _combine(self, known: str, second: Device, source: str) -> None:
        """Fill the gaps of a device from a source that is believed less."""
        first = self._devices[known]
        for name in _MUST_AGREE:
            a, b = getattr(first, name), getattr(second, name)
            if name == "numa_nodes" and (set(a) <= set(b) or set(b) <= set(a)):
                continue  # one source is merely coarser, or does not know
            if a is not None and b is not None and a != b:
                mine = self._sources[known]
                self._notes.append(
                    f"{first.id}: {name} is {a} by {mine} but {b} by {source}; {mine} is believed"
                )
        gaps = [name for name in _FIRST_KNOWN if getattr(first, name) is None]
        self._devices[known] = replace(
            first,
            **{name: getattr(second, name) for name in gaps},
            bdf=first.bdf or second.bdf,
            numa_nodes=first.numa_nodes or second.numa_nodes,
            attrs={**second.attrs, **first.attrs},
        )


def _weak_names(device: Device) -> list[str]:
    """Names by interface, or by the driver's number."""
    if device.kind == "nic":
        return [
            f"{prefix}:{name}"
            for prefix, attr in (("ib", "ib"), ("net", "netdev"))
            for name in device.attrs.get(attr, "").split(",")
            if name
        ]
    if device.kind in ("gpu", "npu") and device.index is not None:
        return [f"{device.vendor}:{device.index}"]
    return []
