"""Pulls: receives that ask for their blocks. Everything here runs on the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sagellm.core.protocols import CommError, ConfigError

from . import wire
from ._block_table import BlockTable
from ._bounce import Destination
from ._flows import Inflow
from ._link import Link
from ._receive import Receive, Source
from .plan import check_layouts
from .state import Event

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["fetch"]


def fetch(
    engine: Engine,
    r: Receive,
    peers: Sequence[int],
    *,
    src_blocks: BlockTable | None = None,
    layers: Sequence[int] | None = None,
) -> None:
    """Begin to pull: lease our blocks, and ask the peers once all of them are there.

    Raises:
        ConfigError: Unknown peer, or a block is the destination of another transfer.
        ResourceError: Too many transfers are being received.

    """
    assert r.pool is not None, "fetch was given blocks of a pool"
    engine.receiving.check_room()
    links = [engine.links.to(peer, r.handle.deadline) for peer in peers]
    r.pool.lease(r, f"{r.key.id}/{r.key.attempt}", written=r.blocks)
    r.fetch_from, r.fetch_layers = tuple(peers), layers
    engine.receiving.arrivals.watch(r)
    absent = len(links)

    def up(error: CommError | None) -> None:
        nonlocal absent
        absent -= 1
        if r.error is not None or (error is None and absent):
            return
        try:
            if error is not None:
                raise error
            _request(engine, r, links, src_blocks)
        except CommError as e:
            engine.receiving.arrivals.fail(r, e)

    for link in links:
        link.when_up(up)


def _request(
    engine: Engine, r: Receive, links: Sequence[Link], src_blocks: BlockTable | None
) -> None:
    """Ask for the blocks, now that the links are up and have the peers' layouts."""
    assert r.pool is not None, "fetch was given blocks of a pool"
    assert r.blocks is not None, "fetch was given blocks of a pool"
    r.destination = Destination(r.pool, r.blocks, 0)
    for link in links:
        if link.error is not None:
            raise link.error
        if link.layout is None:
            raise ConfigError(f"node {link.peer} has no pool to fetch from")
        check_layouts(r.pool.layout, link.layout)
        parts = r.missing(r.pool.layout, link.layout)
        extent = r.destination.extent_for(parts)
        inflow = Inflow(r.handle, link.new_tid(), extent, r.fetch_layers)
        engine.receiving.arrivals.enter(r, Source(link, inflow, parts, sealed=False, whole=True))
    for name in sorted(r.open_groups):
        if r.blocks[name].size:
            held = {s.link.peer: s.parts[name][1:] for s in r.sources if name in s.parts}
            axis, first, stop = r.wanted[name]
            raise ConfigError(
                f"blocks of group {name!r} hold {axis or 'block'} {first}..{stop - 1}, and "
                f"nodes {[k.peer for k in links]} have [first, stop) {held} of it: "
                "give every node that holds a part as `peer`"
            )
    r.handle.take(Event.ACCEPT)
    for s in r.sources:
        engine.links.data.both_ways(s.link)
        codec = r.fetch_codec
        s.link.send(
            wire.Fetch(
                s.inflow.tid,
                r.key.id,
                r.key.attempt,
                {n: len(ids) for n, ids in r.blocks.items()},
                dict(s.parts),
                None if src_blocks is None else {n: i.tobytes() for n, i in src_blocks.items()},
                None if r.fetch_layers is None else list(r.fetch_layers),
                r.handle.deadline_s,
                "" if codec is None else codec.codec,
                {} if codec is None else dict(codec.options),
                None if codec is None else codec.max_error,
            )
        )
    engine.receiving.arrivals.maybe_land(r)
