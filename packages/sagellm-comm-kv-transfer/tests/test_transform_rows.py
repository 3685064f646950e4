"""What the rows on `transform` promise, without running them."""

import pytest
import torch

from sagellm.comm.kv_transfer.benchmarks import _transform_data, _transform_rows
from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.bench import Missing, Row


def rows():
    made = []
    for case in _transform_rows.cases(quick=False):
        for name in _transform_rows.contenders(case):
            own = name.endswith(case["text"])
            made.append(Row(case, name, (10.0 if own else 9.0,)))
    return made


@pytest.fixture
def no_model(monkeypatch):
    def missing(_):
        raise ConfigError("no model here")

    monkeypatch.setattr(_transform_data, "evaluation", missing)


def test_every_figure_has_its_goal_and_no_row_of_others_counts(no_model):
    found = {r.name: r for r in _transform_rows.ratios(rows())}

    layer = found["ratio of transform per layer at the attention error of KIVI-4 g32, English"]
    across = found["ratio of transform across layers at the attention error of int4 g64, English"]
    assert (layer.goal, across.goal) == (6.0, 11.0)
    shifts = [r for r in found.values() if ": basis of" in r.name]
    assert [(r.value, r.goal) for r in shifts] == [(0.9, 0.92)] * 4
    assert _transform_rows.ratios([Row({"figure": "kl", "subject": "x"}, "quant 1", (1.0,))]) == []


def test_a_missing_model_leaves_columns_empty_with_the_reason(no_model):
    for case in _transform_rows.cases(quick=True):
        found = _transform_rows.contenders(case)
        assert set(found.values()) == {Missing("no model here")}


def test_bases_that_are_kept_need_no_model(monkeypatch, tmp_path):
    held = {n: torch.randn(2, 1024, 3, 8) for n in "qkv"}
    monkeypatch.setattr(_transform_data, "calibration", lambda _: held)
    monkeypatch.setenv("SAGELLM_BENCH_BASES", str(tmp_path / "bases"))
    monkeypatch.setattr(_transform_data, "evaluation", lambda _: held)
    case = next(c for c in _transform_rows.cases(quick=True) if c["figure"] == _transform_rows.SIZE)
    fitted = {name: call() for name, call in _run_apart(case).items()}

    def missing(_):
        raise ConfigError("no model here")

    monkeypatch.setattr(_transform_data, "calibration", missing)
    assert {name: call() for name, call in _run_apart(case).items()} == fitted
    assert len(list((tmp_path / "bases").iterdir())) == 2


def _run_apart(case):
    """Contenders as another process would have them."""
    _transform_rows._basis.cache_clear()
    return _transform_rows.contenders(case)


def test_attention_errors_and_interpolation():
    held = {n: torch.randn(2, 1024, 3, 8, dtype=torch.float64) for n in "qkv"}

    assert _transform_rows.attention_error(held, held["k"], held["v"]) == 0.0
    assert _transform_rows.attention_error(held, held["k"], 2 * held["v"]) == pytest.approx(1.0)
    points = [(0.01, 4.0), (0.04, 16.0)]
    assert _transform_rows.ratio_at(points, 0.02) == pytest.approx(8.0)
    assert _transform_rows.ratio_at(points, 0.2) is None


def test_held_out_modules_are_not_calibrated_on():
    held_out = [n for n in (f"m{i}.py" for i in range(500)) if _transform_data._held_out(n)]

    assert 5 < len(held_out) < 50
    assert _transform_data._held_out("test/test_os.py")
