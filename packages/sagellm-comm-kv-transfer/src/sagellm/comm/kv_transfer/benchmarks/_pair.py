"""A contender as the measuring process sees it: two processes that take turns when told."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from sagellm.core.protocols import CommTimeoutError, DistributedRuntimeError
from sagellm.core.protocols.bench import Missing, end_processes
from sagellm.core.protocols.netns import ShapedHosts

from ._turns import Region, fill, pool_blocks
from ._worker import Spec, work

__all__ = ["Cost", "Pair", "regions"]

_START_S = 120.0
_TURN_S = 180.0
_POSTED_S = 0.001
"""For a receiver to wait, asleep or polling, before the sender's clock starts."""
_turns = itertools.count(1)  # of all pairs: they share memory, and none may find its work done


class Cost(NamedTuple):
    """What one turn took: the clock's seconds, and the processors' on both sides."""

    seconds: float
    cpu_seconds: float


@contextlib.contextmanager
def regions(case: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The case with the two regions that contenders share."""
    nbytes = pool_blocks(case) * case["block_bytes"]
    source, target = Region(nbytes), Region(nbytes)
    try:
        fill(Region.open(source.name, case["block_bytes"]), seed=1)
        yield {**case, "source": source.name, "target": target.name}
    finally:
        source.close()
        target.close()


class Pair:
    """Two processes, connected; a context.

    Args:
        spec: What they run.
        case: With regions.
        hosts: Namespaces to live in; None stays here.

    Raises:
        DistributedRuntimeError: One of them failed.

    """

    def __init__(
        self, spec: Spec, case: Mapping[str, Any], hosts: ShapedHosts | None = None
    ) -> None:
        self._spec = spec
        self.missing: Missing | None = None
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", __name__])
        self._pipes: list[Connection] = []
        self._processes = []
        for i, role in enumerate("PD"):
            ours, theirs = context.Pipe()
            host = hosts.addresses[i] if hosts is not None else "127.0.0.1"
            netns = hosts.pids[i] if hosts is not None else None
            process = context.Process(
                target=work, args=(theirs, spec, role, dict(case), host, netns)
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            answers = [self._answer(i, _START_S) for i in range(2)]
            if self.missing is None:
                for i in range(2):
                    self._pipes[i].send(answers[1 - i])
                for i in range(2):
                    self._answer(i, _START_S)
            self._pause()
        except BaseException:
            self.close()
            raise
        if self.missing is not None:
            self.close()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The two processes, sender first."""
        return [p.pid or 0 for p in self._processes]

    def run(self) -> Cost:
        """One turn: both sides start, and every block is compared afterwards."""
        return self._measure("run")

    def run_posted(self) -> float:
        """Seconds of one turn whose receiver waits already, from the sender's start."""
        return self._measure("finish").seconds

    def idle_share(self, seconds: float) -> float:
        """Processor seconds per second of the busier side while nothing is asked of it."""
        self._resume()
        try:
            before = [self._ask(i, "cpu", 0) for i in range(2)]
            time.sleep(seconds)  # what is measured is that time passes
            after = [self._ask(i, "cpu", 0) for i in range(2)]
        finally:
            self._pause()
        shares: list[float] = [
            (c1 - c0) / (t1 - t0) for (t0, c0), (t1, c1) in zip(before, after, strict=True)
        ]
        return max(shares)

    def close(self) -> None:
        """End both processes. Idempotent."""
        self._resume()
        end_processes(self._pipes, self._processes)

    def _measure(self, command: str) -> Cost:
        turn = next(_turns)
        self._resume()
        try:
            self._ask(0, "stamp", turn)
            if command == "finish":
                self._ask(1, "begin", turn)
            self._pipes[1].send((command, turn))
            if command == "finish":
                time.sleep(_POSTED_S)
            self._pipes[0].send((command, turn))
            (p0, _, p_cpu), (d0, d1, d_cpu) = (self._answer(i, _TURN_S) for i in range(2))
            for i in range(2):
                self._pipes[i].send(("sums", turn))
            want, got = (self._answer(i, _TURN_S) for i in range(2))
        finally:
            self._pause()
        if want != got:
            raise DistributedRuntimeError(
                f"{self._spec.end}: turn {turn} put other bytes in place than were sent"
            )
        started = p0 if command == "finish" else min(p0, d0)
        return Cost(d1 - started, p_cpu + d_cpu)

    def _ask(self, side: int, command: str, argument: int) -> Any:  # noqa: ANN401 - as it answers
        self._pipes[side].send((command, argument))
        return self._answer(side, _TURN_S)

    def _answer(self, side: int, timeout_s: float) -> Any:  # noqa: ANN401 - as it answers
        if not self._pipes[side].poll(timeout_s):
            raise CommTimeoutError(f"{self._spec.end}: side {side} said nothing in {timeout_s} s")
        try:
            kind, value = self._pipes[side].recv()
        except EOFError:
            code = self._processes[side].exitcode
            raise DistributedRuntimeError(
                f"{self._spec.end}: side {side} ended with {code}"
            ) from None
        if kind == "missing":
            self.missing = Missing(value)
        elif kind == "error":
            raise DistributedRuntimeError(f"{self._spec.end} {dict(self._spec.options)}: {value}")
        return value

    def _pause(self) -> None:
        if self._spec.spins and self.missing is None:
            self._signal(signal.SIGSTOP)

    def _resume(self) -> None:
        if self._spec.spins:
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)
