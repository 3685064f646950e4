"""A link's data connections: announced, opened and accepted, and the threads that serve them.

The side that dials a link opens its lanes, each with a one-time token of its own, and says so in
a control message first. Losing an open lane loses the link.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from sagellm.core.protocols import (
    CommError,
    ConfigError,
    DistributedRuntimeError,
    KVConnection,
    PeerLostError,
)

from . import auth, wire
from ._lanes import MAX_ANNOUNCED, LaneTuner
from ._link import Link
from ._paths import Paths

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["DataConnections"]

logger = logging.getLogger(__name__)

_MAX_OPEN = 8
"""Data connections of a link; no setting asks for more."""

_MAX_REFUSED = 16
"""Transports of which a peer may say why it has not taken them."""


class DataConnections:
    """The data connections of all links of a node. Runs on the event loop.

    Args:
        engine: Whose links.
        paths: What the connections are made by.

    """

    def __init__(self, engine: Engine, paths: Paths) -> None:
        self._engine = engine
        self._paths = paths

    def lanes_of(self, name: str) -> tuple[int, int]:
        """Lanes to begin with and at most."""
        fixed = self._engine.settings.lanes
        return (fixed, fixed) if fixed else self._paths.lanes(name)

    def take_path(self, link: Link, name: str) -> None:
        """Have a link go by a transport from now on."""
        start, most = self.lanes_of(name)
        link.transport = name
        link.writer.tuner = LaneTuner(start, most, fixed=bool(self._engine.settings.lanes))
        link.writer.traffic.transport = link.reader.traffic.transport = name
        link.one_sided = self._paths.one_sided(name)

    # -- opened here -----------------------------------------------------------------------

    def want(self, link: Link, count: int) -> None:
        """Open more lanes, or have them opened by the side that dials."""
        if link.error is not None or count <= len(link.lanes):
            return
        if not link.outgoing:
            link.send(wire.MoreLanes(count))
        elif count <= self.lanes_of(link.transport)[1] and not link.lanes_awaited:
            number = link.lanes_promised
            link.lanes_promised, link.lanes_awaited = number + 1, 1
            link.send(wire.Lane(number, link.transport))
            self.spawn(link, "more", lambda: self._run_more(link, number))

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

    # -- opened by the peer ----------------------------------------------------------------

    def expect(self, link: Link, lane: wire.Lane) -> None:
        """The peer is about to open a data connection; another transport is a new path."""
        full = lane.number >= MAX_ANNOUNCED or len(link.lanes) >= _MAX_OPEN
        if link.outgoing or lane.number != link.lanes_promised or full:
            text = f"node {link.peer} announces data connection {lane.number} out of turn"
            link.lose(DistributedRuntimeError(text))
            return
        if lane.transport not in self._paths:
            text = (
                f"node {link.peer} chose transport {lane.transport!r}; here are {list(self._paths)}"
            )
            link.lose(ConfigError(text))
            return
        self.forget(link)  # they are opened one by one: whatever has not come has failed
        if lane.transport != link.transport:
            self.take_path(link, lane.transport)
            refused = [(n[:64], r[:1024]) for n, r in lane.refused.items()][:_MAX_REFUSED]
            link.refused = {n: f"node {link.peer}: {r}" for n, r in refused}
        link.lanes_promised += 1
        link.lanes_awaited += 1
        token = auth.data_token(link.session, lane.number)
        link.tokens_awaited[token] = lane.transport
        self.spawn(link, "in", lambda: self._run_incoming(link, lane.transport, token))

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

    def on_more(self, link: Link, message: wire.MoreLanes) -> None:
        """The peer has much to send over a link of ours."""
        if link.outgoing:
            self.want(link, message.count)

    def forget(self, link: Link) -> None:
        """Wait for none of the lanes that have been announced and have not come."""
        for token, name in link.tokens_awaited.items():
            self._paths[name].forget(token)
        link.tokens_awaited.clear()

    # -- threads ---------------------------------------------------------------------------

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

    def both_ways(self, link: Link) -> None:
        """Have blocks go the other way, too: an incoming link sends, an outgoing one receives."""
        if not link.serves:
            link.serves = True
            for conn in link.lanes:
                self._spawn_back(link, conn)

    def _spawn_back(self, link: Link, conn: KVConnection) -> None:
        if link.outgoing:
            self.spawn_data(link, "fetch", conn, link.reader.run)
        else:
            self.spawn_data(link, "serve", conn, link.writer.run)

    def spawn_data(
        self, link: Link, name: str, conn: KVConnection, body: Callable[[KVConnection], None]
    ) -> None:
        """Start a thread that runs one direction of a connection."""
        self.spawn(link, name, lambda: link.run_data(conn, body))

    def spawn(self, link: Link, name: str, body: Callable[[], None]) -> None:
        """Start a thread of a link."""
        thread = threading.Thread(
            target=body, name=f"kv-{self._engine.node_id}-{name}-{link.peer}", daemon=True
        )
        link.threads.append(thread)
        thread.start()
