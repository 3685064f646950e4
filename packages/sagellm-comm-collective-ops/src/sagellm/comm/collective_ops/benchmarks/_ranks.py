"""Rank processes of a benchmark, told over pipes what to time."""

from __future__ import annotations

import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["RankProcesses", "serve"]

_READY_S = 240.0
_ANSWER_S = 120.0


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

    def time(self, name: str, case: Mapping[str, Any]) -> float:  # Any: plain JSON values
        """Seconds of one call of a contender, of the rank that took longest."""
        for pipe in self._pipes:
            pipe.send((name, dict(case)))
        return float(max(self._answers(_ANSWER_S)))

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join(5)
        self._folder.cleanup()

    def _answers(self, timeout_s: float) -> list[Any]:
        end = time.monotonic() + timeout_s
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                raise TimeoutError(f"rank {rank} gave no answer within {timeout_s:g} s")
        found = [pipe.recv() for pipe in self._pipes]
        failed = [answer for answer in found if isinstance(answer, str) and answer != "ready"]
        if failed:
            raise RuntimeError(failed[0])
        return found


def serve(
    pipe: Connection,
    barrier: Callable[[], object],
    call_for: Callable[[str, Mapping[str, Any]], tuple[Callable[[], object], int]],
) -> None:
    """Answer until the pipe ends; `call_for` gives a call and how often to make it."""
    pipe.send("ready")
    while True:
        try:
            name, case = pipe.recv()
        except EOFError:
            return
        try:
            call, rounds = call_for(name, case)
            barrier()
            start = time.perf_counter()
            for _ in range(rounds):
                call()
            pipe.send((time.perf_counter() - start) / rounds)
        except Exception as e:  # told to the process that measures, which then fails
            pipe.send(f"{name} in {case}: {type(e).__name__}: {e}")
            return
