"""What the overlap suite's checks share, and the metrics' definition in a few lines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sagellm.core.protocols.errors import CommTimeoutError
from sagellm.core.protocols.overlap_manager import Interval, OverlapManagerProtocol
from sagellm.core.protocols.work import CompletedWork

__all__ = ["WAIT_S", "Log", "Managers", "PendingWork", "equal", "held", "measure"]

WAIT_S = 10.0
"""Longest wait of a check for something that has to happen."""


def measure(intervals: Sequence[Interval], makespan_s: float) -> dict[str, float]:
    """What `OverlapMetrics` says of intervals, by its definition and nothing else.

    Returns compute_s, comm_s, overlapped_s, exposed_s, and `idle:<lane>` for every lane.
    """
    lanes: dict[str, list[tuple[float, float]]] = {}
    for i in intervals:
        lanes.setdefault(i.lane, []).append((i.start_s, i.end_s))
    compute = _merged(x for lane, xs in lanes.items() if lane.startswith("compute") for x in xs)
    comm = _merged(x for lane, xs in lanes.items() if not lane.startswith("compute") for x in xs)
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in compute for c, d in comm)
    found = {
        "compute_s": _length(compute),
        "comm_s": _length(comm),
        "overlapped_s": both,
        "exposed_s": _length(comm) - both,
    }
    for lane, xs in lanes.items():
        found[f"idle:{lane}"] = 1 - _length(_merged(xs)) / makespan_s if makespan_s > 0 else 0.0
    return found


def _merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    out: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


@dataclass(frozen=True, slots=True)
class Managers:
    """What a check gets: a factory of managers."""

    make: Callable[[], OverlapManagerProtocol]

    @contextmanager
    def manager(self) -> Iterator[OverlapManagerProtocol]:
        """A manager that is closed at the end of the block."""
        manager = self.make()
        try:
            yield manager
        finally:
            manager.close()


class Log:
    """Names in the order in which they were noted; thread-safe."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def task(self, name: str, result: object = None) -> Callable[[], object]:
        def run() -> object:
            self.names.append(name)
            return result

        return run

    def before(self, first: str, then: str) -> None:
        if not (first in self.names and then in self.names):
            raise AssertionError(f"{first} or {then} never ran: {self.names}")
        if self.names.index(first) > self.names.index(then):
            raise AssertionError(f"{then} ran before {first}: {self.names}")


def equal(found: object, expected: object, what: str) -> None:
    """Raise AssertionError unless two values are equal."""
    if found != expected:
        raise AssertionError(f"{what} is {found!r}, not {expected!r}")


def held(event: threading.Event) -> None:
    """Wait for an event that another task of the run sets."""
    if not event.wait(WAIT_S):
        raise AssertionError("a task waited for one that never ran beside it")


class PendingWork(CompletedWork[int]):
    """A work that is done once an event is set."""

    def __init__(self, event: threading.Event, error: BaseException | None = None) -> None:
        super().__init__(42, error)
        self._event = event

    def wait(self, timeout_s: float | None = None) -> int:
        if not self._event.wait(WAIT_S if timeout_s is None else timeout_s):
            raise CommTimeoutError("not yet")
        return super().wait(timeout_s)

    def synchronize(self, timeout_s: float | None = None) -> int:
        return self.wait(timeout_s)

    def done(self) -> bool:
        return self._event.is_set()
