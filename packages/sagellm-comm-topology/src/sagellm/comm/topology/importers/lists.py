"""`lspci -nn` (plain or verbose) and `nvidia-smi -L`: devices without what joins them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from sagellm.comm.topology._numbers import whole_number
from sagellm.comm.topology._sysfs import normal_bdf
from sagellm.comm.topology._vendors import VENDORS, role
from sagellm.core.protocols import Device, SwitchDomain, TopologyFragment

__all__ = ["read_lspci", "read_smi_list"]

_FUNCTION = re.compile(
    r"^(?P<bdf>(?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])\s"
    r"[^\[]*\[(?P<class>[0-9a-f]{4})\](?::\s*(?P<name>.*))?$",
    re.IGNORECASE,
)
_IDS = re.compile(r"\[([0-9a-f]{4}):([0-9a-f]{4})\]", re.IGNORECASE)
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_MOST_DETAIL = 512  # characters of a line of details that are read
_NUMA = re.compile(r"^\s+NUMA node:\s*(\d+)\s*$")
_LINK = re.compile(r"^\s+LnkCap:.*Speed\s+([0-9.]+\s*GT/s).*Width\s+x(\d+)")
_DRIVER = re.compile(r"^\s+Kernel driver in use:\s*(\S+)")
_GPU = re.compile(r"^\s*GPU\s+(\d+):(.*?)\(UUID:\s*([\w\-]+)\)?")
_MIG = re.compile(r"^\s*MIG\s+(\S.*?)Device\s+(\d+):\s*\(UUID:\s*([\w\-/]+)\)?")
_LANE = re.compile(r"^\s*Link\s+\d+:\s*([0-9.]+)\s*GB/s")


def read_lspci(
    lines: Sequence[str], *, source: str = "", vendor: str | None = None
) -> TopologyFragment | None:
    """Accelerators, NICs, switches and CXL memory; None when no line is lspci's."""
    devices: dict[str, Device] = {}
    warnings: list[str] = []
    seen = 0
    current: str | None = None
    for line in lines:
        match = _FUNCTION.match(line)
        if match is not None:
            seen += 1
            device = _function(match, warnings)
            current = device.id if device else None
            if device is not None:
                devices[device.id] = device
        elif current is not None and line[:1].isspace():
            devices[current] = _detail(devices[current], line[:_MOST_DETAIL])
        else:
            current = None
    if not seen:
        return None
    switches = [d.id for d in devices.values() if d.kind == "fabric_switch"]
    domains = (SwitchDomain("nvlink-switch", "nvlink", ()),) if switches else ()
    if switches:
        warnings.append("NVSwitches are here; lspci does not say which GPUs are on them")
    return TopologyFragment(
        source or "lspci", tuple(devices.values()), domains=domains, warnings=tuple(warnings)
    )


def _function(match: re.Match[str], warnings: list[str]) -> Device | None:
    text = match["bdf"]
    bdf = normal_bdf(text if text.count(":") == 2 else f"0000:{text}")
    if bdf is None:
        return None
    name = match["name"] or ""
    found = list(_IDS.finditer(name))
    ids = found[0].groups() if found else None
    if not ids:
        warnings.append(f"{bdf}: no [vendor:device]; `lspci -nn` prints it")
    vendor, device = (f"0x{x.lower()}" for x in ids) if ids else (None, None)
    code = int(match["class"], 16) << 8
    kind = role(code, vendor, on_root_bus=bdf.split(":")[1] == "00")
    if kind is None:
        return None
    words = [
        w
        for w in _BRACKETS.findall(name[: found[0].start()] if found else name)
        if re.search("[A-Za-z]", w)
    ]
    attrs = {"pci_class": f"0x{code:06x}", "pci_vendor": vendor, "pci_device": device}
    return Device(
        bdf,
        kind,
        vendor=VENDORS.get(vendor or "", vendor),
        model=words[-1].strip() if words and kind in ("gpu", "npu") else None,
        bdf=bdf,
        attrs={k: v for k, v in attrs.items() if v},
    )


def _detail(device: Device, line: str) -> Device:
    if match := _NUMA.match(line):
        node = whole_number(match[1], most=99_999)
        return device if node is None else replace(device, numa_nodes=(node,))
    facts: dict[str, str] = {}
    if match := _LINK.match(line):
        facts = {"max_link_speed": match[1], "max_link_width": match[2]}
    elif match := _DRIVER.match(line):
        facts = {"driver": match[1]}
    return replace(device, attrs={**device.attrs, **facts}) if facts else device


def read_smi_list(
    lines: Sequence[str], *, source: str = "", vendor: str | None = None
) -> TopologyFragment | None:
    """GPUs with UUID, model and MIG partitions; None when no line is `nvidia-smi -L`'s.

    `nvidia-smi nvlink --status` prints the same lines with those of links between them.
    """
    devices: list[Device] = []
    warnings: list[str] = []
    for line in lines:
        if match := _GPU.match(line):
            uuid = match[3]
            if not line.rstrip().endswith(")"):
                warnings.append(f"GPU {match[1]}: the line is cut, its UUID {uuid} may be")
            devices.append(
                Device(
                    uuid,
                    "gpu",
                    vendor=vendor or "nvidia",
                    model=match[2].strip() or None,
                    uuid=uuid,
                    index=whole_number(match[1]),
                )
            )
            continue
        if not devices:
            continue
        attrs = dict(devices[-1].attrs)
        if match := _MIG.match(line):
            attrs["mig_mode"] = "enabled"
            attrs["mig"] = ",".join(x for x in (attrs.get("mig"), match[3]) if x)
            attrs["mig_profiles"] = ",".join(
                x for x in (attrs.get("mig_profiles"), match[1].strip()) if x
            )
        elif _LANE.match(line):
            attrs["nvlinks"] = str(int(attrs.get("nvlinks", "0")) + 1)
        devices[-1] = replace(devices[-1], attrs=attrs)
    if not devices:
        return None
    return TopologyFragment(
        source or "nvidia-smi", tuple(devices), warnings=tuple(dict.fromkeys(warnings))
    )
