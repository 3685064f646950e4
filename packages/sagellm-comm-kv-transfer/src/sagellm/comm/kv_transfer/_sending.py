"""Transfers that this node sends: pushes and streams, and offers that peers fetch.

Everything here runs on the event loop. A push lands when its receiver says that all senders'
parts of it are in place, so that a failure anywhere reaches every side of the transfer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from sagellm.core.protocols import (
    CacheGroup,
    CommError,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    IntegrityError,
    KVLayout,
    ResourceError,
    TransferKey,
    TransferState,
)

from . import wire
from ._bounce import block_ids
from ._flows import Span
from ._link import Link
from ._push import Offered, Push
from ._records import Memory, failure, key_failure
from .frames import SEALED
from .memory import TensorExtent
from .plan import Part, held_part, inner_axes
from .pool import BlockTable, PoolExtent
from .transfer import TransferHandle, transfer_error

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["Sending"]


class Sending:
    """All pushes and offers of a channel.

    Args:
        engine: The channel's engine.

    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._active: dict[tuple[int, TransferKey], Push] = {}
        self._serving: set[Push] = set()
        self._by_tid: dict[tuple[Link, int], Push] = {}
        self._offers: dict[str, Offered] = {}
        self._fetches: dict[tuple[Link, int], wire.Fetch] = {}
        self._landed: Memory[tuple[int, TransferKey], bool] = Memory(engine.settings.max_remembered)
        self._failed: Memory[TransferKey, CommError] = Memory(engine.settings.max_remembered)

    def in_flight(self) -> list[TransferHandle]:
        """Pushes and offers that have not ended."""
        return [p.handle for p in self._active.values()] + [o.handle for o in self._offers.values()]

    # -- from this node ---------------------------------------------------------------------

    def push(self, p: Push) -> Push:
        """Begin to push; the result may be an earlier, equal push."""
        name = (p.target, p.key)
        if (same := self._active.get(name)) is not None:
            if not same.sends_what(p):
                raise ConfigError(
                    f"transfer {p.key.id}/{p.key.attempt} to node {p.target} is under way already, "
                    "with other blocks; another try needs another attempt number"
                )
            return same
        if self._landed.get(name):
            p.landed = True
            p.handle.step(TransferState.ACCEPTED)
            p.handle.land()
            p.handle.step(TransferState.RELEASED)
            return p
        if (error := self._failed.get(p.key)) is not None:
            p.error = error
            self._quiet(p)
            return p
        if len(self._active) >= self._engine.settings.max_in_flight:
            raise ResourceError(
                f"{len(self._active)} transfers are in flight already; max_in_flight is "
                f"{self._engine.settings.max_in_flight}"
            )
        link = self._engine.links.to(p.target, p.handle.deadline)
        if p.pool is not None:
            p.pool.lease(p, f"{p.key.id}/{p.key.attempt}")
        self._active[name] = p
        p.timer = self._engine.loop.call_later(p.handle.deadline_s, lambda: self._expire(p))
        link.when_up(lambda error: self._start(p, link, error))
        return p

    def _start(self, p: Push, link: Link, error: CommError | None) -> None:
        if p.error is not None:
            if error is None:  # it failed before they met: the receiver may be waiting for it
                link.send(key_failure(p.key, p.error))
            return
        if error is not None:
            self.fail(p, error)
            return
        invite = link.invitations.take(p.key)
        p.link = link
        if p.tensors is None and link.mismatch is not None:
            self.fail(p, link.mismatch)
        elif invite is not None and p.pool is self._engine.pool and _fits(p, invite):
            self._accept(p, link, invite)
        else:
            self._offer_to(p, link)

    def _accept(self, p: Push, link: Link, invite: wire.Invite) -> None:
        """Send what the receiver has asked for ahead."""
        assert p.pool is not None, "an invitation fits blocks of a pool only"
        p.tid = p.flow.tid = invite.tid
        self._by_tid[link, p.tid] = p
        p.flow.extent = extent = PoolExtent(p.pool, p.blocks, invite.parts)
        if p.sealed:
            p.flow.flags = SEALED
            if not any(map(extent.units, range(extent.layers))):  # no frame will say so
                link.send(wire.Sealed(p.tid, p.num_tokens))
        self._go(p, link)

    def _offer_to(self, p: Push, link: Link) -> None:
        p.tid = p.flow.tid = link.new_tid()
        self._by_tid[link, p.tid] = p
        infos = None
        if p.tensors is not None:
            infos = [
                wire.TensorInfo(
                    tuple(b.tensor.shape),
                    str(b.tensor.dtype).removeprefix("torch."),
                    b.layer,
                    b.index,
                )
                for b in p.tensors
            ]
        named = p.dst_blocks
        link.send(
            wire.Offer(
                p.tid,
                p.key.id,
                p.key.attempt,
                {n: len(ids) for n, ids in p.blocks.items()},
                infos,
                self._engine.settings.page_bytes,
                None if named is None else {n: i.tobytes() for n, i in named.items()},
                p.sealed,
                p.num_tokens,
            )
        )

    def seal(self, p: Push, num_tokens: int) -> None:
        """Say that a stream is complete."""
        p.sealed, p.num_tokens = True, num_tokens
        p.handle.num_tokens = num_tokens
        if p.link is not None and (p.link, p.tid) in self._by_tid:
            p.link.send(wire.Sealed(p.tid, num_tokens))

    def offer(self, o: Offered, ttl_s: float) -> None:
        """Let peers fetch.

        Raises:
            ConfigError: An offer of that id stands already.

        """
        if o.handle.key.id in self._offers:
            raise ConfigError(f"an offer {o.handle.key.id!r} stands already")
        o.pool.lease(o, o.handle.key.id)
        self._offers[o.handle.key.id] = o
        o.timer = self._engine.loop.call_later(ttl_s, lambda: self._expire_offer(o, ttl_s))
        for (link, tid), fetch in list(self._fetches.items()):
            if fetch.id == o.handle.key.id:
                del self._fetches[link, tid]
                self._serve(o, link, fetch)

    # -- from peers -------------------------------------------------------------------------

    def on_grant(self, link: Link, grant: wire.Grant) -> None:
        """The receiver says what to send."""
        p = self._by_tid.get((link, grant.tid))
        if p is None or p.flow.extent is not None:
            return
        if p.tensors is not None:
            page = self._engine.settings.page_bytes
            p.flow.extent = TensorExtent([b.tensor for b in p.tensors], page)
        else:
            assert p.pool is not None, "blocks belong to a pool"
            _check_parts(p.pool.layout, grant.parts, link.peer)
            p.flow.extent = PoolExtent(p.pool, p.blocks, grant.parts)
        self._go(p, link)

    def on_invite(self, link: Link, invite: wire.Invite) -> None:
        """A receiver is ready before we have begun."""
        if not link.outgoing or not link.invitations.fresh(invite.tid):
            link.lose(DistributedRuntimeError(f"node {link.peer} invites out of turn"))
            return
        key, pool = TransferKey(invite.id, invite.attempt), self._engine.pool
        if invite.layouts != link.layouts_told or (link.peer, key) in self._active:
            return  # it crossed our new layout, or our offer
        if pool is not None and self._failed.get(key) is None:
            _check_parts(pool.layout, invite.parts, link.peer)
            link.invitations.add(invite)

    def on_fetch(self, link: Link, fetch: wire.Fetch) -> None:
        """A peer wants to pull."""
        self._engine.links.ensure_both_ways(link)
        if (link, fetch.tid) in self._by_tid or (link, fetch.tid) in self._fetches:
            link.lose(
                DistributedRuntimeError(f"node {link.peer} uses transfer id {fetch.tid} twice")
            )
            return
        limits = self._engine.settings
        if len(self._serving) >= limits.max_in_flight:
            busy = f"node {self._engine.node_id} serves {len(self._serving)} fetches already"
            link.send(failure(fetch.tid, ResourceError(f"{busy}; fetch again later")))
            return
        if (offered := self._offers.get(fetch.id)) is not None:
            self._serve(offered, link, fetch)
            return
        held = sum(map(wire.held_bytes, (*self._fetches.values(), fetch)))
        if len(self._fetches) >= limits.max_in_flight or held > limits.max_backlog_bytes:
            full = f"node {self._engine.node_id} holds too many fetches nobody has offered"
            link.send(failure(fetch.tid, ResourceError(full)))
            return
        self._fetches[link, fetch.tid] = fetch

    def on_nack(self, link: Link, nack: wire.Nack) -> None:
        """Blocks arrived changed: send them once more."""
        p = self._by_tid.get((link, nack.tid))
        if p is None or (extent := p.flow.extent) is None:
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
            return
        if not 0 <= done.layer < extent.layers:
            self.fail(p, IntegrityError(f"node {link.peer} confirms a layer it was not sent"))
            return
        p.handle.layers_done([done.layer])

    def on_done(self, link: Link, tid: int) -> None:
        """The receiver has everything, verified."""
        p = self._by_tid.pop((link, tid), None)
        if p is None or p.error is not None:
            return
        link.send(wire.Release(tid))
        p.landed = True
        self._forget(p)
        p.flow.idle = lambda: self._engine.loop.call(lambda: self._quiet(p))
        p.flow.stop()
        self._quiet(p)

    def on_fail(self, link: Link, tid: int, error: CommError) -> bool:
        """The receiver gave up; False when it is none of ours."""
        if self._fetches.pop((link, tid), None) is not None:
            return True
        if (invite := link.invitations.forget(tid)) is not None:
            self._failed[TransferKey(invite.id, invite.attempt)] = error
            return True
        if (p := self._by_tid.get((link, tid))) is None:
            return False
        self.fail(p, error, told=True)
        return True

    def fail_key(self, key: TransferKey, error: CommError) -> None:
        """The attempt has failed somewhere else."""
        self._failed[key] = error
        for p in [p for p in self._active.values() if p.key == key]:
            self.fail(p, error)

    def link_lost(self, link: Link, error: CommError) -> None:
        """Fail what went over a link."""
        for p in [p for (of, _), p in self._by_tid.items() if of is link]:
            self.fail(p, error)
        for name in [n for n in self._fetches if n[0] is link]:
            del self._fetches[name]

    # -- the life of a push -----------------------------------------------------------------

    def _go(self, p: Push, link: Link) -> None:
        extent = p.flow.extent
        assert extent is not None, "granted"
        units = [extent.units(i) for i in range(extent.layers)]
        size = sum(extent.span_bytes(i, 0, n) for i, n in enumerate(units) if n)
        p.handle.expect(size, sum(units), extent.layers)
        p.handle.layers_done([i for i, n in enumerate(units) if not n])  # nothing to wait for
        p.handle.via(link.path)
        p.handle.step(TransferState.ACCEPTED)
        link.writer.add(p.flow)

    def _serve(self, o: Offered, link: Link, fetch: wire.Fetch) -> None:
        handle = TransferHandle(
            TransferKey(fetch.id, fetch.attempt), "send", fetch.deadline_s, lambda _: False
        )
        p = Push(handle, link.peer, pool=o.pool, blocks=o.blocks)
        p.link, p.tid, p.offered = link, fetch.tid, o
        p.flow.tid = fetch.tid
        try:
            if fetch.src_blocks is not None:
                p.blocks = _chosen(o.blocks, fetch.src_blocks)
            elif fetch.layers is None:
                p.full_fetch = fetch.parts
            counts = {n: len(ids) for n, ids in p.blocks.items()}
            if counts != fetch.counts:
                raise ConfigError(
                    f"node {link.peer} fetches {fetch.counts} blocks of {counts} offered"
                )
            _check_parts(o.pool.layout, fetch.parts, link.peer)
            p.flow.extent = PoolExtent(o.pool, p.blocks, fetch.parts)
        except CommError as e:
            link.send(failure(fetch.tid, e))
            return
        o.served.add(p)
        self._serving.add(p)
        self._by_tid[link, fetch.tid] = p
        wanted = None if fetch.layers is None else set(fetch.layers)
        p.flow.queue(s for s in p.all_spans(o.after) if wanted is None or s.layer in wanted)
        o.handle.step(TransferState.ACCEPTED)
        self._go(p, link)

    def _expire(self, p: Push) -> None:
        state = p.handle.state
        if p.link is None:
            what = f"node {p.target} never came ({self._engine.links.why_absent(p.target)})"
        elif state is TransferState.OFFERED:
            what = f"node {p.target} has not said `receive`"
        else:
            what = f"it is {state.value}, {p.handle.progress}"
        self.fail(p, CommTimeoutError(f"not landed within {p.handle.deadline_s:g} s: {what}"))

    def _expire_offer(self, o: Offered, ttl_s: float) -> None:
        self.fail_offer(o, CommTimeoutError(f"not fetched within its {ttl_s:g} s"))

    def fail(self, p: Push, error: CommError, *, told: bool = False) -> None:
        """End a push: tell its receiver, fence its blocks, then tell its caller."""
        if p.error is not None or p.landed:
            return
        p.error = error
        self._forget(p)
        links = set()
        if p.link is not None:
            if self._by_tid.pop((p.link, p.tid), None) is not None and not told:
                p.link.send(failure(p.tid, error))
                links.add(p.link)
            elif told:
                links.add(p.link)
        if p.offered is None:
            self._failed[p.key] = error
            self._engine.gossip(p.key, error, links)
        p.flow.idle = lambda: self._engine.loop.call(lambda: self._quiet(p))
        p.flow.stop()
        self._quiet(p)
        if not p.finished:
            self._engine.loop.call_later(
                self._engine.settings.quiesce_s, lambda: self._break_off(p)
            )

    def fail_offer(self, o: Offered, error: CommError) -> None:
        """End an offer, and what is being fetched of it."""
        if self._offers.get(o.handle.key.id) is not o:
            return
        del self._offers[o.handle.key.id]
        if o.timer is not None:
            o.timer.cancel()
        o.ending = error  # before the last of what is served ends it
        for p in list(o.served):
            self.fail(p, error)
        self._end_offer(o, error)

    def _quiet(self, p: Push) -> None:
        """Finish a push once no thread reads its blocks any more."""
        if p.finished or p.flow.busy:
            return
        p.finished = True
        if p.pool is not None:
            p.pool.release(p)
        p.tensors = None
        p.flow.extent = None
        if p.offered is not None:
            self._end_serving(p, p.offered)
            return
        if p.landed:
            self._landed[p.target, p.key] = True
            p.handle.step(TransferState.ACCEPTED)
            p.handle.land()
            p.handle.step(TransferState.RELEASED)
            self._engine.completed(p.handle, None)
            return
        assert p.error is not None, "neither landed nor failed"
        error = transfer_error(p.key, f"to node {p.target}", p.error)
        p.handle.fail(error)
        self._engine.completed(p.handle, error)

    def _end_serving(self, p: Push, o: Offered) -> None:
        o.served.discard(p)
        self._serving.discard(p)
        if self._offers.get(o.handle.key.id) is not o:
            if not o.served:
                self._finish_offer(o)
            return
        if p.landed and p.full_fetch and self._all_read(p, o):
            del self._offers[o.handle.key.id]
            if o.timer is not None:
                o.timer.cancel()
            self._end_offer(o, None)

    def _all_read(self, p: Push, o: Offered) -> bool:
        """Count a fetch; True once every node that holds a part has fetched it."""
        replicas = 1
        for group in o.pool.layout.groups:
            part = p.full_fetch.get(group.name)
            if part is None:
                continue
            held = held_part(group, part.axis)
            reads = o.reads.setdefault(group.name, np.zeros(held.stop - held.first, dtype=np.int64))
            if len(reads) == held.stop - held.first:
                reads[part.first - held.first : part.stop - held.first] += 1
        if p.link is not None and p.link.layout is not None:
            shards = [g.shard for g in p.link.layout.groups if g.shard is not None]
            replicas = max((s.replicas for s in shards), default=1)
        return all(int(r.min()) >= replicas for r in o.reads.values())

    def _end_offer(self, o: Offered, error: CommError | None) -> None:
        o.ending = error
        if not o.served:
            self._finish_offer(o)

    def _finish_offer(self, o: Offered) -> None:
        if o.handle.done():
            return
        o.pool.release(o)
        if o.ending is None:
            o.handle.step(TransferState.ACCEPTED)
            o.handle.land()
            o.handle.step(TransferState.RELEASED)
            self._engine.completed(o.handle, None)
            return
        error = transfer_error(o.handle.key, "offered", o.ending)
        o.handle.fail(error)
        self._engine.completed(o.handle, error)

    def _break_off(self, p: Push) -> None:
        if p.flow.busy and p.link is not None:
            p.link.abort_data()

    def _forget(self, p: Push) -> None:
        if p.timer is not None:
            p.timer.cancel()
        if self._active.get((p.target, p.key)) is p:
            del self._active[p.target, p.key]

    def close(self, error: CommError) -> None:
        """Fail everything."""
        for p in (*self._active.values(), *self._serving):
            self.fail(p, error)
        for o in list(self._offers.values()):
            self.fail_offer(o, error)


def _check_parts(layout: KVLayout, parts: Mapping[str, Part], peer: int) -> None:
    """Check that a peer asks for no more than is held here.

    Raises:
        DistributedRuntimeError: It does, which no honest peer would.

    """
    groups: dict[str, CacheGroup] = {g.name: g for g in layout.groups}
    for name, part in parts.items():
        group = groups.get(name)
        if group is not None and part.axis in ("", *inner_axes(group)):
            held = held_part(group, part.axis)
            if held.first <= part.first < part.stop <= held.stop:
                continue
        raise DistributedRuntimeError(f"node {peer} asks for {name!r} {part}, not held here")


def _fits(p: Push, invite: wire.Invite) -> bool:
    """Whether an invitation says all there is to agree on; if not, an offer finds out what."""
    if p.tensors is not None or p.dst_blocks is not None:
        return False
    return {n: len(ids) for n, ids in p.blocks.items()} == invite.counts


def _chosen(offered: BlockTable, raw: Mapping[str, bytes]) -> BlockTable:
    """The blocks that a fetch has chosen from an offer.

    Raises:
        ConfigError: Some of them were not offered.

    """
    chosen = block_ids(raw)
    for name, ids in chosen.items():
        if name not in offered or not np.isin(ids, offered[name]).all():
            raise ConfigError(f"blocks of group {name!r} are fetched that were not offered")
    return {n: chosen.get(n, ids[:0]) for n, ids in offered.items()}
