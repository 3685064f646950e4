"""The figures that have a goal, as one Markdown table of several reports.

`python -m sagellm.core.protocols.bench_table a.json b.json …`, of files that `--json`
wrote; of one benchmark there may be several, whose launches then count together. A value is the
median over launches, beside it the least and the largest of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench import validate

_HEADER = ("benchmark", "ratio", "case", "goal", "median", "launches", "met")


def lines(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of the table; rows in the order in which the reports first have them."""
    found: dict[tuple[str, str, str], tuple[float, list[float]]] = {}
    for report in reports:
        for ratio in report["ratios"]:
            if ratio["goal"] is not None:
                key = report["bench"], ratio["name"], _case(ratio["case"])
                found.setdefault(key, (ratio["goal"], []))[1].extend(ratio["launches"])
    yield _line(_HEADER)
    yield _line(["---"] * len(_HEADER))
    for (bench, name, case), (goal, values) in found.items():
        cells = [bench, f"`{name}`", case, f"{goal:.3g}"]
        if not values:
            yield _line([*cells, "not measured", "", ""])
            continue
        middle = statistics.median(values)
        spread = f"{min(values):.3g}-{max(values):.3g} of {len(values)}"
        yield _line([*cells, f"{middle:.3g}", spread, "yes" if middle >= goal else "no"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _case(case: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={_bytes(v) if k == 'nbytes' else v}" for k, v in case.items())


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(description="Figures with a goal, of several reports.")
    parser.add_argument("files", nargs="+", type=Path, help="what --json wrote")
    reports = [json.loads(file.read_text()) for file in parser.parse_args(argv).files]
    for report in reports:
        validate(report)
    sys.stdout.writelines(f"{line}\n" for line in lines(reports))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
