"""The benchmarks of the graph and the cost model, at sizes that take no time."""

import dataclasses

import pytest

from sagellm.comm.topology.benchmarks import bench_cost_model, bench_graph
from sagellm.core.protocols.bench import Missing, Row


def rows_of(case, contenders):
    return [
        Row(case, name, missing=c.reason) if isinstance(c, Missing) else Row(case, name, (c(),) * 5)
        for name, c in contenders.items()
    ]


@pytest.mark.parametrize("shape", bench_graph.SHAPES)
def test_graph_figures_are_taken_and_judged(shape, monkeypatch):
    monkeypatch.setattr(bench_graph, "DEVICES", 300)
    monkeypatch.setattr(bench_graph, "PAIRS", 40)
    bench_graph.topology.cache_clear()
    bench_graph.memory_gb.cache_clear()

    rows = rows_of({"shape": shape}, bench_graph.contenders({"shape": shape}))
    ratios = {r.name: r for r in bench_graph.ratios(rows)}

    bench_graph.topology.cache_clear()
    bench_graph.memory_gb.cache_clear()
    assert all(row.missing or row.median > 0 for row in rows)
    for name in ("2 s/build", "1 ms/p95 of warm paths", "500 MB/memory of graph and answers"):
        assert ratios[name].goal == 1.0
        assert ratios[name].value > 1


def test_recorded_figures_meet_their_goals(shared_samples, monkeypatch):
    monkeypatch.setenv(bench_cost_model.CURVES_VARIABLE, str(shared_samples.parent / "curves"))
    bench_cost_model.recorded.cache_clear()
    case = {"what": "recorded"}

    rows = rows_of(case, bench_cost_model.contenders(case))
    ratios = bench_cost_model.ratios(rows)

    assert len(ratios) >= 8
    assert {r.name: r.value for r in ratios if r.value < r.goal} == {}


def test_without_recorded_tables_the_column_stays_empty(monkeypatch):
    monkeypatch.setattr(bench_cost_model, "curves_folder", lambda: None)

    (missing,) = bench_cost_model.contenders({"what": "recorded"}).values()

    assert "SAGELLM_BENCH_CURVES" in missing.reason


def test_choices_and_plans_are_judged():
    cases = ({"what": "choices", "topologies": 6}, {"what": "plan", "nodes": 2})

    rows = [row for c in cases for row in rows_of(c, bench_cost_model.contenders(c))]
    names = {r.name: r for r in bench_cost_model.ratios(rows)}

    assert names["bad choices by chance/after measuring"].value > 1
    assert names["choices within 5 % after measuring/95 %"].value > 0.9
    assert names["60 s/plan"].value > 1


def test_what_luck_would_do_is_told_of_recorded_tables_too(shared_samples, monkeypatch):
    monkeypatch.setenv(bench_cost_model.CURVES_VARIABLE, str(shared_samples.parent / "curves"))
    bench_cost_model.choices.cache_clear()
    case = {"what": "choices", "topologies": 2}

    rows = rows_of(case, bench_cost_model.contenders(case))
    bench_cost_model.choices.cache_clear()
    figures = {row.contender: row.median for row in rows}
    names = {r.name: r for r in bench_cost_model.ratios(rows)}

    assert 0.5 <= figures["between recorded tables by chance, share within 5 %"] < 0.8
    assert names["bad choices by chance/between recorded tables"].value > 1


def test_live_sizes_are_those_fixed_beforehand_and_a_second_grid_beside_them():
    powers, beside = (bench_cost_model.grid(g) for g in ("powers of two", "off the pages"))
    names = {c["grid"] for c in bench_cost_model.cases(quick=False) if c["what"] == "live"}

    assert powers == [1 << k for k in range(12, 25)]
    assert beside == sorted(set(beside))
    assert (len(beside), beside[0]) == (25, 4096)
    assert names == {"powers of two", "off the pages"}


def test_a_live_figure_is_judged_by_the_noise_where_that_is_greater():
    case = {"what": "live", "backend": "gloo", "ranks": 2, "rounds": 5, "grid": "powers of two"}
    figures = {"error, median": 0.1, "half-split of repeats, median": 0.2}
    rows = [Row(case, name, (value,)) for name, value in figures.items()]

    (noisy,) = bench_cost_model.ratios(rows)
    calm = [dataclasses.replace(rows[0], samples=(0.04,)),
            dataclasses.replace(rows[1], samples=(0.01,))]  # fmt: skip
    (quiet,) = bench_cost_model.ratios(calm)

    assert noisy.value == pytest.approx(2)
    assert quiet.value == pytest.approx(1.25)


def test_a_backend_that_cannot_be_timed_leaves_its_column_empty():
    pytest.importorskip("torch", reason="timing collectives needs torch")
    case = {"what": "live", "backend": "nonesuch", "ranks": 2, "rounds": 5, "grid": "powers of two"}

    rows = rows_of(case, bench_cost_model.contenders(case))

    assert all("nonesuch" in row.missing for row in rows)
    assert [r.value for r in bench_cost_model.ratios(rows)] == [None]
