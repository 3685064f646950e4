"""What a failed call is called: the ranks to blame, and what they were doing."""

from __future__ import annotations

import mmap
import re
import struct
import time
from collections.abc import Callable, Sequence

from sagellm.core.protocols import (
    CollectiveMismatchError,
    CommError,
    CommTimeoutError,
    DistributedRuntimeError,
    PeerLostError,
)

from .engine import EngineFailure
from .layout import CAUSES, H_POISON, REASON, SEQUENCE, SIGNATURE, Layout, describe

__all__ = ["Board", "explain", "late_ranks"]

_WORD = struct.Struct("<q")
_GRACE_S = 0.2


class Board:
    """What the ranks of a group have written about themselves in the segment."""

    def __init__(
        self, memory: mmap.mmap, layout: Layout, rank: int, global_ranks: Sequence[int]
    ) -> None:
        self._memory = memory
        self._layout = layout
        self.rank = rank
        self.global_ranks = tuple(global_ranks)

    def who(self, rank: int) -> str:
        """A rank as messages name it."""
        return f"{rank} (global {self.global_ranks[rank]})"

    def poison(self) -> tuple[str, int] | None:
        """Cause and rank of what made the group fail, None while nothing has."""
        word = self._word(H_POISON)
        cause = word >> 32
        return (
            (CAUSES[cause] if cause < len(CAUSES) else "?", (word & 0xFFFFFFFF) - 1)
            if word
            else None
        )

    def reason(self, rank: int) -> str:
        """Why a rank poisoned the group."""
        start = self._layout.control(rank) + REASON
        text = self._memory[start : start + 128].split(b"\0")[0]
        return text.decode(errors="replace")

    def step(self, rank: int) -> int:
        """Step that a rank has published last."""
        return self._word(self._layout.control(rank) + 8 * SEQUENCE)

    def call(self, rank: int, step: int) -> tuple[int, int, int]:
        """Signature that a rank wrote at a step: its words."""
        start = self._layout.control(rank) + 8 * SIGNATURE[step % 2]
        return struct.unpack("<3q", self._memory[start : start + 24])

    def calls(self, step: int) -> dict[int, tuple[int, int, int]]:
        """Signatures of the ranks that have come to a step, and gone no further than its parity."""
        ranks = range(self._layout.world)
        return {r: self.call(r, step) for r in ranks if step <= self.step(r) <= step + 1}

    def _word(self, offset: int) -> int:
        return int(_WORD.unpack_from(self._memory, offset)[0])


def explain(
    board: Board, text: str, failure: EngineFailure, gone: Callable[[], Sequence[int]]
) -> CommError:
    """The error that a caller gets for a failed call.

    Args:
        board: The segment.
        text: The call.
        failure: What the engine said.
        gone: The ranks whose connection has ended.

    """
    cause, rank = failure.cause, failure.rank
    poison = board.poison()
    if cause == "lost" and poison is not None and poison[1] != board.rank:
        # A rank that learns of a failure leaves: what it was told came first.
        cause, rank = poison
    if cause == "mismatch":
        return _mismatch(board, text, failure)
    told = poison is not None and poison[1] != board.rank and poison[1] == rank
    reason = board.reason(rank) if told else ""
    if cause == "lost" or (told and cause not in ("timeout", "aborted", "error")):
        others = [r for r in gone() if r != rank]
        lost = _culprit(board, reason, others or [rank]) if told else rank
        detail = f" (rank {board.who(rank)} says: {reason})" if told and lost != rank else ""
        return PeerLostError(
            f"{text}: lost rank {board.who(lost)}{detail}", rank=board.global_ranks[lost]
        )
    if cause == "timeout":
        if told:
            late = ", ".join(board.who(r) for r in late_ranks(board) if r != board.rank)
            missing = f"no sign of rank {late}; " if late else ""
            return CommTimeoutError(f"{text}: {missing}rank {board.who(rank)} gave up: {reason}")
        return CommTimeoutError(f"{text}: {_late(board, rank, failure.step)}")
    if told:
        return PeerLostError(
            f"{text}: rank {board.who(rank)} left the group: {cause}: {reason}",
            rank=board.global_ranks[rank],
        )
    return DistributedRuntimeError(f"{text}: {cause}: {board.reason(board.rank) or failure}")


def _culprit(board: Board, reason: str, gone: Sequence[int]) -> int:
    """The rank that a reason names, else one that is gone."""
    named = re.search(r"rank (\d+)", reason)
    if named is not None and int(named[1]) < len(board.global_ranks):
        return int(named[1])
    return gone[0]


def late_ranks(board: Board) -> list[int]:
    """The ranks whose step is behind the foremost one's."""
    steps = [board.step(r) for r in range(len(board.global_ranks))]
    return [r for r, step in enumerate(steps) if step < max(steps)]


def _late(board: Board, rank: int, step: int) -> str:
    stood = board.step(rank)
    packed, nbytes, number = board.call(rank, stood)
    last = f"its last call is {describe(packed, nbytes, number)}" if packed or stood else "no call"
    return (
        f"no sign of rank {board.who(rank)} before the deadline: "
        f"it stands at step {stood}, this rank at {step}; {last}"
    )


def _mismatch(board: Board, text: str, failure: EngineFailure) -> CollectiveMismatchError:
    end = time.monotonic() + _GRACE_S
    while True:
        for step in (failure.step, failure.step + 1, failure.step - 1):
            words = board.calls(step)
            if len(set(words.values())) > 1:
                break
        if len(words) == len(board.global_ranks) or time.monotonic() >= end:
            break
        time.sleep(0.005)
    calls = {r: describe(*w) for r, w in sorted(words.items())}
    told = "; ".join(f"rank {r}: {call}" for r, call in calls.items())
    return CollectiveMismatchError(f"{text}: ranks made different calls: {told}", calls=calls)
