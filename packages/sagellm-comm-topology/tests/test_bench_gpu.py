"""The benchmark of real GPUs, played with stand-ins for the few calls of torch that it makes."""

from types import SimpleNamespace

import pytest

from sagellm.comm.topology.benchmarks import bench_gpu
from sagellm.comm.topology.benchmarks.fake_machine import StubNvml
from sagellm.core.protocols.bench import Missing, Row

A, B = "0000:01:00.0", "0000:02:00.0"


class Tensor:
    def __init__(self, nbytes, device, log):
        self.nbytes, self.device, self._log = nbytes, device, log
        self.is_cuda = device != "cpu"

    def copy_(self, source, non_blocking=False):
        assert non_blocking
        assert self.nbytes == source.nbytes
        self._log.append(("copy", source.device, self.device))


def fake_torch(gpus, uuids=()):
    log = []

    def empty(nbytes, *, dtype, device="cpu", pin_memory=False):
        assert dtype == "uint8"
        assert pin_memory == (device == "cpu")
        return Tensor(nbytes, device, log)

    cuda = SimpleNamespace(
        is_available=lambda: gpus > 0,
        device_count=lambda: gpus,
        synchronize=lambda device: log.append(("wait", device)),
        get_device_properties=lambda i: SimpleNamespace(**({"uuid": uuids[i]} if uuids else {})),
    )
    return SimpleNamespace(cuda=cuda, empty=empty, uint8="uint8", log=log)


@pytest.fixture
def two_gpus(machine, look, monkeypatch):
    """Two GPUs, each below a switch of its own, with four NVLinks between them."""
    for i, bdf in enumerate((A, B), 1):
        machine.pci(f"0000:00:0{i}.0", "pci0000:00", 0x060400, speed="32.0 GT/s PCIe", width=16)
        machine.pci(
            bdf, f"0000:00:0{i}.0", 0x030200, vendor=0x10DE, speed="32.0 GT/s PCIe", width=16
        )
    stub = StubNvml([A, B], peers={A: [B] * 4, B: [A] * 4}, lane_mbps=25_000)
    manager = look(machine, nvml=stub)
    monkeypatch.setattr(bench_gpu, "TopologyManager", lambda: manager)
    return manager


def rows(case, torch, monkeypatch):
    monkeypatch.setattr(bench_gpu.importlib, "import_module", lambda name: torch)
    found = bench_gpu.contenders(case)
    return [
        Row(case, name, missing=c.reason) if isinstance(c, Missing) else Row(case, name, (c(),) * 5)
        for name, c in found.items()
    ]


@pytest.mark.parametrize("what", ["nvml", "copy", "peer"])
def test_without_a_gpu_every_column_is_empty_and_says_why(what, monkeypatch):
    found = rows({"what": what, "nbytes": 1 << 20}, fake_torch(0), monkeypatch)

    assert found
    assert {r.missing for r in found} == {"torch sees no CUDA device here: unverified on hardware"}
    assert all(r.value is None for r in bench_gpu.ratios(found))


def test_without_torch_it_says_so(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(bench_gpu.importlib, "import_module", missing)

    assert "torch is not installed" in bench_gpu.contenders({"what": "copy"})["measured"].reason


def test_copies_to_and_from_the_host_are_set_beside_the_pcie_link(two_gpus, monkeypatch):
    torch = fake_torch(2)
    case = {"what": "copy", "nbytes": 1 << 20}

    found = {r.contender: r for r in rows(case, torch, monkeypatch)}
    ratios = {r.name: r.value for r in bench_gpu.ratios(list(found.values()))}

    link = next(x for x in two_gpus.detect().links if x.kind == "pcie" and A in (x.a, x.b))
    assert found["H2D predicted"].median == (1 << 20) / link.bandwidth_bytes_per_s
    assert set(ratios) == {"H2D predicted/measured time", "D2H predicted/measured time"}
    assert all(value > 0 for value in ratios.values())
    ways = [entry[1:] for entry in torch.log if entry[0] == "copy"]
    assert ways == [("cpu", "cuda:0")] * 4 + [("cuda:0", "cpu")] * 4
    assert torch.log[-1] == ("wait", "cuda:0")


def test_peers_are_set_beside_the_path_and_the_cost_model(two_gpus, monkeypatch):
    case = {"what": "peer", "nbytes": 100 << 20}

    found = {r.contender: r for r in rows(case, fake_torch(2), monkeypatch)}
    names = [r.name for r in bench_gpu.ratios(list(found.values()))]

    assert found["0-1 predicted"].median == pytest.approx((100 << 20) / 100e9)
    assert found["0-1 by the cost model"].median >= found["0-1 predicted"].median
    assert names == ["0-1 predicted/measured time", "0-1 by the cost model/measured time"]


def test_one_gpu_has_no_peer_and_says_so(two_gpus, monkeypatch):
    found = rows({"what": "peer", "nbytes": 1}, fake_torch(1), monkeypatch)

    assert {r.missing for r in found} == {"one GPU has no peer: unverified on hardware"}


def test_torch_devices_are_told_apart_by_uuid(two_gpus):
    second, first = "00000001-fake", "00000000-fake"
    torch = fake_torch(2, uuids=(second, first))

    assert bench_gpu.device_of(torch, two_gpus, 0).id == B
    assert bench_gpu.device_of(torch, two_gpus, 1).id == A
    assert bench_gpu.device_of(fake_torch(2), two_gpus, 1).id == B


def test_the_driver_library_is_timed_within_a_detection(two_gpus, monkeypatch):
    monkeypatch.setattr(bench_gpu, "command", lambda *words: Missing("not here"))

    found = rows({"what": "nvml"}, fake_torch(2), monkeypatch)
    ratios = {r.name: r for r in bench_gpu.ratios(found)}

    assert 0 < found[0].median < 10
    assert ratios["100 ms/p95 of NVML"].goal == 1.0
    assert ratios["nvidia-smi topo -m/NVML"].value is None
