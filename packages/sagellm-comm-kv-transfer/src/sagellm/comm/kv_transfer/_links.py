"""A node's links: dialled, accepted, equipped with what both sides can do, and reaped."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sagellm.core.protocols import (
    CommError,
    ConfigError,
    DistributedRuntimeError,
    KVConnection,
    KVLayout,
    KVTransport,
    PeerLostError,
    ResourceError,
)

from . import auth, wire
from ._accept import Accepted, Doorkeeper
from ._dataplane import DataReader, DataWriter
from ._dial import Dialled, Dialler
from ._flows import Inflow
from ._link import Link
from ._meters import Traffic
from .compression import codec_names, create_codec
from .plan import check_sound
from .tls import Tls

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["Links"]

logger = logging.getLogger(__name__)


class Links:
    """The links of one node; iterating gives those that are not lost. Runs on the event loop.

    Args:
        engine: Whose links.
        listener: Where peers call, which this object closes.
        transport: Moves the blocks; this object closes it.
        tls: Our side of TLS, when it is asked for.

    """

    def __init__(
        self, engine: Engine, listener: socket.socket, transport: KVTransport, tls: Tls | None
    ) -> None:
        self._engine = engine
        self._tls = tls
        self._instance = secrets.token_bytes(16)
        self._transport = transport
        self._links: set[Link] = set()
        self._outgoing: dict[int, Link] = {}
        self._gone: list[Link] = []
        self._codecs = list(codec_names())
        self._past = Counter[str]()
        self._closed = False
        settings = engine.settings
        self._door = Doorkeeper(
            engine.loop,
            listener,
            node_id=engine.node_id,
            instance=self._instance,
            key=engine.discovery.key,
            tls=tls,
            admit=self._admit,
            welcome=self._welcome,
            on_accepted=self._on_accepted,
            max_unauthenticated=settings.max_unauthenticated,
            timeout_s=settings.handshake_timeout_s,
            peer_timeout_s=settings.peer_timeout_s,
            max_message_bytes=settings.max_message_bytes,
        )
        self._door.open()

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._links))

    @property
    def rejected(self) -> int:
        """Connections that proved nothing, on every listener."""
        return self._door.rejected + getattr(self._transport, "rejected", 0)

    def traffic(self) -> Counter[str]:
        """Bytes `sent`, `received`, `wire_sent` and `wire_received`, over all links ever."""
        total = Counter(self._past)
        for link in self._links:
            total.update(_traffic_of(link))
        return total

    # -- meeting a peer ---------------------------------------------------------------------

    def to(self, peer: int, until: float) -> Link:
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
        if peer not in (known := self._engine.discovery.known()):
            us = " (this node itself)" if peer == self._engine.node_id else ""
            raise ConfigError(f"no node {peer}{us}; known nodes: {known or 'none'}")
        link = self._make_link(peer, outgoing=True)
        s = self._engine.settings
        link.dialler = Dialler(
            node_id=self._engine.node_id,
            target=peer,
            instance=self._instance,
            key=self._engine.discovery.key,
            tls=self._tls,
            address_of=self._engine.discovery.address_of,
            timeout_s=s.handshake_timeout_s,
            retry_s=s.retry_s,
            peer_timeout_s=s.peer_timeout_s,
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
        s = self._engine.settings

        def make_reader(inflows: dict[int, Inflow]) -> DataReader:
            return DataReader(
                inflows,
                lambda flow, head, fresh, again: self._engine.receiving.on_frame(
                    link, flow, head, fresh, again
                ),
                io_timeout_s=s.io_timeout_s,
                scratch_bytes=s.chunk_bytes,
                traffic=Traffic(self._engine.meters, "receive"),
            )

        link = Link(
            self._engine.loop,
            peer,
            outgoing=outgoing,
            writer=DataWriter(s.chunk_bytes, s.io_timeout_s, Traffic(self._engine.meters, "send")),
            make_reader=make_reader,
            max_backlog_bytes=s.max_backlog_bytes,
            on_message=self._engine.on_message,
            on_lost=self._on_lost,
        )
        self._links.add(link)
        self._reap()
        return link

    def _spawn(self, link: Link, name: str, body: Callable[[], None]) -> None:
        thread = threading.Thread(
            target=body, name=f"kv-{self._engine.node_id}-{name}-{link.peer}", daemon=True
        )
        link.threads.append(thread)
        thread.start()

    def _run_outgoing(self, link: Link) -> None:
        """Dial, then send; the whole life of an outgoing link's thread."""
        assert link.dialler is not None, "outgoing links dial"
        name = self._engine.settings.transport
        try:
            dialled = link.dialler.dial()
        except CommError as e:
            error = e
            self._engine.loop.call(lambda: link.lose(error))
            return
        except Exception as e:
            logger.exception("a bug in a dialling thread")
            bug = DistributedRuntimeError(f"node {link.peer}: {type(e).__name__}: {e}")
            self._engine.loop.call(lambda: link.lose(bug))
            return
        try:
            layout = self._engine.layout
            s = self._engine.settings
            ready = wire.Ready(
                layout, self._codecs, s.codec, name, s.checksum, self._engine.address
            )
            dialled.control.sock.settimeout(s.handshake_timeout_s)
            dialled.control.sock.sendall(dialled.control.seal(ready))
            endpoint = dialled.welcome.endpoints.get(name)
            if endpoint is None:
                raise ConfigError(
                    f"node {link.peer} has no transport {name!r}; "
                    f"it has {sorted(dialled.welcome.endpoints)}"
                )
            token = auth.data_token(dialled.control.session, 0)
            conn = self._transport.connect(endpoint, token, s.handshake_timeout_s)
        except (CommError, OSError) as e:
            dialled.control.sock.close()
            lost = e if isinstance(e, CommError) else PeerLostError(str(e), rank=link.peer)
            self._engine.loop.call(lambda: link.lose(lost))
            return
        try:
            taken = self._engine.loop.run(
                lambda: self._on_dialled(link, dialled, conn, layout), 60.0
            )
        except CommError as e:  # the channel closed meanwhile: nobody else knows of these
            logger.debug(
                "node %d: the link to node %d came late: %s", self._engine.node_id, link.peer, e
            )
            conn.close()
            dialled.control.sock.close()
            return
        if taken:
            link.run_data(link.writer.run)

    def _on_dialled(
        self, link: Link, dialled: Dialled, conn: KVConnection, sent: KVLayout | None
    ) -> bool:
        welcome = dialled.welcome
        if not link.open_data(conn, f"{self._engine.settings.transport}:1"):
            dialled.control.sock.close()
            return False
        link.address, link.version = dialled.address, dialled.version
        link.instance = dialled.instance
        self._equip(link, welcome.layout, welcome.codecs, welcome.codec, welcome.checksum)
        if link.error is not None:
            dialled.control.sock.close()
            return False
        link.attach(dialled.control)
        self._met(link, sent)
        return link.error is None

    def _admit(self, peer: int, instance: bytes) -> None:
        """Refuse a second owner of a node id, and more peers than there is room for."""
        if peer == self._engine.node_id or peer < 0:
            raise ConfigError(f"node id {peer} is taken by the node that was called, or is none")
        for link in self:
            if link.up and link.peer == peer and link.instance != instance:
                # worth another try: the other one may have died without a word
                raise PeerLostError(
                    f"node id {peer} is taken by another process, at {link.address}: "
                    "give each its own node_id",
                    rank=peer,
                )
        limit = self._engine.settings.max_links
        others = sum(not k.outgoing and k.peer != peer for k in self)
        if others >= limit:
            raise ResourceError(f"{others} nodes are connected already; max_links is {limit}")

    def _on_accepted(self, accepted: Accepted) -> None:
        ready = accepted.ready
        for old in self:  # the peer has dialled again: it has given up on the former link
            if not old.outgoing and old.peer == accepted.node_id:
                old.lose(PeerLostError(f"node {old.peer} has connected anew", rank=old.peer))
        link = self._make_link(accepted.node_id, outgoing=False)
        link.address, link.version = ready.address, accepted.version
        link.instance = accepted.instance
        link.up, link.path = True, f"{ready.transport}:1"
        self._equip(link, ready.layout, ready.codecs, ready.codec, ready.checksum)
        if link.error is not None:
            accepted.control.sock.close()
            return
        token = auth.data_token(accepted.control.session, 0)
        self._spawn(link, "in", lambda: self._run_incoming(link, token))
        link.attach(accepted.control)
        self._met(link, None)

    def _run_incoming(self, link: Link, token: bytes) -> None:
        """Receive; the whole life of an incoming link's thread."""
        try:
            conn = self._transport.accept(token, self._engine.settings.handshake_timeout_s)
        except CommError as e:
            error = PeerLostError(f"node {link.peer}: {e}", rank=link.peer)
            self._engine.loop.call(lambda: link.lose(error))
            return
        try:
            taken = self._engine.loop.run(lambda: self._on_data(link, conn), 60.0)
        except CommError as e:  # the channel closed meanwhile: nobody else knows of it
            logger.debug(
                "node %d: data of node %d came late: %s", self._engine.node_id, link.peer, e
            )
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
        s = self._engine.settings
        link.writer.checksum = link.reader.checksum = s.checksum or checksum
        if s.codec != "none":
            if s.codec in codecs:
                link.writer.codec = create_codec(s.codec)
            else:
                logger.warning("node %d cannot decode %s: sent as it is", link.peer, s.codec)
        if codec != "none" and codec in self._codecs:
            link.reader.codec = create_codec(codec)
        self.learn(link, layout)

    def learn(self, link: Link, layout: KVLayout | None) -> None:
        """Note a peer's layout; one that makes no sense ends the link."""
        try:
            if layout is not None:
                check_sound(layout)
            link.layout = layout
        except ConfigError as e:
            link.lose(ConfigError(f"node {link.peer}: {e}"))

    def _met(self, link: Link, sent: KVLayout | None) -> None:
        """Compare layouts, and tell the peer of a pool registered meanwhile."""
        layout = self._engine.layout
        if layout != sent:
            link.send(wire.LayoutChanged(layout))
        link.compare(layout)
        self._engine.receiving.layout_changed(link)
        link.settle()

    def _welcome(self, mac: bytes) -> wire.Welcome:
        layout = self._engine.layout
        s = self._engine.settings
        endpoints = {s.transport: self._transport.endpoint()}
        return wire.Welcome(
            mac, layout, self._codecs, s.codec, endpoints, s.checksum, self._engine.address
        )

    # -- losing one -------------------------------------------------------------------------

    def _on_lost(self, link: Link, error: CommError) -> None:
        was_up = link.path != "unconnected"
        self._links.discard(link)
        if self._outgoing.get(link.peer) is link:
            del self._outgoing[link.peer]
        self._past.update(_traffic_of(link))
        self._gone.append(link)
        if was_up:
            logger.info(
                "node %d: link to node %d ended: %s", self._engine.node_id, link.peer, error
            )
        self._engine.link_lost(link, error, was_up=was_up)

    def _reap(self) -> None:
        """Free links whose threads have ended."""
        ended = [k for k in self._gone if not any(t.is_alive() for t in k.threads)]
        for link in ended:
            self._gone.remove(link)
            link.release(0.0)

    def close_door(self) -> None:
        """Take in nobody any more."""
        self._closed = True
        self._door.close()

    def lose_all(self, error: CommError) -> None:
        """Take leave of every peer."""
        for link in self:
            link.send(wire.Bye())
            link.lose(error)

    def release(self, timeout_s: float) -> None:
        """Close the transport and join the threads; off the loop, after `lose_all`."""
        self._transport.close()
        end = time.monotonic() + timeout_s
        for link in self._gone:
            link.release(max(0.1, end - time.monotonic()))


def _traffic_of(link: Link) -> dict[str, int]:
    sent, received = link.writer.traffic, link.reader.traffic
    return {
        "sent": sent.payload,
        "received": received.payload,
        "wire_sent": sent.wire,
        "wire_received": received.wire,
    }
