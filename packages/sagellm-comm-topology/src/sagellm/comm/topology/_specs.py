"""Detectors that few machines need, as entry points offer them: each is imported when it runs."""

from __future__ import annotations

from sagellm.core.protocols import Detector, DetectorSpec

__all__ = [
    "AMDSMI", "CNMON", "CXL", "HY_SMI", "IXSMI", "KFD", "NVIDIA_SMI", "NVML", "ROCM_SMI",
    "TOPO_FILE",
]  # fmt: skip

USER, DRIVER, KERNEL, COMMAND = 100, 80, 60, 40
"""Precedences: on conflict the higher wins."""


def _topo_file() -> Detector:
    from ._topo_file import TopoFileDetector

    return TopoFileDetector()


def _cxl() -> Detector:
    from ._sysfs_cxl import CxlDetector

    return CxlDetector()


def _nvml() -> Detector:
    from ._nvml import NvmlDetector

    return NvmlDetector()


def _amdsmi() -> Detector:
    from ._amdsmi import AmdSmiDetector

    return AmdSmiDetector()


def _kfd() -> Detector:
    from ._kfd import KfdDetector

    return KfdDetector()


def _tool(name: str, vendor: str) -> DetectorSpec:
    def load() -> Detector:
        from ._tools import TOOLS, ToolDetector

        return ToolDetector(TOOLS[name])

    return DetectorSpec(name, COMMAND, load, (vendor,))


TOPO_FILE = DetectorSpec("topo-file", USER, _topo_file)
CXL = DetectorSpec("sysfs-cxl", KERNEL, _cxl)
NVML = DetectorSpec("nvml", DRIVER, _nvml, ("0x10de",))
AMDSMI = DetectorSpec("amdsmi", DRIVER, _amdsmi, ("0x1002",))
KFD = DetectorSpec("kfd", KERNEL, _kfd, ("0x1002",))
NVIDIA_SMI = _tool("nvidia-smi", "0x10de")
ROCM_SMI = _tool("rocm-smi", "0x1002")
HY_SMI = _tool("hy-smi", "0x1d94")
IXSMI = _tool("ixsmi", "0x1e3e")
CNMON = _tool("cnmon", "0xcabc")
