"""The contract of `CommBackendProtocol`, run on real ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .contract import Check, Entry, Report, Status, outcome, select
from .rank_pool import RankFailedError, RankPool, ThreadRanks
from .targets import BackendTarget

__all__ = ["check_backend", "comm_backend_checks"]

_DEADLY_TIMEOUT_S = 1.5  # the group's deadline where a check waits for it
_TIMEOUT_S = 15.0
_MAKE_S = 30.0  # what making and closing a group may take on a busy machine


def comm_backend_checks() -> list[Check]:
    """Every check of the suite, in a stable order; needs torch and numpy."""
    from . import comm_collectives, comm_group, comm_p2p

    return [*comm_group.checks(), *comm_collectives.checks(), *comm_p2p.checks()]


def check_backend(
    target: str | BackendTarget,
    *,
    ranks: RankPool | ThreadRanks | None = None,
    world_size: int = 2,
    only: Sequence[str] = (),
) -> Report:
    """Run the suite on a backend and report.

    Args:
        target: `module:attribute` or the name of an entry point; see `BackendTarget`.
        ranks: Where to run; None makes threads or processes as the target wants, for this run.
        world_size: Ranks, where none are given.
        only: Names or patterns (`all_reduce*`) of checks; empty runs all.

    """
    target = BackendTarget(target) if isinstance(target, str) else target
    checks = select(comm_backend_checks(), only)
    if ranks is not None:
        return _run(target, ranks, checks)
    made = ThreadRanks(world_size) if target.in_process() else RankPool(world_size)
    with made:
        return _run(target, made, checks)


def _run(target: BackendTarget, ranks: RankPool | ThreadRanks, checks: Sequence[Check]) -> Report:
    report = Report("comm_backend", target.name, world_size=ranks.size)
    for check in checks:
        started = time.monotonic()
        status, detail = _one(target, ranks, check)
        report.entries.append(Entry(check.name, status, detail, time.monotonic() - started))
    return report


def _one(target: BackendTarget, ranks: RankPool | ThreadRanks, check: Check) -> tuple[Status, str]:
    if ranks.size < check.min_size:
        return "skipped", f"needs {check.min_size} ranks"
    meet = ranks.store_path()
    try:
        ended = ranks.run(_rank, target, check.name, meet, timeout_s=check.timeout_s + _MAKE_S)
    except RankFailedError as e:
        failed = [o for o in e.outcomes if o.error]
        return "failed", "; ".join(f"rank {o.rank}: {o.error.strip()}" for o in failed)
    finally:
        target.forget(meet)
    by_status: dict[str, list[str]] = {}
    for rank, (status, detail) in enumerate(ended):
        by_status.setdefault(status, []).append(f"rank {rank}: {detail}")
    if "failed" in by_status:
        return "failed", "; ".join(by_status["failed"])
    if len(by_status) > 1:
        parted = "; ".join(f"{s} on {', '.join(d)}" for s, d in sorted(by_status.items()))
        return "failed", f"ranks differ: {parted}"
    return ended[0]


def _rank(rank: int, size: int, target: BackendTarget, name: str, meet: str) -> tuple[Status, str]:
    """One check on one rank, on a group of its own."""
    from .ranks import Ranks

    check = next(c for c in comm_backend_checks() if c.name == name)
    deadly = check.timeout_s > 30.0
    timeout_s = _DEADLY_TIMEOUT_S if deadly else _TIMEOUT_S
    with target.make(rank, size, meet, timeout_s) as backend:
        context = Ranks(backend, rank, size, timeout_s, meet)
        ended = outcome(lambda: check.run(context))
        if ended[0] == "run" and not deadly:
            # Nobody leaves while peers may still read from it. A failed rank waits for nobody:
            # its peers end at their own deadline.
            try:
                context.meet_all("end")
            except TimeoutError as e:
                return "failed", str(e)
        return ended
