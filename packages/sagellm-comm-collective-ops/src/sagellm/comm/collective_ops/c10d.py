"""Our backends, and hooks around anyone's, for any program that uses `torch.distributed`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.process_group import TorchObject, group_facts

from ._c10d.libraries import GroupPlan, device_types
from ._c10d.making import make_group
from ._c10d.registry import adopt
from ._c10d.wrapping import After, Before, CallHooks, Record, TakeOver, WrappingGroup

__all__ = ["register_c10d_backend", "wrap_process_group"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Registration:
    backend: str
    options: Mapping[str, Any]
    hooks: CallHooks


_registered: dict[str, _Registration] = {}


def register_c10d_backend(
    name: str = "sagellm",
    *,
    backend: str = "auto",
    options: Mapping[str, Any] | None = None,  # Any: each option has its own type
    record: Record | None = None,
    before: Before | None = None,
    after: After | None = None,
    take_over: TakeOver | None = None,
) -> None:
    """Let `torch.distributed.init_process_group(name)` and `new_group` give groups of ours.

    CPU tensors go to one of our backends; tensors of a device to torch's library for it. So
    `name` alone serves both, and `"cpu:sagellm,cuda:nccl"` is the same. `init_process_group`'s
    timeout is the deadline of every call; what fails raises errors of `sagellm.core.protocols`.
    Call it on every rank with the same arguments. Calling it again with the same arguments does
    nothing.

    Args:
        name: What torch is asked for.
        backend: `shm`, `hier`, `gloo`; or `auto`: shm if all members share a host, hier if some
            do, else gloo. `torch:LIBRARY`, such as `torch:gloo`, is torch's own group, for hooks
            around it.
        options: The backend's own, by name; under `auto`, each group's backend is given those that
            it has. `hosts` holds ranks of the job: groups take what it says of their members.
        record: As for `wrap_process_group`; for every group made by this name, as are the rest.
        before: As for `wrap_process_group`.
        after: As for `wrap_process_group`.
        take_over: As for `wrap_process_group`.

    Raises:
        ConfigError: The name is torch's or another package's, or is registered with other
            arguments.

    """
    key = name.lower()
    if not key.isidentifier():
        raise ConfigError(f"{name!r} cannot name a c10d backend: letters, digits and _ only")
    wanted = _Registration(
        backend, dict(options or {}), CallHooks(record, before, after, take_over)
    )
    known = _registered.get(key)
    if known is not None:
        if known != wanted:
            raise ConfigError(
                f"c10d backend {key!r} is registered as {known}; take another name for {wanted}"
            )
        return
    if key in dist.Backend.backend_list:
        raise ConfigError(f"torch has a backend {key!r} already; take another name")

    def create(opts: TorchObject, backend_options: TorchObject) -> TorchObject:
        del backend_options
        members = tuple(opts.global_ranks_in_group) or tuple(range(opts.group_size))
        plan = GroupPlan(
            store=opts.store,
            rank=opts.group_rank,
            size=opts.group_size,
            global_ranks=members,
            timeout_s=opts.timeout.total_seconds(),
            name=str(opts.group_id),
        )
        group = make_group(plan, key, wanted.backend, wanted.options)
        if wanted.hooks:
            group = WrappingGroup(group, wanted.hooks, library=key, owned=True)
        # Torch names only the groups it makes itself, yet calls those it is given by name.
        group._set_group_name(plan.name)
        return group

    dist.Backend.register_backend(key, create, extended_api=True, devices=["cpu", *device_types()])
    _registered[key] = wanted


def wrap_process_group(
    inner: dist.ProcessGroup,
    *,
    record: Record | None = None,
    before: Before | None = None,
    after: After | None = None,
    take_over: TakeOver | None = None,
    name: str | None = None,
) -> dist.ProcessGroup:
    """A process group over `inner`'s ranks that hands it every call, with hooks around them.

    It stands wherever a group does: `dist.*`, functional collectives, DeviceMesh, DDP. The inner
    group stays usable, and is not released with it. Every rank makes the same call.

    An exception in a hook reaches the caller, and the group is aborted so that no peer waits for
    this rank: after one in `before` or `take_over` the peers' same call fails; after one in
    `after` that call was complete on every rank, though a peer still in it may see the abort,
    and their next one fails.

    Args:
        inner: TorchObject process group; one of ours too.
        record: Its `append` is given a `GroupCall` for every finished call.
        before: Called with a `CommCall` before the call is made.
        after: Called with the `CommCall`, seconds and the error or None, once it has been
            waited for.
        take_over: May return a `Work` that does the call instead: it fills the call's tensors,
            on all ranks alike. None declines.
        name: In torch's registry of groups; None is the inner name with `/wrapped`.

    """
    hooks = CallHooks(record, before, after, take_over)
    group = WrappingGroup(inner, hooks)
    label = name or f"{group_facts(inner)[0]}/wrapped"
    group._set_group_name(label)
    adopt(group, inner, label)
    return group
