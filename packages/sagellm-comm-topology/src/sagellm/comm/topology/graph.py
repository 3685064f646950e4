"""Paths between devices: class, hops, bottleneck, and the widest way.

Two questions, two searches. Over an accelerator fabric only fabric switches forward; over the host
only PCI switches, host bridges and NUMA nodes do. No search passes through an accelerator, and
only a way to another host passes through a NIC. Searches start from one device and stay in its
host, so that their results are small and are kept.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable

from sagellm.core.protocols import (
    ConfigError,
    Device,
    Link,
    LinkKind,
    Pair,
    Path,
    PathClass,
    TopologyInfo,
)

__all__ = ["FABRIC_KINDS", "NETWORK_KINDS", "PATH_CLASSES", "Quality", "TopologyGraph"]

FABRIC_KINDS: frozenset[LinkKind] = frozenset(
    ("nvlink", "xgmi", "hccs", "sio", "ub", "mlulink", "metaxlink", "mtlink", "ixlink", "xpulink")
)
"""Links between accelerators, or between an accelerator and its switch."""

NETWORK_KINDS: frozenset[LinkKind] = frozenset(("infiniband", "roce", "ethernet"))
"""Links that leave the host."""

PATH_CLASSES: tuple[PathClass, ...] = (
    "LOC", "LINK", "C2C", "PIX", "PXB", "PHB", "NODE", "SYS", "NET",
)  # fmt: skip
"""Path classes, best first."""

Quality = tuple[int, float, int]
"""Sorts paths, best smallest: class, negated bottleneck (unknown counts as nothing), hops."""

_HOST_KINDS: frozenset[LinkKind] = frozenset(("pcie", "host_bridge", "socket", "cxl", "c2c"))
_HOST_TRANSIT = frozenset(("pci_root", "pci_switch", "numa"))
_FABRIC_TRANSIT = frozenset(("fabric_switch",))
_KEEP_SEARCHES = 4096

_Cost = tuple[int, int, int, float]
_Search = dict[str, tuple[_Cost, Link | None]]


class TopologyGraph:
    """The devices and links of one topology as a graph. Thread-safe; the topology is frozen.

    Args:
        info: What to answer questions about.

    """

    def __init__(self, info: TopologyInfo) -> None:
        self.info = info
        self._devices: dict[str, Device] = {d.id: d for d in info.devices}
        self._fabric: dict[str, list[tuple[str, Link]]] = {}
        self._host: dict[str, list[tuple[str, Link]]] = {}
        self._networks: dict[str, list[tuple[str, Link]]] = {}
        self._hosts: dict[int, list[Device]] = {}
        for device in info.devices:
            self._hosts.setdefault(device.node, []).append(device)
        for link in info.links:
            if link.a not in self._devices or link.b not in self._devices:
                continue
            table = self._table(link.kind)
            table.setdefault(link.a, []).append((link.b, link))
            table.setdefault(link.b, []).append((link.a, link))
        self._pairs = {frozenset((p.a, p.b)): p for p in info.pairs}
        self._searches: dict[tuple[str, bool], _Search] = {}

    def stated(self, a: str, b: str) -> Pair | None:
        """What a source said of the pair without naming the links between; None if nothing."""
        return self._pairs.get(frozenset((a, b)))

    def device(self, device_id: str) -> Device:
        """The device of that id.

        Raises:
            ConfigError: There is none; the message names the nearest ids.

        """
        found = self._devices.get(device_id)
        if found is None:
            near = difflib.get_close_matches(device_id, self._devices, n=3, cutoff=0.4)
            known = near or [d.id for d in self.info.devices[:4]]
            raise ConfigError(
                f"no device {device_id!r} in the topology; nearest: {', '.join(known) or 'none'}"
            )
        return found

    def path(self, a: str, b: str) -> Path:
        """The path of the best class, then the fewest hops, then the widest bottleneck.

        Where no links are known, the class that a source stated for the pair, without hops.

        Raises:
            ConfigError: An id is unknown.

        """
        first, last = self.device(a), self.device(b)
        if a == b:
            return Path(a, b, "LOC", 0, (a,))
        fabric = self._search(a, fabric=True)
        if b in fabric:
            return self._walk(a, b, fabric, "LINK")
        if first.node != last.node:
            return self._across(first, last)
        host = self._search(a, fabric=False)
        if b in host:
            return self._walk(a, b, host, None)
        pair = self.stated(a, b)
        return Path(a, b, pair.path if pair else None, None)

    def quality(self, a: str, b: str) -> Quality:
        """How good the best path is, to sort by; unknown paths come last."""
        path = self.path(a, b)
        rank = len(PATH_CLASSES) if path.kind is None else PATH_CLASSES.index(path.kind)
        width = path.bottleneck_bytes_per_s
        if width is None and path.kind == "LINK":
            width = float(min(link.count for link in path.links))
        return rank, -(width or 0.0), path.hops or 0

    def widest(self, a: str, b: str) -> Path:
        """The path of one host with the greatest bottleneck, whatever its class.

        Links of unknown bandwidth are taken only where there is no other way.

        Raises:
            ConfigError: An id is unknown.

        """
        self.device(b)
        best: dict[str, tuple[float, int, Link | None]] = {
            self.device(a).id: (float("-inf"), 0, None)
        }
        todo: list[tuple[float, int, str]] = [(float("-inf"), 0, a)]
        while todo:
            narrow, hops, here = heapq.heappop(todo)
            if here == b or (
                here != a and self._devices[here].kind not in _HOST_TRANSIT | _FABRIC_TRANSIT
            ):
                continue
            for there, link in (*self._fabric.get(here, ()), *self._host.get(here, ())):
                width = -(link.bandwidth_bytes_per_s or 0.0)
                cost = (max(narrow, width), hops + 1)
                if there != a and (there not in best or cost < best[there][:2]):
                    best[there] = (*cost, link)
                    heapq.heappush(todo, (*cost, there))
        if b not in best:
            return Path(a, b, None, None)
        return self._walk(a, b, {k: ((0, 0, 0, 0.0), v[2]) for k, v in best.items()}, None)

    def links_of(self, device_id: str) -> tuple[Link, ...]:
        """Every link that ends at the device."""
        tables = (self._fabric, self._host, self._networks)
        return tuple(link for table in tables for _, link in table.get(device_id, ()))

    def same_host(self, device: Device) -> Iterable[Device]:
        """Devices of the host that `device` is in, itself included."""
        return self._hosts.get(device.node, ())

    def components(self, kind: LinkKind) -> tuple[tuple[str, ...], ...]:
        """Sets of accelerators that links of one kind alone connect; loners are left out."""
        table = self._table(kind)
        seen: set[str] = set()
        groups: list[tuple[str, ...]] = []
        for start in self.info.accelerators:
            if start.id in seen:
                continue
            members, todo = {start.id}, [start.id]
            while todo:
                for there, link in table.get(todo.pop(), ()):
                    if link.kind == kind and there not in members:
                        members.add(there)
                        todo.append(there)
            seen |= members
            group = tuple(d.id for d in self.info.accelerators if d.id in members)
            if len(group) > 1:
                groups.append(group)
        return tuple(groups)

    def _table(self, kind: LinkKind) -> dict[str, list[tuple[str, Link]]]:
        if kind in FABRIC_KINDS:
            return self._fabric
        return self._host if kind in _HOST_KINDS else self._networks

    def _search(self, start: str, *, fabric: bool) -> _Search:
        """Best way from `start` to everything in reach of one kind of links (Dijkstra)."""
        key = (start, fabric)
        known = self._searches.get(key)
        if known is not None:
            return known
        table, transit = (self._fabric, _FABRIC_TRANSIT) if fabric else (self._host, _HOST_TRANSIT)
        best: _Search = {start: ((0, 0, 0, float("-inf")), None)}
        todo: list[tuple[_Cost, str]] = [(best[start][0], start)]
        while todo:
            cost, here = heapq.heappop(todo)
            if cost > best[here][0] or (here != start and self._devices[here].kind not in transit):
                continue
            for there, link in table.get(here, ()):
                # Sockets crossed, host bridges crossed, hops, then the narrowest link.
                fresh = (
                    cost[0] + (link.kind == "socket"),
                    cost[1] + (link.kind == "host_bridge"),
                    cost[2] + 1,
                    max(cost[3], -(link.bandwidth_bytes_per_s or 0.0)),
                )
                if there not in best or fresh < best[there][0]:
                    best[there] = (fresh, link)
                    heapq.heappush(todo, (fresh, there))
        if len(self._searches) >= _KEEP_SEARCHES:
            self._searches.clear()
        self._searches[key] = best
        return best

    def _walk(self, a: str, b: str, search: _Search, kind: PathClass | None) -> Path:
        links: list[Link] = []
        here = b
        while here != a:
            link = search[here][1]
            assert link is not None
            links.append(link)
            here = link.a if link.b == here else link.b
        return self._make(a, b, tuple(reversed(links)), kind)

    def _make(self, a: str, b: str, links: tuple[Link, ...], kind: PathClass | None) -> Path:
        devices = [a]
        for link in links:
            devices.append(link.b if link.a == devices[-1] else link.a)
        widths = [x.bandwidth_bytes_per_s for x in links]
        delays = [x.latency_s for x in links]
        return Path(
            a,
            b,
            kind or self._classify(devices, links),
            len(links),
            tuple(devices),
            min(w for w in widths if w) if all(widths) else None,
            sum(d for d in delays if d) if None not in delays else None,
            links,
        )

    def _classify(self, devices: list[str], links: tuple[Link, ...]) -> PathClass:
        kinds = {link.kind for link in links}
        if kinds & NETWORK_KINDS:
            return "NET"
        if kinds == {"c2c"}:
            return "C2C"
        if kinds <= FABRIC_KINDS:
            return "LINK"
        if "socket" in kinds:
            return "SYS"
        if any(self._devices[d].kind == "numa" for d in devices[1:-1]):
            return "NODE"
        if any(self._devices[d].kind in ("pci_root", "numa") for d in devices):
            return "PHB"
        switches = sum(self._devices[d].kind == "pci_switch" for d in devices)
        return "PIX" if switches <= 1 else "PXB"

    def _across(self, first: Device, last: Device) -> Path:
        """The way to another host: out by a near NIC, through a network, in by a near NIC."""
        ways: list[tuple[float, tuple[int, ...], str, tuple[Link, ...]]] = []
        entries: dict[str, list[tuple[Device, Link]]] = {}
        for nic, network, link in self._ports(last):
            entries.setdefault(network, []).append((nic, link))
        for out, network, exit_link in self._ports(first):
            there = self._host_path(first, out)
            for into, enter_link in entries.get(network, ()):
                back = self._host_path(into, last)
                links = (*there.links, exit_link, enter_link, *back.links)
                width = min(
                    exit_link.bandwidth_bytes_per_s or 0.0, enter_link.bandwidth_bytes_per_s or 0.0
                )
                rails = int(out.attrs.get("ib") != into.attrs.get("ib"))
                cost = (_rank(there.kind), _rank(back.kind), rails, len(links))
                ways.append((-width, cost, f"{out.id} {into.id}", links))
        if not ways:
            return Path(first.id, last.id, None, None)
        return self._make(first.id, last.id, min(ways, key=lambda w: w[:3])[3], "NET")

    def _ports(self, device: Device) -> list[tuple[Device, str, Link]]:
        """NICs of the device's host that the device reaches, with the network of each."""
        nics = [device] if device.kind == "nic" else self._hosts.get(device.node, [])
        return [
            (nic, network, link)
            for nic in nics
            if nic.kind == "nic" and self._host_path(device, nic).kind is not None
            for network, link in self._networks.get(nic.id, ())
        ]

    def _host_path(self, a: Device, b: Device) -> Path:
        if a.id == b.id:
            return Path(a.id, b.id, "LOC", 0, (a.id,))
        search = self._search(a.id, fabric=False)
        return (
            self._walk(a.id, b.id, search, None) if b.id in search else Path(a.id, b.id, None, None)
        )


def _rank(kind: PathClass | None) -> int:
    return len(PATH_CLASSES) if kind is None else PATH_CLASSES.index(kind)
