"""hwloc's XML (`lstopo machine.xml`), versions 1 to 3: NUMA nodes, PCI tree, GPU link matrices."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from sagellm.comm.topology._numbers import number, whole_number
from sagellm.comm.topology._pcitree import vertices_above
from sagellm.comm.topology._sysfs import normal_bdf
from sagellm.comm.topology._vendors import VENDORS, role
from sagellm.core.protocols import Device, Link, LinkKind, SwitchDomain, TopologyFragment

from ._fabric import join_switch, socket_links
from ._text import cpu_mask_list, numa_numbers
from ._xml import Element

__all__ = ["read_hwloc"]

_TYPE = re.compile(r"^([0-9a-f]{4})\s+\[([0-9a-f]{4}):([0-9a-f]{4})\]", re.IGNORECASE)
_MATRICES: dict[str, LinkKind] = {"NVLinkBandwidth": "nvlink", "XGMIBandwidth": "xgmi"}
_MAX_MATRIX = 4096


@dataclass(slots=True)
class _Place:
    """Where in the tree an object is: host bridge, bridges above, nearest set of NUMA nodes."""

    nodes: tuple[int, ...] = ()
    root: str | None = None
    above: tuple[Element, ...] = ()


@dataclass(slots=True)
class _Reading:
    source: str
    devices: dict[str, Device] = field(default_factory=dict)
    links: dict[tuple[str, str], Link] = field(default_factory=dict)
    places: list[tuple[Element, str, _Place]] = field(default_factory=list)
    objects: dict[str, str] = field(default_factory=dict)  # "Type:gp_index" to a device id
    warnings: list[str] = field(default_factory=list)
    kinds_are_bits: bool = False  # of operating system devices, since version 3


def read_hwloc(topology: Element, *, source: str = "") -> TopologyFragment:
    """What a `topology` element says."""
    reading = _Reading(source or "hwloc-xml")
    major = whole_number(topology.attrs.get("version", "").partition(".")[0], most=99)
    reading.kinds_are_bits = (major or 1) >= 3
    for machine in topology.named("object"):
        _walk(machine, _Place(), reading, top=True)
    shared = Counter(
        place.above[-1].attrs.get("pci_busid", "") for _, _, place in reading.places if place.above
    )
    for element, bdf, place in reading.places:
        _join(element, bdf, place, shared, reading)
    numas = [d.id for d in reading.devices.values() if d.kind == "numa"]
    sockets = socket_links(numas, reading.source, reading.warnings)
    links = [*reading.links.values(), *sockets]
    domains: list[SwitchDomain] = []
    for matrix in topology.children:
        if matrix.tag.startswith("distances2"):
            _matrix(matrix, reading, links, domains)
    return TopologyFragment(
        reading.source,
        tuple(reading.devices.values()),
        tuple(links),
        tuple(domains),
        tuple(dict.fromkeys(reading.warnings)),
    )


def _walk(obj: Element, place: _Place, reading: _Reading, *, top: bool = False) -> None:
    kind = obj.attrs.get("type", "")
    nodes = numa_numbers(cpu_mask_list(obj.attrs.get("nodeset")) or "")
    here = replace(place, nodes=() if top else nodes or place.nodes)
    known: str | None = None
    if kind == "NUMANode":
        known = _numa(obj, reading)
    elif kind == "Package" and len(nodes) == 1:
        known = f"numa:{nodes[0]}"
    elif kind == "Bridge":
        here = _bridge(obj, here, reading)
    elif kind == "PCIDev":
        known = _function(obj, here, reading)
    _remember(obj, known, reading)
    if obj.named("distances"):
        reading.warnings.append("distances of hwloc 1 are not read: those of nodes are unknown")
    for child in obj.named("object"):
        _walk(child, here, reading)


def _remember(obj: Element, known: str | None, reading: _Reading) -> None:
    gp = obj.attrs.get("gp_index")
    if known is None or gp is None:
        return
    reading.objects[f"{obj.attrs.get('type')}:{gp}"] = known
    for child in obj.named("object"):
        if child.attrs.get("type") == "OSDev" and (number := child.attrs.get("gp_index")):
            reading.objects[f"OSDev:{number}"] = known


def _numa(obj: Element, reading: _Reading) -> str | None:
    node = whole_number(obj.attrs.get("os_index"), most=99_999)
    if node is None:
        return None
    cpus = cpu_mask_list(obj.attrs.get("cpuset"))
    name = f"numa:{node}"
    reading.devices[name] = Device(
        name,
        "numa",
        numa_nodes=(node,),
        cpulist=cpus or None,
        memory_bytes=whole_number(obj.attrs.get("local_memory"), most=1 << 60),
        attrs={"cpuless": "yes"} if cpus == "" else {},
    )
    return name


def _bridge(obj: Element, place: _Place, reading: _Reading) -> _Place:
    if obj.attrs.get("bridge_type", "").startswith("0"):
        match = re.match(r"^([0-9a-f]{4,8}):\[([0-9a-f]{2})", obj.attrs.get("bridge_pci", ""))
        name = f"pci{match[1]}:{match[2]}" if match else f"pci-bridge:{len(reading.places)}"
        return replace(place, root=name)
    return replace(place, above=(*place.above, obj))


def _function(obj: Element, place: _Place, reading: _Reading) -> str | None:
    bdf = normal_bdf(obj.attrs.get("pci_busid", ""))
    match = _TYPE.match(obj.attrs.get("pci_type", ""))
    if bdf is None or match is None:
        reading.warnings.append(
            f"PCI function {obj.attrs.get('pci_busid', '?')[:20]} is unreadable"
        )
        return None
    code, vendor = int(match[1], 16) << 8, f"0x{match[2].lower()}"
    kind = role(code, vendor, on_root_bus=not place.above)
    if kind is None:
        return None
    facts = _facts(obj, kinds_are_bits=reading.kinds_are_bits)
    attrs = {
        "pci_class": f"0x{code:06x}",
        "pci_vendor": vendor,
        "pci_device": f"0x{match[3].lower()}",
        **{k: v for k in ("ib", "netdev") if (v := facts.get(k))},
    }
    memory = whole_number(facts.get("memory"))
    reading.devices[bdf] = Device(
        bdf,
        kind,
        vendor=VENDORS.get(vendor, vendor),
        model=facts.get("model") if kind in ("gpu", "npu") else None,
        bdf=bdf,
        uuid=facts.get("uuid"),
        numa_nodes=place.nodes,
        index=whole_number(facts.get("index")),
        memory_bytes=memory * 1024 if memory else None,
        attrs=attrs,
    )
    reading.places.append((obj, bdf, place))
    return bdf


def _facts(obj: Element, *, kinds_are_bits: bool) -> dict[str, str]:
    """What the operating system's devices below a function add to it."""
    found: dict[str, str] = {}
    for child in obj.named("object"):
        name = child.attrs.get("name", "")
        infos = {i.attrs.get("name", ""): i.attrs.get("value", "") for i in child.named("info")}
        network, rdma = _net_kinds(child, kinds_are_bits=kinds_are_bits)
        if "Address" in infos or (network and not rdma):
            found["netdev"] = ",".join(x for x in (found.get("netdev"), name) if x)
        elif "NodeGUID" in infos or "SysImageGUID" in infos or rdma:
            found["ib"] = ",".join(x for x in (found.get("ib"), name) if x)
        match = re.match(r"^(?:nvml|rsmi|cuda)(\d{1,4})$", name)
        if match:
            if not name.startswith("cuda") or "index" not in found:
                found["index"] = match[1]  # the driver's own number beats the process's
            found["model"] = infos.get("GPUModel") or found.get("model", "")
        uuid = infos.get("NVIDIAUUID") or infos.get("AMDUUID")
        if uuid:
            found["uuid"] = uuid
        size = re.match(r"^(\d{1,15})(?:KiB)?$", infos.get("CUDAGlobalMemorySize", ""))
        if size:
            found["memory"] = size[1]
    return {k: v for k, v in found.items() if v}


def _net_kinds(device: Element, *, kinds_are_bits: bool) -> tuple[bool, bool]:
    """Whether it is a network interface and whether it is an RDMA device, by hwloc's number."""
    kind = whole_number(device.attrs.get("osdev_type"), most=1 << 16)
    if kind is None:
        return False, False
    return (bool(kind & 16), bool(kind & 32)) if kinds_are_bits else (kind == 2, kind == 3)


def _speed(obj: Element) -> float | None:
    """Bytes per second and direction; hwloc writes gigabytes, 0 when unknown."""
    value = number(obj.attrs.get("pci_link_speed"))
    return value * 1e9 if value and value < 1e4 else None


def _join(obj: Element, bdf: str, place: _Place, shared: Counter[str], reading: _Reading) -> None:
    if place.root is None:
        reading.warnings.append(f"{bdf} is below no host bridge: its paths are unknown")
        return
    names = [b.attrs.get("pci_busid", "") for b in place.above]
    below, speed = bdf, _speed(obj)
    for i, is_root_port in vertices_above([True] * len(names), shared[names[-1]] if names else 0):
        switch = normal_bdf(names[i])
        if switch is None:
            continue
        attrs = {"role": "root_port" if is_root_port else "switch"}
        reading.devices.setdefault(switch, Device(switch, "pci_switch", bdf=switch, attrs=attrs))
        _link(reading, below, switch, speed)
        below, speed = switch, _speed(place.above[i])
    _link(reading, below, place.root, speed)
    root = reading.devices.setdefault(place.root, Device(place.root, "pci_root"))
    nodes = tuple(sorted({*root.numa_nodes, *place.nodes}))
    reading.devices[place.root] = replace(root, numa_nodes=nodes)
    for node in place.nodes:
        key = (place.root, f"numa:{node}")
        reading.links[key] = Link(*key, "host_bridge", source=reading.source)


def _link(reading: _Reading, a: str, b: str, speed: float | None) -> None:
    link = Link(a, b, "pcie", bandwidth_bytes_per_s=speed, source=reading.source)
    reading.links.setdefault((a, b), link)


def _matrix(
    matrix: Element, reading: _Reading, links: list[Link], domains: list[SwitchDomain]
) -> None:
    """A matrix of NUMA distances, or of bandwidths between GPUs, switches and packages."""
    name = matrix.attrs.get("name", "")
    words = " ".join(c.text for c in matrix.named("indexes")).split()
    texts = " ".join(c.text for c in matrix.named("u64values")).split()
    values = [v for t in texts if (v := whole_number(t, most=(1 << 64) - 1)) is not None]
    size = len(words)
    if size > _MAX_MATRIX or not len(texts) == len(values) == size * size:
        reading.warnings.append(f"matrix {name[:40]!r} does not add up; left out")
        return
    table = [values[i * size : (i + 1) * size] for i in range(size)]
    kind_of = matrix.attrs.get("type", "")
    ends = [w if ":" in w else f"{kind_of}:{w}" for w in words]
    if name == "NUMALatency" and kind_of == "NUMANode":
        _distances(ends, table, reading, matrix.attrs.get("indexing", "os"))
    elif name in _MATRICES:
        found = [reading.objects.get(end) for end in ends]
        known = [name if name in reading.devices else None for name in found]
        _bandwidths(_MATRICES[name], known, table, reading, links, domains)


def _distances(
    ends: Sequence[str], table: Sequence[Sequence[int]], reading: _Reading, indexing: str
) -> None:
    for end, row in zip(ends, table, strict=True):
        name = f"numa:{end.partition(':')[2]}" if indexing == "os" else reading.objects.get(end)
        device = reading.devices.get(name or "")
        if device is not None:
            attrs = {**device.attrs, "distances": ",".join(map(str, row))}
            reading.devices[device.id] = replace(device, attrs=attrs)


def _bandwidths(
    kind: LinkKind,
    ends: Sequence[str | None],
    table: Sequence[Sequence[int]],
    reading: _Reading,
    links: list[Link],
    domains: list[SwitchDomain],
) -> None:
    """Links out of megabytes per second, which are of all lanes together."""
    into_switch: dict[str, float] = {}
    for i, j in combinations(range(len(ends)), 2):
        a, b, speed = ends[i], ends[j], float(max(table[i][j], table[j][i])) * 1e6
        if not speed or a == b:
            continue
        if a is None or b is None:
            reading.warnings.append(f"a {kind} leads to an object that is not known; left out")
            continue
        kinds = {reading.devices[a].kind, reading.devices[b].kind}
        if "fabric_switch" in kinds:
            gpu = b if reading.devices[a].kind == "fabric_switch" else a
            into_switch[gpu] = into_switch.get(gpu, 0.0) + speed
        elif kinds != {"numa"}:
            count = _lanes(kind, [reading.devices[x] for x in (a, b)], speed)
            links.append(Link(a, b, kind, count, speed, source=reading.source))
    if into_switch:
        lanes = {g: _lanes(kind, [reading.devices[g]], s) for g, s in into_switch.items()}
        made, spokes, joined = join_switch(kind, lanes, reading.source, "stated")
        reading.devices.update((d.id, d) for d in made)
        links += [replace(x, bandwidth_bytes_per_s=into_switch[x.a]) for x in spokes]
        domains += joined


def _lanes(kind: LinkKind, devices: Sequence[Device], speed: float) -> int:
    """How many NVLinks make a bandwidth: each generation has its own; 1 when that is unclear."""
    if kind != "nvlink":
        return 1
    ids = [int(d.attrs["pci_device"], 16) for d in devices if d.attrs.get("pci_vendor") == "0x10de"]
    if not ids:
        return 1
    lane = 20e9 if ids[0] < 0x1D00 else 25e9 if ids[0] < 0x2900 else 50e9  # Pascal … Blackwell
    count = round(speed / lane)
    return count if count >= 1 and abs(count * lane - speed) < 0.08 * speed else 1
