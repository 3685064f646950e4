"""Draws the `/sys` of machines that nobody here has, and a stand-in for their driver library.

Files and links are laid out as the kernel does: PCI functions in folders of their parents below
`/sys/devices`, relative links to them from `/sys/bus` and `/sys/class`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["FakeMachine", "StubNvml", "draw_hgx"]

GPU, NIC, IB, BRIDGE, NVSWITCH, OTHER = 0x030200, 0x020000, 0x020700, 0x060400, 0x068000, 0x088000


class FakeMachine:
    """A machine below `root`, grown part by part.

    Args:
        root: Folder that plays `/`; it is created.

    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, Path] = {}
        (root / "sys/bus/pci/devices").mkdir(parents=True, exist_ok=True)
        (root / "sys/class/net").mkdir(parents=True, exist_ok=True)
        (root / "sys/devices/system/node").mkdir(parents=True, exist_ok=True)

    def numa(
        self, node: int, cpulist: str, distances: Sequence[int], memory_kb: int = 1 << 25
    ) -> None:
        """Add a NUMA node; an empty `cpulist` makes one of memory alone."""
        folder = self.root / f"sys/devices/system/node/node{node}"
        folder.mkdir()
        (folder / "cpulist").write_text(f"{cpulist}\n")
        (folder / "distance").write_text(" ".join(map(str, distances)) + "\n")
        (folder / "meminfo").write_text(f"Node {node} MemTotal:       {memory_kb} kB\n")

    def pci(
        self,
        bdf: str,
        above: str,
        pci_class: int,
        *,
        vendor: int = 0x8086,
        device: int = 1,
        numa: int | None = None,
        speed: str | None = None,
        width: int | None = None,
        cpulist: str = "",
        uevent: bool = True,
    ) -> None:
        """Add a PCI function below a host bridge (`pci0000:00`) or another function."""
        parent = self._folders.get(above) or self.root / "sys/devices" / above
        folder = parent / bdf
        folder.mkdir(parents=True)
        self._folders[bdf] = folder
        files = {
            "class": f"0x{pci_class:06x}",
            "vendor": f"0x{vendor:04x}",
            "device": f"0x{device:04x}",
            "numa_node": None if numa is None else str(numa),
            "local_cpulist": cpulist,
            "max_link_speed": speed,
            "max_link_width": None if width is None else str(width),
            "current_link_speed": "2.5 GT/s PCIe",
        }
        if uevent:
            files["uevent"] = f"PCI_CLASS={pci_class:X}\nPCI_ID={vendor:04X}:{device:04X}"
        for name, text in files.items():
            if text is not None:
                (folder / name).write_text(f"{text}\n")
        self._link(self.root / "sys/bus/pci/devices" / bdf, folder)

    def switch(self, upstream: str, above: str, ports: Sequence[str], **facts: Any) -> None:  # noqa: ANN401
        """Add a PCIe switch: an upstream port and its downstream ports."""
        self.pci(upstream, above, BRIDGE, **facts)
        for port in ports:
            self.pci(port, upstream, BRIDGE, **facts)

    def net(
        self,
        name: str,
        bdf: str | None,
        *,
        speed: int = 100_000,
        state: str = "up",
        link_type: int = 1,
    ) -> None:
        """Add a net interface of a PCI function, or a virtual one; type 1 is Ethernet."""
        owner = self._folders[bdf] if bdf else self.root / "sys/devices/virtual"
        folder = owner / "net" / name
        folder.mkdir(parents=True)
        (folder / "speed").write_text(f"{speed}\n")
        (folder / "operstate").write_text(f"{state}\n")
        (folder / "type").write_text(f"{link_type}\n")
        self._link(self.root / "sys/class/net" / name, folder)

    def rdma(self, name: str, bdf: str, *, gbps: int = 400, layer: str = "InfiniBand") -> None:
        """Add an RDMA device with one active port to a PCI function."""
        folder = self._folders[bdf] / "infiniband" / name
        port = folder / "ports/1"
        (port / "gids").mkdir(parents=True)
        (folder / "hca_type").write_text("MT4129\n")
        (port / "state").write_text("4: ACTIVE\n")
        (port / "rate").write_text(f"{gbps} Gb/sec (4X NDR)\n")
        (port / "link_layer").write_text(f"{layer}\n")
        (port / "gids/0").write_text("fe80:0000:0000:0000:b83f:d203:00aa:0001\n")
        parent = self.root / "sys/class/infiniband"
        parent.mkdir(exist_ok=True)
        self._link(parent / name, folder)

    def cxl(self, number: int, bdf: str, *, ram: int, node: int | None = None) -> None:
        """Add CXL memory to a PCI function, online as a NUMA node if one is given."""
        bus = self.root / "sys/bus/cxl/devices"
        bus.mkdir(parents=True, exist_ok=True)
        folder = self._folders[bdf] / f"mem{number}"
        files = {"ram/size": f"0x{ram:x}", "pmem/size": "0x0", "serial": "0x1234", "numa_node": "0"}
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{text}\n")
        self._link(bus / f"mem{number}", folder)
        if node is None:
            return
        root = self.root / "sys/devices/platform/cxl"
        endpoint = root / f"endpoint{number}"
        decoder = endpoint / f"decoder{number}.0"
        region = root / f"region{number}"
        dax = region / f"dax{number}.0"
        for made in (decoder, dax):
            made.mkdir(parents=True)
        (endpoint / "uport").symlink_to(os.path.relpath(folder, endpoint))
        (region / "target0").write_text(f"decoder{number}.0\n")
        (dax / "target_node").write_text(f"{node}\n")
        self._link(bus / f"decoder{number}.0", decoder)
        self._link(bus / f"region{number}", region)
        (self.root / "sys/bus/dax/devices").mkdir(parents=True, exist_ok=True)
        self._link(self.root / f"sys/bus/dax/devices/dax{number}.0", dax)

    def kfd(
        self,
        gpus: Sequence[str],
        *,
        cpus: int = 1,
        xgmi: Mapping[tuple[int, int], int] | None = None,
        memory: int = 192 << 30,
        far: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Add AMD's compute driver: processors, GPUs, and xGMI links between GPUs (or to the
        processor of a negative number, -1 being the first), with megabytes per second. Those
        that are `far` lead through a third GPU.
        """
        nodes = self.root / "sys/class/kfd/kfd/topology/nodes"
        for n in range(cpus):
            (nodes / str(n)).mkdir(parents=True)
            (nodes / str(n) / "properties").write_text("cpu_cores_count 64\nsimd_count 0\n")
        for i, bdf in enumerate(gpus):
            folder = nodes / str(cpus + i)
            (folder / "mem_banks/0").mkdir(parents=True)
            domain, bus, rest = bdf.split(":")
            slot, function = rest.split(".")
            place = int(bus, 16) << 8 | int(slot, 16) << 3 | int(function)
            (folder / "properties").write_text(
                f"cpu_cores_count 0\nsimd_count 1216\nvendor_id 4098\nlocation_id {place}\n"
                f"domain {int(domain, 16)}\nunique_id {1000 + i}\nhive_id 77\n"
            )
            bank = f"heap_type 1\nsize_in_bytes {memory}\n"
            (folder / "mem_banks/0/properties").write_text(bank)
        for number, ((a, b), speed) in enumerate((xgmi or {}).items()):
            folder = nodes / str(cpus + a) / f"io_links/{number}"
            folder.mkdir(parents=True)
            to = cpus + b if b >= 0 else -1 - b
            (folder / "properties").write_text(
                f"type 11\nnode_from {cpus + a}\nnode_to {to}\n"
                f"weight {30 if (a, b) in far else 15}\n"
                f"min_bandwidth {speed}\nmax_bandwidth {speed}\n"
            )

    def folder(self, bdf: str) -> Path:
        """The function's folder, to spoil files in it."""
        return self._folders[bdf]

    def _link(self, link: Path, target: Path) -> None:
        link.symlink_to(os.path.relpath(target, link.parent))


def draw_hgx(root: Path, *, functions: int = 600, numa_known: bool = True) -> FakeMachine:
    """A two-socket server: per socket two switches, each with two GPUs and two NICs; four
    NVSwitches; and other functions up to the number asked for.
    """
    machine = FakeMachine(root)
    machine.numa(0, "0-55", (10, 21))
    machine.numa(1, "56-111", (21, 10))
    cpuinfo = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Fake Xeon\n"
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(cpuinfo)
    count = 0
    for part in range(4):
        node = (part // 2) if numa_known else -1
        cpus = ("0-55", "56-111")[part // 2]
        bus = 0x10 + 0x30 * part
        above = f"pci0000:{bus:02x}"
        fast: dict[str, Any] = {
            "speed": "32.0 GT/s PCIe",
            "width": 16,
            "numa": node,
            "cpulist": cpus,
        }
        root_port = f"0000:{bus:02x}:01.0"
        machine.pci(root_port, above, BRIDGE, **fast)
        upstream = f"0000:{bus + 1:02x}:00.0"
        ports = [f"0000:{bus + 2:02x}:{i:02x}.0" for i in range(5)]
        machine.switch(upstream, root_port, ports, vendor=0x1000, **fast)
        for i in range(2):
            gpu = f"0000:{bus + 3 + i:02x}:00.0"
            machine.pci(gpu, ports[i], GPU, vendor=0x10DE, device=0x2330, **fast)
            nic = f"0000:{bus + 5 + i:02x}:00.0"
            machine.pci(nic, ports[2 + i], IB, vendor=0x15B3, device=0x1021, **fast)
            machine.rdma(f"mlx5_{2 * part + i}", nic)
        switch = f"0000:{bus + 7:02x}:00.0"
        slow = {**fast, "speed": "8.0 GT/s PCIe", "width": 2}
        machine.pci(switch, ports[4], NVSWITCH, vendor=0x10DE, device=0x22A3, **slow)
        count += 12
    machine.pci(
        "0000:00:03.0", "pci0000:00", NIC, vendor=0x8086, device=0x159B, numa=0, cpulist="0-55"
    )
    machine.net("eth0", "0000:00:03.0", speed=25_000)
    machine.net("lo", None)
    for i in range(count + 1, functions):
        bus, rest = 0xE0 + i // 240, i % 240
        bdf = f"0000:{bus:02x}:{rest // 8:02x}.{rest % 8}"
        machine.pci(bdf, f"pci0000:{bus:02x}", OTHER, numa=i % 2 if numa_known else -1)
    return machine


class _NvmlError(Exception):
    """The stand-in's errors carry a code, as the library's do."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class StubNvml:
    """Answers like nvidia-ml-py for GPUs that are described in plain data.

    Args:
        busids: Bus address of each GPU in driver order.
        peers: NVLinks: bus address to the far end of each of its lanes; `switch` for a switch,
            `cpu` for the processor and None for an end that the driver does not name.
        call_s: Time that each call takes, burnt and not slept.
        broken: Index of a GPU whose handle cannot be had.
        mig: Bus address to the UUIDs of its partitions.
        numa: Bus address to its NUMA node.
        lane_mbps: Megabytes per second of an NVLink; None when the driver does not say.
        ancestors: Pair of bus addresses to NVML's number of their common ancestor.
        p2p: Status of peer access; None is "OK" for GPUs with NVLinks and CNS for others.
        c2c: Bus address to megabytes per second of each of its coherent links to the processor;
            None for one that is down.

    """

    NVMLError = _NvmlError
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_NVLINK_MAX_LINKS = 18

    def __init__(
        self,
        busids: Sequence[str],
        *,
        peers: Mapping[str, Sequence[str | None]] | None = None,
        call_s: float = 0.0,
        broken: int | None = None,
        mig: Mapping[str, Sequence[str]] | None = None,
        numa: Mapping[str, int] | None = None,
        lane_mbps: int | None = 26_562,
        ancestors: Mapping[frozenset[str], int] | None = None,
        p2p: int | None = None,
        c2c: Mapping[str, Sequence[int | None]] | None = None,
    ) -> None:
        self._busids = list(busids)
        self._peers = dict(peers or {})
        self._call_s = call_s
        self._broken = broken
        self._mig = dict(mig or {})
        self._numa = dict(numa or {})
        self._lane_mbps = lane_mbps
        self._ancestors = dict(ancestors or {})
        self._p2p = p2p
        self._c2c = dict(c2c or {})
        self.calls = 0
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._spend()
        return len(self._busids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        self._spend()
        if index == self._broken:
            raise _NvmlError(15)  # GPU is lost
        return self._busids[index]

    def nvmlDeviceGetPciInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        self._spend()
        return SimpleNamespace(busId=f"0000{handle.upper()}")

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        self._spend()
        if handle.startswith("MIG-"):
            return handle
        return f"GPU-{self._busids.index(handle):08x}-fake"

    def nvmlDeviceGetName(self, handle: str) -> bytes:  # noqa: N802
        self._spend()
        return b"NVIDIA Fake 80GB"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        self._spend()
        return SimpleNamespace(total=80 << 30)

    def nvmlDeviceGetMemoryAffinity(self, handle: str, words: int, scope: int) -> list[int]:  # noqa: N802
        self._spend()
        if handle not in self._numa:
            raise _NvmlError(3)
        return [1 << self._numa[handle], *([0] * (words - 1))]

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:  # noqa: N802
        self._spend()
        return [1, 1] if handle in self._mig else [0, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:  # noqa: N802
        self._spend()
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:  # noqa: N802
        self._spend()
        if index >= len(self._mig[handle]):
            raise _NvmlError(6)
        return self._mig[handle][index]

    def nvmlDeviceGetNvLinkState(self, handle: str, lane: int) -> int:  # noqa: N802
        self._spend()
        return int(lane < len(self._peers.get(handle, ())))

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: str, lane: int) -> int:  # noqa: N802
        self._spend()
        far = self._peers[handle][lane]
        return {None: 255, "switch": 2, "cpu": 1}.get(far, 0)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: str, lane: int) -> SimpleNamespace:  # noqa: N802
        self._spend()
        far = self._peers[handle][lane]
        if far in (None, "switch", "cpu"):
            raise _NvmlError(3)
        return SimpleNamespace(busId=f"0000{far}")

    def nvmlDeviceGetC2cModeInfoV(self, handle: str) -> SimpleNamespace:  # noqa: N802
        self._spend()
        return SimpleNamespace(isC2cEnabled=int(handle in self._c2c))

    def nvmlDeviceGetFieldValues(  # noqa: N802
        self, handle: str, fields: Sequence[int | tuple[int, int]]
    ) -> list[Any]:
        self._spend()
        known: dict[int | tuple[int, int], int | None] = {
            90: self._lane_mbps,
            91: len(self._peers.get(handle, ())) or None,
            170: len(self._c2c.get(handle, ())) or None,
        }
        for i, megabytes in enumerate(self._c2c.get(handle, ())):
            known[171, i], known[172, i] = int(megabytes is not None), megabytes
        values = [known.get(f) for f in fields]
        return [
            SimpleNamespace(nvmlReturn=3 if v is None else 0, value=SimpleNamespace(ullVal=v or 0))
            for v in values
        ]

    def nvmlDeviceGetP2PStatus(self, a: str, b: str, kind: int) -> int:  # noqa: N802
        self._spend()
        if self._p2p is not None:
            return self._p2p
        return 0 if self._peers.get(a) else 1

    def nvmlDeviceGetTopologyCommonAncestor(self, a: str, b: str) -> int:  # noqa: N802
        self._spend()
        if frozenset((a, b)) not in self._ancestors:
            raise _NvmlError(3)
        return self._ancestors[frozenset((a, b))]

    def _spend(self) -> None:
        self.calls += 1
        if self._call_s:
            until = time.perf_counter() + self._call_s
            while time.perf_counter() < until:
                pass
