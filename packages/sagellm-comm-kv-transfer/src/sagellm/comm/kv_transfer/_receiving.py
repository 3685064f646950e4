"""Transfers that this node receives, from one sender or from several that hold parts.

A receive has landed when the parts that its senders were granted cover everything its blocks
hold and all of it is verified. Each sender is granted what nobody was granted before it, so
replicated heads cross the wire once. Here it is decided who may send what, on the event loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from sagellm.core.protocols import (
    CommError,
    ConfigError,
    DistributedRuntimeError,
    ResourceError,
    TransferKey,
)

from . import wire
from ._arrivals import Arrivals
from ._backlog import Backlog
from ._flows import Inflow
from ._granting import Granter
from ._heard import Heard
from ._link import Link
from ._receive import End, Receive, Source
from ._records import ending, failure
from .state import RULES, Event
from .transfer import TransferHandle

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["Receiving"]


class Receiving:
    """All receives of a channel.

    Args:
        engine: The channel's engine.

    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        limits = engine.settings
        self.parked: Backlog[wire.Offer] = Backlog(
            limits.max_in_flight, limits.max_backlog_bytes, engine.waiting
        )
        self._heard = Heard(limits.max_remembered)
        self._granter = Granter(lambda: engine.pool, limits.max_bounce_bytes)
        self._starved: list[tuple[Receive, Link, wire.Offer]] = []
        self.arrivals = Arrivals(engine, self._granter, self._dismiss, self._feed)

    @property
    def bounce_bytes(self) -> int:
        """Memory of transfers without destination, now."""
        return self._granter.used

    def in_flight(self) -> list[TransferHandle]:
        """Receives that have not ended."""
        return [r.handle for r in self.arrivals.live]

    # -- from this node ---------------------------------------------------------------------

    def receive(self, r: Receive) -> TransferHandle:
        """Begin to accept a push; the handle may be that of an earlier, equal call.

        Raises:
            ConfigError: The key has landed here before in other blocks, or a block is the
                destination of another transfer.

        """
        if r.named:
            if (same := self.arrivals.active.get(r.key)) is not None:
                if r.blocks is not None and same.fingerprint() != r.fingerprint():
                    raise ConfigError(
                        f"{r.key.id}/{r.key.attempt} is being received already, in other blocks"
                    )
                return same.handle
            end = self.arrivals.ended.get(r.key) or self._given_up(r)
            if end is not None:
                self._engine.completions.check_room()
                return self._repeat(r, end)
        self.check_room()
        if r.pool is not None:
            r.pool.lease(r, f"{r.key.id}/{r.key.attempt}", written=r.blocks)
        if r.named:
            self.arrivals.active[r.key] = r
        else:
            self.arrivals.unnamed.append(r)
        self.arrivals.watch(r)
        if not r.named:
            for link, offer in self.parked:
                if self._name(r, link, TransferKey(offer.id, offer.attempt)):
                    break
        if self.arrivals.active.get(r.key) is r:
            for link, offer in self.parked.of(r.key.id):
                if offer.attempt == r.key.attempt and r.error is None:
                    self.parked.pop(link, offer.tid)
                    self._join(r, link, offer)
            for link in self._engine.links:
                self._refuse_misfits(link)
            self._invite(r)
        return r.handle

    def check_room(self) -> None:
        """Refuse more than may be in flight.

        Raises:
            ResourceError: As many are being received already, or have ended and wait for `poll`.

        """
        self._engine.completions.check_room()
        limit = self._engine.settings.max_in_flight
        if len(self.arrivals.live) >= limit:
            raise ResourceError(
                f"{len(self.arrivals.live)} transfers are being received already; "
                f"max_in_flight is {limit}"
            )

    def _given_up(self, r: Receive) -> End | None:
        """Take the word of a node it is to come from, that the attempt has failed already."""
        senders = r.senders if r.senders is not None else {k.peer for k in self._engine.links}
        error = next((e for n in senders if (e := self._heard.get((n, r.key))) is not None), None)
        if error is None:
            return None
        self.arrivals.ended[r.key] = end = End(error, None)
        for link, offer in self.parked.of(r.key.id):
            if offer.attempt == r.key.attempt:
                self.parked.pop(link, offer.tid)
                link.send(failure(offer.tid, error))
        return end

    def _repeat(self, r: Receive, end: End) -> TransferHandle:
        if end.error is not None:
            r.handle.take(ending(end.error))
            r.error = end.error
            self.arrivals.quiet(r)
        elif r.blocks is None and (earlier := end.handle()) is not None:
            return earlier
        elif r.blocks is None:
            raise ConfigError(
                f"{r.key.id}/{r.key.attempt} has landed here before, and what it brought was "
                "dropped with its handle; another try needs another attempt number"
            )
        elif end.fingerprint == r.fingerprint():
            r.handle.num_tokens = end.num_tokens
            r.handle.take(Event.ACCEPT)
            r.handle.take(Event.COMPLETE, first=lambda: self._engine.report(r.handle, None))
            r.handle.take(Event.RELEASE)
            self._engine.completed(r.handle, None)
        else:
            raise ConfigError(
                f"{r.key.id}/{r.key.attempt} has landed here before, in other blocks; "
                "another try needs another attempt number"
            )
        return r.handle

    # -- from peers -------------------------------------------------------------------------

    def on_offer(self, link: Link, offer: wire.Offer) -> None:
        """A peer wants to push."""
        name = (link, offer.tid)
        if name in self.arrivals.by_tid or name in self.parked or offer.tid >= wire.INVITED:
            link.lose(
                DistributedRuntimeError(f"node {link.peer} uses transfer id {offer.tid} twice")
            )
            return
        key = TransferKey(offer.id, offer.attempt)
        r = self.arrivals.active.get(key)
        if r is not None:
            self._join(r, link, offer)
        elif (end := self.arrivals.ended.get(key)) is not None:
            if end.error is None:
                link.send(wire.Done(offer.tid))
            else:
                link.send(failure(offer.tid, end.error))
        else:
            for candidate in list(self.arrivals.unnamed):
                if self._name(candidate, link, key):
                    self._join(candidate, link, offer)
                    return
            if not self.parked.add(link, offer):
                full = f"node {self._engine.node_id} holds too many offers nobody has received"
                link.send(failure(offer.tid, ResourceError(full)))

    def on_sealed(self, link: Link, message: wire.Sealed) -> None:
        """A stream is complete."""
        if (parked := self.parked.get(link, message.tid)) is not None:
            tokens = message.num_tokens
            self.parked.replace(
                link, msgspec.structs.replace(parked, sealed=True, num_tokens=tokens)
            )
        elif (entry := self.arrivals.by_tid.get((link, message.tid))) is not None:
            r, source = entry
            source.sealed = True
            r.handle.num_tokens = message.num_tokens
            self.arrivals.maybe_land(r)
        else:
            for i, (r, of, offer) in enumerate(self._starved):
                if of is link and offer.tid == message.tid:
                    sealed = msgspec.structs.replace(
                        offer, sealed=True, num_tokens=message.num_tokens
                    )
                    self._starved[i] = (r, of, sealed)

    def on_fail(self, link: Link, tid: int, error: CommError) -> bool:
        """The sender gave up; False when it is none of ours."""
        if (offer := self.parked.pop(link, tid)) is not None:
            self._heard[link.peer, TransferKey(offer.id, offer.attempt)] = error
            return True
        if (entry := self.arrivals.by_tid.get((link, tid))) is not None:
            self.arrivals.fail(entry[0], error)
            return True
        for r, of, offer in self._starved:
            if of is link and offer.tid == tid:
                self.arrivals.fail(r, error)
                return True
        return False

    def fail_key(self, link: Link, key: TransferKey, error: CommError) -> None:
        """A peer gave the attempt up: so does what we receive from it, now or later."""
        if (r := self.arrivals.active.get(key)) is None:
            self._heard[link.peer, key] = error
        elif r.senders is None or link.peer in r.senders:
            self.arrivals.fail(r, error)
        else:
            self._engine.ignore("key_fail")

    def layout_changed(self, link: Link) -> None:
        """Fail what waits for a node whose layout does not fit, and invite it anew if it does."""
        self._refuse_misfits(link)
        if link.mismatch is None and not link.outgoing:
            for r in list(self.arrivals.active.values()):
                if r.senders is not None and link.peer in r.senders:
                    self.arrivals.withdraw(r, link)
                    self._invite(r)

    def _refuse_misfits(self, link: Link) -> None:
        if link.mismatch is None:
            return
        for r in list(self.arrivals.active.values()):
            if r.blocks is not None and r.senders is not None and link.peer in r.senders:
                self.arrivals.fail(r, link.mismatch)

    def link_lost(self, link: Link, error: CommError, *, was_up: bool) -> None:
        """Fail what came over a link, or was to come from its node."""
        self.parked.drop(link)
        for key in [k for k in self.arrivals.by_tid if k[0] is link]:
            if (entry := self.arrivals.by_tid.get(key)) is None:
                continue
            r, source = entry
            if RULES[r.handle.phase].at_limit is Event.RELEASE:
                self.arrivals.on_release(*key)
            elif not source.awaited:
                self.arrivals.fail(r, error)
            else:
                self.arrivals.withdraw(r, link)
        others = {of.peer for of in self._engine.links if of.up and of is not link}
        for r in list(self.arrivals.active.values()):
            named = r.senders is not None and link.peer in r.senders and link.peer not in others
            if any(of is link for x, of, _ in self._starved if x is r) or (named and was_up):
                self.arrivals.fail(r, error)

    # -- who sends what ---------------------------------------------------------------------

    def _name(self, r: Receive, link: Link, key: TransferKey) -> bool:
        """Give a `receive(None)` the key of an offer, if it accepts the sender."""
        if r.senders is not None and link.peer not in r.senders:
            return False
        self.arrivals.unnamed.remove(r)
        r.handle.bind(key)
        self.arrivals.active[key] = r
        return True

    def _invite(self, r: Receive) -> None:
        """Tell the named senders ahead, once all are there and have nothing in common."""
        if r.error is not None or r.sources or r.senders is None or not r.blocks:
            return
        here = {k.peer: k for k in self._engine.links if k.up and not k.outgoing}
        links = [here[n] for n in sorted(r.senders) if n in here]
        if len(links) < len(r.senders) or any(k.layout is None or k.mismatch for k in links):
            return
        for link, extent, parts in self._granter.ahead(r, links):
            inflow = Inflow(r.handle, link.new_tid(), extent)
            if inflow.total_units:
                self.arrivals.enter(r, Source(link, inflow, parts, sealed=False, invited=True))
                counts = {n: len(ids) for n, ids in r.blocks.items()}
                heard = link.layouts_heard
                link.send(wire.Invite(inflow.tid, *r.key, counts, parts, heard))

    def _join(self, r: Receive, link: Link, offer: wire.Offer) -> None:
        """Let a sender contribute to a receive."""
        with r.lock:
            if RULES[r.handle.phase].safe:  # it has landed meanwhile
                link.send(wire.Done(offer.tid))
            else:
                self._let_join(r, link, offer)

    def _let_join(self, r: Receive, link: Link, offer: wire.Offer) -> None:
        self.arrivals.withdraw(r, link)
        if r.senders is not None and link.peer not in r.senders:
            refused = f"node {self._engine.node_id} takes it from {sorted(r.senders)} only"
            link.send(failure(offer.tid, ConfigError(refused)))
            return
        if any(s.link is link for s in r.sources) or any(
            x is r and of is link for x, of, _ in self._starved
        ):
            twice = f"node {link.peer} offers {r.key.id}/{r.key.attempt} a second time"
            link.send(failure(offer.tid, ConfigError(twice)))
            return
        # the offer is answered from here on, whichever way this goes
        try:
            joined = self._granter.plan(r, link, offer)
        except (CommError, RuntimeError, ValueError, TypeError, OverflowError) as e:
            # torch refuses odd shapes and dtypes of a hostile offer in its own ways
            error = e if isinstance(e, CommError) else ConfigError(f"a senseless offer: {e}")
            link.send(failure(offer.tid, error))
            self.arrivals.fail(r, error)
            return
        if joined is None:
            self._starve(r, link, offer)
            return
        extent, parts = joined
        source = Source(link, Inflow(r.handle, offer.tid, extent), parts, sealed=offer.sealed)
        if offer.sealed:
            r.handle.num_tokens = offer.num_tokens
        self.arrivals.enter(r, source)
        r.handle.take(Event.ACCEPT)
        link.send(wire.Grant(offer.tid, dict(parts)))
        self.arrivals.maybe_land(r)

    # -- senders for which there is no memory yet -------------------------------------------

    def _starve(self, r: Receive, link: Link, offer: wire.Offer) -> None:
        """Let an offer wait until there is memory for what it brings."""
        if not self._engine.waiting.take(wire.held_bytes(offer)):
            full = f"node {self._engine.node_id} holds too many offers it has no memory for"
            error = ResourceError(full)
            link.send(failure(offer.tid, error))
            self.arrivals.fail(r, error)
            return
        self._starved.append((r, link, offer))

    def _dismiss(self, r: Receive) -> list[tuple[Link, int]]:
        """Let none wait any longer to join a receive; who did, with their transfer ids."""
        gone = [(link, offer) for x, link, offer in self._starved if x is r]
        self._starved = [entry for entry in self._starved if entry[0] is not r]
        for _, offer in gone:
            self._engine.waiting.give(wire.held_bytes(offer))
        return [(link, offer.tid) for link, offer in gone]

    def _feed(self) -> None:
        """Let those try again that wait for memory, in turn, until there is none."""
        starved, self._starved = self._starved, []
        for i, (waiting, link, offer) in enumerate(starved, 1):
            self._engine.waiting.give(wire.held_bytes(offer))
            if waiting.error is None:
                self._join(waiting, link, offer)
            else:  # it has failed since this began
                link.send(failure(offer.tid, waiting.error))
            if self._starved:
                self._starved += starved[i:]
                return
