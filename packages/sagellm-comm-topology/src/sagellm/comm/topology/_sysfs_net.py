"""Network devices out of `/sys/class/net` and `/sys/class/infiniband`.

Both describe the same card: what belongs to one PCI function becomes one NIC.
"""

from __future__ import annotations

import re

from sagellm.core.protocols import DetectionContext, DetectorSpec, Device, TopologyFragment

from ._numbers import number, whole_number
from ._sysfs import Tree, normal_bdf

__all__ = ["SPEC", "NetDetector"]

_NET = "/sys/class/net"
_IB = "/sys/class/infiniband"
_RATE = re.compile(r"\s*([0-9.]+)\s*Gb/sec")
_ETHERNET = "1"  # ARPHRD_ETHER; loopback, tunnels and the like have other types
_LAYERS = {_ETHERNET: "Ethernet", "32": "InfiniBand"}  # 32: ARPHRD_INFINIBAND, of IPoIB


class NetDetector:
    """Reads net interfaces and RDMA ports; a machine without any gives an empty fragment."""

    def detect(self, ctx: DetectionContext) -> TopologyFragment:
        """What the kernel says of its networks, never raising; see `Detector`."""
        tree = Tree(ctx.root)
        warnings: list[str] = []
        found: dict[str, dict[str, str]] = {}
        names = tree.names(_NET)
        if names is None:
            warnings.append(f"{_NET} cannot be listed: net interfaces are unknown")
        virtual: list[str] = []
        for name in names or ():
            target = tree.target(f"{_NET}/{name}")
            if target is None:
                continue  # a file of the bonding driver, not an interface
            if "/devices/virtual/" in target:
                virtual.append(name)
            else:
                _add(found, _owner(target) or f"net:{name}", _interface(tree, name))
        if not found:
            # In a container the only way out is a virtual interface.
            for name in virtual:
                if tree.read(f"{_NET}/{name}/type") == _ETHERNET and _is_up(tree, name):
                    _add(found, f"net:{name}", {**_interface(tree, name), "virtual": "yes"})
        for name in tree.names(_IB) or ():
            target = tree.target(f"{_IB}/{name}") or ""
            owner = _owner(target) or _owner(tree.target(f"{_IB}/{name}/device") or "")
            _add(found, owner or f"ib:{name}", _rdma(tree, name, warnings))
        devices = tuple(
            Device(key, "nic", bdf=normal_bdf(key), attrs=attrs)
            for key, attrs in sorted(found.items())
        )
        return TopologyFragment("sysfs-net", devices, warnings=tuple(warnings))


SPEC = DetectorSpec("sysfs-net", 60, NetDetector)
"""The network detector as its entry point offers it."""


def _add(found: dict[str, dict[str, str]], key: str, attrs: dict[str, str]) -> None:
    """Join what several interfaces of one function say; a port's RDMA rate wins.

    A function is up if any of its interfaces is, and only those that are up tell its rate: a
    second port without a cable and the representors of a switch in the card say nothing of it.
    """
    mine = found.setdefault(key, {})
    rest = dict(attrs)
    if "operstate" in attrs and "operstate" in mine:
        if mine["operstate"] != "down" and attrs["operstate"] == "down":
            rest = {k: attrs[k] for k in ("netdev", "netdev_down")}
        elif mine["operstate"] == "down" and attrs["operstate"] != "down":
            mine.pop("port_bytes_per_s", None)
        elif mine["operstate"] == "up":
            del rest["operstate"]
    for name, value in rest.items():
        if name in ("netdev", "netdev_down", "ib") and name in mine:
            mine[name] += f",{value}"
        elif name == "port_bytes_per_s" and name in mine:
            mine[name] = str(max(int(mine[name]), int(value)))
        else:
            mine[name] = value


def _owner(target: str) -> str | None:
    """The PCI function an entry hangs under: the last address in its path."""
    addresses = [a for part in target.split("/") if (a := normal_bdf(part))]
    return addresses[-1] if addresses else None


def _is_up(tree: Tree, name: str) -> bool:
    return tree.read(f"{_NET}/{name}/operstate") in ("up", "unknown")


def _interface(tree: Tree, name: str) -> dict[str, str]:
    attrs = {"netdev": name}
    layer = _LAYERS.get(tree.read(f"{_NET}/{name}/type") or "")
    if layer:
        attrs["link_layer"] = layer
    state = tree.read(f"{_NET}/{name}/operstate")
    if state:
        attrs["operstate"] = state
    if state == "down":
        attrs["netdev_down"] = name
    # Mbit/s; -1 or unreadable when down or virtual
    speed = whole_number(tree.read(f"{_NET}/{name}/speed"), most=1 << 32)
    if speed:
        attrs["port_bytes_per_s"] = str(speed * 125_000)
    return attrs


def _rdma(tree: Tree, name: str, warnings: list[str]) -> dict[str, str]:
    attrs = {"ib": name}
    hca = tree.read(f"{_IB}/{name}/hca_type")
    if hca:
        attrs["hca_type"] = hca
    ports = tree.names(f"{_IB}/{name}/ports")
    if not ports:
        warnings.append(f"RDMA device {name} shows no port")
        return attrs
    total = 0
    for port in ports:
        folder = f"{_IB}/{name}/ports/{port}"
        state = (tree.read(f"{folder}/state") or "").rpartition(":")[2].strip()
        rate = _RATE.match(tree.read(f"{folder}/rate") or "")
        layer = tree.read(f"{folder}/link_layer")
        if port == ports[0] or state == "ACTIVE":
            attrs.update({k: v for k, v in (("ib_state", state), ("link_layer", layer)) if v})
            gid = tree.read(f"{folder}/gids/0")
            if gid and layer == "InfiniBand":
                attrs["subnet_prefix"] = ":".join(gid.split(":")[:4])
        if rate and state == "ACTIVE":
            total += int((number(rate[1]) or 0.0) * 125_000_000)
    if total:
        attrs["port_bytes_per_s"] = str(total)
    return attrs
