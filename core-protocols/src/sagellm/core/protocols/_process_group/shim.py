"""Everything about torch process groups that changes between torch releases or backends.

torch 2.13 renamed `_allgather_base` to `all_gather_single`, `_reduce_scatter_base` to
`reduce_scatter_single` and `alltoall_base` to `all_to_all_single`; the old names warn there
and are the only ones before. Calls go to the group's own methods, not to
`torch.distributed.*`: these take a deadline per call and group ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from sagellm.core.protocols.comm_types import ReduceOp
from sagellm.core.protocols.errors import UnsupportedOperationError

from .transport import RawCall, TorchObject

__all__ = [
    "abort_group",
    "dtype_name",
    "group_facts",
    "group_libraries",
    "issue",
    "make_group",
    "span",
    "world_is_initialized",
]

logger = logging.getLogger(__name__)

_POISON_TAG = 0x5A6E


def span(timeout_s: float) -> timedelta:
    """A timedelta that torch cannot mistake for "no timeout": at least one millisecond."""
    return timedelta(milliseconds=max(1, int(timeout_s * 1000)))


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as torch names it, without the prefix."""
    return str(dtype).removeprefix("torch.")


def world_is_initialized() -> bool:
    """Whether this process has a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _reduce_op(op: ReduceOp | None) -> TorchObject:
    return getattr(c10d.ReduceOp, (op or ReduceOp.SUM).name)


def _options(kind: str, call: RawCall) -> TorchObject:
    options = getattr(c10d, kind)()
    options.timeout = span(call.timeout_s)
    if hasattr(options, "reduceOp"):
        options.reduceOp = _reduce_op(call.reduce_op)
    if hasattr(options, "rootRank") and call.peer is not None:
        options.rootRank = call.peer
    if hasattr(options, "rootTensor"):
        options.rootTensor = 0
    return options


def _method(group: TorchObject, *names: str) -> TorchObject:
    for name in names:
        found = getattr(group, name, None)
        if found is not None:
            return found
    raise UnsupportedOperationError(
        f"process group {type(group).__name__} of torch {torch.__version__} has none of "
        f"{', '.join(names)}"
    )


def issue(group: TorchObject, call: RawCall) -> TorchObject:
    """Start one primitive call on a torch process group and return torch's work.

    Args:
        group: `torch.distributed.ProcessGroup`, C++ or a Python subclass.
        call: Contiguous tensors of the group's device.

    """
    return _ISSUERS[call.op](group, call)


def _all_reduce(group: TorchObject, call: RawCall) -> TorchObject:
    return group.allreduce([call.outputs[0]], _options("AllreduceOptions", call))


def _all_gather(group: TorchObject, call: RawCall) -> TorchObject:
    method = _method(group, "all_gather_single", "_allgather_base")
    return method(call.outputs[0], call.inputs[0], _options("AllgatherOptions", call))


def _reduce_scatter(group: TorchObject, call: RawCall) -> TorchObject:
    method = _method(group, "reduce_scatter_single", "_reduce_scatter_base")
    return method(call.outputs[0], call.inputs[0], _options("ReduceScatterOptions", call))


def _all_to_all(group: TorchObject, call: RawCall) -> TorchObject:
    method = _method(group, "all_to_all_single", "alltoall_base")
    options = _options("AllToAllOptions", call)
    out_splits, in_splits = list(call.out_splits), list(call.in_splits)
    return method(call.outputs[0], call.inputs[0], out_splits, in_splits, options)


def _broadcast(group: TorchObject, call: RawCall) -> TorchObject:
    return group.broadcast([call.outputs[0]], _options("BroadcastOptions", call))


def _reduce(group: TorchObject, call: RawCall) -> TorchObject:
    return group.reduce([call.outputs[0]], _options("ReduceOptions", call))


def _gather(group: TorchObject, call: RawCall) -> TorchObject:
    outputs = [call.outputs] if call.outputs else []
    return group.gather(outputs, [call.inputs[0]], _options("GatherOptions", call))


def _scatter(group: TorchObject, call: RawCall) -> TorchObject:
    inputs = [call.inputs] if call.inputs else []
    return group.scatter([call.outputs[0]], inputs, _options("ScatterOptions", call))


def _send(group: TorchObject, call: RawCall) -> TorchObject:
    return group.send([call.inputs[0]], call.peer, call.tag)


def _recv(group: TorchObject, call: RawCall) -> TorchObject:
    return group.recv([call.outputs[0]], call.peer, call.tag)


def _barrier(group: TorchObject, call: RawCall) -> TorchObject:
    options = _options("BarrierOptions", call)
    if call.device is not None and call.device.type != "cpu":
        options.device_ids = [call.device.index or 0]
    return group.barrier(options)


_ISSUERS = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "gather": _gather,
    "scatter": _scatter,
    "send": _send,
    "recv": _recv,
    "barrier": _barrier,
}


def abort_group(group: TorchObject, device: torch.device, rank: int, size: int) -> None:
    """Tear the connections of a group down, so that peers in a call of it fail now.

    gloo's own `abort` leaves them open; a receive that times out is what makes gloo close
    every pair of its context, so one is provoked. Device backends have an abort that works.
    """
    if size == 1:
        return
    backend: TorchObject = None  # torch's Backend, or the group itself when it is a Python subclass
    with contextlib.suppress(Exception):
        backend = group._get_backend(device)
    kind = type(backend).__name__
    if device.type == "cpu" and kind in ("ProcessGroupGloo", "_ProcessGroupWrapper"):
        for peer in range(size):
            # A peer that is gone already fails at once and closes nothing: go on to the next.
            with contextlib.suppress(RuntimeError):
                if peer != rank:
                    group.recv([torch.empty(1)], peer, _POISON_TAG).wait(span(0.001))
        return
    for target in (backend, group):
        for name in ("abort", "_abort", "_shutdown"):
            method = getattr(target, name, None)
            if method is None:
                continue
            try:
                method()
            except Exception as e:  # a vendor's abort may fail in any way; the group is dead here
                logger.debug("%s.%s failed: %s", type(target).__name__, name, e)
                continue
            return


def group_facts(group: TorchObject) -> tuple[str, tuple[int, ...], TorchObject]:
    """Name, global ranks and store of a group; a group outside torch's registry has its own."""
    distributed = torch.distributed
    name = ""
    with contextlib.suppress(Exception):
        name = str(group.group_name)
    ranks: tuple[int, ...] = tuple(range(group.size()))
    with contextlib.suppress(Exception):
        ranks = tuple(distributed.get_process_group_ranks(group))
    store: TorchObject = None
    with contextlib.suppress(Exception):
        store = group.get_group_store()
    if store is None:
        with contextlib.suppress(Exception):
            lookup = distributed.distributed_c10d._get_process_group_store
            store = lookup(group)  # type: ignore[no-untyped-call,unused-ignore]  # torch's own helper
    return name, ranks, store


def make_group(
    parent: TorchObject, ranks: Sequence[int], backend: str, timeout_s: float, desc: str
) -> TorchObject:
    """A torch process group over `ranks` of `parent` in that order; only they make this call.

    torch's own `new_group` names a group by the number of groups alive in the process, so that
    ranks with different histories wait for each other under different names, and a name used
    again meets the addresses its first bearer left in the store. Names here are counted in the
    parent's store, by each member for itself, and are never used twice.
    """
    distributed_c10d: TorchObject = torch.distributed.distributed_c10d
    name, members, store = group_facts(parent)
    chosen = [members[rank] for rank in ranks]
    if store is None:
        store = distributed_c10d._get_default_store()
    key = hashlib.sha256(repr(tuple(chosen)).encode()).hexdigest()[:16]
    turn = store.add(f"sagellm/split/{key}/{members[parent.rank()]}", 1)
    group, _ = distributed_c10d._new_process_group_helper(
        len(chosen),
        chosen.index(members[parent.rank()]),
        chosen,
        distributed_c10d.Backend(backend),
        store,
        f"{name}/{key}/{turn}",
        timeout=span(timeout_s),
        group_desc=desc,
    )
    distributed_c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(chosen)}
    return group


def group_libraries(group: TorchObject | None) -> dict[str, str]:
    """The c10d library of a group for each device type; of the default group when None.

    >>> group_libraries(None)
    {}
    """
    if group is None:
        if not world_is_initialized():
            return {}
        group = cast("TorchObject", torch.distributed.group.WORLD)
    config = ""
    with contextlib.suppress(Exception):  # a group outside torch's registry has no configuration
        config = str(torch.distributed.get_backend_config(group))
    if not config:
        return {str(d.type): str(group.name()) for d in group._device_types}
    pairs = (part.partition(":") for part in config.split(","))
    return {device: library for device, _, library in pairs if library}
