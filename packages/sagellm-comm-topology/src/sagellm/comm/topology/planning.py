"""Which algorithm a cluster should use, and how it scales, simulated: nobody has it here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sagellm.core.protocols import ConfigError, ResourceError, TopologyInfo
from sagellm.core.protocols.bandwidth import busbw_factor

from ._sim_schedules import SCHEDULES, schedule
from .graph import TopologyGraph
from .simulator import Network, SimSettings, simulate

__all__ = ["Plan", "PlanRow", "node_counts", "plan"]

_MOST_MESSAGES = 20_000


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One algorithm on one number of hosts.

    Attributes:
        nodes: Hosts.
        ranks: Accelerators that take part.
        algorithm: Algorithm.
        time_us: Simulated time; None where it was left out.
        busbw_bytes_per_s: Bus bandwidth as nccl-tests define it, or None.
        left_out: Why it was not simulated; empty if it was.

    """

    nodes: int
    ranks: int
    algorithm: str
    time_us: float | None
    busbw_bytes_per_s: float | None
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was simulated.

    Attributes:
        op: Operation.
        nbytes: Payload as nccl-tests count it.
        rows: By rising number of hosts, then algorithm.
        assumed: Kinds of links whose bandwidth nobody stated (settings filled them in), and what
            `plan --from` had to add to the host.

    """

    op: str
    nbytes: int
    rows: tuple[PlanRow, ...]
    assumed: tuple[str, ...]

    def best(self, nodes: int) -> PlanRow | None:
        """The fastest algorithm of those simulated on so many hosts; None when none was.

        Algorithms in `left_out(nodes)` may be faster.
        """
        rows = [r for r in self.rows if r.nodes == nodes and r.time_us is not None]
        return min(rows, key=lambda r: (r.time_us or 0.0, r.algorithm), default=None)

    def left_out(self, nodes: int | None = None) -> tuple[PlanRow, ...]:
        """Algorithms that were not simulated on so many hosts, or on any number; each says why."""
        return tuple(r for r in self.rows if r.left_out and nodes in (None, r.nodes))


def node_counts(nodes: int) -> tuple[int, ...]:
    """Numbers of hosts for a curve: doubling to 8, then by four, and the last one.

    >>> node_counts(512)
    (1, 2, 4, 8, 32, 128, 512)
    """
    counts, n = [], 1
    while n < nodes:
        counts.append(n)
        n *= 2 if n < 8 else 4
    return (*counts, nodes)


def plan(
    info: TopologyInfo,
    op: str,
    nbytes: int,
    *,
    counts: Sequence[int] | None = None,
    algorithms: Sequence[str] | None = None,
    settings: SimSettings | None = None,
) -> Plan:
    """Simulate algorithms on the first hosts of a topology.

    Args:
        info: The whole cluster, from `make_cluster`, `join_hosts` or a `gather`.
        op: Operation.
        nbytes: Payload as nccl-tests count it.
        counts: Numbers of hosts; None is `node_counts`.
        algorithms: None is every one that there is a schedule of.
        settings: What the topology does not say.

    Raises:
        ConfigError: Unknown op or algorithm, no accelerators, or more hosts than there are.

    """
    if op not in SCHEDULES:
        raise ConfigError(f"unknown op {op!r}; known: {', '.join(SCHEDULES)}")
    if nbytes < 1:
        raise ConfigError(f"a payload has at least 1 byte, not {nbytes}")
    names = tuple(algorithms or SCHEDULES[op])
    unknown = [name for name in names if name not in SCHEDULES[op]]
    if unknown:
        raise ConfigError(f"{op} has no {unknown[0]!r}; known: {', '.join(SCHEDULES[op])}")
    hosts: dict[int, list[str]] = {}
    for device in info.accelerators:
        hosts.setdefault(device.node, []).append(device.id)
    if not hosts:
        raise ConfigError("the topology has no accelerators: nothing to plan for")
    chosen = tuple(counts or node_counts(len(hosts)))
    if min(chosen) < 1 or max(chosen) > len(hosts):
        raise ConfigError(f"{chosen} hosts asked for, 1 to {len(hosts)} have accelerators")
    members = [list(names) for names in hosts.values()]
    network = Network(TopologyGraph(info), [d for host in members for d in host], settings)
    rows = []
    for count in chosen:
        first, ranks = 0, []
        for host in members[:count]:
            ranks.append(list(range(first, first + len(host))))
            first += len(host)
        rows += [_row(network, op, name, nbytes, ranks) for name in names]
    return Plan(op, nbytes, tuple(rows), tuple(sorted(network.assumed)))


def _row(
    network: Network, op: str, algorithm: str, nbytes: int, hosts: Sequence[Sequence[int]]
) -> PlanRow:
    ranks = sum(map(len, hosts))
    messages = _messages(op, algorithm, ranks)
    if messages > _MOST_MESSAGES:
        why = f"{messages:,} messages, more than the {_MOST_MESSAGES:,} that are played"
        return PlanRow(len(hosts), ranks, algorithm, None, None, why)
    try:
        played = simulate(network, schedule(op, algorithm, nbytes, hosts))
    except ResourceError as e:
        return PlanRow(len(hosts), ranks, algorithm, None, None, str(e))
    seconds = played.time_us / 1e6
    busbw = nbytes / seconds * busbw_factor(op, ranks) if seconds else None
    return PlanRow(len(hosts), ranks, algorithm, played.time_us, busbw)


def _messages(op: str, algorithm: str, ranks: int) -> int:
    """How many messages a schedule has to play, before any of them is made."""
    every_pair = algorithm in ("direct", "two_shot", "pairwise") and op not in ("broadcast", "p2p")
    pipeline = algorithm == "ring" and op in ("broadcast", "all_to_all")
    if every_pair or pipeline:
        return ranks * ranks * (4 if every_pair and algorithm != "pairwise" else 1)
    return ranks
