"""Which devices of several sources are one: by bus address, then UUID, then weaker names.

Weak names (`nvidia:0`, `ib:mlx5_0`) come from tools that print no address. They join a device that
has no address or UUID with one of that number or interface, and never two that have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sagellm.core.protocols import Device, TopologyFragment

from ._specs import USER
from ._sysfs import normal_bdf
from ._sysfs_numa import cpu_numbers

__all__ = ["differ", "merge_devices"]

_FIRST_KNOWN = ("vendor", "model", "uuid", "cpulist", "index", "memory_bytes")
_MUST_AGREE = (
    "kind", "bdf", "uuid", "vendor", "model", "numa_nodes", "cpulist", "memory_bytes", "index",
)  # fmt: skip
_TOLERANCE = 0.1  # of sizes and rates that sources measure or round in their own ways


def merge_devices(
    fragments: Sequence[tuple[int, TopologyFragment]], notes: list[str]
) -> tuple[dict[str, Device], dict[str, str]]:
    """Devices by final id, and every name that a source used to its final id.

    Args:
        fragments: With their precedence, the most trusted first.
        notes: Conflicts are appended.

    """
    merging = _Merging(notes)
    for precedence, fragment in fragments:
        for device in fragment.devices:
            merging.add(device, fragment.source, from_file=precedence >= USER)
    merging.join_by_order()
    return merging.finish()


class _Merging:
    def __init__(self, notes: list[str]) -> None:
        self._notes = notes
        self._devices: dict[str, Device] = {}
        self._names: dict[str, str] = {}
        self._weak: dict[str, str] = {}
        self._sources: dict[str, str] = {}
        self._numbered_by_file: set[str] = set()

    def add(self, device: Device, source: str, *, from_file: bool) -> None:
        bdf = normal_bdf(device.bdf) if device.bdf else None
        strong = [k for k in (bdf, device.uuid, device.id) if k]
        weak = _weak_names(device)
        known = next((self._names[k] for k in strong if k in self._names), None)
        if known is None:
            known = next((at for k in weak if (at := self._match(k, device)) is not None), None)
        numbered = known is not None and self._devices[known].index is not None
        if device.index is not None and known is not None and not from_file:
            self._renumber(known, device, source)
        if known is None:
            known = bdf or device.id
            self._devices[known] = replace(device, id=known, bdf=bdf)
            self._sources[known] = source
        else:
            self._combine(known, replace(device, bdf=bdf), source)
        if from_file and device.index is not None and not numbered:
            self._numbered_by_file.add(known)
        self._names.update(dict.fromkeys(strong, known))
        for name in weak:
            self._weak.setdefault(name, known)

    def _renumber(self, known: str, device: Device, source: str) -> None:
        """Let a driver's number replace a file's: drivers count what is here, a file what was."""
        first = self._devices[known]
        if known not in self._numbered_by_file:
            return
        self._numbered_by_file.remove(known)
        if first.index == device.index:
            return
        self._notes.append(
            f"{first.id}: index is {first.index} by {self._sources[known]} but {device.index} by "
            f"{source}; the driver's is believed"
        )
        for name in _weak_names(first):
            if self._weak.get(name) == known:
                del self._weak[name]
        self._devices[known] = replace(first, index=device.index)
        self._weak.update(dict.fromkeys(_weak_names(self._devices[known]), known))

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
            if a is not None and b is not None and _differ(name, a, b):
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


def _differ(name: str, a: object, b: object) -> bool:
    """Whether two sources contradict each other; one may merely be coarser than the other."""
    if name in ("numa_nodes", "cpulist"):
        one, two = (
            set(cpu_numbers(x)) if isinstance(x, str) else set(x)  # type: ignore[call-overload]
            for x in (a, b)
        )
        return not (one <= two or two <= one)
    if name == "model":
        one, two = (str(x).casefold() for x in (a, b))
        return one not in two and two not in one
    if name == "memory_bytes" and isinstance(a, int) and isinstance(b, int):
        return differ(a, b)
    return a != b


def differ(a: float, b: float) -> bool:
    """Whether two figures for one thing are too far apart to be one."""
    return abs(a - b) > _TOLERANCE * max(a, b)


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
