"""Proof of a schedule: it ends, and every chunk is what it should be. No torch here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from sagellm.core.protocols import ConfigError

from ._schedule_data import Move, Schedule

__all__ = ["ScheduleReport", "check_schedule"]

_REDUCING = frozenset({"all_reduce", "reduce", "reduce_scatter"})


@dataclass(frozen=True, slots=True)
class ScheduleReport:
    """What a checked schedule costs.

    Attributes:
        depth: Steps until the last rank is done, if every message takes one.
        sent_chunks: Chunks each rank sends.

    """

    depth: int
    sent_chunks: tuple[int, ...]


@dataclass(slots=True)
class _Message:
    """A send that has been started: what it holds, one set of contributions per chunk."""

    move: Move
    held: list[int]
    when: int
    taken: bool = False


class _Run:
    """Every rank's chunks as sets of contributions (bits), while the schedule runs."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.at = [0] * schedule.size
        self.clock = [0] * schedule.size
        self.chunks = [
            [_start(schedule, rank, chunk) for chunk in range(schedule.chunks)]
            for rank in range(schedule.size)
        ]
        self.channels: dict[tuple[int, int], deque[_Message]] = {}
        self.sent: list[list[_Message]] = [[] for _ in range(schedule.size)]
        self.got: list[dict[int, _Message]] = [{} for _ in range(schedule.size)]
        for rank in range(schedule.size):
            self.begin(rank)

    def begin(self, rank: int) -> None:
        """Start the sends of the step that a rank is at."""
        self.sent[rank], self.got[rank] = [], {}
        if self.at[rank] == len(self.schedule.steps[rank]):
            return
        for move in self.schedule.steps[rank][self.at[rank]]:
            self._check_move(rank, move)
            if move.kind == "send":
                held = self.chunks[rank][move.start : move.stop]
                if not all(held):
                    raise self.wrong(rank, f"sends {_name(move)}, which it does not hold")
                message = _Message(move, held, self.clock[rank])
                self.channels.setdefault((rank, move.peer), deque()).append(message)
                self.sent[rank].append(message)

    def advance(self, rank: int) -> bool:
        """Take what has come; whether that ended the step."""
        steps = self.schedule.steps[rank]
        if self.at[rank] == len(steps):
            return False
        step = steps[self.at[rank]]
        for i, move in enumerate(step):
            if move.kind == "recv" and i not in self.got[rank]:
                channel = self.channels.get((move.peer, rank))
                # Messages of one pair keep their order, also among the receives of a step.
                behind = any(
                    m.kind == "recv" and m.peer == move.peer and j not in self.got[rank]
                    for j, m in enumerate(step[:i])
                )
                if channel and not behind:
                    message = self.got[rank][i] = channel.popleft()
                    message.taken = True
        receives = sum(m.kind == "recv" for m in step)
        if len(self.got[rank]) < receives or not all(m.taken for m in self.sent[rank]):
            return False
        self._apply(rank)
        self.at[rank] += 1
        self.begin(rank)
        return True

    def _apply(self, rank: int) -> None:
        step = self.schedule.steps[rank][self.at[rank]]
        replaced: set[int] = set()
        combined: dict[int, tuple[int, int]] = {}
        for i, message in self.got[rank].items():
            move = step[i]
            theirs = message.move
            same = (theirs.start, theirs.stop) == (move.start, move.stop)
            if not same and self.schedule.op != "all_to_all":
                raise self.wrong(rank, f"expects {_name(move)} and is sent {_name(theirs)}")
            if theirs.stop - theirs.start != move.stop - move.start:
                raise self.wrong(rank, f"expects {_name(move)} and is sent {_name(theirs)}")
            span = (move.start, move.stop)
            for chunk in range(*span):
                twice = chunk in replaced or combined.get(chunk, span) != span
                if twice or (not move.reduce and chunk in combined):
                    raise self.wrong(rank, f"writes {_name(move)} in two ways in one step")
                if move.reduce:
                    combined[chunk] = span
                else:
                    replaced.add(chunk)
            for chunk, held in zip(range(move.start, move.stop), message.held, strict=True):
                if move.reduce:
                    if self.chunks[rank][chunk] & held:
                        raise self.wrong(rank, f"adds a contribution twice to chunk {chunk}")
                    self.chunks[rank][chunk] |= held
                else:
                    self.chunks[rank][chunk] = held
        over = [m.when + 1 for m in (*self.got[rank].values(), *self.sent[rank])]
        self.clock[rank] = max([self.clock[rank], *over])

    def _check_move(self, rank: int, move: Move) -> None:
        schedule = self.schedule
        if not 0 <= move.peer < schedule.size or move.peer == rank:
            raise self.wrong(rank, f"has peer {move.peer} of {schedule.size} ranks")
        if not 0 <= move.start < move.stop <= schedule.chunks:
            raise self.wrong(rank, f"names {_name(move)} of {schedule.chunks}")
        if move.reduce and (move.kind == "send" or schedule.op not in _REDUCING):
            raise self.wrong(rank, f"combines {_name(move)} in a {move.kind} of {schedule.op}")

    def wrong(self, rank: int, what: str) -> ConfigError:
        """The error for a rank at its present step."""
        s = self.schedule
        return ConfigError(
            f"{s.algorithm} {s.op} over {s.size}: rank {rank} {what} (its step {self.at[rank]})"
        )


def check_schedule(schedule: Schedule) -> ScheduleReport:
    """Run a schedule with sets of contributions instead of numbers.

    No send is buffered: it ends when its receive has been started. That is the hardest case, so
    a schedule that ends here ends on every library.

    Raises:
        ConfigError: A send has no receive or the other way round, ranks wait for each other, a
            rank sends what it does not hold or adds a contribution twice, or the result is not
            what the operation promises. The message names rank, step and chunk.

    """
    if len(schedule.steps) != schedule.size or schedule.size < 1 or schedule.chunks < 1:
        raise ConfigError(
            f"{schedule.op}: steps of {len(schedule.steps)} ranks for {schedule.size}, "
            f"{schedule.chunks} chunks"
        )
    run = _Run(schedule)
    ranks = range(schedule.size)
    while any([run.advance(rank) for rank in ranks]):
        pass
    stuck = [rank for rank in ranks if run.at[rank] < len(schedule.steps[rank])]
    if stuck:
        waits = "; ".join(_waiting(run, rank) for rank in stuck)
        raise run.wrong(stuck[0], f"never goes on: {waits}")
    for rank in ranks:
        for chunk in range(schedule.chunks):
            wanted = _wanted(schedule, rank, chunk)
            if wanted is not None and run.chunks[rank][chunk] != wanted:
                raise run.wrong(
                    rank,
                    f"ends with chunk {chunk} of {run.chunks[rank][chunk]:#x}, not {wanted:#x} "
                    f"(one bit for each contribution)",
                )
    return ScheduleReport(max(run.clock), tuple(schedule.sent(rank) for rank in ranks))


def _waiting(run: _Run, rank: int) -> str:
    step = run.schedule.steps[rank][run.at[rank]]
    sends = [m.move for m in run.sent[rank] if not m.taken]
    receives = [m for i, m in enumerate(step) if m.kind == "recv" and i not in run.got[rank]]
    moves = ", ".join(f"{m.kind} of {_name(m)} with {m.peer}" for m in (*sends, *receives))
    return f"rank {rank} at step {run.at[rank]} waits for its {moves}"


def _name(move: Move) -> str:
    if move.stop == move.start + 1:
        return f"chunk {move.start}"
    return f"chunks {move.start}-{move.stop - 1}"


def _start(schedule: Schedule, rank: int, chunk: int) -> int:
    """What a rank holds before the first step, as a set of bits; 0 is nothing."""
    if schedule.op in _REDUCING:
        return 1 << rank
    if schedule.op == "all_gather":
        return 1 << rank if chunk == rank else 0
    if schedule.op == "broadcast":
        return 1 if rank == schedule.root else 0
    if schedule.op == "all_to_all":
        return 1 << (rank * schedule.size + chunk)
    raise ConfigError(f"a schedule of {schedule.op!r}, which no result is known for")


def _wanted(schedule: Schedule, rank: int, chunk: int) -> int | None:
    """What it must hold at the end; None where the operation leaves it undefined."""
    everyone = (1 << schedule.size) - 1
    if schedule.op == "all_reduce":
        return everyone
    if schedule.op == "reduce":
        return everyone if rank == schedule.root else None
    if schedule.op == "reduce_scatter":
        return everyone if chunk == rank else None
    if schedule.op == "all_gather":
        return 1 << chunk
    if schedule.op == "all_to_all":
        return 1 << (chunk * schedule.size + rank)
    return 1
