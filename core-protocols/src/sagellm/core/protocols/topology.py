"""What a machine looks like to its communication: devices, links, paths and their cost.

Values are immutable and safe to share between threads. A device is named by its PCI bus
address, UUID or another name that survives a restart, never by an index, because
`CUDA_VISIBLE_DEVICES` renumbers. Bandwidths are bytes per second *per direction*. What is not
known is None: there is no default NUMA node, link class or speed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

__all__ = [
    "Affinity",
    "Basis",
    "Confidence",
    "CostModelProtocol",
    "CostTable",
    "Device",
    "DeviceKind",
    "Estimate",
    "Link",
    "LinkKind",
    "Pair",
    "Path",
    "PathClass",
    "Store",
    "SwitchDomain",
    "TopologyFragment",
    "TopologyInfo",
    "TopologyManagerProtocol",
]

DeviceKind = Literal[
    "gpu", "npu", "nic", "numa", "pci_root", "pci_switch", "fabric_switch", "cxl_mem", "display",
]  # fmt: skip
"""What a vertex of the graph is. A `display` computes nothing (a management chip's, a
hypervisor's, the processor's own) and is no accelerator. `numa` stands for the CPUs and memory of
one NUMA node, `pci_root` for one host bridge, `fabric_switch` for accelerator fabrics and
networks."""

LinkKind = Literal[
    "nvlink", "xgmi", "hccs", "sio", "ub", "mlulink", "metaxlink", "mtlink", "ixlink", "xpulink",
    "c2c", "pcie", "host_bridge", "socket", "cxl", "infiniband", "roce", "ethernet", "loopback",
]  # fmt: skip
"""How two vertices are joined. `host_bridge` is PCI root to NUMA node, `socket` NUMA to NUMA."""

PathClass = Literal["LOC", "LINK", "C2C", "PIX", "PXB", "PHB", "NODE", "SYS", "NET"]
"""Classes of `nvidia-smi topo -m`, best first; LINK is any accelerator fabric (NVLink, HCCS, …)."""

Confidence = Literal["stated", "inferred"]
"""Whether a source said it or a rule concluded it. A guess has no word because none is made."""

Basis = Literal["calibrated", "scaled", "prior"]
"""Where an estimate comes from: measured here, extended from a measurement, or formula alone."""


@dataclass(frozen=True, slots=True)
class Device:
    """One vertex: an accelerator, NIC, NUMA node or switch.

    Attributes:
        id: Stable name, unique in the topology: `0000:17:00.0`, a UUID, `numa:0`, `net:eth0`.
        kind: What it is.
        vendor: Lower-case vendor (`nvidia`, `huawei`, …) or None.
        model: Marketing name, or None when no source states it.
        bdf: PCI address `dddd:bb:dd.f` with at least four domain digits, or None.
        uuid: The driver's UUID, or None.
        numa_nodes: NUMA nodes it is local to, nearest first; empty when unknown.
        cpulist: CPUs local to it in Linux list form (`0-3,8`), or None.
        index: Index by the driver, before any visibility variable; None without a driver.
        visible_index: Index in this process, None when hidden or not an accelerator.
        memory_bytes: Memory it carries, or None.
        node: Host the device is in; 0 is this host until a topology has been gathered.
        attrs: Facts of its source, strings only, for people and exporters.

    """

    id: str
    kind: DeviceKind
    vendor: str | None = None
    model: str | None = None
    bdf: str | None = None
    uuid: str | None = None
    numa_nodes: tuple[int, ...] = ()
    cpulist: str | None = None
    index: int | None = None
    visible_index: int | None = None
    memory_bytes: int | None = None
    node: int = 0
    attrs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Link:
    """One undirected edge between two devices.

    Attributes:
        a: One end's device id.
        b: The other end's device id.
        kind: How they are joined.
        count: Parallel lanes or bricks bundled in this edge (12 for NV12), at least 1.
        bandwidth_bytes_per_s: Of the whole bundle, per direction; None when unknown.
        latency_s: One way; None when unknown.
        source: Detector or file that said so (`sysfs`, `nvml`, `npu-smi`, …).
        confidence: Stated by the source, or inferred from a pattern.

    """

    a: str
    b: str
    kind: LinkKind
    count: int = 1
    bandwidth_bytes_per_s: float | None = None
    latency_s: float | None = None
    source: str = ""
    confidence: Confidence = "stated"


@dataclass(frozen=True, slots=True)
class Pair:
    """What a source says of two devices without naming the links between them.

    Tools print classes (`PHB`) and peer access (`GNS`) for pairs. A path over links that are
    known is believed before such a class.

    Attributes:
        a: One device id.
        b: The other device id.
        path: Class of the way, or None when the source does not say.
        via: Kind of the links on it where only that is known (`pcie`), or None.
        peer: Capability (`read`, `write`, `atomics`) to the tool's word for it (`OK`, `GNS`, …).
        source: Detector or file that said so.
        confidence: Stated by the source, or inferred from a pattern.

    """

    a: str
    b: str
    path: PathClass | None = None
    via: LinkKind | None = None
    peer: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    confidence: Confidence = "stated"


@dataclass(frozen=True, slots=True)
class SwitchDomain:
    """Devices that reach each other through one switched fabric (NVSwitch, UB, MLU-Link).

    Members are empty where a source shows the switches but not who is on them.
    """

    id: str
    kind: LinkKind
    members: tuple[str, ...]
    clique: str | None = None
    port_bandwidth_bytes_per_s: float | None = None
    confidence: Confidence = "stated"


@dataclass(frozen=True, slots=True)
class TopologyFragment:
    """What one detector or file contributes; fragments are merged by bus address, then UUID.

    Attributes:
        source: Name of the detector or file.
        devices: Devices it saw.
        links: Links it saw; ends may be devices of other fragments.
        domains: Switch domains it saw.
        pairs: Pairs it classed without saying what is between them.
        warnings: Sentences for a person: what could not be read, and what that means.
        elapsed_s: Time the detector took.

    """

    source: str
    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()
    domains: tuple[SwitchDomain, ...] = ()
    warnings: tuple[str, ...] = ()
    elapsed_s: float = 0.0
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True, slots=True)
class TopologyInfo:
    """Everything that is known of the devices and links of one host or of a whole job.

    Attributes:
        devices: All vertices; accelerators first in driver order, then the others by id.
        links: All edges.
        domains: Switched fabrics.
        num_nodes: Hosts described; 1 until `gather`.
        missing_nodes: Ranks whose description did not arrive in time.
        warnings: What could not be read, in words.
        provenance: Detector name to the seconds it took.
        fingerprint: Hash of everything that a choice may depend on; equal machines are equal.
        hostname: Name of this host, for display only; never proof of anything.
        pairs: Pairs that a source classed without saying what is between them.

    """

    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()
    domains: tuple[SwitchDomain, ...] = ()
    num_nodes: int = 1
    missing_nodes: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    hostname: str = ""
    pairs: tuple[Pair, ...] = ()

    @property
    def accelerators(self) -> tuple[Device, ...]:
        """GPUs and NPUs, in driver order."""
        return tuple(d for d in self.devices if d.kind in ("gpu", "npu"))

    @property
    def num_devices(self) -> int:
        """Number of accelerators; 0 on a CPU-only machine."""
        return len(self.accelerators)

    def find(self, device_id: str) -> Device | None:
        """The device of that id, or None."""
        return next((d for d in self.devices if d.id == device_id), None)


@dataclass(frozen=True, slots=True)
class Path:
    """The best way between two devices.

    Attributes:
        a: First device id.
        b: Last device id.
        kind: Path class, or None when the devices are not known to be joined.
        hops: Links walked; 0 for a device to itself, None when unknown or when a source states
            the class alone.
        devices: Ids along the way, both ends included.
        bottleneck_bytes_per_s: Smallest bandwidth on the way, None when a link's is unknown.
        latency_s: Sum of one-way latencies, None when a link's is unknown.
        links: The links walked, in order.

    """

    a: str
    b: str
    kind: PathClass | None
    hops: int | None
    devices: tuple[str, ...] = ()
    bottleneck_bytes_per_s: float | None = None
    latency_s: float | None = None
    links: tuple[Link, ...] = ()


@dataclass(frozen=True, slots=True)
class Affinity:
    """Where the host side of a device should run; empty and None mean unknown, not zero."""

    numa_nodes: tuple[int, ...] = ()
    cpulist: str | None = None


class Store(Protocol):
    """The part of a torch.distributed store that packages without torch use."""

    def set(self, key: str, value: str) -> None:
        """Store `value` under `key`."""
        ...

    def get(self, key: str) -> bytes:
        """Value of `key`; blocks until it is there or the store's timeout ends."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether every key is there. Never blocks."""
        ...

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that starts at 0, and return the new value."""
        ...


class TopologyManagerProtocol(ABC):
    """Finds the devices and links of this host and answers questions about them.

    All methods are thread-safe. Missing hardware, drivers or permissions are warnings in the
    result, never exceptions.
    """

    @abstractmethod
    def detect(self, *, refresh: bool = False, deadline_s: float = 1.0) -> TopologyInfo:
        """The topology of this host; the first call looks, later ones answer from memory.

        Args:
            refresh: Look again even when an answer is in memory.
            deadline_s: Longest time in seconds; what has not answered by then is left out and
                named in a warning.

        """

    @abstractmethod
    def gather(self, store: Store, *, timeout_s: float) -> TopologyInfo:
        """The topology of every rank's host. Collective: every rank of the store calls it.

        Raises:
            CommTimeoutError: Rank 0's agreed result did not arrive. Ranks that are merely
                missing do not raise: they are named in `missing_nodes` and in a warning.

        """

    @abstractmethod
    def device(self, local_rank: int) -> Device:
        """The accelerator that this process sees as `local_rank`.

        Raises:
            ConfigError: There is no such device; the message lists what is visible.

        """

    @abstractmethod
    def path(self, a: str, b: str) -> Path:
        """The best path between two devices, by id.

        Raises:
            ConfigError: An id is unknown; the message names the nearest ones.

        """

    @abstractmethod
    def nearest(self, device: str, kind: DeviceKind) -> Device | None:
        """The device of that kind with the best path from `device`; None if there is none."""

    @abstractmethod
    def affinity(self, device: str) -> Affinity:
        """CPUs and NUMA nodes local to a device."""

    @abstractmethod
    def islands(self, kind: LinkKind) -> tuple[tuple[str, ...], ...]:
        """Groups of accelerators that reach each other over links of `kind` alone."""

    @abstractmethod
    def rank_map(self, tp: int, pp: int = 1, dp: int = 1, ep: int = 1) -> tuple[str, ...]:
        """Device id for each global rank, with tensor-parallel groups on the fastest links.

        Ranks are numbered with tp fastest, then ep, pp, dp, as Megatron-LM does.

        Raises:
            ConfigError: tp * pp * dp * ep exceeds the number of accelerators.

        """

    @abstractmethod
    def ring(self, group: Sequence[str]) -> tuple[str, ...]:
        """The members of `group` in the order of a ring with the widest bottleneck found."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long an operation should take.

    Attributes:
        time_us: Best estimate in microseconds.
        low_us: Lower end of the interval that should hold 9 of 10 measurements.
        high_us: Upper end of it.
        busbw_bytes_per_s: Bus bandwidth as nccl-tests define it; None for nbytes 0.
        basis: What the estimate rests on.

    """

    time_us: float
    low_us: float
    high_us: float
    busbw_bytes_per_s: float | None
    basis: Basis


@dataclass(frozen=True, slots=True)
class CostTable:
    """A frozen cost model: plain data that every rank holds identically.

    Attributes:
        fingerprint: Topology it belongs to.
        version: Of the table's schema.
        curves: (op, algorithm, group size) to ((nbytes, time_us), …) in rising size. Of an op there
            may be more, under names that are no op's: what was measured of groups of one shape
            (`op@shape`), formulas (`prior:op`), and half-widths of intervals in place of times
            (`noise:op`).

    """

    fingerprint: str
    version: int
    curves: Mapping[tuple[str, str, int], tuple[tuple[int, float], ...]]


class CostModelProtocol(ABC):
    """Predicts how long collectives take on a topology, and knows what its figures rest on."""

    @abstractmethod
    def predict(self, op: str, nbytes: int, group: Sequence[str] | int, algorithm: str) -> Estimate:
        """Time of one call.

        Args:
            op: `all_reduce`, `all_gather`, `reduce_scatter`, `broadcast`, `all_to_all`, `p2p`.
            nbytes: Payload per rank as nccl-tests count it.
            group: Device ids of the members, or just their number.
            algorithm: `ring`, `tree`, `recursive_doubling`, `halving_doubling`, `direct`, ….

        Raises:
            ConfigError: Unknown op or algorithm; the message lists the known ones.

        """

    @abstractmethod
    def observe(self, samples: Sequence[Mapping[str, Any]]) -> None:  # Any: JSON-like rows
        """Learn from measurements: rows of op, nbytes, group_size, algorithm, time_us.

        A row may name its `members`, device ids: it then speaks for groups joined alike.

        Raises:
            ConfigError: A row cannot be; none was learned.

        """

    @abstractmethod
    def freeze(self) -> CostTable:
        """The model as data, to be broadcast from rank 0 before anybody chooses by it."""

    @abstractmethod
    def select(
        self, table: CostTable, op: str, nbytes: int, group: Sequence[str] | int
    ) -> tuple[str, Estimate]:
        """The fastest algorithm and its estimate. Pure: equal tables give equal answers.

        Raises:
            ConfigError: The table has nothing for the op, or payload or group cannot be.

        """
