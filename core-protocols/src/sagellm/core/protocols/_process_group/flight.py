"""A group's last calls in the shape of torch's flight recorder, and who is late."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .failure import say_positions
from .recorder import COMPLETED, P2P_OPS, SCHEDULED, FlightRecorder, Record
from .shim import dtype_name
from .transport import Position, Transport

if TYPE_CHECKING:
    from .observed import ObservedGroup

__all__ = ["VERSION", "flight_dump", "write_dump"]

VERSION = "2.10"
"""Of torch's format; its analyzer reads any 2.x alike where no call was coalesced."""

_LIBRARIES = frozenset({"nccl", "ncclx", "xccl", "gloo", "rccl", "rcclx", "mccl", "hccl"})
"""Names that torch's analyzer accepts in front of an operation."""
_NAMES = {
    "all_gather_into_tensor": "_all_gather_base",
    "reduce_scatter_tensor": "_reduce_scatter_base",
    "all_to_all_single": "all_to_all",
    "send_kv_blocks": "send",
    "recv_kv_blocks": "recv",
}
_GATHERING = frozenset({"all_gather", "all_gather_into_tensor", "gather"})
_SCATTERING = frozenset({"reduce_scatter", "reduce_scatter_tensor"})


def flight_dump(
    group: ObservedGroup, recorder: FlightRecorder, transport: Transport, reason: str
) -> dict[str, Any]:
    """What `flight_record` of a backend returns."""
    records = recorder.records()
    # Records have the monotonic clock, readers want the other one.
    offset = time.time_ns() - time.monotonic_ns()
    global_rank = group.global_ranks[group.rank]
    late, summary = _who_is_late(group, recorder, records, transport.peer_positions())
    collectives = [r for r in records if r.op not in P2P_OPS]

    def last(states: tuple[str, ...]) -> int:
        return max((r.collective for r in collectives if r.state in states), default=-1)

    return {
        "version": VERSION,
        "rank": global_rank,
        "host_name": socket.gethostname(),
        "pg_config": {
            group.group_name: {
                "name": group.group_name,
                "desc": group.name,
                "ranks": str(list(group.global_ranks)),
            }
        },
        "pg_status": {
            group.group_name: {
                "last_enqueued_collective": recorder.collectives,
                "last_started_collective": last(("started", COMPLETED)),
                "last_completed_collective": last((COMPLETED,)),
            }
        },
        "entries": [_entry(group, record, offset) for record in records],
        "sagellm": {
            "backend": group.name,
            "group": group.group_name,
            "rank": group.rank,
            "size": group.size,
            "pid": os.getpid(),
            "reason": reason,
            "dumped_unix_ns": time.time_ns(),
            "late": late,
            "summary": summary,
        },
    }


def _entry(group: ObservedGroup, record: Record, offset: int) -> dict[str, Any]:
    library = group.name if group.name in _LIBRARIES else "gloo"
    name = _NAMES.get(record.op, record.op)
    is_p2p = record.op in P2P_OPS
    if is_p2p:
        arrow = "->" if name == "send" else "<-"
        name = f"{name} {group.rank}{arrow}{record.peer}"
    dtype = [] if record.dtype is None else [dtype_name(record.dtype)]
    inputs, outputs = _sizes(record, group.size)
    return {
        "record_id": record.sequence,
        "pg_id": 0,
        "process_group": [group.group_name, group.name],
        "collective_seq_id": record.collective,
        "p2p_seq_id": record.sequence - record.collective + 1 if is_p2p else 0,
        "op_id": record.sequence,
        "profiling_name": f"{library}:{name}",
        "time_created_ns": record.started_ns + offset,
        "time_discovered_started_ns": None
        if record.state == SCHEDULED
        else record.started_ns + offset,
        "time_discovered_completed_ns": record.ended_ns + offset if record.ended_ns else None,
        "duration_ms": (record.ended_ns - record.started_ns) / 1e6 if record.ended_ns else None,
        "input_sizes": inputs,
        "input_dtypes": dtype,
        "output_sizes": outputs,
        "output_dtypes": dtype,
        "state": record.state,
        "timeout_ms": round(group.timeout_s * 1000),
        "is_p2p": is_p2p,
        "retired": record.state == COMPLETED,
        "frames": [],
        "op": record.op,
        "algorithm": record.algorithm,
        "reduce_op": record.reduce_op,
        "peer": record.peer,
        "nbytes": record.nbytes,
        "wait_ns": record.wait_ns,
    }


def _sizes(record: Record, size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Elements in and out, flat: shapes would have to be asked of every tensor at every call."""
    if record.dtype is None:
        return [[]], [[]]
    count = record.nbytes // record.dtype.itemsize
    if record.op in _GATHERING:
        return [[count]], [[count * size]]
    if record.op in _SCATTERING:
        return [[count]], [[count // size]]
    return [[count]], [[count]]


def _who_is_late(
    group: ObservedGroup,
    recorder: FlightRecorder,
    records: list[Record],
    positions: Mapping[int, Position | None],
) -> tuple[list[dict[str, Any]], str]:
    """Ranks that have not joined the oldest call that is not complete here, and a sentence."""
    waiting = next((r for r in records if r.state != COMPLETED and r.op not in P2P_OPS), None)
    ranks = {**positions, group.rank: recorder.position()}
    ahead = max((p.collective for p in ranks.values() if p is not None), default=0)
    late = [
        {
            "rank": rank,
            "global_rank": group.global_ranks[rank],
            "collective": None if position is None else position.collective,
            "op": None if position is None else position.op,
        }
        for rank, position in sorted(ranks.items())
        if (position is None and rank != group.rank)
        or (position is not None and position.collective < ahead)
    ]
    silent = [rank for rank, position in sorted(ranks.items()) if position is None]
    parts = []
    if waiting is not None:
        parts.append(f"rank {group.rank} waits in {waiting.text}, collective #{waiting.collective}")
    if silent and positions:
        parts.append(f"no sign of rank {', '.join(map(str, silent))}")
    stand = say_positions(ranks)
    if stand:
        parts.append(stand)
    return late, "; ".join(parts) or "nobody is known to be late"


def write_dump(dump: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write a dump as `flight-<group>-rank<global rank>.json`, in one step, and return its path.

    Raises:
        OSError: The folder cannot be made or written.

    """
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    group = re.sub(r"[^A-Za-z0-9_.]+", "_", str(dump["sagellm"]["group"]))[:80] or "group"
    path = where / f"flight-{group}-rank{dump['rank']}.json"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(dump, indent=1), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
