"""Files of other programs, with what tools, terminals and people do to them."""

import pytest

from sagellm.comm.topology import TopologyGraph
from sagellm.comm.topology.benchmarks.fake_machine import BRIDGE, GPU, NIC
from sagellm.comm.topology.export import pair_label, to_json, to_matrix, to_nccl_xml
from sagellm.comm.topology.importers import import_topology, read_fragment
from sagellm.comm.topology.merge import merge
from sagellm.comm.topology.placement import ring
from sagellm.core.protocols import (
    ConfigError,
    IntegrityError,
    Pair,
    TopologyFragment,
    TopologyInfo,
)

NV = "\n  NV#  = Connection traversing a bonded set of # NVLinks\n"


def read(text, **kwargs):
    return import_topology(text.encode() if isinstance(text, str) else text, **kwargs)


def cells(info):
    graph = TopologyGraph(info)
    return [[pair_label(graph, a, b) for b in info.accelerators] for a in info.accelerators]


def told(info, words):
    return any(words in w for w in info.warnings)


def test_glued_columns_are_taken_apart():
    info = read(
        "\tGPU0\tGPU1\tNIC0NIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
        "GPU0\t X \tNV4\tNODESYS\t0-3\t0\t\tN/A\n"
        "GPU1\tNV4\t X \tSYSPIX\t4-7\t1\t\tN/A\n" + NV
    )
    graph = TopologyGraph(info)

    assert graph.path("nvidia:0", "ib:NIC0").kind == "NODE"
    assert graph.path("nvidia:1", "ib:NIC1").kind == "PIX"
    assert [d.numa_nodes for d in info.accelerators] == [(0,), (1,)]


def test_blank_affinity_cells_stay_blank_in_columns_of_spaces():
    info = read(
        "        GPU0    GPU1    CPU Affinity    NUMA Affinity   GPU NUMA ID\n"
        "GPU0     X      NV12                    1               N/A\n"
        "GPU1    NV12     X                                      2\n" + NV
    )

    assert [(d.cpulist, d.numa_nodes) for d in info.accelerators] == [(None, (1,)), (None, ())]
    assert info.accelerators[1].attrs["memory_numa"] == "2"
    assert info.warnings == ()


def test_blank_cells_are_found_where_the_header_lost_its_indent():
    info = read(
        "GPU0    GPU1    CPU Affinity    NUMA Affinity   GPU NUMA ID\n"
        "GPU0     X      NV12                    1               N/A\n"
        "GPU1    NV12     X      0-7                             N/A\n" + NV
    )

    assert [(d.cpulist, d.numa_nodes) for d in info.accelerators] == [(None, (1,)), ("0-7", ())]


def test_blank_tab_cells_stay_blank():
    info = read(
        "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
        "GPU0\t X \tPHB\t\tN/A\t\tN/A\n"
        "GPU1\tPHB\t X \t\t0-1\t\tN/A\n" + NV
    )

    assert [(d.cpulist, d.numa_nodes) for d in info.accelerators] == [(None, ()), (None, (0, 1))]


def test_numa_lists_keep_all_nodes_and_memory_nodes_apart():
    info = read(
        "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
        "GPU0\t X \tNV18\t0-71\t0,3-9,11-17\t\t2\n"
        "GPU1\tNV18\t X \t72-143\t1,18-25\t\t10\n" + NV
    )

    assert info.accelerators[0].numa_nodes == (0, *range(3, 10), *range(11, 18))
    assert [d.attrs["memory_numa"] for d in info.accelerators] == ["2", "10"]


def test_colours_line_ends_and_byte_order_marks_are_nothing():
    plain = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV2\t0-3\nGPU1\tNV2\t X \t0-3\n" + NV
    dressed = "\ufeff" + plain.replace("GPU0\t", "\x1b[4mGPU0\x1b[0m\t").replace("\n", "\r\n")

    assert read(dressed).fingerprint == read(plain).fingerprint
    assert read(plain.encode("utf-16")).fingerprint == read(plain).fingerprint


def test_cut_rows_keep_what_is_there():
    info = read("\tGPU0\tGPU1\tGPU2\nGPU0\t X \tNV2\tSYS\nGPU1\tNV2\t X \nGPU2\t" + NV)

    assert cells(info) == [["X", "NV2", "SYS"], ["NV2", "X", "?"], ["SYS", "?", "X"]]
    assert told(info, "row GPU1 is cut")
    assert told(info, "no row for GPU2")


def test_rows_that_disagree_are_a_warning_and_the_upper_one_is_believed():
    info = read("\tGPU0\tGPU1\nGPU0\t X \tNV2\nGPU1\tSYS\t X \n" + NV)

    assert cells(info)[1][0] == "NV2"
    assert told(info, "NV2 in one row, SYS in the other")


def test_words_nobody_knows_are_a_warning_not_a_class():
    info = read(
        "\tGPU0\tGPU1\tGPU2\nGPU0\t X \tQQQ\tHSW\nGPU1\tQQQ\t X \tSYS\nGPU2\tHSW\tSYS\t X \n"
    )

    assert cells(info)[0] == ["X", "?", "?"]
    assert told(info, "QQQ")
    assert told(info, "HSW")


def test_nothing_is_assumed_of_nics_without_a_legend():
    info = read("\tGPU0\tNIC0\nGPU0\t X \tPIX\nNIC0\tPIX\t X \n")

    assert [d.id for d in info.devices if d.kind == "nic"] == ["ib:NIC0"]


def test_full_meshes_that_wires_can_make_are_no_switch():
    def mesh(n, lanes):
        head = "\t" + "\t".join(f"GPU{i}" for i in range(n))
        rows = [
            f"GPU{i}\t" + "\t".join(" X " if i == j else f"NV{lanes}" for j in range(n))
            for i in range(n)
        ]
        return read("\n".join([head, *rows]) + NV)

    assert mesh(4, 6).domains == ()
    assert mesh(2, 18).domains == ()
    assert mesh(8, 1).domains == ()
    (domain,) = mesh(4, 12).domains
    assert (domain.confidence, len(domain.members)) == ("inferred", 4)
    assert cells(mesh(8, 18))[0][1:] == ["NV18"] * 7


def test_ascend_switch_and_pairs_are_kept_apart():
    names = [f"Phy-ID{i}" for i in range(4)]
    cell = [["X", "SIO", "HCCS_SW", "HCCS_SW"], ["SIO", "X", "HCCS_SW", "HCCS_SW"],
            ["HCCS_SW", "HCCS_SW", "X", "SIO"], ["HCCS_SW", "HCCS_SW", "SIO", "X"]]  # fmt: skip
    head = "\t   " + "   ".join(names) + "   CPU Affinity"
    rows = ["  ".join([n, *c, "0-23"]) for n, c in zip(names, cell, strict=True)]
    info = read("\n".join([head, *rows]))

    assert cells(info) == cell
    assert {d.vendor for d in info.accelerators} == {"huawei"}
    assert [(d.kind, len(d.members)) for d in info.domains] == [("hccs", 4)]


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        (" XPU0 NIC0\nXPU0 X PIX\nNIC Legend:\nNIC0: mlx5_7\n", "kunlunxin"),
        ("\tGPU0\tGPU1\nGPU0\tX\tMT2\nGPU1\tMT2\tX\n", "mthreads"),
        ("\tMLU0\tMLU1\nMLU0\tX\tMLK4\nMLU1\tMLK4\tX\n", "cambricon"),
        ("ixsmi topo -m\n\tGPU0\tGPU1\nGPU0\tX\tPIX\nGPU1\tPIX\tX\n", "iluvatar"),
    ],
)
def test_cousins_of_the_matrix_are_told_apart(text, vendor):
    assert {d.vendor for d in read(text).accelerators} == {vendor}


def test_a_maker_can_be_given_where_no_word_names_it():
    text = "\tGPU0\tGPU1\nGPU0\tX\tPIX\nGPU1\tPIX\tX\n"

    assert read(text, vendor="iluvatar").accelerators[0].vendor == "iluvatar"
    assert told(read(text), "no word names the maker")


def test_peer_access_and_class_are_both_kept():
    text = (
        "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tPHB\t0-7\nGPU1\tPHB\t X \t0-7\n" + NV
        + "\n \tGPU0\tGPU1\t\n GPU0\tX\tGNS\t\n GPU1\tGNS\tX\t\n"
    )  # fmt: skip

    (pair,) = read(text).pairs

    assert (pair.path, dict(pair.peer)) == ("PHB", {"read": "GNS"})


def test_list_of_gpus_with_partitions_joins_a_matrix_by_index():
    listed = read_fragment(
        b"GPU 0: NVIDIA A100 (UUID: GPU-aaaa)\n  MIG 1g.5gb Device 0: (UUID: MIG-bbbb)\n"
        b"GPU 1: NVIDIA A100 (UUID: GPU-cccc)\n"
    )
    matrix = read_fragment(b"\tGPU0\tGPU1\nGPU0\t X \tNV12\nGPU1\tNV12\t X \n")

    info = merge([(100, listed), (40, matrix)])

    assert [d.id for d in info.accelerators] == ["GPU-aaaa", "GPU-cccc"]
    assert info.accelerators[0].attrs["mig"] == "MIG-bbbb"
    assert cells(info)[0][1] == "NV12"


def test_verbose_lspci_adds_numa_and_link():
    info = read(
        "17:00.0 3D controller [0302]: NVIDIA Corporation GH100 [H100 SXM5] [10de:2330] (rev a1)\n"
        "\tNUMA node: 1\n\tLnkCap:\tPort #0, Speed 32GT/s, Width x16, ASPM\n"
        "\tKernel driver in use: nvidia\n"
        "18:00.0 Non-Volatile memory controller [0108]: Maker Disk [1414:b111]\n\tNUMA node: 0\n"
    )
    (gpu,) = info.accelerators

    assert (gpu.id, gpu.model, gpu.numa_nodes) == ("0000:17:00.0", "H100 SXM5", (1,))
    assert (gpu.attrs["max_link_speed"], gpu.attrs["driver"]) == ("32GT/s", "nvidia")


def test_lspci_without_ids_says_how_to_get_them():
    info = read("17:00.0 3D controller [0302]: NVIDIA Corporation GH100 (rev a1)\n")

    assert told(info, "lspci -nn")


@pytest.mark.parametrize("size", [1 << 20, 3 << 20])
def test_endless_lines_are_bounded(size):
    info = read("\tGPU0\tGPU1\nGPU0\t X \tNV2" + "\tNV2" * (size // 4) + "\nGPU1\tNV2\t X\n")

    assert cells(info) == [["X", "NV2"], ["NV2", "X"]]
    assert told(info, "cut after")


def test_endless_header_is_bounded():
    with pytest.raises(IntegrityError):
        read("\t" + "GPU0GPU0" * (1 << 18))


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
    '<system version="1"><cpu numaid="&b;"/></system>'
)
OUTSIDE = '<!DOCTYPE system [<!ENTITY x SYSTEM "file:///etc/hostname">]><system>&x;</system>'
UNDECLARED = '<!DOCTYPE system SYSTEM "x.dtd"><system><cpu numaid="0">&secret;</cpu></system>'


NO_CODE = '<?xml version="1.0" encoding="UTF-99"?><system version="1"/>'


@pytest.mark.parametrize(
    "text", [BOMB, OUTSIDE, UNDECLARED, NO_CODE, "<system>" * 300, "<a/>", "<"]
)
def test_hostile_xml_is_refused(text):
    with pytest.raises(IntegrityError):
        read(text)


def test_xml_of_too_many_elements_is_refused():
    with pytest.raises(IntegrityError, match="elements"):
        read("<system>" + "<cpu/>" * 200_001 + "</system>")


def test_a_document_type_that_names_a_file_is_passed_over_unread():
    info = read('<!DOCTYPE topology SYSTEM "/etc/passwd"><topology version="3.0"></topology>')

    assert info.devices == ()


def test_xml_that_ends_early_is_read_up_to_there(hgx):
    text = to_nccl_xml(hgx.detect())

    info = read(text[: text.index("</cpu>") - 20])

    assert info.num_devices >= 4
    assert told(info, "broken")


def test_a_file_of_rings_is_refused_with_the_next_step():
    with pytest.raises(IntegrityError, match="NCCL_TOPO_DUMP_FILE"):
        read('<graphs version="1"><graph id="0"/></graphs>')


@pytest.mark.parametrize("data", [b"", b"\x00\xff" * 50, b"nothing of use\n", b"[1, 2]", b"{"])
def test_what_is_no_topology_is_refused(data):
    with pytest.raises(IntegrityError):
        import_topology(data)


def test_unknown_format_names_the_known_ones():
    with pytest.raises(ConfigError, match="nccl-xml"):
        import_topology(b"", form="visio")


def test_link_of_a_gpu_to_itself_and_to_nowhere_is_left_out():
    info = read(
        '<system version="1"><cpu numaid="0"><pci busid="0001:00:00.0" class="0x030200" '
        'link_speed="" link_width="0"><gpu dev="0" sm="80"><nvlink target="0001:00:00.0" '
        'count="12" tclass="0x030200"/><nvlink target="0009:00:00.0" count="2" '
        'tclass="0x030200"/></gpu></pci></cpu></system>'
    )

    assert not [x for x in info.links if x.kind == "nvlink"]
    assert told(info, "itself")
    assert told(info, "0009:00:00.0")


def test_links_to_the_processor_and_coherent_ones_are_in_the_graph():
    info = read(
        '<system version="1"><cpu numaid="0" affinity="ff"><pci busid="0001:00:00.0" '
        'class="0x030200"><gpu dev="0"><nvlink target="0000:00:00.0" count="3" '
        'tclass="0x068001"/><c2c bw="45000" count="10"/></gpu></pci></cpu></system>'
    )

    found = {x.kind: (x.a, x.b, x.count, x.bandwidth_bytes_per_s) for x in info.links}
    assert found["nvlink"] == ("0001:00:00.0", "numa:0", 3, None)
    assert found["c2c"] == ("0001:00:00.0", "numa:0", 10, 450e9)


def test_json_is_read_as_a_fragment_too(hgx):
    info = hgx.detect()

    again = import_topology(to_json(info).encode())

    assert again.fingerprint == info.fingerprint
    assert again.devices == tuple(d for d in info.devices)


def flat_vm(machine):
    """A virtual machine: every function on the root bus, no NUMA nodes told."""
    machine.numa(0, "0-3", (10, 21))
    machine.numa(1, "4-7", (21, 10))
    for i in range(4):
        machine.pci(f"0000:00:1{i}.0", "pci0000:00", GPU, vendor=0x10DE, numa=-1)
        machine.pci(f"0000:00:0{i + 4}.0", "pci0000:00", NIC, vendor=0x1D0F, numa=-1)
    return machine


SKELETON = """<system version="1">
<cpu numaid="0" affinity="0000000f"><pci busid="ffff:ff:01.0" class="0x060400">
<pci busid="0000:00:10.0" class="0x030200"/><pci busid="0000:00:11.0" class="0x030200"/>
<pci busid="0000:00:04.0" class="0x020000"/></pci></cpu>
<cpu numaid="1" affinity="000000f0"><pci busid="ffff:ff:02.0">
<pci busid="0000:00:12.0"/><pci busid="0000:00:13.0"/><pci busid="0000:00:05.0"/></pci></cpu>
</system>"""


def test_skeleton_places_live_devices_and_hides_none(machine, look):
    live = look(flat_vm(machine)).detect()
    fragment = read_fragment(to_json(live).encode(), source="live")

    info = merge([(100, read_fragment(SKELETON.encode())), (60, fragment)])

    graph = TopologyGraph(info)
    assert info.num_devices == 4
    assert {d.vendor for d in info.accelerators} == {"nvidia"}
    assert graph.path("0000:00:10.0", "0000:00:04.0").kind == "PIX"
    assert graph.path("0000:00:12.0", "0000:00:05.0").kind == "PIX"
    assert graph.path("0000:00:10.0", "0000:00:12.0").kind == "SYS"
    assert sum(d.kind == "nic" for d in info.devices) == 4
    assert graph.path("0000:00:06.0", "0000:00:07.0").kind == "PHB"  # not in the skeleton


def test_skeleton_export_has_no_elements_that_belong_to_the_live_machine(hgx):
    text = to_nccl_xml(hgx.detect(), skeleton=True)

    assert "<gpu" not in text
    assert "<net" not in text
    assert 'affinity="00ffffff,ffffffff"' in text
    assert read(text).num_devices == 8


def test_nccl_file_of_several_hosts_is_refused():
    with pytest.raises(ConfigError, match="2"):
        to_nccl_xml(TopologyInfo(num_nodes=2))


def test_links_of_a_live_tree_contradict_a_stated_class(machine, look):
    machine.pci("0000:00:01.0", "pci0000:00", BRIDGE)
    machine.switch("0000:01:00.0", "0000:00:01.0", ["0000:02:00.0", "0000:02:01.0"])
    machine.pci("0000:03:00.0", "0000:02:00.0", GPU, vendor=0x10DE)
    machine.pci("0000:04:00.0", "0000:02:01.0", GPU, vendor=0x10DE)
    live = read_fragment(to_json(look(machine).detect()).encode(), source="live")
    stated = TopologyFragment(
        "nvidia-smi", pairs=(Pair("0000:03:00.0", "0000:04:00.0", "SYS", source="nvidia-smi"),)
    )

    info = merge([(60, live), (40, stated)])

    assert told(info, "SYS by nvidia-smi")
    assert TopologyGraph(info).path("0000:03:00.0", "0000:04:00.0").kind == "PIX"


def test_matrix_of_an_import_reads_like_the_input():
    text = (
        "\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\n"
        "GPU0\t X \tNV2\tPHB\t0-3\t0\nGPU1\tNV2\t X \tSYS\t4-7\t1\nNIC0\tPHB\tSYS\t X \n\n"
        "NIC Legend:\n\n  NIC0: mlx5_0\n"
    )

    lines = to_matrix(read(text)).splitlines()

    assert lines[1] == "GPU0\tX\tNV2\tPHB\t0-3\t0"
    assert "  NIC0: mlx5_0" in lines


def test_sections_without_brackets_or_equals_are_read():
    info = read(
        "------------ Link Type between two GPUs ------------\n"
        "GPU0 GPU1\nGPU0 0 PCIE\nGPU1 PCIE 0\n"
        "GPU 0          : (Topology) Numa Node: 1\nGPU 1          : (Topology) Numa Node: -1\n"
        "GPU 1          : (Topology) Numa Affinity: 0\n"
    )

    assert cells(info) == [["X", "PCIE"], ["PCIE", "X"]]
    assert [d.numa_nodes for d in info.accelerators] == [(1,), (0,)]
    assert {d.vendor for d in info.accelerators} == {"amd"}


def test_a_table_inside_a_long_report_is_found():
    info = read(
        "GPU 0: NVIDIA H100\nCUDA available: True\nGPU Topology:\n\x1b[4m"
        "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
        "GPU0\t X \tSYS\t0-7\t\tN/A\t\tN/A\n"
        "a line that a log put between\n"
        "GPU1\tSYS\t X \t8-15\t\t1\t\tN/A\n" + NV + "ulimit soft: 1024\n"
    )

    assert cells(info)[0] == ["X", "SYS"]
    assert [(d.cpulist, d.numa_nodes) for d in info.accelerators] == [("0-7", ()), ("8-15", (1,))]


def test_node_follows_from_cpus_where_the_machine_shows_whose_they_are(machine, look):
    for node in range(4):
        machine.numa(node, f"{node * 24}-{node * 24 + 23}", (10, 20, 20, 20))
    live = read_fragment(to_json(look(machine).detect()).encode(), source="live")
    printed = read_fragment(
        b"   NPU0  NPU1  CPU Affinity\nNPU0  X  HCCS  72-95\nNPU1  HCCS  X  0-47\n"
    )

    info = merge([(60, live), (40, printed)])

    assert [d.numa_nodes for d in info.accelerators] == [(3,), ()]


def test_rings_of_an_imported_square_avoid_its_missing_diagonals():
    square = read(
        "\tGPU0\tGPU1\tGPU2\tGPU3\nGPU0\t X \tNV2\tNV2\tSYS\nGPU1\tNV2\t X \tSYS\tNV1\n"
        "GPU2\tNV2\tSYS\t X \tNV2\nGPU3\tSYS\tNV1\tNV2\t X \n"
    )
    members = [d.id for d in square.accelerators]

    order = [members.index(m) for m in ring(TopologyGraph(square), members)]

    assert order in ([0, 1, 3, 2], [0, 2, 3, 1])


def test_a_port_faster_than_any_has_no_rate():
    text = """<system version="1"><cpu numaid="0"><pci busid="0000:01:00.0" class="0x020000">
    <nic><net name="cxi0" dev="0" speed="200000000"/></nic></pci></cpu></system>"""

    info = import_topology(text.encode())

    nic = next(d for d in info.devices if d.kind == "nic")
    assert "port_bytes_per_s" not in nic.attrs
    assert any("200000000 Mb/s of cxi0" in w for w in info.warnings)
