"""One topology for all ranks, over a store shaped like torch.distributed's.

Every rank publishes the hash of its host's description; only the first rank of each hash publishes
the description itself, so 512 equal hosts cost one. Rank 0 joins what arrives, names who is
missing, and publishes the result, which every rank takes, rank 0 included.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from sagellm.core.protocols import (
    CommTimeoutError,
    ConfigError,
    IntegrityError,
    Store,
    TopologyInfo,
)

from ._join import LABELS, join_hosts
from ._sysfs import Tree
from ._wire import decode_info, encode_info

__all__ = ["gather"]

_PREFIX = "sagellm/topology"
_MAX_RECORD_BYTES = 4096
_FIRST_POLL_S = 0.001
_LAST_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class _Record:
    """What one rank says of itself: its host, the hash of the host's description, its place."""

    host: str
    body: str
    labels: dict[str, str] = field(default_factory=dict)


def gather(
    info: TopologyInfo,
    store: Store,
    *,
    root: Path,
    rank: int,
    world_size: int,
    timeout_s: float,
    labels: Mapping[str, str],
) -> TopologyInfo:
    """The agreed topology of all ranks; see `TopologyManager.gather`."""
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not in 0..{world_size - 1}")
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s must be above 0, not {timeout_s}")
    unknown = sorted(labels.keys() - set(LABELS))
    if unknown:
        raise ConfigError(f"no label {unknown[0]!r} of a host; known: {', '.join(LABELS)}")
    start_s = time.monotonic()
    # Each call has keys of its own: every rank counts its calls, and all make the same ones.
    call = store.add(f"{_PREFIX}/calls/{rank}", 1)
    prefix = f"{_PREFIX}/{call}"
    plain = _portable(info)
    text = encode_info(plain)
    body = hashlib.sha256(text.encode()).hexdigest()[:32]
    first = store.add(f"{prefix}/claim/{body}", 1) == 1
    if first:
        store.set(f"{prefix}/body/{body}", text)
    mine = _Record(_host_key(root, info.hostname), body, dict(labels))
    record = msgspec.json.encode(mine).decode()
    if len(record) > _MAX_RECORD_BYTES:
        raise ConfigError(f"labels of {len(record)} bytes, more than {_MAX_RECORD_BYTES}")
    store.set(f"{prefix}/rank/{rank}", record)
    if rank == 0:
        bodies = {body: plain}
        agreed = _collect(plain, bodies, store, prefix, world_size, start_s + timeout_s / 2)
        store.set(f"{prefix}/agreed", encode_info(agreed))
    elif not first and not _wait(store, f"{prefix}/body/{body}", start_s + timeout_s / 8):
        store.set(f"{prefix}/body/{body}", text)  # who wanted to did not: it died, perhaps
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
                attrs={k: v for k, v in d.attrs.items() if k not in ("mig", "visible_indices")},
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
    mine: TopologyInfo,
    bodies: dict[str, TopologyInfo],
    store: Store,
    prefix: str,
    world_size: int,
    deadline_s: float,
) -> TopologyInfo:
    hosts: dict[str, TopologyInfo] = {}
    places: list[Mapping[str, str]] = []
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
            places.append(record.labels)
        except IntegrityError as e:
            warnings.append(f"rank {rank}: {e}")
            missing.append(rank)
    if missing:
        warnings.append(
            f"no description from rank{'s' if len(missing) > 1 else ''} "
            f"{', '.join(map(str, missing))}: the topology is partial"
        )
    return join_hosts(
        list(hosts.values()) or [mine], missing=missing, warnings=warnings, labels=places
    )


def _record(text: bytes) -> _Record:
    if len(text) > _MAX_RECORD_BYTES:
        raise IntegrityError(f"record of {len(text)} bytes, more than {_MAX_RECORD_BYTES}")
    try:
        return msgspec.json.decode(text, type=_Record)
    except msgspec.MsgspecError as e:
        raise IntegrityError(f"not a record: {e}") from e
