"""Which group serves a plan: the choice among our backends on the CPU, and devices beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from sagellm.comm.collective_ops._shm.engines import agree_engine, available_engines
from sagellm.comm.collective_ops._shm.exchange import Exchange
from sagellm.comm.collective_ops._shm.hosts import prove_hosts
from sagellm.comm.collective_ops.gloo_backend import GlooBackend
from sagellm.comm.collective_ops.shm_backend import ShmBackend
from sagellm.core.protocols import BackendUnavailableError, CommBackendProtocol, ConfigError
from sagellm.core.protocols.process_group import TorchObject

from .cpu import CpuGroup
from .devices import DeviceGroup
from .libraries import GroupPlan, device_types, forget_group, library_group

__all__ = ["make_group"]

logger = logging.getLogger(__name__)

_TORCH = "torch:"
_KNOWN = ("auto", "gloo", "shm")
_PROOF_S = 300.0

Release = Callable[[], None]


def make_group(
    plan: GroupPlan,
    library: str,
    backend: str,
    options: Mapping[str, Any],  # Any: each option has its own type
) -> TorchObject:
    """A process group for a plan; every rank of it makes this call.

    Args:
        plan: What torch wants.
        library: Name that the group has in torch.
        backend: As in `register_c10d_backend`.
        options: The backend's own.

    Raises:
        ConfigError: No such backend.

    """
    kinds = tuple(device_types())
    if backend.startswith(_TORCH):
        name = backend.removeprefix(_TORCH)
        return library_group(name, "cpu" if name == "gloo" or not kinds else kinds[0], plan)
    chosen, release = _cpu_backend(plan, backend, options)
    if kinds:  # pragma: device-only
        return DeviceGroup(chosen, library, plan, kinds, release)
    return CpuGroup(chosen, library, plan.store, release)


def _cpu_backend(
    plan: GroupPlan,
    name: str,
    options: Mapping[str, Any],  # Any: each option has its own type
) -> tuple[CommBackendProtocol, Release]:
    """The backend for CPU tensors, and what ends it. Every rank decides alike."""
    if name not in _KNOWN:
        raise ConfigError(f"backend {name!r} is not one of {', '.join(_KNOWN)}, torch:LIBRARY")
    chosen, why = name, "asked for"
    if name == "auto":
        chosen, why = _choose(plan)
    log = logger.info if plan.rank == 0 else logger.debug
    log("c10d group %s of %d ranks runs on %s: %s", plan.name, plan.size, chosen, why)
    if chosen == "shm":
        backend = ShmBackend.over_store(
            plan.store,
            plan.rank,
            plan.size,
            name=plan.name,
            global_ranks=plan.global_ranks,
            timeout_s=plan.timeout_s,
            options=options,
        )
        return backend, backend.close
    return _gloo(plan, options)


def _choose(plan: GroupPlan) -> tuple[str, str]:
    """The best backend for where the ranks are, and why."""
    if plan.size == 1:
        return "gloo", "one rank"
    hosts = prove_hosts(
        plan.store, plan.rank, plan.size, min(plan.timeout_s, _PROOF_S), label=plan.name
    )
    if len(hosts.partition) > 1:
        return "gloo", hosts.explain()
    # An engine that some rank lacks is lacking for all.
    exchange = Exchange(plan.store, plan.rank, plan.size, "engines", plan.timeout_s)
    try:
        engine = agree_engine("auto", exchange.all("engines", available_engines()))
    except BackendUnavailableError as e:
        return "gloo", str(e)
    finally:
        exchange.leave()
    return "shm", f"all ranks share a host, engine {engine}"


def _gloo(plan: GroupPlan, options: Mapping[str, Any]) -> tuple[CommBackendProtocol, Release]:
    group = library_group("gloo", "cpu", plan)
    backend = GlooBackend(process_group=group, timeout_s=plan.timeout_s, options=options)

    def release() -> None:
        backend.close()
        forget_group(group)

    return backend, release
