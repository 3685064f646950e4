"""Collectives over several hosts: shared memory inside each, gloo between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist

from sagellm.core.protocols import (
    BackendSpec,
    Choice,
    CommBackendProtocol,
    ConfigError,
    CostModelProtocol,
    CostTable,
    TopologyManagerProtocol,
)
from sagellm.core.protocols.process_group import (
    SoloTransport,
    TensorBackend,
    TorchTransport,
    Transport,
)

from ._groups import find_source, group_for
from ._hier.build import MakeIntra, Settings, build_stages
from ._hier.partition import HostMap
from ._hier.plans import PLANNED
from ._hier.transport import HierTransport
from ._shm.hosts import prove_hosts
from ._specs import GLOO, HIER, SHM

__all__ = ["HierBackend"]

logger = logging.getLogger(__name__)

_RAW = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}


class HierBackend(TensorBackend):
    """Ranks on several hosts, for CPU tensors.

    Ranks of a host add up in shared memory, and one of them speaks for the host over gloo; with
    algorithm `two_d` every rank does, for its part of the tensor, which suits hosts that are alike
    and a link that one connection cannot fill. How ranks are numbered does not matter, nor
    whether hosts have as many each. Who shares a host is proven, not believed.

    all_reduce, all_gather, reduce_scatter, broadcast, reduce and barrier go by hosts. all_to_all,
    gather, scatter, send, recv and KV blocks go over one gloo group of all ranks (lowered to it:
    nothing in them repeats between hosts).

    Results are equal on all ranks, bit for bit, and from run to run. 16-bit floats are rounded
    after the sum of a host and after the sum of hosts. A lost rank makes every call fail on all
    ranks, on all hosts.

    Args:
        spec: Facts about the backend; None is this package's.
        process_group: Whose ranks to serve; a gloo group over them is made where it is none.
        device: None is the CPU.
        timeout_s: Deadline of every step of a call, and of meeting the other ranks.
        topology_manager: Not used.
        cost_model: Lets `explain` give a time.
        options: The same on all ranks. `hosts`: partition of the ranks, in place of the proof.
            `intra`: `auto` (shm where it runs, else gloo), `shm`, `gloo`, or a function
            `(HostMap, TorchTransport) -> CommBackend` that makes the group of the host's ranks,
            ascending. `algorithm`: `leaders`, `two_d` or `auto`. `wire`, `allow_lossy` and
            `link_bytes_per_s`: as of `LossyCollectives`, for all_reduce between hosts.
            `chunk_bytes`: pieces of a large all_reduce.

    >>> HierBackend().size
    1
    """

    _world_is_ours = False

    def __init__(
        self,
        spec: BackendSpec | None = None,
        process_group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        timeout_s: float = 30.0,
        topology_manager: TopologyManagerProtocol | None = None,
        cost_model: CostModelProtocol | None = None,
        options: Mapping[str, Any] | None = None,  # Any: each option has its own type
    ) -> None:
        facts = HIER if spec is None else spec
        where = torch.device("cpu" if device is None else device)
        if where.type != "cpu":
            raise ConfigError(f"{facts.name} serves cpu, not {device}")
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s must be above 0, got {timeout_s}")
        given = self._take(facts, options)
        source = find_source(process_group, timeout_s)
        transport: Transport = SoloTransport(where)
        if source.size > 1:
            group, owned = group_for(GLOO, source, where, timeout_s)
            flat = TorchTransport(group, where, timeout_s, owned=owned)
            transport = self._form(flat, *given, timeout_s)
        self._start(facts, transport, timeout_s, topology_manager, cost_model, None)

    @classmethod
    def over_transport(
        cls,
        flat: TorchTransport,
        *,
        timeout_s: float = 30.0,
        options: Mapping[str, Any] | None = None,  # Any: each option has its own type
    ) -> Self:
        """A group over the ranks of a gloo transport, which it owns; every rank makes this call.

        Torch's default group need not be there yet, if the transport can be split without.

        Args:
            flat: All ranks.
            timeout_s: As of the constructor.
            options: As of the constructor.

        """
        backend = cls.__new__(cls)
        given = backend._take(HIER, options)
        transport = backend._form(flat, *given, timeout_s) if flat.size > 1 else flat
        backend._start(HIER, transport, timeout_s, None, None, None)
        return backend

    def _take(
        self, facts: BackendSpec, options: Mapping[str, Any] | None
    ) -> tuple[Sequence[Sequence[int]] | None, str | MakeIntra]:
        """Check the options; `hosts` and `intra` of them."""
        given = dict(options or {})
        unknown = sorted(set(given) - set(facts.options))
        if unknown:
            known = ", ".join(sorted(facts.options))
            raise ConfigError(f"{facts.name} has no option {', '.join(unknown)}; known: {known}")
        hosts, intra = given.pop("hosts", None), given.pop("intra", "auto")
        self._settings = Settings.of(given)
        return hosts, intra

    def _form(
        self,
        flat: TorchTransport,
        hosts: Sequence[Sequence[int]] | None,
        intra: str | MakeIntra,
        timeout_s: float,
    ) -> HierTransport:
        if hosts is None:
            proven = prove_hosts(
                flat.store, flat.rank, flat.size, timeout_s, label=f"{flat.group_name}/hier"
            )
            hosts = proven.partition
            logger.info("group %s: %s", flat.group_name, proven.explain())
        make = _intra_maker(intra, timeout_s)
        stages = build_stages(flat, hosts, GLOO, self._settings, make, timeout_s)
        return HierTransport(stages)

    @classmethod
    def join(cls, rank: int, size: int, meet: str, *, timeout_s: float = 30.0) -> Self:
        """A rank of a group that meets at a file, on two pretended hosts; for the kit."""
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
        half = (size + 1) // 2
        hosts = [list(range(half)), list(range(half, size))]
        backend = cls(timeout_s=timeout_s, options={"hosts": [h for h in hosts if h]})
        backend._world_is_ours = True
        return backend

    def close(self) -> None:
        super().close()
        if self._world_is_ours:
            self._world_is_ours = False
            dist.destroy_process_group()

    def _start(
        self,
        spec: BackendSpec,
        transport: Transport,
        timeout_s: float,
        topology_manager: TopologyManagerProtocol | None,
        cost_model: CostModelProtocol | None,
        cost_table: CostTable | None,
    ) -> None:
        self._hier = transport if isinstance(transport, HierTransport) else None
        super().__init__(
            spec,
            transport,
            timeout_s=timeout_s,
            topology_manager=topology_manager,
            cost_model=cost_model,
            cost_table=cost_table,
        )

    def _wrap(self, transport: Transport) -> CommBackendProtocol:
        backend = type(self).__new__(type(self))
        backend._settings = self._settings
        backend._start(
            self.spec,
            transport,
            self.timeout_s,
            self.topology_manager,
            self.cost_model,
            self._cost_table,
        )
        return backend

    @property
    def hosts(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each host, ascending; hosts by their lowest rank."""
        return ((0,),) if self._hier is None else self._hier.stages.map.hosts

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        group: dist.ProcessGroup | None = (
            None if self._hier is None else self._hier.stages.flat.group
        )
        return group

    def explain(self, op: str, nbytes: int) -> Choice:
        choice = super().explain(op, nbytes)
        if self._hier is None:
            return choice
        raw = _RAW.get(op, op)
        if raw not in PLANNED:
            reason = f"{op} gains nothing by hosts and goes over gloo among all {self._size} ranks"
            return Choice(self.name, "flat", reason, choice.estimate_us)
        map, settings = self._hier.stages.map, self._settings
        algorithm = "leaders"
        if raw == "all_reduce":
            algorithm = self._hier.stages.plans.variant(nbytes)
        reason = f"{map.explain()}; asked for algorithm {settings.algorithm!r}"
        if raw == "all_reduce":
            reason += f", wire {settings.wire!r}" + (
                " (rounding is allowed; hosts choose by the link)"
                if settings.wire == "auto" and settings.allow_lossy
                else ""
            )
        return Choice(self.name, algorithm, reason, choice.estimate_us)


def _intra_maker(intra: str | MakeIntra, timeout_s: float) -> MakeIntra | None:
    """What makes a host's group; None for one of the flat group's library."""
    if not isinstance(intra, str):
        return intra
    if intra not in ("auto", "shm", "gloo"):
        raise ConfigError(f"intra {intra!r} is not one of auto, shm, gloo, or a function")
    probe = SHM.probe()
    if intra == "shm" and not probe.available:
        raise ConfigError(f"intra 'shm' cannot run here: {probe.reason}")
    if intra == "gloo" or not probe.available:
        return None
    return _shm_maker(timeout_s)


def _shm_maker(timeout_s: float) -> Callable[[HostMap, TorchTransport], CommBackendProtocol]:
    from .shm_backend import ShmBackend

    def make(map: HostMap, flat: TorchTransport) -> CommBackendProtocol:
        members = [flat.global_ranks[r] for r in map.mine]
        # Named after its members: other backends of the same ranks may see other hosts.
        name = f"{flat.group_name}/host/{','.join(str(r) for r in members)}"
        return ShmBackend.over_store(
            flat.store,
            map.local,
            len(map.mine),
            name=name,
            global_ranks=members,
            timeout_s=timeout_s,
        )

    return make
