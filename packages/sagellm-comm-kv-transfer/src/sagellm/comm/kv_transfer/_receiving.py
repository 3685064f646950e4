"""Transfers that this node receives, from one sender or from several that hold parts.

A receive has landed when the parts that its senders were granted cover everything its blocks
hold and all of it is verified. Each sender is granted what nobody was granted before it, so
replicated heads cross the wire once. Everything here runs on the event loop, except `on_frame`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from sagellm.core.protocols import (
    CommError,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    IntegrityError,
    ResourceError,
    TransferKey,
)

from . import wire
from ._backlog import Backlog
from ._flows import Inflow
from ._granting import Granter
from ._limits import Watch
from ._link import Link
from ._receive import End, Receive, Source
from ._records import Memory, bare, ending, failure
from .frames import SEALED, Header
from .state import RULES, Event, Phase
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
        self._active: dict[TransferKey, Receive] = {}
        self._next: list[Receive] = []
        limits = engine.settings
        self.live: set[Receive] = set()
        self.unconfirmed: set[Receive] = set()
        self.parked: Backlog[wire.Offer] = Backlog(
            limits.max_in_flight, limits.max_backlog_bytes, engine.waiting
        )
        self._by_tid: dict[tuple[Link, int], tuple[Receive, Source]] = {}
        self._ended: Memory[TransferKey, End] = Memory(limits.max_remembered)
        self._heard: Memory[tuple[int, TransferKey], CommError] = Memory(limits.max_remembered)
        self._granter = Granter(lambda: engine.pool, limits.max_bounce_bytes)
        self._starved: list[tuple[Receive, Link, wire.Offer]] = []

    @property
    def bounce_bytes(self) -> int:
        """Memory of transfers without destination, now."""
        return self._granter.used

    def in_flight(self) -> list[TransferHandle]:
        """Receives that have not ended."""
        return [r.handle for r in self.live]

    # -- from this node ---------------------------------------------------------------------

    def receive(self, r: Receive) -> TransferHandle:
        """Begin to accept a push; the handle may be that of an earlier, equal call.

        Raises:
            ConfigError: The key has landed here before in other blocks, or a block is the
                destination of another transfer.

        """
        if r.named:
            if (same := self._active.get(r.key)) is not None:
                if r.blocks is not None and same.fingerprint() != r.fingerprint():
                    raise ConfigError(
                        f"{r.key.id}/{r.key.attempt} is being received already, in other blocks"
                    )
                return same.handle
            end = self._ended.get(r.key) or self._given_up(r)
            if end is not None:
                return self._repeat(r, end)
        self.check_room()
        if r.pool is not None:
            r.pool.lease(r, f"{r.key.id}/{r.key.attempt}", r.blocks)
        if r.named:
            self._active[r.key] = r
        else:
            self._next.append(r)
        self.watch(r)
        if not r.named:
            for link, offer in self.parked:
                if self._name(r, link, TransferKey(offer.id, offer.attempt)):
                    break
        if self._active.get(r.key) is r:
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
            ResourceError: As many are being received already.

        """
        limit = self._engine.settings.max_in_flight
        if len(self.live) >= limit:
            raise ResourceError(
                f"{len(self.live)} transfers are being received already; max_in_flight is {limit}"
            )

    def _given_up(self, r: Receive) -> End | None:
        """Take the word of a node it is to come from, that the attempt has failed already."""
        senders = r.senders if r.senders is not None else {k.peer for k in self._engine.links}
        error = next((e for n in senders if (e := self._heard.get((n, r.key))) is not None), None)
        if error is None:
            return None
        self._ended[r.key] = end = End(error, None)
        for link, offer in self.parked.of(r.key.id):
            if offer.attempt == r.key.attempt:
                self.parked.pop(link, offer.tid)
                link.send(failure(offer.tid, error))
        return end

    def _repeat(self, r: Receive, end: End) -> TransferHandle:
        if end.error is not None:
            r.handle.take(ending(end.error))
            r.error = end.error
            self._quiet(r)
        elif end.fingerprint is not None and end.fingerprint == r.fingerprint():
            r.handle.take(Event.ACCEPT)
            r.handle.take(Event.COMPLETE)
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
        if name in self._by_tid or name in self.parked or offer.tid >= wire.INVITED:
            link.lose(
                DistributedRuntimeError(f"node {link.peer} uses transfer id {offer.tid} twice")
            )
            return
        key = TransferKey(offer.id, offer.attempt)
        r = self._active.get(key)
        if r is not None:
            self._join(r, link, offer)
        elif (end := self._ended.get(key)) is not None:
            if end.error is None:
                link.send(wire.Done(offer.tid))
            else:
                link.send(failure(offer.tid, end.error))
        else:
            for candidate in list(self._next):
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
        elif (entry := self._by_tid.get((link, message.tid))) is not None:
            r, source = entry
            source.sealed = True
            r.handle.num_tokens = message.num_tokens
            self.maybe_land(r)
        else:
            for i, (r, of, offer) in enumerate(self._starved):
                if of is link and offer.tid == message.tid:
                    sealed = msgspec.structs.replace(
                        offer, sealed=True, num_tokens=message.num_tokens
                    )
                    self._starved[i] = (r, of, sealed)

    def on_release(self, link: Link, tid: int) -> None:
        """The sender knows that it has landed."""
        entry = self._by_tid.get((link, tid))
        if entry is None or entry[0].handle.phase is not Phase.LANDED:
            self._engine.ignore("release")
            return
        r, source = entry
        self._drop(source)
        source.released = True
        if all(s.released for s in r.sources):
            self._release(r)

    def on_fail(self, link: Link, tid: int, error: CommError) -> bool:
        """The sender gave up; False when it is none of ours."""
        if (offer := self.parked.pop(link, tid)) is not None:
            self._heard[link.peer, TransferKey(offer.id, offer.attempt)] = error
            return True
        if (entry := self._by_tid.get((link, tid))) is not None:
            self.fail(entry[0], error)
            return True
        for r, of, offer in self._starved:
            if of is link and offer.tid == tid:
                self.fail(r, error)
                return True
        return False

    def fail_key(self, link: Link, key: TransferKey, error: CommError) -> None:
        """A peer gave the attempt up: so does what we receive from it, now or later."""
        if (r := self._active.get(key)) is None:
            self._heard[link.peer, key] = error
        elif r.senders is None or link.peer in r.senders:
            self.fail(r, error)
        else:
            self._engine.ignore("key_fail")

    def on_frame(
        self, link: Link, flow: Inflow, head: Header, fresh: list[int], again: list[int]
    ) -> None:
        """A frame is in place; called on the link's reader thread."""
        if (entry := self._by_tid.get((link, flow.tid))) is None:
            return
        r, source = entry
        if head.flags & SEALED:
            source.sealed = source.whole = True
        loop = self._engine.loop
        if again:
            where = [head.first + i for i in again[:8]]
            error = IntegrityError(
                f"blocks at positions {where} of layer {head.layer} from node {link.peer} "
                "arrived changed twice"
            )
            loop.call(lambda: self.fail(r, error))
            return
        if fresh:
            r.handle.retried(len(fresh))
            spans = [(head.layer, head.first + i, 1) for i in fresh]
            loop.call(lambda: link.send(wire.Nack(flow.tid, spans)))
        if flow.layer_complete(head.layer):
            if not source.whole:
                loop.call(lambda: link.send(wire.LayerDone(flow.tid, head.layer)))
            if not (flow.complete and self.maybe_land(r)):
                r.check_layers((head.layer,))

    def layout_changed(self, link: Link) -> None:
        """Fail what waits for a node whose layout does not fit, and invite it anew if it does."""
        self._refuse_misfits(link)
        if link.mismatch is None and not link.outgoing:
            for r in list(self._active.values()):
                if r.senders is not None and link.peer in r.senders:
                    self._withdraw(r, link)
                    self._invite(r)

    def _refuse_misfits(self, link: Link) -> None:
        if link.mismatch is None:
            return
        for r in list(self._active.values()):
            if r.blocks is not None and r.senders is not None and link.peer in r.senders:
                self.fail(r, link.mismatch)

    def link_lost(self, link: Link, error: CommError, *, was_up: bool) -> None:
        """Fail what came over a link, or was to come from its node."""
        self.parked.drop(link)
        for key in [k for k in self._by_tid if k[0] is link]:
            if (entry := self._by_tid.get(key)) is None:
                continue
            r, source = entry
            if r.handle.phase is Phase.LANDED:
                self.on_release(*key)
            elif not source.awaited:
                self.fail(r, error)
            else:
                self._withdraw(r, link)
        others = {of.peer for of in self._engine.links if of.up and of is not link}
        for r in list(self._active.values()):
            named = r.senders is not None and link.peer in r.senders and link.peer not in others
            if any(of is link for x, of, _ in self._starved if x is r) or (named and was_up):
                self.fail(r, error)

    # -- the life of a receive --------------------------------------------------------------

    def watch(self, r: Receive) -> None:
        """Keep the limits of a receive that begins."""
        self.live.add(r)
        r.watch = Watch(
            self._engine.loop,
            r.handle,
            self._engine.settings.quiesce_s,
            lambda: self._expire(r),
            lambda: self._break_off(r),
        )
        r.watch.follow()

    def _expire(self, r: Receive) -> None:
        if RULES[r.handle.phase].at_limit is Event.RELEASE:  # its sender's word is of no need
            self._release(r)
            return
        self.fail(
            r,
            CommTimeoutError(
                f"not landed within {r.handle.deadline_s:g} s, "
                f"{r.handle.state.value}; waited for {r.whom()}"
            ),
        )

    def _name(self, r: Receive, link: Link, key: TransferKey) -> bool:
        """Give a `receive(None)` the key of an offer, if it accepts the sender."""
        if r.senders is not None and link.peer not in r.senders:
            return False
        self._next.remove(r)
        r.handle.bind(key)
        self._active[key] = r
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
                self.enter(r, Source(link, inflow, parts, sealed=False, invited=True))
                counts = {n: len(ids) for n, ids in r.blocks.items()}
                heard = link.layouts_heard
                link.send(wire.Invite(inflow.tid, *r.key, counts, parts, heard))

    def _release(self, r: Receive) -> None:
        if r.handle.take(Event.RELEASE) is not None:
            for s in r.sources:
                self._drop(s)
            self._follow(r)

    def _drop(self, s: Source) -> None:
        self._by_tid.pop((s.link, s.inflow.tid), None)
        s.link.inflows.pop(s.inflow.tid, None)

    def _withdraw(self, r: Receive, link: Link) -> None:
        """Forget an invitation that its sender has not taken and will not take."""
        with r.lock:
            for s in r.sources:
                if s.link is link and s.awaited:
                    s.inflow.stop()
                    self._drop(s)
                    r.leave(s)
                    return

    def _join(self, r: Receive, link: Link, offer: wire.Offer) -> None:
        """Let a sender contribute to a receive."""
        with r.lock:
            if RULES[r.handle.phase].safe:  # it has landed meanwhile
                link.send(wire.Done(offer.tid))
            else:
                self._let_join(r, link, offer)

    def _let_join(self, r: Receive, link: Link, offer: wire.Offer) -> None:
        self._withdraw(r, link)
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
            self.fail(r, error)
            return
        if joined is None:
            self._starved.append((r, link, offer))
            return
        extent, parts = joined
        source = Source(link, Inflow(r.handle, offer.tid, extent), parts, sealed=offer.sealed)
        if offer.sealed:
            r.handle.num_tokens = offer.num_tokens
        self.enter(r, source)
        r.handle.take(Event.ACCEPT)
        link.send(wire.Grant(offer.tid, dict(parts)))
        self.maybe_land(r)

    def enter(self, r: Receive, source: Source) -> None:
        """Let a sender write from now on."""
        r.sources.append(source)
        link, inflow = source.link, source.inflow
        r.expect()
        r.handle.via(link.path)
        self._by_tid[link, inflow.tid] = (r, source)
        link.inflows[inflow.tid] = inflow
        r.check_layers(range(inflow.extent.layers))

    def maybe_land(self, r: Receive) -> bool:
        """End a receive in success, if everything is there; from any thread.

        Its caller is told at once, on this thread; the books and the senders follow.
        """
        engine = self._engine

        def first() -> None:
            if r.pool is not None:
                r.pool.release(r)
            engine.report(r.handle, None)
            engine.loop.post(lambda: self._landed(r))  # before what the caller does next

        with r.lock:
            if r.error is not None or not r.complete:
                return False
            for s in r.sources:
                s.inflow.stop()
            blocks = () if r.destination is None else r.destination.blocks()
            if r.handle.take(Event.COMPLETE, blocks=blocks, first=first) is None:
                return False
        engine.loop.rouse()
        return True

    def _landed(self, r: Receive) -> None:
        """Keep the books of a receive that has landed, and tell its senders."""
        self._free(r)
        if r.fetch_from is None:
            self._ended[r.key] = End(None, r.fingerprint())
        for s in r.sources:
            s.link.send(wire.Done(s.inflow.tid))
        self._follow(r)
        self._engine.completed(r.handle, None)

    def fail(self, r: Receive, error: CommError) -> None:
        """End a receive: tell its senders, fence its blocks, then tell its caller."""
        step = r.handle.take(ending(error))
        if step is None:
            return
        r.error = bare(error)
        self._follow(r)
        told = set()
        for link, offer in [(of, o) for x, of, o in self._starved if x is r]:
            link.send(failure(offer.tid, error))
            told.add(link)
        self._starved = [entry for entry in self._starved if entry[0] is not r]
        for s in r.sources:
            if step.tells:
                s.link.send(failure(s.inflow.tid, error))
            told.add(s.link)
            self._by_tid.pop((s.link, s.inflow.tid), None)
            s.link.inflows.pop(s.inflow.tid, None)
            s.inflow.idle = lambda: self._engine.loop.call(lambda: self._quiet(r))
            s.inflow.stop()
        if r.fetch_from is None and (r.named or r.sources):
            self._ended[r.key] = End(error, None)
            self._engine.gossip(r.key, error, told)
        self._quiet(r)

    def _quiet(self, r: Receive) -> None:
        """Finish a failed receive once no thread writes its blocks any more."""
        if any(s.inflow.busy for s in r.sources):
            return
        error = r.failure()
        if r in self.live:
            self._free(r)
        report = self._engine.report
        if r.handle.take(Event.IDLE, error=error, first=lambda: report(r.handle, error)):
            self._follow(r)
            self._engine.completed(r.handle, error)

    def _break_off(self, r: Receive) -> None:
        for s in r.sources:
            if s.inflow.busy:
                s.link.abort_data()

    def close(self, error: CommError) -> None:
        """Fail everything."""
        for r in list(self.live):
            self.fail(r, error)

    # -- bookkeeping ------------------------------------------------------------------------

    def _follow(self, r: Receive) -> None:
        """Keep the books and the limit of the phase that a receive is in now."""
        rule = RULES[r.handle.phase]
        if not rule.moves:
            if self._active.get(r.key) is r:
                del self._active[r.key]
            if r in self._next:
                self._next.remove(r)
        if rule.safe:
            self.live.discard(r)
        if r.handle.phase is Phase.LANDED:
            self.unconfirmed.add(r)
        else:
            self.unconfirmed.discard(r)
        if r.watch is not None:
            r.watch.follow()
        if rule.safe and r.handle.phase is not Phase.LANDED:  # over: let go of what refers to it
            r.watch = None
            for s in r.sources:
                s.inflow.idle = None

    def _free(self, r: Receive) -> None:
        """Give back leases and room; then let those start that waited for it."""
        if r.pool is not None:
            r.pool.release(r)
        if self._granter.give_back(r):
            starved, self._starved = self._starved, []
            for waiting, link, offer in starved:
                if waiting.error is None:
                    self._join(waiting, link, offer)
