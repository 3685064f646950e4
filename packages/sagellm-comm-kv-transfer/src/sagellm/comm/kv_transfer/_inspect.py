"""What a node holds and whom it waits for: told to its owner, and to peers that ask.

Questions go over the control connection of a link, so that whoever asks has proved the key. An
answer names transfers and blocks and has none of their bytes.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sagellm.core.protocols import CommError, DistributedRuntimeError

from . import wire
from ._link import Link
from ._push import Offered, Push
from ._receive import Receive

if TYPE_CHECKING:
    from ._engine import Engine
    from .pool import BlockTable
    from .transfer import TransferHandle

__all__ = ["Inquiries", "describe"]

_MAX_TRANSFERS = 256
_MAX_IDS = 64
_MAX_WAITING = 64

Report = dict[str, Any]  # Any: JSON
Told = Callable[[Report | CommError], None]


def describe(engine: Engine) -> Report:
    """Links, pool, counters, and the transfers in flight, at most some hundreds; on the loop."""
    handles = engine.in_flight()
    pool = engine.pool
    return {
        "node": engine.node_id,
        "address": engine.address,
        "pool": None if pool is None else {"blocks": dict(pool.num_blocks), "leases": pool.leases},
        "links": [
            {
                "peer": link.peer,
                "address": link.address,
                "path": link.path,
                "opened_by": "us" if link.outgoing else "peer",
            }
            for link in engine.links
            if link.up
        ],
        "transfers": [_transfer(h) for h in handles[:_MAX_TRANSFERS]],
        "transfers_left_out": max(0, len(handles) - _MAX_TRANSFERS),
        "stats": asdict(engine.stats()),
    }


def _transfer(handle: TransferHandle) -> Report:
    owner, progress, now = handle.owner, handle.progress, time.monotonic()
    waits_for: list[int | str]
    blocks: BlockTable = {}
    use = "reads"
    if isinstance(owner, Push):
        waits_for, blocks = [owner.target], owner.blocks
    elif isinstance(owner, Receive):
        use, blocks = "writes", owner.blocks or {}
        waits_for = _awaited(owner)
    elif isinstance(owner, Offered):
        waits_for, blocks = ["any node that fetches it"], owner.blocks
    else:
        waits_for = []
    return {
        "id": handle.key.id,
        "attempt": handle.key.attempt,
        "direction": handle.direction,
        "state": handle.state.value,
        "waits_for": waits_for,
        use: {n: {"count": len(i), "first": i[:_MAX_IDS].tolist()} for n, i in blocks.items()},
        "bytes_done": progress.bytes_done,
        "bytes_total": progress.bytes_total,
        "age_s": round(now - handle.started, 3),
        "deadline_in_s": round(handle.deadline - now, 3),
    }


def _awaited(r: Receive) -> list[int | str]:
    """Senders that have not brought all of theirs."""
    if r.fetch_from is not None:
        return [r.fetch_from]
    here = {s.link.peer for s in r.sources if s.sealed and s.inflow.complete}
    come = {s.link.peer for s in r.sources}
    named = set(r.senders or ()) | come
    return [*sorted(named - here)] if named else ["any node that sends it"]


class Inquiries:
    """Questions to peers and their answers. Everything runs on the loop.

    Args:
        report: Makes what peers are told.

    """

    def __init__(self, report: Callable[[], Report]) -> None:
        self._report = report
        self._numbers = itertools.count(1)
        self._open: dict[tuple[Link, int], Told] = {}

    def ask(self, link: Link, told: Told) -> None:
        """Ask a peer; `told` is called with its answer, or with why there will be none."""
        if link.error is not None:
            told(link.error)
            return
        while len(self._open) >= _MAX_WAITING:  # of peers that never answered
            del self._open[next(iter(self._open))]
        number = next(self._numbers)
        self._open[link, number] = told
        link.send(wire.Ask(number))

    def link_lost(self, link: Link, error: CommError) -> None:
        """Tell those who asked over it."""
        for name in [n for n in self._open if n[0] is link]:
            self._open.pop(name)(error)

    def on_ask(self, link: Link, message: wire.Ask) -> None:
        """Answer."""
        link.send(wire.Answer(message.number, json.dumps(self._report())))

    def on_answer(self, link: Link, message: wire.Answer) -> None:
        """Hand over what was asked for; what was not is no reason to end the link."""
        told = self._open.pop((link, message.number), None)
        if told is None:
            return
        try:
            report = json.loads(message.text)
        except (ValueError, RecursionError):
            report = None
        if isinstance(report, dict):
            told(report)
        else:
            link.lose(DistributedRuntimeError(f"node {link.peer}: its report is no JSON object"))
