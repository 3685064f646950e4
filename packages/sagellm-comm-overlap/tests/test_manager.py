"""The rest of the manager: protocol, plans, bindings, batches, hooks, switching off, figures."""

import sys
from concurrent.futures import Future
from unittest.mock import Mock

import pytest
import torch

from sagellm.comm.overlap import OverlapManager, OverlapPolicy
from sagellm.core.protocols import (
    BackendUnavailableError,
    CommBackendProtocol,
    CommTimeoutError,
    CompletedWork,
    ConfigError,
    OverlapManagerProtocol,
)


def test_it_is_what_the_protocol_says(manager):
    assert isinstance(manager, OverlapManagerProtocol)

    with OverlapManager() as plain:
        handle = plain.schedule(lambda: 1, lambda: 2)

    assert handle.done()


def test_it_takes_a_mock_of_a_backend(make_manager):
    backend = Mock(spec=CommBackendProtocol)
    manager = make_manager(comm_backend=backend)
    tensor = torch.ones(2)
    backend.all_reduce.return_value = CompletedWork(tensor)

    result = manager.schedule(lambda: 1, lambda: backend.all_reduce(tensor, async_op=True)).wait()

    assert result.comm[0] is tensor


def test_a_plan_runs_many_times_with_bindings(manager):
    graph = manager.graph()
    x = graph.compute(lambda: 1)
    y = graph.compute(lambda x: x + 1, x)
    graph.comm(lambda y: CompletedWork(y * 10), y)
    plan = manager.compile(graph)

    plain = manager.run(plan).wait()
    bound = manager.run(plan, {x: 5}).wait()
    all_bound = manager.run(plan, {0: 1, 1: 2, 2: 3}).wait()

    assert plain.comm == (20,)
    assert bound.compute == (5, 6)
    assert bound.comm == (60,)
    assert all_bound.comm == (3,)
    with pytest.raises(ConfigError, match="task 9"):
        manager.run(plan, {9: 1})


def test_costs_give_predicted_and_saved_time(manager):
    graph = manager.graph()
    for _ in range(2):
        graph.comm(lambda _: None, graph.compute(lambda: None, cost_s=1e-3), cost_s=1e-3)
    plan = manager.compile(graph)

    handle = manager.run(plan)
    handle.wait()
    metrics = handle.metrics

    assert plan.predicted_s == pytest.approx(3e-3)
    assert metrics.bound_s == pytest.approx(2e-3)
    assert metrics.eff_saved == pytest.approx((4e-3 - metrics.makespan_s) / 2e-3)
    assert metrics.bound_ratio == pytest.approx(2e-3 / metrics.makespan_s)


def test_loads_given_to_schedule_are_used(manager):
    handle = manager.schedule(lambda: 1, lambda: 2, loads_s=(1.0, 2.0))
    handle.wait()

    assert handle.metrics.eff_saved == pytest.approx((3.0 - handle.metrics.makespan_s) / 2.0)
    unknown = manager.schedule(lambda: 1, lambda: 2)
    unknown.wait()
    assert unknown.metrics.eff_saved is None


def test_calibration_measures_each_task_alone(manager):
    graph = manager.graph()
    ran = []
    made = graph.compute(lambda: ran.append("compute"))
    graph.comm(lambda _: ran.append("comm"), made)

    costs = manager.calibrate(manager.compile(graph), repeats=2)

    assert ran == ["compute", "comm"] * 2
    assert set(costs) == {0, 1}
    assert all(cost > 0 for cost in costs.values())
    assert manager.compile(graph, costs=costs).predicted_s is not None
    with pytest.raises(ConfigError, match="repeats 0"):
        manager.calibrate(manager.compile(graph), repeats=0)


def test_disabled_means_serial_until_reset(manager):
    graph = manager.graph()
    graph.comm(lambda _: None, graph.compute(lambda: None))
    before = manager.compile(graph)

    manager.disable("the link is shared")
    handle = manager.run(before)
    handle.wait()
    scheduled = manager.schedule([lambda: 1] * 3, [lambda: 2] * 3)
    scheduled.wait()
    stats, why = manager.get_stats(), manager.explain(before)
    manager.reset()

    assert scheduled.metrics.overlapped_s == 0
    assert stats.disabled_reason == "the link is shared"
    assert stats.serial_runs == stats.runs == 2
    assert why.startswith("serial: the link is shared")
    assert manager.compile(graph).serial is False
    assert manager.get_stats().runs == 0
    with pytest.raises(ConfigError, match="reason"):
        manager.disable("")


def test_disabling_keeps_the_order_that_peers_follow(manager):
    issued = []
    graph = manager.graph()
    for name, (compute, comm) in {"a": (5.0, 1.0), "b": (1.0, 5.0)}.items():
        made = graph.compute(lambda: None, cost_s=compute)
        graph.comm(lambda _, name=name: issued.append(name), made, cost_s=comm)
    plan = manager.compile(graph)

    manager.disable("a test")
    handle = manager.run(plan)
    handle.wait()

    assert plan.order["comm"] == (3, 1)
    assert issued == ["b", "a"]
    assert handle.metrics.overlapped_s == 0


def test_explain_tells_order_gain_and_candidates(manager):
    graph = manager.graph()
    for compute, comm in ((5.0, 1.0), (1.0, 5.0)):
        made = graph.compute(lambda: None, name=f"mlp{compute:.0f}", cost_s=compute)
        graph.comm(lambda _: None, made, name=f"reduce{comm:.0f}", cost_s=comm)

    text = manager.explain(manager.compile(graph))

    assert text.startswith("overlapped: johnson order is the best of 4 simulated; digest ")
    assert "predicted 7000.000 ms (41.7% saved), serial 12000.000 ms" in text
    assert "candidate user: 11000.000 ms" in text
    assert "compute (compute): mlp1, mlp5" in text
    assert "comm (comm): reduce5, reduce1" in text


def test_lanes_are_named_once(manager):
    lane = manager.lane("kv", priority=1)

    assert (lane.name, lane.kind, lane.priority) == ("kv", "comm", 1)
    assert manager.lane("kv") is lane
    assert manager.lane("compute-attention").kind == "compute"
    with pytest.raises(ConfigError, match="no streams"):
        manager.lane("kv", stream=object())
    with pytest.raises(ConfigError, match="name"):
        manager.lane("")


@pytest.mark.parametrize(
    "options",
    [{"timeout_s": 0}, {"timeout_s": float("nan")}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match="timeout_s"):
        OverlapManager(device="cpu", **options)


@pytest.mark.parametrize("field", ["min_gain", "max_inflight", "min_tokens"])
def test_bad_policies_are_refused(field):
    with pytest.raises(ConfigError, match=field):
        OverlapPolicy(**{field: -1})


def test_graphs_and_plans_of_others_are_refused(manager):
    with pytest.raises(ConfigError, match="Mock is not a graph"):
        manager.compile(Mock())
    with pytest.raises(ConfigError, match="Mock is not a plan"):
        manager.run(Mock())


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(BackendUnavailableError, match="device='cpu'"):
        OverlapManager(device="mtia")


class Steps:
    """A micro-batch that logs its turns."""

    def __init__(self, log, name, tokens=4, handles=2):
        self.log, self.name, self.num_tokens, self.handles = log, name, tokens, handles

    def __iter__(self):
        got = []
        for step in range(self.handles):
            self.log.append(f"{self.name}{step}")
            got.append((yield CompletedWork((self.name, step))))
        self.log.append(f"{self.name} end")
        return got


def test_batches_take_turns(manager):
    log = []

    got = manager.overlap_batches([Steps(log, "a"), Steps(log, "b", handles=3)])

    assert log == ["a0", "b0", "a1", "b1", "a end", "b2", "b end"]
    assert got == [[("a", 0), ("a", 1)], [("b", 0), ("b", 1), ("b", 2)]]
    assert manager.get_stats().serial_runs == 0


@pytest.mark.parametrize("why", ["argument", "policy", "disabled"])
def test_small_batches_run_one_after_another(make_manager, why):
    manager = make_manager(policy=OverlapPolicy(min_tokens=9 if why == "policy" else 0))
    if why == "disabled":
        manager.disable("a test")
    log = []

    manager.overlap_batches(
        [Steps(log, "a"), Steps(log, "b")], min_tokens=9 if why == "argument" else None
    )

    assert log == ["a0", "a1", "a end", "b0", "b1", "b end"]
    assert manager.get_stats().serial_runs == 1


def test_batches_need_not_be_generators(manager):
    assert manager.overlap_batches([[None, CompletedWork(1)], iter([])]) == [None, None]
    assert manager.overlap_batches([]) == []


def test_what_a_batch_raises_closes_the_others(manager):
    closed = []

    def good():
        try:
            yield CompletedWork(1)
            yield CompletedWork(2)
        finally:
            closed.append("good")

    def bad():
        yield CompletedWork(1)
        raise ValueError("bad batch")

    with pytest.raises(ValueError, match="bad batch") as caught:
        manager.overlap_batches([good(), bad()])

    assert closed == ["good"]
    assert "micro-batch 1, step 1" in caught.value.__notes__[0]
    assert manager.get_stats().failed == 1


def test_a_batch_whose_peer_is_silent_times_out(make_manager):
    manager = make_manager(timeout_s=0.05)

    with pytest.raises(CommTimeoutError, match="micro-batch 0, step 1"):
        manager.overlap_batches([[Future()]])


def test_layer_hooks_queue_layers_in_order(manager):
    stream = Mock(spec=["send_layer", "seal", "abort"])

    hook = manager.layer_hooks(stream)
    for layer in range(3):
        hook(layer)

    assert [call.args for call in stream.send_layer.call_args_list] == [(i, None) for i in range(3)]
    assert hook.layers == [0, 1, 2]


def test_statistics_add_up(manager):
    for _ in range(70):  # more than are kept before they are folded
        manager.schedule([lambda: 1] * 2, [lambda: 2] * 2).wait()

    stats = manager.get_stats()

    assert (stats.runs, stats.failed, stats.tasks, stats.serial_runs) == (70, 0, 280, 0)
    assert stats.compute_s > 0
    assert 0 <= stats.overlapped_s <= stats.comm_s


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")

    with pytest.raises(ConfigError, match=r"Windows .*use Linux"):
        OverlapManager()
