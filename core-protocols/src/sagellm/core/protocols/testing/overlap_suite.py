"""The contract of `OverlapManagerProtocol` on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from . import overlap_plans, overlap_runs
from .contract import Check, Report, run_local, select
from .overlap_basics import Managers
from .targets import factory_of, name_of, resolve

__all__ = ["check_overlap_manager", "overlap_checks"]


def overlap_checks() -> list[Check]:
    """Every check of the suite, in a stable order."""
    return [*overlap_runs.checks(), *overlap_plans.checks()]


def check_overlap_manager(
    target: object, *, only: Sequence[str] = (), timeout_s: float | None = None
) -> Report:
    """Run the suite on a manager.

    Args:
        target: `module:attribute`, the name of an entry point, or the class, function or spec.
        only: Patterns of checks' names; empty runs all.
        timeout_s: Longest time for one check; None is the check's own.

    """
    argument = Managers(factory_of(resolve("overlap_manager", target)))
    return run_local(
        "overlap_manager",
        name_of(target),
        select(overlap_checks(), only),
        argument,
        timeout_s=timeout_s,
    )
