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
backend = create_comm_backend({name!r})
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
sending = channel.transfer(kv_blocks, target_node=1)
received = receiver.receive(None).wait(timeout_s=20)
sending.wait(timeout_s=20)
assert all(torch.equal(a, b.tensor) for a, b in zip(kv_blocks, received.blocks, strict=True))
channel.close(); receiver.close()
"""

OVERLAP = """
from sagellm.comm.overlap import OverlapManager
ran = []
compute_fn, comm_fn = (lambda: ran.append("compute")), (lambda: ran.append("comm"))
overlap_mgr = OverlapManager()
overlap_mgr.schedule(compute_fn, comm_fn).wait(timeout_s=20)
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

NEED_HARDWARE = {
    "nccl": "from sagellm.comm.collective_ops import create_comm_backend\n"
    'create_comm_backend("nccl")',
    "rccl": "from sagellm.comm.collective_ops import create_comm_backend\n"
    'create_comm_backend("rccl")',
    "NCCLBackend": "from sagellm.comm.collective_ops import NCCLBackend\n"
    "from sagellm.comm.topology import TopologyManager\n"
    "NCCLBackend(topology_manager=TopologyManager())",
    "hccl": "from sagellm.comm.domestic import create_domestic_backend\n"
    'create_domestic_backend("hccl")',
    "cncl": "from sagellm.comm.domestic import create_domestic_backend\n"
    'create_domestic_backend("cncl")',
}


@pytest.mark.parametrize("program", LINES.values(), ids=LINES.keys())
def test_line_runs_as_it_stands(program, run_python):
    run_python("-c", program)


@pytest.mark.parametrize("name", NEED_HARDWARE)
def test_line_without_its_hardware_says_what_is_missing(name, run_python):
    program = "\n".join(
        [
            "from sagellm.core.protocols import BackendUnavailableError",
            "try:",
            *(f"    {line}" for line in NEED_HARDWARE[name].splitlines()),
            "except BackendUnavailableError as e:",
            "    print('unavailable:', e)",
            "else:",
            "    print('available')",
        ]
    )

    said = run_python("-c", program).stdout

    assert said == "available\n" or len(said) > len("unavailable: ") + 20
