"""Where the ranks of a group are, and in which order they speak between hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sagellm.core.protocols import ConfigError

if TYPE_CHECKING:
    from sagellm.core.protocols.process_group import Transport

__all__ = ["HostMap", "options_of_part"]


@dataclass(frozen=True, slots=True)
class HostMap:
    """The hosts of a group as one rank sees them. Ranks are the group's.

    Attributes:
        hosts: The ranks of each host, ascending; hosts by their lowest rank.
        rank: This rank.

    >>> map = HostMap.of([[0, 2], [1, 3]], 3)
    >>> map.index, map.local, map.leaders, map.order, map.in_order
    (1, 1, (0, 1), (0, 2, 1, 3), False)
    """

    hosts: tuple[tuple[int, ...], ...]
    rank: int

    @classmethod
    def of(cls, hosts: Sequence[Sequence[int]], rank: int) -> HostMap:
        """Check and sort a partition.

        Raises:
            ConfigError: A rank is missing, is there twice, or a host has none.

        """
        ordered = sorted(tuple(sorted(host)) for host in hosts)
        flat = sorted(r for host in ordered for r in host)
        if flat != list(range(len(flat))) or not all(ordered) or rank not in flat:
            raise ConfigError(
                f"hosts {[list(h) for h in hosts]} are no partition of ranks 0..{len(flat) - 1} "
                f"with rank {rank} among them"
            )
        return cls(tuple(ordered), rank)

    def restricted(self, ranks: Sequence[int]) -> list[list[int]]:
        """The partition of a sub-group whose rank i is `ranks[i]` here."""
        parts = [[i for i, r in enumerate(ranks) if r in host] for host in self.hosts]
        return [part for part in parts if part]

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return sum(len(host) for host in self.hosts)

    @property
    def index(self) -> int:
        """Which host this rank is on."""
        return self.host_of(self.rank)[0]

    @property
    def local(self) -> int:
        """This rank's place on its host; the leader's is 0."""
        return self.host_of(self.rank)[1]

    @property
    def mine(self) -> tuple[int, ...]:
        """The ranks on this host."""
        return self.hosts[self.index]

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its host."""
        return self.local == 0

    @property
    def leaders(self) -> tuple[int, ...]:
        """The lowest rank of each host."""
        return tuple(host[0] for host in self.hosts)

    @property
    def equal(self) -> bool:
        """Whether all hosts have as many ranks."""
        return len({len(host) for host in self.hosts}) == 1

    @property
    def rail(self) -> tuple[int, ...]:
        """The ranks with this rank's place on every host; where hosts are `equal`."""
        return tuple(host[self.local] for host in self.hosts)

    @property
    def order(self) -> tuple[int, ...]:
        """All ranks, host by host."""
        return tuple(rank for host in self.hosts for rank in host)

    @property
    def in_order(self) -> bool:
        """Whether ranks that are numbered one after another lie so on hosts."""
        return self.order == tuple(range(self.size))

    def host_of(self, rank: int) -> tuple[int, int]:
        """A rank's host, and its place there."""
        for index, host in enumerate(self.hosts):
            if rank in host:
                return index, host.index(rank)
        raise ConfigError(f"rank {rank} is not in 0..{self.size - 1}")

    def explain(self) -> str:
        """One sentence for a person."""
        return "; ".join(f"host {i}: ranks {list(host)}" for i, host in enumerate(self.hosts))


def options_of_part(
    options: Mapping[str, Any],  # Any: each option has its own type
    global_ranks: Sequence[int],
    part: Transport,
) -> Mapping[str, Any]:
    """A group's options for a part of it, whose ranks are numbered anew in `hosts`."""
    if options.get("hosts") is None:
        return options
    members = [global_ranks.index(rank) for rank in part.global_ranks]
    map = HostMap.of(options["hosts"], members[part.rank])
    return {**options, "hosts": map.restricted(members)}
