"""Write one Markdown page of every benchmark result in a folder.

python tools/bench_report.py bench-out [--output bench-out/REPORT.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_results


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells may hold anything but a line break."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def number(value: float | None) -> str:
    """Three digits, or nothing where nothing was measured."""
    return "" if value is None else f"{value:.3g}"


def case_text(case: dict[str, Any]) -> str:  # Any: whatever a benchmark varies
    """`bytes=1024, ranks=2` for a case."""
    return ", ".join(f"{key}={value}" for key, value in case.items())


def section(path: Path) -> str:
    """One result as Markdown: where it ran, its ratios, its rows."""
    result = bench_results.read(path)
    parts = [
        f"## {result['bench']}",
        f"Commit `{result['commit']}`, run as `{result['command']}`.",
        "\n".join(
            f"- {name}: {json.dumps(result[name], sort_keys=True)}"
            for name in ("hardware", "versions")
        ),
    ]
    ratios = [
        (r.name, case_text(json.loads(r.case)), number(r.value), number(r.goal), verdict(r))
        for r in bench_results.ratios(path)
    ]
    if ratios:
        parts.append(table(("ratio", "case", "value", "goal", "met"), ratios))
    rows = [
        (
            str(row["contender"]),
            case_text(row["case"]),
            f"{row['metric']} ({row['unit']})",
            *(number(row.get(field)) for field in ("median", "min", "max")),
        )
        for row in result["rows"]
    ]
    if rows:
        parts.append(table(("contender", "case", "metric", "median", "min", "max"), rows))
    return "\n\n".join(parts)


def verdict(ratio: bench_results.Ratio) -> str:
    """`yes`, `no`, or nothing where no goal was set."""
    if ratio.goal is None:
        return ""
    return "yes" if ratio.value >= ratio.goal else "no"


def main(arguments: list[str] | None = None) -> int:
    """Write the page; the answer is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="folder of results, as `nox -s bench` writes")
    parser.add_argument("--output", type=Path, help="default: REPORT.md in that folder")
    chosen = parser.parse_args(arguments)
    files = sorted(chosen.results.rglob("*.json"))
    if not files:
        print(f"no results under {chosen.results}: run `nox -s bench` first", file=sys.stderr)
        return 1

    try:
        sections = [section(file) for file in files]
    except (bench_results.ResultError, KeyError, TypeError) as e:
        print(f"not a result: {e}", file=sys.stderr)
        return 1

    output = chosen.output or chosen.results / "REPORT.md"
    output.write_text("# Benchmark results\n\n" + "\n\n".join(sections) + "\n", encoding="utf-8")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
