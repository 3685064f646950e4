"""The first data connections of a link, on the thread that has dialled the peer."""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sagellm.core.protocols import (
    CommError,
    CommTimeoutError,
    ConfigError,
    KVConnection,
    KVLayout,
    PeerLostError,
)

from . import auth, wire
from ._dial import Dialled
from ._lanes import MAX_ANNOUNCED
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
    again: Callable[[str], bool],
) -> Opened:
    """Introduce ourselves, and connect by the best transport that works.

    Args:
        peer: Its node id.
        dialled: The control connection.
        paths: Our transports.
        introduction: Makes our last message of the handshake, given the first transport to try.
        lanes_of: Lanes to begin with and at most, given the transport.
        limit_s: For each connection.
        again: Whether to try once more, given why it failed; waits until it is time to.

    Raises:
        ConfigError: No transport that both have leads there, or ever will.
        PeerLostError: None that might has worked in time; the message says why for each.
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

    names, failed = choice.names, dict[str, str]()
    try:
        while not opened.lanes:
            passing = []  # those that may work later
            for opened.transport in names:
                try:
                    opened.lanes.append(connect())
                    break
                except CommError as e:
                    failed[opened.transport] = str(e)
                    opened.refused = {**choice.refused, **failed}
                    logger.warning("no %s to node %d: %s", opened.transport, peer, e)
                    if isinstance(e, PeerLostError | CommTimeoutError):
                        passing.append(opened.transport)
            else:
                why = "; ".join(f"{n}: {w}" for n, w in failed.items())
                why = f"node {peer} cannot be reached by {why}"
                if not passing:
                    raise ConfigError(why)
                if opened.promised >= MAX_ANNOUNCED // 2 or not again(why):
                    raise PeerLostError(why, rank=peer)
                _check_open(control.sock)
                names = tuple(passing)
        opened.refused = {n: why for n, why in opened.refused.items() if n != opened.transport}
        while len(opened.lanes) < lanes_of(opened.transport)[0]:
            try:
                opened.lanes.append(connect())
            except CommError as e:
                logger.warning("fewer lanes of %s to node %d: %s", opened.transport, peer, e)
                break
    except BaseException:
        opened.close()
        raise
    return opened


def _check_open(sock: socket.socket) -> None:
    """Look whether the peer has closed the control connection; it says nothing before it is up."""
    poll = select.poll()
    poll.register(sock, getattr(select, "POLLRDHUP", select.POLLHUP))  # the former is Linux's
    if poll.poll(0):
        raise ConnectionResetError("it closed the control connection")
