"""Where the ranks of one contender meet, independent of what the contender does."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

LINE_BYTES = 64
DEADLINE_S = 60.0


class Barrier:
    """Spins on a word of every other rank in a file of zeros, `LINE_BYTES` per rank."""

    def __init__(self, file: Path, rank: int, world: int) -> None:
        with file.open("r+b") as f:
            self._memory = mmap.mmap(f.fileno(), world * LINE_BYTES)
        self._words = memoryview(self._memory).cast("q")
        self._mine = rank * LINE_BYTES // 8
        self._theirs = [r * LINE_BYTES // 8 for r in range(world) if r != rank]
        self._turn = 0
        cpus = len(os.sched_getaffinity(0))
        self._polls = 1 << 14 if world <= cpus else 16

    def wait(self) -> None:
        words, polls = self._words, self._polls
        self._turn += 1
        turn = self._turn
        words[self._mine] = turn
        for other in self._theirs:
            left = polls
            deadline = 0.0
            while words[other] < turn:
                left -= 1
                if left:
                    continue
                left = polls
                os.sched_yield()
                now = time.perf_counter()
                deadline = deadline or now + DEADLINE_S
                if now > deadline:
                    raise TimeoutError(f"no rank came to barrier {turn} in {DEADLINE_S:g} s")
