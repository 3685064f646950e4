"""Transfers that this node sends: pushes, streams, and what peers fetch.

Everything here runs on the event loop. A push lands when its receiver says that all senders'
parts of it are in place, so that a failure anywhere reaches every side of the transfer.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from sagellm.core.protocols import (
    CommError,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    IntegrityError,
    KVTransferError,
    PeerLostError,
    ResourceError,
    TransferKey,
)

from . import wire
from ._coded_out import CodedOutflow
from ._device_extent import extent_of
from ._flows import Span
from ._heard import Heard
from ._limits import Watch
from ._link import Link
from ._offering import Offering
from ._push import Push
from ._records import ABANDONED, CANCELLED, Memory, bare, ending, failure, key_failure
from .frames import SEALED
from .memory import TensorExtent
from .plan import check_parts
from .state import RULES, Event
from .transfer import TransferHandle, transfer_error

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["Sending"]

_HERE_BYTES = 1 << 18
"""What is larger is left to the lanes' threads."""


class Sending:
    """All pushes of a channel.

    Args:
        engine: The channel's engine.

    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.live: set[Push] = set()
        self.offering = Offering(self)
        self._lock = threading.Lock()
        self._active: dict[tuple[int, TransferKey], Push] = {}
        self._by_tid: dict[tuple[Link, int], Push] = {}
        self._landed: Memory[tuple[int, TransferKey], bool] = Memory(engine.settings.max_remembered)
        self._failed: Memory[TransferKey, CommError] = Memory(engine.settings.max_remembered)
        self._heard = Heard(engine.settings.max_remembered)
        """What peers say has failed, each of its own part and never over what we know."""

    def in_flight(self) -> list[TransferHandle]:
        """Pushes and offers that have not ended."""
        offers = (*self.offering.offers.values(), *self.offering.ending)
        return [p.handle for p in self.live if p.offered is None] + [o.handle for o in offers]

    def moving(self) -> list[TransferHandle]:
        """Pushes, fetches that are served, and offers that end: all but offers that just stand."""
        return [p.handle for p in self.live] + [o.handle for o in self.offering.ending]

    # -- from this node ---------------------------------------------------------------------

    def push(self, p: Push) -> Push:
        """Begin to push; the result may be an earlier, equal push. From any thread.

        Over a link that is up it does not wait for the event loop.
        """
        self.engine.completions.check_room()
        name, limit = (p.target, p.key), self.engine.settings.max_in_flight
        try:
            with self._lock:
                if (same := self._active.get(name)) is not None:
                    if not same.sends_what(p):
                        raise ConfigError(
                            f"transfer {p.key.id}/{p.key.attempt} to node {p.target} is under way "
                            "already, with other blocks or destinations; another try needs "
                            "another attempt number"
                        )
                    return same
                known = self._landed.get(name) or self._failed.get(p.key) or self._heard.get(name)
                if not known:
                    if len(self._active) >= limit:
                        raise ResourceError(
                            f"{len(self._active)} transfers are in flight already; max_in_flight "
                            f"is {limit}"
                        )
                    self._active[name] = p
            if known:
                self.engine.loop.run(lambda: self._repeat(p))
                return p
            if p.pool is not None:
                p.pool.lease(p, f"{p.key.id}/{p.key.attempt}", read=p.blocks)
            link = self.engine.links.ready(p.target)
            if link is None:
                self.engine.links.look_up(p.target)
            elif self._begin_here(p, link):
                return p
            if link is None or not self.engine.loop.call(lambda: self._begin(p, link)):
                self.engine.loop.run(
                    lambda: self._begin(p, self.engine.links.to(p.target, p.handle.deadline))
                )
        except BaseException as e:
            refused = isinstance(e, CommError) and not isinstance(e, CommTimeoutError)
            begun = p.link is not None or not refused  # perhaps, and the loop knows
            if not begun or not self.engine.loop.call(lambda: self._abandon(p)):
                self._let_go(p)
            raise
        return p

    def _abandon(self, p: Push) -> None:
        """End a push whose caller was stopped before he had its handle."""
        if p.link is None and p not in self.live:
            self._let_go(p)
            return
        if p not in self.live and RULES[p.handle.phase].moves:
            self._watch(p)
        self.fail(p, KVTransferError(ABANDONED, cause=CANCELLED))

    def _let_go(self, p: Push) -> None:
        """Forget a push that has not begun."""
        self._forget(p)
        if p.pool is not None:
            p.pool.release(p)

    def _repeat(self, p: Push) -> None:
        """End a push as its key has ended before."""
        if (error := self._error_of(p)) is None:
            for event in (Event.ACCEPT, Event.DONE):
                p.handle.take(event)
            self._quiet(p)
            return
        p.handle.take(ending(error))
        p.error = error
        self._quiet(p)

    def _error_of(self, p: Push) -> CommError | None:
        """What its key has failed with before, here or at its target."""
        return self._failed.get(p.key) or self._heard.get((p.target, p.key))

    def _begin_here(self, p: Push, link: Link) -> bool:
        """Take an invitation, and send what is small, on the caller's own thread."""
        if p.pool is not self.engine.pool or link.mismatch is not None:
            return False
        if p.codec is not None and link.coding is not None and link.coding.lacks(p.codec):
            return False  # `_start` says so
        if self.engine.handover.needed(p, link) is not None:
            return False  # `go` gives it
        if not self._take_invitation(p, link):
            return False
        size = self._prepare(p, link)
        # our caller must not wait for a peer that does not read: all that was sent before has come;
        # nor for a device
        confirmed = link.confirmed_before(p.flow.tid)
        here = size <= _HERE_BYTES and confirmed and p.pool is not None and p.pool.staging is None
        link.writer.add(p.flow, here=here)
        # only now: the loop would take the GIL from the call that sends
        if not self.engine.loop.call(lambda: self._register(p, link)):
            raise PeerLostError("the channel is closed")
        return True

    def _register(self, p: Push, link: Link) -> None:
        if RULES[p.handle.phase].moves:
            self._watch(p)
            if link.error is not None:
                self.fail(p, link.error)

    def _take_invitation(self, p: Push, link: Link) -> bool:
        """Use the grant that the receiver has made ahead, if there is one that fits."""
        if p.pool is None or p.dst_blocks is not None:
            return False
        with self._lock:  # so that the receiver's end finds it, here or there
            invite = link.invitations.take(p.key)
            if invite is None or {n: len(ids) for n, ids in p.blocks.items()} != invite.counts:
                return False  # an offer finds out what is wrong
            p.link, p.tid, p.flow.tid = link, invite.tid, invite.tid
            self._by_tid[link, p.tid] = p
        p.flow.extent = extent_of(p.pool, p.blocks, invite.parts)
        if p.sealed:
            p.flow.flags = SEALED
            if not any([len(ids) for ids in p.blocks.values()]):  # no frame will say so
                self.engine.loop.call(lambda: link.send(wire.Sealed(p.tid, p.num_tokens)))
        return True

    def _begin(self, p: Push, link: Link) -> None:
        if p.error is None:  # it may have failed before the loop came to it
            self._watch(p)
        link.when_up(lambda error: self._start(p, link, error))

    def serve(self, p: Push, link: Link) -> None:
        """Send what a peer has fetched; it is ready for it."""
        self._by_tid[link, p.tid] = p
        self._watch(p)
        self.go(p, link)

    def seal(self, p: Push, num_tokens: int) -> None:
        """Say that a stream is complete."""
        p.sealed, p.num_tokens = True, num_tokens
        p.handle.num_tokens = num_tokens
        if p.link is not None and (p.link, p.tid) in self._by_tid:
            p.link.send(wire.Sealed(p.tid, num_tokens))

    # -- from peers -------------------------------------------------------------------------

    def on_grant(self, link: Link, grant: wire.Grant) -> None:
        """The receiver says what to send."""
        p = self._by_tid.get((link, grant.tid))
        if p is None or not p.handle.awaits(Event.ACCEPT):
            self.engine.ignore("grant")
            return
        if p.tensors is not None:
            page = self.engine.settings.page_bytes
            p.flow.extent = TensorExtent([b.tensor for b in p.tensors], page)
        else:
            assert p.pool is not None, "blocks belong to a pool"
            check_parts(p.pool.layout, grant.parts, link.peer)
            p.flow.extent = extent_of(p.pool, p.blocks, grant.parts)
        self.go(p, link)

    def on_invite(self, link: Link, invite: wire.Invite) -> None:
        """A receiver is ready before we have begun."""
        if not link.outgoing or not link.invitations.fresh(invite.tid):
            link.lose(DistributedRuntimeError(f"node {link.peer} invites out of turn"))
            return
        key, pool = TransferKey(invite.id, invite.attempt), self.engine.pool
        p = self._active.get((link.peer, key))
        offered = p is not None and p.link is not None
        crossed = offered or invite.layouts != link.layouts_told
        if crossed or pool is None or self._failed.get(key) is not None:
            self.engine.ignore("invite")
            return
        check_parts(pool.layout, invite.parts, link.peer)
        link.invitations.add(invite)

    def on_fetch(self, link: Link, fetch: wire.Fetch) -> None:
        """A peer wants to pull."""
        self.engine.links.data.both_ways(link)
        name = (link, fetch.tid)
        if name in self._by_tid or name in self.offering.fetches or fetch.tid >= wire.INVITED:
            link.lose(
                DistributedRuntimeError(f"node {link.peer} uses transfer id {fetch.tid} twice")
            )
            return
        self.offering.on_fetch(link, fetch)

    def on_nack(self, link: Link, nack: wire.Nack) -> None:
        """Blocks arrived changed: send them once more."""
        p = self._by_tid.get((link, nack.tid))
        if p is None or (extent := p.flow.extent) is None:
            self.engine.ignore("nack")
            return
        p.nacked += sum(count for _, _, count in nack.spans)
        sound = all(
            0 <= layer < extent.layers and 0 <= first < first + count <= extent.units(layer)
            for layer, first, count in nack.spans
        )
        if not sound or p.nacked > sum(map(extent.units, range(extent.layers))):
            self.fail(p, IntegrityError(f"node {link.peer} rejects more than it was sent"))
            return
        p.handle.retried(len(nack.spans))
        p.queue(Span(layer, first, first + count) for layer, first, count in nack.spans)

    def on_layer_done(self, link: Link, done: wire.LayerDone) -> None:
        """The receiver has a layer of ours, verified."""
        p = self._by_tid.get((link, done.tid))
        if p is None or (extent := p.flow.extent) is None:
            self.engine.ignore("layer_done")
            return
        if not 0 <= done.layer < extent.layers:
            self.fail(p, IntegrityError(f"node {link.peer} confirms a layer it was not sent"))
            return
        p.handle.layers_done([done.layer])

    def on_done(self, link: Link, tid: int) -> None:
        """The receiver has everything, verified."""
        p = self._by_tid.pop((link, tid), None)
        step = None if p is None else p.handle.take(Event.DONE)
        if p is None or step is None:
            self.engine.ignore("done")
            return
        if step.tells:
            link.send(wire.Release(tid))
        link.confirm(tid)
        self._forget(p)
        self._fence(p)

    def on_fail(self, link: Link, tid: int, error: CommError) -> bool:
        """The receiver gave up; False when it is none of ours."""
        if self.offering.fetches.pop(link, tid) is not None:
            return True
        with self._lock:
            invite, p = link.invitations.forget(tid), self._by_tid.get((link, tid))
        if invite is not None:
            self._heard[link.peer, TransferKey(invite.id, invite.attempt)] = error
            return True
        if p is None:
            return False
        self.fail(p, error, told=True)
        return True

    def fail_key(self, link: Link, key: TransferKey, error: CommError) -> None:
        """A peer gave the attempt up: so does what we push to it, now or later."""
        if (p := self._active.get((link.peer, key))) is not None:
            self.fail(p, error)
        else:
            self._heard[link.peer, key] = error

    def link_lost(self, link: Link, error: CommError) -> None:
        """Fail what went over a link."""
        for p in [p for (of, _), p in list(self._by_tid.items()) if of is link]:
            self.fail(p, error)
        self.offering.fetches.drop(link)
        link.invitations.clear()

    # -- the life of a push -----------------------------------------------------------------

    def _watch(self, p: Push) -> None:
        self.live.add(p)
        p.watch = Watch(
            self.engine.loop,
            p.handle,
            self.engine.settings,
            lambda: 0 if p.link is None else p.link.moved_bytes(),
            lambda: self._expire(p),
            lambda: self._break_off(p),
        )
        p.watch.follow()

    def _start(self, p: Push, link: Link, error: CommError | None) -> None:
        if p.error is not None:
            if error is None:  # it failed before they met: the receiver may be waiting for it
                link.send(key_failure(p.key, p.error))
            return
        if error is not None:
            self.fail(p, error)
            return
        lacking = link.coding.lacks(p.codec) if p.codec and link.coding else None
        if (p.tensors is None and link.mismatch is not None) or lacking is not None:
            p.link = link
            why = link.mismatch if p.tensors is None else None
            self.fail(p, why or ConfigError(lacking))
        elif p.pool is self.engine.pool and self._take_invitation(p, link):
            self.go(p, link)
        else:
            self._offer(p, link)

    def _offer(self, p: Push, link: Link) -> None:
        p.link, p.tid = link, link.new_tid()
        p.flow.tid = p.tid
        self._by_tid[link, p.tid] = p
        named = p.dst_blocks
        link.send(
            wire.Offer(
                p.tid,
                p.key.id,
                p.key.attempt,
                {n: len(ids) for n, ids in p.blocks.items()},
                p.tensor_infos(),
                self.engine.settings.page_bytes,
                None if named is None else {n: i.tobytes() for n, i in named.items()},
                p.sealed,
                p.num_tokens,
            )
        )

    def go(self, p: Push, link: Link) -> None:
        """Send what is granted, once the peer has what it needs to decode it."""
        if (basis := self.engine.handover.needed(p, link)) is not None:
            self.engine.handover.give(p, link, basis)
        else:
            self.move(p, link)

    def move(self, p: Push, link: Link) -> None:
        """Send what is granted; nothing when that is under way, or has ended."""
        if not p.handle.awaits(Event.ACCEPT):
            return
        self._prepare(p, link)
        link.confirmed_before(p.flow.tid)
        link.writer.add(p.flow)

    def _prepare(self, p: Push, link: Link) -> int:
        """Say what will move; its bytes."""
        extent = p.flow.extent
        assert extent is not None, "granted"
        p.flow.broken = lambda e: self.engine.loop.call(lambda: self._event_failed(p, e))
        units, size = extent.measure()
        p.handle.accepted(size, units, link.path)
        if isinstance(p.flow, CodedOutflow):
            fail = self.fail
            p.flow.begin(link, size, lambda e: self.engine.loop.call(lambda: fail(p, e)))
        return size

    def _event_failed(self, p: Push, e: Exception) -> None:
        if isinstance(e, CommError):  # of a device that does not copy
            self.fail(p, e)
            return
        text = f"the event that its blocks wait for failed: {type(e).__name__}: {e}"
        self.fail(p, DistributedRuntimeError(text))

    def _expire(self, p: Push) -> None:
        state = p.handle.state
        if p.link is None:
            what = f"node {p.target} never came ({self.engine.links.why_absent(p.target)})"
        elif p.handle.awaits(Event.ACCEPT):
            what = f"node {p.target} has not said `receive`"
        else:
            what = f"it is {state.value}, {p.handle.progress}"
        self.fail(p, CommTimeoutError(f"not landed within {p.handle.deadline_s:g} s: {what}"))

    def fail(self, p: Push, error: CommError, *, told: bool = False) -> None:
        """End a push: tell its receiver, fence its blocks, then tell its caller."""
        step = p.handle.take(ending(error))
        if step is None:
            return
        p.error = bare(error)
        self._forget(p)
        links = set()
        if p.link is not None:
            known = self._by_tid.pop((p.link, p.tid), None) is not None
            if known and step.tells and not told:
                p.link.send(failure(p.tid, error))
            if known or told:
                links.add(p.link)
        if p.offered is None:
            self._failed[p.key] = error
            self.engine.gossip(p.key, error, links)
        self._fence(p)

    def _fence(self, p: Push) -> None:
        """Let no thread begin at its blocks, and go on when the last has left them."""
        if p.watch is not None:
            p.watch.follow()
        p.flow.idle = lambda: self.engine.loop.call(lambda: self._quiet(p))
        p.flow.stop()
        self._quiet(p)

    def _quiet(self, p: Push) -> None:
        """Finish a push once no thread reads its blocks any more."""
        if p.flow.busy:
            return
        error = None
        if p.error is not None:
            error = transfer_error(p.key, f"to node {p.target}", p.error)
        if p.pool is not None:
            p.pool.release(p)

        def ended() -> None:
            if p.offered is None:
                if error is None:
                    self._landed[p.target, p.key] = True
                self.engine.report(p.handle, error)

        if p.handle.take(Event.IDLE, error=error, first=ended) is None:
            return
        if p.watch is not None:
            p.watch.follow()
        p.watch = p.flow.idle = p.flow.broken = None  # they refer to it
        self.live.discard(p)
        p.tensors = None
        p.flow.extent = None
        if p.offered is not None:
            self.offering.served(p, p.offered)
            return
        self.engine.completed(p.handle, error)

    def _break_off(self, p: Push) -> None:
        if p.flow.busy and p.link is not None:
            p.link.abort_data()

    def _forget(self, p: Push) -> None:
        with self._lock:
            if self._active.get((p.target, p.key)) is p:
                del self._active[p.target, p.key]

    def close(self, error: CommError) -> None:
        """Fail everything."""
        for p in list(self.live):
            self.fail(p, error)
        for o in list(self.offering.offers.values()):
            self.offering.fail(o, error)
