"""`create_comm_backend`: a backend by name, or the best one for what is here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from sagellm.core.protocols import (
    BackendUnavailableError,
    CommBackendProtocol,
    CostModelProtocol,
    TopologyManagerProtocol,
)
from sagellm.core.protocols.doctor import require_supported_platform
from sagellm.core.protocols.selection import Selection, backend_registry, select_backend

from ._groups import GroupSource, find_source
from ._shm.hosts import prove_hosts

__all__ = ["create_comm_backend", "explain_selection"]

logger = logging.getLogger(__name__)


def create_comm_backend(
    name: str = "auto",
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
    timeout_s: float = 30.0,
    topology_manager: TopologyManagerProtocol | None = None,
    cost_model: CostModelProtocol | None = None,
    options: Mapping[str, Any] | None = None,  # Any: each option has its own type
) -> CommBackendProtocol:
    """A backend over the given group, the initialised default group, or a new world.

    Without either group the world is the one that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
    describe, as torchrun sets them; without those it is a world of this process alone. Every
    rank of the world makes this call.

    Args:
        name: `shm`, `nccl`, `rccl`, `gloo`, `mock`, a plug-in's name, or `auto`: the setting
            SAGELLM_COMM_BACKEND, else the group's own library, else a device that is present,
            else, on the CPU, `shm` if all ranks prove to share a host, `hier` if some do, and
            `gloo` otherwise.
        group: Process group to stand on.
        device: Where tensors live; None is the backend's current device.
        timeout_s: Deadline of every call that gives none, and of meeting the other ranks.
        topology_manager: Lets NCCL and RCCL choose ring or tree by the links.
        cost_model: Lets backends predict times, and choose by them.
        options: The backend's own, by name.

    Raises:
        ConfigError: Unknown name or option; the message lists what exists and what to install. Or
            Windows.
        BackendUnavailableError: What the backend needs is missing here.
        CollectiveMismatchError: `auto` would choose differently on some ranks.
        CommTimeoutError: Some rank did not come.

    >>> with create_comm_backend("gloo") as backend:
    ...     backend.name, backend.size
    ('gloo', 1)
    """
    require_supported_platform()
    registry = backend_registry()
    name = name.strip().lower()
    if name == "auto":
        spec = explain_selection(group=group, device=device, timeout_s=timeout_s).spec
    else:
        spec = registry.load(name)
        probe = spec.probe()
        if not probe.available:
            raise BackendUnavailableError(
                f"backend {name!r} cannot run here: {probe.reason}; next step: "
                f"{spec.install_hint or 'see its README'}, or use create_comm_backend('auto')"
            )
    return spec.load()(
        spec,
        group,
        device=device,
        timeout_s=timeout_s,
        topology_manager=topology_manager,
        cost_model=cost_model,
        options=options,
    )


def explain_selection(
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
    timeout_s: float = 30.0,
) -> Selection:
    """What `auto` chooses here and why every other candidate was passed over. Collective.

    >>> print(explain_selection(device="cpu").explain().splitlines()[0])
    shm: taken for cpu: ...
    """
    source = find_source(group, timeout_s)
    selection = select_backend(
        None if device is None else torch.device(device).type,
        group=source.group,
        store=source.store,
        rank=source.rank,
        size=source.size if source.store is not None else 1,
        timeout_s=timeout_s,
    )
    selection = _by_hosts(selection, source, timeout_s)
    logger.info("%s (%s)", selection.explain().splitlines()[0], source.reason)
    return selection


def _by_hosts(selection: Selection, source: GroupSource, timeout_s: float) -> Selection:
    """The selection, or another one where shm was chosen and not all ranks share a host."""
    if selection.spec.name != "shm":
        _tell_without_shm(selection)
        return selection
    if source.store is None or source.size == 1 or selection.reason.startswith("asked for"):
        return selection
    hosts = prove_hosts(source.store, source.rank, source.size, timeout_s, label=source.name)
    if len(hosts.partition) == 1:
        reason = f"all {source.size} ranks proved to share a host; {selection.reason}"
        return replace(selection, reason=reason)
    registry = backend_registry()
    some = len(hosts.partition) < source.size and "hier" in registry.names()
    chosen = registry.load("hier" if some else "gloo")
    rejected = {k: v for k, v in selection.rejected.items() if k != chosen.name}
    rejected["shm"] = f"needs all ranks on one host ({hosts.explain()})"
    which = "some ranks share a host" if some else "no hosts to use shared memory in were proven"
    return replace(
        selection, spec=chosen, reason=f"{which}: {hosts.explain()}", rejected=rejected
    )


_told = False


def _tell_without_shm(selection: Selection) -> None:
    """Say once that a CPU goes without its fastest backend."""
    global _told
    if selection.spec.name == "gloo" and "shm" in selection.rejected and not _told:
        why = selection.rejected["shm"]
        if not why.startswith("the process group runs"):
            _told = True
            logger.warning("gloo serves the CPU ranks of this host: shm was not taken: %s", why)
