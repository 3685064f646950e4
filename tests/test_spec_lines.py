"""Every line of the public interface runs as it stands, each group in a new interpreter."""

import pytest

TOPOLOGY = """
from sagellm.comm.topology import TopologyManager
manager = TopologyManager()
topo_info = manager.detect()
assert topo_info.num_devices >= 0
"""

BACKEND = """
import torch
from sagellm.comm.collective_ops import create_comm_backend, NCCLBackend
tensor = torch.arange(4.0)
backend = create_comm_backend("{name}")
result = backend.all_reduce(tensor)
assert result is tensor
handle = backend.all_reduce(tensor, async_op=True); handle.wait()
assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0]
backend.close()
"""

WITH_TOPOLOGY = """
from sagellm.comm.collective_ops import create_comm_backend
from sagellm.comm.topology import TopologyManager
backend = create_comm_backend("gloo", topology_manager=TopologyManager())
assert backend.explain("all_reduce", 1 << 20).algorithm
"""

KV_TRANSFER = """
import torch
from sagellm.comm.kv_transfer import KVTransferChannel
kv_blocks = [torch.randn(16, 4, 8) for _ in range(3)]
receiver = KVTransferChannel(node_id=1)
channel = KVTransferChannel()
channel.transfer(kv_blocks, target_node=1)
first = receiver.receive(None).wait(timeout_s=20)
sending = channel.transfer(kv_blocks, target_node=1)
received = receiver.receive(None).wait(timeout_s=20)
sending.wait(timeout_s=20)
assert all(torch.equal(a, b.tensor) for a, b in zip(kv_blocks, received.blocks, strict=True))
assert len(first.blocks) == 3
channel.close(); receiver.close()
"""

OVERLAP = """
from sagellm.comm.overlap import OverlapManager
ran = []
compute_fn, comm_fn = (lambda: ran.append("compute")), (lambda: ran.append("comm"))
overlap_mgr = OverlapManager()
overlap_mgr.schedule(compute_fn, comm_fn)
overlap_mgr.schedule([compute_fn] * 2, [comm_fn] * 2).wait(timeout_s=20)
assert sorted(ran) == ["comm"] * 3 + ["compute"] * 3
"""

OVERLAP_WITH_BACKEND = """
import torch
from sagellm.comm.collective_ops import create_comm_backend
from sagellm.comm.overlap import OverlapManager
backend = create_comm_backend("gloo")
overlap_mgr = OverlapManager(comm_backend=backend)
x = torch.ones(4)
overlap_mgr.schedule(lambda: x + 1, lambda: backend.all_reduce(torch.ones(4))).wait(timeout_s=20)
"""

MOCK = """
from unittest.mock import Mock
from sagellm.core.protocols import TopologyManagerProtocol
from sagellm.comm.collective_ops import create_comm_backend
manager = Mock(spec=TopologyManagerProtocol)
try:
    manager.no_such_method
except AttributeError:
    pass
else:
    raise SystemExit("the mock has names that the protocol lacks")
create_comm_backend("mock", topology_manager=manager).close()
"""

LINES = {
    "topology": TOPOLOGY,
    "gloo": BACKEND.format(name="gloo"),
    "mock": BACKEND.format(name="mock"),
    "auto": BACKEND.format(name="auto"),
    "gloo with a topology manager": WITH_TOPOLOGY,
    "kv_transfer": KV_TRANSFER,
    "overlap": OVERLAP,
    "overlap with a backend": OVERLAP_WITH_BACKEND,
    "Mock(spec=TopologyManagerProtocol)": MOCK,
}

# What is missing, and what to do about it: an answer has to hold one of each.
NO_NVIDIA = ("without CUDA", "CUDA_VISIBLE_DEVICES", "no NVIDIA device")
NO_AMD = ("without ROCm", "libtorch_hip.so", "/dev/kfd is missing")
NO_ASCEND = ("torch_npu", "CANN", "npu")
NO_CAMBRICON = ("torch_mlu", "Neuware", "mlu")
COLLECTIVES = "from sagellm.comm.collective_ops import create_comm_backend, NCCLBackend\n"
TOPOLOGIES = "from sagellm.comm.topology import TopologyManager\n"
DOMESTIC = "from sagellm.comm.domestic import create_domestic_backend\n"
NEED_HARDWARE = {
    "nccl": (COLLECTIVES, 'backend = create_comm_backend("nccl")', NO_NVIDIA),
    "nccl with a topology manager": (
        COLLECTIVES + TOPOLOGIES,
        'backend = create_comm_backend("nccl", topology_manager=TopologyManager())',
        NO_NVIDIA,
    ),
    "NCCLBackend": (
        COLLECTIVES + TOPOLOGIES + "manager = TopologyManager()\n",
        "backend = NCCLBackend(topology_manager=manager)",
        NO_NVIDIA,
    ),
    "rccl": (COLLECTIVES, 'backend = create_comm_backend("rccl")', NO_AMD),
    "hccl": (COLLECTIVES, 'backend = create_comm_backend("hccl")', NO_ASCEND),
    "cncl": (COLLECTIVES, 'backend = create_comm_backend("cncl")', NO_CAMBRICON),
    "domestic hccl": (DOMESTIC, 'backend = create_domestic_backend("hccl")', NO_ASCEND),
    "domestic cncl": (DOMESTIC, 'backend = create_domestic_backend("cncl")', NO_CAMBRICON),
}
NEXT_STEPS = ("install", "unset", "source ", "use create_comm_backend('auto')")

# The public interface that was asked for, line by line; `name` stands for a backend's.
PROMISED = """
from sagellm.comm.topology import TopologyManager
manager = TopologyManager()
topo_info = manager.detect()
from sagellm.comm.collective_ops import create_comm_backend, NCCLBackend
backend = create_comm_backend("nccl")
backend = create_comm_backend("gloo")
backend = create_comm_backend("rccl")
backend = create_comm_backend("hccl")
backend = create_comm_backend("cncl")
backend = create_comm_backend("mock")
backend = create_comm_backend("auto")
result = backend.all_reduce(tensor)
handle = backend.all_reduce(tensor, async_op=True); handle.wait()
backend = create_comm_backend("nccl", topology_manager=TopologyManager())
backend = NCCLBackend(topology_manager=manager)
from sagellm.comm.kv_transfer import KVTransferChannel
channel = KVTransferChannel()
channel.transfer(kv_blocks, target_node=1)
from sagellm.comm.overlap import OverlapManager
overlap_mgr = OverlapManager()
overlap_mgr = OverlapManager(comm_backend=backend)
overlap_mgr.schedule(compute_fn, comm_fn)
from sagellm.comm.domestic import create_domestic_backend
backend = create_domestic_backend("hccl")
backend = create_domestic_backend("cncl")
"""


@pytest.mark.parametrize("program", LINES.values(), ids=LINES.keys())
def test_line_runs_as_it_stands(program, run_python):
    run_python("-c", program)


@pytest.mark.parametrize("name", NEED_HARDWARE)
def test_line_without_its_hardware_says_what_is_missing(name, run_python):
    prelude, line, missing = NEED_HARDWARE[name]
    program = (
        "from sagellm.core.protocols import BackendUnavailableError\n"
        f"{prelude}"
        f"try:\n    {line}\n"
        "except BackendUnavailableError as e:\n    print('unavailable:', e)\n"
        "else:\n    print(backend.name)\n"
    )

    said = run_python("-c", program).stdout

    if said.startswith("unavailable: "):
        assert any(part in said for part in missing), said
        assert any(step in said for step in NEXT_STEPS), said
    else:
        library = next(n for n in ("nccl", "rccl", "hccl", "cncl") if n in line.lower())
        assert said.strip() == library


def test_every_promised_line_is_one_of_those_that_ran():
    ran = "\n".join([*LINES.values(), *("".join(parts[:2]) for parts in NEED_HARDWARE.values())])
    promised = PROMISED.strip().splitlines()

    assert [line for line in promised if line not in ran] == []


def test_every_benchmark_runs_as_a_module(package, run_python):
    files = sorted((package.folder / "benchmarks").glob("bench_*.py"))

    assert files
    for file in files:
        said = run_python("-m", f"{package.module}.benchmarks.{file.stem}", "--help").stdout
        assert all(option in said for option in ("--quick", "--json", "--markdown"))
