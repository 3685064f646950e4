"""One rank of one contender: sleeps on its socket until the launch process asks for something.

`python -m …_rank KIND WORLD FOLDER [RANK]`; MPI's ranks know their number themselves. Requests and
answers are lines of JSON. Only the contender under test runs: the others are blocked in a read.

A timed call is one of two kinds. `each`: all ranks meet in a spin barrier of our own before every
call, and the call's time is the longest among ranks; this gives medians and percentiles. Or a
`batch`: one barrier, then all calls back to back, for more ranks than cores, where a barrier would
mostly measure the scheduler.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sagellm.core.protocols import BackendUnavailableError

from ._barrier import Barrier
from ._contenders import Contender, Prepared, make
from ._lost import lose

ESTIMATE_CALLS = 5


class Rank:
    def __init__(self, contender: Contender, barrier: Barrier) -> None:
        self._contender = contender
        self._barrier = barrier
        self._prepared: dict[str, Prepared] = {}
        self._stop_busy: Callable[[], None] | None = None

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
            found[variant] = {"seconds": min(self.sample(variant, ESTIMATE_CALLS, True))}
        return found

    def sample(self, variant: str, calls: int, each: bool) -> list[float]:
        """Seconds of each call, or of the batch's mean call."""
        prepared = self._prepared[variant]
        runs, count = prepared.runs, len(prepared.runs)
        meet, now = self._barrier.wait, time.perf_counter
        limit = prepared.uses * count or calls
        times: list[float] = []
        gc.collect()
        gc.disable()
        try:
            for start in range(0, calls, limit):
                stop = min(calls, start + limit)
                prepared.fill()
                if each:
                    for i in range(start, stop):
                        run = runs[i % count]
                        meet()
                        started = now()
                        run()
                        times.append(now() - started)
                else:
                    order = [runs[i % count] for i in range(start, stop)]
                    meet()
                    started = now()
                    for run in order:
                        run()
                    times.append((now() - started) / len(order))
                    meet()
        finally:
            gc.enable()
        return times

    def busy(self, on: bool) -> None:
        """Start or stop a thread of normal scheduling that runs Python and never waits."""
        if self._stop_busy:
            self._stop_busy()
            self._stop_busy = None
        if on:
            stop = threading.Event()

            def count() -> None:
                # load, not a contender: among real-time threads it would keep a core for 100 ms
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
                n = 0
                while not stop.is_set():
                    for _ in range(1000):
                        n += 1

            thread = threading.Thread(target=count, daemon=True)
            thread.start()

            def end() -> None:
                stop.set()
                thread.join()

            self._stop_busy = end

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
            case "schedule":
                return schedule(request["policy"])
            case "busy":
                self.busy(request["rank"] == self._contender.rank)
            case "forget":
                self.forget()
            case other:
                raise ValueError(f"unknown request {other!r}")
        return None


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
