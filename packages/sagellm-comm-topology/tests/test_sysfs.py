"""What is read of the PCI tree, NUMA nodes and networks, also where files are missing."""

import pytest

from sagellm.comm.topology.export import to_nccl_xml

GPU, NIC, BRIDGE = 0x030200, 0x020000, 0x060400
X16 = {"speed": "32.0 GT/s PCIe", "width": 16}


def gpu(machine, bdf, above, **facts):
    machine.pci(bdf, above, GPU, vendor=0x10DE, **{**X16, **facts})


def two_nodes(machine):
    machine.numa(0, "0-3", (10, 21))
    machine.numa(1, "4-7", (21, 10))


def test_devices_of_one_switch_are_pix(machine, look):
    machine.pci("0000:00:01.0", "pci0000:00", BRIDGE, **X16)
    machine.switch("0000:01:00.0", "0000:00:01.0", ["0000:02:00.0", "0000:02:01.0"], **X16)
    gpu(machine, "0000:03:00.0", "0000:02:00.0")
    gpu(machine, "0000:04:00.0", "0000:02:01.0")

    path = look(machine).path("0000:03:00.0", "0000:04:00.0")

    assert (path.kind, path.hops) == ("PIX", 2)
    assert path.devices == ("0000:03:00.0", "0000:01:00.0", "0000:04:00.0")
    assert path.bottleneck_bytes_per_s == pytest.approx(32e9 * 16 * 128 / 130 / 8)


def test_switch_behind_a_switch_is_pxb(machine, look):
    machine.pci("0000:00:01.0", "pci0000:00", BRIDGE, **X16)
    machine.switch("0000:01:00.0", "0000:00:01.0", ["0000:02:00.0", "0000:02:01.0"], **X16)
    machine.switch("0000:03:00.0", "0000:02:00.0", ["0000:04:00.0"], **X16)
    gpu(machine, "0000:05:00.0", "0000:04:00.0")
    gpu(machine, "0000:06:00.0", "0000:02:01.0")

    assert look(machine).path("0000:05:00.0", "0000:06:00.0").kind == "PXB"


def test_root_ports_of_one_host_bridge_are_phb_even_without_numa(machine, look):
    for i in (1, 2):
        machine.pci(f"0000:00:0{i}.0", "pci0000:00", BRIDGE, **X16)
        gpu(machine, f"0000:0{i}:00.0", f"0000:00:0{i}.0", numa=-1)

    assert look(machine).path("0000:01:00.0", "0000:02:00.0").kind == "PHB"


def test_two_ports_of_one_card_are_pix(machine, look):
    machine.pci("0000:00:01.0", "pci0000:00", BRIDGE, **X16)
    machine.pci("0000:01:00.0", "0000:00:01.0", NIC, vendor=0x15B3, **X16)
    machine.pci("0000:01:00.1", "0000:00:01.0", NIC, vendor=0x15B3, **X16)

    assert look(machine).path("0000:01:00.0", "0000:01:00.1").kind == "PIX"


def test_host_bridges_of_one_node_are_node_and_of_two_are_sys(machine, look):
    two_nodes(machine)
    gpu(machine, "0000:10:00.0", "pci0000:10", numa=0, cpulist="0-3")
    gpu(machine, "0000:20:00.0", "pci0000:20", numa=0, cpulist="0-3")
    gpu(machine, "0000:30:00.0", "pci0000:30", numa=1, cpulist="4-7")
    manager = look(machine)

    assert manager.path("0000:10:00.0", "0000:20:00.0").kind == "NODE"
    assert manager.path("0000:10:00.0", "0000:30:00.0").kind == "SYS"


def test_unknown_locality_stays_unknown(machine, look):
    two_nodes(machine)
    gpu(machine, "0000:10:00.0", "pci0000:10", numa=-1, cpulist="0-7")
    gpu(machine, "0000:20:00.0", "pci0000:20", numa=-1, cpulist="0-7")
    manager = look(machine)

    device = manager.detect().find("0000:10:00.0")
    path = manager.path("0000:10:00.0", "0000:20:00.0")

    assert (device.numa_nodes, device.cpulist) == ((), None)
    assert (path.kind, path.hops, path.bottleneck_bytes_per_s) == (None, None, None)


def test_single_node_is_concluded_for_the_bridge_but_not_claimed_of_the_device(machine, look):
    machine.numa(0, "0-3", (10,))
    gpu(machine, "0000:10:00.0", "pci0000:10", numa=-1)
    gpu(machine, "0000:20:00.0", "pci0000:20", numa=-1)
    manager = look(machine)
    info = manager.detect()

    bridges = [link for link in info.links if link.kind == "host_bridge"]

    assert {(x.source, x.confidence) for x in bridges} == {("inference", "inferred")}
    assert manager.path("0000:10:00.0", "0000:20:00.0").kind == "NODE"
    assert info.find("0000:10:00.0").numa_nodes == ()


def test_link_speed_is_the_lesser_maximum_and_never_the_idle_speed(machine, look):
    machine.pci("0000:00:01.0", "pci0000:00", BRIDGE, speed="16.0 GT/s PCIe", width=8)
    gpu(machine, "0000:01:00.0", "0000:00:01.0")

    (link,) = [x for x in look(machine).detect().links if x.kind == "pcie"]

    assert link.bandwidth_bytes_per_s == pytest.approx(16e9 * 8 * 128 / 130 / 8)


@pytest.mark.parametrize(
    ("speed", "width"), [("Unknown", 16), ("32.0 GT/s PCIe", 255), (None, None)]
)
def test_unreadable_link_speed_is_none(machine, look, speed, width):
    gpu(machine, "0000:01:00.0", "pci0000:00", speed=speed, width=width)

    (link,) = [x for x in look(machine).detect().links if x.kind == "pcie"]

    assert link.bandwidth_bytes_per_s is None


def test_32_bit_domain_behind_a_volume_management_device(machine, look):
    machine.pci("0000:00:0e.0", "pci0000:00", 0x010400)
    nested = machine.folder("0000:00:0e.0") / "pci10000:00"
    machine._folders["nested"] = nested
    machine.pci("10000:00:04.0", "nested", BRIDGE, **X16)
    gpu(machine, "10000:01:00.0", "10000:00:04.0")
    manager = look(machine)

    assert manager.detect().accelerators[0].id == "10000:01:00.0"
    assert manager.path("10000:01:00.0", "pci0000:00").kind == "PHB"


def test_class_files_serve_where_uevent_is_missing(machine, look):
    gpu(machine, "0000:01:00.0", "pci0000:00", uevent=False, device=0x2330)

    (device,) = look(machine).detect().accelerators

    assert (device.vendor, device.attrs["pci_device"]) == ("nvidia", "0x2330")


def test_unreadable_class_is_a_warning(machine, look):
    gpu(machine, "0000:01:00.0", "pci0000:00")
    for name in ("class", "uevent"):
        (machine.folder("0000:01:00.0") / name).unlink()

    info = look(machine).detect()

    assert info.num_devices == 0
    assert any("0000:01:00.0" in w and "unreadable" in w for w in info.warnings)


def test_display_of_an_unreadable_maker_is_a_warning_not_a_guess(machine, look):
    gpu(machine, "0000:01:00.0", "pci0000:00", uevent=False)
    (machine.folder("0000:01:00.0") / "vendor").unlink()

    info = look(machine).detect()

    assert any("maker unreadable" in w and "0000:01:00.0" in w for w in info.warnings)


def test_symlink_loops_are_survived(machine, look):
    devices = machine.root / "sys/bus/pci/devices"
    (devices / "0000:01:00.0").symlink_to("0000:02:00.0")
    (devices / "0000:02:00.0").symlink_to("0000:01:00.0")
    (machine.root / "sys/class/net/eth9").symlink_to("eth9")

    info = look(machine).detect()

    assert info.num_devices == 0
    assert any("0000:01:00.0" in w for w in info.warnings)


def test_a_file_that_is_a_folder_reads_as_unknown(machine, look):
    gpu(machine, "0000:01:00.0", "pci0000:00", numa=0)
    numa = machine.folder("0000:01:00.0") / "numa_node"
    numa.unlink()
    numa.mkdir()

    assert look(machine).detect().accelerators[0].numa_nodes == ()


def test_a_device_without_a_place_in_the_tree_has_unknown_paths(machine, look):
    gpu(machine, "0000:01:00.0", "pci0000:00")
    folder = machine.root / "sys/bus/pci/devices/0000:02:00.0"
    folder.mkdir()
    (folder / "class").write_text("0x030200\n")
    (folder / "vendor").write_text("0x10de\n")
    manager = look(machine)

    assert manager.detect().num_devices == 2
    assert manager.path("0000:01:00.0", "0000:02:00.0").kind is None


def test_an_empty_root_gives_warnings_and_no_devices(tmp_path, look):
    info = look(tmp_path / "nothing").detect()

    assert info.devices == ()
    assert len(info.warnings) == 3


@pytest.mark.parametrize(
    ("pci_class", "vendor", "kind"),
    [
        (0x030000, 0x1A03, "display"),  # display of a management chip
        (0x030000, 0x8086, "display"),  # the processor's own display
        (0x120000, 0x19E5, "npu"),
        (0x120000, 0x1002, "gpu"),
        (0x120000, 0xABCD, "npu"),
        (0x0B4000, 0x1D94, "npu"),
        (0x0B4000, 0x8086, None),  # crypto engine
        (0x068000, 0x10DE, "fabric_switch"),
        (0x050210, 0x1E98, "cxl_mem"),
        (0x0C0330, 0x10DE, None),
    ],
)
def test_a_function_is_what_its_class_and_maker_say(machine, look, pci_class, vendor, kind):
    machine.pci("0000:00:02.0", "pci0000:00", pci_class, vendor=vendor)

    found = look(machine).detect().find("0000:00:02.0")

    assert (found and found.kind) == kind


def test_virtual_functions_stand_behind_their_card(machine, look):
    machine.pci("0000:01:00.0", "pci0000:00", NIC, vendor=0x15B3)
    machine.pci("0000:01:00.1", "pci0000:00", NIC, vendor=0x15B3)
    (machine.folder("0000:01:00.1") / "physfn").symlink_to("../0000:01:00.0")

    (nic,) = [d for d in look(machine).detect().devices if d.kind == "nic"]
    assert nic.id == "0000:01:00.0"
    assert nic.attrs["virtual_functions"] == "0000:01:00.1"


def test_numa_node_without_cpus_is_marked_and_never_pinned_to(machine, look):
    machine.numa(0, "0-71", (10, 40, 80))
    machine.numa(1, "72-143", (40, 10, 80))
    machine.numa(2, "", (80, 60, 10))
    gpu(machine, "0009:01:00.0", "pci0009:00", numa=2)
    manager = look(machine)

    affinity = manager.affinity("0009:01:00.0")

    assert manager.detect().find("numa:2").attrs["cpuless"] == "yes"
    assert (affinity.numa_nodes, affinity.cpulist) == ((1,), "72-143")


def test_affinity_of_an_unknown_locality_is_empty(machine, look):
    gpu(machine, "0000:01:00.0", "pci0000:00", numa=-1)

    assert look(machine).affinity("0000:01:00.0").numa_nodes == ()
    assert look(machine).affinity("0000:01:00.0").cpulist is None


def test_net_and_rdma_of_one_function_are_one_nic(machine, look):
    machine.pci("0000:01:00.0", "pci0000:00", 0x020700, vendor=0x15B3)
    machine.rdma("mlx5_0", "0000:01:00.0", gbps=400)
    machine.net("ib0", "0000:01:00.0", speed=-1)

    (nic,) = [d for d in look(machine).detect().devices if d.kind == "nic"]

    assert nic.vendor == "mellanox"
    assert nic.attrs["ib"] == "mlx5_0"
    assert nic.attrs["netdev"] == "ib0"
    assert nic.attrs["port_bytes_per_s"] == "50000000000"
    assert nic.attrs["ib_state"] == "ACTIVE"


def test_interface_speed_below_zero_is_unknown(machine, look):
    machine.pci("0000:01:00.0", "pci0000:00", NIC)
    machine.net("eth0", "0000:01:00.0", speed=-1, state="down")

    (nic,) = [d for d in look(machine).detect().devices if d.kind == "nic"]

    assert "port_bytes_per_s" not in nic.attrs


def test_virtual_interface_counts_only_where_there_is_no_other(machine, look):
    machine.net("eth0", None)
    alone = [d.id for d in look(machine).detect().devices]
    machine.pci("0000:01:00.0", "pci0000:00", NIC)
    machine.net("eth1", "0000:01:00.0")

    beside = [d.id for d in look(machine).detect().devices if d.kind == "nic"]

    assert alone == ["net:eth0"]
    assert beside == ["0000:01:00.0"]


@pytest.mark.parametrize("order", [("up", "down"), ("down", "up"), ("unknown", "up")])
def test_a_card_with_a_port_that_is_up_is_up_at_the_rate_of_that_port(machine, look, order):
    machine.pci("0000:01:00.0", "pci0000:00", NIC, vendor=0x15B3)
    for i, state in enumerate(order):
        speed = 10_000 if state == "up" else 1_000
        machine.net(f"eth{i}", "0000:01:00.0", speed=speed, state=state)

    attrs = look(machine).detect().find("0000:01:00.0").attrs

    assert (attrs["operstate"], attrs["netdev"]) == ("up", "eth0,eth1")
    assert attrs["port_bytes_per_s"] == str(10_000 * 125_000)
    if "down" in order:  # a cable that is not there takes no share of the card's rate
        assert attrs["netdev_down"] == f"eth{order.index('down')}"
        written = to_nccl_xml(look(machine).detect())
        assert f'<net name="eth{order.index("up")}" speed="10000"/>' in written
        assert f'"eth{order.index("down")}"' not in written


@pytest.mark.parametrize(
    ("link_type", "layer"), [(1, "Ethernet"), (32, "InfiniBand"), (65534, None)]
)
def test_the_link_layer_of_an_interface_is_what_its_type_says(machine, look, link_type, layer):
    machine.pci("0000:01:00.0", "pci0000:00", NIC, vendor=0x15B3)
    machine.net("net0", "0000:01:00.0", link_type=link_type)

    assert look(machine).detect().find("0000:01:00.0").attrs.get("link_layer") == layer
