"""The gate and the report, run as programs."""

import json
import sys

import pytest


def result(*ratios, **changes):
    fields = {
        "schema": "sagellm.bench/1",
        "bench": "transfer",
        "hardware": {"cpu": "x"},
        "versions": {"python": "3.11"},
        "commit": "abc",
        "command": "python -m …",
        "rows": [
            {"case": {"bytes": 4}, "contender": "ours", "metric": "rate", "unit": "bytes/s",
             "median": 2.0, "min": 1.0, "max": 3.0, "samples": [1.0, 2.0, 3.0]},
        ],
        "ratios": [
            {"name": "ours/theirs", "case": case, "value": value, "goal": 1.0}
            for case, value in ratios
        ],
    }  # fmt: skip
    return fields | changes


@pytest.fixture
def folders(tmp_path):
    """Write results into `bench-out` and `baseline`, as the sessions lay them out."""

    def write(now=None, accepted=None):
        for folder, content in (("bench-out", now), ("baseline", accepted)):
            target = tmp_path / folder / "kv_transfer"
            target.mkdir(parents=True, exist_ok=True)
            if content is not None:
                (target / "bench_transfer.json").write_text(json.dumps(content))

    return write


@pytest.fixture
def gate(root, run_python):
    def run(*arguments):
        program = str(root / "tools" / "perf_gate.py")
        return run_python(program, "bench-out", "baseline", *arguments, check=False)

    return run


def test_a_ratio_that_held_passes(folders, gate):
    folders(result(({"bytes": 4}, 1.7)), result(({"bytes": 4}, 2.0)))

    assert gate().returncode == 0


def test_a_ratio_that_fell_fails_and_is_named(folders, gate):
    folders(
        result(({"bytes": 4}, 2.0), ({"bytes": 8}, 1.5)),
        result(({"bytes": 4}, 2.0), ({"bytes": 8}, 2.0)),
    )

    done = gate()

    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("WORSE")]
    assert '{"bytes": 8}' in line
    assert "floor 1.6" in line


def test_a_ratio_to_a_contender_that_is_not_here_is_no_ratio(folders, gate):
    empty = result(({"bytes": 4}, None), ({"bytes": 8}, 2.0))
    folders(empty, empty)

    assert gate().returncode == 0

    folders(empty, result(({"bytes": 4}, 2.0), ({"bytes": 8}, 2.0)))
    assert gate().returncode == 1


def test_a_loss_may_not_grow(folders, gate):
    folders(result(({}, -0.2)), result(({}, -0.2)))
    assert gate().returncode == 0

    folders(result(({}, -0.3)), result(({}, -0.2)))
    assert gate().returncode == 1


def test_the_tolerance_is_the_callers(folders, gate):
    folders(result(({}, 1.5)), result(({}, 2.0)))

    assert gate("--tolerance", "0.3").returncode == 0
    assert gate("--tolerance", "0.1").returncode == 1
    assert gate("--tolerance", "1").returncode == 2


def test_a_ratio_that_is_gone_fails(folders, gate):
    folders(result(({"bytes": 4}, 9.0)), result(({"bytes": 8}, 2.0)))

    done = gate()

    assert done.returncode == 1
    assert "GONE" in done.stdout


def test_a_benchmark_that_was_not_run_fails(folders, gate):
    folders(None, result(({}, 2.0)))

    done = gate()

    assert done.returncode == 1
    assert "nox -s bench" in done.stdout


def test_no_baseline_is_no_pass(folders, gate):
    folders(result(({}, 2.0)), None)

    assert gate().returncode == 1


def test_times_are_not_compared(folders, gate):
    slow = result(({}, 2.0))
    slow["rows"][0]["median"] = 2000.0
    folders(slow, result(({}, 2.0)))

    assert gate().returncode == 0


def test_other_hardware_is_said(folders, gate):
    folders(result(({}, 2.0), hardware={"cpu": "y"}), result(({}, 2.0)))

    assert "other hardware" in gate().stdout


def test_the_same_machine_under_another_load_is_the_same(folders, gate):
    folders(result(({}, 2.0), hardware={"cpu": "x", "load_1min": 9.0}), result(({}, 2.0)))

    assert "other hardware" not in gate().stdout


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_run_and_a_full_one_are_not_compared(quick, folders, gate):
    folders(result(({}, 2.0), quick=quick), result(({}, 2.0), quick=not quick))

    done = gate()

    assert done.returncode == 1
    assert done.stdout.startswith("OTHER")


def test_the_gate_reads_what_a_benchmark_of_ours_writes(tmp_path, gate, run_python):
    for folder in ("bench-out", "baseline"):
        out = tmp_path / folder / "core_protocols" / "bench_metrics.json"
        out.parent.mkdir(parents=True)
        module = "sagellm.core.protocols.benchmarks.bench_metrics"
        run_python("-m", module, "--quick", "--json", str(out))

    done = gate("--tolerance", "0.9")  # how fast it was is not the question here

    assert done.returncode == 0, done.stdout
    assert "ok    metrics" in done.stdout


def test_accepted_results_become_the_baseline(folders, gate):
    folders(result(({}, 0.5)), result(({}, 2.0)))

    assert gate().returncode == 1
    assert gate("--accept").returncode == 0
    assert gate().returncode == 0


@pytest.mark.parametrize(
    "bad",
    [
        result(({}, float("nan"))),
        result(({}, 1.0), ({}, 2.0)),
        result(schema="sagellm.bench/2"),
        result() | {"ratios": [{"name": "x", "value": 1.0}]},
        {k: v for k, v in result().items() if k != "commit"},
        [],
    ],
    ids=["nan", "twice", "schema", "no case", "no commit", "a list"],
)
def test_a_result_in_another_form_is_refused(bad, folders, gate):
    folders(bad, result(({}, 1.0)))

    assert gate().returncode == 1
    accepting = gate("--accept")
    assert accepting.returncode == 1
    assert "bench_transfer.json" in accepting.stderr


def test_the_report_holds_ratios_goals_and_rows(folders, root, run_python, tmp_path):
    folders(result(({"bytes": 4}, 0.9), ({"bytes": 8}, 2.0)))

    run_python(str(root / "tools" / "bench_report.py"), "bench-out")

    page = (tmp_path / "bench-out" / "REPORT.md").read_text()
    assert "| ours/theirs | bytes=4 | 0.9 | 1 | no |" in page
    assert "| ours/theirs | bytes=8 | 2 | 1 | yes |" in page
    assert "| ours | bytes=4 | rate (bytes/s) | 2 | 1 | 3 |" in page


def test_a_report_of_nothing_fails(tmp_path, root, run_python):
    program = str(root / "tools" / "bench_report.py")

    assert run_python(program, str(tmp_path), check=False).returncode == 1


def test_the_tools_need_only_the_standard_library(root, run_python):
    program = "import sys; sys.path.insert(0, sys.argv[1]); import perf_gate, bench_report"

    run_python("-I", "-S", "-c", program, str(root / "tools"))
    assert sys.version_info >= (3, 11)
