"""Collectives over several hosts: shared memory inside each, gloo between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
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
)
from sagellm.core.protocols.observe import check_options, observe_settings
from sagellm.core.protocols.process_group import TorchTransport, Transport, table_by_broadcast

from ._chosen import Chooser
from ._groups import GroupSource, group_for
from ._hier.build import MakeIntra, build_stages
from ._hier.partition import HostMap
from ._hier.plans import PLANNED
from ._hier.settings import CANDIDATES, FLAT, LEADERS, TWO_D, HierSettings
from ._hier.transport import HierTransport
from ._own import OwnBackend
from ._schedule_plans import PLANS
from ._scheduled import agree_on_options
from ._shm.hosts import prove_hosts
from ._specs import GLOO, HIER, SHM
from .choice import PRIMITIVES, explain_choice
from .settings import wants_calibration

__all__ = ["HierBackend"]

logger = logging.getLogger(__name__)

_BETWEEN = {"all_gather": "broadcast", "reduce_scatter": "all_to_all"}
"""What leaders call between hosts, where it is another operation."""


class HierBackend(OwnBackend[HierSettings]):
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

    What runs a call is, in this order: what `algorithms` says, or `algorithm`; what a cost model
    or a calibration finds faster by a tenth; `leaders`. `flat` is gloo among all ranks, and the
    name of a schedule runs that over all ranks, rings host by host.

    Args:
        spec: Facts about the backend; None is this package's.
        process_group: Whose ranks to serve; a gloo group over them is made where it is none.
        device: None is the CPU.
        timeout_s: Deadline of every step of a call, and of meeting the other ranks.
        topology_manager: Not used.
        cost_model: Chooses between `leaders`, `two_d` and `flat`, where it has observed them.
        options: The same on all ranks. `hosts`: partition of the ranks, in place of the proof.
            `intra`: `auto` (shm where it runs, else gloo), `shm`, `gloo`, or a function
            `(HostMap, TorchTransport) -> CommBackend` that makes the group of the host's ranks,
            ascending. `algorithm`: `leaders`, `two_d`, `flat` or `auto`. `algorithms`: overrides
            such as `all_reduce:0-64k:flat`, see `parse_algorithms`. `between`: the schedule of the
            stage between hosts, as a name or as overrides. `calibrate`: measure which is faster.
            `wire`, `allow_lossy` and `link_bytes_per_s`: as of `LossyCollectives`, for all_reduce
            between hosts. `chunk_bytes`: pieces of a large all_reduce. And each rank's own
            `statistics`, `flight_entries`, `flight_folder`.

    >>> HierBackend().size
    1
    """

    default_spec = HIER
    _world_is_ours = False

    @classmethod
    def _read(cls, spec: BackendSpec, options: Mapping[str, Any]) -> HierSettings:
        check_options(spec.name, options, spec.options)
        return HierSettings.of(options, calibrate=wants_calibration(options))

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
        given = dict(options or {})
        try:
            backend._settings = cls._read(HIER, given)
            observe = observe_settings(given)
        except BaseException:
            flat.close()
            raise
        transport: Transport = flat
        if flat.size > 1:
            transport, _ = backend._form_on(flat, given, timeout_s, None)
        backend._begin(HIER, transport, timeout_s, None, None, None, observe)
        return backend

    def _form(
        self,
        source: GroupSource,
        options: Mapping[str, Any],  # Any: each option has its own type
        timeout_s: float,
        cost_model: CostModelProtocol | None,
    ) -> tuple[Transport, CostTable | None]:
        cpu = torch.device("cpu")
        group, owned = group_for(GLOO, source, cpu, timeout_s)
        flat = TorchTransport(group, cpu, timeout_s, owned=owned)
        return self._form_on(flat, options, timeout_s, cost_model)

    def _form_on(
        self,
        flat: TorchTransport,
        options: Mapping[str, Any],  # Any: each option has its own type
        timeout_s: float,
        cost_model: CostModelProtocol | None,
    ) -> tuple[Transport, CostTable | None]:
        try:
            make = _intra_maker(options.get("intra", "auto"), timeout_s)
            hosts = options.get("hosts")
            said = [f"hosts {HostMap.of(hosts, flat.rank).hosts}"] if hosts is not None else []
            asked = "; ".join(filter(None, [*said, self._settings.text()]))
            name = f"{flat.group_name}/hier"
            agree_on_options(flat.store, name, flat.rank, flat.size, asked, timeout_s, always=True)
            if hosts is None:
                proven = prove_hosts(flat.store, flat.rank, flat.size, timeout_s, label=name)
                hosts = proven.partition
                logger.info("group %s: %s", flat.group_name, proven.explain())
            table = None
            if cost_model is not None:
                table = table_by_broadcast(flat, cost_model.freeze(), timeout_s)
            # Groups for two_d cost memory and connections: made where it may be chosen.
            rails = self._settings.may_use(TWO_D)
            if table is not None and self._settings.algorithm == "auto":
                rails = rails or any(name == TWO_D for _, name, _ in table.curves)
            stages = build_stages(flat, hosts, GLOO, self._settings, make, timeout_s, rails=rails)
        except BaseException:
            flat.close()
            raise
        return HierTransport(stages), table

    @classmethod
    def join(cls, rank: int, size: int, meet: str, *, timeout_s: float = 30.0) -> Self:
        """A rank of a group that meets at a file, on two pretended hosts; for the kit."""
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meet}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=max(timeout_s, 30.0)),
        )
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

    def _stand_on(self, transport: Transport) -> None:
        self._hier = transport if isinstance(transport, HierTransport) else None

    def _settle(self) -> None:
        hier, settings = self._hier, self._settings
        if hier is None:
            return
        runnable = {op: self._names(op)[1:] for op in CANDIDATES}
        self._chooser = Chooser(settings.tables, runnable, LEADERS, hier.use)
        self._chooser.settle(
            self,
            self._transport,
            self._cost_table,
            calibrate=settings.calibrate and settings.algorithm == "auto",
            facts=[
                str(hier.stages.map.hosts),
                settings.text(),
                *(f"{g.name} of {g.size}" for g in hier.stages.groups),
            ],
        )

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

    def _names(self, op: str) -> tuple[str, ...]:
        """What can run an operation of all ranks but for schedules, `leaders` first."""
        assert self._hier is not None
        rails = self._hier.stages.plans.has_rails
        return (LEADERS, *(n for n in CANDIDATES.get(op, ()) if rails or n != TWO_D))

    def explain(self, op: str, nbytes: int) -> Choice:
        choice = super().explain(op, nbytes)
        if self._hier is None or self._chooser is None or choice.algorithm in self._rules:
            return choice
        raw = PRIMITIVES.get(op, op)
        names: tuple[str, ...] = ()
        base = Choice(
            self.name, FLAT, f"{op} gains nothing by hosts and goes over gloo among all ranks"
        )
        if raw in PLANNED:
            base = Choice(self.name, LEADERS, "no other is asked for, or expected to win")
            names = self._names(raw)
        names = (*names, *PLANS.get(raw, ()))
        tables, costs = self._chooser.tables, self._chooser.costs
        choice = explain_choice(tables, base, op, nbytes, self._size, names, costs)
        rejected = dict(choice.rejected)
        if raw == "all_reduce" and TWO_D not in names:
            rejected[TWO_D] = (
                "needs several hosts with several ranks each, equally many, and is made ready only "
                "where it is asked for, modelled or measured"
            )
            if choice.algorithm == TWO_D:
                rejected.pop(LEADERS)
                choice = replace(choice, algorithm=LEADERS)
        reason = "; ".join([choice.reason, *self._details(raw, choice.algorithm)])
        return replace(choice, reason=reason, rejected=rejected)

    def _details(self, raw: str, algorithm: str) -> Iterator[str]:
        """What else there is to say of how a call runs."""
        assert self._hier is not None
        yield self._hier.stages.map.explain()
        if raw not in PLANNED or algorithm not in (LEADERS, TWO_D):
            return
        settings = self._settings
        stage = _BETWEEN.get(raw, raw)
        rules = [str(rule) for rule in settings.between.rules if rule.op == stage]
        yield f"between hosts {', '.join(rules) or 'the library chooses'}"
        if raw == "all_reduce":
            chosen = settings.wire == "auto" and settings.allow_lossy
            by = " (rounding is allowed; hosts choose by the link)" if chosen else ""
            yield f"wire {settings.wire!r}{by}"


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
