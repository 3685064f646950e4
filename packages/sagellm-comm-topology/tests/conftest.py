"""Drawn machines that the tests look at in place of real ones."""

import sys
import threading
from pathlib import Path

import pytest

from sagellm.comm.topology import TopologyManager, _nvml, _sysfs_net, _sysfs_numa, _sysfs_pci
from sagellm.comm.topology.benchmarks.fake_machine import FakeMachine, StubNvml, draw_hgx
from sagellm.core.protocols import DetectorSpec

sys.path.append(str(Path(__file__).parent))  # helpers lie beside the tests

SYSFS = (_sysfs_pci.SPEC, _sysfs_numa.SPEC, _sysfs_net.SPEC)
HGX_GPUS = tuple(f"0000:{0x13 + 0x30 * p + i:02x}:00.0" for p in range(4) for i in range(2))


class MemoryStore:
    """A store of one process, shaped like torch.distributed's."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self.values: dict[str, str] = {}

    def set(self, key, value):
        with self._lock:
            self.values[key] = value
            self._lock.notify_all()

    def get(self, key):
        with self._lock:
            if not self._lock.wait_for(lambda: key in self.values, timeout=10):
                raise TimeoutError(key)
            return self.values[key].encode()

    def check(self, keys):
        with self._lock:
            return all(k in self.values for k in keys)

    def add(self, key, amount):
        with self._lock:
            value = int(self.values.get(key, "0")) + amount
            self.values[key] = str(value)
            return value


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def machine(tmp_path):
    """An empty machine to draw on."""
    return FakeMachine(tmp_path / "root")


@pytest.fixture
def look():
    """Detect on a drawn machine, with NVML answers if a stub is given."""

    def manager(root, *, nvml=None, environ=None, extra=(), **kwargs):
        specs = [*SYSFS, *extra]
        if nvml is not None:
            detector = _nvml.NvmlDetector(lambda: nvml)
            specs.append(DetectorSpec("nvml", 80, lambda: detector, ("0x10de",)))
        root = root.root if isinstance(root, FakeMachine) else root
        kwargs.setdefault("detectors", specs)
        return TopologyManager(root=root, environ=environ or {}, **kwargs)

    return manager


@pytest.fixture(scope="session")
def hgx_root(tmp_path_factory):
    """An eight-GPU server with 80 PCI functions."""
    return draw_hgx(tmp_path_factory.mktemp("hgx") / "root", functions=80).root


@pytest.fixture
def hgx_gpus():
    return HGX_GPUS


@pytest.fixture
def hgx(look, hgx_root, hgx_gpus):
    """The eight-GPU server with every GPU on the NVSwitches."""
    stub = StubNvml(hgx_gpus, peers={g: ["switch"] * 18 for g in hgx_gpus})
    return look(hgx_root, nvml=stub)


@pytest.fixture
def shared_samples():
    """Recorded machines beside the checkout; skips without them."""
    for folder in Path(__file__).resolve().parents:
        found = folder / "shared/data/topology"
        if not found.is_dir():
            found = folder.parent / "shared/data/topology"
        if found.is_dir():
            return found
    pytest.skip("recorded machines are not beside this checkout (../shared/data/topology)")
