"""AMD GPUs and xGMI links out of AMD's management library (`amdsmi`, extra `amd`).

Unverified on hardware: written after the library's documentation, tested against a stand-in.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

from sagellm.core.protocols import (
    DetectionContext,
    Device,
    Link,
    LinkKind,
    Pair,
    TopologyFragment,
)

from ._sysfs import normal_bdf

__all__ = ["AmdSmiDetector"]

_ONE_HOP = 15  # weight of one physical link
_XGMI = 2  # of AmdSmiIoLinkType and of AmdSmiLinkType

# Any: amdsmi ships no types, and its handles are opaque.
_Library = Any


class AmdSmiDetector:
    """Asks the library about every GPU; one sick GPU costs only what it would have said.

    Args:
        load: Gives the amdsmi module; None imports it. A recorded machine (a root other than
            `/`) is never mixed with the live driver unless a loader is given.

    """

    def __init__(self, load: Callable[[], _Library] | None = None) -> None:
        self._load = load

    def detect(self, ctx: DetectionContext) -> TopologyFragment:
        """What the library says, never raising; see `Detector`."""
        if self._load is None and ctx.root != Path("/"):
            return TopologyFragment("amdsmi")
        try:
            library = self._load() if self._load else importlib.import_module("amdsmi")
        except (ImportError, OSError, KeyError):
            # Without it the kernel's own files tell the same; see `_kfd`.
            return TopologyFragment("amdsmi")
        try:
            library.amdsmi_init()
        except Exception as e:  # the library's errors are made at run time
            return TopologyFragment("amdsmi", warnings=(f"the library does not start: {e}",))
        try:
            return _Session(library, ctx).read()
        finally:
            library.amdsmi_shut_down()


class _Session:
    def __init__(self, library: _Library, ctx: DetectionContext) -> None:
        self._smi = library
        self._ctx = ctx
        self._warnings: list[str] = []

    def read(self) -> TopologyFragment:
        handles: dict[str, Any] = {}
        devices: list[Device] = []
        for index, handle in enumerate(self._ask("amdsmi_get_processor_handles") or ()):
            device = self._device(handle, index)
            if device is not None:
                handles[device.id] = handle
                devices.append(device)
        links: list[Link] = []
        pairs: list[Pair] = []
        for a, b in combinations(handles, 2):
            if self._ctx.clock() > self._ctx.deadline_s:
                self._warnings.append("deadline reached before the links of all pairs")
                break
            way = self._ask("amdsmi_topo_get_link_type", handles[a], handles[b]) or {}
            weight = self._ask("amdsmi_topo_get_link_weight", handles[a], handles[b])
            far = isinstance(weight, int) and weight > _ONE_HOP
            access = self._ask("amdsmi_is_P2P_accessible", handles[a], handles[b])
            peer = {} if access is None else {"read": "OK" if access else "NS"}
            is_xgmi = int(way.get("type", 0)) == _XGMI
            if peer or (is_xgmi and far):
                via: LinkKind | None = "xgmi" if is_xgmi and far else None
                pairs.append(Pair(a, b, via=via, peer=peer, source="amdsmi"))
            if is_xgmi and not far:
                speeds = self._ask(
                    "amdsmi_get_minmax_bandwidth_between_processors", handles[a], handles[b]
                )
                speed = float((speeds or {}).get("max_bandwidth") or 0) * 1e6
                links.append(Link(a, b, "xgmi", 1, speed or None, source="amdsmi"))
        return TopologyFragment(
            "amdsmi",
            tuple(devices),
            tuple(links),
            warnings=tuple(dict.fromkeys(self._warnings)),
            pairs=tuple(pairs),
        )

    def _ask(self, name: str, *args: object) -> Any:  # noqa: ANN401 - whatever the library gives
        call = getattr(self._smi, name, None)
        if call is None:
            return None
        try:
            return call(*args)
        except Exception as e:  # of the library or of its C layer: told, and the rest goes on
            self._warnings.append(f"{name}: {e}")
            return None

    def _device(self, handle: object, index: int) -> Device | None:
        bdf = normal_bdf(str(self._ask("amdsmi_get_gpu_device_bdf", handle) or ""))
        if bdf is None:
            self._warnings.append(f"GPU {index} does not tell its bus address; left out")
            return None
        asic = self._ask("amdsmi_get_gpu_asic_info", handle) or {}
        memory = self._ask("amdsmi_get_gpu_vram_info", handle) or {}
        numa = self._ask("amdsmi_topo_get_numa_node_number", handle)
        size = memory.get("vram_size")
        uuid = self._ask("amdsmi_get_gpu_device_uuid", handle)
        return Device(
            bdf,
            "gpu",
            vendor="amd",
            model=asic.get("market_name") or None,
            bdf=bdf,
            numa_nodes=(numa,) if isinstance(numa, int) and 0 <= numa < 1 << 16 else (),
            index=index,
            memory_bytes=size << 20 if isinstance(size, int) and size > 0 else None,
            attrs={"amdsmi_uuid": str(uuid)} if uuid else {},
        )
