"""The process group a domestic backend stands on: given, found, or made.

A group is always made with the explicit map `cpu:gloo,<device>:<library>`: one vendor registers
itself for the letters of its device's name, so torch's default map cannot be relied upon.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

from sagellm.core.protocols import CommError, CommTimeoutError, ConfigError, DistributedRuntimeError

from .options import build_pg_options
from .vendor_spec import VendorSpec

__all__ = ["OpenedGroup", "close_group", "group_map", "open_group", "split_group"]

_Group: TypeAlias = Any
"""A torch ProcessGroup, C++ or Python."""

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, eq=False)
class OpenedGroup:
    """A process group, and what is known of it.

    Attributes:
        group: The torch group, None in a world of one.
        owned: Whether it was made here, and is destroyed with the backend.
        options: Vendor options it was made with here.
        why: How it was come by, one sentence.

    """

    group: _Group
    owned: bool
    options: Mapping[str, object]
    why: str


def group_map(group: _Group) -> dict[str, str]:
    """Which library a group uses for each device type; empty when torch does not know it."""
    import torch.distributed as dist

    try:
        text = dist.get_backend_config(group)
    except (ValueError, RuntimeError, KeyError):
        return {}
    pairs = (part.partition(":") for part in str(text).split(","))
    return {device: library for device, _, library in pairs if library}


def open_group(
    row: VendorSpec,
    *,
    group: _Group = None,
    timeout_s: float = 30.0,
    options: Mapping[str, object] | None = None,
) -> OpenedGroup:
    """The group for a backend of `row`; the vendor's runtime must have been loaded.

    In this order: the given one; torch's default group when it serves the device; a new group
    over all ranks of a default group that does not; the rendezvous of RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT; a world of one. The third and fourth are collective.

    Raises:
        ConfigError: The given group does not serve the device, options are given for a group
            that exists already, or only some of the rendezvous variables are set.
        CommTimeoutError: The other ranks did not come within `timeout_s`.
        DistributedRuntimeError: The library could not make the group.

    """
    import torch.distributed as dist

    wanted = dict(options or {})
    if group is not None:
        _check_serves(row, group, "the given group")
        _refuse_late(wanted, row)
        return OpenedGroup(group, False, {}, "the given group")
    if dist.is_initialized():
        default = dist.group.WORLD
        if group_map(default).get(row.device) == row.c10d_name and not wanted:
            return OpenedGroup(default, False, {}, "torch's default group")
        made = _make(row, wanted, timeout_s, lambda **kw: dist.new_group(**kw))
        return OpenedGroup(made, True, wanted, "a new group over torch's default ranks")
    here = [name for name in _RENDEZVOUS if name in os.environ]
    if here and len(here) < len(_RENDEZVOUS):
        missing = ", ".join(name for name in _RENDEZVOUS if name not in os.environ)
        raise ConfigError(f"{', '.join(here)} set but not {missing}; start with torchrun")
    if here:
        _make(row, wanted, timeout_s, lambda **kw: dist.init_process_group(**kw))
        return OpenedGroup(dist.group.WORLD, True, wanted, "RANK, WORLD_SIZE and MASTER_ADDR")
    return OpenedGroup(None, False, wanted, "a world of one: no group, no RANK")


def split_group(
    row: VendorSpec,
    global_ranks: Sequence[int],
    name: str,
    timeout_s: float,
    options: Mapping[str, object],
) -> OpenedGroup:
    """A new group over some of the job's ranks, with the vendor's options of its own.

    Called by the members alone; `global_ranks` rise.
    """
    import torch.distributed as dist

    made = _make(
        row,
        options,
        timeout_s,
        lambda **kw: dist.new_group(
            list(global_ranks), use_local_synchronization=True, group_desc=name, **kw
        ),
    )
    return OpenedGroup(made, True, dict(options), f"split as {name!r}")


def close_group(opened: OpenedGroup) -> None:
    """Destroy a group that was made here; one that was given stays."""
    import torch.distributed as dist

    if opened.owned and opened.group is not None and dist.is_initialized():
        dist.destroy_process_group(opened.group)


def _make(row: VendorSpec, options: Mapping[str, object], timeout_s: float, call: _Group) -> _Group:
    delivered = build_pg_options(row, options)
    arguments = {"backend": row.backend_map, "timeout": timedelta(seconds=timeout_s)}
    if delivered is not None:
        arguments["pg_options"] = delivered
    try:
        return call(**arguments)
    except CommError:
        raise
    except Exception as e:  # torch and vendors report a failed rendezvous in several classes
        env = ", ".join(f"{k}={os.environ[k]}" for k in row.env if k in os.environ) or "none"
        text = (
            f"no {row.backend_map} group within {timeout_s} s: {type(e).__name__}: {e}; "
            f"variables of {row.library} that are set: {env}"
        )
        said = str(e).lower()
        late = any(mark in said for mark in ("timed out", "wait timeout", "timeout after"))
        raise (CommTimeoutError if late else DistributedRuntimeError)(text) from e


def _check_serves(row: VendorSpec, group: _Group, what: str) -> None:
    served = group_map(group)
    if served and served.get(row.device) != row.c10d_name:
        has = ",".join(f"{d}:{b}" for d, b in served.items())
        raise ConfigError(
            f"{what} is {has} and has no {row.device}:{row.c10d_name}; "
            f"make it with backend={row.backend_map!r}"
        )


def _refuse_late(options: Mapping[str, object], row: VendorSpec) -> None:
    if options:
        raise ConfigError(
            f"options {', '.join(options)} reach {row.library} only when a group is made, and "
            f"this one exists; leave group out, or make it with pg_options"
        )
