"""What a channel is made of: its links, its two directions, and the loop that owns them."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

from sagellm.core.protocols import (
    CommError,
    Completion,
    ConfigError,
    DistributedRuntimeError,
    KVConnection,
    KVLayout,
    KVTransferError,
    KVTransport,
    PeerLostError,
    TransferKey,
    TransferStats,
)

from . import auth, wire
from ._accept import Accepted, Doorkeeper
from ._arguments import MAX_ID_CHARACTERS
from ._dataplane import DataReader, DataWriter
from ._dial import Dialled, Dialler
from ._flows import Inflow
from ._link import Link
from ._loop import EventLoop
from ._meters import Meters, Traffic
from ._receiving import Receiving
from ._records import CANCELLED, MAX_MESSAGE, CompletionQueue, error_of, key_failure
from ._sending import Sending
from .compression import codec_names, create_codec
from .discovery import Discovery
from .plan import check_sound
from .pool import RegisteredPool
from .settings import KVTransferSettings
from .transfer import TransferHandle
from .transports.tcp import listen

__all__ = ["Engine"]

logger = logging.getLogger(__name__)


class Engine:
    """Links and transfers of one node. Methods without a note run on the event loop.

    Args:
        discovery: Who we are and where the others are.
        settings: Bounds and choices.
        transport: Moves the blocks.
        host: Address to listen on.
        port: Port to listen on; 0 lets the kernel choose.
        advertise: Host that peers are told.

    """

    def __init__(
        self,
        discovery: Discovery,
        settings: KVTransferSettings,
        transport: KVTransport,
        *,
        host: str,
        port: int,
        advertise: str,
    ) -> None:
        listener = listen(host, port)  # first: it is what may fail
        self.discovery = discovery
        self.node_id = discovery.node_id
        self.settings = settings
        self.transport = transport
        self.pool: RegisteredPool | None = None
        self.links: set[Link] = set()
        self.completions = CompletionQueue(settings.max_remembered)
        self.loop = EventLoop(f"kv-node-{self.node_id}")
        self.receiving = Receiving(self)
        self.sending = Sending(self)
        self._outgoing: dict[int, Link] = {}
        self._gone: list[Link] = []
        self._codecs = list(codec_names())
        self._ends: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()
        self._past = Counter[str]()
        self.ignored: Counter[str] = Counter()
        self._meters = Meters(settings.transport)
        self._closed = False
        bracketed = f"[{advertise}]" if ":" in advertise else advertise
        self.address = f"{bracketed}:{listener.getsockname()[1]}"
        self._door = Doorkeeper(
            self.loop,
            listener,
            node_id=self.node_id,
            key=discovery.key,
            welcome=self._welcome,
            on_accepted=self._on_accepted,
            max_unauthenticated=settings.max_unauthenticated,
            timeout_s=settings.handshake_timeout_s,
            max_message_bytes=settings.max_message_bytes,
        )
        self._door.open()
        self.loop.start()

    # -- links ------------------------------------------------------------------------------

    def link_to(self, peer: int, until: float) -> Link:
        """The link we opened to a peer, or are opening until then.

        Raises:
            ConfigError: Unknown node id; the message lists the known ones.
            PeerLostError: This channel is closed.

        """
        if self._closed:
            raise PeerLostError("the channel is closed")
        link = self._outgoing.get(peer)
        if link is not None:
            if link.dialler is not None:
                link.dialler.until = max(link.dialler.until, until)
            return link
        if peer not in (known := self.discovery.known()):
            us = " (this node itself)" if peer == self.node_id else ""
            raise ConfigError(f"no node {peer}{us}; known nodes: {known or 'none'}")
        link = self._make_link(peer, outgoing=True)
        s = self.settings
        link.dialler = Dialler(
            node_id=self.node_id,
            target=peer,
            key=self.discovery.key,
            address_of=self.discovery.address_of,
            timeout_s=s.handshake_timeout_s,
            retry_s=s.retry_s,
            max_message_bytes=s.max_message_bytes,
        )
        link.dialler.until = until
        self._outgoing[peer] = link
        self._spawn(link, "out", lambda: self._run_outgoing(link))
        return link

    def why_absent(self, peer: int) -> str:
        """Why there is no link to a peer yet."""
        link = self._outgoing.get(peer)
        return link.dialler.why if link is not None and link.dialler is not None else "no link"

    def _make_link(self, peer: int, *, outgoing: bool) -> Link:
        s = self.settings

        def make_reader(inflows: dict[int, Inflow]) -> DataReader:
            return DataReader(
                inflows,
                lambda flow, head, fresh, again: self.receiving.on_frame(
                    link, flow, head, fresh, again
                ),
                io_timeout_s=s.io_timeout_s,
                scratch_bytes=s.chunk_bytes,
                traffic=Traffic(self._meters, "receive"),
            )

        link = Link(
            self.loop,
            peer,
            outgoing=outgoing,
            writer=DataWriter(s.chunk_bytes, s.io_timeout_s, Traffic(self._meters, "send")),
            make_reader=make_reader,
            max_backlog_bytes=s.max_backlog_bytes,
            max_invitations=s.max_in_flight,
            on_message=self._on_message,
            on_lost=self._on_lost,
        )
        self.links.add(link)
        self._reap()
        return link

    def _spawn(self, link: Link, name: str, body: Callable[[], None]) -> None:
        thread = threading.Thread(
            target=body, name=f"kv-{self.node_id}-{name}-{link.peer}", daemon=True
        )
        link.threads.append(thread)
        thread.start()

    def _run_outgoing(self, link: Link) -> None:
        """Dial, then send; the whole life of an outgoing link's thread."""
        assert link.dialler is not None, "outgoing links dial"
        name = self.settings.transport
        try:
            dialled = link.dialler.dial()
        except CommError as e:
            error = e
            self.loop.call(lambda: link.lose(error))
            return
        except Exception as e:
            logger.exception("a bug in a dialling thread")
            bug = DistributedRuntimeError(f"node {link.peer}: {type(e).__name__}: {e}")
            self.loop.call(lambda: link.lose(bug))
            return
        try:
            pool = self.pool
            layout = pool.layout if pool is not None else None
            s = self.settings
            ready = wire.Ready(layout, self._codecs, s.codec, name, s.checksum, self.address)
            dialled.sock.settimeout(s.handshake_timeout_s)
            dialled.sock.sendall(wire.encode(ready))
            endpoint = dialled.welcome.endpoints.get(name)
            if endpoint is None:
                raise ConfigError(
                    f"node {link.peer} has no transport {name!r}; "
                    f"it has {sorted(dialled.welcome.endpoints)}"
                )
            token = auth.data_token(dialled.session, 0)
            conn = self.transport.connect(endpoint, token, s.handshake_timeout_s)
        except (CommError, OSError) as e:
            dialled.sock.close()
            lost = e if isinstance(e, CommError) else PeerLostError(str(e), rank=link.peer)
            self.loop.call(lambda: link.lose(lost))
            return
        try:
            taken = self.loop.run(lambda: self._on_dialled(link, dialled, conn, layout), 60.0)
        except CommError as e:  # the channel closed meanwhile: nobody else knows of these
            logger.debug("node %d: the link to node %d came late: %s", self.node_id, link.peer, e)
            conn.close()
            dialled.sock.close()
            return
        if taken:
            link.run_data(link.writer.run)

    def _on_dialled(
        self, link: Link, dialled: Dialled, conn: KVConnection, sent: KVLayout | None
    ) -> bool:
        welcome = dialled.welcome
        if not link.open_data(conn, f"{self.settings.transport}:1"):
            dialled.sock.close()
            return False
        link.address, link.version = dialled.address, dialled.version
        self._equip(link, welcome.layout, welcome.codecs, welcome.codec, welcome.checksum)
        if link.error is not None:
            dialled.sock.close()
            return False
        link.attach(dialled.sock, dialled.buffer, [])
        self._met(link, sent)
        return link.error is None

    def _on_accepted(self, accepted: Accepted) -> None:
        ready = accepted.ready
        link = self._make_link(accepted.node_id, outgoing=False)
        link.address, link.version = ready.address, accepted.version
        link.up, link.path = True, f"{ready.transport}:1"
        self._equip(link, ready.layout, ready.codecs, ready.codec, ready.checksum)
        if link.error is not None:
            accepted.sock.close()
            return
        token = auth.data_token(accepted.session, 0)
        self._spawn(link, "in", lambda: self._run_incoming(link, token))
        link.attach(accepted.sock, accepted.buffer, accepted.rest)
        self._met(link, None)

    def _run_incoming(self, link: Link, token: bytes) -> None:
        """Receive; the whole life of an incoming link's thread."""
        try:
            conn = self.transport.accept(token, self.settings.handshake_timeout_s)
        except CommError as e:
            error = PeerLostError(f"node {link.peer}: {e}", rank=link.peer)
            self.loop.call(lambda: link.lose(error))
            return
        try:
            taken = self.loop.run(lambda: self._on_data(link, conn), 60.0)
        except CommError as e:  # the channel closed meanwhile: nobody else knows of it
            logger.debug("node %d: data of node %d came late: %s", self.node_id, link.peer, e)
            conn.close()
            return
        if taken:
            link.run_data(link.reader.run)

    def _on_data(self, link: Link, conn: KVConnection) -> bool:
        opened = link.open_data(conn, link.path)
        if opened and link.wants_writer:
            self._spawn(link, "serve", lambda: link.run_data(link.writer.run))
        return opened

    def ensure_writer(self, link: Link) -> None:
        """Have an incoming link send, too."""
        if not link.outgoing and not link.wants_writer:
            link.wants_writer = True
            if link.has_data:
                self._spawn(link, "serve", lambda: link.run_data(link.writer.run))

    def ensure_reader(self, link: Link) -> None:
        """Have an outgoing link receive, too."""
        if link.outgoing and not link.wants_reader:
            link.wants_reader = True
            self._spawn(link, "fetch", lambda: link.run_data(link.reader.run))

    def _equip(
        self, link: Link, layout: KVLayout | None, codecs: list[str], codec: str, checksum: bool
    ) -> None:
        s = self.settings
        link.writer.checksum = link.reader.checksum = s.checksum or checksum
        if s.codec != "none":
            if s.codec in codecs:
                link.writer.codec = create_codec(s.codec)
            else:
                logger.warning("node %d cannot decode %s: sent as it is", link.peer, s.codec)
        if codec != "none" and codec in self._codecs:
            link.reader.codec = create_codec(codec)
        self._learn(link, layout)

    def _learn(self, link: Link, layout: KVLayout | None) -> None:
        """Note a peer's layout; one that makes no sense ends the link."""
        try:
            if layout is not None:
                check_sound(layout)
            link.layout = layout
        except ConfigError as e:
            link.lose(ConfigError(f"node {link.peer}: {e}"))

    def _met(self, link: Link, sent: KVLayout | None) -> None:
        """Compare layouts, and tell the peer of a pool registered meanwhile."""
        layout = self.pool.layout if self.pool is not None else None
        if layout != sent:
            self._tell_layout(link, layout)
        link.compare(layout)
        self.receiving.layout_changed(link)
        link.settle()

    @staticmethod
    def _tell_layout(link: Link, layout: KVLayout | None) -> None:
        link.layouts_told += 1
        link.invitations.clear()  # they are for parts of what was registered before
        link.send(wire.LayoutChanged(layout))

    def _welcome(self, mac: bytes) -> wire.Welcome:
        layout = self.pool.layout if self.pool is not None else None
        s = self.settings
        endpoints = {s.transport: self.transport.endpoint()}
        return wire.Welcome(mac, layout, self._codecs, s.codec, endpoints, s.checksum, self.address)

    def _on_lost(self, link: Link, error: CommError) -> None:
        was_up = link.path != "unconnected"
        self.links.discard(link)
        if self._outgoing.get(link.peer) is link:
            del self._outgoing[link.peer]
        if was_up:
            logger.info("node %d: link to node %d ended: %s", self.node_id, link.peer, error)
        self.sending.link_lost(link, error)
        self.receiving.link_lost(link, error, was_up=was_up)
        self._gone.append(link)
        for name, traffic in (("sent", link.writer.traffic), ("received", link.reader.traffic)):
            self._past[f"{name}"] += traffic.payload
            self._past[f"wire_{name}"] += traffic.wire

    def _reap(self) -> None:
        """Free links whose threads have ended."""
        ended = [k for k in self._gone if not any(t.is_alive() for t in k.threads)]
        for link in ended:
            self._gone.remove(link)
            link.release(0.0)

    # -- messages ---------------------------------------------------------------------------

    def _on_message(self, link: Link, message: wire.Session) -> None:
        name = getattr(message, "id", "")
        if len(name) > MAX_ID_CHARACTERS:
            link.lose(DistributedRuntimeError(f"node {link.peer}: an id of {len(name)} characters"))
            return
        match message:
            case wire.Offer():
                self.receiving.on_offer(link, message)
            case wire.Grant():
                self.sending.on_grant(link, message)
            case wire.Invite():
                self.sending.on_invite(link, message)
            case wire.LayerDone():
                self.sending.on_layer_done(link, message)
            case wire.Done():
                self.sending.on_done(link, message.tid)
            case wire.Release():
                self.receiving.on_release(link, message.tid)
            case wire.Sealed():
                self.receiving.on_sealed(link, message)
            case wire.Nack():
                self.sending.on_nack(link, message)
            case wire.Fetch():
                self.sending.on_fetch(link, message)
            case wire.Fail():
                error = error_of(message)
                ours = self.sending.on_fail(link, message.tid, error)
                if not ours and not self.receiving.on_fail(link, message.tid, error):
                    self.ignore("fail")
            case wire.KeyFail():
                key = TransferKey(message.id, message.attempt)
                error = error_of(message)
                self.sending.fail_key(key, error)
                self.receiving.fail_key(key, error)
            case wire.LayoutChanged():
                link.layouts_heard += 1
                self._learn(link, message.layout)
                if link.error is None:
                    link.compare(self.pool.layout if self.pool is not None else None)
                    self.receiving.layout_changed(link)
            case wire.Bye():
                why = message.message[:MAX_MESSAGE]
                text = f"node {link.peer} has closed its channel {why}".strip()
                link.lose(PeerLostError(text, rank=link.peer))

    def ignore(self, what: str) -> None:
        """Count a message that came too late, twice, or for an earlier epoch."""
        self.ignored[what] += 1

    def gossip(self, key: TransferKey, error: CommError, told: Iterable[Link]) -> None:
        """Tell every other peer that an attempt has failed."""
        message = key_failure(key, error)
        skip = set(told)
        for link in [k for k in self.links if k.up and k not in skip]:
            link.send(message)

    # -- the pool, ends, counters -----------------------------------------------------------

    def set_pool(self, pool: RegisteredPool | None) -> None:
        """Use another pool, and tell the peers."""
        self.pool = pool
        layout = pool.layout if pool is not None else None
        for link in list(self.links):
            if link.up:
                self._tell_layout(link, layout)
                link.compare(layout)
                self.receiving.layout_changed(link)

    def completed(self, handle: TransferHandle, error: KVTransferError | None) -> None:
        """Count an end and queue its completion."""
        status = "landed"
        if error is not None:
            status = "cancelled" if error.cause == CANCELLED else "failed"
            if status == "failed":
                self._causes[error.cause] += 1
        self._ends[status] += 1
        self._meters.ended(handle, status, "" if error is None else error.cause)
        self.completions.put(
            Completion(
                key=handle.key,
                status=status,  # type: ignore[arg-type]  # one of the three literals
                direction=handle.direction,
                cause="" if error is None else error.cause,
                message="" if error is None else str(error),
                invalid_blocks=() if error is None else error.invalid_blocks,
                blocks_safe=True,
            )
        )

    def in_flight(self) -> list[TransferHandle]:
        """Transfers that have not ended."""
        return self.sending.in_flight() + self.receiving.in_flight()

    def stats(self) -> TransferStats:
        """A snapshot of the counters."""
        total = Counter(self._past)
        for link in self.links:
            total["sent"] += link.writer.traffic.payload
            total["received"] += link.reader.traffic.payload
            total["wire_sent"] += link.writer.traffic.wire
            total["wire_received"] += link.reader.traffic.wire
        rejected = getattr(self.transport, "rejected", 0)
        return TransferStats(
            transfers=dict(self._ends),
            failures=dict(self._causes),
            bytes_sent=total["sent"],
            bytes_received=total["received"],
            wire_bytes_sent=total["wire_sent"],
            wire_bytes_received=total["wire_received"],
            in_flight=len(self.in_flight()),
            peers=len({link.peer for link in self.links if link.up}),
            rejected_connections=self._door.rejected + rejected,
        )

    def close(self) -> None:
        """End everything; from another thread. Idempotent."""
        links: list[Link] = []

        def begin() -> bool:
            if self._closed:
                return False
            self._closed = True
            error = PeerLostError(f"the channel of node {self.node_id} was closed")
            self._door.close()
            self.sending.close(error)
            self.receiving.close(error)
            for link in list(self.links):
                link.send(wire.Bye())
                link.lose(error)
            links.extend(self._gone)
            return True

        try:
            if not self.loop.run(begin, 30.0):
                return
        except PeerLostError:
            return
        self.transport.close()
        end = time.monotonic() + 10.0
        for link in links:
            link.release(max(0.1, end - time.monotonic()))
        self.loop.stop()
        self.completions.close()
        self.discovery.withdraw()
