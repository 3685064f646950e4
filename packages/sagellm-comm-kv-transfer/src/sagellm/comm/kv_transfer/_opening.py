"""The first data connections of a link, on the thread that has dialled the peer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sagellm.core.protocols import CommError, KVConnection, KVLayout, PeerLostError

from . import auth, wire
from ._dial import Dialled
from ._paths import Paths

__all__ = ["Opened", "open_lanes"]

logger = logging.getLogger(__name__)


@dataclass
class Opened:
    """The lanes of a link that has just been dialled.

    Attributes:
        transport: What carries them.
        lanes: Open connections.
        refused: Other transports, and why they were not taken.
        promised: Connections that were announced to the peer.
        layout: Ours, as the peer was told.

    """

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


def open_lanes(
    peer: int,
    dialled: Dialled,
    paths: Paths,
    introduction: Callable[[str], wire.Ready],
    lanes_of: Callable[[str], tuple[int, int]],
    limit_s: float,
) -> Opened:
    """Introduce ourselves, and connect by the best transport that works.

    Args:
        peer: Its node id.
        dialled: The control connection.
        paths: Our transports.
        introduction: Makes our last message of the handshake, given the first transport to try.
        lanes_of: Lanes to begin with and at most, given the transport.
        limit_s: For each connection.

    Raises:
        ConfigError: No transport that both have leads there.
        PeerLostError: None that might has worked; the message says why for each.
        OSError: The control connection broke.

    """
    control, endpoints = dialled.control, dialled.welcome.endpoints
    choice = paths.choose(endpoints)
    control.sock.settimeout(limit_s)
    ready = introduction(choice.names[0])
    control.sock.sendall(control.seal(ready))
    opened = Opened("", [], dict(choice.refused), 0, ready.layout)

    def connect() -> KVConnection:
        if opened.promised:  # the first is announced by the introduction
            refused = {} if opened.lanes else dict(opened.refused)
            lane = wire.Lane(opened.promised, opened.transport, refused)
            control.sock.sendall(control.seal(lane))
        token = auth.data_token(control.session, opened.promised)
        opened.promised += 1
        return paths[opened.transport].connect(endpoints[opened.transport], token, limit_s)

    failed: dict[str, str] = {}
    for opened.transport in choice.names:
        try:
            opened.lanes.append(connect())
            break
        except CommError as e:
            failed[opened.transport] = str(e)
            opened.refused = {**choice.refused, **failed}
            logger.warning("no %s to node %d: %s", opened.transport, peer, e)
    else:
        why = "; ".join(f"{n}: {w}" for n, w in failed.items())
        raise PeerLostError(f"node {peer} cannot be reached by {why}", rank=peer)
    try:
        while len(opened.lanes) < lanes_of(opened.transport)[0]:
            opened.lanes.append(connect())
    except BaseException:
        opened.close()
        raise
    return opened
