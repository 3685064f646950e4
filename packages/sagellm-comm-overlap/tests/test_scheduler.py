"""Graphs and plans."""

import pytest

from sagellm.comm.overlap import TaskGraph, compile_graph
from sagellm.core.protocols import ConfigError


def nothing(*_):
    return None


def pairs(costs):
    graph = TaskGraph()
    for compute, comm in costs:
        graph.comm(nothing, graph.compute(nothing, cost_s=compute), cost_s=comm)
    return graph


def test_the_best_of_several_orders_is_kept():
    graph = pairs([(5.0, 1.0), (1.0, 5.0)])

    plan = compile_graph(graph.tasks)

    assert plan.rule == "johnson"
    assert plan.order == {"compute": (2, 0), "comm": (3, 1)}
    assert plan.predicted_s == min(plan.candidates.values()) == 7.0
    assert plan.candidates["user"] == 11.0
    assert plan.loads_s == (6.0, 6.0)
    assert not plan.serial


def test_the_order_given_is_kept_where_another_gains_next_to_nothing():
    graph = pairs([(5.01, 5.0), (5.0, 5.02)])

    plan = compile_graph(graph.tasks)

    assert min(plan.candidates.values()) < plan.candidates["user"]
    assert plan.rule == "user"
    assert plan.order["compute"] == (0, 2)


def test_given_costs_beat_declared_ones():
    graph = pairs([(5.0, 1.0), (1.0, 5.0)])

    plan = compile_graph(graph.tasks, {0: 1.0, 1: 5.0, 2: 5.0, 3: 1.0})

    assert plan.order["compute"] == (0, 2)
    assert plan.predicted_s == 7.0


def test_unknown_costs_leave_the_prediction_open():
    graph = pairs([(5.0, 1.0)])
    graph.compute(nothing)

    partly = compile_graph(graph.tasks)
    unknown = compile_graph(pairs([(None, None)]).tasks)

    assert partly.predicted_s is None
    assert partly.loads_s is None
    assert unknown.predicted_s is None
    assert unknown.rule == "user"


def test_too_little_gain_is_serial():
    graph = pairs([(10.0, 0.1), (10.0, 0.1)])

    plan = compile_graph(graph.tasks, min_gain=0.05)

    assert plan.serial
    assert "min_gain" in plan.reason
    assert plan.predicted_s == pytest.approx(20.2)
    assert not compile_graph(graph.tasks, min_gain=0.0).serial


def test_the_digest_tells_orders_of_communication_apart():
    one = compile_graph(pairs([(5.0, 1.0), (1.0, 5.0)]).tasks)
    two = compile_graph(pairs([(1.0, 5.0), (5.0, 1.0)]).tasks)
    again = compile_graph(pairs([(5.0, 1.0), (1.0, 5.0)]).tasks)

    assert one.digest == again.digest
    assert one.digest != two.digest


def test_serial_plans_run_one_after_another():
    plan = compile_graph(pairs([(10.0, 0.1), (10.0, 0.1)]).tasks, min_gain=0.5)

    assert plan.run_shape.deps == ((), (0,), (1,), (2,))
    assert plan.shape.deps == ((), (0,), (), (2,))


def test_a_plan_does_not_change_with_its_graph():
    graph = pairs([(1.0, 1.0)])
    plan = compile_graph(graph.tasks)

    graph.compute(nothing)

    assert len(plan.tasks) == 2
    assert len(graph) == 3


@pytest.mark.parametrize(
    ("add", "says"),
    [
        (lambda g: g.compute(nothing, 0), "not 0"),
        (lambda g: g.compute(3), "not callable"),
        (lambda g: g.compute(nothing, lane="kv"), "counts as comm"),
        (lambda g: g.comm(nothing, lane="compute2"), "counts as compute"),
        (lambda g: g.comm(nothing, nbytes=-1), "nbytes=-1"),
        (lambda g: g.comm(nothing, cost_s=float("nan")), "cost_s=nan"),
        (lambda g: g.after(1), "task 1"),
        (lambda g: g.after(0, 0), "not 0"),
    ],
)
def test_bad_tasks_are_refused(add, says):
    with pytest.raises(ConfigError, match=says):
        add(TaskGraph())


def test_bad_costs_are_refused():
    tasks = pairs([(1.0, 1.0)]).tasks

    with pytest.raises(ConfigError, match="no such task"):
        compile_graph(tasks, {7: 1.0})
    with pytest.raises(ConfigError, match="below 0"):
        compile_graph(tasks, {0: -1.0})


def test_what_feeds_a_communication_is_found_through_other_tasks():
    graph = TaskGraph()
    a = graph.compute(nothing)
    b = graph.compute(nothing, a)
    graph.comm(nothing, b)
    graph.compute(nothing, b)

    assert compile_graph(graph.tasks).feeds_comm == {0, 1, 2}
