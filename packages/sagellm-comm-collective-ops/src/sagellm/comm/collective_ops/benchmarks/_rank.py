"""One rank of one contender: sleeps on its socket until the launch process asks for something.

`python -m …_rank KIND WORLD FOLDER [RANK]`; MPI's ranks know their number themselves. Requests and
answers are lines of JSON. Only the contender under test runs: the others are blocked in a read.

A timed call is one of two kinds. `each`: every rank writes its tensor anew, as any program does
between calls (see `_contenders.TOUCHED_BYTES`), all meet in a spin barrier of our own, and the
call's time is the longest among ranks; this gives medians and percentiles. Or a `batch`: one
barrier, then all calls back to back, for more ranks than cores, where a barrier would mostly
measure the scheduler, and for differences of less than a clock's reading.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sagellm.core.protocols import BackendUnavailableError

from ._barrier import Barrier
from ._contenders import Contender, Prepared, make
from ._lost import lose
from ._pairs import differences

ESTIMATE_CALLS = 5


class BusyThread:
    """Runs Python and never waits, under the policy of the thread that made it.

    Attributes:
        turns: Thousands of additions so far.

    """

    def __init__(self) -> None:
        self.turns = 0
        self._end = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end:
            n = 0
            for _ in range(1000):
                n += 1
            self.turns += 1

    def end(self) -> None:
        self._end = True
        self._thread.join()


class Rank:
    def __init__(self, contender: Contender, barrier: Barrier) -> None:
        self._contender = contender
        self._barrier = barrier
        self._prepared: dict[str, Prepared] = {}
        self._uses_left: dict[str, int] = {}
        self._busy: BusyThread | None = None

    def prepare(self, case: dict[str, Any], variants: list[str]) -> dict[str, Any]:
        """Buffers and calls of each variant, proven right; seconds of a call, or why not."""
        found: dict[str, Any] = {}
        for variant in variants:
            prepared = self._contender.prepare(variant, case)
            if isinstance(prepared, str):
                found[variant] = {"missing": prepared}
                continue
            self._barrier.wait()
            wrong = prepared.check()
            if wrong:
                found[variant] = {"wrong": wrong}
                continue
            self._prepared[variant] = prepared
            self._uses_left[variant] = 0
            times = self.sample(variant, ESTIMATE_CALLS, True)["times"]
            found[variant] = {"seconds": min(times)}
        return found

    def sample(self, variant: str, calls: int, each: bool) -> dict[str, Any]:
        """Seconds of each call, or of batches' mean calls; turns of the busy thread meanwhile."""
        with _no_garbage():
            busy = self._busy
            turns = busy.turns if busy else 0
            times = self._each(variant, calls) if each else self._batches(variant, calls)
            return {"times": times, "turns": busy.turns - turns if busy else None}

    def _each(self, variant: str, calls: int) -> list[float]:
        prepared = self._prepared[variant]
        runs, touches, count = prepared.runs, prepared.touches, len(prepared.runs)
        meet, now = self._barrier.wait, time.perf_counter
        times = []
        for i in range(calls):
            if i % count == 0:
                self._use(variant, 1)
            run = runs[i % count]
            if touches:
                touches[i % count]()
            meet()
            started = now()
            run()
            times.append(now() - started)
        return times

    def _batches(self, variant: str, calls: int) -> list[float]:
        prepared = self._prepared[variant]
        limit = prepared.uses * len(prepared.runs) or calls
        return [self._batch(variant, min(limit, calls - i)) for i in range(0, calls, limit)]

    def _batch(self, variant: str, calls: int) -> float:
        runs = self._prepared[variant].runs
        order = [runs[i % len(runs)] for i in range(calls)]
        self._use(variant, -(-calls // len(runs)))
        self._barrier.wait()
        started = time.perf_counter()
        for run in order:
            run()
        took = time.perf_counter() - started
        self._barrier.wait()
        return took / calls

    def _use(self, variant: str, times: int) -> None:
        """Before so many calls of each buffer: fill them if their contents might overflow."""
        prepared = self._prepared[variant]
        if self._uses_left[variant] < times and prepared.uses:
            prepared.fill()
            self._uses_left[variant] = prepared.uses
        self._uses_left[variant] -= times

    def differences(self, on: str, off: str, calls: int, pairs: int) -> list[float]:
        """How much longer a call of one variant takes than one of another, of each pair."""
        with _no_garbage():
            return differences(
                lambda: self._batch(on, calls), lambda: self._batch(off, calls), pairs
            )

    def busy(self, on: bool) -> None:
        """Start or stop the thread that is the load."""
        if self._busy:
            self._busy.end()
            self._busy = None
        if on:
            self._busy = BusyThread()

    def forget(self) -> None:
        self._prepared.clear()
        self._contender.forget()
        gc.collect()

    def answer(self, request: dict[str, Any]) -> object:
        match request["do"]:
            case "prepare":
                return self.prepare(request["case"], request["variants"])
            case "sample":
                return self.sample(request["variant"], request["calls"], request["each"])
            case "differences":
                return self.differences(
                    request["on"], request["off"], request["calls"], request["pairs"]
                )
            case "schedule":
                return schedule(request["policy"])
            case "busy":
                self.busy(request["rank"] == self._contender.rank)
            case "forget":
                self.forget()
            case other:
                raise ValueError(f"unknown request {other!r}")
        return None


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def schedule(policy: str) -> str:
    """Give every thread of this process the policy; why not, if not."""
    wanted = (os.SCHED_RR, 5) if policy == "rr" else (os.SCHED_OTHER, 0)
    for task in os.listdir("/proc/self/task"):
        try:
            os.sched_setscheduler(int(task), wanted[0], os.sched_param(wanted[1]))
        except PermissionError:
            return f"SCHED_{policy.upper()} is not permitted here"
        except ProcessLookupError:
            continue  # a thread that ended meanwhile
    return ""


def end_with_parent() -> None:
    """No rank outlives its launcher, even one that spins in a library with no deadline."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def main(kind: str, world: int, folder: Path, rank: int | None) -> None:
    end_with_parent()
    with socket.socket(socket.AF_UNIX) as wire:
        wire.connect(str(folder / "socket"))
        stream = wire.makefile("rwb")

        def say(value: object) -> None:
            stream.write(json.dumps(value).encode() + b"\n")
            stream.flush()

        try:
            if kind == "lost":
                assert rank is not None
                say({"rank": rank})
                lose(rank, world, folder, stream, say)
                return
            try:
                contender = make(kind, rank, world, folder)
            except BackendUnavailableError as e:
                say({"rank": rank, "missing": str(e)})
                return
            say({"rank": contender.rank})
            served = Rank(contender, Barrier(folder / "barrier", contender.rank, world))
            for line in stream:
                request = json.loads(line)
                if request["do"] == "quit":
                    break
                say({"answer": served.answer(request)})
            served.busy(False)
            served.forget()
            contender.close()
        except Exception:  # whatever it is: the launch process fails with it
            say({"error": traceback.format_exc()})
            raise


if __name__ == "__main__":
    main(
        sys.argv[1],
        int(sys.argv[2]),
        Path(sys.argv[3]),
        int(sys.argv[4]) if len(sys.argv) > 4 else None,
    )
