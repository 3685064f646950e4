"""What `select` takes and what `predict` says of it are one estimate, for every group it knows."""

import pytest

from sagellm.comm.topology import _cost_load
from sagellm.comm.topology._join import join_hosts
from sagellm.comm.topology.cluster import ClusterShape, make_cluster
from sagellm.comm.topology.cost_model import CostModel
from sagellm.comm.topology.graph import TopologyGraph

SIZES = (0, 1, 4096, 100_000, 1 << 20, 1 << 28)


def rows(algorithm, size, slope=1e-4, members=(), op="all_reduce"):
    return [
        {"op": op, "algorithm": algorithm, "group_size": size, "nbytes": n,
         "time_us": (10 + n * slope) * (1 + 0.01 * k), "members": members}
        for n in (4096, 1 << 16, 1 << 20, 1 << 26)
        for k in range(5)
    ]  # fmt: skip


def agree(model, op, group, table=None):
    table = table or model.freeze()
    for nbytes in SIZES:
        name, chosen = model.select(table, op, nbytes, group)
        told = {a: model.predict(op, nbytes, group, a) for a in model.algorithms(op)}

        assert told[name] == chosen
        assert chosen.time_us == min(e.time_us for e in told.values())


@pytest.mark.parametrize("group", [2, 4, 8, 32])
@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "broadcast"])
def test_a_number_of_ranks_of_which_one_algorithm_was_measured(op, group):
    model = CostModel()
    model.observe(rows("ring", 4, op=op))

    agree(model, op, group)


def test_named_devices_where_their_shape_or_another_was_measured(hgx):
    model = CostModel(join_hosts([hgx.detect()] * 2))
    ids = [d.id for d in model._topology.accelerators]
    model.observe(rows("ring", 4, members=ids[:4]))
    model.observe(rows("tree", 4, 3e-4, members=[ids[0], ids[1], ids[8], ids[9]]))
    model.observe(rows("two_shot", 16, 2e-4, members=ids[::-1]))

    for group in (ids[:4], ids[4:8], ids[7:3:-1], [ids[2], ids[3], ids[10], ids[11]], ids, 4, 16):
        for op in ("all_reduce", "all_gather"):
            agree(model, op, group)


def test_a_group_that_nobody_measured_once_the_table_is_told_of_it(hgx):
    model = CostModel(join_hosts([hgx.detect()] * 2))
    ids = [d.id for d in model._topology.accelerators]
    model.observe(rows("ring", 4))
    odd, many = [ids[0], ids[9], ids[10]], 24

    table = model.freeze([odd, many, 1])

    agree(model, "all_reduce", odd, table)
    agree(model, "all_reduce", many, table)


def test_formulas_scaled_to_measurements_are_called_scaled_by_both():
    model = CostModel()
    before = model.predict("all_reduce", 1 << 20, 4, "two_shot")
    model.observe([{**r, "time_us": 100 * r["time_us"]} for r in rows("ring", 4)])

    after = model.predict("all_reduce", 1 << 20, 4, "two_shot")

    assert (before.basis, after.basis) == ("prior", "scaled")
    assert after.time_us > 10 * before.time_us
    assert after.high_us / after.low_us < before.high_us / before.low_us


def test_freezing_a_table_searches_for_the_way_between_two_devices_once(monkeypatch):
    model = CostModel(make_cluster(ClusterShape(nodes=16)))
    searched = []
    path = TopologyGraph.path

    def counted(self, a, b):
        searched.append((a, b))
        return path(self, a, b)

    monkeypatch.setattr(TopologyGraph, "path", counted)

    first = model.freeze()

    most = _cost_load.MOST_RANKS
    assert len(searched) < 1.2 * most * (most - 1)
    assert CostModel(make_cluster(ClusterShape(nodes=16))).freeze() == first == model.freeze()
