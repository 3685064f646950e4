"""Text, plug-ins and drivers that are not what they should be: a hole, never a crash."""

import threading
import time
from types import SimpleNamespace

import pytest

from sagellm.comm.topology import TopologyManager
from sagellm.comm.topology._numbers import number, whole_number
from sagellm.comm.topology.benchmarks.fake_machine import GPU, StubNvml
from sagellm.comm.topology.export import from_json, to_matrix, to_nccl_xml
from sagellm.comm.topology.importers import import_topology
from sagellm.comm.topology.importers._text import numa_numbers
from sagellm.comm.topology.merge import merge
from sagellm.comm.topology.render import render_svg, render_table
from sagellm.core.protocols import (
    DetectorSpec,
    Device,
    IntegrityError,
    Link,
    Pair,
    SwitchDomain,
    TopologyFragment,
)

A, B = "0000:01:00.0", "0000:02:00.0"
NONE = ["", "-1", "--1", "²", "1" * 5000, "0x10", "1_0", "nan", "+1", "1e5"]


@pytest.mark.parametrize("text", [*NONE, "1.5"])
def test_what_is_no_whole_number_is_none(text):
    assert whole_number(text) is None


@pytest.mark.parametrize("text", [*NONE, "32.0.0", ".", "inf"])
def test_what_is_no_number_is_none(text):
    assert number(text) is None


def test_numbers_are_numbers_up_to_their_limit():
    assert (whole_number("007 "), whole_number("8", most=8), whole_number("9", most=8)) == (
        7,
        8,
        None,
    )
    assert (number("32.0"), number("4")) == (32.0, 4.0)


@pytest.mark.parametrize(
    ("name", "text"),
    [("max_link_speed", "32.0.0 GT/s PCIe"), ("max_link_width", "²"), ("numa_node", "--1"),
     ("numa_node", "²"), ("numa_node", "9" * 4000)],
)  # fmt: skip
def test_one_odd_file_in_sys_costs_one_fact(machine, look, name, text):
    for bdf in (A, B):
        facts = {"numa": 0, "speed": "16.0 GT/s PCIe", "width": 16}
        machine.pci(bdf, "pci0000:00", GPU, vendor=0x10DE, **facts)
    (machine.folder(A) / name).write_text(f"{text}\n")

    info = look(machine).detect()

    assert [d.id for d in info.accelerators] == [A, B]
    assert not any("failed" in w for w in info.warnings)


@pytest.mark.parametrize("text", ["²", "4.0.0 Gb/sec", "9" * 4000])
def test_odd_rates_and_sizes_leave_the_others(machine, look, text):
    machine.numa(0, "0-3", (10,))
    machine.pci(A, "pci0000:00", 0x020000, numa=0)
    machine.net("eth0", A)
    machine.rdma("mlx5_0", A)
    for file in machine.root.rglob("*"):
        if file.name in ("speed", "rate", "distance"):
            file.write_text(text)
        if file.name == "meminfo":
            file.write_text(f"Node 0 MemTotal: {text} kB\n")

    info = look(machine).detect()

    assert info.find(A).attrs["netdev"] == "eth0"
    assert "port_bytes_per_s" not in info.find(A).attrs
    assert info.find("numa:0").memory_bytes is None
    assert not any("failed" in w for w in info.warnings)


def test_odd_numbers_of_the_compute_driver_leave_the_others(machine, look):
    from sagellm.comm.topology import _specs

    machine.pci(A, "pci0000:00", GPU, vendor=0x1002)
    machine.kfd([A])
    nodes = machine.root / "sys/class/kfd/kfd/topology/nodes"
    (nodes / "²").mkdir()
    with (nodes / "1/properties").open("a") as file:
        file.write(f"max_waves ²\nsdma {'1' * 5000}\n")

    info = look(machine, extra=(_specs.KFD,)).detect()

    assert info.find(A).uuid == "GPU-00000000000003e8"


@pytest.mark.parametrize("text", ["²", "1" * 5000, "0,²"])
def test_a_visibility_variable_of_rubbish_ends_the_list(machine, look, text):
    machine.pci(A, "pci0000:00", GPU, vendor=0x10DE)

    info = look(machine, environ={"CUDA_VISIBLE_DEVICES": text}).detect()

    assert sum(d.visible_index is not None for d in info.accelerators) == text.count("0,")
    assert any("CUDA_VISIBLE_DEVICES names" in w for w in info.warnings)


@pytest.mark.parametrize(
    ("fragment", "words"),
    [
        (None, "NoneType"),
        (TopologyFragment("x", devices=[Device("a", "gpu")]), "devices"),
        (TopologyFragment("x", devices=("a",)), "devices"),
        (TopologyFragment("x", devices=(Device("a", "laser"),)), "laser"),
        (TopologyFragment("x", devices=(Device("a", "gpu", bdf=7),)), "bdf"),
        (TopologyFragment("x", devices=(Device("a", "gpu", index="7"),)), "index"),
        (TopologyFragment("x", devices=(Device("a", "gpu", numa_nodes=3),)), "numa_nodes"),
        (TopologyFragment("x", devices=(Device("a", "gpu", attrs={"ib": 3}),)), "attrs"),
        (TopologyFragment("x", links=(Link("a", 3, "nvlink"),)), "ends"),
        (TopologyFragment("x", links=(Link("a", "b", "nvlink", 1, "fast"),)), "bandwidth"),
        (TopologyFragment("x", links=(Link("a", "b", "nvlink", 0),)), "count"),
        (TopologyFragment("x", domains=(SwitchDomain("d", "nvlink", "ab"),)), "domain"),
        (TopologyFragment("x", pairs=(Pair("a", "b", peer=3),)), "peer"),
        (TopologyFragment("x", warnings="no tuple"), "warnings"),
        (TopologyFragment(7), "source"),
    ],
)
def test_a_plug_in_with_a_wrong_type_is_a_warning(tmp_path, fragment, words):
    detector = SimpleNamespace(detect=lambda ctx: fragment)
    good = SimpleNamespace(detect=lambda ctx: TopologyFragment("g", (Device("g", "gpu"),)))
    specs = [DetectorSpec("odd", 60, lambda: detector), DetectorSpec("good", 60, lambda: good)]

    info = TopologyManager(root=tmp_path, environ={}, detectors=specs).detect()

    assert [d.id for d in info.devices] == ["g"]
    assert any("odd failed: " in w and words in w for w in info.warnings), info.warnings


def test_a_plug_in_that_exits_is_a_warning(tmp_path):
    detector = SimpleNamespace(detect=lambda ctx: exit(3))
    specs = [DetectorSpec("odd", 60, lambda: detector)]

    info = TopologyManager(root=tmp_path, environ={}, detectors=specs).detect()

    assert any("odd failed: SystemExit" in w for w in info.warnings)


NCCL = (
    '<system version="1"><cpu numaid="{0}" affinity="f"><pci busid="0000:01:00.0" class="0x030200" '
    'link_speed="{0}.0.0 GT/s" link_width="{0}"><gpu dev="{0}"><nvlink target="0000:02:00.0" '
    'count="{0}"/></gpu></pci><nic><net name="eth0" speed="{0}"/></nic></cpu></system>'
)
HWLOC = (
    '<topology><object type="Machine"><object type="NUMANode" os_index="{0}" local_memory="{0}"/>'
    '<object type="Bridge" bridge_type="0-1" bridge_pci="0000:[00-01]"><object type="PCIDev" '
    'pci_busid="0000:01:00.0" pci_type="0302 [10de:2330]" pci_link_speed="{0}"/></object></object>'
    '<distances2 type="NUMANode" name="NUMALatency" indexing="os"><indexes>{0}</indexes>'
    "<u64values>{0}</u64values></distances2></topology>"
)


@pytest.mark.parametrize("text", ["²", "1" * 5000, "1.0.0", "٣", "--1"])
@pytest.mark.parametrize("form", [NCCL, HWLOC])
def test_odd_numbers_in_xml_are_holes(form, text):
    info = import_topology(form.format(text).encode())

    assert [d.id for d in info.accelerators] == [A]


@pytest.mark.parametrize(
    "text",
    [
        "\tGPU0\tGPU1\nGPU0\tX\tNV{0}\nGPU1\tNV{0}\tX\n",
        "\tGPU0\tGPU{0}\nGPU0\tX\tPIX\n",
        "GPU {0}: Tesla (UUID: GPU-1)\n",
        "01:00.0 3D controller [0302]: N [10de:2330]\n\tNUMA node: {0}\n",
    ],
)
def test_endless_digits_in_text_are_holes(text):
    try:
        info = import_topology(text.format("7" * 5000).encode())
    except IntegrityError:
        return
    assert not info.find("numa:0")


@pytest.mark.parametrize(
    "data", [b"[" * 200_000, b'{"topology":' * 100_000, b'{"topology":{"hostname":"\xff\xfe"}}']
)
def test_json_too_deep_or_not_utf8_is_refused(data):
    with pytest.raises(IntegrityError, match="not a topology"):
        from_json(data)


def test_a_port_speed_that_is_none_is_unknown_everywhere():
    nic = Device(A, "nic", bdf=A, attrs={"ib": "mlx5_0", "port_bytes_per_s": "fast"})
    info = merge([(60, TopologyFragment("x", (nic, Device(B, "gpu", bdf=B))))])

    assert "<svg" in render_svg(info)
    assert render_table(info).row_count == 2
    assert "mlx5_0" in to_matrix(info)
    assert "speed" not in to_nccl_xml(info)


def test_an_answer_of_the_driver_that_is_no_answer_costs_one_gpu(machine, look):
    for bdf in (A, B):
        machine.pci(bdf, "pci0000:00", GPU, vendor=0x10DE)
    stub = StubNvml([A, B])
    real = stub.nvmlDeviceGetMemoryInfo

    def memory(handle):
        return SimpleNamespace(total="much") if handle == A else real(handle)

    def name(handle):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd") if handle == A else OSError("gone")

    def shutdown():
        raise OSError("shutdown")

    stub.nvmlDeviceGetMemoryInfo, stub.nvmlDeviceGetName = memory, name
    stub.nvmlShutdown = shutdown

    info = look(machine, nvml=stub).detect()

    assert info.find(B).uuid == "GPU-00000001-fake"
    assert info.find(B).model is None
    assert any("GPU 0: left out" in w for w in info.warnings)
    assert any("nvmlDeviceGetName: gone" in w or "nvmlDeviceGetName(): gone" in w
               for w in info.warnings)  # fmt: skip


def test_nvlinks_to_a_gpu_that_a_container_hides_make_no_switch(machine, look):
    hidden = "0000:09:00.0"
    for bdf in (A, B):
        machine.pci(bdf, "pci0000:00", GPU, vendor=0x10DE)
    stub = StubNvml([A, B], peers={A: [hidden] * 4, B: [hidden] * 4})

    info = look(machine, nvml=stub).detect()

    assert info.domains == ()
    assert not any(d.kind == "fabric_switch" for d in info.devices)
    assert not any(x.kind == "nvlink" for x in info.links)
    assert any(f"4 NVLinks lead to {hidden}" in w for w in info.warnings)


def test_a_detector_that_hangs_leaves_the_driver_its_time(machine, look):
    release = threading.Event()
    machine.pci(A, "pci0000:00", GPU, vendor=0x10DE)
    hanging = SimpleNamespace(detect=lambda ctx: release.wait(30))
    manager = look(
        machine, nvml=StubNvml([A]), extra=(DetectorSpec("a-hang", 60, lambda: hanging),)
    )
    try:
        info = manager.detect(deadline_s=0.6)
    finally:
        release.set()

    assert info.find(A).uuid == "GPU-00000000-fake"
    assert any("a-hang did not answer" in w for w in info.warnings)


def test_a_detector_that_hangs_is_started_once_until_it_ends(machine, look):
    release, started = threading.Event(), []

    def hang(ctx):
        started.append(1)
        release.wait(30)
        return TopologyFragment("hang")

    spec = DetectorSpec("hang", 60, lambda: SimpleNamespace(detect=hang))
    manager = look(machine, extra=(spec,))
    try:
        manager.detect(deadline_s=0.2)
        info = manager.detect(deadline_s=0.2, refresh=True)
        assert len(started) == 1
        assert any("hang" in w and "not started again" in w for w in info.warnings)
    finally:
        release.set()
    for thread in [t for t in threading.enumerate() if t.name == "topology-hang"]:
        thread.join(10)

    assert "hang" in manager.detect(refresh=True, deadline_s=5).provenance
    assert len(started) == 2


def test_who_asks_while_another_looks_waits_no_longer_than_asked(machine, look):
    release, entered = threading.Event(), threading.Event()

    def slow(ctx):
        entered.set()
        release.wait(30)
        return TopologyFragment("slow", (Device("x", "gpu"),))

    manager = look(
        machine, detectors=[DetectorSpec("slow", 60, lambda: SimpleNamespace(detect=slow))]
    )
    first = threading.Thread(target=manager.detect, kwargs={"deadline_s": 20})
    first.start()
    try:
        assert entered.wait(10)
        info = manager.detect(deadline_s=0.05)
        assert any("still looking" in w for w in info.warnings)
    finally:
        release.set()
        first.join(10)

    assert manager.detect().num_devices == 1


def test_a_recorded_machine_runs_no_tool_of_this_one(machine, tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    machine.pci(A, "pci0000:00", GPU, vendor=0x10DE)

    TopologyManager(root=machine.root, environ={}, allow_commands=True).detect(deadline_s=5)

    assert not (tmp_path / "ran").exists()


def test_what_looks_like_markup_is_printed_as_it_is(tmp_path, capsys):
    from sagellm.comm.topology.__main__ import main
    from sagellm.comm.topology.export import to_json

    name = "[/red]x"
    devices = (Device(name, "gpu", model="[bold]H[/]", vendor="[/]"), Device("b", "gpu"))
    link = Link(name, "b", "nvlink", source="[/x]")
    info = merge([(60, TopologyFragment("x", devices, (link,)))], hostname="[/h]")
    (tmp_path / "t.json").write_text(to_json(info))

    assert main(["show", "--from", str(tmp_path / "t.json")]) == 0
    assert main(["explain", "--from", str(tmp_path / "t.json"), name, "b"]) == 0

    out = capsys.readouterr().out
    assert out.count(name) >= 2
    assert "[/h]: 2 accelerators" in out


def test_a_device_or_pipe_is_no_input(tmp_path, capsys):
    import os

    from sagellm.comm.topology.__main__ import main

    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        assert main(["import", path]) == 2
        assert "no regular file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--nodes", "100000000"], ["--gpus", "0"], ["--nics", "²"]])
def test_a_cluster_too_large_to_draw_is_refused(arguments, capsys):
    from sagellm.comm.topology.__main__ import main

    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert "is no number from 1 to" in capsys.readouterr().err


def test_what_this_shell_hides_is_not_hidden_in_a_recorded_tree(machine, monkeypatch, capsys):
    from sagellm.comm.topology.__main__ import main

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine.pci(A, "pci0000:00", GPU, vendor=0x10DE)

    assert main(["show", "--from", str(machine.root), "--json"]) == 0

    assert from_json(capsys.readouterr().out).accelerators[0].visible_index == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "77")
    main(["doctor", "--from", str(machine.root)])
    assert "CUDA_VISIBLE_DEVICES names" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "01:00.0 " + " " * 100_000 + "x",
        "GPU 0: " + " " * 100_000,
        "GPU 0: x (UUID: GPU-1)\n  MIG " + " " * 100_000,
        "GPU 0: x (UUID: GPU-1)\n  MIG 1g Device " + " " * 100_000,
        "01:00.0 3D controller [0302]: " + "[a" * 50_000,
        "01:00.0 3D controller [0302]: N [10de:2330]\n\tLnkCap:" + "Speed 1GT/s" * 9_000,
    ],
)
def test_long_lines_of_lists_take_no_time(line):
    start_s = time.process_time()
    try:
        import_topology(line.encode())
    except IntegrityError:
        pass
    assert time.process_time() - start_s < 2


@pytest.mark.parametrize(
    "text",
    [
        '<system version="1">' + "".join(f'<cpu numaid="{i}"/>' for i in range(3000)) + "</system>",
        '<topology><object type="Machine">'
        + "".join(f'<object type="NUMANode" os_index="{i}"/>' for i in range(3000))
        + "</object></topology>",
    ],
)
def test_thousands_of_nodes_take_no_time_and_are_told(text):
    start_s = time.process_time()
    info = import_topology(text.encode())

    assert time.process_time() - start_s < 5
    assert sum(d.kind == "numa" for d in info.devices) == 3000
    assert any("only the first 256 are joined" in w for w in info.warnings)


def test_a_list_of_nodes_is_bounded():
    start_s = time.process_time()

    assert numa_numbers(",".join(["0-1000"] * 10_000)) == ()
    assert numa_numbers("3,0-2,1") == (3, 0, 1, 2)
    assert time.process_time() - start_s < 1


@pytest.mark.parametrize("extra", ["", " (prog-if 00 [VGA controller])"])
def test_the_model_of_lspci_ends_where_the_ids_begin(extra):
    line = "01:00.0 VGA compatible controller [0300]: NVIDIA GA102 [RTX 3090] [10de:2204] (rev a1)"

    info = import_topology((line + extra).encode())

    assert info.accelerators[0].model == "RTX 3090"


def test_json_of_a_job_is_read_as_it_was_written():
    from sagellm.comm.topology._join import join_hosts
    from sagellm.comm.topology.export import to_json

    host = merge([(60, TopologyFragment("x", (Device(A, "gpu", bdf=A),)))])
    job = join_hosts([host, host])

    assert import_topology(to_json(job).encode()) == job


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [([], 1.0), (["--tools"], 10.0), (["--tools", "--deadline", "3"], 3.0)],
)
def test_tools_have_the_time_that_tools_take(monkeypatch, arguments, seconds):
    from sagellm.comm.topology._cli import _source

    asked = []
    monkeypatch.setattr(
        TopologyManager, "detect", lambda self, *, deadline_s: asked.append(deadline_s)
    )

    _source.read_topology(_source.source_parser().parse_args(arguments))

    assert asked == [seconds]


def test_characters_that_xml_forbids_leave_drawings_and_files_readable():
    from xml.dom.minidom import parseString

    odd = "a\x00\x1b\ud800\uffff"
    nic = Device(A, "nic", bdf=A, model=odd, attrs={"ib": odd})
    info = merge([(60, TopologyFragment("x", (nic,)))], hostname=odd)

    assert "a\ufffd" in parseString(render_svg(info)).toxml()
    assert "a\ufffd" in parseString(to_nccl_xml(info)).toxml()
