"""Compare a run's benchmark ratios with the accepted ones.

    python tools/perf_gate.py bench-out benchmarks/baseline [--tolerance 0.2]
    python tools/perf_gate.py bench-out benchmarks/baseline --accept

Only ratios are compared: a contender over another in the same run says the same on every
machine, or nearly so; microseconds do not. A ratio fails when it is more than the tolerance
below the accepted one, or when it is no longer measured; a quick run is compared with a quick
one only, because it measures other sizes and less often. Both folders hold
<package>/<bench>.json. `--accept` copies the current files over the baseline.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import bench_results

MACHINE = ("machine", "cpu", "cpus", "accelerators")  # of the hardware; its load changes


def compare(current: Path, baseline: Path, tolerance: float) -> tuple[list[str], list[str]]:
    """What was found for one pair of files: all lines, and those that fail."""
    now = {r.key: r for r in bench_results.ratios(current)}
    lines, failures = [], []
    for accepted in bench_results.ratios(baseline):
        ratio = now.get(accepted.key)
        if ratio is None:
            line = f"GONE  {accepted}: was {accepted.value:.3g}, not measured any more"
            failures.append(line)
        else:
            floor = accepted.value - tolerance * abs(accepted.value)  # may be below zero: eff_saved
            verdict = "ok   " if ratio.value >= floor else "WORSE"
            line = (
                f"{verdict} {ratio}: {ratio.value:.3g}, "
                f"accepted {accepted.value:.3g}, floor {floor:.3g}"
            )
            if ratio.value < floor:
                failures.append(line)
        lines.append(line)
    return lines, failures


def gate(current: Path, baseline: Path, tolerance: float) -> int:
    """Print the comparison of two folders; 0 only if something was compared and nothing fell."""
    files = sorted(baseline.rglob("*.json"))
    if not files:
        print(f"no accepted results under {baseline}: run the benchmarks, then --accept")
        return 1

    failed = 0
    for file in files:
        other = current / file.relative_to(baseline)
        if not other.is_file():
            print(f"GONE  {other}: not there; run `nox -s bench`")
            failed += 1
            continue
        results = [bench_results.read(f) for f in (file, other)]
        kinds = ["quick" if r.get("quick") else "full" for r in results]
        if kinds[0] != kinds[1]:
            print(f"OTHER {other}: a {kinds[1]} run, and a {kinds[0]} one was accepted")
            failed += 1
            continue
        machines = [{name: r["hardware"].get(name) for name in MACHINE} for r in results]
        if machines[0] != machines[1]:
            print(f"note  {other}: other hardware than the accepted run's")
        lines, failures = compare(other, file, tolerance)
        print("\n".join(lines))
        failed += len(failures)
    print(f"{failed} failed" if failed else "no ratio fell")
    return 1 if failed else 0


def accept(current: Path, baseline: Path) -> int:
    """Make the current results the accepted ones, after reading every one of them."""
    files = sorted(current.rglob("*.json"))
    if not files:
        print(f"no results under {current}: run `nox -s bench` first")
        return 1

    for file in files:
        list(bench_results.ratios(file))  # a file in another form is refused before any copy
    for file in files:
        target = baseline / file.relative_to(current)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        print(f"accepted {target}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the gate; the answer is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("current", type=Path, help="folder of results, as `nox -s bench` writes")
    parser.add_argument("baseline", type=Path, help="folder of accepted results")
    parser.add_argument(
        "--tolerance", type=float, default=0.2, help="share a ratio may fall (default: 0.2)"
    )
    parser.add_argument("--accept", action="store_true", help="make current the baseline")
    chosen = parser.parse_args(arguments)
    if not 0 <= chosen.tolerance < 1:
        parser.error(f"--tolerance {chosen.tolerance} is not in [0, 1)")

    try:
        if chosen.accept:
            return accept(chosen.current, chosen.baseline)
        return gate(chosen.current, chosen.baseline, chosen.tolerance)
    except bench_results.ResultError as e:
        print(e, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
