"""Tables as tools of other makers and other years print them: one content in every layout."""

import pytest

from sagellm.comm.topology.export import pair_label
from sagellm.comm.topology.graph import TopologyGraph
from sagellm.comm.topology.importers import import_topology, read_fragment

PLAIN = (
    "\tGPU0\tGPU1\tmlx5_0\tCPU Affinity\tNUMA Affinity\n"
    "GPU0\tX\tNV4\tPIX\t0-15\t0\nGPU1\tNV4\tX\tSYS\t16-31\t1\nmlx5_0\tPIX\tSYS\tX\n"
)
NICS_FIRST = (
    "\tmlx5_0\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\n"
    "mlx5_0\tX\tPIX\tSYS\nGPU0\tPIX\tX\tNV4\t0-15\t0\nGPU1\tSYS\tNV4\tX\t16-31\t1\n"
)
TITLES_FIRST = (
    "\tCPU Affinity\tNUMA Affinity\tGPU0\tGPU1\tmlx5_0\n"
    "GPU0\t0-15\t0\tX\tNV4\tPIX\nGPU1\t16-31\t1\tNV4\tX\tSYS\nmlx5_0\t\t\tPIX\tSYS\tX\n"
)
BARS = "\n".join(
    ["+---", *("| " + " | ".join(line.split("\t")) + " |" for line in PLAIN.splitlines()), "+---"]
)
LAYOUTS = {
    "plain": PLAIN,
    "NICs before GPUs": NICS_FIRST,
    "titles before devices": TITLES_FIRST,
    "titles before devices, in columns of spaces": TITLES_FIRST.replace("\t\t\t", "\t")
    .replace("\nmlx5_0\tPIX\tSYS\tX\n", "\n")
    .expandtabs(16),
    "bars": BARS,
    "NIC without a digit": PLAIN.replace("mlx5_0", "mlxbond"),
    "NIC with its port": PLAIN.replace("mlx5_0", "mlx5_0:1"),
    "double tabs": PLAIN.replace("\t", "\t\t"),
    "a blank in the lists": PLAIN.replace("0-15", "0-7, 8-15").replace("16-31", "16-23, 24-31"),
    "a title nobody knows": PLAIN.replace("NUMA Affinity\n", "NUMA Affinity\t亲和性 GPU\n"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same(layout):
    info = import_topology((LAYOUTS[layout] + "\nNV# = NVLink\n").encode())
    graph = TopologyGraph(info)
    gpus = info.accelerators
    (nic,) = [d for d in info.devices if d.kind == "nic"]

    assert [d.index for d in gpus] == [0, 1]
    assert [d.numa_nodes for d in gpus] == [(0,), (1,)]
    assert [d.cpulist.split(",")[-1].split("-")[-1] for d in gpus] == ["15", "31"]
    assert [d.cpulist.split("-")[0] for d in gpus] == ["0", "16"]
    assert pair_label(graph, *gpus) == "NV4"
    assert [pair_label(graph, d, nic) for d in gpus] == ["PIX", "SYS"]


def test_a_translated_title_costs_its_column_alone():
    text = PLAIN.replace("CPU Affinity\tNUMA Affinity", "CPU 亲和性\tNUMA 亲和性")

    info = import_topology((text + "\nNV# = NVLink\n").encode())

    assert pair_label(TopologyGraph(info), *info.accelerators) == "NV4"
    assert [d.numa_nodes for d in info.accelerators] == [(), ()]


@pytest.mark.parametrize(
    ("model", "switches"), [("Tesla V100-SXM3-32GB", 1), ("NVIDIA H100 80GB HBM3", 0), ("", 0)]
)
def test_the_model_tells_how_many_links_wires_can_be(model, switches):
    rows = [f"GPU{i}\t" + "\t".join("X" if i == j else "NV6" for j in range(4)) for i in range(4)]
    listed = [f"GPU {i}: {model} (UUID: GPU-{i})" for i in range(4) if model]
    text = "\n".join([*listed, "\t" + "\t".join(f"GPU{i}" for i in range(4)), *rows])

    info = import_topology(text.encode())

    assert len(info.domains) == switches


def test_a_file_of_several_hosts_is_a_job():
    cpu = (
        '<cpu host_hash="{}" numaid="0"><pci busid="0000:01:00.0" class="0x030200">'
        '<gpu dev="0"/></pci></cpu>'
    )
    text = f'<system version="1">{cpu.format("0x1")}{cpu.format("0x2")}</system>'

    info = import_topology(text.encode())

    assert info.num_nodes == 2
    assert [d.id for d in info.accelerators] == ["n0/0000:01:00.0", "n1/0000:01:00.0"]
    assert "only the first" in read_fragment(text.encode()).warnings[0]
