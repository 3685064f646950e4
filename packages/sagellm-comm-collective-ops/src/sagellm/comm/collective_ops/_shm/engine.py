"""What runs calls on a segment: the interface of the Python reference and of the C library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sagellm.core.protocols import ReduceOp
from sagellm.core.protocols.process_group import RawCall

__all__ = ["CallRecord", "Engine", "EngineFailure", "EngineTotals", "Shortcut"]


class EngineFailure(Exception):  # noqa: N818 - no error of the tree: one is made of it
    """A call that did not end well; `transport` turns it into an error of the protocol's tree.

    Attributes:
        cause: A word of `layout.CAUSES`.
        rank: The rank that is late, lost or whose call differs; for poison the one that wrote it.
        step: Step at which this rank stood.

    """

    def __init__(self, cause: str, rank: int, step: int) -> None:
        super().__init__(f"{cause} at step {step}: rank {rank}")
        self.cause, self.rank, self.step = cause, rank, step


@dataclass(frozen=True, slots=True)
class EngineTotals:
    """Counts of one (op, algorithm, size bucket) since the engine was made or reset.

    Attributes:
        op: Name in `layout.OPS`.
        algorithm: `one_shot`, `two_shot`, `symmetric` or `direct`.
        bucket: Floor of log2 of the bytes; -1 for 0 bytes.
        calls: Finished calls.
        nbytes: Bytes of this rank's input, summed.
        total_ns: From entry to end, summed.
        wait_ns: The part spent waiting for peers.
        histogram: Calls per duration: `i` holds those of [2**(i/8), 2**((i+1)/8)) times 10 ns.

    """

    op: str
    algorithm: str
    bucket: int
    calls: int
    nbytes: int
    total_ns: int
    wait_ns: int
    histogram: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call in the flight recorder.

    Attributes:
        number: Number of the call on this rank, from 0.
        packed: First signature word.
        nbytes: Second signature word.
        started_ns: CLOCK_MONOTONIC.
        ended_ns: CLOCK_MONOTONIC; 0 while it runs.
        wait_ns: Time it waited for peers.
        algorithm: As in `EngineTotals`.

    """

    number: int
    packed: int
    nbytes: int
    started_ns: int
    ended_ns: int
    wait_ns: int
    algorithm: str


class Engine(ABC):
    """Runs the collectives of one group, one call at a time, in the calling thread.

    Calls are those of `RawCall` but send and recv: contiguous CPU tensors, checked by the caller,
    at least two ranks. In-place operations name their tensor in `outputs` only.
    """

    name: str
    """`native` or `python`."""

    @abstractmethod
    def run(self, call: RawCall) -> None:
        """Run one call to its end, within `call.timeout_s`.

        Raises:
            EngineFailure: It did not end well; the engine is of no more use.

        """

    @abstractmethod
    def prepare(
        self, op: str, x: Tensor, out: Tensor, reduce_op: str, timeout_s: float
    ) -> Callable[[], None]:
        """`run` for the same tensors again and again, with everything computed beforehand.

        `op` is all_reduce (`out` is `x`), all_gather or reduce_scatter. The tensors' contents
        may change, their storage may not; the callable keeps them alive.
        """

    @abstractmethod
    def shortcut(
        self,
        op: str,
        dtype: torch.dtype,
        reduce_op: ReduceOp | None = None,
        root: int | None = None,
        *,
        timeout_s: float,
    ) -> Shortcut:
        """`run` for one kind of call, as short as the engine can make it.

        Like `run` it trusts its caller. `op` is all_reduce, broadcast (both in place, with the
        tensor given twice), all_gather or reduce_scatter.
        """

    @abstractmethod
    def algorithm(self, op: str, nbytes: int, *, symmetric: bool = False) -> str:
        """What `run` uses for such a call: equal on all ranks."""

    @abstractmethod
    def totals(self) -> Sequence[EngineTotals]:
        """Counts so far; empty when statistics are off."""

    @abstractmethod
    def records(self) -> Sequence[CallRecord]:
        """The last calls, oldest first, the running one last."""

    @abstractmethod
    def reset_totals(self) -> None:
        """Start the counts anew."""

    @abstractmethod
    def poison(self, cause: str, reason: str) -> None:
        """Make every rank's running and later calls fail. From any thread, more than once."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the segment. Not while a call runs."""


Shortcut = Callable[[Tensor, Tensor], bool]
"""`call(x, out)`, plain tensors of one type: whether it ran. Nothing was sent where they are
`tangled`, so that somebody has to copy first."""

EngineFactory = Callable[..., Engine]
"""`(memory, layout, rank, sockets, spin=…, statistics=…)`: see `segment.Segment`."""
