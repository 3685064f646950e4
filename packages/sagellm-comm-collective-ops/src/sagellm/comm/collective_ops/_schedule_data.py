"""A schedule as data: who sends which chunks to whom, step by step. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sagellm.core.protocols import ConfigError

__all__ = ["Move", "Schedule", "Step", "bounds"]


@dataclass(frozen=True, slots=True)
class Move:
    """One message of a rank: chunks `start` to `stop` (excluded), sent to or received from `peer`.

    Attributes:
        kind: `send` or `recv`.
        peer: The other rank.
        start: First chunk.
        stop: Chunk after the last.
        reduce: A receive that is combined with what is there instead of replacing it.

    """

    kind: Literal["send", "recv"]
    peer: int
    start: int
    stop: int
    reduce: bool = False


Step = tuple[Move, ...]
"""Moves that a rank starts together. Sends read what was there before the step; the rank goes
on once all of them are done."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What every rank of a group does for one collective, and nothing else.

    Attributes:
        op: `all_reduce`, `all_gather`, `reduce_scatter`, `broadcast`, `reduce` or `all_to_all`.
        algorithm: `ring`, `tree`, ….
        size: Ranks.
        chunks: Equal parts, up to one element, that a buffer is divided into. Of `all_gather`,
            `reduce_scatter` and `all_to_all` there is one for each rank, in rank order.
        steps: Each rank's steps.
        root: Of `broadcast` and `reduce`; 0 otherwise.

    """

    op: str
    algorithm: str
    size: int
    chunks: int
    steps: tuple[tuple[Step, ...], ...]
    root: int = 0

    def sent(self, rank: int) -> int:
        """Chunks that a rank sends, each as often as it sends it."""
        return sum(m.stop - m.start for s in self.steps[rank] for m in s if m.kind == "send")

    def sent_bytes(self, rank: int, numel: int, itemsize: int) -> int:
        """Bytes that a rank sends when the whole buffer has `numel` elements."""
        edges = bounds(numel, self.chunks)
        return itemsize * sum(
            edges[m.stop] - edges[m.start]
            for step in self.steps[rank]
            for m in step
            if m.kind == "send"
        )

    def then(self, other: Schedule, op: str, algorithm: str) -> Schedule:
        """Both, one after the other, under a name of their own."""
        if (self.size, self.chunks) != (other.size, other.chunks):
            raise ConfigError(
                f"{self.op} of {self.size} ranks and {self.chunks} chunks cannot go before "
                f"{other.op} of {other.size} and {other.chunks}"
            )
        joined = tuple(a + b for a, b in zip(self.steps, other.steps, strict=True))
        return Schedule(op, algorithm, self.size, self.chunks, joined, self.root)


def bounds(numel: int, chunks: int) -> tuple[int, ...]:
    """First element of every chunk, and the end of the last.

    >>> bounds(10, 4)
    (0, 2, 5, 7, 10)
    """
    return tuple(i * numel // chunks for i in range(chunks + 1))


def ranges(chunks: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive chunks.

    >>> ranges([4, 0, 1, 5])
    [(0, 2), (4, 6)]
    """
    runs: list[tuple[int, int]] = []
    for chunk in sorted(chunks):
        if runs and runs[-1][1] == chunk:
            runs[-1] = (runs[-1][0], chunk + 1)
        else:
            runs.append((chunk, chunk + 1))
    return runs
