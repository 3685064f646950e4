"""Torch's own process groups beneath ours: Gloo for the CPU, NCCL and vendors' for devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import distributed_c10d

from sagellm.core.protocols import BackendUnavailableError
from sagellm.core.protocols.process_group import TorchObject

__all__ = ["GroupPlan", "forget_group", "library_for", "library_group"]


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What torch says of a group to be made.

    Attributes:
        store: Keys of this group alone.
        rank: This rank in it.
        size: Ranks.
        global_ranks: The job's rank of each member.
        timeout_s: Deadline of every call.
        name: Name in torch's registry.

    """

    store: TorchObject
    rank: int
    size: int
    global_ranks: tuple[int, ...]
    timeout_s: float
    name: str

    @property
    def deadline(self) -> timedelta:
        """The deadline as torch takes it."""
        return timedelta(seconds=self.timeout_s)


def library_for(device_type: str) -> str:
    """Torch's library for a kind of device.

    Raises:
        BackendUnavailableError: Torch knows none.

    """
    found = distributed_c10d.Backend.default_device_backend_map.get(device_type)
    if found is None:
        raise BackendUnavailableError(
            f"torch {torch.__version__} has no process group library for {device_type} tensors"
        )
    return str(found)


def library_group(library: str, device_type: str, plan: GroupPlan) -> TorchObject:
    """A process group of one of torch's libraries, private to its maker.

    Raises:
        BackendUnavailableError: This torch lacks the library.

    """
    store = dist.PrefixStore(f"sagellm-{library}", plan.store)  # type: ignore[attr-defined]  # torch's stubs omit it
    kinds = distributed_c10d.Backend.backend_type_map
    # A bare ProcessGroupGloo has none of the coalesced calls.
    group: TorchObject = dist.ProcessGroup(store, plan.rank, plan.size)
    kind = kinds.get(library, dist.ProcessGroup.BackendType.CUSTOM)
    group._set_default_backend(kind)
    group._register_backend(torch.device(device_type), kind, _backend(library, store, plan))
    group._set_group_name(f"{plan.name}/{library}")
    # Only so that `dist.get_process_group_ranks` can tell: nothing else of torch's sees the group.
    ranks = {r: i for i, r in enumerate(plan.global_ranks)}
    distributed_c10d._world.pg_group_ranks[group] = ranks
    if not hasattr(group, "get_group_store"):  # torch 2.6 finds the store in its table
        distributed_c10d._world.pg_map[group] = (library, store)
    return group


def _meet(store: TorchObject, plan: GroupPlan) -> None:
    """Wait until every rank has its end of the group.

    A rank that is ahead and fails at once would cut off one that still connects.
    """
    store.set(f"made/{plan.rank}", "")
    store.wait([f"made/{r}" for r in range(plan.size)], plan.deadline)


def forget_group(group: TorchObject) -> None:
    """Undo what `library_group` told torch."""
    distributed_c10d._world.pg_group_ranks.pop(group, None)
    distributed_c10d._world.pg_map.pop(group, None)


def _backend(library: str, store: TorchObject, plan: GroupPlan) -> TorchObject:
    if library == "gloo" and dist.is_gloo_available():
        gloo = c10d.ProcessGroupGloo(store, plan.rank, plan.size, plan.deadline)
        gloo._set_sequence_number_for_group()
        _meet(store, plan)
        return gloo
    if library == "nccl" and dist.is_nccl_available():  # pragma: device-only
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = plan.deadline
        nccl = c10d.ProcessGroupNCCL(store, plan.rank, plan.size, options)
        nccl._set_sequence_number_for_group()
        return nccl
    plugin = distributed_c10d.Backend._plugins.get(library.upper())
    if plugin is None:
        raise BackendUnavailableError(f"torch {torch.__version__} is built without {library}")
    if not plugin.extended_api:
        return plugin.creator_fn(store, plan.rank, plan.size, plan.deadline)
    asked: TorchObject = c10d._DistributedBackendOptions()
    asked.store, asked.group_rank, asked.group_size = store, plan.rank, plan.size
    asked.timeout, asked.group_id = plan.deadline, plan.name
    asked.global_ranks_in_group = list(plan.global_ranks)
    return plugin.creator_fn(asked, None)


def device_types() -> Sequence[str]:
    """Kinds of devices that are present and have a library, without the CPU."""
    found = []
    for device_type in distributed_c10d.Backend.default_device_backend_map:
        api: TorchObject = getattr(torch, device_type, None)
        if device_type != "cpu" and api is not None and api.is_available():
            found.append(device_type)
    return found
