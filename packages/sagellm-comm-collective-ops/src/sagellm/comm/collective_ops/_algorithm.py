"""Ring or tree: what a cost model or the topology says, and how NCCL is told."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass

from sagellm.core.protocols import (
    ConfigError,
    CostModelProtocol,
    CostTable,
    TopologyManagerProtocol,
)

__all__ = ["AlgorithmChoice", "Fabric", "apply_algorithm", "choose_algorithm", "read_fabric"]

logger = logging.getLogger(__name__)

ALGORITHMS = ("ring", "tree")
NCCL_SETTING = "NCCL_ALGO"
"""NCCL's and RCCL's documented variable; read when a communicator is made."""

_PER_FUNCTION = (2, 24)
"""First release in which the variable may name the operation that it is about."""

_SIZES = tuple(1 << bits for bits in range(10, 31, 2))
"""1 KiB to 1 GiB: one algorithm is forced only when it wins at all of them."""


@dataclass(frozen=True, slots=True)
class AlgorithmChoice:
    """What the library is told, None to leave it to its own tuner, and why."""

    algorithm: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Fabric:
    """The slowest path between accelerators of this host.

    Attributes:
        devices: How many accelerators were found.
        latency_s: Largest one-way latency, None when some link states none.
        bytes_per_s: Smallest bandwidth, None when some link states none.

    """

    devices: int
    latency_s: float | None
    bytes_per_s: float | None

    def ring_us(self, nbytes: int, size: int) -> float | None:
        """2(n-1) steps, each of 1/n of the bytes."""
        if self.latency_s is None or self.bytes_per_s is None:
            return None
        steps = 2 * (size - 1)
        return 1e6 * (steps * self.latency_s + steps / size * nbytes / self.bytes_per_s)

    def tree_us(self, nbytes: int, size: int) -> float | None:
        """Up and down log2(n) levels; pipelined, so that the bytes cross a link twice."""
        if self.latency_s is None or self.bytes_per_s is None:
            return None
        levels = 2 * math.ceil(math.log2(size))
        return 1e6 * (levels * self.latency_s + 2 * nbytes / self.bytes_per_s)

    def fastest(self, nbytes: int, size: int) -> tuple[str, float] | None:
        """Algorithm and its time in microseconds; None when the links state too little."""
        ring, tree = self.ring_us(nbytes, size), self.tree_us(nbytes, size)
        if ring is None or tree is None:
            return None
        return ("ring", ring) if ring <= tree else ("tree", tree)


def read_fabric(manager: TopologyManagerProtocol) -> Fabric:
    """The accelerators' slowest path, from `manager.detect()`."""
    info = manager.detect()
    ids = [d.id for d in info.devices if d.kind in ("gpu", "npu")]
    latencies: list[float | None] = []
    bandwidths: list[float | None] = []
    for i, a in enumerate(ids):
        for b in ids[i + 1 :]:
            path = manager.path(a, b)
            latencies.append(path.latency_s)
            bandwidths.append(path.bottleneck_bytes_per_s)
    known_latency = [v for v in latencies if v is not None]
    known_bandwidth = [v for v in bandwidths if v is not None]
    complete = bool(latencies)
    return Fabric(
        len(ids),
        max(known_latency) if complete and len(known_latency) == len(latencies) else None,
        min(known_bandwidth) if complete and len(known_bandwidth) == len(bandwidths) else None,
    )


def choose_algorithm(
    asked: str,
    size: int,
    cost_model: CostModelProtocol | None,
    table: CostTable | None,
    fabric: Fabric | None,
) -> AlgorithmChoice:
    """The one algorithm that wins at every size, or None where the library's tuner is better.

    Args:
        asked: `auto`, `ring` or `tree`; anything but `auto` wins.
        size: Ranks.
        cost_model: Preferred source.
        table: Its frozen table.
        fabric: Used when there is no cost model.

    Raises:
        ConfigError: `asked` is none of these.

    """
    if asked in ALGORITHMS:
        return AlgorithmChoice(asked, f"algorithm {asked!r} was asked for")
    if asked != "auto":
        raise ConfigError(f"algorithm {asked!r} is not one of auto, {', '.join(ALGORITHMS)}")
    if size == 1:
        return AlgorithmChoice(None, "a group of one needs no algorithm")
    winners: dict[str, int] = {}
    source = "the topology"
    if cost_model is not None and table is not None:
        source = f"cost model {table.fingerprint}"
        for nbytes in _SIZES:
            name, _ = cost_model.select(table, "all_reduce", nbytes, size)
            winners[name] = winners.get(name, 0) + 1
    elif fabric is not None:
        for nbytes in _SIZES:
            found = fabric.fastest(nbytes, size)
            if found is None:
                return AlgorithmChoice(
                    None,
                    f"the topology of {fabric.devices} accelerators does not state latency and "
                    f"bandwidth of every link; the library's tuner chooses",
                )
            winners[found[0]] = winners.get(found[0], 0) + 1
    else:
        return AlgorithmChoice(None, "neither topology nor cost model was given")
    if len(winners) == 1 and (only := next(iter(winners))) in ALGORITHMS:
        return AlgorithmChoice(only, f"{source} expects {only} to win from 1 KiB to 1 GiB")
    split = ", ".join(f"{name} at {count}" for name, count in sorted(winners.items()))
    return AlgorithmChoice(
        None,
        f"{source} expects {split} of {len(_SIZES)} sizes to be best; one setting would lose, "
        f"so the library's tuner chooses by size",
    )


def apply_algorithm(
    choice: AlgorithmChoice,
    *,
    group_exists: bool = False,
    version: tuple[int, ...] = (),
) -> AlgorithmChoice:
    """Set NCCL_ALGO for communicators made from now on; what that forces, and why.

    The variable is the process's, so a value that is there already is respected. A communicator
    that exists keeps what it was made with. NCCL's per-communicator configuration has no field for
    the algorithm, so that there is no way around the variable. Only all_reduce has a tree: a bare
    `Tree` fails other operations (https://github.com/NVIDIA/nccl/issues/317), or is dropped there,
    and a bare `Ring` takes what is faster from them; from 2.24 on it is said of all_reduce alone.

    Args:
        choice: What should be used.
        group_exists: Whether the group was there before: nothing is claimed of it then.
        version: The library's; empty where it is not known.

    """
    there = os.environ.get(NCCL_SETTING)
    if there:
        same = (choice.algorithm, f"allreduce:{choice.algorithm}")
        forced = choice.algorithm if there.lower() in same else None
        reason = f"{NCCL_SETTING}={there} was set before and stays; {choice.reason}"
        return AlgorithmChoice(None if group_exists else forced, reason)
    if choice.algorithm is None:
        return choice
    alone = version >= _PER_FUNCTION
    value = f"allreduce:{choice.algorithm}" if alone else choice.algorithm.capitalize()
    os.environ[NCCL_SETTING] = value
    if not group_exists:
        return AlgorithmChoice(choice.algorithm, f"{NCCL_SETTING}={value}; {choice.reason}")
    reason = (
        f"{NCCL_SETTING}={value} was set for the whole process, but the group was there before and "
        f"may keep what its communicator was made with; make the backend before the group's first "
        f"call, or set {NCCL_SETTING} before the program starts; {choice.reason}"
    )
    logger.warning("%s", reason)
    return AlgorithmChoice(None, reason)
