"""A measured curve speaks for groups that are joined alike, and for no others."""

import random
from dataclasses import replace

import msgspec
import pytest

from sagellm.comm.topology._cost_rows import MOST_NAME
from sagellm.comm.topology._join import join_hosts
from sagellm.comm.topology.benchmarks.random_topology import random_topology
from sagellm.comm.topology.cluster import ClusterShape, make_cluster
from sagellm.comm.topology.cost_model import CostModel
from sagellm.core.protocols import ConfigError, CostTable, Device, Link, TopologyInfo

SIZES = tuple(4**k for k in range(5, 13))


def paired_gpus(name="g{}", order=range(4)):
    """GPUs 0 and 1, and 2 and 3, are bridged; all else goes through the CPU."""
    names = [name.format(i) for i in range(4)]
    devices = [Device(names[i], "gpu", model="X 1") for i in order] + [Device("r", "pci_root")]
    links = [Link(names[i], "r", "pcie", 1, 25e9) for i in range(4)]
    links += [Link(names[0], names[1], "nvlink", 4, 200e9)]
    links += [Link(names[3], names[2], "nvlink", 4, 200e9)]
    return TopologyInfo(devices=tuple(devices), links=tuple(links), fingerprint="paired")


def rows(group, per_byte, *, algorithm="ring", alpha=20.0, named=True):
    more = {"members": list(group)} if named else {}
    return [
        {"op": "all_reduce", "algorithm": algorithm, "group_size": len(group), "nbytes": n,
         "time_us": (alpha + per_byte * n) * noise, **more}
        for n in SIZES
        for noise in (0.99, 1.0, 1.01)
    ]  # fmt: skip


BRIDGED, OTHER_BRIDGED, ACROSS = ("g0", "g1"), ("g3", "g2"), ("g1", "g2")


@pytest.fixture
def model():
    found = CostModel(paired_gpus())
    found.observe(rows(BRIDGED, 1e-5))
    return found


def test_groups_joined_alike_share_a_curve_and_others_get_bounds(model):
    twin, across = (
        model.predict("all_reduce", 1 << 24, g, "ring") for g in (OTHER_BRIDGED, ACROSS)
    )

    assert twin == model.predict("all_reduce", 1 << 24, BRIDGED, "ring")
    assert twin.basis == "calibrated"
    assert across.basis == "scaled"
    assert across.time_us > 4 * twin.time_us
    assert across.low_us < twin.low_us / 1.5
    assert across.high_us / across.low_us > 10 * twin.high_us / twin.low_us


def test_each_shape_keeps_its_own_measurements(model):
    model.observe(rows(ACROSS, 1e-4))

    fast, slow = (model.predict("all_reduce", 1 << 24, g, "ring") for g in (BRIDGED, ACROSS))

    assert (fast.basis, slow.basis) == ("calibrated", "calibrated")
    assert slow.time_us > 8 * fast.time_us


def test_a_number_is_answered_by_what_was_measured_without_names(model):
    told = model.predict("all_reduce", 1 << 20, 2, "ring")
    model.observe(rows(BRIDGED, 3e-4, named=False))
    counted = model.predict("all_reduce", 1 << 20, 2, "ring")
    named = model.predict("all_reduce", 1 << 20, BRIDGED, "ring")
    elsewhere = model.predict("all_reduce", 1 << 20, ACROSS, "ring")

    assert (told.basis, counted.basis) == ("scaled", "calibrated")
    assert (named.basis, elsewhere.basis) == ("calibrated", "scaled")
    assert counted.time_us > 5 * named.time_us


def test_the_number_of_all_devices_stands_for_them():
    model = CostModel(paired_gpus())
    everybody = ("g2", "g0", "g3", "g1")
    model.observe(rows(everybody, 1e-4))

    by_number = model.predict("all_reduce", 1 << 20, 4, "ring")

    assert by_number == model.predict("all_reduce", 1 << 20, everybody, "ring")
    assert by_number.basis == "calibrated"
    assert ("all_reduce", "ring", 4) in model.freeze().curves


def test_a_backends_own_algorithm_lends_bounds_that_hold_both_ways():
    model = CostModel(paired_gpus())
    model.observe(rows(BRIDGED, 1e-5, algorithm="one_shot"))

    here, there = (model.predict("all_reduce", 1 << 24, g, "one_shot") for g in (BRIDGED, ACROSS))

    assert (here.basis, there.basis) == ("calibrated", "scaled")
    assert there.low_us < here.time_us
    assert there.high_us > 8 * here.time_us


def test_names_and_orders_leave_no_trace_in_a_shape():
    chance = random.Random(7)
    for seed in range(12):
        info = random_topology(seed)
        names = [d.id for d in info.devices]
        called = dict(zip(names, (f"x{chance.random()}" for _ in names), strict=True))
        devices = [replace(d, id=called[d.id]) for d in info.devices]
        chance.shuffle(devices)
        links = [replace(x, a=called[x.b], b=called[x.a]) for x in info.links]
        chance.shuffle(links)
        domains = tuple(
            replace(x, members=tuple(called[m] for m in x.members)) for x in info.domains
        )
        pairs = tuple(replace(p, a=called[p.a], b=called[p.b]) for p in info.pairs)
        other = replace(
            info, devices=tuple(devices), links=tuple(links), domains=domains, pairs=pairs
        )
        group = [d.id for d in info.accelerators][: chance.randint(2, 64)]
        mixed = chance.sample(group, len(group))

        shape = CostModel(info).shape(group)

        assert 0 < len(shape) <= MOST_NAME
        assert shape == CostModel(other).shape([called[d] for d in mixed])


def test_shapes_of_large_groups_stay_short_and_know_no_order():
    info = make_cluster(ClusterShape(nodes=40))
    model = CostModel(info)
    everybody = [d.id for d in info.accelerators]
    mixed = random.Random(1).sample(everybody, len(everybody))

    shape = model.shape(everybody)
    uneven = model.shape(everybody[:-3])

    assert shape == CostModel(info).shape(mixed)
    assert shape.startswith("40x8 320*")
    assert uneven.startswith("1x5+39x8 317*")
    assert len(uneven) <= MOST_NAME


def test_shapes_tell_hosts_links_and_models_apart(hgx):
    one, two = hgx.detect(), join_hosts([hgx.detect()] * 2)
    ids = [d.id for d in two.accelerators]
    model = CostModel(two)
    bridged = CostModel(paired_gpus())
    half = replace(paired_gpus(), devices=tuple(
        replace(d, model="X 2") if d.id in BRIDGED else d for d in paired_gpus().devices
    ))  # fmt: skip

    shapes = {
        "one host": model.shape(ids[:8]),
        "the other": model.shape(ids[8:]),
        "two and two": model.shape([*ids[:2], *ids[8:10]]),
        "three and one": model.shape([*ids[:3], ids[8]]),
    }

    assert shapes["one host"] == shapes["the other"]
    assert shapes["one host"] == CostModel(one).shape([d.id for d in one.accelerators])
    assert len(set(shapes.values())) == 3
    assert bridged.shape(BRIDGED) == "1x2 2*gpu:X_1 LINK@2e+11*1"
    assert bridged.shape(ACROSS) == "1x2 2*gpu:X_1 PHB@2.5e+10*1"
    assert CostModel(half).shape(BRIDGED) != CostModel(half).shape(OTHER_BRIDGED)
    assert bridged.shape(2) == bridged.shape(["g0"]) == ""


def test_choosing_is_pure_and_knows_shapes_over_the_wire(model):
    model.observe(rows(ACROSS, 1e-4, algorithm="two_shot"))
    model.observe(rows(ACROSS, 3e-4, algorithm="ring"))
    table = model.freeze()
    sent = msgspec.msgpack.decode(
        msgspec.msgpack.encode([[*k, [list(p) for p in v]] for k, v in table.curves.items()])
    )
    received = CostTable(
        table.fingerprint, table.version, {(o, a, n): tuple(map(tuple, p)) for o, a, n, p in sent}
    )
    other_rank = CostModel(paired_gpus())

    for nbytes in (1, 4**7, 1 << 20, 1 << 30):
        for group in (BRIDGED, OTHER_BRIDGED, ACROSS, 2, 4, ("g0", "g1", "g2")):
            ours = model.select(table, "all_reduce", nbytes, group)
            assert ours == other_rank.select(received, "all_reduce", nbytes, group)
    chosen, estimate = model.select(table, "all_reduce", 1 << 22, ACROSS)
    predicted = model.predict("all_reduce", 1 << 22, BRIDGED, "ring")
    assert (chosen, estimate.basis) == ("two_shot", "calibrated")
    assert other_rank.select(received, "all_reduce", 1 << 22, BRIDGED)[1].basis == "calibrated"
    assert estimate == model.predict("all_reduce", 1 << 22, ACROSS, "two_shot")
    assert predicted.basis == "calibrated"


def test_a_table_of_another_topology_answers_numbers_and_no_names(model):
    table = model.freeze()
    stranger = CostModel(replace(paired_gpus(), fingerprint="other"))

    assert stranger.select(table, "all_reduce", 1 << 20, 2)[1].basis == "scaled"
    with pytest.raises(ConfigError, match="of topology 'paired', this model of 'other'"):
        stranger.select(table, "all_reduce", 1 << 20, BRIDGED)


def test_kept_curves_find_their_shape_on_a_machine_with_other_names(model, tmp_path):
    model.save("nccl 2.27.3", tmp_path)
    twin = CostModel(paired_gpus("0000:0{}:00.0", order=(3, 1, 0, 2)))

    assert twin.load("nccl 2.27.3", tmp_path) == len(rows(BRIDGED, 1.0))

    pair = ("0000:03:00.0", "0000:02:00.0")
    assert twin.predict("all_reduce", 1 << 20, pair, "ring") == model.predict(
        "all_reduce", 1 << 20, BRIDGED, "ring"
    )


def test_drift_and_forgetting_know_shapes(model):
    model.observe(rows(ACROSS, 1e-4))

    (found,) = model.drift(rows(OTHER_BRIDGED, 3e-5, alpha=60.0))
    model.forget(found.op, found.algorithm, found.group_size, found.shape)

    assert found.shape == model.shape(BRIDGED)
    assert model.predict("all_reduce", 1 << 20, BRIDGED, "ring").basis == "scaled"
    assert model.predict("all_reduce", 1 << 20, ACROSS, "ring").basis == "calibrated"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (["g0", "nobody"], "no device 'nobody'"),
        (["g0", "g0"], "g0 are not"),
        (["g0"], "1 members, but group_size 2"),
        ("g0", "not 'g0'"),
        ([1, 2], "device ids"),
    ],
)
def test_members_that_cannot_be_teach_nothing(model, members, words):
    bad = {**rows(ACROSS, 1e-4)[0], "members": members}

    with pytest.raises(ConfigError, match=words):
        model.observe([*rows(ACROSS, 1e-4), bad])

    assert model.predict("all_reduce", 1 << 20, ACROSS, "ring").basis == "scaled"
