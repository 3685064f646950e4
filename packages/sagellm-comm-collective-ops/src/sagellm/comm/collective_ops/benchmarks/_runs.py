"""What the benchmarks of collectives share: contenders over the fleet, figures over rows."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sagellm.core.protocols import DistributedRuntimeError
from sagellm.core.protocols.bench import Case, Contenders, Missing, Ratio, Row

from ._fleet import missing, ranks_of

MPIS = ("mpich", "openmpi")
SAMPLE_S = 0.02
CALLS = (3, 500)
P99_CALLS = 500
P99_S = 1.0
STRETCH_S = 0.1
PAIRS, PAIR_CALLS = 200, 20
KiB, MiB = 1 << 10, 1 << 20

Contender = Callable[[], float] | Missing


def schedulings(quick: bool) -> Sequence[str]:
    """Real time and none; a quick run has the scheduling that the launch itself was given."""
    if not quick:
        return "rr", "normal"
    given = getattr(os, "sched_getscheduler", lambda _: 0)(0)
    return ("rr",) if given == getattr(os, "SCHED_RR", 2) else ("normal",)


def kind_of(variant: str) -> str:
    """Which ranks run a variant: `shm-native plain` those of `shm`."""
    first = variant.split(" ")[0]
    if first.startswith("shm-"):
        return "shm"
    return {"copy": "gloo", "handover": "gloo"}.get(first, first)


@contextmanager
def prepared(case: Case, variants: Sequence[str]) -> Iterator[dict[str, float | Missing]]:
    """Seconds of one call of each variant, whose buffers stand within the context."""
    world = int(case["ranks"])
    by_kind: dict[str, list[str]] = {}
    found: dict[str, float | Missing] = {}
    for variant in variants:
        by_kind.setdefault(kind_of(variant), []).append(variant)
    for kind in list(by_kind):
        why = missing(kind)
        if why:
            found |= dict.fromkeys(by_kind.pop(kind), Missing(why))
        else:
            ranks_of(kind, world)  # all start before one is waited for
    standing = []
    for kind, names in by_kind.items():
        ranks = ranks_of(kind, world)
        ranks.ready()
        if ranks.missing:
            found |= dict.fromkeys(names, Missing(ranks.missing))
            continue
        standing.append(ranks)
        refused = [why for why in ranks.ask("schedule", policy=case["scheduling"]) if why]
        if refused:
            found |= dict.fromkeys(names, Missing(refused[0]))
            continue
        answers = ranks.ask("prepare", case=dict(case), variants=names)
        found |= {name: _seconds(name, [a[name] for a in answers]) for name in names}
    yield {name: found[name] for name in variants}
    for ranks in standing:  # after an error the launch ends, and they with it
        ranks.ask("forget")


def _seconds(variant: str, answers: Sequence[Mapping[str, Any]]) -> float | Missing:
    for answer in answers:
        if "missing" in answer:
            return Missing(answer["missing"])
        if "wrong" in answer:
            if variant.startswith("shm-"):
                raise DistributedRuntimeError(f"{variant} is wrong: {answer['wrong']}")
            return Missing(f"its results are wrong: {answer['wrong']}")
    return float(max(answer["seconds"] for answer in answers))


def sampler(case: Case, variant: str, seconds: float, *, each: bool = True) -> Callable[[], float]:
    """A call that measures many calls and returns their median; of batches, the mean."""
    low, high = CALLS
    count = max(low, min(high, int(SAMPLE_S / max(seconds, 1e-7))))

    def sample() -> float:
        return statistics.median(_sample(case, variant, count, each)[0])

    return sample


def difference_sampler(case: Case, on: str, off: str) -> Callable[[], float]:
    """A call that measures by how much a call of `on` takes longer than one of `off`."""

    def sample() -> float:
        answers = ranks_of(kind_of(on), int(case["ranks"])).ask(
            "differences", on=on, off=off, calls=PAIR_CALLS, pairs=PAIRS
        )
        return statistics.median(statistics.fmean(same) for same in zip(*answers, strict=True))

    return sample


class Tail:
    """99th percentiles of `P99_CALLS` calls, of less where it is slow.

    Attributes:
        turn_s: Seconds of the last sample over turns of its busy thread; None before there is one.

    """

    def __init__(self, case: Case, variant: str) -> None:
        self._case, self._variant = case, variant
        self._ranks = ranks_of(kind_of(variant), int(case["ranks"]))
        self.turn_s: float | None = None

    def idle(self) -> float:
        """Nothing else runs."""
        return self._sample()[0]

    def busy(self) -> float:
        """A thread of the last rank's process computes in Python meanwhile.

        Raises:
            DistributedRuntimeError: It did not get to run.

        """
        self._ranks.ask("busy", rank=int(self._case["ranks"]) - 1)
        started = time.monotonic()
        try:
            p99, turns = self._sample()
        finally:
            self._ranks.ask("busy", rank=None)
        if not turns:
            raise DistributedRuntimeError(f"{self._variant}: the busy thread was never busy")
        self.turn_s = (time.monotonic() - started) / turns
        return p99

    def busy_turn(self) -> float:
        """How long the busy thread took for a turn, which is to say that it ran, and how much."""
        if self.turn_s is None:
            self.busy()
        assert self.turn_s is not None
        return self.turn_s

    def _sample(self) -> tuple[float, int]:
        times: list[float] = []
        turns, calls = 0, P99_CALLS // 10
        end = time.monotonic() + P99_S
        while len(times) < P99_CALLS and (not times or time.monotonic() < end):
            found, more = _sample(self._case, self._variant, calls, each=True)
            # a stretch lasts many of the 5 ms after which Python threads change
            calls = min(P99_CALLS, max(calls, int(STRETCH_S / statistics.median(found))))
            times += found
            turns += more
        return sorted(times)[len(times) * 99 // 100], turns


def _sample(case: Case, variant: str, calls: int, each: bool) -> tuple[list[float], int]:
    """Seconds of each call, and turns of busy threads in their time."""
    answers = ranks_of(kind_of(variant), int(case["ranks"])).ask(
        "sample", variant=variant, calls=calls, each=each
    )
    times = [max(same) for same in zip(*(a["times"] for a in answers), strict=True)]
    return times, sum(a["turns"] or 0 for a in answers)


@contextmanager
def measured(case: Case, variants: Sequence[str], *, each: bool = True) -> Iterator[Contenders]:
    """Contenders that return the median time of a call."""
    with prepared(case, variants) as found:
        yield {
            name: s if isinstance(s, Missing) else sampler(case, name, s, each=each)
            for name, s in found.items()
        }


# -- figures ------------------------------------------------------------------------------


def medians(rows: Iterable[Row], case: Case) -> dict[str, float | None]:
    """Median of each contender in a case; of both MPIs the better one is `mpi`."""
    found = {row.contender: row.median for row in rows if row.case == case}
    of_mpis = [m for name in MPIS if (m := found.get(name)) is not None]
    return found | {"mpi": min(of_mpis, default=None)}


def over(
    case: Case,
    times: Mapping[str, float | None],
    peer: str,
    ours: str,
    goal: float | None = None,
) -> Ratio:
    """`peer/ours`: how many times as long the peer takes."""
    theirs, mine = times.get(peer), times.get(ours)
    value = None if theirs is None or not mine else theirs / mine
    return Ratio(f"{peer}/{ours}", case, value, goal)


def judged(case: Case, goal: float | None, scheduling: str = "rr") -> float | None:
    """The goal where it is judged: under real-time scheduling, unless said otherwise."""
    return goal if case["scheduling"] == scheduling else None


def of_engine(engine: str, figures: tuple[float | None, float | None]) -> float | None:
    """One of a pair of goals: of pure Python, and with the C part."""
    python, native = figures
    return native if engine == "native" else python


def distinct(rows: Iterable[Row]) -> list[Case]:
    """The cases of some rows, in order."""
    cases: list[Case] = []
    for row in rows:
        if row.case not in cases:
            cases.append(row.case)
    return cases
