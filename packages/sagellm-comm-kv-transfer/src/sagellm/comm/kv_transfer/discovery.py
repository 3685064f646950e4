"""How nodes find each other, and where the key comes from.

* `LoopbackRegistry`: channels of one process.
* `StoreDiscovery`: ranks of a torch job, through its store, which is trusted as torch trusts it.
* `StaticPeers`: addresses that a person or an engine wrote down, in a map or a JSON file.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sagellm.core.protocols import ConfigError, PeerLostError

from .auth import as_key, read_key_file
from .transports.tcp import parse_address

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = [
    "Discovery",
    "LoopbackRegistry",
    "StaticPeers",
    "StoreDiscovery",
    "discover",
]

logger = logging.getLogger(__name__)


class Discovery(ABC):
    """Where other nodes are. `lookup` and `refresh` may block for a moment, and nothing else."""

    def __init__(self, node_id: int, key: bytes) -> None:
        self.node_id = node_id
        self.key = key
        self._added: dict[int, str] = {}

    def add(self, node_id: int, address: str) -> None:
        """Make a node known, over what was found."""
        self._added[node_id] = address

    def address_of(self, node_id: int) -> str | None:
        """Where a node is; None when it is not there yet."""
        return self._added.get(node_id) or self.lookup(node_id)

    def known(self) -> list[int]:
        """Ids of the other nodes that exist or are expected."""
        return sorted({*self._added, *self.others()} - {self.node_id})

    def refresh(self) -> None:
        """Look again which nodes there are, where that is written down."""
        return None

    def listen_at(self) -> tuple[str, int] | None:
        """Address this node is expected at; None leaves the choice."""
        return None

    def addresses(self) -> list[str]:
        """Addresses of other nodes that are written down; never blocks."""
        return []

    def publish(self, address: str) -> None:
        """Tell the others where this node is."""
        return None

    def withdraw(self) -> None:
        """Tell the others that it is gone. Idempotent."""
        return None

    @abstractmethod
    def lookup(self, node_id: int) -> str | None:
        """Where a node is; None when it is not there yet."""

    @abstractmethod
    def others(self) -> list[int]:
        """Ids of the nodes that exist or are expected."""


class _Process:
    """Nodes of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.key: bytes | None = None
        self.nodes: dict[int, str] = {}


_process = _Process()


class LoopbackRegistry(Discovery):
    """Channels of one process, numbered from 0.

    Args:
        node_id: Wanted id; None takes the lowest free one.
        key: None uses a random key of this process.

    Raises:
        ConfigError: The id is taken; the message lists the ids.

    """

    def __init__(self, node_id: int | None = None, key: bytes | None = None) -> None:
        with _process.lock:
            if node_id is None:
                node_id = next(i for i in range(len(_process.nodes) + 1) if i not in _process.nodes)
            elif node_id in _process.nodes:
                raise ConfigError(
                    f"node {node_id} exists already in this process; ids taken: "
                    f"{sorted(_process.nodes)}"
                )
            if _process.key is None:
                _process.key = secrets.token_bytes(32)
            super().__init__(node_id, key or _process.key)
            _process.nodes[node_id] = ""

    def lookup(self, node_id: int) -> str | None:
        """Address of a channel of this process."""
        return _process.nodes.get(node_id) or None

    def others(self) -> list[int]:
        """Ids of all channels of this process."""
        return sorted(_process.nodes)

    def publish(self, address: str) -> None:
        """Enter the address."""
        with _process.lock:
            _process.nodes[self.node_id] = address

    def withdraw(self) -> None:
        """Free the id."""
        with _process.lock:
            _process.nodes.pop(self.node_id, None)


class StoreDiscovery(Discovery):
    """Ranks of a torch job.

    Args:
        store: The job's store.
        rank: Global rank of this process.
        world_size: Number of ranks.
        key: None takes the job's, which the first rank to come puts into the store.

    """

    _PREFIX = "sagellm/kv_transfer"

    def __init__(
        self, store: Store, rank: int, world_size: int, *, key: bytes | None = None
    ) -> None:
        self._given = store  # the first rank's may be the server itself: it lives as long as we
        try:  # a connection of its own: a caller that waits in the store must not block us
            self._store = store.clone()  # type: ignore[attr-defined,unused-ignore]  # not in torch 2.13
        except (AttributeError, RuntimeError):  # older torch, or a store that cannot
            self._store = store
        self._world_size = world_size
        self._lock = threading.Lock()
        if key is None:
            mine = secrets.token_hex(32)
            try:
                key = bytes(self._store.compare_set(f"{self._PREFIX}/key", "", mine))
            except RuntimeError as e:  # torch's DistError
                raise PeerLostError(f"torch's store does not answer: {e}", rank=rank) from e
        super().__init__(rank, key)

    def lookup(self, node_id: int) -> str | None:
        """Address that the rank has published."""
        name = f"{self._PREFIX}/node/{node_id}"
        try:
            with self._lock:
                if not self._store.check([name]):
                    return None
                return bytes(self._store.get(name)).decode() or None
        except RuntimeError as e:  # torch's DistError
            raise PeerLostError(f"torch's store does not answer: {e}", rank=node_id) from e

    def others(self) -> list[int]:
        """All ranks."""
        return list(range(self._world_size))

    def publish(self, address: str) -> None:
        """Put the address into the store."""
        try:
            with self._lock:
                self._store.set(f"{self._PREFIX}/node/{self.node_id}", address)
        except RuntimeError as e:  # torch's DistError
            raise PeerLostError(f"torch's store does not answer: {e}", rank=self.node_id) from e

    def withdraw(self) -> None:
        """Leave an empty address, if the store is still there."""
        try:
            self.publish("")
        except PeerLostError:  # the job is over and its store gone
            return


class StaticPeers(Discovery):
    """Addresses that were written down.

    Args:
        node_id: This node's id; its own entry, if there is one, is where it listens.
        peers: `{id: "host:port"}`, or the path of a JSON file that holds it; the file is read
            again when a node is looked for. While it cannot be read, because somebody is writing
            it, what was read last holds.
        key: The key that all nodes share.

    Raises:
        ConfigError: An entry is no id and address, two nodes have one address, or the file
            cannot be read at first.

    """

    def __init__(
        self, node_id: int, peers: Mapping[int, str] | str | os.PathLike[str], key: bytes
    ) -> None:
        super().__init__(node_id, key)
        self._path = None if isinstance(peers, Mapping) else Path(peers)
        self._complaint = ""
        self._peers = _checked(peers) if isinstance(peers, Mapping) else self._read(Path(peers))

    def listen_at(self) -> tuple[str, int] | None:
        """This node's own entry."""
        own = self._peers.get(self.node_id)
        return parse_address(own) if own else None

    def lookup(self, node_id: int) -> str | None:
        """The written address."""
        self.refresh()
        return self._peers.get(node_id)

    def addresses(self) -> list[str]:
        """The written ones."""
        return [a for n, a in sorted(self._peers.items()) if n != self.node_id]

    def others(self) -> list[int]:
        """All ids that were read last."""
        return sorted(self._peers)

    def refresh(self) -> None:
        """Read the file again, if there is one."""
        if self._path is None:
            return
        try:
            self._peers = self._read(self._path)
        except ConfigError as e:
            if str(e) != self._complaint:
                logger.warning("node %d: %s; what was read last holds", self.node_id, e)
            self._complaint = str(e)

    @staticmethod
    def _read(path: Path) -> dict[int, str]:
        try:
            data = json.loads(path.read_text())
            return _checked({int(k): v for k, v in data.items()})
        except (OSError, ValueError, AttributeError) as e:
            raise ConfigError(f"peers file {path}: {e}; it holds {{id: 'host:port'}}") from e


def _checked(peers: Mapping[int, str]) -> dict[int, str]:
    owners: dict[tuple[str, int], int] = {}
    for node_id, address in peers.items():
        if not isinstance(node_id, int) or node_id < 0 or not isinstance(address, str):
            raise ConfigError(f"peers: {node_id!r}: {address!r} is not id: 'host:port'")
        owner = owners.setdefault(parse_address(address), node_id)
        if owner != node_id:
            raise ConfigError(f"peers: nodes {owner} and {node_id} are both at {address}")
    return dict(peers)


def discover(
    *,
    node_id: int | None,
    peers: Mapping[int, str] | str | os.PathLike[str] | None,
    store: Store | None,
    key: bytes | str | None,
    key_file: str | os.PathLike[str] | None,
) -> Discovery:
    """The discovery that the arguments and the surroundings ask for.

    `peers` means the static map; else a given store, the default torch group, or torchrun's
    environment mean the torch store; else the channels of this process.

    Raises:
        ConfigError: The key or the node id is missing where it is needed, or cannot be.

    """
    if node_id is not None and node_id < 0:
        raise ConfigError(f"node_id={node_id} must be 0 or more")
    if key is not None and key_file is not None:
        raise ConfigError("give key= or key_file=, not both")
    if peers is not None and store is not None:
        raise ConfigError("give peers= or store=, not both")
    secret = None
    if key_file is not None:
        secret = read_key_file(key_file)
    elif key is not None:
        secret = as_key(key)
    if peers is not None:
        if node_id is None:
            raise ConfigError("peers= needs node_id=, the id of this node")
        if secret is None:
            raise ConfigError("peers= needs the key that all nodes share: key= or key_file=")
        return StaticPeers(node_id, peers, secret)
    job = _torch_job(store)
    if job is not None:
        found, rank, world_size = job
        me = rank if node_id is None else node_id
        return StoreDiscovery(found, me, max(world_size, me + 1), key=secret)
    if store is not None:
        raise ConfigError("store= needs a rank: initialise torch.distributed, or give node_id=")
    return LoopbackRegistry(node_id, secret)


def _torch_job(store: Store | None) -> tuple[Store, int, int] | None:
    """Store, rank and world size of the torch job this process is part of."""
    import torch.distributed as dist

    if not dist.is_available():
        return None
    if dist.is_initialized():
        from torch.distributed.distributed_c10d import _get_default_store

        return store or _get_default_store(), dist.get_rank(), dist.get_world_size()
    # torch's own variables, which torchrun sets
    env = [os.environ.get(n) for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    if None in env:
        return None
    try:
        rank, world_size = int(env[0] or 0), int(env[1] or 1)
    except ValueError:
        raise ConfigError(f"RANK={env[0]!r} and WORLD_SIZE={env[1]!r} are not numbers") from None
    if store is None:
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, world_size = next(rendezvous("env://"))
        except (RuntimeError, ValueError) as e:  # torch's DistError among them
            raise PeerLostError(
                f"no store at {env[2]}:{env[3]}, as torchrun's variables say: {e}"
            ) from e
    return store, rank, world_size
