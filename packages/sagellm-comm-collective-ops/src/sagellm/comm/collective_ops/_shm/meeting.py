"""How the ranks of one host meet: everyone's connection to everyone, and one segment for all."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sagellm.core.protocols import (
    BackendUnavailableError,
    CommError,
    CommTimeoutError,
    DistributedRuntimeError,
    PeerLostError,
    error_from_code,
)
from sagellm.core.protocols.process_group import TorchObject

from . import handshake
from .exchange import Exchange
from .handshake import Listener
from .hosts import claim, difference
from .layout import Layout
from .segment import Segment

__all__ = ["Met", "meet", "require_alive"]

_PROBE_S = 0.05
_GRACE_S = 0.5
_SECONDARY = (PeerLostError.code, CommTimeoutError.code)

Claims = Sequence[Mapping[str, Any]]  # Any: JSON


@dataclass(slots=True)
class Met:
    """What a meeting gives a rank.

    Attributes:
        links: A connection to every other rank; its end of file says that the rank is gone.
        segment: The group's memory.
        claims: What every rank said, by rank.

    """

    links: dict[int, socket.socket]
    segment: Segment
    claims: Claims

    def close(self) -> None:
        """Let go of all of it."""
        for link in self.links.values():
            link.close()
        self.segment.close()


def meet(
    store: TorchObject,
    rank: int,
    size: int,
    *,
    label: str,
    timeout_s: float,
    facts: Mapping[str, Any],  # Any: JSON
    plan: Callable[[Claims], Layout],
    watch: Callable[[], None] | None = None,
) -> Met:
    """Meet the other ranks of a group, all on this host. Collective; every rank ends alike.

    Args:
        store: Shared by the ranks.
        rank: This rank.
        size: Ranks, at least two.
        label: Names the group.
        timeout_s: Longest time for all of it.
        facts: What the others should know of this rank.
        plan: The segment's layout, a pure function of everybody's facts.
        watch: Called while waiting for ranks to appear; may raise.

    Raises:
        BackendUnavailableError: Some rank is on another host.
        CommTimeoutError: Some rank did not come; it is named.
        PeerLostError: Some rank died on the way.
        ResourceError: There is no memory for the segment, on whichever rank.

    """
    exchange = Exchange(store, rank, size, f"group/{label}", timeout_s)
    said = {**facts, **claim()}
    if "why" in said:
        exchange.tell("claim", said)
        raise BackendUnavailableError(f"shm cannot run here: {said['why']}")
    listener = Listener(2 * size + 16)
    crowd = _Crowd(exchange, listener)
    try:
        said |= {"address": listener.address, "nonce": listener.nonce.hex()}
        crowd.claims = crowd.listen(said, watch)
        failure: CommError | None = None
        try:
            crowd.gather(plan)
        except CommError as e:
            failure = e
        except OSError as e:
            failure = DistributedRuntimeError(f"rank {rank} could not meet the others: {e}")
        try:
            crowd.settle(failure)
            exchange.leave()
            assert crowd.segment is not None
            return Met(crowd.links, crowd.segment, crowd.claims)
        except BaseException:
            crowd.disperse()
            raise
    finally:
        listener.close()


class _Crowd:
    def __init__(self, exchange: Exchange, listener: Listener) -> None:
        self.exchange = exchange
        self.listener = listener
        self.claims: Claims = ()
        self.links: dict[int, socket.socket] = {}
        self.pending: dict[int, socket.socket] = {}
        self.segment: Segment | None = None

    def listen(self, said: Mapping[str, Any], watch: Callable[[], None] | None) -> Claims:
        """Everybody's claims; a rank that gives up leaves word of why."""
        try:
            return self.exchange.all("claim", said, watch)
        except CommError as e:
            given = [v for v in self.exchange.seen("done").values() if "code" in v]
            self.exchange.tell("done", _told(e))
            if given and e.code == PeerLostError.code:  # it left because of something else
                raise _error(given[0], given[0]["text"]) from e
            raise

    def gather(self, plan: Callable[[Claims], Layout]) -> None:
        claims, rank = self.claims, self.exchange.rank
        apart = {r: difference(claims[0], c) for r, c in enumerate(claims)}
        apart = {r: why for r, why in apart.items() if why}
        if apart:
            text = "; ".join(f"rank {r}: {why}" for r, why in apart.items())
            raise BackendUnavailableError(
                f"shm needs all ranks on one host, and {text} than rank 0; use hier or gloo, or "
                f"create_comm_backend('auto')"
            )
        layout = plan(claims)
        nonces = {r: bytes.fromhex(c["nonce"]) for r, c in enumerate(claims)}
        self._link(nonces)
        nonce = int.from_bytes(nonces[0][:8], "little") >> 1
        if rank == 0:
            self.segment = Segment.create(layout, nonce)
            for link in self.links.values():
                handshake.send(link, b"segment", self.segment.fd)
            return
        link = self.links[0]
        link.settimeout(max(0.001, self.exchange.deadline - time.monotonic()))
        message, fd = handshake.receive(link, 0)
        if message != b"segment" or fd < 0:
            raise DistributedRuntimeError("rank 0 sent something else than the segment")
        self.segment = Segment.attach(fd, layout, nonce)

    def _link(self, nonces: dict[int, bytes]) -> None:
        exchange, rank = self.exchange, self.exchange.rank
        for peer in range(rank):
            address = self.claims[peer]["address"]
            self.pending[peer] = handshake.connect(
                address, rank, self.listener.nonce, peer, nonces[peer], exchange.deadline
            )
        wanted = set(range(rank + 1, exchange.size))
        poller = select.poll()
        poller.register(self.listener.fileno(), select.POLLIN)
        probe_at = time.monotonic() + _PROBE_S
        while self.pending or wanted:
            came = self.listener.serve(rank, nonces, wanted)
            wanted -= set(came)
            self.links.update(came)
            for peer in handshake.take_replies(self.pending, self.listener.nonce, nonces, 0):
                self.links[peer] = self.pending.pop(peer)
            now = time.monotonic()
            missing = sorted({*self.pending, *wanted})
            if missing and now >= exchange.deadline:
                trouble = f"; {self.listener.trouble}" if self.listener.trouble else ""
                raise CommTimeoutError(
                    f"rank {', '.join(map(str, missing))} came and did not connect in time{trouble}"
                )
            if missing and now >= probe_at:
                probe_at = now + _PROBE_S
                for peer in missing:
                    if self._left(peer):
                        raise PeerLostError(f"rank {peer} left while the ranks met", rank=peer)
            if missing and self.listener.trouble:
                time.sleep(0.002)  # the listener stays readable
            elif missing:
                poller.poll(2)

    def _left(self, peer: int) -> bool:
        """Whether a rank has closed its connection to us, or its listener."""
        link = self.links.get(peer)
        if link is not None:
            poller = select.poll()
            poller.register(link.fileno(), select.POLLRDHUP)
            return bool(poller.poll(0))
        try:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:  # no descriptor is left to ask with
            return False
        with made as probe:
            probe.setblocking(False)
            try:
                probe.connect(b"\0" + str(self.claims[peer]["address"]).encode())
            except BlockingIOError:
                return False
            except OSError:
                return True
        return False

    def settle(self, mine: CommError | None) -> None:
        """Return on every rank or raise on every rank."""
        exchange = self.exchange
        value = {} if mine is None else _told(mine)
        if mine is not None:
            exchange.tell("done", value)
            if mine.code not in _SECONDARY:
                raise mine
            exchange.deadline = time.monotonic() + _GRACE_S

        def watch() -> None:
            for peer in range(exchange.size):
                if peer == exchange.rank or exchange.has("done", peer):
                    continue
                if self._left(peer) and not exchange.has("done", peer):
                    raise PeerLostError(f"rank {peer} died while the ranks met", rank=peer)

        try:
            found = dict(enumerate(exchange.all("done", value, watch)))
        except CommError as e:
            mine = mine or e
            found = exchange.seen("done")
        errors = {r: v for r, v in sorted(found.items()) if "code" in v and r != exchange.rank}
        first = next((r for r, v in errors.items() if v["code"] not in _SECONDARY), None)
        if first is None and mine is not None:
            raise mine
        if first is None and errors:
            first = next(iter(errors))
        if first is not None:
            raise _error(errors[first], f"rank {first}: {errors[first]['text']}")

    def disperse(self) -> None:
        for link in (*self.links.values(), *self.pending.values()):
            link.close()
        if self.segment is not None:
            self.segment.close()


def _told(error: CommError) -> dict[str, Any]:  # Any: JSON
    return {"code": error.code, "text": str(error), "rank": getattr(error, "rank", None)}


def _error(told: Mapping[str, Any], text: str) -> CommError:  # Any: JSON
    error = error_from_code(told["code"], text)
    if isinstance(error, PeerLostError):
        error.rank = told.get("rank")
    return error


def require_alive(links: Mapping[int, socket.socket]) -> None:
    """Raise `PeerLostError` for a rank whose connection has ended."""
    poller = select.poll()
    by_fd = {link.fileno(): peer for peer, link in links.items()}
    for fd in by_fd:
        poller.register(fd, select.POLLRDHUP)
    for fd, _ in poller.poll(0):
        raise PeerLostError(f"rank {by_fd[fd]} is gone", rank=by_fd[fd])
