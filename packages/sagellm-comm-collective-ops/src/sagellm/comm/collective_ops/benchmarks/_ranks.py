"""Rank processes of a benchmark, told over pipes what to time."""

from __future__ import annotations

import functools
import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from sagellm.core.protocols.bench import Contenders, Missing, end_processes

from ._rank import schedule

__all__ = ["RankProcesses", "Timed", "serve"]

_READY_S = 240.0
_ANSWER_S = 120.0


@dataclass(frozen=True, slots=True)
class Timed:
    """One contender in one case, on one rank.

    Attributes:
        run: The call.
        fill: Writes this rank's inputs, before each time that is taken.
        wrong: What is wrong with the results of one call after `fill`; empty if nothing.
        rounds: Calls back to back whose mean is a time.

    """

    run: Callable[[], object]
    fill: Callable[[], object]
    wrong: Callable[[], str]
    rounds: int = 1


class RankProcesses:
    """A few processes that each run `target(rank, folder, pipe, *arguments)`.

    `target` ends in `serve`. The processes end with `close`, or with this process.
    """

    def __init__(self, size: int, target: Callable[..., None], *arguments: object) -> None:
        spawn = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="sagellm-bench-")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=target, args=(rank, self._folder.name, theirs, *arguments), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers(_READY_S)

    def measured(self, names: Sequence[str], case: Mapping[str, Any]) -> Contenders:
        """Contenders of a case, each proven right, under the case's `scheduling` if it has one.

        Raises:
            RuntimeError: The results of one are wrong.

        """
        if "scheduling" in case:
            refused = [why for why in self._ask("schedule", "", case) if why]
            if refused:
                return dict.fromkeys(names, Missing(refused[0]))
        for name in names:
            self._ask("prove", name, case)
        return {name: functools.partial(self.time, name, case) for name in names}

    def time(self, name: str, case: Mapping[str, Any]) -> float:  # Any: plain JSON values
        """Seconds of one call of a contender, of the rank that took longest."""
        return float(max(self._ask("time", name, case)))

    def _ask(self, do: str, name: str, case: Mapping[str, Any]) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((do, name, dict(case)))
        return self._answers(_ANSWER_S)

    def close(self) -> None:
        """End the processes."""
        end_processes(self._pipes, self._processes)
        self._folder.cleanup()

    def _answers(self, timeout_s: float) -> list[Any]:
        end = time.monotonic() + timeout_s
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                raise TimeoutError(f"rank {rank} gave no answer within {timeout_s:g} s")
        found = [pipe.recv() for pipe in self._pipes]
        failed = [error for error, _ in found if error]
        if failed:
            raise RuntimeError(failed[0])
        return [answer for _, answer in found]


def serve(
    pipe: Connection,
    barrier: Callable[[], object],
    timed_for: Callable[[str, Mapping[str, Any]], Timed],
) -> None:
    """Answer until the pipe ends."""
    pipe.send(("", None))
    while True:
        try:
            do, name, case = pipe.recv()
        except EOFError:
            return
        try:
            if do == "schedule":
                pipe.send(("", schedule(str(case["scheduling"]))))
                continue
            timed = timed_for(name, case)
            timed.fill()
            barrier()
            if do == "prove":
                timed.run()
                wrong = timed.wrong()
                barrier()
                if wrong:
                    raise ArithmeticError(wrong)
                pipe.send(("", None))
                continue
            start = time.perf_counter()
            for _ in range(timed.rounds):
                timed.run()
            pipe.send(("", (time.perf_counter() - start) / timed.rounds))
        except Exception as e:  # told to the process that measures, which then fails
            pipe.send((f"{name} in {case}: {type(e).__name__}: {e}", None))
            return
