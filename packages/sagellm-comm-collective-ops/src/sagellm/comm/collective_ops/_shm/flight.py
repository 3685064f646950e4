"""One flight record of a group whose calls go two ways: through `TensorBackend`, or past it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import torch

from sagellm.core.protocols.process_group import (
    COMPLETED,
    LOCAL,
    P2P_OPS,
    STARTED,
    TAKEN_OVER,
    FlightRecorder,
    Position,
    Record,
    RecordOwner,
)

from .engine import CallRecord
from .failures import Board
from .layout import DTYPES, OPS, REDUCTIONS, describe

__all__ = ["METHODS", "merge_records", "positions"]

METHODS = {
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
    "all_to_all": "all_to_all_single",
}
"""Methods whose primitive has another name."""

_MULTIPLIED = frozenset({"all_gather", "gather", "scatter"})


def merge_records(
    owner: RecordOwner,
    noted: Sequence[Record],
    ran: Sequence[CallRecord],
    entries: int,
    now: Position | None,
    fallen: Record | None = None,
    failed: int | None = None,
) -> FlightRecorder:
    """The calls of both, by time, each once, numbered as the engine numbers collectives.

    The engine runs calls in the order in which they were begun, and no call passes `TensorBackend`
    by while one of its own waits: so the first call of the engine that began after a noted one did,
    and is nobody else's, is that one.

    Args:
        owner: The group.
        noted: Calls that went through `TensorBackend`, oldest first.
        ran: Calls of the engine, oldest first.
        entries: How many to keep.
        fallen: The engine's call that failed: the engine may not remember it.
        failed: Number of the engine's call that failed, whichever way it came.
        now: Where the segment says this rank is; counts where the engine remembers nothing.

    """
    found: list[Record] = []
    rest = list(ran)
    if rest and rest[0].number:  # older calls of the engine are forgotten, and so are theirs
        noted = [r for r in noted if not r.ended_ns or r.ended_ns > rest[0].started_ns]
    number = rest[0].number if rest else 0
    for record in noted:
        collective = record.op not in P2P_OPS and record.algorithm not in (LOCAL, TAKEN_OVER)
        while rest and rest[0].started_ns < record.started_ns:
            number = rest[0].number + 1
            found.append(_record(owner, rest.pop(0)))
        mine = copy(record)
        if collective and ran:
            if rest and not (record.ended_ns and rest[0].started_ns > record.ended_ns):
                own = rest.pop(0)
                number = own.number + 1
                mine.algorithm, mine.wait_ns = own.algorithm or mine.algorithm, own.wait_ns
            elif not record.ended_ns:
                number += 1  # it is queued, or was never begun
        elif collective:
            number += 1
            if failed is not None and not record.ended_ns:
                number = max(number, failed + 1)
        mine.collective = number
        found.append(mine)
    found += [_record(owner, call) for call in rest]
    if fallen is not None and not (rest and not rest[-1].ended_ns):
        last = copy(fallen)
        before = max((r.collective for r in found), default=0)
        last.collective = before + 1 if failed is None else failed + 1
        found.append(last)
    merged = FlightRecorder(entries)
    first = found[0].collective - 1 if found else 0
    for i, record in enumerate(found):
        record.sequence = max(0, first) + i
        merged.add(record)
    if now is not None and now.collective > merged.collectives:
        merged.stand(now)
    return merged


def _record(owner: RecordOwner, call: CallRecord) -> Record:
    packed = call.packed
    op, dtype = OPS[packed & 0xFF], packed >> 8 & 0xFF
    reduction, root = packed >> 16 & 0xFF, packed >> 32 & 0xFFFF
    record = Record(
        owner,
        METHODS.get(op, op),
        call.number,
        call.number + 1,
        call.nbytes,
        call.nbytes * (owner.size if op in _MULTIPLIED else 1),
        getattr(torch, DTYPES[dtype - 1]) if dtype else None,
        REDUCTIONS[reduction] if reduction else None,
        root - 1 if root else None,
        call.algorithm,
    )
    record.text = f"{describe(packed, call.nbytes, call.number)} of group {owner.group_name}"
    record.started_ns, record.ended_ns, record.wait_ns = (
        call.started_ns,
        call.ended_ns,
        call.wait_ns,
    )
    record.state = COMPLETED if call.ended_ns else STARTED
    return record


def positions(board: Board) -> dict[int, Position | None]:
    """Where every rank stands by what it wrote in the segment: None before its first call.

    A rank's signature tells which call it began last, not whether that is over.
    """
    return dict(_positions(board))


def _positions(board: Board) -> Iterator[tuple[int, Position | None]]:
    for rank in range(len(board.global_ranks)):
        step = board.step(rank)
        if not step:
            yield rank, None
            continue
        # A call signs its first step only, whose parity may be either by now.
        signed = (board.call(rank, step), board.call(rank, step + 1))
        packed, _, number = max(signed, key=lambda words: (words[2], words[0]))
        op = OPS[packed & 0xFF]
        yield rank, Position(number + 1, METHODS.get(op, op), STARTED)
