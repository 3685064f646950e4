"""Orders by rule against brute force, bounds, and what every simulation must satisfy."""

import itertools
import random

import pytest
from hypothesis import given, strategies as st

from sagellm.comm.overlap.orders import (
    Shape,
    johnson_order,
    lower_bound,
    priority_order,
    simulate,
    upward_rank,
    user_order,
)
from sagellm.core.protocols import ConfigError


@st.composite
def shapes(draw, most=14):
    count = draw(st.integers(1, most))
    lanes = draw(
        st.lists(st.sampled_from(["compute", "comm", "kv"]), min_size=count, max_size=count)
    )
    deps = [
        sorted(draw(st.sets(st.integers(0, task - 1), max_size=3))) if task else []
        for task in range(count)
    ]
    costs = draw(st.lists(st.integers(0, 9).map(float), min_size=count, max_size=count))
    return Shape.of(lanes, deps), costs


def check_run(shape, order, costs):
    run = simulate(shape, order, costs)
    end = [start + cost for start, cost in zip(run.start_s, costs, strict=True)]
    for task, deps in enumerate(shape.deps):
        assert all(run.start_s[task] >= end[dep] for dep in deps)
    for tasks in order.values():
        assert all(run.start_s[b] >= end[a] for a, b in itertools.pairwise(tasks))
    place = {task: at for at, task in enumerate(run.sequence)}
    assert all(place[dep] < place[task] for task, deps in enumerate(shape.deps) for dep in deps)
    assert all(
        place[a] < place[b] for tasks in order.values() for a, b in itertools.pairwise(tasks)
    )
    assert lower_bound(shape, costs) <= run.makespan_s <= sum(costs)
    return run


@given(shapes())
def test_every_order_keeps_lanes_dependencies_and_the_bound(case):
    shape, costs = case
    rank = upward_rank(shape, costs)

    check_run(shape, user_order(shape), costs)
    check_run(shape, priority_order(shape, costs, rank), costs)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), st.booleans()
)
def test_johnson_is_as_good_as_brute_force(jobs, comm_first):
    first, second = ("comm", "compute") if comm_first else ("compute", "comm")
    lanes = [lane for _ in jobs for lane in (first, second)]
    deps = [dep for at in range(len(jobs)) for dep in ([], [2 * at])]
    costs = [float(cost) for job in jobs for cost in job]
    shape = Shape.of(lanes, deps)

    got = check_run(shape, johnson_order(shape, costs), costs).makespan_s

    best = min(
        simulate(
            shape,
            {first: [2 * j for j in perm], second: [2 * j + 1 for j in perm]},
            costs,
        ).makespan_s
        for perm in itertools.permutations(range(len(jobs)))
    )
    assert got == best


def test_johnson_takes_tasks_without_partner():
    shape = Shape.of(["compute", "compute", "comm", "comm"], [[], [], [0], []])
    costs = [2.0, 1.0, 4.0, 3.0]

    order = johnson_order(shape, costs)

    assert order == {"compute": (0, 1), "comm": (3, 2)}
    assert simulate(shape, order, costs).makespan_s == 7.0


@pytest.mark.parametrize(
    ("lanes", "deps"),
    [
        (["compute", "comm", "comm"], [[], [0], [0]]),
        (["compute", "comm", "compute"], [[], [0], [1]]),
        (["compute", "compute", "comm"], [[], [0], [1]]),
        (["compute", "comm", "kv"], [[], [0], [0]]),
        (["compute", "comm"], [[], []]),
    ],
    ids=["fan out", "both ways", "same lane", "three lanes", "no pairs"],
)
def test_johnson_refuses_other_graphs(lanes, deps):
    assert johnson_order(Shape.of(lanes, deps), [1.0] * len(lanes)) is None


def test_equal_chunks_follow_the_flow_shop_formula():
    rng = random.Random(3)
    for _ in range(50):
        chunks, compute, comm = rng.randint(1, 8), rng.randint(1, 9), rng.randint(1, 9)
        lanes = ["compute", "comm"] * chunks
        deps = [dep for at in range(chunks) for dep in ([], [2 * at])]
        shape = Shape.of(lanes, deps)

        run = simulate(shape, user_order(shape), [compute, comm] * chunks)

        assert run.makespan_s == compute + (chunks - 1) * max(compute, comm) + comm


def test_bound_divides_a_lane_by_its_width():
    shape = Shape.of(["comm"] * 4, [[]] * 4)

    assert lower_bound(shape, [1.0] * 4) == 4.0
    assert lower_bound(shape, [1.0] * 4, {"comm": 2}) == 2.0


def test_an_order_against_the_dependencies_is_refused():
    shape = Shape.of(["compute", "comm", "compute", "comm"], [[], [0], [], [2]])

    with pytest.raises(ConfigError, match="contradicts"):
        simulate(Shape.of(["comm", "comm"], [[], [0]]), {"comm": (1, 0)}, [1.0, 1.0])
    with pytest.raises(ConfigError, match="once"):
        simulate(shape, {"compute": (0, 2), "comm": (1, 1)}, [1.0] * 4)
