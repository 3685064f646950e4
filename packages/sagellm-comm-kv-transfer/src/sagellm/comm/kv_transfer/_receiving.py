"""Transfers that this node receives, from one sender or from several that hold parts.

A receive has landed when the parts that its senders were granted cover everything its blocks
hold and all of it is verified. Each sender is granted what nobody was granted before it, so
replicated heads cross the wire once. Everything here runs on the event loop, except `on_frame`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from sagellm.core.protocols import (
    CommError,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    IntegrityError,
    KVBlock,
    ResourceError,
    TransferKey,
    TransferState,
)

from . import wire
from ._flows import Inflow
from ._granting import Granter
from ._link import Link
from ._receive import End, Receive, Source
from ._records import Memory, failure
from .frames import SEALED, Header
from .plan import check_layouts, coverage_gap, shared_parts
from .pool import BlockTable, PoolExtent
from .transfer import TransferHandle, transfer_error

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["Receiving"]

logger = logging.getLogger(__name__)


class Receiving:
    """All receives of a channel.

    Args:
        engine: The channel's engine.

    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._active: dict[TransferKey, Receive] = {}
        self._next: list[Receive] = []
        self._fetches: set[Receive] = set()
        self._parked: dict[tuple[Link, int], wire.Offer] = {}
        self._by_tid: dict[tuple[Link, int], tuple[Receive, Source]] = {}
        self._ended: Memory[TransferKey, End] = Memory(engine.settings.max_remembered)
        self._granter = Granter(lambda: engine.pool, engine.settings.max_bounce_bytes)
        self._starved: list[tuple[Receive, Link, wire.Offer]] = []

    def in_flight(self) -> list[TransferHandle]:
        """Receives that have not ended."""
        return [r.handle for r in (*self._active.values(), *self._next, *self._fetches)]

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
            if (end := self._ended.get(r.key)) is not None:
                return self._repeat(r, end)
        if r.pool is not None:
            r.pool.lease(r, f"{r.key.id}/{r.key.attempt}", r.blocks)
        if r.named:
            self._active[r.key] = r
        else:
            self._next.append(r)
        self._arm(r)
        if not r.named:
            for (link, _), offer in self._parked.items():
                if self._name(r, link, TransferKey(offer.id, offer.attempt)):
                    break
        if self._active.get(r.key) is r:
            for (link, tid), offer in list(self._parked.items()):
                if (offer.id, offer.attempt) == r.key and r.error is None:
                    del self._parked[link, tid]
                    self._join(r, link, offer)
            for link in self._engine.links:
                self._refuse_misfits(link)
            self._invite(r)
        return r.handle

    def _repeat(self, r: Receive, end: End) -> TransferHandle:
        if end.error is not None:
            r.error = end.error
            self._quiet(r)
        elif end.fingerprint is not None and end.fingerprint == r.fingerprint():
            r.handle.step(TransferState.ACCEPTED)
            r.handle.land()
        else:
            raise ConfigError(
                f"{r.key.id}/{r.key.attempt} has landed here before, in other blocks; "
                "another try needs another attempt number"
            )
        return r.handle

    def fetch(self, r: Receive, peer: int, layers: Sequence[int] | None) -> None:
        """Begin to pull."""
        r.fetch_from, r.fetch_layers = peer, layers
        self._fetches.add(r)
        self._arm(r)

    def request(
        self, r: Receive, link: Link, src_blocks: BlockTable | None, deadline_s: float
    ) -> None:
        """Ask the peer for the blocks, now that the link is up and has the peer's layout."""
        if r.error is not None:
            return
        assert r.pool is not None, "fetch was given blocks of a pool"
        assert r.blocks is not None, "fetch was given blocks of a pool"
        if link.layout is None:
            self.fail(r, ConfigError(f"node {link.peer} has no pool to fetch from"))
            return
        try:
            check_layouts(r.pool.layout, link.layout)
        except CommError as e:
            self.fail(r, e)
            return
        parts = shared_parts(r.pool.layout, link.layout)
        tid = link.new_tid()
        inflow = Inflow(r.handle, tid, PoolExtent(r.pool, r.blocks, parts), r.fetch_layers)
        r.wanted = parts
        self._enter(r, Source(link, inflow, parts, sealed=True))
        link.send(
            wire.Fetch(
                tid,
                r.key.id,
                r.key.attempt,
                {n: len(ids) for n, ids in r.blocks.items()},
                parts,
                None if src_blocks is None else {n: i.tobytes() for n, i in src_blocks.items()},
                None if r.fetch_layers is None else list(r.fetch_layers),
                deadline_s,
            )
        )
        r.handle.step(TransferState.ACCEPTED)
        self._maybe_land(r)

    # -- from peers -------------------------------------------------------------------------

    def on_offer(self, link: Link, offer: wire.Offer) -> None:
        """A peer wants to push."""
        name = (link, offer.tid)
        if name in self._by_tid or name in self._parked or offer.tid >= wire.INVITED:
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
            self._parked[link, offer.tid] = offer
            for candidate in list(self._next):
                if self._name(candidate, link, key):
                    del self._parked[link, offer.tid]
                    self._join(candidate, link, offer)
                    return
            mine = [o for (of, _), o in self._parked.items() if of is link]
            limits = self._engine.settings
            held = sum(map(wire.held_bytes, mine))
            if len(mine) > limits.max_in_flight or held > limits.max_backlog_bytes:
                del self._parked[link, offer.tid]
                full = f"node {self._engine.node_id} holds too many offers nobody has received"
                link.send(failure(offer.tid, ResourceError(full)))

    def on_sealed(self, link: Link, message: wire.Sealed) -> None:
        """A stream is complete."""
        if (parked := self._parked.get((link, message.tid))) is not None:
            self._parked[link, message.tid] = msgspec.structs.replace(
                parked, sealed=True, num_tokens=message.num_tokens
            )
        elif (entry := self._by_tid.get((link, message.tid))) is not None:
            r, source = entry
            source.sealed = True
            r.handle.num_tokens = message.num_tokens
            self._maybe_land(r)
        else:
            for i, (r, of, offer) in enumerate(self._starved):
                if of is link and offer.tid == message.tid:
                    sealed = msgspec.structs.replace(
                        offer, sealed=True, num_tokens=message.num_tokens
                    )
                    self._starved[i] = (r, of, sealed)

    def on_release(self, link: Link, tid: int) -> None:
        """The sender knows that it has landed."""
        entry = self._by_tid.pop((link, tid), None)
        link.inflows.pop(tid, None)
        if entry is not None:
            r, source = entry
            source.released = True
            if r.landed and all(s.released for s in r.sources):
                r.handle.step(TransferState.RELEASED)

    def on_fail(self, link: Link, tid: int, error: CommError) -> bool:
        """The sender gave up; False when it is none of ours."""
        if (offer := self._parked.pop((link, tid), None)) is not None:
            self._remember(TransferKey(offer.id, offer.attempt), error)
            return True
        if (entry := self._by_tid.get((link, tid))) is not None:
            self.fail(entry[0], error)
            return True
        for r, of, offer in self._starved:
            if of is link and offer.tid == tid:
                self.fail(r, error)
                return True
        return False

    def fail_key(self, key: TransferKey, error: CommError) -> None:
        """The attempt has failed somewhere else."""
        if (r := self._active.get(key)) is not None:
            self.fail(r, error)
            return
        for (link, tid), offer in list(self._parked.items()):
            if (offer.id, offer.attempt) == key:
                del self._parked[link, tid]
                link.send(failure(tid, error))
        if self._ended.get(key) is None:
            self._remember(key, error)

    def on_frame(
        self, link: Link, flow: Inflow, head: Header, fresh: list[int], again: list[int]
    ) -> None:
        """A frame is in place; called on the link's reader thread."""
        if (entry := self._by_tid.get((link, flow.tid))) is None:
            return
        r, source = entry
        if head.flags & SEALED:
            source.sealed = True
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
            self._check_layers(r, (head.layer,))
            loop.call(lambda: link.send(wire.LayerDone(flow.tid, head.layer)))
            if flow.complete:
                loop.call(lambda: self._maybe_land(r))

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
        for key in [k for k in self._parked if k[0] is link]:
            del self._parked[key]
        for key in [k for k in self._by_tid if k[0] is link]:
            if (entry := self._by_tid.get(key)) is None:
                continue
            r, source = entry
            if r.landed:
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

    def _arm(self, r: Receive) -> None:
        left = max(0.0, r.handle.deadline - time.monotonic())
        r.timer = self._engine.loop.call_later(left, lambda: self._expire(r))

    def _expire(self, r: Receive) -> None:
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
                self._enter(r, Source(link, inflow, parts, sealed=False, invited=True))
                counts = {n: len(ids) for n, ids in r.blocks.items()}
                heard = link.layouts_heard
                link.send(wire.Invite(inflow.tid, *r.key, counts, parts, heard))

    def _withdraw(self, r: Receive, link: Link) -> None:
        """Forget an invitation that its sender has not taken and will not take."""
        for s in r.sources:
            if s.link is link and s.awaited:
                s.inflow.stop()
                del self._by_tid[link, s.inflow.tid]
                link.inflows.pop(s.inflow.tid, None)
                r.sources.remove(s)
                self._expect(r)
                return

    def _join(self, r: Receive, link: Link, offer: wire.Offer) -> None:
        """Let a sender contribute to a receive."""
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
        self._enter(r, source)
        r.handle.step(TransferState.ACCEPTED)
        link.send(wire.Grant(offer.tid, dict(parts)))
        self._maybe_land(r)

    def _enter(self, r: Receive, source: Source) -> None:
        r.sources.append(source)
        link, inflow = source.link, source.inflow
        self._expect(r)
        r.handle.via(link.path)
        self._by_tid[link, inflow.tid] = (r, source)
        link.inflows[inflow.tid] = inflow
        self._check_layers(r, range(inflow.extent.layers))

    @staticmethod
    def _expect(r: Receive) -> None:
        r.open_groups = {
            name
            for name, part in r.wanted.items()
            if coverage_gap(part, [p for s in r.sources if (p := s.parts.get(name)) is not None])
        }
        r.handle.expect(
            sum(s.inflow.total_bytes for s in r.sources),
            sum(s.inflow.total_units for s in r.sources),
            max((s.inflow.extent.layers for s in r.sources), default=0),
        )

    def _check_layers(self, r: Receive, layers: Sequence[int]) -> None:
        names = r.destination.group_names if r.destination is not None else []
        done = [
            i
            for i in layers
            if not (names and names[i] in r.open_groups)
            and all(s.inflow.layer_complete(i) for s in r.sources)
        ]
        if done:
            r.handle.layers_done(done)

    def _maybe_land(self, r: Receive) -> None:
        if r.error is not None or r.landed or not r.sources:
            return
        counts = r.destination.counts if r.destination is not None else {}
        if any(counts.get(name, 1) for name in r.open_groups):
            return
        if not all(s.sealed and s.inflow.complete for s in r.sources):
            return
        r.landed = True
        self._forget(r)
        if r.fetch_from is None:
            self._remember(r.key, None, r.fingerprint())
        for s in r.sources:
            s.inflow.stop()
            s.link.send(wire.Done(s.inflow.tid))
        blocks: Sequence[KVBlock] = ()
        if r.destination is not None:
            blocks = r.destination.blocks()
        self._free(r)
        r.handle.land(blocks)
        self._engine.completed(r.handle, None)

    def fail(self, r: Receive, error: CommError) -> None:
        """End a receive: tell its senders, fence its blocks, then tell its caller."""
        if r.error is not None or r.landed:
            return
        r.error = error
        self._forget(r)
        told = set()
        for link, offer in [(of, o) for x, of, o in self._starved if x is r]:
            link.send(failure(offer.tid, error))
            told.add(link)
        self._starved = [entry for entry in self._starved if entry[0] is not r]
        for s in r.sources:
            s.link.send(failure(s.inflow.tid, error))
            told.add(s.link)
            self._by_tid.pop((s.link, s.inflow.tid), None)
            s.link.inflows.pop(s.inflow.tid, None)
            s.inflow.idle = lambda: self._engine.loop.call(lambda: self._quiet(r))
            s.inflow.stop()
        if r.fetch_from is None and (r.named or r.sources):
            self._remember(r.key, error)
            self._engine.gossip(r.key, error, told)
        self._quiet(r)
        if not r.finished:
            self._engine.loop.call_later(
                self._engine.settings.quiesce_s, lambda: self._break_off(r)
            )

    def _quiet(self, r: Receive) -> None:
        """Finish a failed receive once no thread writes its blocks any more."""
        if r.finished or any(s.inflow.busy for s in r.sources):
            return
        r.finished = True
        assert r.error is not None, "only failed receives come here"
        self._free(r)
        invalid = r.destination_ids()
        came = sorted(r.came | (r.senders or frozenset()))
        who = f"from node {', '.join(map(str, came))}" if came else "from any node"
        error = transfer_error(r.key, who, r.error, invalid)
        r.handle.fail(error)
        self._engine.completed(r.handle, error)

    def _break_off(self, r: Receive) -> None:
        for s in r.sources:
            if s.inflow.busy:
                s.link.abort_data()

    def close(self, error: CommError) -> None:
        """Fail everything."""
        for r in (*self._active.values(), *self._next, *self._fetches):
            self.fail(r, error)

    # -- bookkeeping ------------------------------------------------------------------------

    def _remember(
        self, key: TransferKey, error: CommError | None, fingerprint: int | None = None
    ) -> None:
        self._ended[key] = End(error, fingerprint)

    def _forget(self, r: Receive) -> None:
        if r.timer is not None:
            r.timer.cancel()
        if self._active.get(r.key) is r:
            del self._active[r.key]
        if r in self._next:
            self._next.remove(r)
        self._fetches.discard(r)

    def _free(self, r: Receive) -> None:
        """Give back leases and room; then let those start that waited for it."""
        if r.pool is not None:
            r.pool.release(r)
        if self._granter.give_back(r):
            starved, self._starved = self._starved, []
            for waiting, link, offer in starved:
                if waiting.error is None:
                    self._join(waiting, link, offer)
