"""CXL memory, AMD GPUs, vendors' tools and topology files, each through the whole of detection."""

import os
import tomllib
from pathlib import Path

import pytest

from sagellm.comm.topology import _amdsmi, _specs
from sagellm.comm.topology.benchmarks.fake_machine import GPU, NIC, StubNvml
from sagellm.comm.topology.detector import BUILT_IN, make_context
from sagellm.core.protocols import CommandResult, DetectorSpec
from sagellm.core.protocols.testing.detector_suite import check_detector

AMD = ("0000:0c:00.0", "0000:15:00.0", "0000:1e:00.0")


def amd(machine):
    machine.numa(0, "0-63", (10,))
    for i, bdf in enumerate(AMD):
        machine.pci(bdf, f"pci0000:{10 + i}", 0x120000, vendor=0x1002, device=0x74A1, numa=0)
    return machine


def links(info, kind):
    return {(x.a, x.b): (x.count, x.bandwidth_bytes_per_s, x.confidence)
            for x in info.links if x.kind == kind}  # fmt: skip


@pytest.mark.parametrize("spec", BUILT_IN, ids=lambda s: s.name)
def test_every_detector_keeps_its_contract(spec):
    report = check_detector(spec)

    assert report.ok, report


def test_every_detector_is_found_by_entry_point():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())

    listed = project["project"]["entry-points"]["sagellm.comm.topology.detectors"]
    assert set(listed) == {s.name for s in BUILT_IN}


def test_cxl_memory_is_one_device_with_size_and_node(machine, look):
    machine.numa(0, "0-3", (10, 14))
    machine.numa(1, "", (14, 10))
    machine.pci("0000:0d:00.0", "pci0000:0c", 0x050210, vendor=0x1E98, numa=0)
    machine.cxl(0, "0000:0d:00.0", ram=64 << 30, node=1)

    info = look(machine, extra=(_specs.CXL,)).detect()

    (memory,) = [d for d in info.devices if d.kind == "cxl_mem"]
    assert (memory.id, memory.memory_bytes, memory.attrs["cxl"]) == (
        "0000:0d:00.0",
        64 << 30,
        "mem0",
    )
    assert links(info, "cxl") == {("0000:0d:00.0", "numa:1"): (1, None, "stated")}


def test_offline_cxl_memory_has_no_node_of_its_own(machine, look):
    machine.pci("0000:0d:00.0", "pci0000:0c", 0x050210, vendor=0x1E98)
    machine.cxl(0, "0000:0d:00.0", ram=1 << 30)
    (machine.folder("0000:0d:00.0") / "mem0/ram/size").unlink()
    (machine.folder("0000:0d:00.0") / "mem0/pmem/size").unlink()

    info = look(machine, extra=(_specs.CXL,)).detect()

    assert links(info, "cxl") == {}
    assert info.find("0000:0d:00.0").memory_bytes is None
    assert any("size of mem0" in w for w in info.warnings)


def test_amd_gpus_and_their_links_come_without_a_library(machine, look):
    amd(machine).kfd(AMD, xgmi={(0, 1): 64000, (1, 0): 64000, (1, 2): 64000, (2, -1): 36000})

    info = look(machine, extra=(_specs.KFD,)).detect()

    assert [(d.index, d.uuid, d.memory_bytes) for d in info.accelerators] == [
        (i, f"GPU-{1000 + i:016x}", 192 << 30) for i in range(3)
    ]
    assert links(info, "xgmi") == {
        (AMD[0], AMD[1]): (1, 64e9, "stated"),
        (AMD[1], AMD[2]): (1, 64e9, "stated"),
        (AMD[2], "numa:0"): (1, 36e9, "inferred"),
    }


def test_gpus_reached_through_others_have_no_link_of_their_own(machine, look):
    amd(machine).kfd(AMD, xgmi={(0, 1): 1, (1, 2): 1, (0, 2): 1}, far=[(0, 2)])

    info = look(machine, extra=(_specs.KFD,)).detect()

    assert set(links(info, "xgmi")) == {(AMD[0], AMD[1]), (AMD[1], AMD[2])}
    assert [(p.a, p.b, p.via) for p in info.pairs] == [(AMD[0], AMD[2], "xgmi")]


def test_nodes_that_a_container_hides_are_a_warning(machine, look):
    amd(machine).kfd(AMD)
    folder = machine.root / "sys/class/kfd/kfd/topology/nodes/2"
    (folder / "properties").write_text("")

    info = look(machine, extra=(_specs.KFD,)).detect()

    assert [d.index for d in info.accelerators] == [0, 1, None]
    assert any("1 nodes are unreadable" in w for w in info.warnings)


def test_rocr_and_hip_choose_by_uuid_and_index(machine, look):
    amd(machine).kfd(AMD)
    environ = {"ROCR_VISIBLE_DEVICES": f"GPU-{1002:016x},0", "HIP_VISIBLE_DEVICES": "1"}

    info = look(machine, extra=(_specs.KFD,), environ=environ).detect()

    assert [d.visible_index for d in info.accelerators] == [0, None, None]


class StubAmdSmi:
    """Answers like amdsmi for a chain of GPUs; the one of number `broken` has no address."""

    def __init__(self, busids, broken=None):
        self._busids, self._broken, self.open = busids, broken, 0

    def amdsmi_init(self):
        self.open += 1

    def amdsmi_shut_down(self):
        self.open -= 1

    def amdsmi_get_processor_handles(self):
        return list(range(len(self._busids)))

    def amdsmi_get_gpu_device_bdf(self, handle):
        if handle == self._broken:
            raise RuntimeError("AMDSMI_STATUS_NOT_INIT")
        return self._busids[handle].upper()

    def amdsmi_get_gpu_asic_info(self, handle):
        return {"market_name": "AMD Drawn"}

    def amdsmi_topo_get_numa_node_number(self, handle):
        return 0

    def amdsmi_topo_get_link_type(self, a, b):
        return {"hops": 1, "type": 2}

    def amdsmi_topo_get_link_weight(self, a, b):
        return 15 * (b - a)

    def amdsmi_get_minmax_bandwidth_between_processors(self, a, b):
        return {"min_bandwidth": 1, "max_bandwidth": 50000}

    def amdsmi_is_P2P_accessible(self, a, b):  # noqa: N802
        return b == a + 1


def test_amd_library_agrees_with_the_kernel_and_is_closed(machine, look):
    amd(machine).kfd(AMD, xgmi={(0, 1): 50000, (1, 2): 50000})
    stub = StubAmdSmi(AMD)
    spec = DetectorSpec("amdsmi", 80, lambda: _amdsmi.AmdSmiDetector(lambda: stub), ("0x1002",))

    both = look(machine, extra=(_specs.KFD, spec)).detect()

    assert stub.open == 0
    assert links(both, "xgmi") == links(look(machine, extra=(_specs.KFD,)).detect(), "xgmi")
    assert {p.peer["read"] for p in both.pairs} == {"OK", "NS"}
    assert {d.model for d in both.accelerators} == {"AMD Drawn"}
    assert not [w for w in both.warnings if "believed" in w]


def test_a_sick_amd_gpu_costs_only_itself(machine, look):
    stub = StubAmdSmi(AMD, broken=1)
    spec = DetectorSpec("amdsmi", 80, lambda: _amdsmi.AmdSmiDetector(lambda: stub), ("0x1002",))

    info = look(amd(machine), extra=(spec,)).detect()

    assert [d.model for d in info.accelerators if d.model] == ["AMD Drawn"] * 2
    assert any("AMDSMI_STATUS_NOT_INIT" in w for w in info.warnings)


A, B = "0000:17:00.0", "0000:65:00.0"
TOPO = (
    "\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tNV4\tPIX\t0-3\t0\t\tN/A\nGPU1\tNV4\t X \tSYS\t4-7\t1\t\tN/A\n"
    "NIC0\tPIX\tSYS\t X \n\nNIC Legend:\n\n  NIC0: mlx5_0\n"
)


def tool(answers):
    """A command runner that answers by the first argument, and counts."""
    calls = []

    def run(command, timeout_s):
        calls.append((tuple(command), timeout_s))
        answer = answers.get(command[1], answers.get("*"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    run.calls = calls
    return run


def nvidia(machine):
    machine.pci(A, "pci0000:10", GPU, vendor=0x10DE)
    machine.pci(B, "pci0000:60", GPU, vendor=0x10DE)
    machine.pci("0000:18:00.0", "pci0000:10", NIC, vendor=0x15B3)
    machine.rdma("mlx5_0", "0000:18:00.0")
    return machine


def test_tools_run_only_when_allowed(machine, look):
    run = tool({"*": CommandResult(0, TOPO)})

    look(nvidia(machine), extra=(_specs.NVIDIA_SMI,), run=run).detect()

    assert run.calls == []


def test_what_a_tool_prints_joins_the_devices_of_the_kernel(machine, look):
    query = CommandResult(0, f"0, 0000{A}, GPU-aa\n1, 0000{B}, GPU-bb\n")
    run = tool({"topo": CommandResult(0, TOPO), "--query-gpu=index,pci.bus_id,uuid": query})

    info = look(nvidia(machine), extra=(_specs.NVIDIA_SMI,), run=run, allow_commands=True).detect()

    assert [(d.id, d.uuid, d.numa_nodes) for d in info.accelerators] == [
        (A, "GPU-aa", (0,)),
        (B, "GPU-bb", (1,)),
    ]
    assert links(info, "nvlink") == {(A, B): (4, None, "stated")}
    assert sum(d.kind == "nic" for d in info.devices) == 1
    assert all(0 < timeout_s <= 10 for _, timeout_s in run.calls)


def test_a_driver_is_believed_before_its_tool(machine, look):
    query = CommandResult(0, f"0, 0000{A}, GPU-aa\n1, 0000{B}, GPU-bb\n")
    run = tool({"topo": CommandResult(0, TOPO), "--query-gpu=index,pci.bus_id,uuid": query})
    stub = StubNvml([A, B], peers={A: [B, B], B: [A, A]})

    info = look(
        nvidia(machine), nvml=stub, extra=(_specs.NVIDIA_SMI,), run=run, allow_commands=True
    ).detect()

    assert links(info, "nvlink")[A, B][0] == 2
    assert any("2 nvlink by nvml but 4 by nvidia-smi" in w for w in info.warnings)


def test_a_tool_without_addresses_is_joined_by_order_and_says_so(machine, look):
    run = tool({"topo": CommandResult(0, TOPO), "*": CommandResult(1, "", "not supported")})

    info = look(nvidia(machine), extra=(_specs.NVIDIA_SMI,), run=run, allow_commands=True).detect()

    assert [(d.id, d.index) for d in info.accelerators] == [(A, 0), (B, 1)]
    assert any("in the order of addresses" in w for w in info.warnings)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (TimeoutError("slow"), "did not answer"),
        (CommandResult(0, "Failed to initialize NVML: Driver/library mismatch\n"), "no table"),
        (CommandResult(9, "", "NVIDIA-SMI has failed"), "ended with 9"),
        (CommandResult(0, "\x00" * (1 << 20)), "no table"),
        (PermissionError("no"), "could not be run"),
        (FileNotFoundError("nvidia-smi"), None),
    ],
)
def test_tools_that_fail_are_a_warning(machine, look, answer, words):
    info = look(
        nvidia(machine), extra=(_specs.NVIDIA_SMI,), run=tool({"*": answer}), allow_commands=True
    ).detect()

    told = [w for w in info.warnings if w.startswith("nvidia-smi")]
    assert info.num_devices == 2
    assert told == [] if words is None else any(words in w for w in told)


def test_a_tool_that_really_hangs_is_ended(tmp_path, machine, look, monkeypatch):
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    run = make_context(environ={}).run
    manager = look(nvidia(machine), extra=(_specs.NVIDIA_SMI,), allow_commands=True, run=run)

    info = manager.detect(deadline_s=0.4)

    assert info.num_devices == 2
    assert any("nvidia-smi" in w for w in info.warnings)


XML = (
    '<system version="1"><cpu numaid="1" affinity="f0"><pci busid="ffff:ff:01.0" class="0x060400">'
    f'<pci busid="{A}" class="0x030200"/><pci busid="{B}" class="0x030200"/></pci></cpu></system>'
)


def test_a_named_file_is_believed_before_all_others(machine, look):
    nvidia(machine)
    (machine.root / "etc").mkdir()
    (machine.root / "etc/topo.xml").write_text(XML)

    manager = look(machine, extra=(_specs.TOPO_FILE,), environ={"NCCL_TOPO_FILE": "/etc/topo.xml"})

    assert manager.path(A, B).kind == "PIX"
    assert manager.detect().find(A).numa_nodes == (1,)
    assert manager.detect().find(A).vendor == "nvidia"


def test_the_file_of_a_virtual_machine_is_found_by_its_place(machine, look):
    nvidia(machine)
    folder = machine.root / "var/run/nvidia-topologyd"
    folder.mkdir(parents=True)
    (folder / "virtualTopology.xml").write_text(XML)

    assert look(machine, extra=(_specs.TOPO_FILE,)).path(A, B).kind == "PIX"


@pytest.mark.parametrize(
    "content", [None, "", "<broken", "<!DOCTYPE a [<!ENTITY b 'c'>]><system/>"]
)
def test_a_bad_file_is_a_warning(machine, look, content):
    if content is not None:
        (machine.root / "topo.xml").write_text(content)

    info = look(
        nvidia(machine), extra=(_specs.TOPO_FILE,), environ={"NCCL_TOPO_FILE": "/topo.xml"}
    ).detect()

    assert info.num_devices == 2
    assert any(w.startswith("topo-file: ") for w in info.warnings)


def test_a_pipe_in_place_of_a_file_does_not_hang(machine, look):
    os.mkfifo(machine.root / "topo.xml")

    environ = {"NCCL_TOPO_FILE": "/topo.xml"}
    info = look(machine, extra=(_specs.TOPO_FILE,), environ=environ).detect()

    assert any("no regular file" in w for w in info.warnings)
