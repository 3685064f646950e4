"""Prints drawn machines as the tools would, to read them back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from xml.sax.saxutils import quoteattr

PATHS = ("PIX", "PXB", "PHB", "NODE", "SYS")
LEGEND = "\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe and NUMA nodes\n"


@dataclass
class Drawn:
    """A machine as a matrix: labels, symmetric cells, and what stands after them."""

    cells: dict[tuple[int, int], str]
    cpus: list[str]
    numa: list[str]
    nics: list[str] = field(default_factory=list)

    @property
    def gpus(self) -> int:
        return len(self.cpus)

    @property
    def size(self) -> int:
        return self.gpus + len(self.nics)

    def cell(self, a: int, b: int) -> str:
        return "X" if a == b else self.cells[min(a, b), max(a, b)]

    def matrix(self, count: int) -> list[list[str]]:
        return [[self.cell(a, b) for b in range(count)] for a in range(count)]


def print_nvidia(m: Drawn, *, legend: bool = True, indent: str = "\t", own: bool = True) -> str:
    """`nvidia-smi topo -m` with tabs, two of them before its last column."""
    labels = [f"GPU{i}" for i in range(m.gpus)] + [f"NIC{i}" for i in range(len(m.nics))]
    titles = ["CPU Affinity", "NUMA Affinity", *(["GPU NUMA ID"] if own else [])]
    lines = [indent + "\t".join([*labels, *titles])]
    for i, label in enumerate(labels):
        cells = [f" {c} " if c == "X" else c for c in (m.cell(i, j) for j in range(m.size))]
        if i < m.gpus:
            cells += [m.cpus[i], m.numa[i], *(["", "N/A"] if own else [])]
        elif own:
            cells += [""] * 4
        lines.append("\t".join([label, *cells]))
    text = "\n".join(lines) + "\n"
    if legend:
        text += LEGEND + "  NV#  = Connection traversing a bonded set of # NVLinks\n"
        if m.nics:
            text += "\nNIC Legend:\n\n"
            text += "".join(f"  NIC{i}: {name}\n" for i, name in enumerate(m.nics))
    return text


def print_columns(
    m: Drawn, *, label: str = "GPU", titles: tuple[str, ...] = ("CPU Affinity", "NUMA Affinity")
) -> str:
    """A matrix with columns of spaces, as people paste it and as npu-smi and mx-smi print it."""
    names = [f"{label}{i}" for i in range(m.gpus)] + [f"NIC{i}" for i in range(len(m.nics))]
    width = max(len(n) for n in names) + 4
    lines = [" " * width + "".join(f"{n:<{width}}" for n in names)]
    lines[0] += "".join(f"{t:<20}" for t in titles)
    for i, name in enumerate(names):
        line = f"{name:<{width}}" + "".join(f"{m.cell(i, j):<{width}}" for j in range(m.size))
        if i < m.gpus:
            facts = {"CPU Affinity": m.cpus[i], "NUMA Affinity": m.numa[i],
                     "Node Affinity": m.numa[i]}  # fmt: skip
            line += "".join(f"{facts[t]:<20}" for t in titles)
        lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


def print_npu(m: Drawn, label: str = "NPU") -> str:
    """`npu-smi info -t topo`."""
    table = print_columns(m, label=label, titles=("CPU Affinity",))
    return table + LEGEND + "  HCCS = Connection traversing HCCS.\n  NA   = Unknown relationship.\n"


def print_metax(m: Drawn) -> str:
    """`mx-smi topo -m`, which puts the node before the CPUs."""
    head = "=== MetaX System Management Interface Log ===\nDevice link type matrix\n"
    table = print_columns(m, titles=("Node Affinity", "CPU Affinity"))
    return head + table + LEGEND + "  MX   = Connection traversing MetaXLink\n"


def print_rocm(m: Drawn, name: str = "GPU") -> str:
    """`rocm-smi --showtopo`."""
    names = [f"{name}{i}" for i in range(m.gpus)]

    def table(title: str, cell: Callable[[int, int], object]) -> list[str]:
        rows = [f"{n:<7}" + "".join(f"{cell(i, j):<13}" for j in range(m.gpus)).rstrip()
                for i, n in enumerate(names)]  # fmt: skip
        return [f"{title:=^90}", " " * 7 + "".join(f"{n:<13}" for n in names), *rows, ""]

    lines = [f"{' ROCm System Management Interface ':=^90}", "WARNING: low-power state", ""]
    lines += table(" Weight between two GPUs ", lambda i, j: 0 if i == j else 15)
    lines += table(" Hops between two GPUs ", lambda i, j: 0 if i == j else 1)
    lines += table(" Link Type between two GPUs ", lambda i, j: 0 if i == j else m.cell(i, j))
    lines.append(f"{' Numa Nodes ':=^90}")
    for i, node in enumerate(m.numa):
        lines.append(f"{name}[{i}]\t\t: (Topology) Numa Node: {node}")
        lines.append(f"{name}[{i}]\t\t: (Topology) Numa Affinity: {node}")
    return "\n".join([*lines, f"{' End of ROCm SMI Log ':=^90}"]) + "\n"


def print_p2p(m: Drawn) -> str:
    """`nvidia-smi topo -p2p r`."""
    lines = [" \t" + "".join(f"GPU{i}\t" for i in range(m.gpus))]
    for i in range(m.gpus):
        lines.append(f" GPU{i}\t" + "".join(f"{m.cell(i, j)}\t" for j in range(m.gpus)))
    return "\n".join(lines) + "\n\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n"


def print_list(gpus: list[tuple[str, str, list[tuple[str, str]]]]) -> str:
    """`nvidia-smi -L` of (model, UUID, [(profile, UUID)])."""
    lines = []
    for i, (model, uuid, parts) in enumerate(gpus):
        lines.append(f"GPU {i}: {model} (UUID: {uuid})")
        lines += [f"  MIG {p:<11} Device {j:>2}: (UUID: {u})" for j, (p, u) in enumerate(parts)]
    return "\n".join(lines) + "\n"


def print_lspci(functions: list[tuple[str, int, str, int, int]], *, domains: bool = True) -> str:
    """`lspci -nn` of (address, class, name, vendor, device)."""
    return "".join(
        f"{bdf if domains else bdf.removeprefix('0000:')} Thing [{code:04x}]: {name} "
        f"[{vendor:04x}:{device:04x}] (rev a1)\n"
        for bdf, code, name, vendor, device in functions
    )


@dataclass
class Bridge:
    """A PCI bridge, host bridge or function of a drawn hwloc tree."""

    bdf: str
    children: list[Bridge] = field(default_factory=list)
    code: int = 0x0604
    vendor: int = 0x1000
    device: int = 1
    speed: float = 0.0
    gp: int = 0
    name: str = ""
    model: str = ""


def print_hwloc(
    packages: list[tuple[int, str, list[list[Bridge]]]], matrix: dict[tuple[int, int], int]
) -> str:
    """`lstopo x.xml` of packages (NUMA node, mask of CPUs, host bridges), and NVLink MB/s."""
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', '<!DOCTYPE topology SYSTEM "hwloc2.dtd">',
             '<topology version="3.0">', '<object type="Machine" os_index="0">']  # fmt: skip

    def write(b: Bridge) -> None:
        bridge = b.code == 0x0604
        kind = 'type="Bridge" bridge_type="1-1"' if bridge else 'type="PCIDev"'
        lines.append(
            f'<object {kind} gp_index="{b.gp}" pci_busid="{b.bdf}" '
            f'pci_type="{b.code:04x} [{b.vendor:04x}:{b.device:04x}] [0000:0000] 00 00" '
            f'pci_link_speed="{b.speed:.6f}">'
        )
        if b.name:
            lines.append(f'<object type="OSDev" gp_index="{b.gp + 5000}" name="{b.name}">')
            lines.append(f'<info name="GPUModel" value={quoteattr(b.model)}/>')
            if not b.name.startswith("nvml"):
                lines.append('<info name="Address" value="00:00:00:00:00:01"/>')
            lines.append("</object>")
        for child in b.children:
            write(child)
        lines.append("</object>")

    for node, mask, roots in packages:
        nodeset = f"0x{1 << node:08x}"
        lines.append(f'<object type="Package" os_index="{node}" nodeset="{nodeset}">')
        lines.append(f'<object type="NUMANode" os_index="{node}" cpuset="{mask}" '
                     f'nodeset="{nodeset}" local_memory="1073741824"/>')  # fmt: skip
        for number, below in enumerate(roots):
            lines.append(f'<object type="Bridge" bridge_type="0-1" '
                         f'bridge_pci="{node:04x}:[{number:02x}-ff]">')  # fmt: skip
            for b in below:
                write(b)
            lines.append("</object>")
        lines.append("</object>")
    lines.append("</object>")
    ends = sorted({end for pair in matrix for end in pair})
    if ends:
        values = [1000000 if a == b else matrix.get((min(a, b), max(a, b)), 0)
                  for a in ends for b in ends]  # fmt: skip
        lines.append(f'<distances2hetero nbobjs="{len(ends)}" kind="25" name="NVLinkBandwidth">')
        lines.append("<indexes>" + " ".join(f"OSDev:{e + 5000}" for e in ends) + " </indexes>")
        lines.append("<u64values>" + " ".join(map(str, values)) + " </u64values>")
        lines.append("</distances2hetero>")
    return "\n".join([*lines, "</topology>"]) + "\n"
