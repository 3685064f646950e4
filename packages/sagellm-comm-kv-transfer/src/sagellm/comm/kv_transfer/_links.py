"""A node's links: dialled, accepted, equipped with what both sides can do, and reaped."""

from __future__ import annotations

import functools
import logging
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sagellm.core.protocols import (
    CommError,
    ConfigError,
    DistributedRuntimeError,
    KVConnection,
    KVLayout,
    PeerLostError,
    ResourceError,
)

from . import auth, wire
from ._accept import Accepted, Doorkeeper
from ._dial import Dialled, Dialler
from ._flows import Inflow
from ._lanes import LaneTuner
from ._link import Link
from ._meters import Traffic
from ._paths import Paths
from ._reader import DataReader
from ._writer import DataWriter
from .compression import codec_names, create_codec
from .plan import check_sound
from .tls import Tls

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["Links"]

logger = logging.getLogger(__name__)


_MAX_LANES = 16
"""Data connections that one link may announce in its life, those that failed included."""


@dataclass
class _Opened:
    """The lanes of a link that has just been dialled."""

    transport: str
    lanes: list[KVConnection]
    refused: Mapping[str, str]
    promised: int
    layout: KVLayout | None

    def close(self) -> None:
        """Break them."""
        for conn in self.lanes:
            conn.abort()
            conn.close()


class Links:
    """The links of one node; iterating gives those that are not lost. Runs on the event loop.

    Args:
        engine: Whose links.
        listener: Where peers call, which this object closes.
        paths: What moves the blocks; this object closes it.
        tls: Our side of TLS, when it is asked for.

    """

    def __init__(
        self, engine: Engine, listener: socket.socket, paths: Paths, tls: Tls | None
    ) -> None:
        self._engine = engine
        self._tls = tls
        self._instance = secrets.token_bytes(16)
        self._paths = paths
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
        return self._door.rejected + self._paths.rejected

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
            writer=DataWriter(
                s.chunk_bytes,
                s.io_timeout_s,
                Traffic(self._engine.meters, "send"),
                LaneTuner(1, 1),
                lambda n: self._engine.loop.call(lambda: self.want_lanes(link, n)),
            ),
            make_reader=make_reader,
            max_backlog_bytes=s.max_backlog_bytes,
            max_invitations=s.max_in_flight,
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

    # -- dialling ---------------------------------------------------------------------------

    def _run_outgoing(self, link: Link) -> None:
        """Dial, open the lanes, then send on the first; the life of an outgoing link's thread."""
        assert link.dialler is not None, "outgoing links dial"
        loop = self._engine.loop
        dialled: Dialled | None = None
        try:
            dialled = link.dialler.dial()
            opened = self._open_lanes(link.peer, dialled)
        except (CommError, OSError) as e:
            lost = e if isinstance(e, CommError) else PeerLostError(str(e), rank=link.peer)
        except Exception as e:
            logger.exception("a bug in a dialling thread")
            lost = DistributedRuntimeError(f"node {link.peer}: {type(e).__name__}: {e}")
        else:
            try:
                taken = loop.run(lambda: self._on_dialled(link, dialled, opened), 60.0)
            except CommError as e:  # the channel closed meanwhile: nobody else knows of these
                logger.debug("the link to node %d came late: %s", link.peer, e)
                opened.close()
                dialled.control.sock.close()
                return
            if taken:
                link.run_data(opened.lanes[0], link.writer.run)
            return
        if dialled is not None:
            dialled.control.sock.close()
        loop.call(lambda: link.lose(lost))

    def _open_lanes(self, peer: int, dialled: Dialled) -> _Opened:
        """Introduce ourselves, and connect by the best transport that works."""
        engine, limit_s = self._engine, self._engine.settings.handshake_timeout_s
        s, endpoints = engine.settings, dialled.welcome.endpoints
        choice = self._paths.choose(endpoints)
        layout, name = engine.layout, choice.names[0]
        dialled.control.sock.settimeout(limit_s)
        ready = wire.Ready(layout, self._codecs, s.codec, name, s.checksum, engine.address)
        dialled.control.sock.sendall(dialled.control.seal(ready))
        refused, number = dict(choice.refused), 0
        for name in choice.names:
            if number:
                again = wire.Lane(number, name, refused)
                dialled.control.sock.sendall(dialled.control.seal(again))
            token = auth.data_token(dialled.control.session, number)
            number += 1
            try:
                lanes = [self._paths[name].connect(endpoints[name], token, limit_s)]
                break
            except CommError as e:
                refused[name] = str(e)
                logger.warning("node %d: no %s to node %d: %s", engine.node_id, name, peer, e)
        else:
            why = "; ".join(f"{n}: {refused[n]}" for n in choice.names)
            raise PeerLostError(f"node {peer} cannot be reached by {why}", rank=peer)
        opened = _Opened(name, lanes, refused, number, layout)
        try:
            while len(lanes) < self._lanes_of(name)[0]:
                number, opened.promised = opened.promised, opened.promised + 1
                dialled.control.sock.sendall(dialled.control.seal(wire.Lane(number, name)))
                token = auth.data_token(dialled.control.session, number)
                lanes.append(self._paths[name].connect(endpoints[name], token, limit_s))
        except BaseException:
            opened.close()
            raise
        return opened

    def _lanes_of(self, name: str) -> tuple[int, int]:
        """Lanes to begin with and at most."""
        fixed = self._engine.settings.lanes
        return (fixed, fixed) if fixed else self._paths.lanes(name)

    def _on_dialled(self, link: Link, dialled: Dialled, opened: _Opened) -> bool:
        welcome = dialled.welcome
        if link.error is not None:
            opened.close()
            dialled.control.sock.close()
            return False
        link.address, link.version = dialled.address, dialled.version
        link.instance, link.session = dialled.instance, dialled.control.session
        link.lanes_promised, link.refused = opened.promised, opened.refused
        link.endpoints = welcome.endpoints
        self._take_path(link, opened.transport)
        for conn in opened.lanes:
            link.open_lane(conn)
        link.up = True
        self._equip(link, welcome.layout, welcome.codecs, welcome.codec, welcome.checksum)
        if link.error is not None:
            dialled.control.sock.close()
            return False
        for conn in opened.lanes[1:]:
            self._spawn_data(link, "out", conn, link.writer.run)
        link.attach(dialled.control)
        self._met(link, opened.layout)
        return link.error is None

    def want_lanes(self, link: Link, count: int) -> None:
        """Open more lanes, or have them opened by the side that dials."""
        if link.error is not None or count <= len(link.lanes):
            return
        if not link.outgoing:
            link.send(wire.MoreLanes(count))
        elif count <= self._lanes_of(link.transport)[1] and not link.lanes_awaited:
            number = link.lanes_promised
            link.lanes_promised, link.lanes_awaited = number + 1, 1
            link.send(wire.Lane(number, link.transport))
            self._spawn(link, "more", lambda: self._run_more(link, number))

    def _run_more(self, link: Link, number: int) -> None:
        """Open one more lane, then send on it."""
        transport, limit_s = self._paths[link.transport], self._engine.settings.handshake_timeout_s
        token = auth.data_token(link.session, number)
        try:
            conn = transport.connect(link.endpoints[link.transport], token, limit_s)
        except CommError as e:
            logger.warning(
                "node %d: no further lane to node %d: %s", self._engine.node_id, link.peer, e
            )
            self._engine.loop.call(lambda: self._no_more(link))
            return
        if self._hand_over(link, conn):
            link.run_data(conn, link.writer.run)

    def _no_more(self, link: Link) -> None:
        link.lanes_awaited = 0
        link.writer.tuner.limit(len(link.lanes))

    # -- being dialled ----------------------------------------------------------------------

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
        link.instance, link.session = accepted.instance, accepted.control.session
        link.up = True
        self._equip(link, ready.layout, ready.codecs, ready.codec, ready.checksum)
        self.expect_lane(link, wire.Lane(0, ready.transport))
        if link.error is not None:
            accepted.control.sock.close()
            return
        link.attach(accepted.control)
        self._met(link, None)

    def expect_lane(self, link: Link, lane: wire.Lane) -> None:
        """The peer is about to open a data connection; another transport is a new path."""
        if link.outgoing or lane.number != link.lanes_promised or lane.number >= _MAX_LANES:
            text = f"node {link.peer} announces data connection {lane.number} out of turn"
            link.lose(DistributedRuntimeError(text))
            return
        if lane.transport not in self._paths:
            text = (
                f"node {link.peer} chose transport {lane.transport!r}; here are {list(self._paths)}"
            )
            link.lose(ConfigError(text))
            return
        if lane.transport != link.transport:
            self._take_path(link, lane.transport)
            link.refused = {n: f"node {link.peer}: {r[:1024]}" for n, r in lane.refused.items()}
        link.lanes_promised += 1
        link.lanes_awaited += 1
        token = auth.data_token(link.session, lane.number)
        self._spawn(link, "in", lambda: self._run_incoming(link, lane.transport, token))

    def _run_incoming(self, link: Link, name: str, token: bytes) -> None:
        """Wait for one lane, then receive on it."""
        try:
            conn = self._paths[name].accept(token, self._engine.settings.handshake_timeout_s)
        except CommError as e:
            error = PeerLostError(f"node {link.peer}: {e}", rank=link.peer)
            self._engine.loop.call(lambda: self._lane_missing(link, error))
            return
        if self._hand_over(link, conn):
            link.run_data(conn, link.reader.run)

    def _lane_missing(self, link: Link, error: CommError) -> None:
        link.lanes_awaited -= 1
        logger.debug("node %d: a lane did not come: %s", self._engine.node_id, error)

        def give_up() -> None:
            if not (link.lanes or link.lanes_awaited):
                link.lose(error)

        # the peer may know before us that it came to nothing, and try another transport
        self._engine.loop.call_later(self._engine.settings.handshake_timeout_s, give_up)

    def more_lanes(self, link: Link, message: wire.MoreLanes) -> None:
        """The peer has much to send over a link of ours."""
        if link.outgoing:
            self.want_lanes(link, message.count)

    # -- lanes ------------------------------------------------------------------------------

    def _take_path(self, link: Link, name: str) -> None:
        start, most = self._lanes_of(name)
        link.transport = name
        link.writer.tuner = LaneTuner(start, most, fixed=bool(self._engine.settings.lanes))
        link.writer.traffic.transport = link.reader.traffic.transport = name

    def _hand_over(self, link: Link, conn: KVConnection) -> bool:
        """Give a lane that came later to its link; off the loop."""
        try:
            return self._engine.loop.run(lambda: self._on_lane(link, conn), 60.0)
        except CommError as e:  # the channel closed meanwhile: nobody else knows of it
            logger.debug("a lane of node %d came late: %s", link.peer, e)
            conn.close()
            return False

    def _on_lane(self, link: Link, conn: KVConnection) -> bool:
        link.lanes_awaited -= 1
        opened = link.open_lane(conn)
        if opened and link.serves:
            self._spawn_back(link, conn)
        return opened

    def ensure_both_ways(self, link: Link) -> None:
        """Have blocks go the other way, too: an incoming link sends, an outgoing one receives."""
        if not link.serves:
            link.serves = True
            for conn in link.lanes:
                self._spawn_back(link, conn)

    def _spawn_back(self, link: Link, conn: KVConnection) -> None:
        if link.outgoing:
            self._spawn_data(link, "fetch", conn, link.reader.run)
        else:
            self._spawn_data(link, "serve", conn, link.writer.run)

    def _spawn_data(
        self, link: Link, name: str, conn: KVConnection, body: Callable[[KVConnection], None]
    ) -> None:
        self._spawn(link, name, lambda: link.run_data(conn, body))

    # -- agreeing ---------------------------------------------------------------------------

    def _equip(
        self, link: Link, layout: KVLayout | None, codecs: list[str], codec: str, checksum: bool
    ) -> None:
        s = self._engine.settings
        link.writer.checksum = link.reader.checksum = s.checksum or checksum
        if s.codec != "none":
            if s.codec in codecs:
                link.writer.make_codec = functools.partial(create_codec, s.codec)
            else:
                logger.warning("node %d cannot decode %s: sent as it is", link.peer, s.codec)
        if codec != "none" and codec in self._codecs:
            link.reader.make_codec = functools.partial(create_codec, codec)
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
            self.tell_layout(link)
        link.compare(layout)
        self._engine.receiving.layout_changed(link)
        link.settle()

    def tell_layout(self, link: Link) -> None:
        """Tell a peer that another pool is registered, or none."""
        link.layouts_told += 1
        link.invitations.clear()  # they are for parts of what was registered before
        link.send(wire.LayoutChanged(self._engine.layout))

    def _welcome(self, mac: bytes, reached_at: str) -> wire.Welcome:
        s = self._engine.settings
        endpoints = self._paths.endpoints(reached_at)
        return wire.Welcome(
            mac,
            self._engine.layout,
            self._codecs,
            s.codec,
            endpoints,
            s.checksum,
            self._engine.address,
        )

    # -- losing one -------------------------------------------------------------------------

    def _on_lost(self, link: Link, error: CommError) -> None:
        was_up = link.transport != ""
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
        self._paths.close()
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
