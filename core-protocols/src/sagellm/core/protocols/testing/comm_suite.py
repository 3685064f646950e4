"""The contract of `CommBackendProtocol`, run on real ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from .contract import Check, Entry, Report, Status, outcome, select
from .rank_pool import RankFailedError, RankPool, ThreadRanks
from .targets import BackendTarget, name_of

__all__ = ["check_backend", "comm_backend_checks"]

_DEADLINE_S = 15.0  # of groups in checks that are not about deadlines


def comm_backend_checks() -> list[Check]:
    """Every check of the suite, in a stable order; needs torch and numpy."""
    from . import comm_collectives, comm_group, comm_p2p

    return [*comm_group.checks(), *comm_collectives.checks(), *comm_p2p.checks()]


def check_backend(
    target: object,
    *,
    ranks: RankPool | ThreadRanks | None = None,
    world_size: int = 2,
    only: Sequence[str] = (),
    timeout_s: float | None = None,
) -> Report:
    """Run the suite on a backend and report.

    Args:
        target: A `BackendTarget`, or what one takes: `module:attribute`, the name of an entry
            point, or the object itself.
        ranks: Where to run; None makes threads or processes as the target wants, for this run.
        world_size: Ranks, where none are given.
        only: Patterns of checks' names (`all_reduce*`); empty runs all.
        timeout_s: Longest time for one check; None is the check's own.

    Raises:
        ConfigError: There is no such backend, or no such check.
        BackendUnavailableError: It cannot work on this host.

    """
    target = target if isinstance(target, BackendTarget) else BackendTarget(target)
    target.require_available()
    checks = select(comm_backend_checks(), only)
    if ranks is not None:
        return _run(target, ranks, checks, timeout_s)
    made = ThreadRanks(world_size) if target.in_process() else RankPool(world_size)
    with made:
        return _run(target, made, checks, timeout_s)


def _run(
    target: BackendTarget,
    ranks: RankPool | ThreadRanks,
    checks: Sequence[Check],
    timeout_s: float | None,
) -> Report:
    report = Report("comm_backend", name_of(target.name), world_size=ranks.size)
    for check in checks:
        started = time.monotonic()
        status, detail = _one(target, ranks, check, timeout_s or check.timeout_s)
        report.entries.append(Entry(check.name, status, detail, time.monotonic() - started))
    return report


def _one(
    target: BackendTarget, ranks: RankPool | ThreadRanks, check: Check, timeout_s: float
) -> tuple[Status, str]:
    if ranks.size < check.min_size:
        return "skipped", f"needs {check.min_size} ranks"
    meet = ranks.store_path()
    try:
        ended = ranks.run(_rank, target, check.name, meet, timeout_s=timeout_s)
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
    timeout_s = _DEADLINE_S if check.deadline_s is None else check.deadline_s
    with target.make(rank, size, meet, timeout_s) as backend:
        context = Ranks(backend, rank, size, timeout_s, meet)
        # A check that breaks the group at once would cut off a rank that still connects.
        context.meet_all("made")
        ended = outcome(lambda: check.run(context))
        if ended[0] == "failed":
            context.signal("failed")
            with contextlib.suppress(Exception):  # so that no peer waits for the group's deadline
                backend.abort(f"the check {name!r} failed on rank {rank}")
        elif not check.deadly:
            # Nobody leaves while peers may still read from it.
            try:
                context.meet_all("end")
            except TimeoutError as e:
                return "failed", str(e)
        return ended
