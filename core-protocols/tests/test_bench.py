"""The harness: what it runs, in which order, and what the report says."""

import copy
import json
import multiprocessing
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from sagellm.core.protocols import bench_table
from sagellm.core.protocols.bench import (
    Benchmark,
    Missing,
    Ratio,
    Row,
    end_processes,
    markdown,
    validate,
)
from sagellm.core.protocols.errors import ConfigError, DistributedRuntimeError

MODULE = """
import os
from sagellm.core.protocols.bench import Benchmark, Missing, Ratio

def contenders(case):
    if case["nbytes"] < 0:
        raise RuntimeError("negative")
    return {
        "ours": lambda: 1.0,
        "peer": lambda: 3.0,
        "timed": lambda: None,
        "absent": Missing("pip install absent"),
    }

def ratios(rows):
    by = {r.contender: r.median for r in rows}
    yield Ratio("peer/ours", rows[0].case, by["peer"] / by["ours"], goal=2.0)
    yield Ratio("absent/ours", rows[0].case, None)

bench = Benchmark("copy", contenders, cases=[{"nbytes": int(os.environ.get("NBYTES", "8"))}],
                  ratios=ratios)
main = bench.main
if __name__ == "__main__":
    raise SystemExit(main())
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "bench_example_of_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import bench_example_of_test

    yield bench_example_of_test
    del sys.modules["bench_example_of_test"]


@pytest.fixture
def report(module, tmp_path):
    file = tmp_path / "report.json"
    assert module.main(["--launches", "2", "--repeats", "5", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_a_report_has_every_launch_and_keeps_the_schema(report, capsys):
    validate(report)
    rows = {r["contender"]: r for r in report["rows"]}

    assert report["command"].startswith("python -m bench_example_of_test --repeats 5 --launches 2")
    assert (rows["ours"]["median"], rows["ours"]["worst_launch"]) == (1.0, 1.0)
    assert len(rows["peer"]["samples"]) == 10
    assert rows["peer"]["launch_medians"] == [3.0, 3.0]
    assert rows["timed"]["median"] > 0
    assert rows["absent"]["median"] is None
    assert rows["absent"]["missing"] == "pip install absent"
    assert report["ratios"][0]["value"] == 3.0
    assert report["ratios"][0]["goal"] == 2.0
    assert report["ratios"][1]["value"] is None
    assert report["versions"]["sagellm-core-protocols"]
    assert report["hardware"]["cpus"] >= 1


def test_markdown_has_an_empty_column_for_the_missing(report):
    text = markdown(report)

    assert "| nbytes=8 | time | 1 s (worst launch 1 s) | 3 s" in text
    assert "absent: not measured, pip install absent" in text
    assert "| peer/ours | nbytes=8 | 3 | 3 | 2 |" in text


def test_a_failing_launch_fails_the_benchmark(module, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("NBYTES", "-1")

    assert module.main(["--quick", "--markdown", str(tmp_path / "x.md")]) == 1

    assert "launch 0 failed with exit code 1" in capfd.readouterr().err
    assert not (tmp_path / "x.md").exists()


def test_contenders_are_interleaved_in_changing_order():
    calls = []
    named = {n: (lambda n=n: calls.append(n) or 1.0) for n in "abc"}

    Benchmark("x", lambda case: named, repeats=20, warmup=1).launch(quick=False)

    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 21
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 1


def test_a_context_is_left_after_each_case():
    log = []

    @contextmanager
    def contenders(case):
        log.append(f"in {case['n']}")
        yield {"a": lambda: 1.0}
        log.append(f"out {case['n']}")

    cases = lambda quick: [{"n": 1}] if quick else [{"n": 1}, {"n": 2}]  # noqa: E731
    Benchmark("x", contenders, cases=cases).launch(quick=False)

    assert log == ["in 1", "out 1", "in 2", "out 2"]


def test_a_figure_that_is_no_number_is_an_error():
    bench = Benchmark("x", lambda case: {"a": lambda: float("nan")})

    with pytest.raises(DistributedRuntimeError, match="a gave nan"):
        bench.launch(quick=True)


def test_bigger_is_better_has_its_own_worst_launch():
    bench = Benchmark("x", lambda case: {}, metric="rate", unit="bytes_per_s", better="higher")
    rows = [{"case": {}, "contender": "a", "samples": [v], "missing": ""} for v in (3.0, 1.0, 2.0)]

    (row,) = bench._rows([{"rows": [r]} for r in rows])

    assert (row["median"], row["worst_launch"]) == (2.0, 1.0)


@pytest.mark.parametrize("argv", [["--launches", "0"], ["--repeats", "4"], ["--nonsense"]])
def test_bad_arguments_end_with_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        Benchmark("x", lambda case: {}).main(argv)
    assert caught.value.code == 2


def test_too_few_repeats_are_refused():
    with pytest.raises(ConfigError, match="at least 5 repeats"):
        Benchmark("x", lambda case: {}, repeats=3)


def test_rows_and_ratios_are_plain():
    assert Row({}, "a").median is None
    assert Ratio("a", {}, 1.0).goal is None
    assert Missing("x").reason == "x"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r.pop("commit"), "report has no 'commit'"),
        (lambda r: r.update(schema="other/1"), "schema is 'other/1'"),
        (lambda r: r.update(rows={}), "report.rows is {}"),
        (lambda r: r["rows"].append(3), "is a int"),
        (lambda r: r["rows"][0].update(samples=["x"]), "no finite number"),
        (lambda r: r["rows"][0].update(samples=[]), "figures but no samples"),
        (lambda r: r["rows"][0].update(median=None), "has samples, but"),
        (lambda r: r["rows"][0].update(median=99.0), "is false"),
        (lambda r: r["rows"][0].update(samples=[0.5]), "not those of its samples"),
        (lambda r: r["ratios"][0].update(value="fast"), "neither a number nor null"),
        (lambda r: r["ratios"][0].pop("goal"), "has no 'goal'"),
    ],
)
def test_a_broken_report_is_refused(report, change, match):
    broken = copy.deepcopy(report)
    change(broken)

    with pytest.raises(ConfigError, match=match):
        validate(broken)


def test_a_newer_field_is_ignored(report):
    validate({**report, "from_the_future": 1})


def test_priority_says_what_was_granted(module, tmp_path):
    file = tmp_path / "p.json"

    assert module.main(["--quick", "--priority", "--json", str(file)]) == 0

    scheduling = json.loads(file.read_text())["hardware"]["scheduling"]
    assert scheduling != "default"
    assert Path(file).exists()


def test_reports_of_several_runs_become_one_table():
    def report(*launches):
        case = {"op": "all_reduce", "nbytes": 64 << 10}
        judged = {"name": "gloo/x", "case": case, "goal": 3.0, "launches": list(launches)}
        return {"bench": "small", "ratios": [judged, {**judged, "name": "other", "goal": None}]}

    *_, row = bench_table.lines([report(2.0, 4.0), report(9.0)])

    assert row == "| small | `gloo/x` | op=all_reduce nbytes=64KiB | 3 | 4 | 2-9 of 3 | yes |"
    assert list(bench_table.lines([report()]))[2].endswith("| 3 | not measured |  |  |")


def stays(pipe, obeys):
    """A contender's process, which ends with its pipe or never."""
    while True:
        try:
            pipe.recv()
        except EOFError:
            if obeys:
                return
            time.sleep(1)


def test_processes_of_contenders_end_with_their_pipes_or_are_killed():
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for obeys in (True, False):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=stays, args=(theirs, obeys), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)

    end_processes(pipes, processes[:1], timeout_s=20)
    end_processes(pipes, processes, timeout_s=0.2)

    assert [p.exitcode for p in processes] == [0, -signal.SIGKILL]
