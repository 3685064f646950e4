"""Adaptive sizes, kept profiles and drift."""

import math

import pytest

from sagellm.comm.topology.calibration import calibrate, find_switches
from sagellm.comm.topology.cost_model import CostModel
from sagellm.core.protocols import ConfigError, TopologyInfo

WHAT = {"op": "all_reduce", "algorithm": "ring", "group_size": 4}


def switching(nbytes):
    """Two protocols: the second costs more to begin and less per byte, and is taken too late."""
    return 10 + nbytes * 4e-3 if nbytes < 3 << 20 else 900 + nbytes * 5e-4


def sizes(rows):
    return sorted({row["nbytes"] for row in rows})


def test_knots_close_in_on_a_protocol_switch():
    rows = calibrate(lambda n: [switching(n)], **WHAT, knots=14)

    found = sizes(rows)
    below = max(n for n in found if n < 3 << 20)
    above = min(n for n in found if n >= 3 << 20)
    assert above / below < 2
    assert (found[0], found[-1], len(found)) == (4 << 10, 256 << 20, 14)


def test_a_protocol_switch_is_told_and_a_bend_is_none():
    def bend(nbytes):
        return (30**3 + (nbytes * 2e-4) ** 3) ** (1 / 3)

    def late(nbytes):
        return 10 + nbytes * 1e-3 + (500 if nbytes >= 100_000 else 0)

    down, up = (find_switches(calibrate(lambda n, f=f: [f(n)], **WHAT)) for f in (switching, late))

    assert [s.below < 3 << 20 <= s.above for s in down] == [True]
    assert [s.below < 100_000 <= s.above for s in up] == [True]
    assert down[0].factor < 0.5 < 1.5 < up[0].factor
    for smooth in (bend, lambda n: 20 + n * 1e-3, lambda n: 5.0):
        assert find_switches(calibrate(lambda n, f=smooth: [f(n)] * 5, **WHAT)) == ()
    assert find_switches([]) == ()


def test_adaptive_sizes_beat_the_same_number_of_even_ones():
    def worst(measured):
        model = CostModel()
        model.observe(measured)
        held = [int(4096 * 1.37**k) for k in range(1, 34)]
        errors = [
            abs(math.log(model.predict("all_reduce", n, 4, "ring").time_us / switching(n)))
            for n in held
        ]
        return sum(errors) / len(errors)

    even = [int((4 << 10) * (1 << 16) ** (i / 11)) for i in range(12)]
    by_even = [{**WHAT, "nbytes": n, "time_us": switching(n)} for n in even]

    assert worst(calibrate(lambda n: [switching(n)], **WHAT, knots=12)) < worst(by_even)


def test_a_straight_line_needs_few_sizes():
    rows = calibrate(lambda n: [n * 1e-3], **WHAT, knots=30)

    assert len(sizes(rows)) == 4


def test_every_repeat_is_a_row_and_sizes_are_whole_multiples():
    rows = calibrate(lambda n: [1.0 + n, 2.0 + n], **WHAT, multiple=24, knots=5)

    assert len(rows) == 2 * len(sizes(rows))
    assert all(n % 24 == 0 for n in sizes(rows))


@pytest.mark.parametrize(
    "bad", [{"smallest": 0}, {"smallest": 8, "largest": 8}, {"knots": 1}, {"multiple": 0}]
)
def test_an_impossible_range_is_refused(bad):
    with pytest.raises(ConfigError, match="calibration from"):
        calibrate(lambda n: [1.0], **WHAT, **bad)


def test_a_measurement_without_times_is_refused():
    with pytest.raises(ConfigError, match="gave"):
        calibrate(lambda n: [], **WHAT)


def learned(fingerprint="f", slope=1e-3):
    model = CostModel(TopologyInfo(fingerprint=fingerprint))
    model.observe(calibrate(lambda n: [20 + n * slope] * 5, **WHAT))
    return model


def test_a_kept_profile_comes_back_for_its_topology_and_library_only(tmp_path):
    learned().save("gloo 1", tmp_path)
    same, moved, updated = (CostModel(TopologyInfo(fingerprint=f)) for f in ("f", "g", "f"))

    assert same.load("gloo 1", tmp_path) > 0
    assert moved.load("gloo 1", tmp_path) == 0
    assert updated.load("gloo 2", tmp_path) == 0
    assert same.predict("all_reduce", 5 << 20, 4, "ring") == learned().predict(
        "all_reduce", 5 << 20, 4, "ring"
    )
    assert [p.name.startswith("topology-cost-") for p in tmp_path.iterdir()] == [True]


def test_a_spoiled_profile_is_named(tmp_path):
    path = learned().save("gloo 1", tmp_path)
    path.write_text("{")

    with pytest.raises(ConfigError, match=path.name):
        learned().load("gloo 1", tmp_path)


def test_a_profile_that_says_it_is_of_another_topology_is_left_out(tmp_path):
    path = learned("f").save("gloo 1", tmp_path)
    other = learned("g").save("gloo 1", tmp_path)
    path.replace(other)

    assert CostModel(TopologyInfo(fingerprint="g")).load("gloo 1", tmp_path) == 0


def fresh(slowdown, count=8):
    return [
        {**WHAT, "nbytes": n, "time_us": slowdown * (20 + n * 1e-3)}
        for n in (1 << (14 + k) for k in range(count))
    ]


def test_a_machine_that_became_slower_has_drifted_until_it_is_measured_anew():
    model = learned()

    (found,) = model.drift(fresh(1.5))
    model.forget(found.op, found.algorithm, found.group_size)

    assert (found.algorithm, found.samples) == ("ring", 8)
    assert found.ratio == pytest.approx(1.5, rel=0.05)
    assert model.predict("all_reduce", 1 << 20, 4, "ring").basis == "prior"


def test_what_lies_within_the_interval_or_is_rare_is_no_drift():
    model = learned()

    assert model.drift(fresh(1.01)) == ()
    assert model.drift(fresh(3.0, count=4)) == ()
    assert model.drift([*fresh(1.0), *fresh(3.0, count=5)]) == ()
    assert model.drift([{**row, "algorithm": "tree"} for row in fresh(3.0)]) == ()
