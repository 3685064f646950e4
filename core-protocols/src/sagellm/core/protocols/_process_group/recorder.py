"""The last calls of one group, kept as they are issued: what statistics and dumps are made of.

A call's record holds no tensor and is never copied: issuing a call makes one small object and
stores it in a ring, and everything else about it is worked out when somebody asks.
"""

from __future__ import annotations

from time import monotonic_ns
from typing import TYPE_CHECKING, Protocol

from sagellm.core.protocols.comm_types import CommCall

from .shim import dtype_name
from .transport import Position

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "COMPLETED",
    "LOCAL",
    "NATIVE",
    "P2P_OPS",
    "SCHEDULED",
    "STARTED",
    "TAKEN_OVER",
    "Describer",
    "FlightRecorder",
    "Record",
]

P2P_OPS = frozenset({"send", "recv", "send_kv_blocks", "recv_kv_blocks"})
"""Operations of two ranks; they do not count as collectives."""

NATIVE, LOCAL, TAKEN_OVER = "native", "local", "taken_over"
"""Algorithms: the library's own, nothing to send, and a hook's."""

SCHEDULED, STARTED, COMPLETED = "scheduled", "started", "completed"


class Owner(Protocol):
    """Where a record learns whose call it is."""

    @property
    def rank(self) -> int:
        """This rank."""
        ...

    @property
    def size(self) -> int:
        """Ranks of the group."""
        ...

    @property
    def group_name(self) -> str:
        """Name of the group."""
        ...


class Record:
    """One call.

    Attributes:
        owner: The backend.
        text: The call as messages name it.
        op: Method name.
        sequence: Position in this rank's call order on the group, from 0.
        collective: Collectives that this rank has begun on the group, this one included.
        nbytes: Bytes of this rank's input.
        wire_bytes: Bytes as nccl-tests count them.
        dtype: Element type, None without tensors.
        reduce_op: Reduction or None.
        peer: Root or peer, or None.
        algorithm: What runs it.
        state: `SCHEDULED`, then `STARTED`, then `COMPLETED`; a failed call stays as it is.
        started_ns: CLOCK_MONOTONIC at the call.
        wait_ns: Time spent waiting for peers, None where unknown.
        ended_ns: CLOCK_MONOTONIC at its end; 0 before, and where the host does not see it.

    """

    __slots__ = (
        "algorithm", "collective", "dtype", "ended_ns", "nbytes", "op", "owner", "peer",
        "reduce_op", "sequence", "started_ns", "state", "text",
        "wait_ns", "wire_bytes",
    )  # fmt: skip

    def __init__(
        self,
        owner: Owner,
        op: str,
        sequence: int,
        collective: int,
        nbytes: int,
        wire_bytes: int,
        dtype: torch.dtype | None,
        reduce_op: str | None,
        peer: int | None,
        algorithm: str,
    ) -> None:
        self.owner = owner
        self.op = op
        self.sequence = sequence
        self.collective = collective
        self.nbytes = nbytes
        self.wire_bytes = wire_bytes
        self.dtype = dtype
        self.reduce_op = reduce_op
        self.peer = peer
        self.algorithm = algorithm
        self.state = SCHEDULED
        self.ended_ns = 0
        self.wait_ns: int | None = None
        self.text = ""
        self.started_ns = monotonic_ns()

    def call(self, tensors: tuple[Tensor, ...] = ()) -> CommCall:
        """The call as hooks see it."""
        return CommCall(
            op=self.op,
            sequence=self.sequence,
            nbytes=self.nbytes,
            dtype="" if self.dtype is None else dtype_name(self.dtype),
            group=self.owner.group_name,
            rank=self.owner.rank,
            size=self.owner.size,
            reduce_op=self.reduce_op,
            peer=self.peer,
            tensors=tensors,
        )


class Describer:
    """Makes the text that names a call in messages, with what never changes made beforehand."""

    __slots__ = ("_dtypes", "_middle")

    def __init__(self, group: str, rank: int, size: int) -> None:
        self._middle = f" of group {group} (rank {rank} of {size}, "
        self._dtypes: dict[torch.dtype | None, str] = {None: ""}

    def __call__(self, record: Record) -> str:
        """Op, sequence, group, ranks, bytes."""
        dtype = self._dtypes.get(record.dtype)
        if dtype is None:
            assert record.dtype is not None
            dtype = self._dtypes[record.dtype] = dtype_name(record.dtype)
        detail = f" {record.reduce_op}" if record.reduce_op else ""
        if record.peer is not None:
            detail += f" peer {record.peer}"
        return f"{record.op}{detail} #{record.sequence}{self._middle}{record.nbytes} bytes {dtype})"


class FlightRecorder:
    """A ring of the last calls of one group. One thread adds, any may look.

    Args:
        entries: How many are kept; 0 keeps none but counts on.

    """

    __slots__ = ("_last", "_ring", "_told", "collectives", "sequence")

    def __init__(self, entries: int) -> None:
        self._ring: list[Record | None] = [None] * entries
        self._last: Record | None = None
        self._told: Position | None = None
        self.sequence = 0
        """Calls so far, which is the next call's number."""
        self.collectives = 0
        """Collectives so far."""

    def add(self, record: Record) -> None:
        """Keep a call that is about to be issued, and count it."""
        sequence = record.sequence
        self.sequence = sequence + 1
        self.collectives = record.collective
        self._last = record
        if self._ring:
            self._ring[sequence % len(self._ring)] = record

    def records(self) -> list[Record]:
        """What is kept, oldest first."""
        return sorted((r for r in self._ring if r is not None), key=lambda r: r.sequence)

    def stand(self, position: Position) -> None:
        """Say where this rank stands, when calls were made that were not added."""
        self._told = position
        self.collectives = position.collective

    def position(self) -> Position | None:
        """Where this rank stands: its latest call; None before the first."""
        if self._told is not None:
            return self._told
        last = self._last
        return None if last is None else Position(last.collective, last.op, last.state)
