"""The report of a benchmark: schema `sagellm.bench/1`, its check, and its Markdown."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from .errors import ConfigError

__all__ = ["SCHEMA", "commit_of", "hardware", "markdown", "validate", "versions"]

SCHEMA = "sagellm.bench/1"

_TOP = {
    "schema": str, "bench": str, "hardware": dict, "versions": dict, "commit": (str, type(None)),
    "command": str, "rows": list, "ratios": list,
}  # fmt: skip
_ROW = {"case": dict, "contender": str, "metric": str, "unit": str, "samples": list}
_NUMBER = (int, float)


def validate(report: Mapping[str, Any]) -> None:  # Any: JSON
    """Check that a report has the shape that every reader of `sagellm.bench/1` relies on.

    Unknown fields are ignored, so that a newer writer does not break an older reader.

    Raises:
        ConfigError: Fields are missing, of the wrong type, or contradict each other; the
            message lists all of them.

    """
    problems = _typed("report", report, _TOP)
    if not problems and report["schema"] != SCHEMA:
        problems.append(f"schema is {report['schema']!r}, not {SCHEMA!r}")
    for i, row in enumerate(report.get("rows") or []):
        where = f"rows[{i}]"
        found = _typed(where, row, _ROW)
        problems += found or _figures(where, row)
    for i, ratio in enumerate(report.get("ratios") or []):
        where = f"ratios[{i}]"
        found = _typed(where, ratio, {"name": str, "case": dict, "value": object, "goal": object})
        if not found:
            for key in ("value", "goal"):
                if ratio[key] is not None and not _finite(ratio[key]):
                    found.append(f"{where}.{key} is {ratio[key]!r}, neither a number nor null")
        problems += found
    if problems:
        raise ConfigError(f"not a {SCHEMA} report: " + "; ".join(problems))


def _typed(where: str, value: object, fields: Mapping[str, Any]) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"{where} is a {type(value).__name__}, not an object"]
    missing = [f"{where} has no {key!r}" for key in fields if key not in value]
    wrong = [
        f"{where}.{key} is {value[key]!r}"
        for key, kind in fields.items()
        if key in value and not isinstance(value[key], kind)
    ]
    return missing + wrong


def _finite(value: object) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool) and math.isfinite(value)


def _figures(where: str, row: Mapping[str, Any]) -> list[str]:
    samples = row["samples"]
    if not all(_finite(s) for s in samples):
        return [f"{where}.samples has something that is no finite number"]
    figures = [row.get(key) for key in ("median", "min", "max")]
    if not samples:
        return [] if figures == [None] * 3 else [f"{where} has figures but no samples"]
    if not all(_finite(f) for f in figures):
        return [f"{where} has samples, but median, min, max are {figures}"]
    median, low, high = (float(f) for f in figures if f is not None)
    if not low <= median <= high:
        return [f"{where}: min {low} <= median {median} <= max {high} is false"]
    if not math.isclose(min(samples), low) or not math.isclose(max(samples), high):
        return [f"{where}: min and max are not those of its samples"]
    return []


# -- where it was measured ----------------------------------------------------------------


def hardware(scheduling: str) -> dict[str, Any]:
    """The machine, as far as it tells: CPUs, memory, load, accelerators, scheduling class."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": None,
        "load_1min": None,
        "accelerators": [],
        "scheduling": scheduling,
    }
    if hasattr(os, "sysconf"):
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if hasattr(os, "getloadavg"):
        found["load_1min"] = os.getloadavg()[0]
    torch = sys.modules.get("torch")  # a benchmark that has not imported it does not use it
    if torch is not None and torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["accelerators"] = [torch.cuda.get_device_name(i) for i in range(count)]
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def versions(names: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, of this family's packages, and of the named distributions."""
    wanted = {"torch", "numpy", *(n.lower() for n in names)}
    found = {"python": platform.python_version()}
    for distribution in distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name in wanted or name.startswith("sagellm-"):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def commit_of(folder: Path) -> str | None:
    """Commit of the checkout that holds `folder`, with `+` when it has changes; None without."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


# -- for people ---------------------------------------------------------------------------

_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")),
    "bytes_per_s": ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"), (1.0, "B/s")),
}


def figure(value: float | None, unit: str) -> str:
    """A number with a readable unit; an empty string for None.

    >>> figure(0.00123, "s"), figure(2.5e9, "bytes_per_s"), figure(3.0, "ratio"), figure(None, "s")
    ('1.23 ms', '2.5 GB/s', '3 ratio', '')
    """
    if value is None:
        return ""
    for scale, name in _SCALES.get(unit, ()):
        if abs(value) >= scale:
            return f"{value / scale:.4g} {name}"
    return f"{value:.4g} {unit}"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: one table with a column per contender, and one of the ratios."""
    rows = report["rows"]
    contenders = list(dict.fromkeys(r["contender"] for r in rows))
    lines = [
        f"## {report['bench']}",
        "",
        f"`{report['command']}` at `{report['commit'] or 'no commit'}`"
        + (" (quick: not for judging)" if report.get("quick") else ""),
        "",
        "| case | metric | " + " | ".join(contenders) + " |",
        "|---" * (len(contenders) + 2) + "|",
    ]
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        case = " ".join(f"{k}={v}" for k, v in row["case"].items())
        cell = figure(row["median"], row["unit"])
        if cell:
            worst = figure(row.get("worst_launch"), row["unit"])
            cell += f" (worst launch {worst})" if worst else ""
        table.setdefault((case, row["metric"]), {})[row["contender"]] = cell
    for (case, metric), cells in table.items():
        lines.append(
            f"| {case} | {metric} | " + " | ".join(cells.get(c, "") for c in contenders) + " |"
        )
    missing = {r["contender"]: r["missing"] for r in rows if r.get("missing")}
    if missing:
        lines += ["", *(f"- {name}: not measured, {why}" for name, why in missing.items())]
    if report["ratios"]:
        lines += ["", "| ratio | case | value | worst launch | goal |", "|---|---|---|---|---|"]
    for ratio in report["ratios"]:
        case = " ".join(f"{k}={v}" for k, v in ratio["case"].items())
        figures = (ratio["value"], ratio.get("worst_launch"), ratio["goal"])
        shown = ["" if n is None else f"{n:.3g}" for n in figures]
        lines.append(f"| {ratio['name']} | {case} | " + " | ".join(shown) + " |")
    host = report["hardware"]
    load = host.get("load_1min")
    where = f"{host.get('cpu')}, {host.get('cpus_usable')} CPUs"
    lines += ["", where + ("" if load is None else f", load {load:.2f}")]
    return "\n".join(lines).rstrip() + "\n"


def summary(samples: Sequence[float]) -> dict[str, float | None]:
    """Median, min and max; all None without samples."""
    if not samples:
        return {"median": None, "min": None, "max": None}
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
