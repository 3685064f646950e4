"""Options of groups, and which algorithm they say they choose."""

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from sagellm.core.protocols import (  # noqa: E402
    CommTimeoutError,
    ConfigError,
    CostModelProtocol,
    CostTable,
    Estimate,
    IntegrityError,
    UnsupportedOperationError,
)
from sagellm.core.protocols.bandwidth import busbw_factor  # noqa: E402
from sagellm.core.protocols.process_group import (  # noqa: E402
    ProcessGroupBackend,
    completed_future,
    table_by_store,
)


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_busbw_factors_are_those_of_nccl_tests():
    factors = {op: busbw_factor(op, 8) for op in ("all_reduce", "reduce_scatter", "broadcast")}
    assert factors == {"all_reduce": 1.75, "reduce_scatter": 0.875, "broadcast": 1.0}


def test_completed_future_holds_result_or_error():
    assert completed_future(3).wait() == 3
    with pytest.raises(ConfigError):
        completed_future(None, ConfigError("x")).wait()


def test_options_device_and_deadline_are_checked(spec):
    with pytest.raises(
        ConfigError, match="gloo has no option nonsense; known: check_calls, flight_entries"
    ):
        ProcessGroupBackend(spec, None, options={"nonsense": 1})
    with pytest.raises(ConfigError, match="gloo serves cpu, not meta"):
        ProcessGroupBackend(spec, None, device="meta")
    with pytest.raises(ConfigError, match="above 0"):
        ProcessGroupBackend(spec, None, timeout_s=0)


def cost_model(name, algorithm, time_us):
    """A model whose table is its own, and which reads whatever table it is given."""
    from unittest.mock import Mock

    model = Mock(spec=CostModelProtocol)
    curve = {("all_reduce", algorithm, 2): ((1, time_us), (1024, time_us / 3))}
    model.freeze.return_value = CostTable(name, 1, curve)

    def select(table, op, nbytes, group):
        ((_, found, _), points), *_ = table.curves.items()
        return found, Estimate(points[-1][1], 0.0, 1e9, None, "calibrated")

    model.select.side_effect = select
    return model


def test_explain_is_rank_0s_on_every_rank(ranks, spec):
    groups = ranks(2).groups()
    models = [cost_model("ring-host", "ring", 0.1), cost_model("tree-host", "tree", 9.0)]

    def one(rank):
        with ProcessGroupBackend(spec, groups[rank], timeout_s=5, cost_model=models[rank]) as b:
            same(b.all_reduce(torch.ones(2)), torch.full((2,), 2.0))
            return b.explain("all_reduce", 1024)

    first, second = ranks(2).pool.map(one, range(2))
    assert first == second
    assert first.algorithm == "ring"
    assert first.estimate_us == 0.1 / 3
    assert "ring-host" in first.reason


def test_rank_that_hands_in_no_model_is_waited_for_no_longer_than_the_deadline(ranks, spec):
    groups = ranks(2).groups()
    model = cost_model("x", "ring", 1.0)
    with pytest.raises(CommTimeoutError, match="on all ranks or on none"):
        ProcessGroupBackend(spec, groups[1], timeout_s=0.3, cost_model=model)


def test_table_by_store_is_rank_0s_and_bounded():
    store = dist.HashStore()
    ours, theirs = (cost_model(n, "ring", 2.0).freeze() for n in ("first", "second"))
    assert table_by_store(store, 0, ours, 1) == ours
    assert table_by_store(store, 1, theirs, 1) == ours
    with pytest.raises(CommTimeoutError, match="rank 0 gave no cost table"):
        table_by_store(store, 1, theirs, 0.05)
    store.set("sagellm/cost_table/3", b"rubbish")
    with pytest.raises(IntegrityError, match="cannot be read"):
        table_by_store(store, 1, theirs, 1)


def test_group_outside_the_default_world_cannot_be_split(ranks):
    with pytest.raises(UnsupportedOperationError, match="init_process_group first"):
        ranks(2).backends()[0].split([0])


def test_explain_follows_the_cost_model(spec):
    from unittest.mock import Mock

    model = Mock(spec=CostModelProtocol)
    model.freeze.return_value = CostTable("here", 1, {})
    model.select.return_value = ("tree", Estimate(7.0, 6.0, 8.0, None, "measured"))
    choice = ProcessGroupBackend(spec, None, cost_model=model).explain("all_reduce", 1024)
    assert (choice.algorithm, choice.estimate_us) == ("tree", 7.0)
    assert "cost model here" in choice.reason
    with pytest.raises(UnsupportedOperationError):
        ProcessGroupBackend(spec, None).explain("teleport", 1)
