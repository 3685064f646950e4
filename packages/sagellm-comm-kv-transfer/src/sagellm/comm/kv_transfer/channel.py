"""The channel: one object per node, over which KV blocks are pushed and pulled."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy import ndarray

from sagellm.core.protocols import (
    BlockIds,
    Blocks,
    CommBackendProtocol,
    CommTimeoutError,
    Completion,
    ConfigError,
    KVLayout,
    KVTransferChannelProtocol,
    KVTransferError,
    PeerInfo,
    Pool,
    ReadyEvent,
    ResourceError,
    TransferKey,
    TransferStats,
    UnsupportedOperationError,
)
from sagellm.core.protocols.doctor import require_supported_platform
from sagellm.core.protocols.ports import PortSettings

from ._address import advertised_host
from ._arguments import check_deadline, checked_key, is_block, is_tensor, wrap
from ._block_table import BlockTable
from ._coded_request import CodecRequest, asked_of, request_of, wanted_of
from ._engine import Engine
from ._fetching import fetch
from ._paths import Paths
from ._push import Offered, Push, of_blocks, of_tensors
from ._receive import Receive
from ._records import CANCELLED
from ._snapshot import Snapshot, take
from .compression.auto import MaxError
from .discovery import discover
from .pool import RegisteredPool
from .settings import KVTransferSettings
from .state import Role
from .stream import Stream
from .tls import Tls
from .transfer import TransferHandle
from .transports.tcp import parse_address

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store

__all__ = ["KVTransferChannel"]


class KVTransferChannel(KVTransferChannelProtocol):
    """Moves KV blocks between this node and others.

    Without arguments it finds its own place: under torchrun, or with an initialised default
    group, the node id is the global rank and peers are found through the torch store; else it
    takes the lowest free id among the channels of this process. It listens on loopback unless
    `host` says otherwise, and every connection proves the shared key.

    The key authenticates and does not encrypt; TLS does, when `settings` name certificates.

    Args:
        node_id: Id of this node; None as above.
        peers: `{id: "host:port"}` or a JSON file with it, instead of discovery. An entry for
            this node is where it listens. Needs `node_id` and a key.
        store: torch store to find peers through, instead of the default group's.
        key: Secret that all nodes share, at least 16 bytes.
        key_file: File with the key, readable by its owner only.
        host: Address to listen on; None takes the configured one, loopback by default.
        port: Port to listen on; 0 takes the configured one, or the kernel's choice.
        advertise: Host that peers are told; None takes `host`, or for a wildcard the address of
            the interface that leads to the peers.
        settings: Bounds and choices; None takes the configured ones.
        codec: Codec of what this node sends, over the one in `settings`.
        comm: A communication backend, used by nothing else, that may carry blocks between its
            ranks; it stays the caller's.

    Raises:
        ConfigError: The node id is taken, the arguments do not fit, peers on other hosts could not
            reach this one, or this is Windows.
        ResourceError: The port is in use.

    """

    def __init__(
        self,
        *,
        node_id: int | None = None,
        peers: Mapping[int, str] | str | os.PathLike[str] | None = None,
        store: Store | None = None,
        key: bytes | str | None = None,
        key_file: str | os.PathLike[str] | None = None,
        host: str | None = None,
        port: int = 0,
        advertise: str | None = None,
        settings: KVTransferSettings | None = None,
        codec: str | None = None,
        comm: CommBackendProtocol | None = None,
    ) -> None:
        require_supported_platform()
        chosen = settings or KVTransferSettings.load()
        if codec is not None:
            chosen = chosen.model_copy(update={"codec": codec})
        if key is None and key_file is None:
            key_file = chosen.key_file
            key = chosen.key.get_secret_value() if chosen.key is not None else None
        if peers is None:
            peers = chosen.peers_file
        self._codec = request_of(None, None, chosen.codec)
        tls = Tls.of(chosen)
        discovery = discover(node_id=node_id, peers=peers, store=store, key=key, key_file=key_file)
        try:
            expected = discovery.listen_at()
            if expected is not None:
                host, port = host or expected[0], port or expected[1]
            host = host or PortSettings.load().host
            shown = advertised_host(host, advertise, discovery.addresses())
            paths = Paths(
                chosen.transport,
                {
                    "host": host,
                    "advertise": advertise,
                    "socket_buffer_bytes": chosen.socket_buffer_bytes,
                    "handshake_timeout_s": chosen.handshake_timeout_s,
                    "tls": tls,
                    "comm": comm,
                },
            )
            try:
                self._engine = Engine(
                    discovery, chosen, paths, host=host, port=port, advertise=shown, tls=tls
                )
            except BaseException:
                paths.close()
                raise
        except BaseException:
            discovery.withdraw()
            raise
        try:
            discovery.publish(self._engine.address)
        except BaseException:
            self._engine.close()
            raise

    def __repr__(self) -> str:
        return f"<KVTransferChannel node {self.node_id} at {self.address}>"

    @property
    def node_id(self) -> int:
        """This node's id."""
        return self._engine.node_id

    @property
    def address(self) -> str:
        """Where peers reach this node, `host:port`."""
        return self._engine.address

    def add_peer(self, node_id: int, address: str) -> None:
        """Make a node known, or give a restarted one its new address."""
        parse_address(address)
        if node_id == self.node_id or node_id < 0:
            raise ConfigError(f"node {node_id} is this node itself or no id")
        self._engine.discovery.add(node_id, address)

    # -- pools and peers --------------------------------------------------------------------

    def register(self, layout: KVLayout, tensors: Mapping[str, Tensor]) -> Pool:
        """Make KV memory known, one pool per channel; what `allocate` made stays shared."""
        pool = RegisteredPool(layout, tensors, half_bytes=self._engine.settings.chunk_bytes)
        self._engine.loop.run(lambda: self._use(pool))
        return pool

    def allocate(self, layout: KVLayout, num_blocks: int | Mapping[str, int]) -> Pool:
        """Make a zeroed pool that processes of this host can read, and register it.

        Its blocks are copied out of it in place by receivers of the same host and user, who can
        neither write nor resize it. The memory is given back by `unregister` or `close`, once
        no tensor over it is left.

        Args:
            layout: What the pool's `tensors` hold.
            num_blocks: Blocks of each cache group, or of each by name.

        Raises:
            ConfigError: The numbers do not fit the layout, or a pool is registered already.
            ResourceError: There is not that much memory; the message says how much there is.
            UnsupportedOperationError: This system cannot share memory; use `register`.

        """
        pool = RegisteredPool.allocate(layout, num_blocks, self._engine.settings.copy_workers)
        try:
            self._engine.loop.run(lambda: self._use(pool))
        except BaseException:
            pool.close()
            raise
        return pool

    def _use(self, pool: RegisteredPool) -> None:
        if self._engine.pool is not None:
            raise ConfigError("a pool is registered already: unregister it first")
        self._engine.set_pool(pool)

    def unregister(self, pool: Pool) -> None:
        """Forget a pool; refused while transfers lease it."""

        def end() -> None:
            if self._engine.pool is not pool:
                raise ConfigError("this pool is not registered here")
            if holders := self._engine.pool.lease_holders():
                raise ResourceError(
                    f"{len(holders)} transfers still lease the pool: {', '.join(holders[:8])}; "
                    "wait for them or cancel them"
                )
            self._engine.set_pool(None)

        self._engine.loop.run(end)
        if isinstance(pool, RegisteredPool):
            pool.close()

    def connect(self, peer: int, timeout_s: float | None = None) -> PeerInfo:
        """Meet a peer: authenticate, agree on a version, compare layouts."""
        link = self._engine.meet(peer, 30.0 if timeout_s is None else timeout_s)
        if link.mismatch is not None:
            raise link.mismatch
        return PeerInfo(peer, link.address, link.version, link.layout, link.path)

    # -- push -------------------------------------------------------------------------------

    def transfer(
        self,
        blocks: Blocks,
        target_node: int,
        *,
        key: TransferKey | None = None,
        dst_blocks: BlockIds | Mapping[str, BlockIds] | None = None,
        deadline_s: float = 30.0,
        codec: str | CodecRequest | None = None,
        max_error: MaxError | None = None,
    ) -> TransferHandle:
        """Push blocks to a node. `dst_blocks` are used when its `receive` names none and adopts.

        With a codec sections of the blocks are encoded while others are on the wire, and decoded
        while the next arrive. `auto` takes what is fastest within `max_error` on this link now,
        often nothing; `explain` of the result says why. A peer without the codec fails the push.
        """
        wanted = wanted_of(codec, max_error, self._codec)
        push = self._push(
            blocks, target_node, key, deadline_s, dst_blocks, sealed=True, codec=wanted
        )
        push.flow.queue(push.all_spans(None if push.pool is None else push.pool.mark()))
        return self._engine.sending.push(push).handle

    def begin(
        self,
        key: TransferKey,
        target_node: int,
        blocks: Blocks,
        *,
        deadline_s: float = 30.0,
        codec: str | CodecRequest | None = None,
        max_error: MaxError | None = None,
    ) -> Stream:
        """Start a push whose layers follow one by one; all must have landed by the deadline."""
        wanted = wanted_of(codec, max_error, self._codec)
        push = self._push(blocks, target_node, key, deadline_s, None, sealed=False, codec=wanted)
        if push.pool is None:
            raise ConfigError("a stream sends blocks of the registered pool, not plain tensors")
        if self._engine.sending.push(push) is not push:
            raise ConfigError(f"transfer {key.id}/{key.attempt} is being sent already")
        return Stream(self._engine, push)

    def receive(
        self,
        key: TransferKey | None,
        blocks: BlockIds | Mapping[str, BlockIds] | None = None,
        *,
        source_node: int | Sequence[int] | None = None,
        adopt: bool = False,
        deadline_s: float = 30.0,
    ) -> TransferHandle:
        """Accept a push, from one node or from several that each hold a part.

        It lands once the parts that came cover everything the blocks hold. A sender that names
        its destinations is refused unless they are `blocks`, or there are none and `adopt` is set;
        then it may name any that no transfer reads or writes.
        """
        check_deadline(deadline_s)
        if adopt and blocks is not None:
            raise ConfigError("`adopt` is for a receive that names no blocks")
        pool = self._engine.pool
        table = None
        if blocks is not None:
            table = self._pool().as_table(blocks, unique=True)
        senders = None
        if source_node is not None:
            many = [source_node] if isinstance(source_node, int) else source_node
            senders = frozenset(many)
            if not senders:
                raise ConfigError("source_node names no node; None takes a push from any")
        name = checked_key(key) if key is not None else TransferKey(f"next-{uuid.uuid4().hex[:8]}")
        handle = TransferHandle(name, "receive", deadline_s, self._cancel)
        leased = pool if table is not None else None
        if pool is not None:
            pool.follow()
        r = Receive(handle, table, senders, pool=leased, named=key is not None, adopts=adopt)
        handle.owner = r
        return self._engine.begin(r, lambda: self._engine.receiving.receive(r))

    # -- pull -------------------------------------------------------------------------------

    def offer(
        self,
        key: TransferKey,
        blocks: Blocks,
        *,
        num_tokens: int,
        ttl_s: float,
        after: ReadyEvent | None = None,
        codec: str | CodecRequest | None = None,
        max_error: MaxError | None = None,
    ) -> TransferHandle:
        """Let peers fetch blocks of the pool for `ttl_s` seconds, which `renew` extends.

        They come coded, as for `transfer`, unless a fetch asks for something else. The offer
        lands, and ends, once every part has been fetched whole by the nodes that hold it.
        Fetches with `src_blocks` or `layers` leave it standing.
        """
        check_deadline(ttl_s)
        table = self._own_blocks(blocks)
        if table is None:
            raise UnsupportedOperationError("only blocks of a pool can be offered; push tensors")
        handle = TransferHandle(checked_key(key), "send", ttl_s, self._cancel, Role.OFFER)
        handle.num_tokens = num_tokens
        wanted = wanted_of(codec, max_error, self._codec)
        pool = self._pool()
        pool.check_codec(None if wanted is None else wanted.codec)
        offered = Offered(handle, pool, table, num_tokens, after or pool.mark(), wanted)
        handle.owner = offered
        self._engine.begin(offered, lambda: self._engine.sending.offering.offer(offered))
        return handle

    def fetch(
        self,
        key: TransferKey,
        peer: int | Sequence[int],
        blocks: BlockIds | Mapping[str, BlockIds],
        *,
        src_blocks: BlockIds | Mapping[str, BlockIds] | None = None,
        layers: Sequence[int] | None = None,
        deadline_s: float = 30.0,
        codec: str | None = None,
        max_error: MaxError | None = None,
    ) -> TransferHandle:
        """Pull offered blocks into ours, from one node or from several that each hold a part.

        Nothing is fetched unless their parts cover everything the blocks hold.
        """
        check_deadline(deadline_s)
        engine, pool = self._engine, self._pool()
        table = pool.as_table(blocks, unique=True)
        pool.follow()
        count = len(pool.layout.layers)
        if layers is not None and any(not 0 <= i < count for i in layers):
            raise ConfigError(f"layers {list(layers)} are not all in 0..{count - 1}")
        wanted = None if src_blocks is None else pool.as_foreign_table(src_blocks)
        handle = TransferHandle(checked_key(key), "receive", deadline_s, self._cancel)
        r = Receive(handle, table, None, pool=pool)
        pool.check_codec(codec)
        r.fetch_codec = asked_of(codec, max_error)
        handle.owner = r

        peers = list(dict.fromkeys([peer] if isinstance(peer, int) else peer))
        if not peers:
            raise ConfigError("no node to fetch from: give the nodes that offer the blocks")
        engine.links.look_up(*peers)
        engine.begin(r, lambda: fetch(engine, r, peers, src_blocks=wanted, layers=layers))
        return handle

    # -- ends -------------------------------------------------------------------------------

    def poll(self, max_n: int | None = None) -> list[Completion]:
        """Completions not reported before. Never blocks.

        The one of a handle that is done, or whose `wait` has returned, is among them. None is lost:
        once `max_remembered` of them wait, those go whose handle was waited for, or asked for its
        exception, and when those are too few, new transfers are refused with a `ResourceError`.
        """
        return self._engine.completions.take(max_n)

    def fileno(self) -> int:
        """A descriptor that is readable while `poll` has something to report.

        Raises:
            PeerLostError: The channel is closed.

        """
        return self._engine.completions.fileno()

    def drain(self, deadline_s: float) -> None:
        """Block until nothing is in flight but offers that nobody fetches just now."""
        end = time.monotonic() + deadline_s
        while handles := self._engine.loop.run(self._engine.moving):
            for handle in handles:
                try:
                    handle.outlast(max(0.0, end - time.monotonic()))
                except CommTimeoutError:
                    names = sorted(f"{h.key.id}/{h.key.attempt}" for h in handles)
                    raise CommTimeoutError(
                        f"{len(names)} transfers still in flight after {deadline_s:g} s: "
                        f"{', '.join(names[:8])}"
                    ) from None

    def close(self) -> None:
        """Fail what is in flight on both sides and release sockets and threads. Idempotent."""
        self._engine.close()

    # -- what is known ----------------------------------------------------------------------

    def path(self, peer: int) -> str:
        """How bytes go to a peer, such as `tcp:2`: the transport and its lanes in use."""
        return self._engine.loop.run(lambda: self._engine.links.path(peer))

    def explain(self, peer: int) -> str:
        """Why that path, and which others were refused, in words."""
        return self._engine.loop.run(lambda: self._engine.links.explain(peer))

    def snapshot(self) -> Snapshot:
        """Who holds which blocks and waits for whom, now; plain data that JSON can carry."""
        return self._engine.loop.run(lambda: take(self._engine))

    def get_stats(self) -> TransferStats:
        """A snapshot of the counters."""
        return self._engine.loop.run(self._engine.stats)

    def inspect(self, peer: int, timeout_s: float = 10.0) -> dict[str, Any]:
        """The `snapshot` of a peer with its counters, as it tells us over the control connection.

        Long lists are cut; `left_out` says by how much.

        Raises:
            CommTimeoutError: The peer has not come, or not answered, in time.
            PeerLostError: It is gone.

        """
        return self._engine.inquiries.inspect(self._engine.meet(peer, timeout_s), timeout_s)

    # -- inside -----------------------------------------------------------------------------

    def _pool(self) -> RegisteredPool:
        if self._engine.pool is None:
            raise ConfigError("no pool is registered: call register(layout, tensors) first")
        return self._engine.pool

    def _own_blocks(self, blocks: Blocks) -> BlockTable | None:
        """Ids per group; None when `blocks` are plain tensors."""
        many = type(blocks) is list and blocks and type(blocks[0]) is int  # the most frequent first
        if type(blocks) is not ndarray and not many and not isinstance(blocks, Mapping):
            if is_tensor(blocks) or (len(blocks) and is_block(blocks[0])):
                return None
        return self._pool().as_table(blocks, unique=False)  # type: ignore[arg-type]

    def _push(
        self,
        blocks: Blocks,
        target_node: int,
        key: TransferKey | None,
        deadline_s: float,
        dst_blocks: BlockIds | Mapping[str, BlockIds] | None,
        *,
        sealed: bool,
        codec: CodecRequest | None,
    ) -> Push:
        check_deadline(deadline_s)
        name = TransferKey(f"{self.node_id}-{uuid.uuid4()}") if key is None else checked_key(key)
        handle = TransferHandle(name, "send", deadline_s, self._cancel)
        table = self._own_blocks(blocks)
        if table is None:
            if dst_blocks is not None:
                raise ConfigError("dst_blocks need blocks of a pool, not plain tensors")
            handle.owner = push = of_tensors(handle, target_node, wrap(blocks), codec)
            return push
        push = of_blocks(handle, target_node, self._pool(), table, dst_blocks, sealed, codec)
        handle.owner = push
        return push

    def _cancel(self, handle: TransferHandle) -> bool:
        if handle.done():
            return False
        error = KVTransferError(f"cancelled by node {self.node_id}", cause=CANCELLED)
        return self._engine.loop.call(lambda: self._engine.end(handle.owner, error))
