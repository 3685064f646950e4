"""One topology for all ranks, over a store shaped like torch.distributed's.

Every rank publishes the hash of its host's description; only the first rank of each hash publishes
the description itself, so 512 equal hosts cost one. Rank 0 joins what arrives, names who is
missing, and publishes the result, which every rank takes, rank 0 included.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from sagellm.core.protocols import (
    CommTimeoutError,
    ConfigError,
    Device,
    IntegrityError,
    Link,
    LinkKind,
    Pair,
    Store,
    TopologyInfo,
)

from ._fingerprint import fingerprint
from ._sysfs import Tree
from ._wire import decode_info, encode_info

__all__ = ["gather", "join_hosts"]

_PREFIX = "sagellm/topology"
_MAX_RECORD_BYTES = 4096
_FIRST_POLL_S = 0.001
_LAST_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class _Record:
    """What one rank says of itself: its host, and the hash of the host's description."""

    host: str
    body: str


def gather(
    info: TopologyInfo, store: Store, *, root: Path, rank: int, world_size: int, timeout_s: float
) -> TopologyInfo:
    """The agreed topology of all ranks; see `TopologyManager.gather`."""
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not in 0..{world_size - 1}")
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s must be above 0, not {timeout_s}")
    start_s = time.monotonic()
    # Each call has keys of its own: every rank counts its calls, and all make the same ones.
    call = store.add(f"{_PREFIX}/calls/{rank}", 1)
    prefix = f"{_PREFIX}/{call}"
    plain = _portable(info)
    text = encode_info(plain)
    body = hashlib.sha256(text.encode()).hexdigest()[:32]
    if store.add(f"{prefix}/claim/{body}", 1) == 1:
        store.set(f"{prefix}/body/{body}", text)
    record = msgspec.json.encode(_Record(_host_key(root, info.hostname), body)).decode()
    store.set(f"{prefix}/rank/{rank}", record)
    if rank == 0:
        agreed = _collect(plain, store, prefix, world_size, start_s + timeout_s / 2)
        store.set(f"{prefix}/agreed", encode_info(agreed))
    if not _wait(store, f"{prefix}/agreed", start_s + timeout_s):
        raise CommTimeoutError(
            f"rank 0 of {world_size} published no topology within {timeout_s} s; "
            f"is it alive, and does it call gather too?"
        )
    return decode_info(store.get(f"{prefix}/agreed"))


def _portable(info: TopologyInfo) -> TopologyInfo:
    """The host without what differs between equal hosts and between their processes."""
    return replace(
        info,
        devices=tuple(
            replace(
                d,
                visible_index=None,
                uuid=None,
                attrs={k: v for k, v in d.attrs.items() if k != "mig"},
            )
            for d in info.devices
        ),
        provenance={},
        hostname="",
    )


def _host_key(root: Path, hostname: str) -> str:
    """Equal for processes of one host and network namespace, different for others."""
    boot = Tree(root).read("/proc/sys/kernel/random/boot_id") or ""
    try:
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{hostname}\0{boot}\0{namespace}".encode()).hexdigest()[:32]


def _wait(store: Store, key: str, deadline_s: float) -> bool:
    """Whether the key is there by the deadline. Polls: `get` keeps the store's own timeout."""
    pause_s = _FIRST_POLL_S
    while not store.check([key]):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, _LAST_POLL_S)
    return True


def _collect(
    mine: TopologyInfo, store: Store, prefix: str, world_size: int, deadline_s: float
) -> TopologyInfo:
    hosts: dict[str, TopologyInfo] = {}
    bodies: dict[str, TopologyInfo] = {}
    missing: list[int] = []
    warnings: list[str] = []
    for rank in range(world_size):
        key = f"{prefix}/rank/{rank}"
        if not _wait(store, key, deadline_s):
            missing.append(rank)
            continue
        try:
            record = _record(store.get(key))
            if record.host in hosts:
                continue
            if record.body not in bodies:
                if not _wait(store, f"{prefix}/body/{record.body}", deadline_s):
                    missing.append(rank)
                    continue
                bodies[record.body] = decode_info(store.get(f"{prefix}/body/{record.body}"))
            hosts[record.host] = bodies[record.body]
        except IntegrityError as e:
            warnings.append(f"rank {rank}: {e}")
            missing.append(rank)
    if missing:
        warnings.append(
            f"no description from rank{'s' if len(missing) > 1 else ''} "
            f"{', '.join(map(str, missing))}: the topology is partial"
        )
    return join_hosts(list(hosts.values()) or [mine], missing=missing, warnings=warnings)


def _record(text: bytes) -> _Record:
    if len(text) > _MAX_RECORD_BYTES:
        raise IntegrityError(f"record of {len(text)} bytes, more than {_MAX_RECORD_BYTES}")
    try:
        return msgspec.json.decode(text, type=_Record)
    except msgspec.MsgspecError as e:
        raise IntegrityError(f"not a record: {e}") from e


def join_hosts(
    hosts: list[TopologyInfo],
    *,
    missing: list[int] | None = None,
    warnings: list[str] | None = None,
) -> TopologyInfo:
    """One topology of many hosts; ids get the prefix `n<node>/`.

    Ports of one kind are joined by one network vertex (`net:ethernet`, or one per InfiniBand
    subnet), which is inferred: that ports of a kind reach each other is a conclusion.

    Args:
        hosts: Descriptions in node order.
        missing: Ranks that gave none.
        warnings: Put in front of the hosts' own.

    """
    devices: list[Device] = []
    links: list[Link] = []
    domains = []
    pairs: list[Pair] = []
    notes = list(warnings or ())
    for node, host in enumerate(hosts):
        names = {d.id: f"n{node}/{d.id}" for d in host.devices}
        devices += [replace(d, id=names[d.id], node=node) for d in host.devices]
        links += [replace(x, a=names[x.a], b=names[x.b]) for x in host.links]
        pairs += [replace(p, a=names[p.a], b=names[p.b]) for p in host.pairs]
        domains += [
            replace(d, id=f"n{node}/{d.id}", members=tuple(names[m] for m in d.members))
            for d in host.domains
        ]
        notes += [f"n{node}: {w}" for w in host.warnings]
    if len(hosts) > 1:
        _join_networks(devices, links)
    accelerators = [d for d in devices if d.kind in ("gpu", "npu")]
    others = sorted((d for d in devices if d.kind not in ("gpu", "npu")), key=lambda d: d.id)
    joined = TopologyInfo(
        devices=(*accelerators, *others),
        links=tuple(links),
        domains=tuple(domains),
        num_nodes=len(hosts),
        missing_nodes=tuple(missing or ()),
        warnings=tuple(dict.fromkeys(notes)),
        pairs=tuple(pairs),
    )
    return replace(joined, fingerprint=fingerprint(joined))


def _join_networks(devices: list[Device], links: list[Link]) -> None:
    networks: dict[str, Device] = {}
    for nic in [d for d in devices if d.kind == "nic"]:
        layer = nic.attrs.get("link_layer")
        down = (
            nic.attrs.get("operstate") == "down" or nic.attrs.get("ib_state", "ACTIVE") != "ACTIVE"
        )
        if layer is None or down:
            continue
        kind: LinkKind = "ethernet"
        if layer == "InfiniBand":
            kind = "infiniband"
        elif "ib" in nic.attrs:
            kind = "roce"
        subnet = nic.attrs.get("subnet_prefix", "") if kind == "infiniband" else ""
        name = f"net:{kind}" + (f":{subnet}" if subnet else "")
        networks.setdefault(name, Device(name, "fabric_switch", node=-1))
        speed = nic.attrs.get("port_bytes_per_s")
        links.append(
            Link(
                nic.id,
                name,
                kind,
                bandwidth_bytes_per_s=float(speed) if speed else None,
                source="inference",
                confidence="inferred",
            )
        )
    devices += networks.values()
