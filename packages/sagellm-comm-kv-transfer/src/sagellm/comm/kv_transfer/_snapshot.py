"""Who holds which blocks and waits for whom, as plain data that JSON can carry."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, TypedDict

from ._block_table import BlockTable
from ._link import Link
from ._push import Offered, Push
from ._receive import Receive
from .state import RULES, Event
from .transfer import TransferHandle

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["LinkView", "Snapshot", "TransferView", "WaitingView", "cut", "take"]

_MAX_IDS = 64


class LinkView(TypedDict):
    """One link.

    `direction` is `out` when this node opened it. `invitations` counts pushes that the peer is
    ready to take and this node has not begun; `unread_bytes` what the peer has not read yet.
    """

    peer: int
    direction: str
    up: bool
    path: str
    address: str
    invitations: int
    unread_bytes: int


class TransferView(TypedDict):
    """One transfer that has not ended, or whose sender has not confirmed its end.

    `kind` is `push`, `serve` (of a fetch), `receive`, `fetch` or `offer`; `phase` is one of the
    table's. `blocks` is `in use`, `fenced` (given up or landing; a thread may still be at them)
    or `safe`. `block_ids` holds the first 64 of each cache group, `counts` how many there are.
    `waits_for` are node ids, `why` says what they have to do. `left_s` is the time until its
    deadline.
    """

    id: str
    attempt: int
    kind: str
    state: str
    phase: str
    peers: list[int]
    waits_for: list[int]
    why: str
    blocks: str
    counts: dict[str, int]
    block_ids: dict[str, list[int]]
    bytes_done: int
    bytes_total: int
    age_s: float
    left_s: float


class WaitingView(TypedDict):
    """An offer or a fetch of a peer for which this node has done nothing yet."""

    what: str
    id: str
    attempt: int
    peer: int


class Snapshot(TypedDict):
    """A channel at one moment.

    `ignored` counts messages that came too late, twice, or for an earlier epoch, by type.
    """

    node_id: int
    address: str
    links: list[LinkView]
    transfers: list[TransferView]
    waiting: list[WaitingView]
    pool_leases: list[str]
    bounce_bytes: int
    bounce_limit_bytes: int
    ignored: dict[str, int]


def take(engine: Engine) -> Snapshot:
    """What there is now; runs on the event loop."""
    return cut(engine, None)[0]


def cut(engine: Engine, most: int | None) -> tuple[Snapshot, dict[str, int]]:
    """What there is now, of each list so many at most, and how many are left out of which.

    What is left out is not built either; runs on the event loop.
    """
    receiving, sending = engine.receiving, engine.sending
    offers = [*sending.offering.offers.values(), *sending.offering.ending]
    receives = receiving.arrivals.live | receiving.arrivals.unconfirmed
    backlogs = (("offer", receiving.parked), ("fetch", sending.offering.fetches))
    transfers: Iterator[TransferView] = chain(
        map(_push, sending.live), map(_receive, receives), map(_offer, offers)
    )
    waiting = (
        WaitingView(what=what, id=m.id, attempt=m.attempt, peer=link.peer)
        for what, backlog in backlogs
        for link, m in backlog
    )
    links = list(engine.links)
    leases = engine.pool.lease_holders() if engine.pool is not None else []
    snapshot = Snapshot(
        node_id=engine.node_id,
        address=engine.address,
        links=[_link(k) for k in links[:most]],
        transfers=list(islice(transfers, most)),
        waiting=list(islice(waiting, most)),
        pool_leases=leases[:most],
        bounce_bytes=receiving.bounce_bytes,
        bounce_limit_bytes=engine.settings.max_bounce_bytes,
        ignored=engine.ignored_so_far(),
    )
    there = {
        "links": len(links),
        "transfers": len(sending.live) + len(receives) + len(offers),
        "waiting": sum(len(backlog) for _, backlog in backlogs),
        "pool_leases": len(leases),
    }
    return snapshot, {n: count - most for n, count in there.items() if most and count > most}


def _link(link: Link) -> LinkView:
    return LinkView(
        peer=link.peer,
        direction="out" if link.outgoing else "in",
        up=link.up,
        path=link.path,
        address=link.address,
        invitations=len(link.invitations),
        unread_bytes=link.unread_bytes,
    )


def _push(p: Push) -> TransferView:
    kind = "push" if p.offered is None else "serve"
    if p.link is None:
        why = f"node {p.target} to come"
    elif p.handle.awaits(Event.ACCEPT):
        why = f"node {p.target} to say `receive`"
    elif not p.sealed:
        why = "the stream to be sealed"
    else:
        why = f"node {p.target} to have it all"
    return _view(p.handle, kind, [p.target], [p.target] if p.sealed else [], why, p.blocks)


def _receive(r: Receive) -> TransferView:
    kind = "receive" if r.fetch_from is None else "fetch"
    named = r.fetch_from if r.fetch_from is not None else r.senders or ()
    peers = sorted({s.link.peer for s in r.sources} | {*named})
    if r.handle.awaits(Event.RELEASE):
        waits = sorted({s.link.peer for s in r.sources if not s.released})
        return _view(r.handle, kind, peers, waits, "the senders to confirm", r.blocks)
    waits = sorted(
        set(peers) - r.came | {s.link.peer for s in r.sources if not s.sealed}
        or {s.link.peer for s in r.sources if not s.inflow.complete}
    )
    return _view(r.handle, kind, peers, waits, r.whom(), r.blocks)


def _offer(o: Offered) -> TransferView:
    peers = sorted({p.target for p in o.served})
    why = "fetches under way" if peers else "somebody to fetch it"
    return _view(o.handle, "offer", peers, peers, why, o.blocks)


def _view(
    handle: TransferHandle,
    kind: str,
    peers: list[int],
    waits: list[int],
    why: str,
    blocks: BlockTable | None,
) -> TransferView:
    rule, now, progress = RULES[handle.phase], time.monotonic(), handle.progress
    table: Mapping[str, list[int]] = {
        n: ids[:_MAX_IDS].tolist() for n, ids in (blocks or {}).items()
    }
    ending = not rule.moves and not rule.safe
    return TransferView(
        id=handle.key.id,
        attempt=handle.key.attempt,
        kind=kind,
        state=handle.state.value,
        phase=handle.phase.value,
        peers=peers,
        waits_for=[] if ending else waits,
        why="threads to leave the blocks" if ending else why,
        blocks="safe" if rule.safe else "in use" if rule.moves else "fenced",
        counts={n: len(ids) for n, ids in (blocks or {}).items()},
        block_ids=dict(table),
        bytes_done=progress.bytes_done,
        bytes_total=progress.bytes_total,
        age_s=now - handle.started,
        left_s=handle.left_s,
    )
