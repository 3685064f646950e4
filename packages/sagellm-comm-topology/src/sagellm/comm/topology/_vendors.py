"""Which PCI function is an accelerator, a NIC or a fabric switch, and whose."""

from __future__ import annotations

from sagellm.core.protocols import DeviceKind

__all__ = ["CPU_VENDORS", "VENDORS", "VISIBLE_VARIABLES", "role"]

VENDORS = {
    "0x10de": "nvidia",
    "0x1002": "amd",
    "0x8086": "intel",
    "0x19e5": "huawei",
    "0xcabc": "cambricon",
    "0x1d94": "hygon",
    "0x1d22": "kunlunxin",
    "0x1ed5": "mthreads",
    "0x9999": "metax",
    "0x1e3e": "iluvatar",
    "0x1e36": "enflame",
    "0x1ee0": "biren",
    "0x1da3": "habana",
    "0x15b3": "mellanox",
    "0x14e4": "broadcom",
    "0x1d0f": "amazon",
    "0x1414": "microsoft",
    "0x1ae0": "google",
    "0x1af4": "virtio",
}
"""PCI vendor id to the lower-case name used in `Device.vendor`."""

CPU_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd", "HygonGenuine": "hygon"}
"""A processor's own word for its maker to the name used in `Device.vendor`."""

VISIBLE_VARIABLES: dict[str, tuple[str, ...]] = {
    "nvidia": ("CUDA_VISIBLE_DEVICES",),
    "amd": ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    "hygon": ("HIP_VISIBLE_DEVICES",),
    "huawei": ("ASCEND_RT_VISIBLE_DEVICES",),
    "cambricon": ("MLU_VISIBLE_DEVICES",),
    "kunlunxin": ("XPU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    "mthreads": ("MUSA_VISIBLE_DEVICES",),
    "metax": ("MACA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    "iluvatar": ("CUDA_VISIBLE_DEVICES",),
    "enflame": ("TOPS_VISIBLE_DEVICES",),
}
"""Vendor to the variables that choose its devices; the first one that is set decides."""

UNHEARD_VARIABLES: dict[str, tuple[str, ...]] = {
    "amd": ("GPU_DEVICE_ORDINAL",),
    "hygon": ("CUDA_VISIBLE_DEVICES",),
    "huawei": ("ASCEND_VISIBLE_DEVICES",),
    "intel": ("ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR"),
    "habana": ("HABANA_VISIBLE_DEVICES", "HABANA_VISIBLE_MODULES"),
}
"""Vendor to variables that may hide its devices and are not read here; one that is set is told."""

# Sold as "gpu" by their makers; the other accelerator vendors call theirs NPU, MLU, DCU, GCU, …
_GPU_VENDORS = frozenset({"nvidia", "amd", "intel", "mthreads", "metax", "iluvatar", "biren"})
_NPU_VENDORS = frozenset({"huawei", "cambricon", "kunlunxin", "enflame", "habana", "hygon"})


def role(class_code: int, vendor: str | None, *, on_root_bus: bool) -> DeviceKind | None:
    """What the function is to communication, or None when it is nothing to it.

    Args:
        class_code: The 24-bit PCI class.
        vendor: PCI vendor id such as `0x10de`, or None when unreadable.
        on_root_bus: Whether no bridge is above it: an Intel display there is the CPU's own.

    """
    base, sub = class_code >> 16, class_code >> 8
    name = VENDORS.get(vendor or "")
    if base == 0x02:
        return "nic"
    if base == 0x12:
        return "gpu" if name in _GPU_VENDORS else "npu"
    if sub == 0x0B40:
        # Co-processors are also crypto engines: only of these makers are they accelerators.
        return "npu" if name in _NPU_VENDORS else None
    if base == 0x03:
        # Displays of management chips and hypervisors compute nothing.
        if name == "intel" and on_root_bus:
            return "display"
        if name in _GPU_VENDORS:
            return "gpu"
        return "npu" if name in _NPU_VENDORS else "display"
    if sub == 0x0680 and name == "nvidia":
        return "fabric_switch"
    if sub == 0x0502:
        return "cxl_mem"
    return None
