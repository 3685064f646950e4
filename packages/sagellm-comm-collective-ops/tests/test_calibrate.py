"""What is measured at start: whose it is, when it is kept, and what it may say."""

import os

import pytest
import torch
from test_choice import curves, shm_over

from sagellm.comm.collective_ops import GlooBackend, ShmBackend
from sagellm.comm.collective_ops._shm.choice import MEASURING
from sagellm.comm.collective_ops.calibrate import cached_table, keep_table, measure
from sagellm.core.protocols import ConfigError, CostTable


def with_time_to_measure(folder):
    """A calibration that is cut short on a busy machine is not kept."""
    measure.__kwdefaults__["budget_s"] = 60.0
    os.environ["XDG_CACHE_HOME"] = folder


def measured_at_start(b, folder):
    with_time_to_measure(folder)
    made = [
        GlooBackend(process_group=b.process_group, timeout_s=20, options={"calibrate": True})
        for _ in range(2)
    ]
    assert made[0].all_reduce(torch.ones(3))[0].item() == b.size
    del os.environ["XDG_CACHE_HOME"]
    first, second = ([str(r) for r in g._chooser.tables[1].rules] for g in made)
    assert first == second
    return first, made[0].get_stats().ops["all_reduce"].calls, made[1]._chooser.tables[1].source


def test_what_was_measured_is_everybodys_and_is_kept(gloo_pools, tmp_path):
    first, *others = gloo_pools(2).run(measured_at_start, str(tmp_path))
    assert others == [first]
    (kept,) = (tmp_path / "sagellm-comm").iterdir()
    key = kept.stem.removeprefix("collective_ops-")
    assert first[1:] == (1, f"calibration {key}")


def test_file_that_is_no_calibration_is_said_and_not_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = CostTable("k", 1, curves(native={1024: 2.0}))
    keep_table(table)
    assert cached_table("k") == table
    (kept,) = (tmp_path / "sagellm-comm").iterdir()
    kept.write_text("{}")
    assert cached_table("k") is None
    assert "is no calibration" in caplog.text
    assert cached_table("other") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    keep_table(table)


def shm_measured(b, folder):
    with_time_to_measure(folder)
    try:
        with shm_over(b, "auto", options={"calibrate": True}) as shm:
            table = shm._chooser.tables[1]
            switch = shm._shm.one_shot_bytes
            assert shm.get_stats().ops == {}
            choices = [shm.explain("all_reduce", 1 << i) for i in (10, 23)]
            sums = [shm.all_reduce(torch.ones(n))[-1].item() for n in (3, switch // 4 % 99999 + 1)]
            return [str(r) for r in table.rules], switch, choices, sums
    finally:
        del os.environ["XDG_CACHE_HOME"]


def test_shm_measures_where_two_shot_begins_and_all_ranks_take_rank_0s(gloo_pools, tmp_path):
    first, *others = gloo_pools(2).run(shm_measured, str(tmp_path))
    assert others == [first]
    rules, switch, choices, sums = first
    assert rules
    assert sums == [2.0, 2.0]
    assert [c.algorithm for c in choices] == [
        "one_shot" if n <= switch else "two_shot" for n in (1 << 10, 1 << 23)
    ]
    assert all(c.estimate_us for c in choices)
    assert len(list((tmp_path / "sagellm-comm").iterdir())) == 1


def shm_in_no_time(b, folder):
    os.environ["XDG_CACHE_HOME"] = folder
    MEASURING["budget_s"] = 0.0
    try:
        with shm_over(b, "auto", options={"calibrate": True}) as shm:
            return [str(r) for r in shm._chooser.tables[1].rules]
    finally:
        del os.environ["XDG_CACHE_HOME"], MEASURING["budget_s"]


def test_a_measurement_cut_short_is_not_kept(gloo_pools, tmp_path):
    assert gloo_pools(2).run(shm_in_no_time, str(tmp_path)) == [[]] * 2
    assert list(tmp_path.iterdir()) == []


def shm_measured_beside_overrides(b, folder):
    os.environ["XDG_CACHE_HOME"] = folder
    try:
        options = {"calibrate": True, "algorithms": "all_reduce:one_shot"}
        with shm_over(b, "auto", options=options) as shm:
            return shm._chooser.costs
    finally:
        del os.environ["XDG_CACHE_HOME"]


def test_what_runs_by_override_is_not_measured_as_something_else(gloo_pools, tmp_path):
    assert gloo_pools(2).run(shm_measured_beside_overrides, str(tmp_path)) == [None] * 2
    assert list(tmp_path.iterdir()) == []


def test_calibrate_that_is_no_bool_is_refused():
    with pytest.raises(ConfigError, match="option calibrate is 'yes'; pass True or False"):
        ShmBackend(options={"calibrate": "yes"})


def test_another_release_of_torch_or_of_this_package_measures_anew(monkeypatch):
    from sagellm.comm.collective_ops import MockWorld, calibrate

    def key():
        first, second = MockWorld(2).run(calibrate.table_key)
        assert first == second
        return first

    before = key()
    assert key() == before
    monkeypatch.setattr(calibrate, "__version__", "0.0.1")
    assert key() != before
