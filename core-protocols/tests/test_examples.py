"""The examples run as they stand, and the package's own benchmark keeps the schema."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm.core.protocols.bench import validate
from sagellm.core.protocols.benchmarks import bench_metrics

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_an_example_runs(file):
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_benchmark_of_metrics_reports(tmp_path, capsys):
    file = tmp_path / "report.json"

    assert bench_metrics.main(["--quick", "--json", str(file)]) == 0

    report = json.loads(file.read_text())
    validate(report)
    assert {r["contender"] for r in report["rows"]} >= {"empty call", "none", "in memory"}
    assert report["ratios"][0]["value"] > 0
