"""Ranks that are threads of one process, and how the calls of ranks end."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from sagellm.core.protocols.errors import CommTimeoutError, DistributedRuntimeError

__all__ = ["GRACE_S", "RankFailedError", "RankOutcome", "RankRunner", "ThreadRanks"]

T = TypeVar("T")

GRACE_S = 5.0
"""What the other ranks get to end by themselves once one has failed, in seconds."""


@dataclass(frozen=True, slots=True)
class RankOutcome:
    """How one rank's call ended.

    Attributes:
        rank: Which rank.
        result: What it returned; None unless `error` is empty.
        error: Empty on success; else the traceback, or how the process ended.
        exception: What it raised, where that could be carried over; else None.
        seconds: How long the call took.

    """

    rank: int
    result: Any = None  # Any: whatever the caller's function returns
    error: str = ""
    exception: BaseException | None = None
    seconds: float = 0.0


class RankFailedError(DistributedRuntimeError):
    """Some ranks raised, died or did not end in time; the message has each one's traceback.

    Attributes:
        outcomes: Every rank's outcome.

    """

    def __init__(self, outcomes: Sequence[RankOutcome]) -> None:
        failed = [o for o in outcomes if o.error]
        names = ", ".join(str(o.rank) for o in failed)
        texts = "\n".join(f"--- rank {o.rank}: {o.error.rstrip()}" for o in failed)
        super().__init__(f"{len(failed)} of {len(outcomes)} ranks failed ({names})\n{texts}")
        self.outcomes = tuple(outcomes)


class RankRunner(Protocol):
    """Runs one function on every rank of a group at the same time."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def run(self, fn: Callable[..., T], *args: object, timeout_s: float = 30.0) -> list[T]:
        """Results of `fn(rank, size, *args)` in rank order.

        Raises:
            RankFailedError: Some rank raised, or had not ended after `timeout_s`.

        """
        ...


class ThreadRanks:
    """Ranks that are threads of this process, for backends that live in one process.

    A thread that does not end in time cannot be killed: it is reported with its stack, and
    left behind as a daemon.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._stores = 0

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    def run(self, fn: Callable[..., T], *args: object, timeout_s: float = 30.0) -> list[T]:
        """Results of `fn(rank, size, *args)` on every thread, in rank order.

        Raises:
            RankFailedError: Some rank raised, or had not ended after `timeout_s`.

        """
        started = time.monotonic()
        outcomes: dict[int, RankOutcome] = {}

        def one(rank: int) -> None:
            try:
                result = fn(rank, self._size, *args)
                outcomes[rank] = RankOutcome(rank, result, seconds=time.monotonic() - started)
            except BaseException as e:  # every failure of a rank belongs in its report
                outcomes[rank] = RankOutcome(
                    rank, error=traceback.format_exc(), exception=e,
                    seconds=time.monotonic() - started,
                )  # fmt: skip

        threads = [
            threading.Thread(target=one, args=(rank,), name=f"rank-{rank}", daemon=True)
            for rank in range(self._size)
        ]
        for thread in threads:
            thread.start()
        deadline = started + timeout_s
        failed_at: float | None = None
        while alive := [t for t in threads if t.is_alive()]:
            if failed_at is None and any(o.error for o in list(outcomes.values())):
                failed_at = time.monotonic()
                deadline = min(deadline, failed_at + GRACE_S)
            left = deadline - time.monotonic()
            if left <= 0:
                break
            alive[0].join(min(left, 0.05))
        for rank, thread in enumerate(threads):
            if rank not in outcomes:
                frame = sys._current_frames().get(thread.ident or 0)
                stack = "".join(traceback.format_stack(frame)) if frame else ""
                outcomes[rank] = RankOutcome(
                    rank,
                    error=f"still running after {time.monotonic() - started:.1f} s\n{stack}",
                    exception=CommTimeoutError(f"rank {rank} did not end within {timeout_s:g} s"),
                )
        ordered = [outcomes[rank] for rank in range(self._size)]
        if any(o.error for o in ordered):
            raise RankFailedError(ordered)
        return [o.result for o in ordered]

    def store_path(self) -> str:
        """A fresh path that ranks can meet at, or use as a name."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="sagellm-threads-")
        self._stores += 1
        return str(Path(self._folder.name) / f"store-{self._stores}")

    def close(self) -> None:
        """Remove what `store_path` made. Safe more than once."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Self:
        """Return itself; `close` runs at the end of the block."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()
