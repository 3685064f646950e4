"""Pulls: receives that ask for their blocks. Everything here runs on the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sagellm.core.protocols import CommError, ConfigError

from . import wire
from ._flows import Inflow
from ._link import Link
from ._receive import Receive, Source
from .plan import check_layouts, shared_parts
from .pool import BlockTable, PoolExtent
from .state import Event

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["fetch"]


def fetch(
    engine: Engine,
    r: Receive,
    peer: int,
    *,
    src_blocks: BlockTable | None = None,
    layers: Sequence[int] | None = None,
) -> None:
    """Begin to pull: lease our blocks, and ask the peer once it is there.

    Raises:
        ConfigError: Unknown peer, or a block is the destination of another transfer.
        ResourceError: Too many transfers are being received.

    """
    assert r.pool is not None, "fetch was given blocks of a pool"
    engine.receiving.check_room()
    link = engine.links.to(peer, r.handle.deadline)
    r.pool.lease(r, f"{r.key.id}/{r.key.attempt}", r.blocks)
    r.fetch_from, r.fetch_layers = peer, layers
    engine.receiving.arrivals.watch(r)

    def up(error: CommError | None) -> None:
        if r.error is not None:
            return
        try:
            if error is not None:
                raise error
            _request(engine, r, link, src_blocks)
        except CommError as e:
            engine.receiving.arrivals.fail(r, e)

    link.when_up(up)


def _request(engine: Engine, r: Receive, link: Link, src_blocks: BlockTable | None) -> None:
    """Ask for the blocks, now that the link is up and has the peer's layout."""
    assert r.pool is not None, "fetch was given blocks of a pool"
    assert r.blocks is not None, "fetch was given blocks of a pool"
    if link.layout is None:
        raise ConfigError(f"node {link.peer} has no pool to fetch from")
    check_layouts(r.pool.layout, link.layout)
    engine.links.data.both_ways(link)
    parts = shared_parts(r.pool.layout, link.layout)
    inflow = Inflow(r.handle, link.new_tid(), PoolExtent(r.pool, r.blocks, parts), r.fetch_layers)
    r.wanted = parts
    engine.receiving.arrivals.enter(r, Source(link, inflow, parts, sealed=True))
    link.send(
        wire.Fetch(
            inflow.tid,
            r.key.id,
            r.key.attempt,
            {n: len(ids) for n, ids in r.blocks.items()},
            parts,
            None if src_blocks is None else {n: i.tobytes() for n, i in src_blocks.items()},
            None if r.fetch_layers is None else list(r.fetch_layers),
            r.handle.deadline_s,
        )
    )
    r.handle.take(Event.ACCEPT)
    engine.receiving.arrivals.maybe_land(r)
