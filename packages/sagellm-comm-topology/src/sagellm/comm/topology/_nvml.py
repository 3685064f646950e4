"""NVIDIA GPUs, NVLinks and MIG out of the driver's management library.

Needs `nvidia-ml-py` (extra `nvidia`), imported only when a NVIDIA device is there. Touches no CUDA
context. Unverified on hardware: written after the library's documentation and recorded machines,
and tested against a stub of it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from sagellm.core.protocols import (
    DetectionContext,
    Device,
    Link,
    Pair,
    PathClass,
    SwitchDomain,
    TopologyFragment,
)

from ._sysfs import normal_bdf

__all__ = ["NvmlDetector"]

_SWITCHED = "nvlink-switch"
_MOST_C2C = 64  # no GPU has as many
_NODE_MASK_WORDS = 16  # 1024 NUMA nodes

_CAPABILITIES = {"read": 0, "write": 1, "atomics": 3}
_P2P_WORDS = {0: "OK", 1: "CNS", 2: "GNS", 3: "TNS", 4: "DR", 5: "NS"}
_ANCESTORS: Mapping[int, PathClass] = {
    0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS",
}  # fmt: skip

# Any: nvidia-ml-py ships no types, and its handles are opaque.
_Library = Any
_Answer = Any


class NvmlDetector:
    """Asks the driver about every GPU; one that fails costs only what it would have said.

    A GPU that hangs ends the pass; `so_far` gives what the GPUs before it said.

    Args:
        load: Gives the pynvml module; None imports it. A recorded machine (a root other than
            `/`) is never mixed with the live driver unless a loader is given.

    """

    def __init__(self, load: Callable[[], _Library] | None = None) -> None:
        self._load = load
        self._session: _Session | None = None

    def detect(self, ctx: DetectionContext) -> TopologyFragment:
        """What the driver says, never raising; see `Detector`."""
        self._session = None
        if self._load is None and ctx.root != Path("/"):
            return TopologyFragment("nvml")
        try:
            library = self._load() if self._load else importlib.import_module("pynvml")
        except ImportError:
            return _nothing(
                "nvidia-ml-py is not installed, NVLinks and UUIDs are unknown; "
                "`pip install 'sagellm-comm-topology[nvidia]'` brings it"
            )
        try:
            library.nvmlInit()
        except Exception as e:  # the library's errors are made at run time; see NVMLError
            return _nothing(f"the driver's library does not start: {e}")
        try:
            self._session = _Session(library, ctx)
            return self._session.read()
        finally:
            with contextlib.suppress(Exception):  # what it said before still counts
                library.nvmlShutdown()

    def so_far(self) -> TopologyFragment:
        """The GPUs that a pass which still runs has heard of; from any thread."""
        session = self._session
        return _nothing("the driver has answered nothing") if session is None else session.so_far()


def _nothing(warning: str) -> TopologyFragment:
    return TopologyFragment("nvml", warnings=(warning,))


class _Session:
    """One pass over the GPUs while the library is initialised."""

    def __init__(self, library: _Library, ctx: DetectionContext) -> None:
        self._nvml = library
        self._ctx = ctx
        self._warnings: list[str] = []
        self._devices: dict[str, Device] = {}
        self._count = 0
        self._links: list[Link] = []
        self._switch_members: dict[str, bool] = {}  # bdf -> stated by the driver
        self._cliques: set[str] = set()
        self._port_bandwidth: set[float | None] = set()

    def read(self) -> TopologyFragment:
        handles: dict[str, Any] = {}
        devices = self._devices
        count = self._count = self._ask("nvmlDeviceGetCount") or 0
        for index in range(count):
            if self._is_late(f"GPUs {index} to {count - 1}"):
                break
            with self._told(f"GPU {index}"):
                device, handle = self._device(index)
                devices[device.id], handles[device.id] = device, handle
        bundles: dict[tuple[str, str], tuple[int, float | None]] = {}
        for bdf, handle in handles.items():
            if self._is_late(f"NVLinks of {bdf}"):
                break
            with self._told(f"NVLinks of {bdf}"):
                numa = next(iter(devices[bdf].numa_nodes), None)
                self._nvlinks(bdf, handle, handles, bundles, numa)
        for (a, b), (lanes, lane_bandwidth) in bundles.items():
            bandwidth = lane_bandwidth * lanes if lane_bandwidth else None
            self._links.append(Link(a, b, "nvlink", lanes, bandwidth, source="nvml"))
        pairs = self._pairs(handles)
        domains = self._domains()
        for domain in domains:
            devices[domain.id] = Device(domain.id, "fabric_switch", vendor="nvidia")
        return TopologyFragment(
            "nvml",
            tuple(devices.values()),
            tuple(self._links),
            domains,
            tuple(dict.fromkeys(self._warnings)),
            pairs=pairs,
        )

    def so_far(self) -> TopologyFragment:
        """The GPUs that were read whole, without their NVLinks, while `read` still runs."""
        devices = tuple(d for d in list(self._devices.values()) if d.kind == "gpu")
        told = (
            f"{len(devices)} of {self._count} GPUs answered, and NVLinks were not read to the end"
        )
        return TopologyFragment("nvml", devices, warnings=(*list(self._warnings), told))

    def _ask(self, name: str, *args: object) -> _Answer:
        """Result of one call; None when this driver or device has no answer.

        "Not supported" is an answer of most devices to some question. Anything else is told.
        """
        call = getattr(self._nvml, name, None)
        if call is None:
            return None
        try:
            return call(*args)
        except Exception as e:  # of the library, of its C layer, or of a driver too old for it
            quiet = {
                getattr(self._nvml, "NVML_ERROR_NOT_SUPPORTED", 3),
                getattr(self._nvml, "NVML_ERROR_FUNCTION_NOT_FOUND", 13),
                getattr(self._nvml, "NVML_ERROR_INVALID_ARGUMENT", 2),
                getattr(self._nvml, "NVML_ERROR_NOT_FOUND", 6),
            }
            if getattr(e, "value", None) not in quiet:
                self._warnings.append(f"{name}{_plain(args)}: {e or type(e).__name__}")
            return None

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """An answer that is not what the library documents costs only what it was about."""
        try:
            yield
        except Exception as e:
            self._warnings.append(f"{what}: left out: {e or type(e).__name__}")

    def _is_late(self, what: str) -> bool:
        if self._ctx.clock() <= self._ctx.deadline_s:
            return False
        self._warnings.append(f"deadline reached before {what}")
        return True

    def _device(self, index: int) -> tuple[Device, object]:
        handle = self._ask("nvmlDeviceGetHandleByIndex", index)
        pci = None if handle is None else self._ask("nvmlDeviceGetPciInfo", handle)
        bdf = normal_bdf(_text(pci.busId)) if pci is not None else None
        if bdf is None:
            raise ValueError("it does not tell its bus address")
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        numa = self._ask("nvmlDeviceGetMemoryAffinity", handle, _NODE_MASK_WORDS, 0)
        numa_nodes = _bits(numa)
        attrs = self._partitions(handle)
        c2c = self._ask("nvmlDeviceGetC2cModeInfoV", handle)
        if c2c is not None and c2c.isC2cEnabled:
            attrs["c2c"] = "enabled"
            count, bandwidth = self._c2c(handle)
            self._links += [
                Link(bdf, f"numa:{n}", "c2c", count, bandwidth, source="nvml",
                     confidence="inferred")
                for n in numa_nodes[:1]
            ]  # fmt: skip
        own = self._ask("nvmlDeviceGetNumaNodeId", handle)
        if own is not None:
            attrs["memory_numa"] = str(own)  # memory alone: nothing may be pinned there
        clique = self._clique(handle)
        if clique:
            attrs["fabric_clique"] = clique
            self._cliques.add(clique)
        device = Device(
            bdf,
            "gpu",
            vendor="nvidia",
            model=_text(self._ask("nvmlDeviceGetName", handle)) or None,
            bdf=bdf,
            uuid=_text(self._ask("nvmlDeviceGetUUID", handle)) or None,
            numa_nodes=numa_nodes,
            index=index,
            memory_bytes=int(memory.total) if memory is not None else None,
            attrs=attrs,
        )
        return device, handle

    def _c2c(self, handle: object) -> tuple[int, float | None]:
        """Coherent links to the processor that are up, and bytes per second of all together."""
        count = self._field(handle, "NVML_FI_DEV_C2C_LINK_COUNT", 170)
        limit = min(int(count or 0), _MOST_C2C)
        up = [
            i
            for i in range(limit)
            if self._field(handle, "NVML_FI_DEV_C2C_LINK_GET_STATUS", 171, scope=i) == 1
        ]
        megabytes = [
            self._field(handle, "NVML_FI_DEV_C2C_LINK_GET_MAX_BW", 172, scope=i) for i in up
        ]
        known = [m for m in megabytes if m]
        bandwidth = sum(known) * 1e6 if known and len(known) == len(up) else None
        return len(up) or 1, bandwidth

    def _partitions(self, handle: object) -> dict[str, str]:
        mode = self._ask("nvmlDeviceGetMigMode", handle)
        if not mode or not mode[0]:
            return {}
        uuids = []
        for i in range(self._ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            part = self._ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, i)
            uuid = part is not None and _text(self._ask("nvmlDeviceGetUUID", part))
            if uuid:
                uuids.append(uuid)
        return {"mig_mode": "enabled", "mig": ",".join(uuids)}

    def _clique(self, handle: object) -> str | None:
        """Cluster and clique of a multi-node NVLink fabric, once the fabric manager is done."""
        make = getattr(self._nvml, "c_nvmlGpuFabricInfo_v2_t", None)
        if make is None:
            return None
        info = make()
        answered = self._ask("nvmlDeviceGetGpuFabricInfoV", handle, self._nvml.byref(info))
        done = getattr(self._nvml, "NVML_GPU_FABRIC_STATE_COMPLETED", 3)
        if answered is None or info.state != done or not any(info.clusterUuid):
            return None
        return f"{bytes(info.clusterUuid).hex()}/{info.cliqueId}"

    def _nvlinks(
        self,
        bdf: str,
        handle: object,
        handles: Mapping[str, Any],
        bundles: dict[tuple[str, str], tuple[int, float | None]],
        numa: int | None,
    ) -> None:
        lane_bandwidth = self._field(handle, "NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON", 90)
        bandwidth = lane_bandwidth * 1e6 if lane_bandwidth else None
        count = self._field(handle, "NVML_FI_DEV_NVLINK_LINK_COUNT", 91)
        limit = int(count) if count else getattr(self._nvml, "NVML_NVLINK_MAX_LINKS", 18)
        peers: dict[str, int] = {}
        absent: dict[str, int] = {}
        switched = unknown = to_cpu = 0
        for lane in range(limit):
            # An active lane says nothing of whom it reaches: that is asked for next.
            if self._ask("nvmlDeviceGetNvLinkState", handle, lane) != 1:
                continue
            kind = self._ask("nvmlDeviceGetNvLinkRemoteDeviceType", handle, lane)
            remote = self._ask("nvmlDeviceGetNvLinkRemotePciInfo", handle, lane)
            peer = normal_bdf(_text(remote.busId)) if remote is not None else None
            if kind == getattr(self._nvml, "NVML_NVLINK_DEVICE_TYPE_SWITCH", 2):
                switched += 1
            elif kind == getattr(self._nvml, "NVML_NVLINK_DEVICE_TYPE_IBMNPU", 1):
                to_cpu += 1
            elif peer is not None and peer in handles and peer != bdf:
                peers[peer] = peers.get(peer, 0) + 1
            elif peer is not None or kind == getattr(self._nvml, "NVML_NVLINK_DEVICE_TYPE_GPU", 0):
                # A GPU that a container keeps from us, say: named, so that it is no switch.
                where = peer or "a GPU without an address"
                absent[where] = absent.get(where, 0) + 1
            else:
                unknown += 1
        for peer, lanes in peers.items():
            pair = (min(bdf, peer), max(bdf, peer))
            bundles[pair] = (max(lanes, bundles.get(pair, (0, None))[0]), bandwidth)
        if to_cpu and numa is not None:
            speed = bandwidth * to_cpu if bandwidth else None
            self._links.append(
                Link(bdf, f"numa:{numa}", "nvlink", to_cpu, speed, source="nvml",
                     confidence="inferred")
            )  # fmt: skip
        elif to_cpu:
            self._warnings.append(
                f"{bdf}: {to_cpu} NVLinks lead to the CPU, but its NUMA node is unknown"
            )
        self._warnings += [
            f"{bdf}: {n} NVLinks lead to {where}, which the driver does not show here"
            for where, n in absent.items()
        ]
        if switched:
            self._join_switch(bdf, switched, bandwidth, stated=True)
        if unknown and not switched and not peers and not absent:
            self._join_switch(bdf, unknown, bandwidth, stated=False)
        elif unknown:
            self._warnings.append(f"{bdf}: {unknown} active NVLinks lead to an unknown end")

    def _join_switch(self, bdf: str, lanes: int, lane: float | None, *, stated: bool) -> None:
        bandwidth = lane * lanes if lane else None
        self._switch_members[bdf] = stated
        self._port_bandwidth.add(bandwidth)
        self._links.append(
            Link(
                bdf,
                _SWITCHED,
                "nvlink",
                lanes,
                bandwidth,
                source="nvml",
                confidence="stated" if stated else "inferred",
            )
        )

    def _field(
        self, handle: object, name: str, default_id: int, *, scope: int | None = None
    ) -> float | None:
        """One field value, of one link if a scope is given; None when it is not known."""
        field = getattr(self._nvml, name, default_id)
        asked = [field if scope is None else (field, scope)]
        values = self._ask("nvmlDeviceGetFieldValues", handle, asked)
        if not values or values[0].nvmlReturn != 0:
            return None
        # An unsigned number of 4 or 8 bytes, little-endian, in the first bytes of a zeroed union.
        return float(values[0].value.ullVal)

    def _domains(self) -> tuple[SwitchDomain, ...]:
        """All switched GPUs as one domain: on every known machine the switches are one fabric."""
        if len(self._switch_members) < 2:
            self._links = [x for x in self._links if x.b != _SWITCHED]
            return ()
        port = next(iter(self._port_bandwidth)) if len(self._port_bandwidth) == 1 else None
        return (
            SwitchDomain(
                _SWITCHED,
                "nvlink",
                tuple(self._switch_members),
                clique=next(iter(self._cliques)) if len(self._cliques) == 1 else None,
                port_bandwidth_bytes_per_s=port,
                confidence="stated" if all(self._switch_members.values()) else "inferred",
            ),
        )

    def _pairs(self, handles: Mapping[str, Any]) -> tuple[Pair, ...]:
        """Path class and peer access of every pair: neither promises the other."""
        found: list[Pair] = []
        for a, b in combinations(handles, 2):
            if self._is_late("path classes and peer access of all pairs"):
                break
            common = self._ask("nvmlDeviceGetTopologyCommonAncestor", handles[a], handles[b])
            peer: dict[str, str] = {}
            for name, capability in _CAPABILITIES.items():
                status = self._ask("nvmlDeviceGetP2PStatus", handles[a], handles[b], capability)
                if status is not None:
                    peer[name] = _P2P_WORDS.get(int(status), "U")
            path = _ANCESTORS.get(common) if common is not None else None
            if path or peer:
                found.append(Pair(a, b, path, peer=peer, source="nvml"))
        return tuple(found)


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii", "replace")
    return str(value) if value is not None else ""


def _plain(args: tuple[object, ...]) -> str:
    return f"({', '.join(str(a) for a in args if isinstance(a, int))})"


def _bits(words: Iterable[int] | None) -> tuple[int, ...]:
    """Numbers of the bits set in a mask of 64-bit words."""
    if words is None:
        return ()
    return tuple(
        64 * i + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1
    )
