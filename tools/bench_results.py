"""Benchmark results in the form `sagellm.bench/1`, read with care.

The programs beside this file use only the standard library, so that they run before anything is
installed. What a file may hold is decided in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = "sagellm.bench/1"


class ResultError(ValueError):
    """A result file that is not in the form this project writes."""


@dataclass(frozen=True)
class Ratio:
    """One contender over another in one case; bigger is better."""

    bench: str
    name: str
    case: str  # canonical JSON, so that equal cases are equal strings
    value: float
    goal: float | None

    @property
    def key(self) -> tuple[str, str, str]:
        """What a ratio of another run must share to be compared with this one."""
        return self.bench, self.name, self.case

    def __str__(self) -> str:
        return f"{self.bench} {self.name} {self.case}"


def read(path: Path) -> dict[str, Any]:  # Any: JSON, checked by the callers' accessors
    """The result in `path`, known to be of our schema.

    Raises:
        ResultError: Not JSON, another schema, or a required field is missing.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ResultError(f"{path}: {e}") from e
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ResultError(f"{path}: its schema is not {SCHEMA}")
    wanted = ("bench", "hardware", "versions", "commit", "command", "rows", "ratios")
    if missing := [field for field in wanted if field not in result]:
        raise ResultError(f"{path}: lacks {', '.join(missing)}")
    return result


def ratios(path: Path) -> Iterator[Ratio]:
    """Every ratio in the file that has a value; a missing contender leaves its ratios without.

    Raises:
        ResultError: The file is not in our form, a value is not a finite number, or two ratios
            have the same name and case.
    """
    result = read(path)
    seen = set()
    for entry in result["ratios"]:
        if "value" in entry and entry["value"] is None:
            continue
        try:
            case = json.dumps(entry["case"], sort_keys=True)
            goal = entry.get("goal")
            ratio = Ratio(
                str(result["bench"]),
                str(entry["name"]),
                case,
                float(entry["value"]),
                None if goal is None else float(goal),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise ResultError(f"{path}: not a ratio: {entry!r}") from e
        if not math.isfinite(ratio.value):
            raise ResultError(f"{path}: {ratio} is {ratio.value}")
        if ratio.key in seen:
            raise ResultError(f"{path}: {ratio} stands there twice")
        seen.add(ratio.key)
        yield ratio
