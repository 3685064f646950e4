"""Every call a torch process group takes, with the names that torch releases gave it.

torch 2.13 renamed `_allgather_base` to `all_gather_single` and its like; programs, C++ callers and
`torch.distributed` itself use whichever their release knows, so a group of ours has both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sagellm.core.protocols import ConfigError, UnsupportedOperationError
from sagellm.core.protocols.process_group import TorchObject

__all__ = [
    "ENTRY_POINTS",
    "EntryPoint",
    "is_async",
    "method_of",
    "one",
    "reduction",
    "root_of",
    "seconds_of",
    "tensors_in",
]


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """One call of a process group.

    Attributes:
        name: Newest method name.
        op: What `torch.distributed` calls it; what hooks and records see.
        older: Names in older releases.
        inputs: Position of what is sent; None for nothing.
        outputs: Position of what is written; None for nothing.

    """

    name: str
    op: str
    older: tuple[str, ...] = ()
    inputs: int | None = 0
    outputs: int | None = 0


ENTRY_POINTS = (
    EntryPoint("allreduce", "all_reduce"),
    EntryPoint("allreduce_coalesced", "all_reduce_coalesced"),
    EntryPoint("allgather", "all_gather", inputs=1),
    EntryPoint("allgather_coalesced", "all_gather_coalesced", inputs=1),
    EntryPoint("all_gather_single", "all_gather_into_tensor", ("_allgather_base",), inputs=1),
    EntryPoint(
        "all_gather_single_coalesced",
        "all_gather_into_tensor_coalesced",
        ("allgather_into_tensor_coalesced",),
        inputs=1,
    ),
    EntryPoint("reduce_scatter", "reduce_scatter", inputs=1),
    EntryPoint(
        "reduce_scatter_single", "reduce_scatter_tensor", ("_reduce_scatter_base",), inputs=1
    ),
    EntryPoint(
        "reduce_scatter_single_coalesced",
        "reduce_scatter_tensor_coalesced",
        ("reduce_scatter_tensor_coalesced",),
        inputs=1,
    ),
    EntryPoint("all_to_all_single", "all_to_all_single", ("alltoall_base",), inputs=1),
    EntryPoint("alltoall", "all_to_all", inputs=1),
    EntryPoint("broadcast", "broadcast"),
    EntryPoint("reduce", "reduce"),
    EntryPoint("gather", "gather", inputs=1),
    EntryPoint("gather_single", "gather_into_tensor", ("gather_into_tensor",), inputs=1),
    EntryPoint("scatter", "scatter", inputs=1),
    EntryPoint("send", "send", outputs=None),
    EntryPoint("recv", "recv", inputs=None),
    EntryPoint("recv_anysource", "recv", inputs=None),
    EntryPoint("barrier", "barrier", inputs=None, outputs=None),
    EntryPoint("monitored_barrier", "monitored_barrier", inputs=None, outputs=None),
)

# By torch's numbers of its reductions, which are also their hashes: a comparison costs more.
_REDUCTIONS = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")


def reduction(options: TorchObject) -> str:
    """The reduction that options, or a bare `ReduceOp`, ask for.

    Raises:
        UnsupportedOperationError: One that only a device library has.

    """
    if options is None:
        return "sum"
    op = getattr(options, "reduceOp", options)
    try:
        return _REDUCTIONS[hash(op)]
    except IndexError:
        raise UnsupportedOperationError(
            "premul_sum is offered by nccl only; multiply the tensor first, or reduce with avg"
        ) from None


def is_async(options: TorchObject) -> bool:
    """Whether the caller goes on before the call is done; releases that do not say so may."""
    return bool(getattr(options, "asyncOp", True))


def method_of(group: TorchObject, entry: EntryPoint) -> Callable[..., Any]:
    """The method of any process group for a call, whatever the release names it.

    Raises:
        UnsupportedOperationError: The group has no such call.

    """
    for name in (entry.name, *entry.older):
        found = getattr(group, name, None)
        if found is not None:
            method: Callable[..., Any] = found
            return method
    raise UnsupportedOperationError(
        f"process group {type(group).__name__} of torch {torch.__version__} has no {entry.name}"
    )


def tensors_in(payload: object) -> tuple[Tensor, ...]:
    """The tensors of an argument, however nested."""
    if isinstance(payload, Tensor):
        return (payload,)
    if isinstance(payload, (list, tuple)):
        return tuple(x for part in payload for x in tensors_in(part))
    return ()


def one(tensors: object, call: str) -> Tensor:
    """The tensor of a call that takes a list of one.

    Raises:
        ConfigError: There are none or several.

    """
    if isinstance(tensors, Tensor):
        return tensors
    assert isinstance(tensors, (list, tuple))
    if len(tensors) != 1:
        raise ConfigError(f"{call} takes one tensor per rank, got {len(tensors)}")
    found: Tensor = tensors[0]
    return found


def root_of(options: TorchObject) -> int:
    """The root that options, or a bare number, ask for; a rank of the group."""
    return int(getattr(options, "rootRank", options if isinstance(options, int) else 0))


def seconds_of(options: TorchObject) -> float | None:
    """The deadline of one call in seconds; None where options set none."""
    limit = getattr(options, "timeout", None)
    seconds = 0.0 if limit is None else float(limit.total_seconds())
    return seconds if seconds > 0 else None
