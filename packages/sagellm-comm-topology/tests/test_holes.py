"""Machines with holes: nothing to read, nothing allowed, drivers that hang, hidden GPUs."""

import os
import threading

import pytest

from sagellm.comm.topology import _nvml, _specs
from sagellm.comm.topology.benchmarks.fake_machine import BRIDGE, GPU, StubNvml
from sagellm.comm.topology.detector import BUILT_IN
from sagellm.comm.topology.export import to_json, to_matrix, to_nccl_xml
from sagellm.comm.topology.importers import import_topology
from sagellm.comm.topology.render import render_svg
from sagellm.core.protocols import ConfigError, DetectorSpec

A, B, C = "0000:17:00.0", "0000:65:00.0", "0000:ca:00.0"


@pytest.fixture
def boxed(machine):
    """Three GPUs, each on a host bridge of its own, two NUMA nodes."""
    machine.numa(0, "0-3", (10, 21))
    machine.numa(1, "4-7", (21, 10))
    for i, bdf in enumerate((A, B, C)):
        machine.pci(bdf, f"pci0000:{16 + i:02x}", GPU, vendor=0x10DE, numa=i % 2)
    return machine


def test_without_sys_there_are_warnings_and_every_question_has_an_answer(tmp_path, look):
    manager = look(tmp_path / "none", detectors=BUILT_IN)
    info = manager.detect()

    assert (info.devices, info.links, info.num_devices) == ((), (), 0)
    assert any("/sys/bus/pci/devices" in w for w in info.warnings)
    assert manager.islands("nvlink") == ()
    with pytest.raises(ConfigError, match="none"):
        manager.device(0)
    assert to_matrix(info).splitlines() == ["\tCPU Affinity\tNUMA Affinity"]
    assert import_topology(to_nccl_xml(info).encode()).devices == ()
    assert import_topology(to_json(info).encode()).devices == ()
    assert "<svg" in render_svg(info)


def test_one_device_is_a_result(machine, look):
    machine.pci(A, "pci0000:10", GPU, vendor=0x10DE)
    manager = look(machine)

    assert manager.device(0).id == A
    assert manager.ring([A]) == (A,)
    assert to_matrix(manager.detect()).splitlines()[1].startswith("GPU0\tX")


def test_unreadable_files_leave_their_facts_unknown(boxed, look):
    folder = boxed.folder(A)
    for name in ("numa_node", "local_cpulist", "max_link_speed", "max_link_width"):
        (folder / name).unlink(missing_ok=True)
    (folder / "numa_node").write_bytes(b"\xff\xfe\n")
    node = boxed.root / "sys/devices/system/node/node1"
    (node / "cpulist").unlink()

    info = look(boxed).detect()

    assert info.find(A).numa_nodes == ()
    assert info.find("numa:1").cpulist is None
    assert any("NUMA node 1" in w for w in info.warnings)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads what others may not")
def test_files_closed_to_us_are_holes(boxed, look):
    (boxed.folder(A) / "uevent").chmod(0)
    (boxed.folder(A) / "class").chmod(0)

    assert look(boxed).detect().num_devices == 2


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetNvLinkState"])
def test_a_driver_that_hangs_is_left_behind_and_the_kernel_still_speaks(boxed, look, call):
    stub, release = StubNvml([A, B], peers={A: [B], B: [A]}), threading.Event()

    def hang(*args):
        release.wait(30)
        raise stub.NVMLError(999)

    setattr(stub, call, hang)
    manager = look(boxed, nvml=stub)
    try:
        info = manager.detect(deadline_s=0.3)
    finally:
        release.set()

    assert [d.id for d in info.accelerators] == [A, B, C]
    assert any("nvml did not answer" in w for w in info.warnings)
    for thread in [t for t in threading.enumerate() if t.name == "topology-nvml"]:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    "call",
    ["nvmlDeviceGetPciInfo", "nvmlDeviceGetUUID", "nvmlDeviceGetNvLinkState",
     "nvmlDeviceGetP2PStatus", "nvmlDeviceGetFieldValues", "nvmlDeviceGetMemoryInfo"],
)  # fmt: skip
def test_a_call_that_fails_on_one_gpu_costs_only_its_answer(boxed, look, call):
    stub = StubNvml([A, B, C], peers={A: [B], B: [A]})
    real = getattr(stub, call)

    def fail(handle, *args):
        if handle == B:
            raise stub.NVMLError(15)
        return real(handle, *args)

    setattr(stub, call, fail)

    info = look(boxed, nvml=stub).detect()

    assert [d.id for d in sorted(info.accelerators, key=lambda d: d.id)] == [A, B, C]
    assert info.find(A).uuid == "GPU-00000000-fake"
    assert info.find(C).uuid == "GPU-00000002-fake"
    assert any(call in w for w in info.warnings)


def test_gpus_that_a_container_may_not_use_are_hidden_not_numbered(boxed, look):
    manager = look(boxed, nvml=StubNvml([B]))

    info = manager.detect()

    assert info.num_devices == 3
    assert manager.device(0).id == B
    assert {d.id: d.visible_index for d in info.accelerators} == {A: None, B: 0, C: None}
    assert any(f"does not show {A}, {C}" in w for w in info.warnings)


def test_partitions_make_their_gpu_visible(boxed, look):
    stub = StubNvml([A, B], mig={B: ["MIG-1", "MIG-2"]})

    info = look(boxed, nvml=stub, environ={"CUDA_VISIBLE_DEVICES": "MIG-2"}).detect()

    assert {d.id: d.visible_index for d in info.accelerators} == {A: None, B: 0, C: None}
    assert info.find(B).attrs["mig"] == "MIG-1,MIG-2"


def test_lines_of_a_megabyte_in_sys_are_bounded(boxed, look):
    (boxed.folder(A) / "local_cpulist").write_text("0-1," * (1 << 18))
    (boxed.root / "sys/devices/system/node/node0/distance").write_text("10 " * (1 << 18))

    info = look(boxed).detect()

    assert len(info.find(A).cpulist) <= 4096
    assert info.num_devices == 3


def test_loops_of_bridges_end(tmp_path, look):
    text = (
        '<system version="1"><cpu numaid="0"><pci busid="0000:01:00.0" class="0x060400">'
        '<pci busid="0000:02:00.0" class="0x060400"><pci busid="0000:01:00.0" class="0x060400">'
        f'<pci busid="{A}" class="0x030200"/></pci></pci></pci></cpu></system>'
    )

    info = import_topology(text.encode())

    assert info.num_devices == 1
    assert import_topology(to_nccl_xml(info).encode()).num_devices == 1
    assert "<svg" in render_svg(info)


def test_detection_leaves_no_thread_and_no_descriptor(boxed, look):
    def run(command, timeout_s):
        raise TimeoutError("slow")

    stub = StubNvml([A, B, C])
    manager = look(boxed, nvml=stub, extra=(_specs.NVIDIA_SMI,), run=run, allow_commands=True)
    manager.detect()
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()

    for _ in range(5):
        manager.detect(refresh=True)

    assert stub.open == 0
    assert len(os.listdir("/proc/self/fd")) == fds
    assert threading.active_count() == threads


def test_times_come_from_the_clock_of_the_context(boxed, look):
    now = iter(range(1000))
    spec = DetectorSpec("nvml", 80, lambda: _nvml.NvmlDetector(lambda: StubNvml([A])))

    info = look(boxed, extra=(spec,), clock=lambda: float(next(now))).detect(deadline_s=500)

    assert all(seconds >= 1 for seconds in info.provenance.values())


def test_bridges_that_cannot_be_read_still_lead_somewhere(machine, look):
    machine.pci("0000:00:01.0", "pci0000:00", BRIDGE)
    machine.pci(A, "0000:00:01.0", GPU, vendor=0x10DE, numa=-1)
    machine.pci(B, "0000:00:01.0", GPU, vendor=0x10DE, numa=-1)
    for name in ("class", "uevent", "vendor"):
        (machine.folder("0000:00:01.0") / name).unlink()

    assert look(machine).path(A, B).kind == "PIX"
