"""Ring or tree, by cost model, by topology, or left to the library."""

from unittest.mock import Mock

import pytest

from sagellm.comm.collective_ops._algorithm import (
    Fabric,
    apply_algorithm,
    choose_algorithm,
    read_fabric,
)
from sagellm.comm.collective_ops._specs import NCCL, RCCL
from sagellm.core.protocols import (
    ConfigError,
    CostModelProtocol,
    CostTable,
    Device,
    Estimate,
    Path,
    TopologyInfo,
    TopologyManagerProtocol,
)

TABLE = CostTable("here", 1, {})


def model(choose):
    found = Mock(spec=CostModelProtocol)
    found.freeze.return_value = TABLE
    found.select.side_effect = lambda table, op, nbytes, group: (
        choose(nbytes),
        Estimate(1.0, 0.5, 2.0, None, "measured"),
    )
    return found


def choose(asked="auto", size=8, cost_model=None, fabric=None):
    return choose_algorithm(asked, size, cost_model, TABLE, fabric)


def test_algorithm_that_wins_everywhere_is_forced():
    choice = choose(cost_model=model(lambda n: "tree"))
    assert choice.algorithm == "tree"
    assert "cost model here" in choice.reason


def test_mixed_winners_leave_the_tuner_alone():
    choice = choose(cost_model=model(lambda n: "tree" if n < 1 << 20 else "ring"))
    assert choice.algorithm is None
    assert "ring at 6, tree at 5 of 11" in choice.reason


def test_algorithm_nccl_does_not_have_is_not_forced():
    assert choose(cost_model=model(lambda n: "halving_doubling")).algorithm is None


def test_topology_without_figures_leaves_the_tuner_alone():
    assert choose(fabric=Fabric(8, None, 1e9)).algorithm is None


def test_topology_prefers_tree_for_latency_and_ring_for_bandwidth():
    fabric = Fabric(8, 1e-6, 1e9)
    assert fabric.fastest(1 << 10, 8)[0] == "tree"
    assert fabric.fastest(1 << 30, 8)[0] == "ring"
    assert choose(fabric=fabric).algorithm is None
    assert choose(size=2, fabric=fabric).algorithm == "ring"


def test_explicit_algorithm_wins_and_rubbish_is_refused():
    assert choose("ring", cost_model=model(lambda n: "tree")).algorithm == "ring"
    with pytest.raises(ConfigError, match="'star' is not one of auto, ring, tree"):
        choose("star")


def test_nothing_to_choose_by_and_nobody_to_talk_to():
    assert choose().algorithm is None
    assert choose(size=1, cost_model=model(lambda n: "tree")).algorithm is None


def test_choice_is_told_to_the_library_unless_the_user_did(monkeypatch):
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    assert apply_algorithm(choose()) == choose()
    applied = apply_algorithm(choose("tree"))
    assert applied.reason.startswith("NCCL_ALGO=Tree")
    assert applied.algorithm == "tree"
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    applied = apply_algorithm(choose("tree"))
    assert "was set before and stays" in applied.reason
    assert applied.algorithm is None
    assert apply_algorithm(choose("ring")).algorithm == "ring"


def test_newer_library_is_told_of_all_reduce_alone(monkeypatch):
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    assert apply_algorithm(choose("tree"), version=(2, 24, 3)).reason.startswith(
        "NCCL_ALGO=allreduce:tree"
    )
    assert apply_algorithm(choose("tree"), version=(2, 24, 3)).algorithm == "tree"
    monkeypatch.delenv("NCCL_ALGO")
    assert apply_algorithm(choose("ring"), version=(2, 21)).reason.startswith("NCCL_ALGO=Ring")
    monkeypatch.delenv("NCCL_ALGO")


def test_nothing_is_claimed_of_a_group_that_was_there_before(monkeypatch, caplog):
    monkeypatch.delenv("NCCL_ALGO", raising=False)

    first = apply_algorithm(choose("tree"), group_exists=True)
    second = apply_algorithm(choose("tree"), group_exists=True)

    assert (first.algorithm, second.algorithm) == (None, None)
    assert "was there before and may keep" in first.reason
    assert [r.message for r in caplog.records] == [first.reason]
    monkeypatch.delenv("NCCL_ALGO")


def test_fabric_is_the_slowest_path_between_accelerators():
    manager = Mock(spec=TopologyManagerProtocol)
    manager.detect.return_value = TopologyInfo(
        devices=(Device("a", "gpu"), Device("b", "gpu"), Device("n", "nic"), Device("c", "gpu"))
    )
    speeds = {("a", "b"): 3e9, ("a", "c"): 1e9, ("b", "c"): 2e9}
    manager.path.side_effect = lambda a, b: Path(
        a, b, "LINK", 1, bottleneck_bytes_per_s=speeds[a, b], latency_s=1e-6
    )
    assert read_fabric(manager) == Fabric(3, 1e-6, 1e9)
    manager.path.side_effect = lambda a, b: Path(a, b, None, None)
    assert read_fabric(manager) == Fabric(3, None, None)


def test_probes_give_reasons(monkeypatch, tmp_path):
    from sagellm.comm.collective_ops import _specs

    lib = tmp_path / "lib"
    lib.mkdir()
    monkeypatch.setattr(_specs, "_torch_folder", lambda: tmp_path)
    (lib / "libtorch_hip.so").touch()
    assert "use rccl" in NCCL.probe().reason
    monkeypatch.setattr(_specs.Path, "exists", lambda self: self.name == "libtorch_hip.so")
    assert "/dev/kfd is missing" in RCCL.probe().reason
    monkeypatch.setattr(_specs.Path, "exists", lambda self: True)
    assert RCCL.probe().available
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "hides every device" in NCCL.probe().reason
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert NCCL.probe().available
    monkeypatch.setattr(_specs, "_torch_folder", lambda: None)
    for spec in (NCCL, RCCL, _specs.GLOO):
        assert "pip install torch" in spec.probe().reason
