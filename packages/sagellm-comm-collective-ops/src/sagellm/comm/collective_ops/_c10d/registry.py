"""Torch's table of the groups of this process."""

from __future__ import annotations

from torch._C import _distributed_c10d as c10d
from torch.distributed import distributed_c10d

from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.process_group import TorchObject

__all__ = ["adopt"]


def adopt(group: TorchObject, inner: TorchObject, name: str) -> None:
    """Register `group` beside `inner`, with its ranks, so that `dist.*` takes it.

    A group outside the table stays outside.

    Raises:
        ConfigError: The name is taken.

    """
    world: TorchObject = distributed_c10d._world
    if inner not in world.pg_map:
        return
    if name in world.pg_names.values():
        raise ConfigError(f"a process group is called {name!r} already; give another name")
    world.pg_map[group] = world.pg_map[inner]
    world.pg_names[group] = name
    world.pg_group_ranks[group] = dict(world.pg_group_ranks[inner])
    world.pg_backend_config[group] = world.pg_backend_config[inner]
    tag = f"ptd:{name}"
    world.pg_to_tag[group] = tag
    world.tags_to_pg.setdefault(tag, []).append(group)
    world.tags_to_pg.setdefault("", []).append(group)
    register: TorchObject = c10d._register_process_group
    register(name, group)
