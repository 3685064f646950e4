"""Who runs where: nearest devices, affinities, rings and the placement of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, combinations

from sagellm.core.protocols import Affinity, ConfigError, Device, DeviceKind

from ._groups import Grouping, Rates, tightest_groups
from ._numbers import whole_number
from .graph import PATH_CLASSES, Quality, TopologyGraph

__all__ = ["affinity", "nearest", "rank_map", "ring", "trees"]

_SEARCH_STEPS = 20_000
_SWAP_LIMIT = 64  # members up to which rings and groups are improved by pairs: cubic work
_WINDOW = 64  # items that a group may be chosen from: hosts beyond it are as good as those within

_SELF: Quality = (0, float("-inf"), 0)

_Rate = Callable[[str, str], Quality]


def nearest(graph: TopologyGraph, device_id: str, kind: DeviceKind) -> Device | None:
    """The other device of that kind and host with the best known path, or None.

    Ties go to a port that is up, to the widest port, then to the smallest id.
    """
    device = graph.device(device_id)
    unknown = len(PATH_CLASSES)
    rated = [
        (rate[0], *_port(other), rate[1:], other.id, other)
        for other in graph.same_host(device)
        if other.kind == kind and other.id != device_id
        if (rate := graph.quality(device_id, other.id))[0] < unknown
    ]
    return min(rated, key=lambda r: r[:-1])[-1] if rated else None


def _port(device: Device) -> tuple[bool, int]:
    down = device.attrs.get("operstate") == "down" or device.attrs.get("ib_state") == "DOWN"
    return down, -(whole_number(device.attrs.get("port_bytes_per_s")) or 0)


def affinity(graph: TopologyGraph, device_id: str) -> Affinity:
    """CPUs and NUMA nodes local to a device; a node without CPUs gives way to its nearest."""
    device = graph.device(device_id)
    nodes = {
        d.numa_nodes[0]: d for d in graph.same_host(device) if d.kind == "numa" and d.numa_nodes
    }
    chosen: list[int] = []
    for number in device.numa_nodes:
        node = nodes.get(number)
        near: int | None = number
        if node is not None and node.attrs.get("cpuless"):
            near = _nearest_with_cpus(node, nodes)
        if near is not None and near not in chosen:
            chosen.append(near)
    moved = tuple(chosen) != device.numa_nodes
    lists = [nodes[n].cpulist for n in chosen if n in nodes and nodes[n].cpulist]
    cpulist = device.cpulist if device.cpulist and not moved else ",".join(x for x in lists if x)
    return Affinity(tuple(chosen), cpulist or None)


def _nearest_with_cpus(node: Device, nodes: dict[int, Device]) -> int | None:
    """The node with CPUs at the least distance; None without distances."""
    distances = [int(x) for x in node.attrs.get("distances", "").split(",") if x.isdigit()]
    numbers = sorted(nodes)
    if len(distances) != len(numbers):
        return None
    ranked = sorted(
        (d, n) for d, n in zip(distances, numbers, strict=True) if not nodes[n].attrs.get("cpuless")
    )
    return ranked[0][1] if ranked else None


def rank_map(
    graph: TopologyGraph, tp: int, pp: int, dp: int, ep: int, *, visible_only: bool = False
) -> tuple[str, ...]:
    """Device id for each rank; groups of tp, then of ep, pp and dp on the best links left.

    The worst pair within the tp groups is the best possible as long as groups fit into hosts of
    up to 16 accelerators; in larger hosts, across hosts, and for ep and pp it is a greedy choice.

    Raises:
        ConfigError: A degree is no whole number from 1 up, or there are too few accelerators.

    """
    for name, degree in (("tp", tp), ("pp", pp), ("dp", dp), ("ep", ep)):
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, not {degree!r}")
    devices = [
        d for d in graph.info.accelerators if d.visible_index is not None or not visible_only
    ]
    wanted = tp * pp * dp * ep
    if wanted > len(devices):
        raise ConfigError(
            f"tp {tp} * pp {pp} * dp {dp} * ep {ep} = {wanted} ranks, but only {len(devices)} "
            f"accelerators are {'visible' if visible_only else 'known'}"
        )
    groups = _pack(graph, devices, tp, wanted // tp)
    for degree in (ep, pp):  # dp takes what is left, in order
        groups = _cluster(groups, degree, lambda a, b: graph.quality(a[0], b[0]))
    return tuple(d for group in groups for d in group)


def _pack(
    graph: TopologyGraph, devices: Sequence[Device], size: int, count: int
) -> list[tuple[str, ...]]:
    """Groups within single hosts as far as these go, the rest across hosts."""
    if size == 1:
        return [(d.id,) for d in devices[:count]]
    members: dict[int, list[str]] = {}
    for device in devices:
        members.setdefault(device.node, []).append(device.id)
    known: dict[Rates, _Host] = {}  # most hosts are alike
    hosts = [_host(graph, ids, size, known) for ids in members.values()]
    takes = _shares(hosts, count)
    whole: list[tuple[str, ...]] = []
    rest: list[str] = []
    for ids, host, take in zip(members.values(), hosts, takes, strict=True):
        groups = host.best(take).groups if take else ()
        whole += [tuple(ids[i] for i in group) for group in groups]
        used = {i for group in groups for i in group}
        rest += [name for i, name in enumerate(ids) if i not in used]
    missing = count - len(whole)
    return [*whole, *(tuple(rest[i * size : (i + 1) * size]) for i in range(missing))]


class _Host:
    """The groups that accelerators of one host can form, each number of groups tried once."""

    def __init__(self, rates: Rates, size: int) -> None:
        self.most = len(rates) // size
        self._rates = rates
        self._size = size
        self._found: dict[int, Grouping] = {}

    def best(self, count: int) -> Grouping:
        if count not in self._found:
            self._found[count] = tightest_groups(self._rates, self._size, count)
        return self._found[count]


class _LargeHost:
    """The same for hosts with too many accelerators to rate all pairs: groups grown once."""

    def __init__(self, graph: TopologyGraph, ids: Sequence[str], size: int) -> None:
        number = {name: i for i, name in enumerate(ids)}
        items = [(name,) for name in ids]
        grown = _cluster(items, size, lambda a, b: graph.quality(a[0], b[0]))
        whole = [g for g in grown if len(g) == size]
        self.most = len(whole)
        self._groups = tuple(tuple(number[name] for name in g) for g in whole)
        worst = (max(graph.quality(a, b) for a, b in combinations(g, 2)) for g in whole)
        self._worst = tuple(accumulate(worst, max))

    def best(self, count: int) -> Grouping:
        return Grouping(self._groups[:count], self._worst[count - 1])


def _host(
    graph: TopologyGraph, ids: Sequence[str], size: int, known: dict[Rates, _Host]
) -> _Host | _LargeHost:
    if len(ids) > _SWAP_LIMIT:
        return _LargeHost(graph, ids, size)
    rows: list[list[Quality]] = [[_SELF] * len(ids) for _ in ids]
    if len(ids) >= size:  # else there is no group to form
        for i, j in combinations(range(len(ids)), 2):
            rows[i][j] = rows[j][i] = graph.quality(ids[i], ids[j])
    rates = tuple(map(tuple, rows))
    if rates not in known:
        known[rates] = _Host(rates, size)
    return known[rates]


def _shares(hosts: Sequence[_Host | _LargeHost], count: int) -> list[int]:
    """How many groups each host forms, so that the worst pair is best, the first hosts first."""
    if count >= sum(host.most for host in hosts):
        return [host.most for host in hosts]
    levels = sorted({h.best(n).worst for h in set(hosts) for n in range(1, h.most + 1)})
    for level in levels:
        fits = {
            host: max((n for n in range(1, host.most + 1) if host.best(n).worst <= level),
                      default=0)
            for host in set(hosts)
        }  # fmt: skip
        if sum(fits[host] for host in hosts) >= count:
            break
    takes = []
    for host in hosts:
        takes.append(min(fits[host], count))
        count -= takes[-1]
    return takes


def _cluster(
    items: Sequence[tuple[str, ...]],
    size: int,
    rate: Callable[[tuple[str, ...], tuple[str, ...]], Quality],
) -> list[tuple[str, ...]]:
    """Join items into groups of `size`, each begun with the item whose best partners are best.

    The worst pair of a group decides: a collective is as fast as its slowest link. Ties keep
    the given order, so equal topologies give equal groups.
    """
    if size == 1 or len(items) <= 1:
        return list(items)
    left = list(items)
    groups: list[tuple[str, ...]] = []
    while len(left) >= size:
        near = left[: max(_WINDOW, size)]
        starts = range(len(near) if len(near) <= 16 else 1)
        candidates = [_grow(i, near, size, rate) for i in starts]
        _, chosen = min(candidates, key=lambda c: (c[0], c[1]))
        groups.append(tuple(d for i in chosen for d in left[i]))
        left = [item for i, item in enumerate(left) if i not in chosen]
    if left:
        groups.append(tuple(d for item in left for d in item))
    return groups


def _grow(
    start: int,
    items: Sequence[tuple[str, ...]],
    size: int,
    rate: Callable[[tuple[str, ...], tuple[str, ...]], Quality],
) -> tuple[Quality, tuple[int, ...]]:
    """The worst pair and the members of the group that greedy growth from `start` gives."""
    chosen, worst = [start], (-1, float("-inf"), 0)
    reach: dict[int, Quality] = {
        i: rate(items[start], items[i]) for i in range(len(items)) if i != start
    }
    while len(chosen) < size:
        best = min(reach, key=lambda i: (reach[i], i))
        worst = max(worst, reach.pop(best))
        chosen.append(best)
        for i in reach:
            reach[i] = max(reach[i], rate(items[best], items[i]))
    return worst, tuple(sorted(chosen))


def ring(graph: TopologyGraph, group: Sequence[str]) -> tuple[str, ...]:
    """The members of `group` in ring order, the first one first."""
    members = list(group)
    if len(set(members)) != len(members):
        raise ConfigError(f"a device comes twice in the ring: {', '.join(members)}")
    for member in members:
        graph.device(member)
    if len(members) <= 3:
        return tuple(members)  # every order of three is the same ring
    rates: dict[tuple[str, str], Quality] = {}

    def rate(a: str, b: str) -> Quality:
        key = (a, b) if a < b else (b, a)
        if key not in rates:
            # Hops do not narrow a ring, and would only make its levels many.
            rates[key] = (*graph.quality(*key)[:2], 0)
        return rates[key]

    hosts = _by_host(graph, members)
    if len(members) > _SWAP_LIMIT and len(hosts) > 1:
        return tuple(d for host in hosts for d in _opened(graph, host))
    found = _greedy(members, rate)
    if len(members) > _SWAP_LIMIT:
        return found
    found = _improve(found, rate)
    bottleneck = max(rate(a, b) for a, b in _pairs(found))
    for level in sorted({rate(a, b) for a in members for b in members if a < b}):
        if level >= bottleneck:
            break
        better = _cycle(members, rate, level)
        if better:
            return better
    return found


def _by_host(graph: TopologyGraph, members: Sequence[str]) -> list[list[str]]:
    """Members of each host, that of the first member first, then by rack and number."""
    hosts: dict[int, list[str]] = {}
    for name in members:
        hosts.setdefault(graph.device(name).node, []).append(name)
    first, *others = hosts
    others.sort(key=lambda n: (graph.device(hosts[n][0]).attrs.get("rack", ""), n))
    return [hosts[n] for n in (first, *others)]


def _opened(graph: TopologyGraph, host: Sequence[str]) -> tuple[str, ...]:
    """The members of a host in line, as a ring of them that is cut where it is worst."""
    around = ring(graph, host)
    if len(around) < 3:
        return around
    worst = max(range(len(around)), key=lambda i: graph.quality(around[i - 1], around[i]))
    return (*around[worst:], *around[:worst])


def trees(
    graph: TopologyGraph, group: Sequence[str]
) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Two trees over `group`, each member's parent by name; the root's is None.

    Members of a host form a line in ring order, and the firsts of the lines a binary tree, in
    rack order. A host that forwards in one tree is a leaf of the other (but for one of an odd
    number), so that together they use every port both ways.

    Raises:
        ConfigError: An id is unknown or comes twice.

    """
    if not group:
        return {}, {}
    members = ring(graph, group)
    lines = [_opened(graph, host) for host in _by_host(graph, members)]
    heads = [line[0] for line in lines]
    found = []
    for order in (heads, [*heads[1:], heads[0]] if len(heads) % 2 else heads[::-1]):
        parents: dict[str, str | None] = {}
        for i, name in enumerate(order):
            above = _parent(i, len(order))
            parents[name] = None if above is None else order[above]
        for line in lines:
            parents.update(zip(line[1:], line, strict=False))
        found.append(parents)
    return found[0], found[1]


def _parent(i: int, n: int) -> int | None:
    """Parent of place i in a binary tree whose odd places are all leaves; 0 is the root."""
    if i == 0:
        return None
    lowest = i & -i
    above = (i ^ lowest) | (lowest << 1)
    return above if above < n else i ^ lowest


def _pairs(order: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(order, [*order[1:], order[0]], strict=True))


def _greedy(members: Sequence[str], rate: _Rate) -> tuple[str, ...]:
    order, left = [members[0]], list(members[1:])
    while left:
        best = min(left, key=lambda m: (rate(order[-1], m), members.index(m)))
        left.remove(best)
        order.append(best)
    return tuple(order)


def _improve(order: tuple[str, ...], rate: _Rate) -> tuple[str, ...]:
    """Undo crossings (2-opt) as long as the worse of two edges gets better."""
    ring_, n, again = list(order), len(order), True
    while again:
        again = False
        for i in range(n - 1):
            for j in range(i + 2, n - (i == 0)):
                a, b, c, d = ring_[i], ring_[i + 1], ring_[j], ring_[(j + 1) % n]
                before = sorted((rate(a, b), rate(c, d)), reverse=True)
                if sorted((rate(a, c), rate(b, d)), reverse=True) < before:
                    ring_[i + 1 : j + 1] = ring_[i + 1 : j + 1][::-1]
                    again = True
    return tuple(ring_)


def _cycle(members: Sequence[str], rate: _Rate, level: Quality) -> tuple[str, ...] | None:
    """A ring over pairs of at least that quality, found in a bounded number of steps, or None."""
    near = {a: [b for b in members if b != a and rate(a, b) <= level] for a in members}
    if any(len(n) < 2 for n in near.values()):
        return None
    order, used, steps = [members[0]], {members[0]}, 0
    choices = [iter(sorted(near[members[0]], key=lambda m: len(near[m])))]
    while choices and steps < _SEARCH_STEPS:
        steps += 1
        if len(order) == len(members) and members[0] in near[order[-1]]:
            return tuple(order)
        step = next((m for m in choices[-1] if m not in used), None)
        if step is None:
            choices.pop()
            used.discard(order.pop())
            continue
        order.append(step)
        used.add(step)
        choices.append(iter(sorted(near[step], key=lambda m: len(near[m]))))
    return None
