"""Predictions: priors, calibration, honesty of the basis, and pure selection."""

import csv
import math
import statistics
from dataclasses import replace

import msgspec
import pytest

from sagellm.comm.topology._cost_prior import ALGORITHMS
from sagellm.comm.topology.cost_model import CostModel
from sagellm.core.protocols import (
    ConfigError,
    CostModelProtocol,
    CostTable,
    Device,
    Link,
    TopologyInfo,
)


def rows(points, op="all_reduce", algorithm="ring", size=4):
    return [
        {"op": op, "nbytes": x, "group_size": size, "algorithm": algorithm, "time_us": t}
        for x, t in points
    ]


def line(alpha, beta, sizes=tuple(4**k for k in range(5, 14))):
    return [(x, alpha + beta * x) for x in sizes]


@pytest.mark.parametrize(("op", "algorithm"), [(o, a) for o, x in ALGORITHMS.items() for a in x])
def test_every_prior_grows_with_payload_and_says_it_is_one(op, algorithm):
    model = CostModel()

    small, large = (model.predict(op, n, 8, algorithm) for n in (1 << 10, 1 << 28))

    assert 0 < small.time_us < large.time_us
    assert small.basis == large.basis == "prior"
    assert small.low_us < small.time_us < small.high_us


def test_ring_prior_is_the_textbook_formula(hgx, hgx_gpus):
    model = CostModel(hgx.detect())
    n, nbytes = 8, 1 << 30

    found = model.predict("all_reduce", nbytes, hgx_gpus, "ring")

    beta = 1e6 / (18 * 26_562e6)
    moved = 2 * (n - 1) / n * nbytes * beta
    assert moved < found.time_us < 1.5 * moved
    assert found.busbw_bytes_per_s == pytest.approx(nbytes / (found.time_us / 1e6) * 2 * 7 / 8)


def test_trees_win_small_and_rings_win_large():
    model = CostModel()
    table = model.freeze()

    small, _ = model.select(table, "all_reduce", 256, 16)
    large, _ = model.select(table, "all_reduce", 1 << 30, 16)

    assert small != "ring"
    assert large in ("ring", "hierarchical", "halving_doubling", "two_shot")


def test_hierarchy_wins_where_hosts_are_joined_by_a_thin_network(hgx):
    from sagellm.comm.topology._join import join_hosts

    info = join_hosts([hgx.detect()] * 2)
    model = CostModel(info)
    ids = [d.id for d in info.accelerators]

    ring = model.predict("all_reduce", 1 << 28, ids, "ring")
    hierarchical = model.predict("all_reduce", 1 << 28, ids, "hierarchical")

    assert hierarchical.time_us < ring.time_us


def test_measured_sizes_come_back_and_gaps_are_calibrated():
    model = CostModel()
    model.observe(rows(line(20.0, 1e-3)))

    at_knot = model.predict("all_reduce", 4**8, 4, "ring")
    between = model.predict("all_reduce", 3 * 4**8, 4, "ring")

    assert at_knot.time_us == pytest.approx(20 + 4**8 * 1e-3)
    assert between.basis == "calibrated"
    assert between.time_us == pytest.approx(20 + 3 * 4**8 * 1e-3, rel=0.1)
    assert between.low_us < 20 + 3 * 4**8 * 1e-3 < between.high_us


def test_the_median_of_repeats_counts_and_their_spread_widens():
    calm, shaky = CostModel(), CostModel()
    for noise, model in ((0.001, calm), (0.4, shaky)):
        for k in range(-4, 5):
            model.observe(rows([(x, t * (1 + noise * k / 4)) for x, t in line(20.0, 1e-3)]))
    calm.observe(rows([(4**8, 1e9)]))

    quiet, wide = (m.predict("all_reduce", 4**8, 4, "ring") for m in (calm, shaky))

    assert quiet.time_us == pytest.approx(20 + 4**8 * 1e-3, rel=0.01)
    assert wide.high_us / wide.low_us > 1.2 * quiet.high_us / quiet.low_us


def test_beyond_the_measured_sizes_it_is_scaled_and_wider():
    model = CostModel()
    model.observe(rows(line(20.0, 1e-3)))

    inside = model.predict("all_reduce", 4**12 + 1, 4, "ring")
    above = model.predict("all_reduce", 4**16, 4, "ring")
    below = model.predict("all_reduce", 1, 4, "ring")

    assert (above.basis, below.basis) == ("scaled", "scaled")
    assert above.time_us == pytest.approx(20 + 4**16 * 1e-3, rel=0.01)
    assert above.high_us / above.low_us > inside.high_us / inside.low_us


def test_a_group_size_never_measured_is_scaled_not_claimed():
    model = CostModel()
    model.observe(rows(line(200.0, 1e-2), size=4))

    other = model.predict("all_reduce", 4**10, 8, "ring")

    assert other.basis == "scaled"
    assert other.high_us / other.low_us > 4
    assert other.time_us > model.predict("all_reduce", 4**10, 4, "ring").time_us


def test_selection_is_pure_and_survives_the_wire():
    model = CostModel()
    model.observe(rows(line(5.0, 2e-3), algorithm="tree"))
    model.observe(rows(line(60.0, 1e-3), algorithm="ring"))
    table = model.freeze()
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(_plain(table)), type=list)
    other = CostTable(
        table.fingerprint,
        table.version,
        {(op, a, n): tuple((x, t) for x, t in points) for op, a, n, points in sent},
    )

    for nbytes in (1, 1000, 4**8, 4**9, 1 << 26):
        assert model.select(table, "all_reduce", nbytes, 4) == CostModel().select(
            other, "all_reduce", nbytes, 4
        )
    # Formulas of other algorithms take part, but tree and ring keep their measured order.
    assert model.select(table, "all_reduce", 4**6, 4)[0] != "ring"
    assert model.select(table, "all_reduce", 4**13, 4)[0] not in ("tree", "direct")


def _plain(table):
    return [[*key, [list(p) for p in points]] for key, points in table.curves.items()]


def test_an_optimistic_formula_does_not_beat_a_measurement():
    model = CostModel()
    model.observe(rows([(x, 1000 * t) for x, t in line(5.0, 1e-4)], algorithm="ring"))

    name, estimate = model.select(model.freeze(), "all_reduce", 1 << 24, 4)

    assert name in ("ring", "halving_doubling", "hierarchical", "two_shot")
    assert estimate.time_us > 0.5 * model.predict("all_reduce", 1 << 24, 4, "ring").time_us


def test_selection_for_a_group_size_outside_the_table_is_wider():
    model = CostModel()
    table = model.freeze()

    known = model.select(table, "all_reduce", 1 << 20, 16)[1]
    unknown = model.select(table, "all_reduce", 1 << 20, 24)[1]

    assert unknown.high_us / unknown.low_us > known.high_us / known.low_us


def test_a_group_of_one_costs_nothing():
    model = CostModel()

    assert model.predict("all_reduce", 100, 1, "ring").time_us == 0
    assert model.select(model.freeze(), "all_reduce", 100, 1)[1].time_us == 0
    assert model.predict("all_reduce", 0, 1, "ring").busbw_bytes_per_s is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.predict("all_reduse", 1, 2, "ring"), "known: all_reduce"),
        (lambda m: m.predict("p2p", 1, 2, "ring"), "known: direct"),
        (lambda m: m.predict("p2p", -1, 2, "direct"), "-1"),
        (lambda m: m.predict("p2p", 1, 0, "direct"), "not 0"),
        (lambda m: m.predict("p2p", 1, ["nobody"], "direct"), "nobody"),
        (lambda m: m.select(CostTable("", 9, {}), "p2p", 1, 2), "version 9"),
        (lambda m: m.select(CostTable("", 1, {}), "p2p", 1, 2), "has no 'p2p'"),
        (lambda m: m.observe([{"op": "all_reduce"}]), "sample 0 needs"),
        (lambda m: m.observe(rows([(8, math.nan)])), "time_us nan"),
        (lambda m: m.observe(rows([(0, 1.0)])), "nbytes .* not 0"),
    ],
)
def test_what_cannot_be_is_refused_in_words(call, words):
    with pytest.raises(ConfigError, match=words):
        call(CostModel())


def test_a_bad_row_teaches_nothing():
    model = CostModel()

    with pytest.raises(ConfigError):
        model.observe([*rows([(8, 1.0)]), {"op": "all_reduce"}])

    assert model.predict("all_reduce", 8, 4, "ring").basis == "prior"


def test_model_is_the_protocol():
    assert isinstance(CostModel(), CostModelProtocol)


CLEAN = (
    "h100_8x_nvls_allreduce", "h200_8x_nvls_allreduce", "p4de_2x8_efa_allreduce",
    "rtx4090_4x_pcie_p2p_allreduce", "slingshot_2x4_tree_allreduce", "p5_batch_allreduce",
)  # fmt: skip


def test_every_second_size_predicts_the_others_on_published_curves(shared_samples):
    all_errors, large_errors, covered = [], [], []
    for name in CLEAN:
        path = shared_samples.parent / f"curves/{name}.csv"
        lines = [x for x in path.read_text().splitlines() if not x.startswith("#")]
        points = sorted(
            {int(r["size_bytes"]): float(r["time_us"]) for r in csv.DictReader(lines)}.items()
        )
        model = CostModel()
        model.observe(rows(points[::2], size=8))
        for nbytes, time_us in points[1::2]:
            found = model.predict("all_reduce", nbytes, 8, "ring")
            error = abs(found.time_us / time_us - 1)
            all_errors.append(error)
            covered.append(found.low_us <= time_us <= found.high_us)
            if nbytes >= 64 << 20:
                large_errors.append(error)

    assert statistics.median(all_errors) < 0.03
    assert sum(e < 0.05 for e in large_errors) / len(large_errors) >= 0.9
    assert sum(covered) / len(covered) >= 0.8


def test_bounds_for_groups_never_measured_hold_where_networks_congest(shared_samples):
    path = shared_samples.parent / "curves/metax_c550_scale_256M_points.csv"
    lines = [x for x in path.read_text().splitlines() if not x.startswith("#")]
    nbytes = 256 << 20
    times = {
        (n := int(r["ranks"])): nbytes * 2 * (n - 1) / n / float(r["busbw_GBps"]) / 1e3
        for r in csv.DictReader(lines)
    }
    held = []
    for size, time_us in times.items():
        model = CostModel()
        model.observe(rows([(nbytes, time_us)], size=size))
        found = {n: model.predict("all_reduce", nbytes, n, "ring") for n in times if n != size}
        held += [f.low_us <= times[n] <= f.high_us for n, f in found.items()]
        assert {f.basis for f in found.values()} == {"scaled"}

    assert sum(held) / len(held) >= 0.9


def test_bad_runs_are_flagged_by_width(shared_samples):
    def width(name):
        path = shared_samples.parent / f"curves/{name}.csv"
        lines = [x for x in path.read_text().splitlines() if not x.startswith("#")]
        points = sorted(
            {int(r["size_bytes"]): float(r["time_us"]) for r in csv.DictReader(lines)}.items()
        )
        model = CostModel()
        model.observe(rows(points[::2], size=8))
        found = [model.predict("all_reduce", n, 8, "ring") for n, _ in points[1::2]]
        return statistics.median((f.high_us - f.low_us) / f.time_us for f in found)

    clean = max(width(name) for name in CLEAN)

    assert width("dgxh100_2x8_noisy_allreduce") > 3 * clean
    assert width("gh200_2x4_tcp_allreduce") > 3 * clean


def test_a_backends_own_algorithm_is_known_by_its_measurements():
    model = CostModel()
    with pytest.raises(ConfigError, match="no algorithm 'one_shot'"):
        model.predict("all_reduce", 1 << 12, 4, "one_shot")
    model.observe(rows(line(5.0, 1e-3), algorithm="one_shot"))

    here, elsewhere = (model.predict("all_reduce", 1 << 12, n, "one_shot") for n in (4, 16))

    assert "one_shot" in model.algorithms("all_reduce")
    assert (here.basis, elsewhere.basis) == ("calibrated", "scaled")
    assert elsewhere.high_us / elsewhere.low_us > 4 * here.high_us / here.low_us
    assert model.predict("all_reduce", 1 << 12, 1, "one_shot").time_us == 0


def test_formulas_see_which_links_a_group_shares():
    def info(uplink):
        devices = [Device(f"g{i}", "gpu") for i in range(8)]
        devices += [Device("s0", "pci_switch"), Device("s1", "pci_switch"), Device("r", "pci_root")]
        links = [Link(f"g{i}", f"s{i // 4}", "pcie", 1, 25e9) for i in range(8)]
        links += [Link(f"s{i}", "r", "pcie", 1, uplink) for i in range(2)]
        return TopologyInfo(devices=tuple(devices), links=tuple(links))

    def slowdown(algorithm):
        wide, thin = (CostModel(info(w)) for w in (200e9, 25e9))
        slow, fast = (m.predict("all_reduce", 1 << 28, 8, algorithm).time_us for m in (thin, wide))
        return slow / fast

    # A ring crosses the uplink once each way; everybody to everybody crosses it sixteen times.
    assert slowdown("ring") == pytest.approx(1, rel=0.01)
    assert slowdown("two_shot") > 2


def test_renaming_and_reordering_devices_changes_no_estimate(hgx):
    info = hgx.detect()
    names = {d.id: f"x{hash(d.id) % 10**9}" for d in info.devices}
    renamed = replace(
        info,
        devices=tuple(replace(d, id=names[d.id]) for d in info.devices),
        links=tuple(replace(x, a=names[x.b], b=names[x.a]) for x in reversed(info.links)),
        domains=(),
    )
    group = [d.id for d in info.accelerators]

    for op, algorithms in ALGORITHMS.items():
        for algorithm in algorithms:
            a = CostModel(info).predict(op, 1 << 20, group, algorithm)
            b = CostModel(renamed).predict(op, 1 << 20, [names[d] for d in group], algorithm)
            assert a.time_us == pytest.approx(b.time_us)
