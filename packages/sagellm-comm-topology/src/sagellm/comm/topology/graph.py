"""Paths between devices: class, hops, bottleneck, and the widest way.

Two questions, two kinds of ways. Over an accelerator fabric only fabric switches forward; over the
host only PCI switches, host bridges and NUMA nodes do. No way leads through an accelerator, and
only a way to another host leads through NICs: out by a near one, through the network's switches,
in by a near one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

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

from ._routes import Routes, best_way

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
_KEPT_EXITS = 20_000

_Exit = tuple[Device, int, float, tuple[Link, ...]]
"""A port to a network: NIC, class of the way to it, its bandwidth, and the way."""


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
            if link.a not in self._devices or link.b not in self._devices or link.a == link.b:
                continue
            table = self._table(link.kind)
            table.setdefault(link.a, []).append((link.b, link))
            table.setdefault(link.b, []).append((link.a, link))
        switches = {d.id for d in info.devices if d.kind in _FABRIC_TRANSIT}
        bridges = {d.id for d in info.devices if d.kind in _HOST_TRANSIT}
        self._fabric_routes = Routes(self._fabric, switches.__contains__)
        self._host_routes = Routes(self._host, bridges.__contains__)
        self._network_routes = Routes(self._networks, switches.__contains__)
        self._forwarding = switches | bridges
        self._pairs = {frozenset((p.a, p.b)): p for p in info.pairs}
        self._exits: dict[str, list[_Exit]] = {}

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
            import difflib  # only an error needs it, and it costs milliseconds

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
        links = self.links(a, b)
        if links is None:
            pair = self.stated(a, b)
            return Path(a, b, pair.path if pair else None, None)
        return self._make(a, b, links) if links else Path(a, b, "LOC", 0, (a,))

    def links(self, a: str, b: str) -> tuple[Link, ...] | None:
        """Links of `path(a, b)` alone; none for a device to itself, None where it is unknown.

        Raises:
            ConfigError: An id is unknown.

        """
        first, last = self.device(a), self.device(b)
        if a == b:
            return ()
        fabric = self._fabric_routes.way(a, b) if a in self._fabric and b in self._fabric else None
        if fabric is not None:
            return fabric
        return self._host_routes.way(a, b) if first.node == last.node else self._across(first, last)

    def quality(self, a: str, b: str) -> Quality:
        """How good the best path is, to sort by; unknown paths come last."""
        path = self.path(a, b)
        rank = len(PATH_CLASSES) if path.kind is None else PATH_CLASSES.index(path.kind)
        width = path.bottleneck_bytes_per_s
        if width is None and path.kind == "LINK":
            width = float(min((link.count for link in path.links), default=0))
        return rank, -(width or 0.0), path.hops or 0

    def widest(self, a: str, b: str) -> Path:
        """The path of one host with the greatest bottleneck, whatever its class.

        Links of unknown bandwidth are taken only where there is no other way.

        Raises:
            ConfigError: An id is unknown.

        """
        return self._freely(a, b, lambda link: (-(link.bandwidth_bytes_per_s or 0.0), 1.0))

    def shortest(self, a: str, b: str) -> Path:
        """The path of one host with the fewest hops, whatever its class; then the widest.

        Raises:
            ConfigError: An id is unknown.

        """
        # Bandwidths are below 1e15: they decide between ways of equally many hops only.
        return self._freely(
            a, b, lambda link: (0.0, 1.0 - (link.bandwidth_bytes_per_s or 0.0) / 1e18)
        )

    def _freely(self, a: str, b: str, price: Callable[[Link], tuple[float, float]]) -> Path:
        self.device(a)
        self.device(b)
        if a == b:
            return Path(a, b, "LOC", 0, (a,))
        tables = (self._fabric, self._host)
        links = best_way(tables, a, b, self._forwarding.__contains__, price)
        return Path(a, b, None, None) if links is None else self._make(a, b, links)

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
        order = {d.id: i for i, d in enumerate(self.info.accelerators)}
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
            group = tuple(sorted((m for m in members if m in order), key=order.__getitem__))
            if len(group) > 1:
                groups.append(group)
        return tuple(groups)

    def rails(self) -> tuple[tuple[str, ...], ...]:
        """Network ports by rail: one of each host in each; none where nobody numbered them."""
        found: dict[str, list[str]] = {}
        for device in self.info.devices:
            if device.kind == "nic" and "rail" in device.attrs:
                found.setdefault(device.attrs["rail"], []).append(device.id)
        return tuple(tuple(found[rail]) for rail in sorted(found, key=lambda r: (len(r), r)))

    def _table(self, kind: LinkKind) -> dict[str, list[tuple[str, Link]]]:
        if kind in FABRIC_KINDS:
            return self._fabric
        return self._host if kind in _HOST_KINDS else self._networks

    def _make(self, a: str, b: str, links: tuple[Link, ...]) -> Path:
        devices = self._stations(a, links)
        widths = [x.bandwidth_bytes_per_s for x in links]
        delays = [x.latency_s for x in links]
        return Path(
            a,
            b,
            self._classify(devices, links),
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

    def _across(self, first: Device, last: Device) -> tuple[Link, ...] | None:
        """The way to another host: out by a near NIC, through networks, in by a near NIC."""
        ports = sorted(
            (
                (
                    (-min(out[2], into[2]), out[1] + into[1],
                     int(out[0].attrs.get("rail") != into[0].attrs.get("rail"))),
                    out[0].id, into[0].id, out, into,
                )
                for out in self._exits_of(first) for into in self._exits_of(last)
            ),
            key=lambda p: p[:3],
        )  # fmt: skip
        found: list[tuple[int, tuple[Link, ...]]] = []
        merit = None
        for cost, _, _, (out, _, _, there), (into, _, _, back) in ports:
            if found and cost != merit:
                break
            through = self._network_routes.way(out.id, into.id)
            if through is not None:
                merit = cost
                links = (*there, *through, *reversed(back))
                found.append((len(links), links))
        return min(found, key=lambda f: f[0])[1] if found else None

    def _exits_of(self, device: Device) -> list[_Exit]:
        """The best ports of each network that the device reaches within its host."""
        known = self._exits.get(device.id)
        if known is not None:
            return known
        best: dict[str, tuple[float, int]] = {}
        found: list[tuple[str, _Exit]] = []
        if device.kind == "fabric_switch" and device.id in self._networks:
            return [(device, 0, float("inf"), ())]
        nics = [device] if device.kind == "nic" else self._hosts.get(device.node, [])
        for nic in nics:
            if nic.kind != "nic" or nic.id not in self._networks:
                continue
            way = () if nic is device else self._host_routes.way(device.id, nic.id)
            if way is None:
                continue
            kind = self._classify(self._stations(device.id, way), way) if way else "LOC"
            width = max(x.bandwidth_bytes_per_s or 0.0 for _, x in self._networks[nic.id])
            for network in dict.fromkeys(x.kind for _, x in self._networks[nic.id]):
                merit = (-width, PATH_CLASSES.index(kind))
                best[network] = min(best.get(network, merit), merit)
                found.append((network, (nic, merit[1], width, way)))
        kept = [e for network, e in found if (-e[2], e[1]) == best[network]]
        if len(self._exits) >= _KEPT_EXITS:
            self._exits.clear()
        self._exits[device.id] = kept
        return kept

    def _stations(self, start: str, links: tuple[Link, ...]) -> list[str]:
        devices = [start]
        for link in links:
            devices.append(link.b if link.a == devices[-1] else link.a)
        return devices
