"""Whether what `select` takes is near the best, and honest about what it never measured."""

import math

from sagellm.comm.topology.benchmarks.random_topology import random_topology
from sagellm.comm.topology.benchmarks.regret import (
    read_curves,
    recorded_regrets,
    simulated_regrets,
)


def within(regrets, limit=0.05):
    return sum(r.regret <= limit for r in regrets) / len(regrets)


def test_topologies_are_equal_for_equal_seeds_and_differ_otherwise():
    assert random_topology(3) == random_topology(3)
    assert len({random_topology(s).fingerprint for s in range(30)}) > 20


def test_choices_after_a_few_measurements_are_near_the_best():
    regrets = [r for seed in range(15) for r in simulated_regrets(seed, calibrated=True)]

    assert len(regrets) == 15 * 5
    assert within(regrets) >= 0.95
    assert any(r.best != regrets[0].best for r in regrets)


def test_choices_by_formula_alone_see_which_links_are_shared():
    regrets = [r for seed in range(25) for r in simulated_regrets(seed, calibrated=False)]

    assert within(regrets) >= 0.9


def test_choices_between_recorded_machines_are_near_the_best(shared_samples):
    regrets = recorded_regrets(read_curves(shared_samples.parent / "curves"))

    assert len(regrets) > 50
    assert within(regrets) >= 0.95
    assert all(math.isfinite(r.regret) and r.regret >= 0 for r in regrets)
