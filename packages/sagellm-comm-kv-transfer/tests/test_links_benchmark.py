"""The rows of links in bench_compression, on little data."""

import pytest

from sagellm.comm.kv_transfer.benchmarks import _links
from sagellm.core.protocols.bench import Missing, Row


def test_every_contender_moves_real_kv_over_a_link():
    case = {"figure": "bytes per second", "link": "1 Gbit/s", "windows": 1}
    with _links.contenders(case) as named:
        missing = [run.reason for run in named.values() if isinstance(run, Missing)]
        if missing:
            pytest.skip(missing[0])
        rows = [Row(case, name, (run(),)) for name, run in named.items()]

    assert all(1e5 < row.median < 1e9 for row in rows)
    found = {r.name: r for r in _links.ratios(rows)}
    told = found["speed-up of quant 1/4 over raw / its ratio, 1 Gbit/s"]
    assert 3 < told.case["ratio"] < 5
    assert told.goal == 0.85
    assert "expected none" in told.case["auto"]


def test_auto_is_judged_by_the_best_that_it_may_choose():
    case = {"figure": "bytes per second", "link": "unshaped", "windows": 1}
    rates = {"raw": 10.0, "lossless": 4.0, "lossless-fast": 5.0, "quant within 1/32": 8.0,
             "quant 1/4": 50.0, _links.AUTO: 9.0}  # fmt: skip

    found = {r.name: r for r in _links.ratios([Row(case, n, (v,)) for n, v in rates.items()])}

    assert found["auto / best fixed choice, unshaped"].value == pytest.approx(0.9)
    assert found["auto / best fixed choice, unshaped"].goal == 0.95
    assert found["auto / raw, unshaped"].goal == 0.97
    assert len(found) == 2


def test_a_launch_has_all_links_and_a_quick_one_two():
    assert [c["link"] for c in _links.cases(False)] == list(_links.LINKS)
    assert len(_links.cases(True)) == 2
