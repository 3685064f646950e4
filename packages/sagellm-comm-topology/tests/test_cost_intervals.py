"""Intervals hold nine of ten fresh measurements, however few repeats there were (seeded)."""

import math
import random

import pytest

from sagellm.comm.topology._cost_curve import Curve
from sagellm.comm.topology.cost_model import CostModel

KNOTS = [4096 * 4**i for i in range(9)]
TRIALS = 60


def line(x):
    return 20 + x * 1e-3


def switch(x):
    return 10 + x * 4e-3 if x < 3 << 20 else 900 + x * 5e-4


def knee(x):
    return (30**3 + (x * 2e-4) ** 3) ** (1 / 3)


def calm(chance, x):
    return math.exp(0.02 * chance.gauss(0, 1))


def noisy(chance, x):
    return math.exp(0.2 * chance.gauss(0, 1))


def noisy_when_small(chance, x):
    return math.exp((0.2 if x < 1 << 16 else 0.02) * chance.gauss(0, 1))


def spiky(chance, x):
    late = abs(chance.gauss(0, 0.6)) if chance.random() < 0.05 else 0.0
    return math.exp(0.03 * chance.gauss(0, 1) + late)


def interrupted(chance, x):
    return math.exp(0.02 * chance.gauss(0, 1)) * (2.5 if chance.random() < 0.15 else 1)


def covered(truth, noise, repeats):
    """Shares of fresh measurements inside their intervals: at knots, between, below, beyond."""
    chance = random.Random(f"{truth.__name__} {noise.__name__} {repeats}")
    inside = {"at": [], "between": [], "below": [], "beyond": []}
    for _ in range(TRIALS):
        curve = Curve.of_repeats(
            {x: [truth(x) * noise(chance, x) for _ in range(repeats)] for x in KNOTS}
        )
        asked = {
            "at": KNOTS,
            "between": [int(x * 4 ** chance.random()) for x in KNOTS[:-1]],
            "below": [16, 256, 2048],
            "beyond": [2 * KNOTS[-1], 8 * KNOTS[-1]],
        }
        for where, sizes in asked.items():
            for x in sizes:
                _, low, high, _ = curve.read(x)
                inside[where].append(low <= truth(x) * noise(chance, x) <= high)
    return {where: sum(hits) / len(hits) for where, hits in inside.items()}


@pytest.mark.parametrize("noise", [calm, noisy, noisy_when_small, spiky])
@pytest.mark.parametrize("truth", [line, switch, knee])
@pytest.mark.parametrize("repeats", [2, 3, 5, 12])
def test_nine_of_ten_fresh_measurements_are_inside(truth, noise, repeats):
    shares = covered(truth, noise, repeats)

    assert min(shares.values()) >= 0.9, shares


@pytest.mark.parametrize("noise", [calm, noisy, noisy_when_small, spiky])
@pytest.mark.parametrize("truth", [line, switch, knee])
def test_without_repeats_the_smoothness_of_the_curve_speaks(truth, noise):
    shares = covered(truth, noise, 1)

    assert min(shares.values()) >= 0.8, shares
    assert sum(shares.values()) / 4 >= 0.85


@pytest.mark.parametrize("repeats", [7, 12, 24])
def test_frequent_interruptions_are_inside_once_there_are_repeats_to_tell(repeats):
    shares = covered(line, interrupted, repeats)

    assert min(shares.values()) >= 0.9, shares


def test_more_repeats_make_intervals_narrower_and_not_without_end():
    def width(repeats):
        chance = random.Random(3)
        curve = Curve.of_repeats(
            {x: [line(x) * noisy(chance, x) for _ in range(repeats)] for x in KNOTS}
        )
        return sum(math.log(r[2] / r[1]) for r in map(curve.read, KNOTS)) / len(KNOTS)

    few, some, many = width(2), width(5), width(32)

    assert few > 1.5 * some > 1.5 * many
    assert many > 2 * 1.645 * 0.2  # what one further measurement differs by cannot be averaged out


STEADY = {x: [line(x) * f for f in (0.99, 1.0, 1.0, 1.01, 1.005, 0.995, 1.002)] for x in KNOTS}


def test_one_interruption_among_the_repeats_does_not_widen():
    hit = {x: [*t[:-1], (50 if x == KNOTS[4] else 1) * t[-1]] for x, t in STEADY.items()}

    quiet, disturbed = (Curve.of_repeats(r).read(KNOTS[4]) for r in (STEADY, hit))

    assert disturbed[2] / disturbed[1] < 1.1
    assert disturbed[0] == pytest.approx(quiet[0], rel=0.01)


def test_interruptions_that_come_again_do():
    hit = {x: [*t[:-1], 5 * t[-1]] for x, t in STEADY.items()}  # one in seven, at every size

    time, _, high, _ = Curve.of_repeats(hit).read(KNOTS[4])

    assert time == pytest.approx(line(KNOTS[4]), rel=0.01)
    assert high > 5 * line(KNOTS[4])


def test_below_the_first_knot_both_bounds_widen():
    curve = Curve.of_repeats({x: [line(x) * f for f in (0.9, 1.0, 1.1)] for x in KNOTS})

    near, far = curve.read(2048), curve.read(8)

    assert far[2] > near[2] > curve.read(4096)[2] > curve.read(4096)[0]
    assert far[1] < near[1] < curve.read(4096)[1]


def test_a_first_knot_that_bandwidth_rules_does_not_bound_small_payloads_from_below():
    curve = Curve.of_repeats({x: [1e-3 * x] * 5 for x in (1 << 20, 1 << 22, 1 << 24)})

    _, low, high, basis = curve.read(1 << 10)

    assert low < 1e-3 * (1 << 10) < 1e-3 * (1 << 20) < high
    assert basis == "scaled"


def test_the_frozen_table_keeps_the_width_of_repeats():
    model = CostModel()
    chance = random.Random(5)
    model.observe([
        {"op": "all_reduce", "algorithm": "native", "group_size": 4, "nbytes": x,
         "time_us": line(x) * noisy(chance, x)}
        for x in KNOTS for _ in range(5)
    ])  # fmt: skip

    _, chosen = model.select(model.freeze(), "all_reduce", 1 << 19, 4)

    assert chosen == model.predict("all_reduce", 1 << 19, 4, "native")


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("noise", [calm, noisy, spiky])
@pytest.mark.parametrize("truth", [line, switch, knee])
def test_a_size_that_was_measured_is_known_no_worse_than_one_beside_it(truth, noise, count):
    chance = random.Random(f"{truth.__name__} {noise.__name__} {count}")
    for _ in range(20):
        sizes = sorted(chance.sample(range(4096, 64 << 20, 64), count))
        repeated = {x: 5 if chance.random() < 0.3 else 1 for x in sizes}
        curve = Curve.of_repeats(
            {x: [truth(x) * noise(chance, x) for _ in range(repeated[x])] for x in sizes}
        )

        for x in sizes:
            at, below, above = (curve.read(n) for n in (x, x - 1, x + 1))

            assert at[2] / at[1] <= 1.001 * max(below[2] / below[1], above[2] / above[1])


def test_three_sizes_measured_once_bound_the_middle_one_by_less_than_a_factor_of_thousands():
    curve = Curve([(4096, 10.0), (1 << 20, 60.0), (64 << 20, 3000.0)])

    time, low, high, basis = curve.read(1 << 20)
    beside = curve.read((1 << 20) + 8)

    assert (time, basis) == (60.0, "calibrated")
    assert beside[1] <= 1.001 * low < high <= 1.001 * beside[2]
