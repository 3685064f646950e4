"""The formulas, on intervals made by hand."""

import pytest
from hypothesis import given, strategies as st

from sagellm.comm.overlap import eff_attainable, measure, stretch
from sagellm.core.protocols import Interval


def interval(lane, start, end):
    return Interval(0, "t", lane, start, end)


def test_formulas_on_a_known_run():
    # compute 0-4, 6-8; comm 3-7, of which 3-4 and 6-7 are hidden
    run = [interval("compute", 0, 4), interval("comm", 3, 7), interval("compute", 6, 8)]

    got = measure(run, loads_s=(6.0, 4.0), bound_s=6.0)

    assert got.makespan_s == 8
    assert got.compute_s == 6
    assert got.comm_s == 4
    assert got.overlapped_s == 2
    assert got.exposed_s == 2
    assert got.eff_trace == 0.5
    assert got.eff_saved == (6 + 4 - 8) / 4
    assert got.idle == {"compute": 1 - 6 / 8, "comm": 1 - 4 / 8}
    assert got.bound_s == 6
    assert got.bound_ratio == 6 / 8


def test_overlapping_spans_of_a_lane_count_once():
    run = [interval("comm", 0, 4), interval("comm", 2, 6), interval("compute", 1, 3)]

    got = measure(run)

    assert got.comm_s == 6
    assert got.overlapped_s == 2
    assert got.idle["comm"] == 0


def test_lanes_of_one_kind_are_joined():
    run = [
        interval("comm", 0, 4),
        interval("kv", 2, 6),
        interval("compute", 0, 1),
        interval("compute1", 0.5, 2),
    ]

    got = measure(run)

    assert got.comm_s == 6
    assert got.compute_s == 2
    assert got.overlapped_s == 2


def test_a_run_slower_than_serial_has_negative_savings_though_it_looks_hidden():
    run = [interval("compute", 0, 12), interval("comm", 0, 12)]

    got = measure(run, loads_s=(6.0, 4.0))

    assert got.eff_trace == 1.0
    assert got.eff_saved == pytest.approx((10 - 12) / 4)


def test_no_communication_and_no_tasks():
    alone = measure([interval("compute", 0, 4)], loads_s=(4.0, 0.0))
    empty = measure([])

    assert alone.eff_trace is None
    assert alone.eff_saved is None
    assert alone.bound_ratio == 1.0
    assert empty.makespan_s == 0
    assert empty.eff_trace is None
    assert empty.bound_ratio is None


def test_attainable_share_and_stretch():
    assert eff_attainable((4.0, 4.0), 5.0, 5.0) == 1.0
    assert eff_attainable((4.0, 0.0), 4.0, 4.0) is None
    assert stretch([interval("comm", 0, 3), interval("compute", 0, 9)], "comm", 2.0) == 1.5


@given(
    st.lists(
        st.tuples(st.sampled_from(["compute", "comm"]), st.integers(0, 50), st.integers(0, 20)),
        min_size=1,
        max_size=20,
    )
)
def test_parts_agree_with_counting_ticks(spans):
    run = [interval(lane, start, start + took) for lane, start, took in spans]

    got = measure(run)

    busy = {
        kind: {t for lane, s, d in spans if lane == kind for t in range(s, s + d)}
        for kind in ("compute", "comm")
    }
    assert got.compute_s == len(busy["compute"])
    assert got.comm_s == len(busy["comm"])
    assert got.overlapped_s == len(busy["compute"] & busy["comm"])
    assert got.exposed_s == len(busy["comm"] - busy["compute"])
    assert got.bound_s <= got.makespan_s
