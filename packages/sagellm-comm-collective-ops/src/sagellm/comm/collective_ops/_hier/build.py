"""Making the groups of a hierarchy: one per host, one of leaders, one per rail."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sagellm.comm.collective_ops._scheduled import ScheduledTransport
from sagellm.comm.collective_ops.choice import AlgorithmTable
from sagellm.comm.collective_ops.quantized import LossyCollectives
from sagellm.core.protocols import (
    BackendSpec,
    CommBackendProtocol,
    ConfigError,
)
from sagellm.core.protocols.process_group import TensorBackend, TorchTransport, Transport

from .partition import HostMap
from .plans import Plans
from .settings import HierSettings
from .transport import Stages
from .wire import Wire

__all__ = ["MakeIntra", "build_stages"]

MakeIntra = Callable[[HostMap, TorchTransport], CommBackendProtocol]


class PartBackend(TensorBackend):
    """A part of a larger group: fails at once and leaves it to the whole to say who is missing."""

    def _declare_dead(self, text: str, error: Exception) -> Exception:
        with self._state:
            first, self._dead = self._dead is None, self._dead or error
        if first:
            self._transport.abort(text)
        return error

    def _wrap(self, transport: Transport) -> CommBackendProtocol:
        raise ConfigError(f"{self.group_name} is a part of a group over hosts: split the whole")


def build_stages(
    flat: TorchTransport,
    hosts: Sequence[Sequence[int]],
    spec: BackendSpec,
    settings: HierSettings,
    make_intra: MakeIntra | None,
    timeout_s: float,
    *,
    rails: bool,
) -> Stages:
    """The groups of one rank. Collective over the flat group.

    Where one cannot be made, none is left.

    Args:
        flat: All ranks.
        hosts: The ranks of each host.
        spec: Facts about the library that hosts speak with.
        settings: The same on all ranks.
        make_intra: Makes the group of a host's ranks; None takes the flat group's library.
        timeout_s: Deadline of making each, and of calls.
        rails: Whether to make groups for `two_d`, where hosts allow it.

    """
    map = HostMap.of(hosts, flat.rank)
    groups: list[CommBackendProtocol] = []

    def kept(group: CommBackendProtocol) -> CommBackendProtocol:
        groups.append(group)
        return group

    def part(
        ranks: Sequence[int], name: str, table: AlgorithmTable | None = None
    ) -> CommBackendProtocol | None:
        if flat.rank not in ranks or len(ranks) == 1:
            return None
        quiet: Transport | None = flat.split(
            ranks, f"{flat.group_name}/{name}", timeout_s, reports=False
        )
        assert quiet is not None
        if table is not None and table.rules:
            quiet = ScheduledTransport(quiet, (table,))
        return kept(PartBackend(spec, quiet, timeout_s=timeout_s))

    def wire(group: CommBackendProtocol | None) -> Wire | None:
        if group is None:
            return None
        lossy = LossyCollectives(
            group,
            settings.wire,
            allow_lossy=settings.allow_lossy,
            link_bytes_per_s=settings.link_bytes_per_s,
        )
        return Wire(group, lossy)

    def again(part_of: TorchTransport, its_hosts: Sequence[Sequence[int]]) -> Stages:
        return build_stages(part_of, its_hosts, spec, settings, make_intra, timeout_s, rails=rails)

    try:
        intra: CommBackendProtocol | None = None
        if len(map.mine) > 1:
            if make_intra is None:
                intra = part(map.mine, f"host{map.index}")
            else:
                intra = kept(make_intra(map, flat))
                if intra.size != len(map.mine) or intra.rank != map.local:
                    raise ConfigError(
                        f"the group of host {map.index} has rank {intra.rank} of {intra.size}, "
                        f"not {map.local} of {len(map.mine)}: hand in the ranks "
                        f"{list(map.mine)} ascending"
                    )
        leaders = part(map.leaders, "leaders", settings.between)
        wide = rails and map.equal and min(len(map.hosts), len(map.mine)) > 1
        between = leaders
        if wide and not map.leads:
            between = part(map.rail, f"rail{map.local}", settings.between)
        plans = Plans(
            map,
            intra,
            wire(leaders),
            wire(between) if wide else None,
            chunk_bytes=settings.chunk_bytes,
        )
    except BaseException:
        for group in groups:
            group.close()
        raise
    return Stages(map, flat, plans, again, groups)
