"""Where a backend's process group comes from: given, initialised, the environment, or nowhere."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from sagellm.core.protocols import BackendSpec, CommTimeoutError, ConfigError
from sagellm.core.protocols.process_group import group_facts, group_libraries, make_group

__all__ = ["GroupSource", "find_source", "group_for", "is_used_as_it_is"]

_lock = threading.Lock()
_stores: dict[tuple[str, int, int], tuple[Store, int, int]] = {}
"""Stores of environments already met: rank 0 can listen on MASTER_PORT only once."""

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class GroupSource:
    """What a backend will stand on.

    Attributes:
        group: An existing process group, or None.
        store: Store shared by the ranks, or None for a world of one.
        rank: This rank.
        size: Ranks.
        reason: One sentence for a person.
        name: Of the group.
        global_ranks: The job's rank of each member.

    """

    group: dist.ProcessGroup | None
    store: Store | None
    rank: int
    size: int
    reason: str
    name: str = "world"
    global_ranks: tuple[int, ...] = (0,)


def find_source(group: dist.ProcessGroup | None, timeout_s: float) -> GroupSource:
    """The given group, else the default one, else the environment's world, else a world of one.

    Reading the environment's world connects to its store; every rank does so.

    Raises:
        ConfigError: Some of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are missing or bad.
        CommTimeoutError: The store at MASTER_ADDR cannot be reached in time.

    """
    if group is not None:
        return _source_of(group, "the given group")
    if dist.is_available() and dist.is_initialized():
        world = cast("dist.ProcessGroup", dist.group.WORLD)
        return _source_of(world, "the default process group")
    present = [name for name in _VARIABLES if os.environ.get(name)]
    if not present:
        return GroupSource(None, None, 0, 1, "a world of one: no group and no RANK was found")
    if len(present) < len(_VARIABLES):
        missing = [name for name in _VARIABLES if name not in present]
        raise ConfigError(
            f"{', '.join(present)} set but {', '.join(missing)} missing; "
            f"start with torchrun, or unset them for a world of one"
        )
    rank, size = _integer("RANK"), _integer("WORLD_SIZE")
    if not 0 <= rank < size:
        raise ConfigError(f"RANK {rank} is not in 0..{size - 1} (WORLD_SIZE {size})")
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        with _lock:
            met = _stores.get((address, rank, size))
            if met is None:
                meeting = rendezvous("env://", timeout=timedelta(seconds=timeout_s))
                met = _stores[address, rank, size] = next(meeting)
        store, rank, size = met
    except (RuntimeError, ValueError, OSError) as e:  # torch's network errors are RuntimeError
        raise CommTimeoutError(
            f"rank {rank} of {size} cannot meet the others at {address} in {timeout_s} s: {e}"
        ) from e
    reason = f"RANK {rank} of {size} at {address}"
    return GroupSource(None, store, rank, size, reason, global_ranks=tuple(range(size)))


def group_for(
    spec: BackendSpec, source: GroupSource, device: torch.device, timeout_s: float
) -> tuple[dist.ProcessGroup | None, bool]:
    """A process group of the spec's library over the source's ranks, and whether we made it.

    An existing group of that library is used as it is; one of another library gets a sibling
    over the same ranks. None is a world of one.

    Raises:
        CommTimeoutError: Some rank did not come; the message says where they were to meet.

    """
    if spec.c10d_name is None:
        raise ConfigError(f"backend {spec.name!r} does not run on torch process groups")
    deadline = timedelta(seconds=timeout_s)
    try:
        if source.group is not None:
            if is_used_as_it_is(spec, source, device):
                return source.group, False
            everyone = range(source.size)
            made = make_group(source.group, everyone, spec.c10d_name, timeout_s, spec.name)
            return cast("dist.ProcessGroup", made), True
        if source.store is None:
            return None, False
        # The store may outlive a world: its keys must not meet those of the next one.
        turn = source.store.add(f"sagellm/world/{source.rank}", 1)
        dist.init_process_group(
            spec.c10d_name,
            store=PrefixStore(f"sagellm/world{turn}", source.store),
            rank=source.rank,
            world_size=source.size,
            timeout=deadline,
        )
    except (RuntimeError, ValueError) as e:  # torch reports a rank that never came in many words
        raise CommTimeoutError(
            f"{spec.name} over {source.size} ranks ({source.reason}) was not formed "
            f"within {timeout_s} s, this is rank {source.rank}: {e}"
        ) from e
    return cast("dist.ProcessGroup", dist.group.WORLD), True


def is_used_as_it_is(spec: BackendSpec, source: GroupSource, device: torch.device) -> bool:
    """Whether `group_for` would give an existing group, whose communicator may exist too."""
    if source.group is None or spec.c10d_name is None:
        return False
    return _serves(source.group, spec.c10d_name, device)


def _serves(group: dist.ProcessGroup, library: str, device: torch.device) -> bool:
    libraries = group_libraries(group)
    return libraries.get(device.type, library if not libraries else "") == library


def _source_of(group: dist.ProcessGroup, reason: str) -> GroupSource:
    name, ranks, store = group_facts(group)
    return GroupSource(group, store, group.rank(), group.size(), reason, name or "group", ranks)


def _integer(name: str) -> int:
    value = os.environ[name]
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name} is {value!r}, not an integer") from None
