"""Blocks that this node lets peers fetch, for as long as their lease lasts.

Everything here runs on the event loop. A fetch is served by a push whose grant came with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from sagellm.core.protocols import (
    CommError,
    ConfigError,
    KVTransferError,
    ResourceError,
    TransferKey,
)

from . import wire
from ._arguments import check_deadline
from ._backlog import Backlog
from ._block_table import BlockTable
from ._bounce import block_ids
from ._coded_request import requested
from ._device_extent import extent_of
from ._limits import Watch
from ._link import Link
from ._push import Offered, Push
from ._records import LEASE_EXPIRED, ending, failure
from .plan import check_parts, held_part
from .state import RULES, Event
from .transfer import TransferHandle, transfer_error

if TYPE_CHECKING:
    from ._sending import Sending

__all__ = ["Offering"]


class Offering:
    """All offers of a channel, and the fetches that wait for one.

    Args:
        sending: Carries out what is fetched.

    """

    def __init__(self, sending: Sending) -> None:
        engine = sending.engine
        limits = engine.settings
        self._sending = sending
        self._engine = engine
        self.offers: dict[str, Offered] = {}
        self.ending: set[Offered] = set()
        self.serving: set[Push] = set()
        self.fetches: Backlog[wire.Fetch] = Backlog(
            limits.max_in_flight, limits.max_backlog_bytes, engine.waiting
        )

    def offer(self, o: Offered) -> None:
        """Let peers fetch.

        Raises:
            ConfigError: An offer of that id stands already.
            ResourceError: Too many offers stand, or too much has ended and waits for `poll`.

        """
        self._engine.completions.check_room()
        name, limit = o.handle.key.id, self._engine.settings.max_in_flight
        if name in self.offers:
            raise ConfigError(f"an offer {name!r} stands already")
        if len(self.offers) >= limit:
            raise ResourceError(f"{limit} offers stand already, which is max_in_flight")
        o.pool.lease(o, name, read=o.blocks)
        self.offers[name] = o
        o.watch = Watch(
            self._engine.loop,
            o.handle,
            self._engine.settings,
            lambda: 0,
            lambda: self._expire(o),
            lambda: None,
        )
        o.watch.follow()
        for link, fetch in self.fetches.of(name):
            self.fetches.pop(link, fetch.tid)
            self._serve(o, link, fetch)

    def on_fetch(self, link: Link, fetch: wire.Fetch) -> None:
        """A peer wants to pull; its tid is new."""
        limit = self._engine.settings.max_in_flight
        if len(self.serving) >= limit:
            busy = f"node {self._engine.node_id} serves {len(self.serving)} fetches already"
            link.send(failure(fetch.tid, ResourceError(f"{busy}; fetch again later")))
        elif (offered := self.offers.get(fetch.id)) is not None:
            self._serve(offered, link, fetch)
        elif not self.fetches.add(link, fetch):
            full = f"node {self._engine.node_id} holds too many fetches nobody has offered"
            link.send(failure(fetch.tid, ResourceError(full)))

    def _serve(self, o: Offered, link: Link, fetch: wire.Fetch) -> None:
        size = wire.held_bytes(fetch)
        if not self._engine.waiting.take(size):
            full = (
                f"node {self._engine.node_id} has no memory for what is fetched; fetch again later"
            )
            link.send(failure(fetch.tid, ResourceError(full)))
            return
        try:
            check_deadline(fetch.deadline_s)
            handle = TransferHandle(
                TransferKey(fetch.id, fetch.attempt), "send", fetch.deadline_s, lambda _: False
            )
            codec = requested(fetch, o.codec) if fetch.codec else o.codec
            if codec is not None and link.coding is not None and (why := link.coding.lacks(codec)):
                raise ConfigError(why)
            p = Push(handle, link.peer, pool=o.pool, blocks=o.blocks, codec=codec)
            p.link, p.tid, p.offered = link, fetch.tid, o
            p.flow.tid = fetch.tid
            if fetch.src_blocks is not None:
                p.blocks = _chosen(o.blocks, fetch.src_blocks)
            elif fetch.layers is None:
                p.full_fetch = fetch.parts
            counts = {n: len(ids) for n, ids in p.blocks.items()}
            if counts != fetch.counts:
                raise ConfigError(
                    f"node {link.peer} fetches {fetch.counts} blocks of {counts} offered"
                )
            check_parts(o.pool.layout, fetch.parts, link.peer)
            p.flow.extent = extent_of(o.pool, p.blocks, fetch.parts)
        except CommError as e:
            self._engine.waiting.give(size)
            link.send(failure(fetch.tid, e))
            return
        except BaseException:
            self._engine.waiting.give(size)
            raise
        p.room_bytes = size
        o.served.add(p)
        self.serving.add(p)
        wanted = None if fetch.layers is None else set(fetch.layers)
        p.flow.queue(s for s in p.all_spans(o.after) if wanted is None or s.layer in wanted)
        o.handle.take(Event.ACCEPT)
        link.send(wire.Sealed(fetch.tid, o.num_tokens))
        self._sending.serve(p, link)

    def served(self, p: Push, o: Offered) -> None:
        """A fetch has ended, one way or the other."""
        o.served.discard(p)
        self.serving.discard(p)
        self._engine.waiting.give(p.room_bytes)
        landed = RULES[p.handle.phase].landed
        if landed and p.full_fetch and o.handle.awaits(Event.DONE) and self._all_read(p, o):
            o.handle.take(Event.DONE)
            self._close(o)
        self._finish(o)

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

    def _expire(self, o: Offered) -> None:
        text = f"not fetched within its {o.handle.deadline_s:g} s"
        self.fail(o, KVTransferError(text, cause=LEASE_EXPIRED))

    def fail(self, o: Offered, error: CommError) -> None:
        """End an offer, and what is being fetched of it."""
        if o.handle.take(ending(error)) is None:
            return
        o.error = error
        self._close(o)
        for p in list(o.served):
            self._sending.fail(p, error)
        self._finish(o)

    def _close(self, o: Offered) -> None:
        del self.offers[o.handle.key.id]
        self.ending.add(o)
        if o.watch is not None:
            o.watch.follow()

    def _finish(self, o: Offered) -> None:
        """End an offer that has been given up, or read by all, once nobody reads it."""
        if o.served or o not in self.ending:
            return
        self.ending.discard(o)
        error = None
        if o.error is not None:
            error = transfer_error(o.handle.key, "offered", o.error)
        o.pool.release(o)
        o.handle.take(Event.IDLE, error=error, first=lambda: self._engine.report(o.handle, error))
        if o.watch is not None:
            o.watch.follow()
        o.watch = None  # it refers to it
        self._engine.completed(o.handle, error)


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
