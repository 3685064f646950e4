"""Time that only messages make pass: links with a latency and a bandwidth, and no sleeping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sagellm.core.protocols import ConfigError

__all__ = ["MockLinks", "VirtualClock"]


@dataclass(frozen=True, slots=True)
class MockLinks:
    """What a message costs in a mock world: latency, then bytes over bandwidth.

    A rank sends one message at a time and receives any number at once.

    Attributes:
        latency_s: Of every pair of ranks that `between` does not name.
        bytes_per_s: Of every such pair.
        between: (latency_s, bytes_per_s) from one global rank to another.

    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    between: Mapping[tuple[int, int], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for latency_s, bytes_per_s in ((self.latency_s, self.bytes_per_s), *self.between.values()):
            if not latency_s >= 0 or not bytes_per_s > 0:
                raise ConfigError(
                    f"a link needs latency_s >= 0 and bytes_per_s > 0, got {latency_s} and "
                    f"{bytes_per_s}"
                )

    def of(self, src: int, dst: int) -> tuple[float, float]:
        """Latency and bandwidth from one global rank to another."""
        return self.between.get((src, dst), (self.latency_s, self.bytes_per_s))


class VirtualClock:
    """Seconds that have passed for each global rank. Used under the world's lock.

    A rank's time moves when it waits for something, and by `advance`. It depends on the program
    alone, never on how threads were scheduled.
    """

    def __init__(self, size: int, links: MockLinks) -> None:
        self.links = links
        self.now = [0.0] * size
        self._free = [0.0] * size  # when each rank can send again

    def send(self, src: int, dst: int, nbytes: int, late_s: float) -> tuple[float, float]:
        """When a message has left, and when it is there."""
        latency_s, bytes_per_s = self.links.of(src, dst)
        left = max(self.now[src], self._free[src]) + nbytes / bytes_per_s
        self._free[src] = left
        return left, left + latency_s + late_s

    def collective(self, ranks: Sequence[int], steps: int, sent_bytes: int) -> float:
        """Seconds of an operation of so many steps and bytes over the slowest link of a group."""
        links = [self.links.of(a, b) for a in ranks for b in ranks if a != b]
        if not links:
            return 0.0
        return steps * max(a for a, _ in links) + sent_bytes / min(b for _, b in links)

    def reach(self, rank: int, when: float) -> None:
        """Let a rank have waited until then."""
        self.now[rank] = max(self.now[rank], when)
