"""A node's links: dialled, accepted, equipped with what both sides can do, and reaped."""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sagellm.core.protocols import (
    CommError,
    ConfigError,
    DistributedRuntimeError,
    KVLayout,
    PeerLostError,
    ResourceError,
)

from . import wire
from ._accept import Accepted, Doorkeeper
from ._coded_in import CodedReader
from ._coded_link import LinkCoding, assumed_rate
from ._data import DataConnections
from ._dial import Dialled, Dialler
from ._flows import Inflow
from ._lanes import LaneTuner
from ._link import Link
from ._meters import Traffic
from ._opening import Opened, open_lanes
from ._paths import AUTO, Paths
from ._reader import DataReader
from ._writer import DataWriter
from .frames import Header
from .plan import check_sound
from .tls import Tls

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["Links"]

logger = logging.getLogger(__name__)

_FIRST_REAP_S, _LAST_REAP_S = 0.02, 1.0
"""Pauses before a look whether the threads of lost links have ended; each is twice the last."""


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
        self.data = DataConnections(engine, paths)
        self._links: set[Link] = set()
        self._outgoing: dict[int, Link] = {}
        self._gone: list[Link] = []
        self._reaping = False
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
            control=engine.control,
        )
        self._door.open()

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._links))

    @property
    def rejected(self) -> int:
        """Connections that proved nothing, on every listener."""
        return self._door.rejected + self._paths.rejected

    def traffic(self) -> Counter[str]:
        """Bytes `sent`, `received`, `wire_sent`, `wire_received`, `late` frames, of all links."""
        total = Counter(self._past)
        for link in self._links:
            total.update(_traffic_of(link))
        return total

    # -- meeting a peer ---------------------------------------------------------------------

    def look_up(self, *peers: int) -> None:
        """Find out about nodes that are not known yet; before `to`, and off the loop."""
        discovery = self._engine.discovery
        if not {*peers} <= {*self._outgoing, *discovery.known()}:
            discovery.refresh()

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
        self.data.spawn(link, "out", lambda: self._run_outgoing(link))
        return link

    def ready(self, peer: int) -> Link | None:
        """The link we opened to a peer, if it is up; from any thread."""
        link = self._outgoing.get(peer)
        return link if link is not None and link.up else None

    def why_absent(self, peer: int) -> str:
        """Why there is no link to a peer yet."""
        link = self._outgoing.get(peer)
        return link.dialler.why if link is not None and link.dialler is not None else "no link"

    def path(self, peer: int) -> str:
        """How bytes go to a peer; `unconnected` before they met."""
        link = self._best(peer)
        return link.path if link is not None else "unconnected"

    def explain(self, peer: int) -> str:
        """Why they go that way, and which other ways were refused, in words."""
        link = self._best(peer)
        if link is None or not link.up:
            known = self._engine.discovery.known()
            return f"node {peer}: unconnected ({self.why_absent(peer)}); known: {known}"
        s = self._engine.settings
        fits = "fit" if link.mismatch is None else f"do not fit: {link.mismatch}"
        layouts = "one side has none" if link.layout is None else fits
        how = "chosen" if s.transport == AUTO else "configured"
        chosen = link.coding.explain() if link.coding is not None else ""
        auto = f"; codec auto chose {chosen}" if chosen else ""
        refused = "".join(f"{n} not taken: {why}; " for n, why in sorted(link.refused.items()))
        return (
            f"node {peer} at {link.address}: {link.path}, {how}, {len(link.lanes)} data "
            f"connections; {refused}codec {s.codec}; checksums "
            f"{'on' if link.writer.checksum else 'off'}; protocol {link.version}; "
            f"layouts: {layouts}{auto}"
        )

    def _best(self, peer: int) -> Link | None:
        """The link to a peer that says most: one that is up, and ours rather than theirs."""
        found = [k for k in self._links if k.peer == peer]
        return max(found, key=lambda k: (k.up, k.outgoing), default=None)

    def _make_link(self, peer: int, *, outgoing: bool) -> Link:
        s = self._engine.settings

        def on_landed(flow: Inflow, head: Header, fresh: list[int], again: list[int]) -> None:
            self._engine.receiving.arrivals.on_frame(link, flow, head, fresh, again)

        def make_reader(inflows: dict[int, Inflow]) -> DataReader:
            traffic = Traffic(self._engine.meters, "receive")
            coded = CodedReader(
                self._engine.codecs.threads,
                on_landed,
                lambda e: self._engine.loop.call(lambda: link.lose(e)),
                io_timeout_s=s.io_timeout_s,
                traffic=traffic,
            )
            return DataReader(
                inflows,
                on_landed,
                io_timeout_s=s.io_timeout_s,
                traffic=traffic,
                coded=coded,
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
                lambda n: self._engine.loop.call(lambda: self.data.want(link, n)),
            ),
            make_reader=make_reader,
            max_backlog_bytes=s.max_backlog_bytes,
            max_invitations=s.max_in_flight,
            invited=self._engine.invited,
            control=self._engine.control,
            on_message=self._engine.on_message,
            on_lost=self._on_lost,
        )
        self._links.add(link)
        self._reap()
        return link

    # -- dialling ---------------------------------------------------------------------------

    def _run_outgoing(self, link: Link) -> None:
        """Dial, open the lanes, then send on the first; the life of an outgoing link's thread."""
        assert link.dialler is not None, "outgoing links dial"
        dialler, loop = link.dialler, self._engine.loop
        try:
            dialled, opened = dialler.dial(
                lambda dialled: open_lanes(
                    link.peer,
                    dialled,
                    self._paths,
                    self._introduction,
                    self.data.lanes_of,
                    self._engine.settings.handshake_timeout_s,
                    dialler.again,
                )
            )
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
        loop.call(lambda: link.lose(lost))

    def _on_dialled(self, link: Link, dialled: Dialled, opened: Opened) -> bool:
        welcome = dialled.welcome
        if link.error is not None:
            opened.close()
            dialled.control.sock.close()
            return False
        link.address, link.version = dialled.address, dialled.version
        link.meet(dialled.instance, dialled.control.session)
        link.lanes_promised, link.refused = opened.promised, opened.refused
        link.endpoints = welcome.endpoints
        self.data.take_path(link, opened.transport)
        for conn in opened.lanes:
            link.open_lane(conn)
        link.up = True
        self._equip(link, welcome)
        if link.error is not None:
            dialled.control.sock.close()
            return False
        for conn in opened.lanes[1:]:
            self.data.spawn_data(link, "out", conn, link.writer.run)
        link.attach(dialled.control)
        self._met(link, opened.layout)
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
        self._reap()
        others = sum(not k.outgoing and k.peer != peer for k in self)
        if max(others, len(self._gone)) >= limit:  # those that go still have threads
            raise ResourceError(
                f"{others} nodes are connected already and {len(self._gone)} are leaving; "
                f"max_links is {limit}"
            )

    def _on_accepted(self, accepted: Accepted) -> None:
        ready = accepted.ready
        for old in self:  # the peer has dialled again: it has given up on the former link
            if not old.outgoing and old.peer == accepted.node_id:
                old.lose(PeerLostError(f"node {old.peer} has connected anew", rank=old.peer))
        link = self._make_link(accepted.node_id, outgoing=False)
        link.address, link.version = ready.address, accepted.version
        link.meet(accepted.instance, accepted.control.session)
        link.up = True
        self._equip(link, ready)
        self.data.expect(link, wire.Lane(0, ready.transport))
        if link.error is not None:
            accepted.control.sock.close()
            return
        link.attach(accepted.control)
        self._met(link, None)

    def _introduction(self, transport: str) -> wire.Ready:
        s, engine = self._engine.settings, self._engine
        return wire.Ready(
            engine.layout,
            transport,
            s.checksum,
            engine.address,
            engine.sections,
        )

    # -- agreeing ---------------------------------------------------------------------------

    def _equip(self, link: Link, theirs: wire.Welcome | wire.Ready) -> None:
        s = self._engine.settings
        link.coding = LinkCoding(
            self._engine.codecs, link.peer, theirs.codecs, assumed_rate(link.address)
        )
        link.writer.checksum = link.reader.checksum = s.checksum or theirs.checksum
        self.learn(link, theirs.layout)

    def learn(self, link: Link, layout: KVLayout | None) -> None:
        """Note a peer's layout; one that makes no sense ends the link."""
        try:
            if layout is not None:
                check_sound(layout)
            link.learn(layout)
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
            endpoints,
            s.checksum,
            self._engine.address,
            self._engine.sections,
        )

    # -- losing one -------------------------------------------------------------------------

    def _on_lost(self, link: Link, error: CommError) -> None:
        was_up = link.transport != ""
        self._links.discard(link)
        if self._outgoing.get(link.peer) is link:
            del self._outgoing[link.peer]
        self._past.update(_traffic_of(link))
        self._gone.append(link)
        if not self._reaping:
            self._reaping = True
            self._reap_later(_FIRST_REAP_S)
        self.data.forget(link)
        if was_up:
            logger.info(
                "node %d: link to node %d ended: %s", self._engine.node_id, link.peer, error
            )
        self._engine.link_lost(link, error, was_up=was_up)

    def _reap_later(self, delay_s: float) -> None:
        """Look again and again, until all that are gone are freed."""

        def look() -> None:
            self._reap()
            self._reaping = bool(self._gone) and not self._closed
            if self._reaping:
                self._reap_later(min(2 * delay_s, _LAST_REAP_S))

        self._engine.loop.call_later(delay_s, look)

    def _reap(self) -> None:
        """Free links whose threads have ended; `release` does it at the end."""
        if self._closed:
            return
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
        "late": link.reader.late,
    }
