"""A network in which messages share links, played event by event.

Every message is a flow over the directed links of its path. Flows share each link max-min fair, as
fluids: the narrowest link of a flow decides its rate, and what a flow cannot use is left to the
others. A rank goes on to its next step when all its messages of this one are done, so that ranks
drift apart as they do on machines.

Nothing here knows a formula of the cost model; the simulator is there to check it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sagellm.core.protocols import ConfigError, LinkKind, ResourceError

from .graph import TopologyGraph

__all__ = ["Message", "Network", "Phase", "SimSettings", "Simulation", "fair_rates", "simulate"]

_SAME = 1e-9  # relative difference of times that is rounding


@dataclass(frozen=True, slots=True)
class Message:
    """Bytes from one rank to another; `reduce` has the receiver combine them with its own."""

    src: int
    dst: int
    nbytes: float
    reduce: bool = False


@dataclass(frozen=True, slots=True)
class Phase:
    """Messages that begin together at each rank, `repeats` times one after the other."""

    messages: tuple[Message, ...]
    repeats: int = 1


def _default_hops() -> dict[LinkKind, float]:
    return {"socket": 0.3, "pcie": 0.3, "host_bridge": 0.2, "infiniband": 0.6, "roce": 0.7,
            "ethernet": 5.0}  # fmt: skip


def _default_widths() -> dict[LinkKind, float]:
    return {"socket": 40e9, "host_bridge": 60e9, "pcie": 25e9, "infiniband": 25e9, "roce": 12e9,
            "ethernet": 3e9}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SimSettings:
    """What the topology does not say.

    Attributes:
        message_us: What software spends before a message leaves.
        reduce_bytes_per_s: Speed at which a rank combines what it received.
        hop_us: Latency of a link whose own is unknown, by kind; other kinds `other_hop_us`.
        other_hop_us: Of kinds not in `hop_us`.
        bytes_per_s: Bandwidth of a link whose own is unknown, by kind; other kinds
            `other_bytes_per_s`. The kinds that needed it are in `Network.assumed`.
        other_bytes_per_s: Of kinds not in `bytes_per_s`.
        max_events: Give up after so many, so that a plan too large ends in words.

    """

    message_us: float = 3.0
    reduce_bytes_per_s: float = 400e9
    hop_us: Mapping[LinkKind, float] = field(default_factory=_default_hops)
    other_hop_us: float = 0.3
    bytes_per_s: Mapping[LinkKind, float] = field(default_factory=_default_widths)
    other_bytes_per_s: float = 50e9
    max_events: int = 2_000_000


class Network:
    """The ways between the ranks of a group, as numbered directed links. Not thread-safe.

    Args:
        graph: Whose paths the messages take.
        group: Device of each rank.
        settings: What the topology does not say.

    Raises:
        ConfigError: A device is unknown or comes twice.

    Attributes:
        size: Ranks.
        capacity: Bytes per microsecond of each directed link met so far.
        assumed: Kinds of links whose bandwidth came from the settings.

    """

    def __init__(
        self, graph: TopologyGraph, group: Sequence[str], settings: SimSettings | None = None
    ) -> None:
        self.settings = settings or SimSettings()
        self.size = len(group)
        self.capacity: list[float] = []
        self.assumed: set[LinkKind] = set()
        self._graph = graph
        self._group = tuple(graph.device(name).id for name in group)
        if len(set(self._group)) != self.size:
            raise ConfigError(f"a device comes twice in the group: {', '.join(self._group)}")
        self._numbers: dict[tuple[int, str], int] = {}
        self._routes: dict[tuple[int, int], tuple[tuple[int, ...], float]] = {}

    def host_of(self, rank: int) -> int:
        """The host that a rank's device is in."""
        return self._graph.device(self._group[rank]).node

    def route(self, src: int, dst: int) -> tuple[tuple[int, ...], float]:
        """Directed links from one rank to another, and microseconds until the first byte.

        Raises:
            ConfigError: No source says how the two are joined.

        """
        found = self._routes.get((src, dst))
        if found is None:
            found = self._routes[src, dst] = self._find(self._group[src], self._group[dst])
        return found

    def _find(self, a: str, b: str) -> tuple[tuple[int, ...], float]:
        links = self._graph.links(a, b)
        if links is None:
            raise ConfigError(f"{a} and {b} are not known to be joined: nothing to simulate")
        settings, numbers, latency, here = self.settings, [], self.settings.message_us, a
        for link in links:
            key = (id(link), here)
            here = link.b if link.a == here else link.a
            if key not in self._numbers:
                width = link.bandwidth_bytes_per_s
                if not width:
                    width = settings.bytes_per_s.get(link.kind, settings.other_bytes_per_s)
                    self.assumed.add(link.kind)
                self._numbers[key] = len(self.capacity)
                self.capacity.append(width / 1e6)
            numbers.append(self._numbers[key])
            if link.latency_s is None:
                latency += settings.hop_us.get(link.kind, settings.other_hop_us)
            else:
                latency += link.latency_s * 1e6
        return tuple(numbers), latency


@dataclass(frozen=True, slots=True)
class Simulation:
    """What was played.

    Attributes:
        time_us: When the last rank was done.
        events: Moments at which something began or ended.
        skipped_repeats: Repeats of a phase that were not played because two before them had
            taken every rank equally long.

    """

    time_us: float
    events: int
    skipped_repeats: int


def simulate(network: Network, phases: Sequence[Phase]) -> Simulation:
    """Play the phases on the network; deterministic.

    Raises:
        ConfigError: Two ranks that talk are not known to be joined, or a message is impossible.
        ResourceError: It takes more than `max_events`.

    """
    return _Play(network, phases).run()


_What = tuple[int, int, int]
"""A message of a play: its phase, repeat and place in the phase."""


class _Flow:
    """A message on its way. What is left was true at `since_us`; `turn` counts its rates."""

    __slots__ = ("left", "rate", "route", "since_us", "turn", "what")

    def __init__(self, what: _What, left: float, route: tuple[int, ...], now_us: float) -> None:
        self.what = what
        self.left = left
        self.route = route
        self.rate = 0.0
        self.since_us = now_us
        self.turn = 0


class _Play:
    """The state of one simulation."""

    def __init__(self, network: Network, phases: Sequence[Phase]) -> None:
        self._network = network
        self._phases = phases
        self._repeats = [phase.repeats for phase in phases]
        self._mine: list[dict[int, list[int]]] = []
        for phase in phases:
            mine: dict[int, list[int]] = {}
            for m, message in enumerate(phase.messages):
                src, dst = message.src, message.dst
                if not (0 <= src < network.size and 0 <= dst < network.size and src != dst):
                    raise ConfigError(f"{message}: ranks are two of 0..{network.size - 1}")
                if not 0 <= message.nbytes < float("inf"):
                    raise ConfigError(f"{message}: bytes are at least 0, and finite")
                mine.setdefault(src, []).append(m)
                mine.setdefault(dst, []).append(m)
            self._mine.append(mine)
        self._now = 0.0
        self._offset = 0.0  # time of repeats that were skipped
        self._skipped = 0
        self._count = 0
        # Messages that begin or whose reduction ends, and flows that end if no rate changes.
        self._timers: list[tuple[float, int, _What, bool]] = []
        self._endings: list[tuple[float, int, int, _Flow]] = []
        self._users: dict[int, dict[_Flow, None]] = {}
        self._at = [(0, -1)] * network.size  # phase and repeat of each rank
        self._open = [0] * network.size
        self._met: set[_What] = set()
        self._ends: dict[int, list[dict[int, float]]] = {}

    def run(self) -> Simulation:
        for rank in range(self._network.size):
            self._advance(rank)
        events = 0
        while self._timers or self._endings:
            events += 1
            if events > self._network.settings.max_events:
                raise ResourceError(
                    f"simulation of {self._network.size} ranks takes more than "
                    f"{self._network.settings.max_events} events; simulate fewer ranks"
                )
            self._step()
        return Simulation(self._now + self._offset, events, self._skipped)

    def _step(self) -> None:
        """Go to the next moment at which something begins or ends."""
        self._now = min(queue[0][0] for queue in (self._timers, self._endings) if queue)
        near = self._now * (1 + _SAME)
        touched: dict[int, None] = {}
        while self._endings and self._endings[0][0] <= near:
            _, _, turn, flow = heapq.heappop(self._endings)
            if turn != flow.turn:
                continue
            for link in flow.route:
                del self._users[link][flow]
                touched[link] = None
            self._delivered(flow.what)
        while self._timers and self._timers[0][0] <= near:
            _, _, what, begins = heapq.heappop(self._timers)
            message = self._phases[what[0]].messages[what[2]]
            if not begins:
                self._finish(message.dst)
                continue
            flow = _Flow(what, message.nbytes, self._network.route(message.src, message.dst)[0],
                         self._now)  # fmt: skip
            for link in flow.route:
                self._users.setdefault(link, {})[flow] = None
                touched[link] = None
        if touched:
            self._share(touched)
        while self._endings and self._endings[0][2] != self._endings[0][3].turn:
            heapq.heappop(self._endings)

    def _share(self, touched: dict[int, None]) -> None:
        """Rate anew every flow that the touched links bear upon, directly or through others."""
        links = list(touched)
        flows: dict[_Flow, None] = {}
        for link in links:
            for flow in self._users[link]:
                if flow not in flows:
                    flows[flow] = None
                    for other in flow.route:
                        if other not in touched:
                            touched[other] = None
                            links.append(other)
        rates = fair_rates([f.route for f in flows], self._network.capacity)
        for flow, rate in zip(flows, rates, strict=True):
            if flow.turn and abs(rate - flow.rate) <= _SAME * rate:
                continue
            flow.left = max(0.0, flow.left - flow.rate * (self._now - flow.since_us))
            flow.rate, flow.since_us, flow.turn = rate, self._now, flow.turn + 1
            self._count += 1
            end_us = self._now + flow.left / rate
            heapq.heappush(self._endings, (end_us, self._count, flow.turn, flow))

    def _delivered(self, what: _What) -> None:
        message = self._phases[what[0]].messages[what[2]]
        if message.reduce:
            busy_us = message.nbytes / self._network.settings.reduce_bytes_per_s * 1e6
            self._later(busy_us, what, begins=False)
        else:
            self._finish(message.dst)
        self._finish(message.src)

    def _later(self, wait_us: float, what: _What, *, begins: bool) -> None:
        self._count += 1
        heapq.heappush(self._timers, (self._now + wait_us, self._count, what, begins))

    def _finish(self, rank: int) -> None:
        self._open[rank] -= 1
        if self._open[rank] == 0:
            self._note_end(rank)
            self._advance(rank)

    def _advance(self, rank: int) -> None:
        """Take a rank to its next step that has messages, and begin those whose ends are there."""
        phase, repeat = self._at[rank]
        repeat += 1
        while phase < len(self._phases) and (
            repeat >= self._repeats[phase] or rank not in self._mine[phase]
        ):
            phase, repeat = phase + 1, 0
        self._at[rank] = (phase, repeat)
        if phase == len(self._phases):
            return
        messages = self._mine[phase][rank]
        self._open[rank] = len(messages)
        for m in messages:
            what = (phase, repeat, m)
            if what not in self._met:
                self._met.add(what)
                continue
            self._met.remove(what)
            message = self._phases[phase].messages[m]
            _, latency_us = self._network.route(message.src, message.dst)
            self._later(latency_us, what, begins=True)

    def _note_end(self, rank: int) -> None:
        """Remember when ranks ended their repeats; skip repeats once they are all alike."""
        phase, repeat = self._at[rank]
        if self._repeats[phase] - repeat < 3:
            return
        ends = self._ends.setdefault(phase, [])
        while len(ends) <= repeat:
            ends.append({})
        ends[repeat][rank] = self._now
        if len(ends[repeat]) < len(self._mine[phase]) or repeat < 2:
            return
        period = self._now - ends[repeat - 1][rank]
        for later, earlier in ((repeat, repeat - 1), (repeat - 1, repeat - 2)):
            before = ends[earlier]
            if any(abs(t - before[r] - period) > 1e-6 * period for r, t in ends[later].items()):
                return
        # Exact only while nobody is elsewhere: in another phase, with messages of its own.
        at = self._at
        if any(at[r][0] != phase for r, left in enumerate(self._open) if left):
            return
        ahead = [at[r][1] for r in self._mine[phase]]
        if any(at[r][0] != phase for r in self._mine[phase]):
            return
        spare = self._repeats[phase] - 2 - max(ahead)
        if spare > 0:
            self._repeats[phase] -= spare
            self._offset += spare * period
            self._skipped += spare


def fair_rates(routes: Sequence[Sequence[int]], capacity: Sequence[float]) -> list[float]:
    """Max-min fair rates of flows: all are filled alike until a link is full, and so on.

    Args:
        routes: Links of each flow, at least one.
        capacity: Of each link.

    """
    rates = [-1.0] * len(routes)
    users: dict[int, list[int]] = {}
    for i, route in enumerate(routes):
        for link in route:
            users.setdefault(link, []).append(i)
    free = {link: capacity[link] for link in users}
    waiting = {link: len(sharers) for link, sharers in users.items()}
    while waiting:
        share = min(free[link] / count for link, count in waiting.items())
        full = [k for k, count in waiting.items() if free[k] <= share * count * (1 + _SAME)]
        for link in full:
            for i in users[link]:
                if rates[i] >= 0:
                    continue
                rates[i] = share
                for other in routes[i]:
                    free[other] -= share
                    waiting[other] -= 1
        waiting = {link: count for link, count in waiting.items() if count > 0}
    return rates
