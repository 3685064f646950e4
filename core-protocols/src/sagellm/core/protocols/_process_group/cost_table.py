"""Rank 0's frozen cost model on every rank, so that all of them choose alike."""

from __future__ import annotations

import time

import msgspec
import torch

from sagellm.core.protocols.errors import (
    CommError,
    CommTimeoutError,
    DistributedRuntimeError,
    IntegrityError,
    ResourceError,
)
from sagellm.core.protocols.topology import CostTable

from .transport import RawCall, TorchObject, Transport

__all__ = [
    "MAX_TABLE_BYTES",
    "_decode",
    "_encode",
    "table_by_broadcast",
    "table_by_store",
]

MAX_TABLE_BYTES = 16 << 20


class _Curve(msgspec.Struct, array_like=True):
    op: str
    algorithm: str
    size: int
    points: list[tuple[int, float]]


class _Table(msgspec.Struct, array_like=True):
    fingerprint: str
    version: int
    curves: list[_Curve]


def _encode(table: CostTable) -> bytes:
    """The table in msgpack.

    Raises:
        ResourceError: It is beyond `MAX_TABLE_BYTES`.

    """
    curves = [_Curve(*key, list(points)) for key, points in table.curves.items()]
    data = msgspec.msgpack.encode(_Table(table.fingerprint, table.version, curves))
    if len(data) > MAX_TABLE_BYTES:
        raise ResourceError(f"a cost table of {len(data)} bytes, at most {MAX_TABLE_BYTES}")
    return data


def _decode(data: bytes) -> CostTable:
    """The table that `_encode` wrote.

    Raises:
        IntegrityError: It is something else.

    """
    try:
        table = msgspec.msgpack.decode(data, type=_Table)
    except msgspec.MsgspecError as e:
        raise IntegrityError(f"rank 0's cost table cannot be read: {e}") from e
    curves = {(c.op, c.algorithm, c.size): tuple(c.points) for c in table.curves}
    return CostTable(table.fingerprint, table.version, curves)


def table_by_broadcast(transport: Transport, ours: CostTable, timeout_s: float) -> CostTable:
    """Rank 0's table, by two broadcasts; every rank of the group makes this call.

    Raises:
        CommTimeoutError: Some rank did not come; all ranks hand in a cost model, or none does.
        IntegrityError: What came is no table.

    """
    end = time.monotonic() + timeout_s
    text = (
        f"cost table of group {transport.group_name} (rank {transport.rank} of {transport.size}; "
        f"hand a cost model in on all ranks or on none)"
    )
    data = _encode(ours) if transport.rank == 0 else b""
    try:
        count = torch.tensor([len(data)], dtype=torch.int64, device=transport.device)
        _broadcast(transport, count, text, end)
        nbytes = int(count.item())
        if not 0 < nbytes <= MAX_TABLE_BYTES:
            raise IntegrityError(f"rank 0 announces {nbytes} bytes, at most {MAX_TABLE_BYTES}")
        if transport.rank == 0:
            x = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(transport.device)
        else:
            x = torch.empty(nbytes, dtype=torch.uint8, device=transport.device)
        _broadcast(transport, x, text, end)
        return _decode(x.cpu().numpy().tobytes())
    except CommError as e:
        raise transport.explain_failure(text, e) from e
    except RuntimeError as e:  # torch's own errors, all of them RuntimeError
        raise transport.explain_failure(text, e) from e


def _broadcast(transport: Transport, x: torch.Tensor, text: str, end: float) -> None:
    left = max(0.001, end - time.monotonic())
    work = transport.issue(
        RawCall(
            "broadcast",
            outputs=[x],
            peer=0,
            timeout_s=left,
            describe=text,
            device=transport.device,
        )
    )
    if not work.synchronize(left):
        raise CommTimeoutError(f"not every rank came within {left:.1f} s")


def table_by_store(store: TorchObject, rank: int, ours: CostTable, timeout_s: float) -> CostTable:
    """Rank 0's table, through the store the ranks share; for use before there is a group.

    Raises:
        CommTimeoutError: Rank 0 put none there in time.
        IntegrityError: What is there is no table.

    """
    end = time.monotonic() + timeout_s
    pause_s = 0.001
    try:
        turn = store.add(f"sagellm/cost_table/turn/{rank}", 1)
        key = f"sagellm/cost_table/{turn}"
        if rank == 0:
            store.set(key, _encode(ours))
            return ours
        while not store.check([key]):
            if time.monotonic() >= end:
                raise CommTimeoutError(
                    f"rank 0 gave no cost table within {timeout_s} s; hand a cost model in on all "
                    f"ranks or none"
                )
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.05)
        data = bytes(store.get(key))
    except CommError:
        raise
    except RuntimeError as e:  # torch's store errors, all of them RuntimeError
        raise DistributedRuntimeError(f"the store that holds the cost table failed: {e}") from e
    if len(data) > MAX_TABLE_BYTES:
        raise IntegrityError(f"a cost table of {len(data)} bytes, at most {MAX_TABLE_BYTES}")
    return _decode(data)
