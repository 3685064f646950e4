"""Making the groups of a hierarchy: one per host, one of leaders, one per rail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sagellm.comm.collective_ops.quantized import LossyCollectives, check_wire
from sagellm.core.protocols import (
    BackendSpec,
    CommBackendProtocol,
    ConfigError,
)
from sagellm.core.protocols.process_group import TensorBackend, TorchTransport, Transport

from .partition import HostMap
from .plans import Plans
from .transport import Stages
from .wire import Wire

__all__ = ["ALGORITHMS", "Settings", "build_stages"]

ALGORITHMS = ("auto", "leaders", "two_d")
_CHUNK_BYTES = 1 << 20
"""Over 1 Gbit/s, pieces of 1 MiB were 2 to 8 % faster than 4 MiB (2 x 2 ranks, 4-16 MiB)."""

MakeIntra = Callable[[HostMap, TorchTransport], CommBackendProtocol]


@dataclass(frozen=True, slots=True)
class Settings:
    """What all ranks agree on.

    Attributes:
        algorithm: `leaders`, `two_d`, or `auto`, which is `leaders`: one speaker filled a link of
            1 Gbit/s as well as two, and took 2/3 of the time for 4 KiB.
        wire: Format between hosts.
        allow_lossy: Whether it may round.
        link_bytes_per_s: Of a host's link, for `wire="auto"`; None measures.
        chunk_bytes: Size of a piece of a large tensor.

    """

    algorithm: str = "auto"
    wire: str = "none"
    allow_lossy: bool = False
    link_bytes_per_s: float | None = None
    chunk_bytes: int = _CHUNK_BYTES

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:  # Any: each option has its own type
        """Check options by name."""
        found = cls(**options)
        if found.algorithm not in ALGORITHMS:
            raise ConfigError(
                f"algorithm {found.algorithm!r} is not one of {', '.join(ALGORITHMS)}"
            )
        if not isinstance(found.chunk_bytes, int) or found.chunk_bytes < 1:
            raise ConfigError(f"chunk_bytes must be an integer above 0, got {found.chunk_bytes!r}")
        check_wire(found.wire, found.allow_lossy, found.link_bytes_per_s)
        return found

    @property
    def two_d_bytes(self) -> int:
        """Smallest all_reduce that uses every rail."""
        return 0 if self.algorithm == "two_d" else 1 << 62


class PartBackend(TensorBackend):
    """A part of a larger group: fails at once and leaves it to the whole to say who is missing."""

    def _declare_dead(self, text: str, error: Exception) -> Exception:
        with self._state:
            first, self._dead = self._dead is None, self._dead or error
        if first:
            self._transport.abort(text)
        return error

    def _wrap(self, transport: Transport) -> CommBackendProtocol:
        raise NotImplementedError  # parts are never split


def build_stages(
    flat: TorchTransport,
    hosts: Sequence[Sequence[int]],
    spec: BackendSpec,
    settings: Settings,
    make_intra: MakeIntra | None,
    timeout_s: float,
) -> Stages:
    """The groups of one rank. Collective over the flat group.

    Args:
        flat: All ranks.
        hosts: The ranks of each host.
        spec: Facts about the library that hosts speak with.
        settings: The same on all ranks.
        make_intra: Makes the group of a host's ranks; None takes the flat group's library.
        timeout_s: Deadline of making each, and of calls.

    """
    map = HostMap.of(hosts, flat.rank)

    def part(ranks: Sequence[int], name: str) -> CommBackendProtocol | None:
        if flat.rank not in ranks or len(ranks) == 1:
            return None
        quiet = flat.split(ranks, f"{flat.group_name}/{name}", timeout_s, reports=False)
        assert quiet is not None
        return PartBackend(spec, quiet, timeout_s=timeout_s)

    intra: CommBackendProtocol | None = None
    if len(map.mine) > 1:
        if make_intra is None:
            intra = part(map.mine, f"host{map.index}")
        else:
            intra = make_intra(map, flat)
            if intra.size != len(map.mine) or intra.rank != map.local:
                raise ConfigError(
                    f"the group of host {map.index} has rank {intra.rank} of {intra.size}, not "
                    f"{map.local} of {len(map.mine)}: hand in the ranks {list(map.mine)} ascending"
                )
    leaders = part(map.leaders, "leaders")
    wide = map.equal and min(len(map.hosts), len(map.mine)) > 1
    wide = wide and settings.algorithm == "two_d"
    between = leaders
    if wide and not map.leads:
        between = part(map.rail, f"rail{map.local}")

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

    plans = Plans(
        map,
        intra,
        wire(leaders),
        wire(between) if wide else None,
        chunk_bytes=settings.chunk_bytes,
        two_d_bytes=settings.two_d_bytes,
    )
    groups = [g for g in (intra, leaders) if g is not None]
    if between is not None and between is not leaders:
        groups.append(between)

    def again(part_of: TorchTransport, its_hosts: Sequence[Sequence[int]]) -> Stages:
        return build_stages(part_of, its_hosts, spec, settings, make_intra, timeout_s)

    return Stages(map, flat, plans, again, groups)
