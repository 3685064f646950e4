"""One topology for all ranks, over a store shaped like torch.distributed's.

Every rank publishes the hash of its host's description; only the first rank of each hash publishes
the description itself, so 512 equal hosts cost one. Rank 0 joins what arrives, names who is
missing, and publishes the result, which every rank takes, rank 0 included. Ranks of one host that
see different devices are taken together.
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
    CollectiveMismatchError,
    CommTimeoutError,
    ConfigError,
    IntegrityError,
    Store,
    TopologyFragment,
    TopologyInfo,
)

from ._join import LABELS, join_hosts
from ._sysfs import Tree
from ._wire import decode_info, encode_info
from .merge import merge

__all__ = ["gather"]

_PREFIX = "sagellm/topology"
_LATEST = f"{_PREFIX}/latest"  # the call that rank 0 is at
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
    if rank == 0:
        store.set(_LATEST, str(call))
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
    agreed = decode_info(store.get(f"{prefix}/agreed"))
    if rank in agreed.missing_nodes:
        _check_in_step(store, rank, call)
    return agreed


def _check_in_step(store: Store, rank: int, call: int) -> None:
    """Refuse an answer that was agreed without this rank while rank 0 is at another call."""
    if not store.check([_LATEST]):
        return
    latest = store.get(_LATEST).decode("ascii", "replace")
    if latest != str(call):
        raise CollectiveMismatchError(
            f"rank {rank} is at its gather {call}, rank 0 at its gather {latest[:20]}: one of "
            "them was restarted or called alone; start all ranks again with a fresh store"
        )


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
    views: dict[str, dict[str, int]] = {}  # of each host: bodies, and who first gave each
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
            if record.body in views.get(record.host, ()):
                continue
            if record.body not in bodies:
                if not _wait(store, f"{prefix}/body/{record.body}", deadline_s):
                    missing.append(rank)
                    continue
                bodies[record.body] = decode_info(store.get(f"{prefix}/body/{record.body}"))
            if record.host not in views:
                places.append(record.labels)
            views.setdefault(record.host, {})[record.body] = rank
        except IntegrityError as e:
            warnings.append(f"rank {rank}: {e}")
            missing.append(rank)
    if missing:
        warnings.append(
            f"no description from rank{'s' if len(missing) > 1 else ''} "
            f"{', '.join(map(str, missing))}: the topology is partial"
        )
    hosts = [
        _together({rank: bodies[body] for body, rank in seen.items()}, warnings)
        for seen in views.values()
    ]
    return join_hosts(hosts or [mine], missing=missing, warnings=warnings, labels=places)


def _together(views: Mapping[int, TopologyInfo], warnings: list[str]) -> TopologyInfo:
    """One host out of what its ranks see: containers may hide different devices from them."""
    # Not by fingerprint: that of a host of which one GPU is shown is equal, whichever it is.
    different: dict[bytes, int] = {}
    for rank, v in views.items():
        seen = msgspec.msgpack.encode((v.devices, v.links, v.domains, v.pairs))
        different.setdefault(seen, rank)
    if len(different) < 2:
        return next(iter(views.values()))
    ranks = tuple(different.values())
    warnings.append(
        f"ranks {', '.join(map(str, ranks[:8]))}{' and more' if len(ranks) > 8 else ''} of one "
        "host do not see the same devices and links: the host is all that any of them sees"
    )
    return merge(
        [
            (-rank, TopologyFragment(f"rank {rank}", v.devices, v.links, v.domains, v.warnings,
                                     pairs=v.pairs))
            for rank, v in views.items() if rank in ranks
        ]
    )  # fmt: skip


def _record(text: bytes) -> _Record:
    if len(text) > _MAX_RECORD_BYTES:
        raise IntegrityError(f"record of {len(text)} bytes, more than {_MAX_RECORD_BYTES}")
    try:
        return msgspec.json.decode(text, type=_Record)
    except msgspec.MsgspecError as e:
        raise IntegrityError(f"not a record: {e}") from e
