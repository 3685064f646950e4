"""Checks, their outcomes, and the report over them; shared by every suite.

A check is one sentence of a contract, tried on a real implementation. It *ran*, was *refused*
(the implementation does not claim the operation, and said so by name), was *skipped* (this
machine or implementation cannot show it, with the reason), or *failed*.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal

from sagellm.core.protocols.errors import ConfigError

__all__ = [
    "CONTRACT_VERSION",
    "REPORT_SCHEMA",
    "Check",
    "Entry",
    "Refused",
    "Report",
    "Skipped",
    "outcome",
    "run_local",
    "select",
]

CONTRACT_VERSION = 1
"""Rises when an implementation that passed may fail; it moves apart from the packages' versions."""

REPORT_SCHEMA = "sagellm.conformance/1"

Status = Literal["run", "refused", "skipped", "failed"]


class Skipped(Exception):  # noqa: N818 - an outcome, not an error
    """The check cannot be made here; the text says why."""


class Refused(Exception):  # noqa: N818 - an outcome, not an error
    """The implementation refused by name what it does not claim; the text is its message."""


@dataclass(frozen=True, slots=True)
class Check:
    """One sentence of a contract.

    Attributes:
        name: Stable name, such as `all_reduce[sum-float32]`.
        run: Tries it; its argument depends on the suite. Raises when the sentence is untrue.
        timeout_s: Longest time it may take.
        min_size: Ranks it needs at least, for suites with ranks.
        deadly: Whether it leaves its group dead.
        deadline_s: The group's own deadline; None is one that no sound backend reaches.

    """

    name: str
    run: Callable[..., None]
    timeout_s: float = 60.0
    min_size: int = 1
    deadly: bool = False
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """How one check ended."""

    check: str
    status: Status
    detail: str = ""
    seconds: float = 0.0


@dataclass
class Report:
    """What a suite found about one implementation.

    Attributes:
        kind: Suite, such as `comm_backend`.
        target: What was tried.
        entries: Outcomes in the order of the suite.
        world_size: Ranks, for suites with ranks.

    """

    kind: str
    target: str
    entries: list[Entry] = field(default_factory=list)
    world_size: int = 1

    def of(self, status: Status) -> list[Entry]:
        """The entries that ended so."""
        return [e for e in self.entries if e.status == status]

    def counts(self) -> dict[Status, int]:
        """Number of entries per outcome."""
        statuses: tuple[Status, ...] = ("run", "refused", "skipped", "failed")
        return {status: len(self.of(status)) for status in statuses}

    def ok(self, *, reference: bool = False) -> bool:
        """Whether nothing failed; for a reference implementation, nor was skipped."""
        return not self.of("failed") and not (reference and self.of("skipped"))

    def to_json(self) -> dict[str, Any]:  # Any: JSON
        """The report as plain data of schema `sagellm.conformance/1`."""
        return {
            "schema": REPORT_SCHEMA,
            "contract_version": CONTRACT_VERSION,
            "kind": self.kind,
            "target": self.target,
            "world_size": self.world_size,
            "counts": self.counts(),
            "entries": [asdict(e) for e in self.entries],
        }

    def text(self) -> str:
        """The report for a person: what did not simply run, then the counts."""
        lines = []
        for entry in self.entries:
            if entry.status != "run":
                lines.append(f"{entry.status:8} {entry.check}: {entry.detail}")
        counts = ", ".join(
            f"{len(self.of(s))} {s}" for s in ("run", "refused", "skipped", "failed")
        )
        ranks = f" on {self.world_size} ranks" if self.world_size > 1 else ""
        lines.append(f"{self.kind} {self.target}{ranks}, contract {CONTRACT_VERSION}: {counts}")
        return "\n".join(lines)


def run_local(
    kind: str,
    target: str,
    checks: Sequence[Check],
    argument: object,
    *,
    timeout_s: float | None = None,
) -> Report:
    """Run checks in this process, each with `argument`; a check that hangs has failed.

    Every check runs in a thread of its own, so that one that never ends is left behind.

    Args:
        kind: Suite.
        target: Name for the report.
        checks: What to run.
        argument: Handed to every check.
        timeout_s: Longest time for one check; None is the check's own.

    """
    from .rank_pool import RankFailedError, ThreadRanks

    report = Report(kind, target)
    for check in checks:
        started = time.monotonic()

        def one(rank: int, size: int, check: Check = check) -> tuple[Status, str]:
            return outcome(lambda: check.run(argument))

        try:
            ((status, detail),) = ThreadRanks(1).run(one, timeout_s=timeout_s or check.timeout_s)
        except RankFailedError as e:
            status, detail = "failed", e.outcomes[0].error
        report.entries.append(Entry(check.name, status, detail, time.monotonic() - started))
    return report


def outcome(call: Callable[[], object]) -> tuple[Status, str]:
    """How a call of a check ended."""
    try:
        call()
    except Skipped as e:
        return "skipped", str(e)
    except Refused as e:
        return "refused", str(e)
    except Exception as e:  # whatever an implementation raises is what the report is about
        frames = traceback.extract_tb(e.__traceback__)
        where = "; ".join(f"{f.name}:{f.lineno}" for f in frames[-3:])
        return "failed", f"{type(e).__name__}: {e} ({where})"
    return "run", ""


def select(checks: Sequence[Check], only: Sequence[str]) -> list[Check]:
    """The checks whose names match a pattern (`all_reduce*`); all when there is none.

    Raises:
        ConfigError: No check matches.

    """
    patterns = [p.replace("[", "[[]") for p in only]
    found = [c for c in checks if not only or any(fnmatch(c.name, p) for p in patterns)]
    if not found:
        raise ConfigError(f"no check matches {list(only)}")
    return found
