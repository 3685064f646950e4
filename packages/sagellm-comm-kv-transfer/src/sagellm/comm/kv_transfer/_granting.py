"""Which part of an offer is taken, and where it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from sagellm.core.protocols import ConfigError, KVLayout

from . import wire
from ._bounce import Destination, block_ids, bounce_for_layout, bounce_for_tensors
from ._link import Link
from ._receive import Receive
from .memory import Extent
from .plan import Part, check_layouts, coverage_gap, shared_parts
from .pool import RegisteredPool

__all__ = ["Granter"]


class Granter:
    """Answers offers within the memory there is; runs on the event loop.

    Args:
        pool: Gives the registered pool, if there is one.
        max_bounce_bytes: Memory for transfers without destination, all together.

    """

    def __init__(self, pool: Callable[[], RegisteredPool | None], max_bounce_bytes: int) -> None:
        self._pool = pool
        self._limit = max_bounce_bytes
        self.used = 0

    def plan(
        self, r: Receive, link: Link, offer: wire.Offer
    ) -> tuple[Extent, dict[str, Part]] | None:
        """Where a sender's bytes go; None when there is no room just now."""
        if offer.tensors is not None:
            if r.blocks is not None:
                raise ConfigError("plain tensors were sent, which have no place in blocks")
            if r.sources:
                raise ConfigError("plain tensors under one key come from one node")
            made = bounce_for_tensors(offer.tensors, offer.page_bytes, self._room())
            if made is None:
                return None
            self._use(r, made)
            return made.extent_for({}), {}
        if r.destination is None and r.blocks is None:
            own = self._pool()
            ours = own.layout if own is not None else link.layout
            if ours is None or link.layout is None:
                raise ConfigError(f"node {link.peer} sends blocks and has no pool registered")
            check_layouts(ours, link.layout)
            if offer.dst_blocks is not None:
                if not r.adopts:
                    raise ConfigError(
                        f"node {link.peer} names destination blocks, and this receive has not "
                        "said that it may: receive(key, blocks) or receive(key, adopt=True)"
                    )
                self._adopt(r, offer.dst_blocks)
            else:
                made = bounce_for_layout(ours, offer.counts, self._room())
                if made is None:
                    return None
                self._use(r, made)
        if r.destination is None:
            assert r.pool is not None, "destinations are pool blocks"
            assert r.blocks is not None, "destinations are pool blocks"
            r.destination = Destination(r.pool, r.blocks, 0)
        layout = r.destination.layout
        if link.layout is None:
            raise ConfigError(f"node {link.peer} sends blocks and has no pool registered")
        check_layouts(layout, link.layout)
        counts = r.destination.counts
        sent = {n: offer.counts.get(n, 0) for n in counts}
        if sent != counts:
            raise ConfigError(f"node {link.peer} sends {sent} blocks into {counts} destinations")
        if offer.dst_blocks is not None and r.blocks is not None:
            named = block_ids(offer.dst_blocks)
            if not all(np.array_equal(named.get(n, ids[:0]), ids) for n, ids in r.blocks.items()):
                raise ConfigError("the sender named other destinations than the receiver")
        return self._grant(r, link, layout)

    def _grant(self, r: Receive, link: Link, layout: KVLayout) -> tuple[Extent, dict[str, Part]]:
        """What this sender has and nobody was granted before."""
        assert r.destination is not None, "planned before"
        assert link.layout is not None, "planned before"
        parts = r.missing(layout, link.layout)
        return r.destination.extent_for(parts), parts

    def ahead(
        self, r: Receive, links: Iterable[Link]
    ) -> list[tuple[Link, Extent, dict[str, Part]]]:
        """What each of the named senders is to send, told before any has offered.

        Nothing when two of them hold the same part: it is for the first that comes.
        """
        assert r.pool is not None, "destinations are pool blocks"
        assert r.blocks is not None, "destinations are pool blocks"
        layout = r.pool.layout
        shares = []
        taken: dict[str, list[Part]] = {}
        for link in links:
            assert link.layout is not None, "compared before"
            parts = shared_parts(layout, link.layout)
            for name, part in parts.items():
                others = taken.setdefault(name, [])
                if any(p.axis != part.axis for p in others):
                    return []
                if coverage_gap(part, others) != [(part.first, part.stop)]:
                    return []
                others.append(part)
            shares.append((link, parts))
        r.destination = Destination(r.pool, r.blocks, 0)
        for _, parts in shares:
            r.want(layout, parts)
        return [(link, r.destination.extent_for(parts), parts) for link, parts in shares]

    def _adopt(self, r: Receive, raw: Mapping[str, bytes]) -> None:
        """Take the destinations that the sender knows; they are checked like our own."""
        pool = self._pool()
        if pool is None:
            raise ConfigError("destination blocks were named, and no pool is registered")
        blocks = pool.as_table(block_ids(raw), unique=True, what="dst_blocks")
        pool.lease(r, f"{r.key.id}/{r.key.attempt}", written=blocks, sole=True)
        r.pool, r.blocks = pool, blocks

    def _room(self) -> tuple[int, int]:
        """Bytes of bounce buffers that are free now, and that there are at all."""
        return self._limit - self.used, self._limit

    def _use(self, r: Receive, made: Destination) -> None:
        r.destination = made
        self.used += made.bounce_bytes

    def give_back(self, r: Receive) -> bool:
        """Count a transfer's memory as free; False when it had none."""
        if r.destination is None or not r.destination.bounce_bytes:
            return False
        self.used -= r.destination.bounce_bytes
        return True
