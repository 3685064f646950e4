"""For each text format: a random machine, printed and read, is the same machine."""

import random

import pytest
from hypothesis import given, settings, strategies as st
from printers import (
    PATHS,
    Bridge,
    Drawn,
    print_columns,
    print_hwloc,
    print_list,
    print_lspci,
    print_metax,
    print_npu,
    print_nvidia,
    print_p2p,
    print_rocm,
)

from sagellm.comm.topology import TopologyGraph
from sagellm.comm.topology.export import pair_label, to_matrix, to_nccl_xml
from sagellm.comm.topology.importers import import_topology
from sagellm.comm.topology.merge import merge
from sagellm.core.protocols import Device, IntegrityError, Link, TopologyFragment

NVLINKS = tuple(f"NV{n}" for n in (1, 2, 4, 12, 18))
once = settings(deadline=None, max_examples=40)


@st.composite
def drawn(draw, classes, *, nics=True, lone=True):
    gpus = draw(st.integers(1 if lone else 2, 6))
    names = [f"mlx5_{i}" for i in range(draw(st.integers(0, 4 if nics else 0)))]
    size = gpus + len(names)
    cells = {
        (a, b): draw(st.sampled_from(classes if b < gpus else PATHS))
        for a in range(size)
        for b in range(a + 1, size)
    }
    cpus, numa = [], []
    for _ in range(gpus):
        node = draw(st.integers(0, 7))
        cpus.append(f"{node * 8}-{node * 8 + 3},{node * 8 + 64}-{node * 8 + 67}")
        numa.append(str(node))
    return Drawn(cells, cpus, numa, names)


def matrix_of(info):
    graph = TopologyGraph(info)
    shown = [*info.accelerators, *(d for d in info.devices if d.kind == "nic")]
    shown.sort(key=lambda d: (d.kind == "nic", int(d.id.rpartition("_")[2]) if d.kind == "nic" else d.index))  # fmt: skip  # noqa: E501
    return [[pair_label(graph, a, b) for b in shown] for a in shown]


def assert_same(machine, info, *, cpus=True, numa=True):
    assert info.warnings == ()
    assert matrix_of(info) == machine.matrix(machine.size)
    gpus = info.accelerators
    assert [g.cpulist for g in gpus] == (machine.cpus if cpus else [None] * machine.gpus)
    assert [g.numa_nodes for g in gpus] == [(int(n),) if numa else () for n in machine.numa]
    assert sorted(d.attrs["ib"] for d in info.devices if d.kind == "nic") == sorted(machine.nics)


@once
@given(drawn(PATHS + NVLINKS), st.booleans(), st.sampled_from(["\t", "", "        "]))
def test_nvidia_matrix_is_the_identity(machine, own, indent):
    text = print_nvidia(machine, own=own, indent=indent)

    assert_same(machine, import_topology(text.encode()))


@once
@given(drawn(PATHS + NVLINKS, nics=False))
def test_pasted_matrix_is_the_identity(machine):
    text = print_columns(machine) + "\n  NV#  = NVLinks\n"

    assert_same(machine, import_topology(text.encode()))


@once
@given(drawn(PATHS + NVLINKS))
def test_our_own_matrix_is_the_identity(machine):
    first = import_topology(print_nvidia(machine).encode())

    again = import_topology(to_matrix(first).encode())

    assert to_matrix(again) == to_matrix(first)
    assert again.fingerprint == first.fingerprint


@once
@given(drawn((*PATHS, "HCCS", "SIO"), nics=False), st.sampled_from(["NPU", "Phy-ID"]))
def test_ascend_matrix_is_the_identity(machine, label):
    info = import_topology(print_npu(machine, label).encode())

    assert {d.vendor for d in info.accelerators} == {"huawei"}
    assert_same(machine, info, numa=False)


@once
@given(drawn((*PATHS, "MX"), nics=False))
def test_metax_matrix_is_the_identity(machine):
    info = import_topology(print_metax(machine).encode())

    assert {d.vendor for d in info.accelerators} == {"metax"}
    assert_same(machine, info)


COUSINS = {
    "mthreads": ("GPU", ("MT1", "MT2", "MT6"), "\nMTLink\n"),
    "iluvatar": ("GPU", (), "\nixsmi\n"),
    "cambricon": ("MLU", ("MLK2", "MLK4"), "\ncnmon\n"),
    "kunlunxin": ("XPU", ("XL1", "XL4"), "\nxpu-smi\n"),
}


@pytest.mark.parametrize("vendor", COUSINS)
@once
@given(st.data())
def test_matrices_of_cousins_are_the_identity(vendor, data):
    label, fabric, sign = COUSINS[vendor]
    machine = data.draw(drawn(PATHS + fabric, nics=False))

    info = import_topology((print_columns(machine, label=label) + sign).encode())

    assert {d.vendor for d in info.accelerators} == {vendor}
    assert_same(machine, info)


@once
@given(drawn(("XGMI", "PCIE"), nics=False), st.sampled_from([("GPU", "amd"), ("HCU", "hygon")]))
def test_rocm_sections_are_the_identity(machine, whose):
    info = import_topology(print_rocm(machine, whose[0]).encode())

    assert {d.vendor for d in info.accelerators} == {whose[1]}
    assert_same(machine, info, cpus=False)


@once
@given(drawn(("OK", "CNS", "GNS", "TNS", "NS"), nics=False, lone=False))
def test_peer_access_is_the_identity(machine):
    info = import_topology(print_p2p(machine).encode(), vendor="nvidia")

    found = {(p.a, p.b): p.peer["read"] for p in info.pairs}
    assert found == {(f"nvidia:{a}", f"nvidia:{b}"): c for (a, b), c in machine.cells.items()}


uuids = st.uuids().map(str)


@once
@given(st.lists(st.tuples(uuids, st.lists(uuids, max_size=7)), min_size=1, max_size=9))
def test_list_of_gpus_is_the_identity(gpus):
    listed = [
        ("NVIDIA Drawn 80GB", f"GPU-{u}", [("1g.10gb", f"MIG-{m}") for m in parts])
        for u, parts in gpus
    ]
    info = import_topology(print_list(listed).encode())

    found = {
        d.index: (d.model, d.uuid, [m for m in d.attrs.get("mig", "").split(",") if m])
        for d in info.accelerators
    }
    wanted = {
        i: (model, uuid, [m for _, m in parts]) for i, (model, uuid, parts) in enumerate(listed)
    }
    last = {uuid: i for i, (_, uuid, _) in wanted.items()}  # equal UUIDs are one GPU
    if len(last) == len(wanted):
        assert found == wanted


addresses = st.lists(
    st.tuples(st.integers(0, 0x1FFFF), st.integers(1, 255), st.integers(0, 31), st.integers(0, 7)),
    min_size=1,
    max_size=20,
    unique=True,
)
KINDS = {
    "gpu": (0x0302, 0x10DE), "nic": (0x0207, 0x15B3), "fabric_switch": (0x0680, 0x10DE),
    "npu": (0x1200, 0x19E5), "cxl_mem": (0x0502, 0x1E98),
}  # fmt: skip


@once
@given(addresses, st.randoms(use_true_random=False))
def test_lspci_is_the_identity(places, rng):
    wanted = {
        f"{d:04x}:{b:02x}:{s:02x}.{f}": rng.choice([*KINDS, "other"]) for d, b, s, f in places
    }
    lines = [
        (bdf, *(KINDS[kind][:1] if kind in KINDS else (0x0108,)), "Maker Thing [Model X]",
         KINDS[kind][1] if kind in KINDS else 0x1414, 0x1234)
        for bdf, kind in wanted.items()
    ]  # fmt: skip

    info = import_topology(print_lspci(lines).encode())

    found = {d.id: d.kind for d in info.devices}
    assert found == {bdf: kind for bdf, kind in wanted.items() if kind != "other"}


@st.composite
def trees(draw):
    """PCI trees as hwloc and NCCL describe them: devices and links, built by our own merge."""
    nodes = draw(st.integers(1, 3))
    devices, links, at = [], [], 0
    gpus = []
    for n in range(nodes):
        cpus = f"{n * 16}-{n * 16 + 15}"
        devices += [
            Device(f"numa:{n}", "numa", numa_nodes=(n,), cpulist=cpus),
            Device(f"pci-cpu:{n}", "pci_root", numa_nodes=(n,)),
        ]
        links.append(Link(f"pci-cpu:{n}", f"numa:{n}", "host_bridge"))
        places = [f"pci-cpu:{n}"]
        for _ in range(draw(st.integers(0, 6))):
            at += 1
            bdf = f"0000:{at:02x}:00.0"
            kind = draw(st.sampled_from(["gpu", "nic", "pci_switch"]))
            above = draw(st.sampled_from(places))
            speed = draw(st.sampled_from([None, 16e9 * 16 * 128 / 130 / 8, 32e9 * 2 * 128 / 130]))
            own = (n,) if kind != "pci_switch" else ()
            index = len(gpus) if kind == "gpu" else None
            attrs = {"ib": f"mlx5_{at}"} if kind == "nic" else {}
            devices.append(
                Device(bdf, kind, bdf=bdf, vendor="nvidia" if kind == "gpu" else None,
                       numa_nodes=own, index=index, attrs=attrs)
            )  # fmt: skip
            links.append(Link(bdf, above, "pcie", bandwidth_bytes_per_s=speed))
            if kind == "pci_switch":
                places.append(bdf)
            if kind == "gpu":
                gpus.append(bdf)
    for i, a in enumerate(gpus):
        for b in gpus[i + 1 :]:
            lanes = draw(st.integers(0, 3))
            if lanes:
                links.append(Link(a, b, "nvlink", lanes))
    links += [
        Link(f"numa:{a}", f"numa:{b}", "socket", source="x", confidence="inferred")
        for a in range(nodes)
        for b in range(a + 1, nodes)
    ]
    return merge([(60, TopologyFragment("drawn", tuple(devices), tuple(links)))])


def shape(info):
    """Everything but names of sources and facts for people."""
    devices = {
        (d.id, d.kind, d.vendor, d.numa_nodes, d.cpulist, d.index, d.attrs.get("ib"))
        for d in info.devices
    }
    links = {(x.a, x.b, x.kind, x.count, round(x.bandwidth_bytes_per_s or 0)) for x in info.links}
    return devices, links


@once
@given(trees())
def test_nccl_xml_is_the_identity(info):
    again = import_topology(to_nccl_xml(info).encode())

    assert shape(again) == shape(info)
    assert to_nccl_xml(again) == to_nccl_xml(info)


@once
@given(st.data())
def test_hwloc_tree_is_the_identity(data):
    speeds = (15.753846, 31.507692)
    gp = 0
    packages, matrix, wanted, gpus = [], {}, {}, []
    for node in range(data.draw(st.integers(1, 3))):
        roots = []
        for root in range(data.draw(st.integers(1, 2))):
            below = []
            for _ in range(data.draw(st.integers(1, 3))):
                gp += 2
                is_gpu = data.draw(st.booleans())
                leaf = Bridge(
                    f"{node:04x}:{gp:02x}:00.0", code=0x0302 if is_gpu else 0x0200,
                    vendor=0x10DE if is_gpu else 0x15B3, device=0x20B0,
                    speed=data.draw(st.sampled_from(speeds)), gp=gp,
                    name=f"nvml{len(gpus)}" if is_gpu else f"eth{gp}", model="Drawn A100",
                )  # fmt: skip
                below.append(Bridge(f"{node:04x}:{root:02x}:{gp % 32:02x}.0", [leaf], gp=gp + 1))
                wanted[leaf.bdf] = (node, root, leaf.speed)
                if is_gpu:
                    gpus.append(leaf)
            roots.append(below)
        packages.append((node, f"0x{0xFF << node * 8:08x}", roots))
    for i, a in enumerate(gpus):
        for b in gpus[i + 1 :]:
            if lanes := data.draw(st.integers(0, 4)):
                matrix[a.gp, b.gp] = lanes * 25000

    info = import_topology(print_hwloc(packages, matrix).encode())

    graph = TopologyGraph(info)
    leaves = {d.id: d for d in info.devices if d.kind in ("gpu", "nic")}
    assert set(leaves) == set(wanted)
    for bdf, (node, root, speed) in wanted.items():
        assert leaves[bdf].numa_nodes == (node,)
        (link,) = [x for x in graph.links_of(bdf) if x.kind == "pcie"]
        assert link.bandwidth_bytes_per_s == pytest.approx(speed * 1e9)
        for other, (node2, root2, _) in wanted.items():
            want = "PHB" if (node, root) == (node2, root2) else "NODE" if node == node2 else "SYS"
            path = graph.path(bdf, other)
            assert other == bdf or path.kind in ("LINK", want)
    found = {frozenset((x.a, x.b)): x.count for x in info.links if x.kind == "nvlink"}
    by_gp = {g.gp: g.bdf for g in gpus}
    assert found == {frozenset((by_gp[a], by_gp[b])): v // 25000 for (a, b), v in matrix.items()}


@once
@given(drawn(PATHS + NVLINKS), st.randoms(use_true_random=False))
def test_order_of_devices_changes_nothing_but_names(machine, rng):
    order = list(range(machine.gpus))
    rng.shuffle(order)
    moved = [*order, *range(machine.gpus, machine.size)]
    shuffled = Drawn(
        {(a, b): machine.cell(moved[a], moved[b])
         for a in range(machine.size) for b in range(a + 1, machine.size)},
        [machine.cpus[i] for i in order],
        [machine.numa[i] for i in order],
        machine.nics,
    )  # fmt: skip

    first = import_topology(print_nvidia(machine).encode())
    second = import_topology(print_nvidia(shuffled).encode())

    assert first.fingerprint == second.fingerprint


@once
@given(trees(), st.integers(1, 200))
def test_renamed_addresses_change_nothing_but_names(info, shift):
    text = to_nccl_xml(info)
    moved = text
    for d in sorted((d for d in info.devices if d.bdf), key=lambda d: d.id, reverse=True):
        bus = int(d.bdf[5:7], 16)
        moved = moved.replace(d.bdf, f"00{shift:02x}:{bus:02x}:00.0")

    assert import_topology(moved.encode()).fingerprint == import_topology(text.encode()).fingerprint


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_spoiled_text_never_raises_and_never_invents_devices(data):
    machine = data.draw(drawn(PATHS + NVLINKS))
    text = print_nvidia(machine)
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    lines = text.split("\n")
    for _ in range(rng.randrange(1, 4)):
        i = rng.randrange(len(lines))
        cut = rng.randrange(len(lines[i]) + 1)
        lines[i] = rng.choice(
            [lines[i][:cut], lines[i][:cut] + "\x1b[31m" + lines[i][cut:], lines[i] * 2, "\t\t"]
        )
    lines[0] = text.split("\n")[0]

    info = import_topology("\r\n".join(lines).encode(), form="matrix") if rows(lines) else None

    if info is not None:
        assert info.num_devices == machine.gpus


def rows(lines):
    return any(line.strip().startswith("GPU") and "\t" in line.strip() for line in lines[1:])


@settings(deadline=None, max_examples=100)
@given(trees(), st.data())
def test_spoiled_xml_is_read_or_refused_in_words(info, data):
    text = bytearray(to_nccl_xml(info).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 40)))
        text[start:end] = data.draw(st.sampled_from([b"", b"-1", b"<pci ", b'"', b"\xff", b"&x;"]))

    try:
        again = import_topology(bytes(text), form="nccl-xml")
    except IntegrityError:
        return

    assert to_matrix(again)
    import_topology(to_nccl_xml(again).encode())
