"""Which group serves a plan: the choice among our backends on the CPU, and devices beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sagellm.comm.collective_ops._hier.partition import HostMap
from sagellm.comm.collective_ops._shm.engines import agree_engine, available_engines
from sagellm.comm.collective_ops._shm.exchange import Exchange
from sagellm.comm.collective_ops._shm.hosts import Hosts, prove_hosts
from sagellm.comm.collective_ops._specs import GLOO, HIER, SHM
from sagellm.comm.collective_ops.gloo_backend import GlooBackend
from sagellm.comm.collective_ops.hier_backend import HierBackend
from sagellm.comm.collective_ops.shm_backend import ShmBackend
from sagellm.core.protocols import BackendUnavailableError, CommBackendProtocol, ConfigError
from sagellm.core.protocols.process_group import TorchObject

from .cpu import CpuGroup
from .devices import DeviceGroup
from .libraries import GroupPlan, device_types, forget_group, library_group
from .private import PrivateTransport

__all__ = ["make_group"]

logger = logging.getLogger(__name__)

_TORCH = "torch:"
_SPECS = {spec.name: spec for spec in (SHM, HIER, GLOO)}
_PROOF_S = 300.0

Release = Callable[[], None]
Partition = Sequence[Sequence[int]]


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
        options: As in `register_c10d_backend`.

    Raises:
        ConfigError: No such backend.

    """
    kinds = tuple(device_types())
    if backend.startswith(_TORCH):
        name = backend.removeprefix(_TORCH)
        return library_group(name, "cpu" if name == "gloo" or not kinds else kinds[0], plan)
    given = dict(options)
    name, why = backend, "asked for"
    hosts = _hosts_of(plan, given.pop("hosts", None))
    if name == "auto":
        unknown = given.keys() - {o for spec in _SPECS.values() for o in spec.options}
        if unknown:
            raise ConfigError(f"no backend of auto has option {', '.join(sorted(unknown))}")
        name, why, hosts = _choose(plan, hosts)
        given = {k: v for k, v in given.items() if k in _SPECS[name].options}
    elif name not in _MAKERS:
        raise ConfigError(
            f"backend {name!r} is not one of auto, {', '.join(_MAKERS)}, {_TORCH}LIBRARY"
        )
    if name == "hier" and hosts is not None:
        given["hosts"] = hosts
    log = logger.info if plan.rank == 0 else logger.debug
    log("c10d group %s of %d ranks runs on %s: %s", plan.name, plan.size, name, why)
    chosen, release = _MAKERS[name](plan, given)
    if kinds:  # pragma: device-only
        return DeviceGroup(chosen, library, plan, kinds, release, why)
    return CpuGroup(chosen, library, plan.store, release, why)


def _hosts_of(plan: GroupPlan, hosts: Partition | None) -> Partition | None:
    """The members of a group by the hosts that options give for the whole job."""
    if hosts is None:
        return None
    members = plan.global_ranks
    return HostMap.of(hosts, members[plan.rank]).restricted(members)


def _choose(plan: GroupPlan, hosts: Partition | None) -> tuple[str, str, Partition | None]:
    """The best backend for where the ranks are, why, and where they are."""
    if plan.size == 1:
        return "gloo", "one rank", hosts
    limit_s = min(plan.timeout_s, _PROOF_S)
    if hosts is None:
        found = prove_hosts(plan.store, plan.rank, plan.size, limit_s, label=plan.name)
    else:
        found = Hosts(tuple(tuple(host) for host in hosts))
    partition, where = found.partition, found.explain()
    lacking = "; ".join(f"rank {r}: {why}" for r, why in sorted(found.reasons.items()))
    engines = ""
    if len(partition) < plan.size:
        try:
            engines = _engines(plan, partition, limit_s)
        except BackendUnavailableError as e:
            lacking = str(e)
    if lacking:
        _warn_once(plan, lacking)
    if not engines:
        return "gloo", lacking or where, partition
    if len(partition) == 1:
        return "shm", f"all ranks share a host, engine {engines}", partition
    return "hier", f"{where}; engine {engines}", partition


def _engines(plan: GroupPlan, partition: Partition, timeout_s: float) -> str:
    """The engines of the hosts. An engine that some rank of a host lacks is lacking there.

    Raises:
        BackendUnavailableError: The ranks of some host share none.

    """
    exchange = Exchange(plan.store, plan.rank, plan.size, "engines", timeout_s)
    try:
        offers = exchange.all("engines", available_engines())
    finally:
        exchange.leave()
    shared = [h for h in partition if len(h) > 1]
    return ", ".join(sorted({agree_engine("auto", {r: offers[r] for r in h}) for h in shared}))


_warned: set[str] = set()


def _warn_once(plan: GroupPlan, why: str) -> None:
    """Say, on one rank, which ranks cannot share the memory of their host."""
    if plan.rank == 0 and why not in _warned:
        _warned.add(why)
        logger.warning("group %s does without shared memory: %s", plan.name, why)


def _shm(plan: GroupPlan, options: Mapping[str, Any]) -> tuple[CommBackendProtocol, Release]:
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


def _hier(plan: GroupPlan, options: Mapping[str, Any]) -> tuple[CommBackendProtocol, Release]:
    flat = PrivateTransport(plan)
    backend = HierBackend.over_transport(flat, timeout_s=plan.timeout_s, options=options)
    return backend, backend.close


def _gloo(plan: GroupPlan, options: Mapping[str, Any]) -> tuple[CommBackendProtocol, Release]:
    group = library_group("gloo", "cpu", plan)
    try:
        backend = GlooBackend(process_group=group, timeout_s=plan.timeout_s, options=options)
    except BaseException:
        forget_group(group)
        raise

    def release() -> None:
        backend.close()
        forget_group(group)

    return backend, release


_MAKERS = {"shm": _shm, "hier": _hier, "gloo": _gloo}
