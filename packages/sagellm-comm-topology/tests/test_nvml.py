"""What the driver's library adds, asked through a stand-in; unverified on hardware."""

import threading

import pytest

from sagellm.comm.topology._nvml import NvmlDetector
from sagellm.comm.topology.benchmarks.fake_machine import StubNvml
from sagellm.comm.topology.detector import make_context

A, B, C = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"


@pytest.fixture
def gpus(machine):
    for i, bdf in enumerate((A, B, C), 1):
        machine.pci(f"0000:00:0{i}.0", "pci0000:00", 0x060400)
        machine.pci(bdf, f"0000:00:0{i}.0", 0x030200, vendor=0x10DE, numa=-1)
    return machine


def test_driver_facts_join_the_pci_function(gpus, look):
    info = look(gpus, nvml=StubNvml([A, B, C])).detect()

    first = info.accelerators[0]

    assert (first.id, first.index, first.model) == (A, 0, "NVIDIA Fake 80GB")
    assert first.uuid == "GPU-00000000-fake"
    assert first.memory_bytes == 80 << 30
    assert first.attrs["pci_vendor"] == "0x10de"


def test_lanes_to_one_peer_are_one_link_of_their_sum(gpus, look):
    stub = StubNvml([A, B, C], peers={A: [B] * 4, B: [A] * 4}, lane_mbps=25_000)

    path = look(gpus, nvml=stub).path(A, B)

    assert (path.kind, path.links[0].count, path.links[0].confidence) == ("LINK", 4, "stated")
    assert path.bottleneck_bytes_per_s == pytest.approx(100e9)
    assert look(gpus, nvml=stub).path(A, C).kind == "PHB"


@pytest.mark.parametrize(
    ("links", "count", "bandwidth"),
    [([45_000] * 10, 10, 450e9), ([45_000] * 4 + [None], 4, 180e9), ([], 1, None), ([0], 1, None)],
)
def test_coherent_links_have_their_count_and_bandwidth(gpus, look, links, count, bandwidth):
    gpus.numa(0, "0-3", (10,))
    stub = StubNvml([A, B], numa={A: 0, B: 0}, c2c={A: links})

    info = look(gpus, nvml=stub).detect()

    (link,) = [x for x in info.links if x.kind == "c2c"]
    assert (link.a, link.b, link.count) == (A, "numa:0", count)
    assert link.bandwidth_bytes_per_s == bandwidth


def test_lanes_to_a_switch_make_a_domain(gpus, look):
    stub = StubNvml([A, B, C], peers={g: ["switch"] * 18 for g in (A, B, C)})

    info = look(gpus, nvml=stub).detect()

    assert info.domains[0].members == (A, B, C)
    assert info.domains[0].confidence == "stated"


def test_lanes_to_an_unnamed_end_infer_a_switch(gpus, look):
    stub = StubNvml([A, B, C], peers={g: [None] * 12 for g in (A, B, C)})

    info = look(gpus, nvml=stub).detect()

    assert info.domains[0].confidence == "inferred"


def test_lanes_to_the_processor_are_no_switch(gpus, look):
    info = look(gpus, nvml=StubNvml([A, B], peers={g: ["cpu"] * 2 for g in (A, B)})).detect()

    assert info.domains == ()
    assert any("lead to the CPU" in w for w in info.warnings)


def test_one_gpu_on_a_switch_is_no_domain(gpus, look):
    info = look(gpus, nvml=StubNvml([A, B, C], peers={A: ["switch"] * 18})).detect()

    assert info.domains == ()
    assert not any(x.kind == "nvlink" for x in info.links)


def test_a_sick_gpu_costs_only_itself(gpus, look):
    info = look(gpus, nvml=StubNvml([A, B, C], broken=1)).detect()

    assert [d.uuid for d in info.accelerators] == ["GPU-00000000-fake", "GPU-00000002-fake", None]
    assert any("nvmlDeviceGetHandleByIndex(1)" in w for w in info.warnings)


def test_numa_of_the_driver_fills_a_hole_of_the_firmware(gpus, look):
    gpus.numa(0, "0-3", (10, 20))
    gpus.numa(1, "4-7", (20, 10))
    manager = look(gpus, nvml=StubNvml([A], numa={A: 1}))

    assert manager.detect().find(A).numa_nodes == (1,)
    assert manager.affinity(A).cpulist == "4-7"
    assert manager.path(A, "numa:1").kind == "PHB"


def test_peer_access_is_kept_apart_from_paths(gpus, look):
    info = look(gpus, nvml=StubNvml([A, B], peers={A: [B], B: [A]})).detect()

    (pair,) = info.pairs
    assert (pair.a, pair.b, pair.path) == (A, B, None)
    assert dict(pair.peer) == {"read": "OK", "write": "OK", "atomics": "OK"}


def test_refused_peer_access_says_why_and_leaves_the_path(gpus, look):
    manager = look(gpus, nvml=StubNvml([A, B], ancestors={frozenset((A, B)): 30}, p2p=2))

    (pair,) = manager.detect().pairs

    assert (pair.path, pair.peer["read"]) == ("PHB", "GNS")
    assert manager.path(A, B).kind is not None


def test_class_of_the_driver_serves_where_the_pci_tree_is_hidden(tmp_path, look):
    stub = StubNvml([A, B], ancestors={frozenset((A, B)): 50})
    dev = tmp_path / "dev"
    dev.mkdir()
    (dev / "nvidiactl").touch()

    path = look(tmp_path, nvml=stub).path(A, B)

    assert (path.kind, path.hops, path.links) == ("SYS", None, ())


def test_nvlinks_to_the_processor_are_links_to_its_node(gpus, look):
    gpus.numa(0, "0-3", (10,))
    info = look(gpus, nvml=StubNvml([A], peers={A: ["cpu"] * 3}, numa={A: 0})).detect()

    (link,) = [x for x in info.links if x.kind == "nvlink"]

    assert (link.a, link.b, link.count, link.confidence) == (A, "numa:0", 3, "inferred")


def test_library_is_closed_and_missing_library_is_a_warning(tmp_path):
    def absent():
        raise ImportError("No module named 'pynvml'")

    stub = StubNvml([A])
    context = make_context(root=tmp_path, environ={})

    NvmlDetector(lambda: stub).detect(context)
    missing = NvmlDetector(absent).detect(context)

    assert stub.open == 0
    assert "sagellm-comm-topology[nvidia]" in missing.warnings[0]


def test_library_that_does_not_start_is_a_warning(tmp_path):
    class Broken(StubNvml):
        def nvmlInit(self):  # noqa: N802
            raise self.NVMLError(9)

    fragment = NvmlDetector(lambda: Broken([A])).detect(make_context(root=tmp_path, environ={}))

    assert "does not start" in fragment.warnings[0]


def test_recorded_machine_is_never_mixed_with_the_live_driver(tmp_path):
    fragment = NvmlDetector().detect(make_context(root=tmp_path, environ={}))

    assert fragment.devices == ()
    assert fragment.warnings == ()


def test_deadline_cuts_the_questions_short(gpus):
    now = iter(range(10_000))
    context = make_context(root=gpus.root, environ={}, clock=lambda: next(now), deadline_s=2)

    fragment = NvmlDetector(lambda: StubNvml([A, B, C])).detect(context)

    assert len(fragment.devices) < 3
    assert any("deadline" in w for w in fragment.warnings)


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        ({}, [A, B, C]),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, [C, A]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-00000001-fake,0"}, [B, A]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-00000002"}, [C]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-0000000"}, []),  # three devices could be meant
        ({"CUDA_VISIBLE_DEVICES": "MIG-x1"}, [B]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-GPU-00000002-fake/3/0"}, [C]),
        ({"CUDA_VISIBLE_DEVICES": "0,7,1"}, [A]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "1,1"}, []),
        ({"HIP_VISIBLE_DEVICES": "1"}, [A, B, C]),
    ],
)
def test_visibility_variables_number_the_devices(gpus, look, variables, seen):
    stub = StubNvml([A, B, C], mig={B: ["MIG-x1", "MIG-x2"]})
    manager = look(gpus, nvml=stub, environ=variables)

    visible = [d for d in manager.detect().accelerators if d.visible_index is not None]

    assert [d.id for d in sorted(visible, key=lambda d: d.visible_index)] == seen
    assert manager.detect().num_devices == 3
    assert [manager.device(i).id for i in range(len(seen))] == seen


def test_a_gpu_that_hangs_costs_only_itself_and_those_after_it(gpus, look):
    stub, release = StubNvml([A, B, C], peers={A: [B], B: [A]}), threading.Event()
    answer = stub.nvmlDeviceGetName
    stub.nvmlDeviceGetName = lambda handle: (handle == C and release.wait(20)) or answer(handle)

    try:
        info = look(gpus, nvml=stub).detect(deadline_s=0.6)
    finally:
        release.set()

    assert [d.uuid for d in info.accelerators] == ["GPU-00000000-fake", "GPU-00000001-fake", None]
    words = " ".join(info.warnings)
    assert "nvml did not answer before the deadline; 2 devices it had read are kept" in words
    assert "2 of 3 GPUs answered" in words
